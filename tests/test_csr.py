"""Codes whose rows have different lengths: batch_topk_encode, threshold_encode and sparse_decode_csr, on every back-end
that runs on CPU tensors without an interpreter. Torch's dense expressions in fp64 are what they must equal."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import refusal_kernels as rk

BACKENDS = ("reference", "cpu")
LOW = (torch.bfloat16, torch.float16)
ALL_DTYPES = (torch.float32, torch.float64, *LOW)
Code = tuple[Tensor, Tensor, Tensor]


def integers(*shape: int, low: int = -3, high: int = 4, dtype: torch.dtype = torch.float32) -> Tensor:
    """Small integers: products and sums are exact in every dtype, and ties are everywhere."""
    return torch.randint(low, high, shape).to(dtype)


@pytest.fixture(autouse=True)
def _seed_and_poison():
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def batch_code(pre: Tensor, k: int) -> list[list[tuple[int, float]]]:
    """The contract of batch_topk_encode in plain Python: (latent, value) of each row, by latent."""
    entries = [(n, f, value) for n, row in enumerate(pre.tolist()) for f, value in enumerate(row)]
    entries = [e for e in entries if e[2] > 0 or math.isnan(e[2])]
    entries.sort(key=lambda e: (not math.isnan(e[2]), -e[2], e[0], e[1]))
    best = sorted(entries[: pre.shape[0] * k], key=lambda e: e[:2])
    return [[(f, value) for n, f, value in best if n == row] for row in range(pre.shape[0])]


def threshold_code(pre: Tensor, threshold: Tensor | float) -> list[list[tuple[int, float]]]:
    limits = torch.as_tensor(threshold).double().expand(pre.shape[1]).tolist()
    wanted = lambda value, limit: math.isnan(value) or (value > limit and value > 0)  # noqa: E731
    return [
        [(f, v) for f, (v, limit) in enumerate(zip(row, limits, strict=True)) if wanted(v, limit)]
        for row in pre.tolist()
    ]


def check_code(code: Code, expected: list[list[tuple[int, float]]], dtype: torch.dtype) -> None:
    values, latents, offsets = code
    assert (values.dtype, latents.dtype, offsets.dtype) == (dtype, torch.int64, torch.int64)
    lengths = [len(row) for row in expected]
    assert offsets.tolist() == [0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()]
    assert latents.tolist() == [f for row in expected for f, _ in row]
    want = torch.tensor([v for row in expected for _, v in row], dtype=torch.float64).to(dtype)
    assert torch.equal(values.isnan(), want.isnan())
    assert torch.equal(values.nan_to_num(-1), want.nan_to_num(-1))


def dense(code: Code, n_latents: int) -> Tensor:
    """[N, F] fp64; gradients go back to the values."""
    values, latents, offsets = code
    rows = torch.arange(offsets.numel() - 1).repeat_interleave(offsets.diff())
    zeros = torch.zeros(offsets.numel() - 1, n_latents, dtype=torch.float64)
    return zeros.index_put((rows, latents.long()), values.double(), accumulate=True)


# --- the two encoders -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize(
    ("n", "d", "f", "k"), [(3, 5, 7, 2), (9, 16, 64, 8), (17, 33, 130, 130), (1, 1, 1, 1), (21, 8, 1025, 31)]
)
def test_encoders_select_exactly(backend, dtype, n, d, f, k):
    x, W = integers(n, d, dtype=dtype), integers(f, d, dtype=dtype)
    b, b_dec = integers(f, dtype=dtype), integers(d, dtype=dtype)
    pre = (x.double() - b_dec.double()) @ W.double().T + b.double()
    code = rk.batch_topk_encode(x, W, b, k, b_dec, backend=backend)
    assert rk.last_backend("batch_topk_encode") == backend
    check_code(code, batch_code(pre, k), dtype)
    for threshold in (4.0, 0, -2.5, math.inf, torch.tensor(3.0), integers(f, low=-9, high=9), integers(f).half()):
        code = rk.threshold_encode(x, W, b, threshold, b_dec, backend=backend)
        assert rk.last_backend("threshold_encode") == backend
        check_code(code, threshold_code(pre, threshold), dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_special_values(backend):
    inf, nan = math.inf, math.nan
    bias = torch.tensor([1.0, nan, inf, -0.0, 0.0, -1.0, -inf, 2.0, nan, 1.0])
    x, W = torch.zeros(2, 3), torch.ones(10, 3)
    pre = bias.expand(2, 10)
    for k in (1, 2, 3, 4, 10):
        check_code(rk.batch_topk_encode(x, W, bias, k, backend=backend), batch_code(pre, k), torch.float32)
    assert rk.batch_topk_encode(x, W, bias, 1, backend=backend)[1].tolist() == [1, 8]  # the NaN of the first row
    for threshold in (-inf, -1.0, 0.0, 1.0, inf):
        code = rk.threshold_encode(x, W, bias, threshold, backend=backend)
        check_code(code, threshold_code(pre, threshold), torch.float32)
    assert rk.threshold_encode(x, W, bias, 1.0, backend=backend)[1].tolist() == [1, 2, 7, 8] * 2
    # A latent whose threshold is NaN keeps nothing but NaN.
    code = rk.threshold_encode(x, W, bias, torch.full((10,), nan), backend=backend)
    assert code[1].tolist() == [1, 8, 1, 8]


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_positive_gives_empty_rows(backend):
    x, W = torch.randn(5, 4), torch.randn(9, 4)
    b = torch.full((9,), -1e3)
    for code in (
        rk.batch_topk_encode(x, W, b, 3, backend=backend),
        rk.threshold_encode(x, W, b, -1e6, backend=backend),
    ):
        assert [t.shape for t in code] == [(0,), (0,), (6,)]
        assert not code[2].any()
        assert not rk.sparse_decode_csr(*code, W, backend=backend).any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "smallest"), [(torch.float16, 2.0**-24), (torch.bfloat16, 2.0**-133)])
def test_what_rounds_to_zero_is_no_entry(backend, dtype, smallest):
    # fp32 pre-activations of half the dtype's smallest number (rounds to 0), a bit more (does not), and the number.
    bias = torch.tensor([smallest / 2, smallest * 0.5078125, smallest, 0.0])
    x, W = torch.zeros(1, 2, dtype=dtype), torch.ones(4, 2, dtype=dtype)
    for values, latents, _ in (
        rk.batch_topk_encode(x, W, bias, 4, backend=backend),
        rk.threshold_encode(x, W, bias, 0.0, backend=backend),
    ):
        assert latents.tolist() == [1, 2]
        assert values.tolist() == [smallest, smallest]


@pytest.mark.parametrize("backend", BACKENDS)
def test_batches_in_the_order_worst_for_a_rising_limit(backend):
    """Ascending: every pre-activation beats all before it. Constant: every one ties. Then one row that takes it all."""
    n, f, k = 40, 500, 3
    ramp = torch.arange(n * f).float().reshape(n, f)
    for pre in (
        ramp,
        ramp.flip(0, 1),
        torch.full((n, f), 2.0),
        (ramp // 7) % 11,
        ramp * (torch.arange(n) == 17)[:, None],
    ):
        code = rk.batch_topk_encode(torch.eye(n), pre.T.contiguous(), torch.zeros(f), k, backend=backend)
        check_code(code, batch_code(pre, k), torch.float32)


def everything_on_the_cpu(*start: Tensor) -> list[Tensor]:
    """Both codes of (x, W, b), and the gradients of their reconstructions."""
    leaves = [t.clone().requires_grad_() for t in start]
    results = []
    for code in (rk.batch_topk_encode(*leaves, 5, backend="cpu"), rk.threshold_encode(*leaves, 6.0, backend="cpu")):
        rk.sparse_decode_csr(*code, leaves[1], backend="cpu").square().sum().backward()
        results += [t.detach() for t in code]
    return results + [leaf.grad for leaf in leaves]


def test_same_bits_for_any_number_of_threads():
    # 1100 rows are cut by rows, 40 by latents.
    W = torch.randn(300, 40)
    W[100:200] = W[:100]  # ties between latents
    b, threads = torch.randn(300), torch.get_num_threads()
    try:
        for n in (1100, 40):
            x, results = torch.randn(n, 40), []
            for count in (1, 2, 3, 2):
                torch.set_num_threads(count)
                results.append(everything_on_the_cpu(x, W, b))
            for other in results[1:]:
                assert all(torch.equal(mine, yours) for mine, yours in zip(results[0], other, strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("isa", ["default", "avx2", "avx512", "avx512_vnni"])
def test_every_instruction_set(isa):
    native = torch.ops.refusal_kernels_cpu
    before = native.isa()
    start = [integers(150, 19), integers(77, 19), integers(77)]
    want = everything_on_the_cpu(*start)
    try:
        native.set_isa(isa)
    except RuntimeError:
        pytest.skip(f"this processor has no {isa}")
    try:
        assert all(torch.equal(mine, yours) for mine, yours in zip(everything_on_the_cpu(*start), want, strict=True))
    finally:
        native.set_isa(before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_thresholds_give_what_their_batch_gave(backend):
    """BatchTopK's usual inference: the smallest value that a batch selected is a threshold that selects the rest."""
    x, W, b, b_dec = (torch.randn(s) for s in ((50, 20), (200, 20), (200,), (20,)))
    values, latents, offsets = rk.batch_topk_encode(x, W, b, 8, b_dec, backend=backend)
    assert values.numel() == 400
    assert offsets.diff().unique().numel() > 3
    below = torch.nextafter(values.min(), torch.tensor(0.0))
    again = rk.threshold_encode(x, W, b, below, b_dec, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip((values, latents, offsets), again, strict=True))
    fewer = rk.threshold_encode(x, W, b, float(values.min()), b_dec, backend=backend)  # strictly above
    assert fewer[0].numel() == 399


