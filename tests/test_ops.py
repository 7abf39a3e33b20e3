"""topk_encode and sparse_decode: the contract, on every back-end that runs on CPU tensors without an interpreter."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import refusal_kernels as rk

BACKENDS = ("reference", "cpu")
LOW = (torch.bfloat16, torch.float16)
ALL_DTYPES = (torch.float32, torch.float64, *LOW)


def expected_selection(pre: torch.Tensor, k: int) -> list[list[int]]:
    """The k best latents of each row by the contract, in plain Python: NaN, value descending, index ascending."""

    def key(item: tuple[int, float]) -> tuple[bool, float, int]:
        index, value = item
        return (not math.isnan(value), -value if value > 0 else 0.0, index)

    return [[i for i, _ in sorted(enumerate(row.tolist()), key=key)[:k]] for row in pre]


def integers(*shape: int, low: int = -3, high: int = 4, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Small integers: products and sums are exact in every dtype, and ties are everywhere."""
    return torch.randint(low, high, shape).to(dtype)


@pytest.fixture(autouse=True)
def _seed_and_poison():
    torch.manual_seed(0)
    # Uninitialised outputs are filled with NaN and the largest integer, so an element nobody writes is seen.
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize(
    ("n", "d", "f", "k"), [(3, 5, 7, 2), (9, 16, 64, 8), (17, 33, 130, 130), (1, 1, 1, 1), (65, 8, 1025, 31)]
)
def test_encode_selects_exactly(backend, dtype, n, d, f, k):
    x, W, b, b_dec = (
        integers(n, d, dtype=dtype),
        integers(f, d, dtype=dtype),
        integers(f, dtype=dtype),
        integers(d, dtype=dtype),
    )
    values, indices = rk.topk_encode(x, W, b, k, b_dec, backend=backend)
    pre = (x.double() - b_dec.double()) @ W.double().T + b.double()
    assert rk.last_backend("topk_encode") == backend
    assert indices.dtype == torch.int64
    assert values.dtype == dtype
    assert indices.tolist() == expected_selection(pre, k)
    assert torch.equal(values.double(), pre.relu().gather(1, indices).to(dtype).double())


