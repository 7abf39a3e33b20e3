"""Triton's kernels for codes whose rows have different lengths, in the interpreter: fp32 and fp16, shapes that are
multiples of nothing, buffers so small that pools overflow. Equality where mathematics is exact."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import refusal_kernels as rk
from refusal_kernels import reference
from refusal_kernels.triton_kernels import backward_csr, decode, encode_csr

DTYPES = (torch.float32, torch.float16)


@pytest.fixture(autouse=True)
def _poison_empty_tensors():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def integers(*shape: int, low: int = -2, high: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randint(low, high, shape).to(dtype)


def inside(tensor: Tensor) -> Tensor:
    """The tensor amid NaN, so that a read beyond it shows."""
    buffer = torch.full((tensor.numel() + 128,), math.nan, dtype=tensor.dtype)
    buffer[64:-64] = tensor.flatten()
    return buffer[64:-64].view(tensor.shape)


def same(code: tuple[Tensor, ...], exact: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    values, latents, offsets = code
    assert (values.dtype, latents.dtype, offsets.dtype) == (dtype, torch.int64, torch.int64)
    assert torch.equal(offsets, exact[2])
    assert torch.equal(latents, exact[1])
    want = exact[0].to(dtype)
    assert torch.equal(values.isnan(), want.isnan())
    assert torch.equal(values.nan_to_num(-1), want.nan_to_num(-1))


def check_encoders(
    x: Tensor, W: Tensor, b: Tensor, k: int, b_dec: Tensor | None, chunk: tuple[int, int] | None
) -> None:
    doubles = x.double(), W.double(), b.double()
    shift = None if b_dec is None else b_dec.double()
    code = encode_csr.batch_topk_encode(x, W, b, k, b_dec, chunk=chunk)
    same(code, reference.batch_topk_encode(*doubles, k, shift), x.dtype)
    for threshold in (integers(W.shape[0], low=-2, high=6), torch.full((W.shape[0],), math.nan)):
        code = encode_csr.threshold_encode(x, W, b, threshold, b_dec, chunk=chunk)
        same(code, reference.threshold_encode(*doubles, threshold.double(), shift), x.dtype)


@pytest.mark.parametrize(
    ("dtype", "n", "d", "n_latents", "k", "chunk"),
    [
        (torch.float32, 5, 5, 77, 2, (3, 40)),
        (torch.float16, 3, 7, 31, 31, (2, 16)),  # k = F
        (torch.float16, 3, 19, 101, 7, None),
        (torch.float32, 5, 3, 30, 1, (2, 16)),
        (torch.float32, 1, 1, 1, 1, None),
        (torch.float32, 0, 4, 9, 3, None),
    ],
)
def test_encoders_with_ties(dtype, n, d, n_latents, k, chunk):
    torch.manual_seed(n * d + k)
    x, W = inside(integers(n, d, dtype=dtype)), inside(integers(n_latents, d, dtype=dtype))
    b_dec = inside(integers(d)) if d > 3 else None
    check_encoders(x, W, inside(integers(n_latents)), k, b_dec, chunk)


@pytest.mark.parametrize("pattern", ["ascending", "constant", "stairs", "one row"])
def test_batch_topk_of_orders_that_overflow_the_pool(monkeypatch, pattern):
    """The pool holds 2 N k + 2 R C = 2 * 12 + 2 * 32 of the 240 entries: it is reduced several times."""
    n, f, k = 6, 40, 2
    ramp = torch.arange(n * f).float().reshape(n, f)
    pre = {
        "ascending": ramp,
        "constant": torch.full((n, f), 2.0),
        "stairs": ramp // 7 % 11,
        "one row": ramp * (torch.arange(n) == 3)[:, None],
    }[pattern]
    reduced: list[int] = []
    reduce = encode_csr._reduce

    def counting(bits: Tensor, positions: Tensor, filled: int, most: int) -> None:
        reduced.append(filled)
        reduce(bits, positions, filled, most)

    monkeypatch.setattr(encode_csr, "_reduce", counting)
    arguments = torch.eye(n), pre.T.contiguous(), torch.zeros(f), k, None
    code = encode_csr.batch_topk_encode(*arguments, chunk=(4, 8))
    same(code, reference.batch_topk_encode(*arguments), torch.float32)
    assert all(filled <= 2 * n * k + 2 * 32 for filled in reduced)
    assert len(reduced) >= {"ascending": 2, "constant": 2}.get(pattern, 0)


def test_encoders_put_nan_first_and_keep_infinity():
    b = torch.zeros(40)
    b[[5, 33]], b[[3, 38]], b[7] = math.nan, math.inf, -math.inf
    x = integers(3, 4)
    x[1, 2] = math.nan
    W = integers(40, 4, low=1, high=3)
    for k in (1, 14, 40):
        check_encoders(x, W, b, k, None, (2, 20))
    check_encoders(integers(3, 4).half(), W.half(), torch.zeros(40), 3, torch.tensor([math.inf, 0, 0, 0]), (3, 32))
    # More NaN than places: they fill every chunk of the pool, and the first ones win.
    check_encoders(torch.full((4, 4), math.nan), W[:24], b[:24], 1, None, (2, 6))


def test_what_rounds_to_zero_in_fp16_is_no_entry():
    bias = torch.tensor([2.0**-25, 2.0**-25 * 1.01, 2.0**-24, 0.0, -1.0])
    x, W = torch.zeros(1, 2).half(), torch.ones(5, 2).half()
    for code in (
        encode_csr.batch_topk_encode(x, W, bias, 5, None),
        encode_csr.threshold_encode(x, W, bias, torch.zeros(5), None),
    ):
        assert code[1].tolist() == [1, 2]
        assert code[0].tolist() == [2.0**-24] * 2


def test_the_pool_is_bounded_by_its_chunk_and_the_result():
    """Per entry: 12 bytes. Nothing of it is of size N F."""
    x, W = torch.ones(300, 1), torch.ones(400, 1)
    sizes: list[int] = []
    empty = torch.empty

    def counting(*shape, **options):
        sizes.append(math.prod(shape))
        return empty(*shape, **options)

    torch.empty = counting
    try:
        encode_csr.batch_topk_encode(x[:40], W[:100], torch.zeros(100), 2, None, chunk=(8, 50))
    finally:
        torch.empty = empty
    assert sizes
    assert max(sizes) == 2 * 80 + 2 * 400


def random_code(n: int, f: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    lengths = torch.randint(0, 9, (n,))
    lengths[n // 2] = 0
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    latents = torch.randint(0, f - 1, (int(offsets[-1]),))
    latents[::3] = 1  # a hot latent
    return inside(torch.randn(latents.numel()).to(dtype)), latents, offsets


def close(actual: Tensor, exact: Tensor, own: Tensor, factor: float) -> None:
    assert actual.dtype == own.dtype
    assert actual.shape == exact.shape
    error, torch_error = (actual.double() - exact).abs(), (own.double() - exact).abs()
    assert error.max() <= factor * torch_error.max() + torch.finfo(actual.dtype).eps * exact.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d", "f", "segment"), [(6, 130, 12, 4), (3, 1030, 7, None)])
def test_decode_and_backward(dtype, n, d, f, segment):
    torch.manual_seed(d)
    values, latents, offsets = random_code(n, f, dtype)
    W, b_dec = inside(torch.randn(f, d).to(dtype)), inside(torch.randn(d))
    rows = inside(torch.randn(n, d).to(dtype))
    for bias in (b_dec, None):
        exact_bias = None if bias is None else bias.double()
        exact = reference.sparse_decode_csr(values.double(), latents, offsets, W.double(), exact_bias)
        own = reference.sparse_decode_csr(values, latents, offsets, W, bias)
        close(decode.sparse_decode_csr(values, latents, offsets, W, bias), exact, own, 2)

        arguments = values, latents, offsets, rows, W, bias
        doubles = values.double(), latents, offsets, rows.double(), W.double(), exact_bias
        for needs in ((True, True), (False, False))[: 1 if bias is None else 2]:
            got = backward_csr.csr_encode_backward(*arguments, *needs, segment=segment)
            exacts, owns = (reference.csr_encode_backward(*a, *needs) for a in (doubles, arguments))
            for a, e, o in zip(got, exacts, owns, strict=True):
                assert (a is None) == (e is None)
                if a is not None:
                    close(a, e, o, 3)
    for needs in ((True, True), (True, False)):
        got = backward_csr.sparse_decode_csr_backward(rows, values, latents, offsets, W, *needs, segment=segment)
        again = backward_csr.sparse_decode_csr_backward(rows, values, latents, offsets, W, *needs, segment=segment)
        exacts = reference.sparse_decode_csr_backward(
            rows.double(), values.double(), latents, offsets, W.double(), *needs
        )
        owns = reference.sparse_decode_csr_backward(rows, values, latents, offsets, W, *needs)
        for a, a2, e, o in zip(got, again, exacts, owns, strict=True):
            assert (a is None) == (e is None)
            if a is not None:
                close(a, e, o, 3)
                assert torch.equal(a, a2)


def test_operators_run_on_this_back_end_and_empty_codes_are_whole():
    x, W, b = torch.randn(4, 6, requires_grad=True), torch.randn(12, 6, requires_grad=True), torch.randn(12)
    results = []
    for backend in ("triton", "reference"):
        x.grad = W.grad = None
        code = rk.batch_topk_encode(x, W, b, 2, backend=backend)
        rk.sparse_decode_csr(*code, W, backend=backend).square().sum().backward()
        results.append([*code, x.grad, W.grad])
        ops = ("batch_topk_encode", "sparse_decode_csr", "batch_topk_encode_backward", "sparse_decode_csr_backward")
        assert {rk.last_backend(op) for op in ops} == {backend}
    for a, c in zip(*results, strict=True):
        torch.testing.assert_close(a, c)
    for none in (x[:0], x):
        code = rk.threshold_encode(none, W, b, math.inf, backend="triton")
        assert rk.last_backend("threshold_encode") == "triton"
        x_hat = rk.sparse_decode_csr(*code, W, backend="triton")
        assert x_hat.shape == none.shape
        assert not x_hat.any()
        (gradient,) = torch.autograd.grad(x_hat.sum() + code[0].sum(), W)
        assert not gradient.any()