@pytest.mark.parametrize("backend", BACKENDS)
def test_encoders_are_as_accurate_as_torch(backend):
    n, d, f, k = 64, 300, 1000, 20
    x, W, b, b_dec = (torch.randn(*s) for s in ((n, d), (f, d), (f,), (d,)))
    exact = ((x.double() - b_dec.double()) @ W.double().T + b.double()).relu()
    torch_error = (((x - b_dec) @ W.T + b).relu().double() - exact).abs()
    for code in (
        rk.batch_topk_encode(x, W, b, k, b_dec, backend=backend),
        rk.threshold_encode(x, W, b, 30.0, b_dec, backend=backend),
    ):
        code_dense = dense(code, f)
        error = torch.where(code_dense != 0, code_dense - exact, 0).abs()
        assert error.max() <= 2 * torch_error.max() + torch.finfo(torch.float32).eps * exact.max()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_shape_and_stride(backend, data):
    lead = data.draw(st.lists(st.integers(0, 4), max_size=3))
    d, f = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 70))
    k = data.draw(st.integers(1, f))
    dtype = data.draw(st.sampled_from(ALL_DTYPES))
    index = data.draw(st.sampled_from([torch.int32, torch.int64]))

    def strided(*shape: int) -> Tensor:
        layout = data.draw(st.sampled_from(["plain", "transposed", "sliced", "expanded"]))
        if layout == "transposed" and len(shape) > 1:
            return integers(*shape[::-1], dtype=dtype).permute(*reversed(range(len(shape))))
        if layout == "sliced":
            return integers(*(2 * s for s in shape), dtype=dtype)[tuple(slice(0, 2 * s, 2) for s in shape)]
        if layout == "expanded" and shape[0] > 0:
            return integers(1, *shape[1:], dtype=dtype).expand(*shape)
        return integers(*shape, dtype=dtype)

    x, W, b = strided(*lead, d), strided(f, d), strided(f)
    b_dec = strided(d) if data.draw(st.booleans()) else None
    pre = ((x.double() - (0 if b_dec is None else b_dec.double())) @ W.double().T + b.double()).reshape(-1, f)
    check_code(rk.batch_topk_encode(x, W, b, k, b_dec, backend=backend), batch_code(pre, k), dtype)
    threshold = strided(f)
    code = rk.threshold_encode(x, W, b, threshold, b_dec, backend=backend)
    check_code(code, threshold_code(pre, threshold), dtype)

    values, latents, offsets = (torch.stack([t, t]).t()[:, 0] for t in code)  # every second element of a buffer
    x_hat = rk.sparse_decode_csr(values, latents.to(index), offsets.to(index), W, b_dec, backend=backend)
    want = dense(code, f) @ W.double() + (0 if b_dec is None else b_dec.double())
    assert x_hat.shape == (pre.shape[0], d)
    assert x_hat.dtype == dtype
    torch.testing.assert_close(x_hat.double(), want.to(dtype).double())


