"""Every Triton primitive against the fp64 reference, in the interpreter: fp32 and fp16, shapes that are multiples of
nothing.

Inputs and in-place outputs sit inside larger NaN-filled buffers, so that reading or writing outside a tensor shows;
`empty` tensors are filled with NaN. Tolerance: twice PyTorch's own error in the same dtype (three times for
gradients) plus one rounding of the result; where mathematics is exact (indices, ties, determinism, permutations)
equality.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import refusal_kernels as rk
from refusal_kernels import reference
from refusal_kernels.triton_kernels import adam, backward, csc, decode, encode, lora_projection, projection, sae_adam

DTYPES = (torch.float32, torch.float16)


@pytest.fixture(autouse=True)
def _poison_empty_tensors():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def short_lists(monkeypatch):
    """Candidate lists of 16 and 32 keys: the shipped ones take seconds per row in the interpreter."""
    monkeypatch.setattr(encode, "_LISTS", ((4, 16, 8, 1), (8, 32, 16, 1)))


class Rim:
    """A tensor inside a NaN-filled buffer, with a check that nobody wrote outside it."""

    def __init__(self) -> None:
        self.buffers: list[Tensor] = []

    def __call__(self, tensor: Tensor) -> Tensor:
        rows = tensor.reshape(tensor.shape[0], -1) if tensor.numel() else tensor.reshape(tensor.shape[0], 1)[:, :0]
        margin = 64
        buffer = torch.full((tensor.numel() + 2 * margin,), math.nan, dtype=tensor.dtype)
        inner = buffer[margin : margin + tensor.numel()]
        inner.copy_(rows.reshape(-1))
        self.buffers.append(buffer)
        return inner.view(tensor.shape)

    def check(self) -> None:
        for buffer in self.buffers:
            assert buffer[:64].isnan().all()
            assert buffer[-64:].isnan().all()


@pytest.fixture
def rim():
    rim = Rim()
    yield rim
    rim.check()


def close(actual: Tensor, exact: Tensor, torch_result: Tensor, factor: float) -> None:
    assert actual.shape == exact.shape
    assert actual.dtype == torch_result.dtype
    finite = exact.isfinite()
    assert torch.equal(actual.isfinite(), finite)
    exact = exact[finite]
    if exact.numel() == 0:
        return
    error = (actual[finite].double() - exact).abs()
    own = (torch_result[finite].double() - exact).abs()
    rounding = torch.finfo(actual.dtype).eps * exact.abs().max().item()
    assert error.max() <= factor * own.max() + rounding
    assert error.mean() <= factor * own.mean() + rounding / 2


def double(*tensors: Tensor) -> list[Tensor]:
    return [t.double() if t.is_floating_point() else t for t in tensors]


def integers(*shape: int, low: int = -2, high: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    """Small integers: every product and sum is exact in fp32, so ties are everywhere and results must be equal."""
    return torch.randint(low, high, shape).to(dtype)


# --- topk_encode ----------------------------------------------------------------------------------------------------


def check_encode(x: Tensor, W: Tensor, b: Tensor, k: int, b_dec: Tensor | None, chunk: tuple[int, int] | None) -> None:
    values, indices = encode.topk_encode(x, W, b, k, b_dec, chunk=chunk)
    exact_values, exact_indices = reference.topk_encode(*double(x, W, b), k, None if b_dec is None else b_dec.double())
    assert torch.equal(indices, exact_indices)
    assert torch.equal(torch.nan_to_num(values, nan=-7.0), torch.nan_to_num(exact_values.to(x.dtype), nan=-7.0))
    assert values.dtype == x.dtype
    assert torch.equal(values.isnan(), exact_values.isnan())


@pytest.mark.parametrize(
    ("dtype", "n", "d", "n_latents", "k", "chunk"),
    [
        (torch.float32, 3, 5, 77, 1, (2, 32)),
        (torch.float16, 3, 7, 77, 3, (2, 48)),
        (torch.float16, 2, 19, 101, 7, None),
        (torch.float32, 2, 3, 5, 5, None),  # k = F
        (torch.float16, 3, 4, 61, 61, (2, 16)),  # k = F beyond the longest list: the merging route
        (torch.float32, 2, 1, 1, 1, None),
    ],
)
def test_encode_with_ties(short_lists, rim, dtype, n, d, n_latents, k, chunk):
    torch.manual_seed(n * d + k)
    x, W = rim(integers(n, d, dtype=dtype)), rim(integers(n_latents, d, dtype=dtype))
    b_dec = rim(integers(d)) if d > 3 else None
    check_encode(x, W, rim(integers(n_latents)), k, b_dec, chunk)


@pytest.mark.parametrize("dtype", DTYPES)
def test_encode_of_sorted_rows_overflows_its_list_and_stays_exact(short_lists, dtype):
    # x = 1, ascending: every latent beats all before it, so 70 latents pass through a list of 16. x = -1: descending.
    x = torch.tensor([[1.0], [-1.0], [0.0]], dtype=dtype)
    check_encode(x, torch.arange(70.0)[:, None].to(dtype), torch.full((70,), 35.0), 4, None, (3, 48))


def test_encode_without_enough_positives_fills_with_the_lowest_unused_latents(short_lists):
    W = torch.zeros(70, 2)
    W[[9, 66], 0] = torch.tensor([2.0, 3.0])  # a tie, with the bias below
    b = torch.full((70,), -0.0)
    b[::2] = -1.0
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    values, indices = encode.topk_encode(x, W, b, 4, None, chunk=(1, 32))
    assert indices.tolist() == [[9, 66, 0, 1], [0, 1, 2, 3]]
    assert values.tolist() == [[2.0, 2.0, 0.0, 0.0], [0.0] * 4]
    assert not torch.signbit(values).any()
    check_encode(x, W, b, 4, None, (2, 16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_encode_puts_nan_first_and_infinity_second(short_lists, dtype):
    b = torch.zeros(90)
    b[[5, 70]] = math.nan
    b[[3, 88]] = math.inf
    b[7] = -math.inf
    x = integers(3, 4, dtype=dtype)
    x[1, 2] = math.nan
    W = integers(90, 4, low=1, high=4, dtype=dtype)
    check_encode(x, W, b, 4, None, (2, 32))
    values, indices = encode.topk_encode(x[:1], W, b, 4, None)
    assert indices.tolist() == [[5, 70, 3, 88]]
    assert values[0, :2].isnan().all()


def test_encode_of_duplicated_latents_takes_the_lower_index(short_lists):
    torch.manual_seed(0)
    # Multiples of 1/64: every sum is exact, in whatever order a BLAS takes it for a column.
    W = (torch.randn(20, 6) * 64).round().div(64).repeat(4, 1)
    x = (torch.randn(2, 6) * 64).round() / 64
    values, indices = encode.topk_encode(x, W, torch.zeros(80), 8, None, chunk=(2, 32))
    assert torch.equal(values[:, 0::4], values[:, 3::4])
    assert torch.equal(indices[:, 1:4], indices[:, :1] + torch.tensor([20, 40, 60]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_encode_of_real_data_is_the_top_k_of_its_own_preactivations(short_lists, rim, dtype):
    torch.manual_seed(1)
    x, W = rim(torch.randn(3, 33).to(dtype)), rim((torch.randn(90, 33) / 6).to(dtype))
    b, b_dec = rim(torch.randn(90)), rim(torch.randn(33))
    values, indices = encode.topk_encode(x, W, b, 7, b_dec, chunk=(2, 48))
    pre = (x.double() - b_dec.double()) @ W.double().T + b.double()
    exact, torch_result = pre.relu().gather(1, indices), reference.topk_encode(x, W, b, 7, b_dec)[0]
    close(values, exact, torch_result, 2)
    assert (values[:, :-1] >= values[:, 1:]).all()
    best = reference.topk_encode(*double(x, W, b), 7, b_dec.double())[0]
    assert torch.allclose(exact, best, rtol=0, atol=1e-5)
    again = encode.topk_encode(x, W, b, 7, b_dec, chunk=(2, 48))
    assert torch.equal(values, again[0])
    assert torch.equal(indices, again[1])


def far_from_the_origin(n: int, d: int, n_latents: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x within a few units of a b_dec of 1000 to 2000, and latents that do not average out: x W and b_dec W are near
    1000 d / 2, their difference near sqrt(d)."""
    b_dec = 1000 * (1 + torch.rand(d))
    x = (b_dec + torch.randn(n, d)).half()
    return x, torch.rand(n_latents, d).half(), torch.randn(n_latents), b_dec