@pytest.mark.parametrize("backend", BACKENDS)
def test_encode_special_values(backend):
    # The encoder is the identity, so x is the pre-activation.
    inf, nan = math.inf, math.nan
    x = torch.tensor(
        [
            [1.0, nan, inf, nan, -1.0, 2.0],
            [-1.0, -2.0, -3.0, -4.0, -5.0, -6.0],
            [0.0, -0.0, 0.0, -0.0, 3.0, -0.0],
            [2.0, 2.0, 2.0, 2.0, 2.0, 2.0],
            [-inf, 1.0, -inf, inf, inf, 0.0],
        ]
    )
    rows = []
    for row in x:  # 0 * inf is NaN in a product, so infinite and NaN entries are brought in through the bias
        values, indices = rk.topk_encode(torch.zeros(1, 6), torch.eye(6), row, 4, backend=backend)
        rows.append((values[0], indices[0]))
    assert [i.tolist() for _, i in rows] == [[1, 3, 2, 5], [0, 1, 2, 3], [4, 0, 1, 2], [0, 1, 2, 3], [3, 4, 1, 0]]
    assert rows[0][0].isnan().tolist() == [True, True, False, False]
    assert rows[0][0][2] == inf
    assert rows[1][0].tolist() == [0, 0, 0, 0]
    assert rows[2][0].tolist() == [3, 0, 0, 0]
    assert rows[4][0].tolist() == [inf, inf, 1, 0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_encode_survives_rows_in_the_order_worst_for_a_filter(backend):
    # Ascending rows: every element beats all before it. Descending, constant and clustered rows beside them.
    f, k = 5000, 37
    pre = torch.stack(
        [torch.arange(f).float(), torch.arange(f).flip(0).float(), torch.full((f,), 2.0), torch.arange(f) // 100 % 7.0]
    )
    values, indices = rk.topk_encode(torch.eye(4), pre.T.contiguous(), torch.zeros(f), k, backend=backend)
    assert indices.tolist() == expected_selection(pre, k)
    assert torch.equal(values, pre.gather(1, indices))


@pytest.mark.parametrize("backend", BACKENDS)
def test_encode_is_as_accurate_as_torch(backend):
    dtype = torch.float32
    n, d, f, k = 64, 300, 1000, 20
    x, W, b, b_dec = (torch.randn(*s, dtype=dtype) for s in ((n, d), (f, d), (f,), (d,)))
    exact = ((x.double() - b_dec.double()) @ W.double().T + b.double()).relu()
    values, indices = rk.topk_encode(x, W, b, k, b_dec, backend=backend)
    torch_error = (((x - b_dec) @ W.T + b).relu().double() - exact).gather(1, indices).abs()
    error = (values.double() - exact.gather(1, indices)).abs()
    assert error.max() <= 2 * torch_error.max() + torch.finfo(dtype).eps * exact.max()
    assert error.mean() <= 2 * torch_error.mean() + torch.finfo(dtype).eps


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", LOW)
def test_low_precision_accumulates_in_fp32(backend, dtype):
    # 4096 ones, then halves: a bf16 or fp16 running sum would stop growing at 256 or 2048.
    d = 4096
    x, W = torch.ones(2, d, dtype=dtype), torch.full((3, d), 0.5, dtype=dtype)
    values, _ = rk.topk_encode(x, W, torch.zeros(3), 1, backend=backend)
    assert values.tolist() == [[2048.0], [2048.0]]
    x_hat = rk.sparse_decode(
        torch.ones(2, d, dtype=dtype), torch.zeros(2, d, dtype=torch.int64), W[:, :3], backend=backend
    )
    assert torch.equal(x_hat, torch.full((2, 3), 2048.0, dtype=dtype))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
@pytest.mark.parametrize("backend", BACKENDS)
def test_encode_and_decode_take_any_shape_and_stride(backend, data):
    lead = data.draw(st.lists(st.integers(0, 4), max_size=3))
    d, f = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 70))
    k = data.draw(st.integers(1, f))
    dtype = data.draw(st.sampled_from(ALL_DTYPES))
    index_dtype = data.draw(st.sampled_from([torch.int32, torch.int64]))

    def strided(*shape: int) -> torch.Tensor:
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
    values, indices = rk.topk_encode(x, W, b, k, b_dec, backend=backend)
    centred = x.double() - (0 if b_dec is None else b_dec.double())
    pre = centred @ W.double().T + b.double()
    assert values.shape == indices.shape == (*lead, k)
    assert indices.reshape(-1, k).tolist() == expected_selection(pre.reshape(-1, f), k)

    x_hat = rk.sparse_decode(values, indices.to(index_dtype), W, b_dec, backend=backend)
    want = (values.double()[..., None] * W.double()[indices]).sum(-2) + (0 if b_dec is None else b_dec.double())
    assert x_hat.shape == (*lead, d)
    assert x_hat.dtype == dtype
    torch.testing.assert_close(x_hat.double(), want.to(dtype).double())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_decode_adds_duplicates_and_negative_values(backend, dtype):
    W = integers(6, 5, dtype=dtype)
    values, indices = torch.tensor([[1.0, -2.0, 3.0]], dtype=dtype), torch.tensor([[4, 4, 0]], dtype=torch.int32)
    out = rk.sparse_decode(values, indices, W, backend=backend)
    assert rk.last_backend("sparse_decode") == backend
    assert torch.equal(out, (-1 * W[4] + 3 * W[0])[None])


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_against_finite_differences(backend):
    n, d, f, k = 4, 6, 15, 3
    x, W, b, W_dec, b_dec = (
        torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((n, d), (f, d), (f,), (f, d), (d,))
    )
    assert torch.autograd.gradcheck(lambda *a: rk.topk_encode(*a[:3], k, a[3], backend=backend)[0], (x, W, b, b_dec))
    values = torch.randn(n, k, dtype=torch.float64, requires_grad=True)
    indices = torch.randint(0, f, (n, k))
    assert torch.autograd.gradcheck(
        lambda v, w, c: rk.sparse_decode(v, indices, w, c, backend=backend), (values, W_dec, b_dec)
    )
    assert rk.last_backend("topk_encode_backward") == rk.last_backend("sparse_decode_backward") == backend


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
def test_gradients_are_as_accurate_as_torch(backend, dtype):
    n, d, f, k = 200, 96, 400, 16

    def gradients(cast: torch.dtype, ours: bool) -> list[torch.Tensor]:
        leaves = [t.detach().to(cast, copy=True).requires_grad_() for t in start]
        x, W_enc, b_enc, W_dec, b_dec = leaves
        if ours:
            values, indices = rk.topk_encode(x, W_enc, b_enc, k, b_dec, backend=backend)
            x_hat = rk.sparse_decode(values, indices, W_dec, b_dec, backend=backend)
        else:
            pre = ((x - b_dec) @ W_enc.T + b_enc).relu()
            values = pre.gather(1, selection)
            x_hat = (values[..., None] * W_dec[selection]).sum(1) + b_dec
        (x_hat * probe.to(cast)).sum().backward()
        return [leaf.grad.double() for leaf in leaves]

    start = [torch.randn(*s) / 4 for s in ((n, d), (f, d), (f,), (f, d), (d,))]
    start = [t.to(dtype).float() for t in start]
    probe = torch.randn(n, d).to(dtype).float()
    _, selection = rk.topk_encode(*(t.to(dtype) for t in start[:3]), k, start[4].to(dtype), backend=backend)
    for mine, plain, exact in zip(
        gradients(dtype, True), gradients(dtype, False), gradients(torch.float64, False), strict=True
    ):
        rounding = torch.finfo(dtype).eps * exact.abs().max()
        assert (mine - exact).abs().max() <= 3 * (plain - exact).abs().max() + rounding
        assert (mine - exact).abs().mean() <= 3 * (plain - exact).abs().mean() + rounding


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradient_passes_through_a_zero(backend):
    x = torch.randn(8, 5, requires_grad=True)
    W, b = torch.randn(30, 5, requires_grad=True), torch.full((30,), -100.0, requires_grad=True)
    values, indices = rk.topk_encode(x, W, b, 4, backend=backend)
    assert indices.tolist() == [[0, 1, 2, 3]] * 8
    values.sum().backward()
    assert not x.grad.any()
    assert not W.grad.any()
    assert not b.grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_reaches_the_loss_and_the_gradients(backend):
    x = torch.randn(3, 4)
    x[1, 2] = math.nan
    W = torch.randn(9, 4, requires_grad=True)
    values, _indices = rk.topk_encode(x, W, torch.zeros(9), 2, backend=backend)
    assert values[1].isnan().all()
    assert not values[[0, 2]].isnan().any()
    values.sum().backward()
    assert W.grad.isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_gradients_asked_for(backend):
    x, W, b, b_dec = torch.randn(7, 4), torch.randn(9, 4), torch.randn(9), torch.randn(4)
    for wanted in range(4):
        leaves = [t.clone().requires_grad_(i == wanted) for i, t in enumerate((x, W, b, b_dec))]
        values, indices = rk.topk_encode(*leaves[:3], 2, leaves[3], backend=backend)
        values.sum().backward()
        dense = [t.clone().requires_grad_(i == wanted) for i, t in enumerate((x, W, b, b_dec))]
        ((dense[0] - dense[3]) @ dense[1].T + dense[2]).relu().gather(1, indices).sum().backward()
        assert [leaf.grad is None for leaf in leaves] == [i != wanted for i in range(4)]
        torch.testing.assert_close(leaves[wanted].grad, dense[wanted].grad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous_grad_output(backend):
    W = torch.randn(9, 6, requires_grad=True)
    values, indices = torch.randn(5, 3, requires_grad=True), torch.randint(0, 9, (5, 3))
    grad = torch.randn(6, 5).T
    torch.autograd.backward(rk.sparse_decode(values, indices, W, backend=backend), grad)
    want_values = torch.einsum("nd,nkd->nk", grad, W.detach()[indices])
    torch.testing.assert_close(values.grad, want_values)
    want_W = torch.zeros(9, 6).index_add_(
        0, indices.flatten(), (values.detach()[..., None] * grad[:, None]).reshape(-1, 6)
    )
    torch.testing.assert_close(W.grad, want_W)
    # sum() hands an expanded, stride-0 gradient to the backward pass
    values.grad = W.grad = None
    rk.sparse_decode(values, indices, W, backend=backend).sum().backward()
    torch.testing.assert_close(values.grad, W.detach()[indices].sum(-1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4), (4,)])