# --- the decoder ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_decode_of_any_order_duplicates_negatives_and_empty_rows(backend, dtype):
    W, b_dec = integers(6, 5, dtype=dtype), integers(5, dtype=dtype)
    values = torch.tensor([1.0, -2.0, 3.0, 0.5, 0.0], dtype=dtype)
    latents = torch.tensor([4, 4, 0, 5, 1], dtype=torch.int32)
    offsets = torch.tensor([0, 0, 3, 3, 5, 5], dtype=torch.int32)
    out = rk.sparse_decode_csr(values, latents, offsets, W, b_dec, backend=backend)
    assert rk.last_backend("sparse_decode_csr") == backend
    zero = torch.zeros(5, dtype=dtype)
    assert torch.equal(out, torch.stack([zero, 3 * W[0] - W[4], zero, 0.5 * W[5], zero]) + b_dec)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("d", [1, 3, 64, 200])
def test_decode_and_gradients_equal_those_of_equal_rows(backend, d):
    """A code [N, k] in CSR form takes another way through the kernels to the same sums."""
    n, f, k = 37, 50, 11
    values, indices = torch.randn(n, k), torch.randint(0, f, (n, k))
    W, grad = torch.randn(f, d), torch.randn(n, d)
    results = []
    for csr in (False, True):
        v, w = values.clone().requires_grad_(), W.clone().requires_grad_()
        if csr:
            x_hat = rk.sparse_decode_csr(v.flatten(), indices.flatten(), torch.arange(n + 1) * k, w, backend=backend)
        else:
            x_hat = rk.sparse_decode(v, indices, w, backend=backend)
        x_hat.backward(grad)
        results.append((x_hat.detach(), v.grad, w.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
        assert backend == "reference" or torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_that_is_not_named_cannot_spoil_the_sum(backend):
    W = torch.randn(4, 7)
    W[2] = math.inf
    W[3] = math.nan
    values, latents, offsets = torch.tensor([1.0, 2.0, 0.0]), torch.tensor([0, 1, 2]), torch.tensor([0, 2, 3])
    x_hat = rk.sparse_decode_csr(values, latents, offsets, W, backend=backend)
    torch.testing.assert_close(x_hat[0], W[0] + 2 * W[1])
    assert x_hat[1].isnan().all()  # 0 * inf, which was asked for


# --- gradients --------------------------------------------------------------------------------------------------------


def doubles(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_against_finite_differences(backend):
    n, d, f = 4, 6, 15
    x, W, b, b_dec, W_dec = doubles((n, d), (f, d), (f,), (d,), (f, d))
    encoders: list[Callable[..., Code]] = [
        lambda x, W, b, b_dec: rk.batch_topk_encode(x, W, b, 3, b_dec, backend=backend),
        lambda x, W, b, b_dec: rk.threshold_encode(x, W, b, 0.5, b_dec, backend=backend),
    ]
    for name, encode in zip(("batch_topk_encode", "threshold_encode"), encoders, strict=True):
        assert encode(x, W, b, b_dec)[0].numel() > 8
        assert torch.autograd.gradcheck(lambda *a: encode(*a)[0], (x, W, b, b_dec))  # noqa: B023
        assert rk.last_backend(f"{name}_backward") == backend
    values = torch.randn(7, dtype=torch.float64, requires_grad=True)
    latents, offsets = torch.randint(0, f, (7,)), torch.tensor([0, 3, 3, 4, 7])
    assert torch.autograd.gradcheck(
        lambda v, w, c: rk.sparse_decode_csr(v, latents, offsets, w, c, backend=backend), (values, W_dec, b_dec)
    )
    assert rk.last_backend("sparse_decode_csr_backward") == backend


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
def test_gradients_are_as_accurate_as_torch(backend, dtype):
    n, d, f, k = 200, 96, 400, 16

    def gradients(cast: torch.dtype, ours: bool) -> list[Tensor]:
        leaves = [t.detach().to(cast, copy=True).requires_grad_() for t in start]
        x, W_enc, b_enc, W_dec, b_dec = leaves
        if ours:
            code = rk.batch_topk_encode(x, W_enc, b_enc, k, b_dec, backend=backend)
            x_hat = rk.sparse_decode_csr(*code, W_dec, b_dec, backend=backend)
        else:
            pre = ((x - b_dec) @ W_enc.T + b_enc).relu()
            x_hat = (pre * selected) @ W_dec + b_dec
        (x_hat * probe.to(cast)).sum().backward()
        return [leaf.grad.double() for leaf in leaves]

    start = [torch.randn(*s) / 4 for s in ((n, d), (f, d), (f,), (f, d), (d,))]
    start = [t.to(dtype).float() for t in start]
    probe = torch.randn(n, d).to(dtype).float()
    code = rk.batch_topk_encode(*(t.to(dtype) for t in start[:3]), k, start[4].to(dtype), backend=backend)
    selected = dense(code, f) != 0
    for mine, plain, exact in zip(
        gradients(dtype, True), gradients(dtype, False), gradients(torch.float64, False), strict=True
    ):
        rounding = torch.finfo(dtype).eps * exact.abs().max()
        assert (mine - exact).abs().max() <= 3 * (plain - exact).abs().max() + rounding
        assert (mine - exact).abs().mean() <= 3 * (plain - exact).abs().mean() + rounding


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_gradients_asked_for(backend):
    tensors = (torch.randn(7, 4), torch.randn(9, 4), torch.randn(9), torch.randn(4))
    for wanted in range(4):
        leaves = [t.clone().requires_grad_(i == wanted) for i, t in enumerate(tensors)]
        code = rk.threshold_encode(*leaves[:3], 0.1, leaves[3], backend=backend)
        code[0].sum().backward()
        plain = [t.clone().requires_grad_(i == wanted) for i, t in enumerate(tensors)]
        pre = (plain[0] - plain[3]) @ plain[1].T + plain[2]
        pre[pre > 0.1].sum().backward()
        assert [leaf.grad is None for leaf in leaves] == [i != wanted for i in range(4)]
        torch.testing.assert_close(leaves[wanted].grad, plain[wanted].grad)
    values, latents, offsets = torch.randn(5), torch.tensor([0, 8, 8, 2, 1]), torch.tensor([0, 2, 5])
    for wanted in range(3):
        start = (values, tensors[1], tensors[3])
        leaves = [t.clone().requires_grad_(i == wanted) for i, t in enumerate(start)]
        rk.sparse_decode_csr(leaves[0], latents, offsets, *leaves[1:], backend=backend).square().sum().backward()
        plain = [t.clone().requires_grad_(i == wanted) for i, t in enumerate(start)]
        (dense((plain[0], latents, offsets), 9).float() @ plain[1] + plain[2]).square().sum().backward()
        assert [leaf.grad is None for leaf in leaves] == [i != wanted for i in range(3)]
        torch.testing.assert_close(leaves[wanted].grad, plain[wanted].grad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradient_leads_to_a_threshold(backend):
    """As from the comparison in plain torch, and the other gradients are not disturbed."""
    x, W, b = torch.randn(7, 4), torch.randn(9, 4, requires_grad=True), torch.randn(9)
    threshold = torch.full((9,), 0.1, requires_grad=True)
    rk.threshold_encode(x, W, b, threshold, backend=backend)[0].sum().backward()
    assert threshold.grad is None
    assert W.grad.any()
    assert not rk.threshold_encode(x, W.detach(), b, threshold, backend=backend)[0].requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_reaches_the_loss_and_the_gradients(backend):
    x = torch.randn(3, 4)
    x[1, 2] = math.nan
    W = torch.randn(9, 4, requires_grad=True)
    for encode, choice in ((rk.batch_topk_encode, 4), (rk.threshold_encode, 0.5)):
        values, _, offsets = encode(x, W, torch.zeros(9), choice, backend=backend)
        assert values[offsets[1] : offsets[2]].isnan().sum() == 9
        x_hat = rk.sparse_decode_csr(values, _, offsets, W.detach(), backend=backend)
        assert x_hat.isnan().any(1).tolist() == [False, True, False]
        (gradient,) = torch.autograd.grad(values.sum(), W)
        assert gradient.isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4), (4,)])
def test_empty_batches_and_single_vectors(backend, shape):
    x = torch.randn(shape, requires_grad=True)
    W, b = torch.randn(9, 4, requires_grad=True), torch.full((9,), 9.0, requires_grad=True)
    n = math.prod(shape[:-1])
    for encode, choice in ((rk.batch_topk_encode, 3), (rk.threshold_encode, 0.0)):
        code = encode(x, W, b, choice, backend=backend)
        assert code[2].shape == (n + 1,)
        assert (code[0].numel() > 0) == (n > 0)
        x_hat = rk.sparse_decode_csr(*code, W, backend=backend)
        assert x_hat.shape == (n, 4)
        dx, dW = torch.autograd.grad(x_hat.sum(), (x, W))
        assert dx.shape == x.shape
        assert dW.shape == W.shape
        assert not dW.isnan().any()


# --- dtypes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", LOW)
def test_autocast_casts_operands_as_linear_does(backend, dtype):
    x, W, b = torch.randn(6, 8), torch.randn(20, 8, requires_grad=True), torch.randn(20)
    for encode, choice in ((rk.batch_topk_encode, 3), (rk.threshold_encode, 1.5)):
        with torch.autocast("cpu", dtype=dtype):
            code = encode(x, W, b, choice, backend=backend)
            x_hat = rk.sparse_decode_csr(*code, W, backend=backend)
        assert code[0].dtype == x_hat.dtype == dtype
        want = encode(x.to(dtype), W.detach().to(dtype), b, choice, backend="reference")
        assert torch.equal(code[1], want[1])
        assert torch.equal(code[2], want[2])
        torch.testing.assert_close(code[0], want[0])
        (gradient,) = torch.autograd.grad(x_hat.float().sum(), W)
        assert gradient.dtype == torch.float32
        assert gradient.any()


def test_mixed_dtypes_are_promoted():
    x, W, b = torch.randn(3, 4).bfloat16(), torch.randn(7, 4), torch.randn(7).double()
    code = rk.batch_topk_encode(x, W, b, 2)
    assert code[0].dtype == torch.float32
    assert rk.last_backend("batch_topk_encode") == "cpu"
    assert rk.threshold_encode(x, W, b, torch.tensor(0.1, dtype=torch.float64))[0].dtype == torch.float32
    assert rk.sparse_decode_csr(code[0].half(), *code[1:], W).dtype == torch.float32


# --- tracing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "dtype"), [("reference", torch.float64), ("cpu", torch.float32), ("cpu", torch.bfloat16)]
)
def test_opcheck(backend, dtype):
    ops = torch.ops.refusal_kernels
    x, W, b, b_dec = (torch.randn(s).to(dtype) for s in ((6, 5), (11, 5), (11,), (5,)))
    x, W = x.T.contiguous().T, W.T.contiguous().T
    torch.library.opcheck(ops.batch_topk_encode.default, (x, W, b, 3, b_dec, backend))
    torch.library.opcheck(ops.threshold_encode.default, (x, W, b, b.abs(), b_dec, backend))
    values, latents, offsets = ops.batch_topk_encode(x, W, b, 3, b_dec, backend)
    torch.library.opcheck(ops.sparse_decode_csr.default, (values, latents, offsets, W, b_dec, backend))
    for flags in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(
            ops.csr_encode_backward.default,
            (values, latents, offsets, x, W, b_dec, *flags, "batch_topk_encode", backend),
        )
        torch.library.opcheck(ops.sparse_decode_csr_backward.default, (x, values, latents, offsets, W, *flags, backend))