def test_encode_keeps_its_digits_when_b_dec_is_a_thousand_times_the_signal(short_lists, rim):
    torch.manual_seed(8)
    x, W, b, b_dec = (rim(t) for t in far_from_the_origin(5, 3000, 90))
    values, indices = encode.topk_encode(x, W, b, 4, b_dec)
    exact_values, exact_indices = reference.topk_encode(*double(x, W, b), 4, b_dec.double())
    close(values, exact_values, reference.topk_encode(x, W, b, 4, b_dec)[0], 2)
    assert torch.equal(indices, exact_indices)


def test_encode_with_rows_near_b_dec_and_one_far_from_it(short_lists):
    """No pivot for anyone then; the error is that of sums over the far row's entries, which the docstring states."""
    torch.manual_seed(9)
    x, W, b, b_dec = far_from_the_origin(4, 600, 90)
    x[2] = torch.randn(600).half()
    values, indices = encode.topk_encode(x, W, b, 4, b_dec)
    pre = ((x.double() - b_dec.double()) @ W.double().T + b.double()).relu()
    largest = (x.double() - b_dec.double()).abs().amax(0) @ W.double().abs().T
    bound = 600**0.5 * torch.finfo(torch.float32).eps * largest[indices] + torch.finfo(torch.float16).eps * values
    assert ((values.double() - pre.gather(1, indices)).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_pivot_is_taken_where_no_row_is_rounded(rim, dtype):
    torch.manual_seed(10)
    b_dec = torch.randn(301).exp() * 100
    x = (b_dec * (1 + torch.rand(70, 301) / 4)).to(dtype)
    x[69, 7], x[3, 9], x[0, 11], x[1, 13] = 1e-3, math.nan, math.inf, -3e-3
    b_dec[[15, 16, 17]] = torch.tensor([math.inf, math.nan, -math.inf])
    pivot = encode.pivot_of(rim(x), b_dec)
    expected = b_dec.to(dtype)
    expected[[7, 13, 15, 16, 17]] = 0
    assert torch.equal(pivot, expected)
    finite = x.isfinite()
    assert torch.equal((x - pivot)[finite].double(), (x.double() - pivot.double())[finite])


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy's, inside the interpreter
@pytest.mark.parametrize("dtype", DTYPES)
def test_encode_with_infinite_and_undefined_rows_and_biases(short_lists, dtype):
    torch.manual_seed(11)
    inf, nan = math.inf, math.nan
    for place, in_x, in_b_dec in (
        (0, inf, 1.0), (0, -inf, 1.0), (0, nan, 1.0), (0, 1.0, inf), (0, 1.0, -inf), (0, 1.0, nan), (0, inf, inf),
        (1, inf, inf), (1, inf, -inf), (1, -inf, inf), (1, nan, inf),
    ):  # fmt: skip
        x, W, b_dec = integers(3, 4, dtype=dtype), integers(90, 4, dtype=dtype), integers(4)
        x[1, 0], b_dec[place] = in_x, in_b_dec
        check_encode(x, W, integers(90), 4, b_dec, (2, 32))


def test_encode_with_a_shipped_list():
    torch.manual_seed(2)
    check_encode(integers(1, 3), integers(600, 3), integers(600), 33, None, (1, 608))


def test_encode_with_k_beyond_every_list():
    torch.manual_seed(3)
    check_encode(integers(2, 3), integers(1200, 3), integers(1200), 1100, integers(3), (2, 512))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gemm_kernel(rim, dtype):
    torch.manual_seed(4)
    x, W = rim(integers(70, 37, dtype=dtype)), rim(integers(131, 37, dtype=dtype))
    out = rim(torch.zeros(70, 131))
    encode.triton_project(x, W, out)
    assert torch.equal(out, x.float() @ W.float().T)


def test_work_buffer_does_not_grow_with_the_problem():
    for k in (1, 64, 1024, 1 << 17):
        rows, columns = encode.chunk_shape(torch.empty(1 << 20, 1, device="meta"), 1 << 20, k)
        route = k + columns if encode.list_tiles(k) is None else encode.list_tiles(k).constexprs["CAPACITY"]
        assert rows * columns * 4 + rows * route * 8 <= 64 << 20


# --- decode ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "d", "n_latents", "k"), [(4, 5, 9, 1), (3, 130, 20, 9), (2, 1030, 40, 17), (2, 64, 6, 6)]
)
def test_decode(rim, dtype, n, d, n_latents, k):
    torch.manual_seed(d)
    values = rim(torch.randn(n, k).to(dtype))
    indices = torch.randint(n_latents, (n, k))
    W, b_dec, x = rim(torch.randn(n_latents, d).to(dtype)), rim(torch.randn(d)), rim(torch.randn(n, d).to(dtype))
    for bias in (b_dec, None):
        exact_bias = None if bias is None else bias.double()
        exact = reference.sparse_decode(*double(values, indices, W), exact_bias)
        own = reference.sparse_decode(values, indices, W, bias)
        for kind in (torch.int32, torch.int64):
            close(decode.sparse_decode(values, indices.to(kind), W, bias), exact, own, 2)
        e, sq = decode.decode_residual(x, values, indices, W, bias)
        exact_e, exact_sq = reference.decode_residual(*double(x, values, indices, W), exact_bias)
        own_e, own_sq = reference.decode_residual(x, values, indices, W, bias)
        close(e, exact_e, own_e, 2)
        close(sq, exact_sq, own_sq, 2)
    assert torch.equal(e, decode.decode_residual(x, values, indices, W, None)[0])