def test_empty_batches_and_single_vectors(backend, shape):
    x = torch.randn(shape, requires_grad=True)
    W, b = torch.randn(9, 4, requires_grad=True), torch.randn(9, requires_grad=True)
    values, indices = rk.topk_encode(x, W, b, 3, backend=backend)
    x_hat = rk.sparse_decode(values, indices, W, backend=backend)
    assert values.shape == indices.shape == (*shape[:-1], 3)
    assert x_hat.shape == shape
    x_hat.sum().backward()
    assert x.grad.shape == x.shape
    assert W.grad.shape == W.shape
    assert not W.grad.isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_input_same_bits(backend):
    n, d, f, k = 500, 40, 300, 9
    W = torch.randn(f, d)
    W[100:200] = W[:100]  # duplicate rows: ties between latents

    def run() -> list[torch.Tensor]:
        torch.manual_seed(1)
        x = torch.randn(n, d, requires_grad=True)
        w = W.clone().requires_grad_()
        values, indices = rk.topk_encode(x, w, torch.zeros(f), k, backend=backend)
        rk.sparse_decode(values, indices, w, backend=backend).square().sum().backward()
        return [values.detach(), indices, x.grad, w.grad]

    threads = torch.get_num_threads()
    first = run()
    try:
        torch.set_num_threads(1)
        single = run()
    finally:
        torch.set_num_threads(threads)
    for a, b, c in zip(first, run(), single, strict=True):
        assert torch.equal(a, b)
        if backend == "cpu":  # dense products of the reference may split differently with the number of threads
            assert torch.equal(a, c)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", LOW)