def test_fullgraph_gives_the_same_gradients():
    """The number of entries is data: Dynamo wants to be told that a graph may hold such a size, and breaks it else."""

    def loss(x, W_enc, b_enc, W_dec, b_dec):
        code = rk.batch_topk_encode(x, W_enc, b_enc, 3, b_dec)
        x_hat = rk.sparse_decode_csr(*code, W_dec, b_dec)
        inference = rk.sparse_decode_csr(*rk.threshold_encode(x, W_enc, b_enc, 0.3, b_dec), W_dec, b_dec)
        return (x_hat - x).square().sum() + inference.sin().sum()

    start = [torch.randn(s) for s in ((6, 5), (11, 5), (11,), (11, 5), (5,))]
    results = []
    whole = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for function, told in ((loss, False), (whole, True), (torch.compile(loss, backend="eager"), False)):
        torch.compiler.reset()
        leaves = [t.clone().requires_grad_() for t in start]
        with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=told):
            value = function(*leaves)
            value.backward()
        results.append([value.detach(), *(leaf.grad for leaf in leaves)])
    torch.compiler.reset()
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b)


# --- memory -----------------------------------------------------------------------------------------------------------


def test_encoders_never_hold_the_dense_pre_activations():
    """[N, F] would be 1 GiB here. Allowed: a workspace of 40 MiB, and what the docstrings say of each entry."""
    code = """
import resource, torch, refusal_kernels as rk
torch.set_num_threads(2)
x, W, b = torch.randn(4096, 16), torch.randn(65536, 16), torch.zeros(65536)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name, choice, each in (("batch_topk_encode", 4, 2 * 32 + 80), ("threshold_encode", 12.0, 70)):
    encode = getattr(rk, name)
    encode(x[:8], W, b, choice)
    before = peak()
    values, latents, offsets = encode(x, W, b, choice)
    assert rk.last_backend(name) == "cpu"
    print(values.numel(), 1024 * (peak() - before), (40 << 20) + (each + 12) * values.numel())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        entries, grown, allowed = (int(word) for word in line.split())
        assert entries >= 16384
        assert grown < allowed, line


# --- wrong arguments --------------------------------------------------------------------------------------------------

GOOD_ENCODE = {
    "x": torch.randn(3, 4),
    "W_enc": torch.randn(9, 4),
    "b_enc": torch.randn(9),
    "b_dec": torch.randn(4),
}
GOOD_DECODE = {
    "values": torch.randn(5),
    "latents": torch.tensor([0, 8, 1, 2, 3]),
    "offsets": torch.tensor([0, 2, 2, 5]),
    "W_dec": torch.randn(9, 4),
    "b_dec": torch.randn(4),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(3, 5)}, r"last dimension of x must be d = W_enc.shape\[1\] = 4; got x of shape \(3, 5\)"),
        ({"x": torch.ones(3, 4, dtype=torch.int64)}, r"x must have one of the dtypes float32.*int64"),
        ({"W_enc": torch.randn(0, 4)}, r"W_enc must be a non-empty matrix \[F, d\]"),
        ({"b_enc": torch.randn(8)}, r"b_enc must have shape \[F\] = \(9,\); got \(8,\)"),
        ({"b_dec": torch.randn(9)}, r"b_dec must have shape \[d\] = \(4,\); got \(9,\)"),
        ({"backend": "gpu"}, "backend must be one of reference, cpu, triton, cuda, triton-int8, auto; got 'gpu'"),
    ],
)
def test_both_encoders_name_what_is_wrong(change, message):
    for encode, choice in ((rk.batch_topk_encode, {"k": 2}), (rk.threshold_encode, {"threshold": 0.5})):
        with pytest.raises((ValueError, TypeError), match=f"{encode.__name__}: |backend must") as caught:
            encode(**{**GOOD_ENCODE, **choice, **change})
        assert caught.match(message)


@pytest.mark.parametrize(
    ("k", "message"),
    [
        (10, r"batch_topk_encode: k must be at most F = W_enc.shape\[0\] = 9; got k = 10"),
        (0, "k must be at least 1; got k = 0"),
        (2.0, r"k must be an integer; got float 2\.0"),
        (None, "k must be an integer; got NoneType None"),
    ],
)
def test_batch_topk_names_a_wrong_k(k, message):
    with pytest.raises((ValueError, TypeError), match=message):
        rk.batch_topk_encode(**GOOD_ENCODE, k=k)


@pytest.mark.parametrize(
    ("threshold", "message"),
    [
        (math.nan, r"threshold must be a number that is not NaN, or a float tensor of shape \[\] or \[F\] = \(9,\)"),
        (None, "threshold must be a number that is not NaN.*got NoneType None"),
        (True, "threshold must be a number that is not NaN.*got bool True"),
        ("0.5", "threshold must be a number that is not NaN.*got str '0.5'"),
        (torch.randn(8), r"threshold must be .* \[F\] = \(9,\); got a tensor of shape \(8,\)"),
        (torch.randn(1), r"threshold must be .* \[F\] = \(9,\); got a tensor of shape \(1,\)"),
        (torch.randn(3, 9), r"threshold must be .* \[F\] = \(9,\); got a tensor of shape \(3, 9\)"),
        (torch.ones(9, dtype=torch.int64), "threshold must have one of the dtypes float32.*int64"),
        (torch.randn(9, device="meta"), "one device; x is on cpu, threshold is on meta"),
    ],
)
def test_threshold_encode_names_a_wrong_threshold(threshold, message):
    with pytest.raises((ValueError, TypeError), match=f"threshold_encode: .*{message}"):
        rk.threshold_encode(**GOOD_ENCODE, threshold=threshold)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents": torch.tensor([0, 9, 1, 2, 3])}, r"latents must lie in \[0, F\) with F = W_dec.shape\[0\] = 9.*9"),
        ({"latents": torch.tensor([0, -1, 1, 2, 3])}, r"latents must lie in \[0, F\).*-1"),
        ({"latents": torch.zeros(4, dtype=torch.int64)}, r"latents must have the shape of values = \(5,\); got \(4,\)"),
        ({"latents": torch.zeros(5)}, "latents must have one of the dtypes int64, int32"),
        ({"offsets": torch.tensor([0, 2, 2, 6])}, r"end with nnz = values.shape\[0\] = 5; got 0 .* and 6 at the end"),
        ({"offsets": torch.tensor([0, 2, 2, 4])}, r"end with nnz = values.shape\[0\] = 5; got 0 .* and 4 at the end"),
        ({"offsets": torch.tensor([1, 2, 2, 5])}, "begin with 0 .*got 1 at the beginning"),
        (
            {"offsets": torch.tensor([0, 3, 2, 5])},
            r"offsets must not decrease; got offsets\[1\] = 3 before offsets\[2\] = 2",
        ),
        ({"offsets": torch.tensor([0, 7, 5])}, r"offsets must not decrease; got offsets\[1\] = 7"),
        ({"offsets": torch.tensor([0, -1, 5])}, r"offsets must not decrease; got offsets\[0\] = 0 before"),
        ({"offsets": torch.tensor([0])}, "end with nnz"),
        ({"offsets": torch.zeros(0, dtype=torch.int64)}, r"offsets must have shape \[N \+ 1\], one more than"),
        ({"offsets": torch.zeros(2, 3, dtype=torch.int64)}, r"offsets must have shape \[N \+ 1\], one dimension"),
        ({"offsets": torch.tensor([0.0, 2, 2, 5])}, "offsets must have one of the dtypes int64, int32"),
        ({"offsets": [0, 2, 2, 5]}, "offsets must be a torch.Tensor; got list"),
        ({"values": torch.randn(5, 1)}, r"values must have shape \[nnz\], one dimension"),
        ({"values": torch.ones(5, dtype=torch.int32)}, "values must have one of the dtypes float32"),
        ({"W_dec": torch.randn(9)}, r"W_dec must be a non-empty matrix \[F, d\]"),
        ({"b_dec": torch.randn(5)}, r"b_dec must have shape \[d\] = \(4,\); got \(5,\)"),
        ({"W_dec": torch.randn(9, 4, device="meta")}, "one device; values is on cpu, W_dec is on meta"),
    ],
)
def test_decode_names_what_is_wrong(backend, change, message):
    with pytest.raises((ValueError, TypeError), match=f"sparse_decode_csr: .*{message}"):
        rk.sparse_decode_csr(**{**GOOD_DECODE, **change}, backend=backend)


def test_the_raw_kernels_refuse_what_would_read_outside():
    """The operators of the extension are safe on their own, whoever calls them."""
    ops = torch.ops.refusal_kernels_cpu
    values, W, x = torch.randn(3), torch.randn(5, 4), torch.randn(2, 4)
    good, wrong = torch.tensor([0, 1, 3]), torch.tensor([0, 4, 3])
    for latents, offsets in ((torch.tensor([0, 1, 5]), good), (torch.tensor([0, 1, 2]), wrong)):
        for call in (
            lambda: ops.sparse_decode_csr(values, latents, offsets, W, None),  # noqa: B023
            lambda: ops.sparse_decode_csr_backward(x, values, latents, offsets, W, True, True),  # noqa: B023
            lambda: ops.csr_encode_backward(values, latents, offsets, x, W, None, True, True),  # noqa: B023
        ):
            with pytest.raises(RuntimeError, match=r"must lie in|offsets must begin"):
                call()


def test_explicit_requests_that_cannot_run_list_their_reasons():
    for call in (
        lambda: rk.batch_topk_encode(**GOOD_ENCODE, k=2, backend="cuda"),
        lambda: rk.sparse_decode_csr(**GOOD_DECODE, backend="cuda"),
    ):
        with pytest.raises(rk.BackendError, match="cpu: supported"):
            call()


def test_torch_func_is_refused_in_plain_words():
    encode = lambda x: rk.batch_topk_encode(x, GOOD_ENCODE["W_enc"], GOOD_ENCODE["b_enc"], 2)[0].sum()  # noqa: E731
    with pytest.raises(NotImplementedError, match=r"batch_topk_encode: the transforms of torch\.func \(grad, vmap"):
        torch.func.grad(encode)(torch.randn(3, 4))