def test_empty_batches():
    W, b, b_dec, x = torch.randn(6, 4), torch.randn(6), torch.randn(4), torch.empty(0, 4)
    values, indices = encode.topk_encode(x, W, b, 3, b_dec)
    assert values.shape == indices.shape == (0, 3)
    assert indices.dtype == torch.int64
    assert decode.sparse_decode(values, indices, W, b_dec).shape == (0, 4)
    e, sq = decode.decode_residual(x, values, indices, W, b_dec)
    assert (e.shape, sq.shape) == ((0, 4), (0,))
    dvalues, dW = backward.sparse_decode_backward(x, values, indices, W, True, True)
    assert dvalues.shape == (0, 3)
    assert not dW.any()
    dx, dW, db = backward.topk_encode_backward(values, values, indices, x, W, b_dec, True, True)
    assert dx.shape == (0, 4)
    assert not dW.any()
    assert not db.any()
    buffers = torch.ones(6, 4), torch.ones(6), torch.ones(6, 4)
    backward.sae_backward(e, x, values, indices, W, W, b_dec, 1.0, *buffers)
    assert all((t == 1).all() for t in buffers)


# --- backward -------------------------------------------------------------------------------------------------------


def test_csc_is_the_stable_transpose():
    indices = torch.tensor([[3, 0], [3, 1], [0, 3], [3, 0], [3, 4]])
    sparse = csc.csc_from_indices(indices, 6, segment=2)
    assert sparse.order.tolist() == [1, 4, 7, 3, 0, 2, 5, 6, 8, 9]
    assert sparse.offsets.tolist() == [0, 3, 4, 4, 9, 10, 10]
    # Latents 0 (3 entries) and 3 (5) are hot: 2 and 3 segments of at most 2; the other slots are empty.
    assert sparse.segment_latent.tolist() == [0, 0, 3, 3, 3, 6, 6, 6, 6, 6]
    assert sparse.segment_ends.tolist() == [2, 2, 2, 5, 5, 5]