def test_autocast_casts_operands_as_linear_does(backend, dtype):
    x, W, b = torch.randn(6, 8), torch.randn(20, 8, requires_grad=True), torch.randn(20)
    with torch.autocast("cpu", dtype=dtype):
        values, indices = rk.topk_encode(x, W, b, 3, backend=backend)
        x_hat = rk.sparse_decode(values, indices, W, backend=backend)
    assert values.dtype == x_hat.dtype == dtype
    want, want_indices = rk.topk_encode(x.to(dtype), W.detach().to(dtype), b, 3, backend="reference")
    assert torch.equal(indices, want_indices)
    torch.testing.assert_close(values, want)
    x_hat.float().sum().backward()
    assert W.grad.dtype == torch.float32
    assert W.grad.abs().sum() > 0


def test_mixed_dtypes_are_promoted():
    values, indices = rk.topk_encode(torch.randn(3, 4).bfloat16(), torch.randn(7, 4), torch.randn(7).double(), 2)
    assert values.dtype == torch.float32
    assert rk.sparse_decode(values.half(), indices, torch.randn(7, 4)).dtype == torch.float32


GOOD_ENCODE = {
    "x": torch.randn(3, 4),
    "W_enc": torch.randn(9, 4),
    "b_enc": torch.randn(9),
    "k": 2,
    "b_dec": torch.randn(4),
}
GOOD_DECODE = {
    "values": torch.randn(3, 2),
    "indices": torch.tensor([[0, 8], [1, 2], [3, 4]]),
    "W_dec": torch.randn(9, 4),
    "b_dec": torch.randn(4),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 10}, r"k must be at most F = W_enc.shape\[0\] = 9; got k = 10"),
        ({"k": 0}, "k must be at least 1; got k = 0"),
        ({"k": -3}, "k must be at least 1; got k = -3"),
        ({"k": 2.0}, r"k must be an integer; got float 2\.0"),
        ({"k": True}, "k must be an integer; got bool True"),
        ({"k": None}, "k must be an integer; got NoneType None"),
        ({"x": torch.randn(3, 5)}, r"last dimension of x must be d = W_enc.shape\[1\] = 4; got x of shape \(3, 5\)"),
        ({"x": torch.ones(3, 4, dtype=torch.int64)}, r"x must have one of the dtypes float32.*int64"),
        ({"x": torch.ones(3, 4, dtype=torch.complex64)}, r"x must have one of the dtypes float32.*complex64"),
        ({"x": torch.tensor(1.0)}, "x must have at least 1 dimension"),
        ({"x": [[1.0] * 4]}, "x must be a torch.Tensor; got list"),
        ({"x": torch.randn(3, 4, device="meta")}, "one device; x is on meta, W_enc is on cpu"),
        ({"x": torch.randn(3, 4).to_sparse()}, "x must be a dense"),
        ({"W_enc": torch.randn(9)}, r"W_enc must be a non-empty matrix \[F, d\]"),
        ({"W_enc": torch.randn(0, 4)}, r"W_enc must be a non-empty matrix \[F, d\]"),
        ({"b_enc": torch.randn(8)}, r"b_enc must have shape \[F\] = \(9,\); got \(8,\)"),
        ({"b_dec": torch.randn(9)}, r"b_dec must have shape \[d\] = \(4,\); got \(9,\)"),
        ({"b_dec": torch.ones(4, dtype=torch.bool)}, "b_dec must have one of the dtypes"),
        ({"backend": "gpu"}, "backend must be one of reference, cpu, triton, cuda, triton-int8, auto; got 'gpu'"),
    ],
)
def test_encode_names_what_is_wrong(change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        rk.topk_encode(**{**GOOD_ENCODE, **change})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"indices": torch.tensor([[0, 9], [1, 2], [3, 4]])}, r"indices must lie in \[0, F\).*9"),
        ({"indices": torch.tensor([[0, -1], [1, 2], [3, 4]])}, r"indices must lie in \[0, F\).*-1"),
        (
            {"indices": torch.zeros(3, 3, dtype=torch.int64)},
            r"indices must have the shape of values = \(3, 2\); got \(3, 3\)",
        ),
        ({"indices": torch.zeros(3, 2)}, "indices must have one of the dtypes int64, int32"),
        ({"values": torch.ones(3, 2, dtype=torch.int32)}, "values must have one of the dtypes float32"),
        ({"W_dec": torch.randn(9, 4, 1, 1)}, r"W_dec must be a non-empty matrix \[F, d\]"),
        ({"b_dec": torch.randn(5)}, r"b_dec must have shape \[d\] = \(4,\); got \(5,\)"),
        ({"W_dec": torch.randn(9, 4, device="meta")}, "one device; values is on cpu, W_dec is on meta"),
    ],
)
@pytest.mark.parametrize("with_grad", [True, False])
def test_decode_names_what_is_wrong(backend, with_grad, change, message):
    with (
        torch.set_grad_enabled(with_grad),
        pytest.raises((ValueError, TypeError, RuntimeError), match=message) as caught,
    ):
        rk.sparse_decode(**{**GOOD_DECODE, **change}, backend=backend)
    assert isinstance(caught.value, (ValueError, TypeError)), "a clear error, not one from the depths of a kernel"


@pytest.mark.parametrize("with_grad", [True, False])
def test_torch_func_is_refused_in_plain_words(with_grad):
    """Also under no_grad, where a raw operator would give jvp a tangent of zeros without a word."""
    encode = lambda x: rk.topk_encode(x, GOOD_ENCODE["W_enc"], GOOD_ENCODE["b_enc"], 2)[0].sum()  # noqa: E731
    decode = lambda v: rk.sparse_decode(v, torch.tensor([[0, 1]]), GOOD_DECODE["W_dec"]).sum()  # noqa: E731
    jvp = lambda function: lambda x: torch.func.jvp(function, (x,), (torch.ones_like(x),))  # noqa: E731
    for op, function in (("topk_encode", encode), ("sparse_decode", decode)):
        for transform in (torch.func.grad, torch.func.vmap, jvp):
            argument = torch.randn(4) if op == "topk_encode" else torch.randn(1, 2)
            argument = argument[None] if transform is torch.func.vmap else argument
            refused = pytest.raises(NotImplementedError, match=rf"{op}: the transforms of torch\.func \(grad, vmap")
            with torch.set_grad_enabled(with_grad), refused:
                transform(function)(argument)


class _Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_decode_without_gradients_goes_straight_to_the_kernel_only_where_nobody_looks():
    """The short way gives the same bits, and is not taken where a mode, a dual tensor or autocast wants more."""
    W, b, indices, values = torch.randn(50, 24), torch.randn(24), torch.randint(0, 50, (7, 5)), torch.randn(7, 5)
    want = rk.sparse_decode(values.clone().requires_grad_(), indices, W, b).detach()
    with torch.no_grad():
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            assert torch.equal(rk.sparse_decode(values, indices, W, b), want)
        ran = {event.key for event in profile.key_averages()}
        assert "refusal_kernels_cpu::sparse_decode" in ran
        assert "refusal_kernels::sparse_decode" not in ran
        with _Seen() as seen:
            rk.sparse_decode(values, indices, W, b)
        assert "refusal_kernels.sparse_decode.default" in seen.names
        for odd in (values.t().contiguous().t(), values.double().float()[None].expand(2, 7, 5)[1]):
            assert torch.equal(rk.sparse_decode(odd, indices, W.t().contiguous().t(), b.double()), want)
        assert rk.sparse_decode(values.to_sparse().to_dense(), indices, W, b, backend="reference").shape == want.shape
        assert rk.last_backend("sparse_decode") == "reference"
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert rk.sparse_decode(values, indices, W, b).dtype == torch.bfloat16
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match=r"jvp|forward"):
            rk.sparse_decode(forward_ad.make_dual(values, values), indices, W, b)
        with pytest.raises(ValueError, match="must be one of"):
            rk.sparse_decode(values, indices, W, b, backend="fastest")


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("op", ["topk_encode", "batch_topk_encode", "threshold_encode", "decode", "csr", "project_out"])
def test_second_derivatives_are_refused_whichever_way_they_are_asked_for(backend, op):
    x, W, b, c = (torch.randn(s).requires_grad_() for s in ((4, 5), (9, 5), (9,), (4, 2)))
    U = torch.linalg.qr(torch.randn(5, 2))[0].requires_grad_()
    indices, offsets = torch.randint(9, (4, 2)), torch.arange(0, 9, 2)
    y, inputs = {
        "topk_encode": lambda: (rk.topk_encode(x, W, b, 3, backend=backend)[0], (x, W)),
        "batch_topk_encode": lambda: (rk.batch_topk_encode(x, W, b, 3, backend=backend)[0], (x, W)),
        "threshold_encode": lambda: (rk.threshold_encode(x, W, b, 0.1, backend=backend)[0], (x, W)),
        "decode": lambda: (rk.sparse_decode(c, indices, W, backend=backend), (c, W)),
        "csr": lambda: (rk.sparse_decode_csr(c.flatten(), indices.flatten(), offsets, W, backend=backend), (c, W)),
        "project_out": lambda: (rk.project_out(x, U, 1, backend=backend), (x, U)),
    }[op]()
    plain = torch.autograd.grad(y.square().sum(), inputs, retain_graph=True)
    gradients = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients, strict=True))
    for again in (lambda v: torch.autograd.grad(v, inputs, retain_graph=True), lambda v: v.backward(retain_graph=True)):
        for gradient in gradients:
            with pytest.raises(RuntimeError, match="gradients of gradients are not implemented"):
                again(gradient.square().sum() + y.sum())