def code(n: int, n_latents: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Values with zeros and distinct indices, of which latent 1 is in every row (hot) and the last latent in none."""
    indices = torch.stack([torch.randperm(n_latents - 1)[:k] for _ in range(n)])
    indices = torch.where(
        (indices == 1).any(1, keepdim=True), indices, torch.cat([torch.ones(n, 1), indices[:, 1:]], 1)
    )
    values = torch.rand(n, k)
    values[::2, -1] = 0
    return values.to(dtype), indices.long()


SHAPES = [(5, 5, 7, 3, 2), (4, 130, 6, 4, None), (4, 70, 5, 1, 3)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d", "n_latents", "k", "segment"), SHAPES)
@pytest.mark.parametrize("wide", [False, True])
def test_sparse_decode_backward(rim, monkeypatch, dtype, n, d, n_latents, k, segment, wide):
    if wide:
        monkeypatch.setattr(backward, "_WIDEST_ROW", 0)
    torch.manual_seed(d)
    values, indices = code(n, n_latents, k, dtype)
    indices[0] = 2  # one latent several times in one row
    values = rim(values)
    grad, W = rim(torch.randn(n, d).to(dtype)), rim(torch.randn(n_latents, d).to(dtype))
    exact = reference.sparse_decode_backward(*double(grad, values, indices, W), True, True)
    own = reference.sparse_decode_backward(grad, values, indices, W, True, True)
    dvalues, dW = backward.sparse_decode_backward(grad, values, indices, W, True, True, segment=segment)
    close(dvalues, exact[0], own[0], 3)
    close(dW, exact[1], own[1], 3)
    assert not dW[-1].any()
    again = backward.sparse_decode_backward(grad, values, indices.int(), W, True, True, segment=segment)
    assert torch.equal(dW, again[1])
    if not wide:
        only_values = backward.sparse_decode_backward(grad, values, indices, W, True, False)
        only_W = backward.sparse_decode_backward(grad, values, indices, W, False, True, segment=segment)
        assert only_values[1] is only_W[0] is None
        close(only_values[0], exact[0], own[0], 3)
        close(only_W[1], exact[1], own[1], 3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d", "n_latents", "k", "segment"), SHAPES)
def test_topk_encode_backward(rim, dtype, n, d, n_latents, k, segment):
    torch.manual_seed(d + 1)
    values, indices = code(n, n_latents, k, dtype)
    values[1, 0] = math.nan  # a NaN value is not a zero value: its gradient passes
    grad_values, x = rim(torch.randn(n, k).to(dtype)), rim(torch.randn(n, d).to(dtype))
    W, b_dec = rim(torch.randn(n_latents, d).to(dtype)), rim(torch.randn(d))
    for bias in (b_dec, None):
        inputs = (grad_values, values, indices, x, W)
        exact = reference.topk_encode_backward(*double(*inputs), None if bias is None else bias.double(), True, True)
        own = reference.topk_encode_backward(*inputs, bias, True, True)
        actual = backward.topk_encode_backward(*inputs, bias, True, True, segment=segment)
        for a, b, c in zip(actual, exact, own, strict=True):
            close(a, b, c, 3)
    assert not actual[1][-1].any()
    again = backward.topk_encode_backward(*inputs, None, True, True, segment=segment)
    assert all(torch.equal(a, b) for a, b in zip(actual, again, strict=True))
    nothing = backward.topk_encode_backward(*inputs, None, False, False, segment=segment)
    assert nothing[0] is nothing[1] is None
    assert torch.equal(nothing[2], actual[2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d", "n_latents", "k", "segment"), SHAPES)
@pytest.mark.parametrize("wide", [False, True])
def test_sae_backward(rim, monkeypatch, dtype, n, d, n_latents, k, segment, wide):
    if wide:
        monkeypatch.setattr(backward, "_WIDEST_ROW", 0)
    torch.manual_seed(d + 2)
    values, indices = code(n, n_latents, k, dtype)
    e, x = rim(torch.randn(n, d).to(dtype)), rim(torch.randn(n, d).to(dtype))
    W_enc, W_dec = rim(torch.randn(n_latents, d).to(dtype)), rim(torch.randn(n_latents, d).to(dtype))
    b_dec = rim(torch.randn(d))
    before = torch.randn(n_latents, d), torch.randn(n_latents), torch.randn(n_latents, d)
    inputs = (e, x, values, indices, W_enc, W_dec, b_dec)
    exact, own = [t.double() for t in before], [t.clone() for t in before]
    reference.sae_backward(*double(*inputs), 0.3, *exact)
    reference.sae_backward(*inputs, 0.3, *own)
    actual = [rim(t) for t in before]
    backward.sae_backward(*inputs, torch.tensor(0.3), *actual, segment=segment)
    for a, b, c in zip(actual, exact, own, strict=True):
        close(a, b, c, 3)
    overwritten = [rim(t) for t in before]
    backward.sae_backward(*inputs, 0.3, *overwritten, accumulate=False, segment=segment)
    exact, own = [torch.zeros_like(t.double()) for t in before], [torch.zeros_like(t) for t in before]
    reference.sae_backward(*double(*inputs), 0.3, *exact)
    reference.sae_backward(*inputs, 0.3, *own)
    for a, b, c in zip(overwritten, exact, own, strict=True):
        close(a, b, c, 3)
    assert not any(t[-1].any() for t in overwritten)
    again = [torch.empty_like(t) for t in before]
    backward.sae_backward(*inputs, 0.3, *again, accumulate=False, segment=segment)
    assert all(torch.equal(a, b) for a, b in zip(overwritten, again, strict=True))


@pytest.mark.parametrize("wide", [False, True])
def test_rows_of_fillers_are_not_read(monkeypatch, wide):
    """A token whose every value is 0 holds infinities and NaN: no encoder gradient sees them."""
    if wide:
        monkeypatch.setattr(backward, "_WIDEST_ROW", 0)
    n, d, n_latents, k, segment = SHAPES[0]
    torch.manual_seed(0)
    values, indices = code(n, n_latents, k, torch.float32)
    e, x, W = torch.randn(n, d), torch.randn(n, d), torch.randn(n_latents, d)
    values[2], x[2] = 0, math.inf
    x[2, 0] = math.nan
    expected, actual = ([torch.zeros(n_latents, d), torch.zeros(n_latents), torch.zeros(n_latents, d)] for _ in "ab")
    reference.sae_backward(e, x, values, indices, W, W, None, 0.3, *expected)
    backward.sae_backward(e, x, values, indices, W, W, None, 0.3, *actual, segment=segment)
    assert all(t.isfinite().all() for t in expected)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    arguments = torch.randn(n, k), values, indices, x, W, None
    _, expected_dW, _ = reference.topk_encode_backward(*arguments, False, True)
    _, dW, _ = backward.topk_encode_backward(*arguments, False, True, segment=segment)
    torch.testing.assert_close(dW, expected_dW, rtol=1e-4, atol=1e-5)


def test_segments_cover_the_workspace_bound():
    for entries, d in ((1, 1), (32768 * 64, 4096), (65536 * 32, 128), (1 << 31, 8192)):
        segment = backward.segment_length(entries, d)
        assert segment >= 256
        assert 2 * entries // segment * 2 * d * 4 <= backward._PARTIAL_BYTES


# --- adam -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "d", "parallel", "unit"),
    [(5, 37, True, True), (4, 5, False, True), (3, 140, True, False), (7, 300, False, False), (2, 8200, True, True)],
)
def test_adam_rows(rim, rows, d, parallel, unit):
    torch.manual_seed(d)
    W, g, m = torch.randn(rows, d), torch.randn(rows, d), torch.randn(rows, d) * 0.1
    v = torch.rand(rows, d)
    for t in (W, g, m):
        t[1] = 0  # a row of zero norm that stays one
    for grad_scale in (None, 0.5, torch.tensor(0.5)):
        factor = None if grad_scale is None else torch.tensor(0.5)
        numbers = (1e-2, 0.9, 0.999, 1e-8, 1 - 0.9**3, 1 - 0.999**3)
        exact, own = [t.double() for t in (W, g, m, v)], [t.clone() for t in (W, g, m, v)]
        reference.adam_rows(*exact, *numbers, factor, parallel, unit)
        reference.adam_rows(*own, *numbers, factor, parallel, unit)
        actual = [rim(t) for t in (W, g, m, v)]
        adam.adam_rows(*actual, *numbers, grad_scale, parallel, unit)
        for a, b, c in zip(actual, exact, own, strict=True):
            close(a, b, c, 3)
        assert not actual[0][1].any()
    if unit:
        norms = actual[0].norm(dim=1)
        assert torch.allclose(norms[[0, *range(2, rows)]], torch.ones(rows - 1), atol=1e-6)


def test_adam_rows_follows_torch_adam():
    torch.manual_seed(5)
    parameter = torch.nn.Parameter(torch.randn(4, 50))
    W, m, v = parameter.detach().clone(), torch.zeros(4, 50), torch.zeros(4, 50)
    optimizer = torch.optim.Adam([parameter], lr=3e-3)
    for step in (1, 2, 3):
        parameter.grad = torch.randn(4, 50)
        adam.adam_rows(
            W, parameter.grad, m, v, 3e-3, 0.9, 0.999, 1e-8, 1 - 0.9**step, 1 - 0.999**step, None, False, False
        )
        optimizer.step()
    assert torch.allclose(W, parameter, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "n", "d", "n_latents", "k", "segment", "extra", "wide", "master"),
    [
        (torch.float32, 5, 7, 9, 3, 2, True, False, False),
        (torch.float16, 5, 7, 9, 3, 2, False, False, False),
        (torch.float32, 4, 130, 7, 2, None, True, False, False),
        (torch.float32, 5, 7, 9, 3, 2, True, True, False),
        (torch.float32, 0, 5, 6, 2, None, True, False, False),
        (torch.float16, 5, 7, 9, 3, 2, True, False, True),
        (torch.float16, 5, 7, 9, 3, 2, True, True, True),
    ],
)
def test_sae_backward_adam_is_backward_then_adam(
    rim, monkeypatch, dtype, n, d, n_latents, k, segment, extra, wide, master
):
    """`master`: fp32 weights beside 16-bit activations; the gradients are those at the rounded weights."""
    if wide:
        monkeypatch.setattr(sae_adam, "_BLOCKS", ((4, 1, 1, 1),))
    torch.manual_seed(d + 3)
    values, indices = code(n, n_latents, k, dtype) if n else (torch.empty(0, k), torch.empty(0, k, dtype=torch.int64))
    e, x, b_dec = torch.randn(n, d).to(dtype), torch.randn(n, d).to(dtype), torch.randn(d)
    weights = [torch.randn(n_latents, d).to(dtype), torch.randn(n_latents), torch.randn(n_latents, d).to(dtype)]
    if master:
        weights[0], weights[2] = torch.randn(n_latents, d), torch.randn(n_latents, d)
    weights[2][0] = 0
    moments = [f(*w.shape) for w in weights for f in (torch.randn, torch.rand)]
    extras = [torch.tensor([n_latents - 1, 2]), torch.randn(2, d), torch.randn(2), torch.randn(2, d)]
    numbers = (1e-2, 0.9, 0.999, 1e-8, 1 - 0.9**2, 1 - 0.999**2)

    def expected(cast):
        We, be, Wd = (cast(w) for w in weights)
        m_We, v_We, m_be, v_be, m_Wd, v_Wd = (cast(m) for m in moments)
        dWe, dbe, dWd = (torch.zeros_like(m) for m in (m_We, m_be, m_Wd))
        seen = [w.to(dtype).to(cast(e).dtype) for w in (We, Wd)]
        reference.sae_backward(*(cast(t) for t in (e, x, values)), indices, *seen, cast(b_dec), 0.3, dWe, dbe, dWd)
        if extra:
            for gradient, rows in zip((dWe, dbe, dWd), extras[1:], strict=True):
                gradient.index_add_(0, extras[0], rows.to(gradient.dtype))
        through = dbe @ seen[0].to(dbe.dtype)
        reference.adam_rows(We, dWe, m_We, v_We, *numbers, None, False, False)
        reference.adam_rows(be[:, None], dbe[:, None], m_be[:, None], v_be[:, None], *numbers, None, False, False)
        reference.adam_rows(Wd, dWd, m_Wd, v_Wd, *numbers, None, True, True)
        return [We, be, Wd, m_We, v_We, m_be, v_be, m_Wd, v_Wd, through]

    results = []
    for _ in range(2):
        W_enc, b_enc, W_dec, *states = (rim(t) for t in (*weights, *moments))
        through = sae_adam.sae_backward_adam(
            rim(e), rim(x), values, indices, W_enc, b_enc, W_dec, rim(b_dec), 0.3, *states, *numbers, True, True,
            *(extras if extra else [None] * 4), segment=segment,
        )  # fmt: skip
        results.append([W_enc, b_enc, W_dec, *states, through])
    exact, own = expected(lambda t: t.double()), expected(lambda t: t.clone())
    for actual, again, wanted, plain in zip(*results, exact, own, strict=True):
        close(actual, wanted, plain, 3)
        assert torch.equal(actual, again)


@pytest.mark.parametrize(
    ("rows", "extra", "wide"), [("bf16", False, False), ("fp16", True, False), ("bf16", False, True)]
)
def test_sae_backward_adam_writes_copies_of_the_weights_it_stores(monkeypatch, rows, extra, wide):
    """Rounded to nearest, ties to even, NaN as a NaN; nothing else changes."""
    if wide:
        monkeypatch.setattr(sae_adam, "_BLOCKS", ((4, 1, 1, 1),))
    torch.manual_seed(8)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[rows]
    n, d, n_latents, k = 5, 7, 9, 3
    values, indices = code(n, n_latents, k, dtype)
    e, x, b_dec = torch.randn(n, d).to(dtype), torch.randn(n, d).to(dtype), torch.randn(d)
    weights = [torch.randn(n_latents, d), torch.randn(n_latents), torch.randn(n_latents, d)]
    weights[0][1, 2] = math.nan
    moments = [f(*w.shape) for w in weights for f in (torch.randn, torch.rand)]
    extras = [torch.tensor([n_latents - 1, 2]), torch.randn(2, d), torch.randn(2), torch.randn(2, d)]
    # A latent without entries and moments of 0 keeps its weights: ties that must go to the even neighbour.
    still = next(f for f in range(n_latents - 1) if f not in indices and f != 2)
    tie = torch.tensor([0x3F808000, 0x3F818000, 0x3F818001, 0x3F817FFF], dtype=torch.int32).view(torch.float32)
    weights[0][still, :4] = tie
    for moment in (moments[0], moments[1]):
        moment[still] = 0
    numbers = (1e-2, 0.9, 0.999, 1e-8, 1 - 0.9**2, 1 - 0.999**2)
    results = []
    for copies in ([torch.full((n_latents, d), math.nan, dtype=dtype) for _ in range(2)], [None, None]):
        W_enc, b_enc, W_dec, *states = (t.clone() for t in (*weights, *moments))
        through = sae_adam.sae_backward_adam(
            e, x, values, indices, W_enc, b_enc, W_dec, b_dec, 0.3, *states, *numbers, False, True,
            *(extras if extra else [None] * 4), None, None, None, *copies, segment=2,
        )  # fmt: skip
        results.append([W_enc, b_enc, W_dec, *states, through])
        if copies[0] is not None:
            assert torch.equal(W_enc[still, :4], tie)
            for copy, W in zip(copies, (W_enc, W_dec), strict=True):
                torch.testing.assert_close(copy, W.to(dtype), rtol=0, atol=0, equal_nan=True)
    for mine, plain in zip(*results, strict=True):
        torch.testing.assert_close(mine, plain, rtol=0, atol=0, equal_nan=True)


def test_a_bias_with_strides_is_stepped_where_it_lies(short_lists):
    """By kernels that take biases without strides."""
    torch.manual_seed(11)
    start = [torch.randn(40, 8), torch.randn(40), torch.randn(40, 8), torch.randn(8)]
    table = torch.full((40, 3), 7.0)
    table[:, 1] = start[1]
    x, results = torch.randn(6, 8), []
    for b_enc in (start[1].clone(), table[:, 1]):
        leaves = [t.clone().requires_grad_() for t in start]
        leaves[1] = b_enc.requires_grad_()
        rk.sae_step(x, *leaves, 3, optimizer=rk.SAEAdam(*leaves, lr=0.1), backend="triton")
        results.append([leaf.detach() for leaf in leaves])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    assert (table[:, ::2] == 7).all()


def test_gradients_that_are_written_anew_are_not_zeroed_before(short_lists, monkeypatch):
    """A clipped step overwrites its buffers, and a backward without .grad makes new ones that nobody fills."""
    monkeypatch.setattr(torch, "_foreach_zero_", None)
    torch.manual_seed(10)
    start = [torch.randn(40, 8), torch.randn(40), torch.randn(40, 8), torch.randn(8)]
    leaves = [t.clone().requires_grad_() for t in start]
    optimizer = rk.SAEAdam(*leaves, lr=0.01, max_grad_norm=0.5)
    x = torch.randn(6, 8)
    for _ in range(2):
        rk.sae_step(x, *leaves, 3, optimizer=optimizer, backend="triton")
    assert all(leaf.isfinite().all() for leaf in leaves)
    with monkeypatch.context() as counted:
        zeros_like = torch.zeros_like

        def no_matrix(t, **options):
            assert t.dim() < 2, "a matrix was filled with zeros"
            return zeros_like(t, **options)

        counted.setattr(torch, "zeros_like", no_matrix)
        rk.sae_step(x, *leaves, 3, backend="triton")
    assert all(leaf.grad.isfinite().all() for leaf in leaves)


def test_a_step_with_copies_reads_what_the_last_one_wrote(short_lists):
    """The fused step, under autocast: no copy is made again, and every bit is that of a step that casts."""
    torch.manual_seed(9)
    start = [torch.randn(40, 8), torch.randn(40), torch.randn(40, 8), torch.randn(8)]
    results = []
    for copy_dtype in (torch.float16, None):
        leaves = [t.clone().requires_grad_() for t in start]
        optimizer = rk.SAEAdam(*leaves, lr=0.01, copy_dtype=copy_dtype)
        for i in range(2):
            x = torch.randn(6, 8, generator=torch.Generator().manual_seed(i))
            with torch.autocast("cpu", dtype=torch.float16):
                out = rk.sae_step(x, *leaves, 3, optimizer=optimizer, backend="triton")
            if copy_dtype is not None:
                assert set(optimizer._copied) == {0, 2}, "known to be of the weights as they are"
        results.append([out.values, *(leaf.detach() for leaf in leaves)])
    for mine, cast in zip(*results, strict=True):
        assert torch.equal(mine, cast)


# --- through the public operators -----------------------------------------------------------------------------------


def test_public_operators_run_on_triton_and_differentiate(short_lists):
    torch.manual_seed(6)
    x, W_enc, W_dec = torch.randn(5, 6), torch.randn(40, 6), torch.randn(40, 6)
    b_enc, b_dec = torch.randn(40), torch.randn(6)
    gradients = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64), ("reference", torch.float32)):
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (x, W_enc, b_enc, W_dec, b_dec)]
        values, indices = rk.topk_encode(leaves[0], leaves[1], leaves[2], 3, leaves[4], backend=backend)
        assert rk.last_backend("topk_encode") == backend
        x_hat = rk.sparse_decode(values, indices, leaves[3], leaves[4], backend=backend)
        assert rk.last_backend("sparse_decode") == backend
        (x_hat - leaves[0]).square().sum().backward()
        gradients.append([t.grad for t in leaves])
    for actual, exact, own in zip(*gradients, strict=True):
        close(actual, exact, own, 3)


@pytest.mark.parametrize("max_grad_norm", [None, 0.05])
def test_training_step_runs_on_triton(short_lists, max_grad_norm):
    """AuxK and the optimiser included; without clipping Adam runs inside the backward kernel."""
    torch.manual_seed(7)
    x = torch.randn(6, 8)
    start = [
        torch.randn(40, 8),
        torch.randn(40),
        torch.nn.functional.normalize(torch.randn(40, 8), dim=1),
        torch.randn(8),
    ]
    dead = torch.tensor([3, 17, 39])
    results = []
    for backend in ("triton", "reference"):
        leaves = [t.clone().requires_grad_() for t in start]
        optimizer = rk.SAEAdam(*leaves, lr=0.01, max_grad_norm=max_grad_norm)
        for _ in range(2):
            out = rk.sae_step(x, *leaves, 3, dead=dead, optimizer=optimizer, backend=backend)
        assert rk.last_backend("sae_step") == backend
        moments = [optimizer.state[leaf]["exp_avg"] for leaf in leaves]
        leaves = [leaf.detach() for leaf in leaves]
        rk.sae_step(x, *(leaf.requires_grad_() for leaf in leaves), 3, dead=dead, backend=backend)
        results.append(
            [out.loss, out.fvu, *(leaf.detach() for leaf in leaves), *moments, *(leaf.grad for leaf in leaves)]
        )
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


# (shape, dim, r): both sides; more than one slab; r beyond one tile of columns; 64 fibres a block; a vector; dimensions
# that one descriptor cannot hold; nothing.
PROJECTIONS = [
    ((70, 16), 0, 8),
    ((5, 2100), 1, 20),
    ((130, 64), 0, 17),
    ((90,), 0, 70),
    ((3, 33, 5), 1, 33),
    ((0, 9), 1, 2),
    ((4, 9), 1, 0),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "dim", "r"), PROJECTIONS)
def test_project_out(rim, dtype, shape, dim, r):
    torch.manual_seed(8)
    g, u = torch.randn(shape).to(dtype), torch.linalg.qr(torch.randn(shape[dim], r))[0].contiguous()
    u = rim(u) if r else u
    for against in (None, torch.randn(r)):
        exact, own = (
            reference.project_out(g.to(t), dim, u.to(t), 0.7, against if against is None else against.to(t))
            for t in (torch.float64, torch.float32)
        )
        out = projection.project_out(rim(g), dim, u, 0.7, against)
        close(out, exact, own.to(dtype), 2)
        inside = rim(g)
        directions = ([], [-1]) if against is None else ([rim(against)], [0])
        projection.project_out_grouped([inside], [dim], [u], [0], *directions, 0.7)
        assert torch.equal(inside, out)


def test_projection_plan_of_any_mix_of_tensors(rim):
    """Shapes, sides, dtypes, strides and directions of all kinds in one table; shared bases; two calls."""
    torch.manual_seed(9)

    def signs(n: int, rows: int, columns: int) -> torch.Tensor:
        """Orthonormal [n, columns] of 0 and +-1 / sqrt(rows) in n // rows blocks of rows: sums with it are exact, in
        whatever order numpy takes them for a tile."""
        hadamard = torch.ones(1, 1)
        while len(hadamard) < rows:
            hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
        basis = torch.zeros(n, columns)
        for column in range(columns):
            top = column % (n // rows) * rows
            basis[top : top + rows, column] = hadamard[:, column] / rows**0.5
        return basis

    def grid(*shape: int) -> torch.Tensor:
        return (torch.randn(shape) * 8).round() / 8

    u, v = signs(40, 16, 5), signs(2100, 256, 3)
    tensors = [grid(40, 16), grid(6, 40).half(), grid(2100, 4), grid(2, 3, 40, 5, 2)]
    strided = rim(grid(33, 80))[:, ::2]
    entries = [(rim(tensors[0]), u, 0), (rim(tensors[1]), u, 1), (rim(tensors[2]), v, 0), (strided, u, 1)]
    entries.append((rim(tensors[3]).permute(3, 0, 2, 4, 1), u, 2))  # three loose dimensions beside the projected one
    directions = [None, torch.randn(40), None, torch.randn(40), None]
    plan = rk.ProjectionPlan(entries, 0.5, only_against=directions, backend="triton")
    for _ in range(2):
        before = [t.clone() for t, _, _ in entries]
        plan.apply_()
        assert rk.last_backend("project_out") == "triton"
        for (tensor, basis, dim), old, direction in zip(entries, before, directions, strict=True):
            alone = rk.project_out(old, basis, dim, 0.5, only_against=direction, backend="triton")
            assert torch.equal(tensor, alone)
            exact = reference.project_out(
                old.double(),
                dim,
                basis.double(),
                0.5,
                None if direction is None else direction.double() @ basis.double(),
            )
            torch.testing.assert_close(
                tensor.double(), exact, rtol=0, atol=1e-5 if tensor.dtype != torch.half else 4e-3
            )


# (side of the projection, n, fibres): slabs that are full, part of one, and several blocks of fibres.
LORA = [(0, 1088, 16), (1, 64, 16), (1, 1152, 32), (0, 192, 48)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [3, 16, 100])
def test_projection_of_lora_matrices_takes_its_own_kernels(monkeypatch, rim, dtype, rank):
    """One dtype, one rank, aligned matrices: two launches on tensor cores; equal to fp64, direction included."""
    torch.manual_seed(rank)
    tensors, dims, bases = [], [], []
    for dim, n, fibres in LORA:
        tensors.append(torch.randn((n, fibres) if dim == 0 else (fibres, n)).to(dtype))
        dims.append(dim)
        # Not orthonormal where n < rank: the kernels do not ask.
        bases.append((torch.randn(n, rank) / n**0.5).contiguous())
    against, against_of = [torch.randn(rank)], [-1, 0, 0, -1]
    order = list(range(len(LORA)))
    assert lora_projection.fits(tensors, dims, bases, order)
    monkeypatch.setattr(projection, "_launch", None)  # the general kernels are not used
    inside = [t.clone() for t in tensors]
    projection.prepare_projection(inside, dims, bases, order, against, against_of, 0.7)()
    again = [t.clone() for t in tensors]
    projection.prepare_projection(again, dims, bases, order, against, against_of, 0.7)()
    for old, new, twin, dim, u, a in zip(tensors, inside, again, dims, bases, against_of, strict=True):
        exact, own = (
            reference.project_out(old.to(t), dim, u.to(t), 0.7, None if a < 0 else against[0].to(t))
            for t in (torch.float64, torch.float32)
        )
        close(new, exact, own.to(dtype), 2)
        assert torch.equal(new, twin)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda t, u: (t[:, :8].contiguous(), u),  # fibres
        lambda t, u: (t[:96], u[:96].contiguous()),  # rows
        lambda t, u: (torch.empty(t.numel() + 1)[1:].view_as(t).copy_(t), u),  # alignment
        lambda t, u: (t.T.contiguous().T, u),  # strides
        lambda t, u: (t, torch.randn(128, 129)),  # rank
        lambda t, u: (t[None], u),  # dimensions
    ],
)
def test_other_tensors_take_the_general_projection(spoil):
    tensor, basis = spoil(torch.randn(128, 16), torch.randn(128, 4))
    assert lora_projection.fits([torch.randn(128, 16)], [0], [torch.randn(128, 4)], [0])
    assert not lora_projection.fits([tensor], [tensor.dim() - 2], [basis], [0])
    one = torch.randn(128, 16)
    assert not lora_projection.fits([one, one.half()], [0, 0], [torch.randn(128, 4)], [0, 0])
    assert not lora_projection.fits([one, one], [0, 0], [torch.randn(128, 4), torch.randn(128, 5)], [0, 1])


def test_projection_gradients():
    torch.manual_seed(10)
    g, u, direction = torch.randn(6, 40), torch.linalg.qr(torch.randn(40, 5))[0], torch.randn(40)
    gradients = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64), ("reference", torch.float32)):
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (g, u)]
        rk.project_out(*leaves, 1, 0.7, only_against=direction, backend=backend).square().sum().backward()
        assert rk.last_backend("project_out_backward") == backend
        gradients.append([t.grad for t in leaves])
    for actual, exact, own in zip(*gradients, strict=True):
        close(actual, exact, own, 3)
