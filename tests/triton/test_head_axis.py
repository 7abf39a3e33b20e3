"""Heads in one launch: every Triton primitive with a head axis against a loop over the heads, in the interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import refusal_kernels as rk
from refusal_kernels.backends import BACKENDS
from refusal_kernels.backends.heads import run
from refusal_kernels.triton_kernels import backward, decode, encode, sae_adam

H, N, D, F, K = 2, 3, 5, 7, 3
SEGMENT = 2  # latents with more entries are split


@pytest.fixture(autouse=True)
def _poison_empty_tensors():
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)


def code(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Values with a zero in every head, and distinct indices within the head."""
    indices = torch.stack([torch.randperm(F)[:K] for _ in range(H * N)]).view(H, N, K)
    values = torch.rand(H, N, K).to(dtype)
    values[:, 1, 0] = 0
    return values, indices


def assert_equal_per_head(together, apart) -> None:
    together, apart = ([results] if isinstance(results, Tensor) else results for results in (together, apart))
    for mine, theirs in zip(together, apart, strict=True):
        assert torch.equal(mine, theirs)


def stacked(results: list) -> list[Tensor]:
    if isinstance(results[0], Tensor):
        return [torch.stack(results)]
    return [torch.stack(parts) for parts in zip(*results, strict=True)]


@pytest.mark.parametrize(("dtype", "d"), [(torch.float32, 130), (torch.float16, D)])
def test_decode_is_a_loop_over_heads(dtype, d):
    values, indices = code(dtype)
    W, x = normal(H, F, d, dtype=dtype), normal(H, N, d, dtype=dtype)
    b_dec = normal(H, d)
    for bias in (b_dec, None):
        one = [None] * H if bias is None else bias
        loop = [decode.sparse_decode(values[h], indices[h], W[h], one[h]) for h in range(H)]
        assert_equal_per_head(decode.sparse_decode(values, indices.int(), W, bias), stacked(loop))
        loop = [decode.decode_residual(x[h], values[h], indices[h], W[h], one[h]) for h in range(H)]
        assert_equal_per_head(decode.decode_residual(x, values, indices, W, bias), stacked(loop))


@pytest.mark.parametrize(("dtype", "wide"), [(torch.float32, True), (torch.float16, False)])
def test_gradients_are_a_loop_over_heads(monkeypatch, dtype, wide):
    if wide:
        monkeypatch.setattr(backward, "_WIDEST_ROW", 0)
    values, indices = code(dtype)
    grad, x, grad_values = normal(H, N, D, dtype=dtype), normal(H, N, D, dtype=dtype), normal(H, N, K, dtype=dtype)
    W, b_dec = normal(H, F, D, dtype=dtype), normal(H, D)

    def per_head(function, *arguments):
        return stacked([function(*(a[h] if isinstance(a, Tensor) else a for a in arguments)) for h in range(H)])

    def decoder(*arguments):
        return backward.sparse_decode_backward(*arguments, True, True, segment=SEGMENT)

    def encoder(*arguments):
        return backward.topk_encode_backward(*arguments, True, True, segment=SEGMENT)

    def step(*arguments):
        shape = arguments[5].shape
        gradients = [torch.full(s, 0.5) for s in (shape, shape[:-1], shape)]
        backward.sae_backward(*arguments, 0.3, *gradients, segment=SEGMENT)
        return gradients

    assert_equal_per_head(decoder(grad, values, indices, W), per_head(decoder, grad, values, indices, W))
    for bias in (b_dec, None):
        inputs = (grad_values, values, indices, x, W, bias)
        assert_equal_per_head(encoder(*inputs), per_head(encoder, *inputs))
        inputs = (grad, x, values, indices, W, W, bias)
        assert_equal_per_head(step(*inputs), per_head(step, *inputs))


# The dead latents of two heads, the second's list padded.
DEAD = torch.tensor([[1, 4, 6], [3, -1, -1]])


@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("wide", [False, True])
def test_the_fused_step_is_a_loop_over_heads(monkeypatch, wide, extra):
    """`extra`: with rows of AuxK, where what padding has in them is not looked at."""
    if wide:
        monkeypatch.setattr(sae_adam, "_BLOCKS", ((4, 1, 1, 1),))
    values, indices = code(torch.float32)
    rows = [DEAD, normal(*DEAD.shape, D), normal(*DEAD.shape), normal(*DEAD.shape, D)] if extra else [None] * 4
    e, x, b_dec = normal(H, N, D), normal(H, N, D), normal(H, D)
    weights = [normal(H, F, D), normal(H, F), normal(H, F, D)]
    moments = [torch.rand(w.shape) for w in weights for _ in "mv"]
    numbers = (1e-2, 0.9, 0.999, 1e-8, 1 - 0.9**2, 1 - 0.999**2)

    def step(e, x, values, indices, b_dec, weights, moments, rows):
        weights, moments = [w.clone() for w in weights], [m.clone() for m in moments]
        through = sae_adam.sae_backward_adam(
            e, x, values, indices, *weights, b_dec, 0.3, *moments, *numbers, True, True, *rows, segment=SEGMENT
        )
        return [*weights, *moments, through]

    def listed(h):
        return [row if row is None else row[h][DEAD[h] >= 0] for row in rows]

    together = step(e, x, values, indices, b_dec, weights, moments, rows)
    apart = [
        step(e[h], x[h], values[h], indices[h], b_dec[h], [w[h] for w in weights], [m[h] for m in moments], listed(h))
        for h in range(H)
    ]
    for mine, theirs in zip(together[:-1], stacked(apart)[:-1], strict=True):
        assert torch.equal(mine, theirs)
    # The returned sum over latents is a product of all heads for wide rows.
    torch.testing.assert_close(together[-1], stacked(apart)[-1])


@pytest.mark.parametrize("dead", [None, DEAD])
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 10.0}, {"moment_dtype": torch.bfloat16}])
def test_the_training_step_on_triton_equals_the_reference(monkeypatch, options, dead):
    triton = BACKENDS["triton"]
    monkeypatch.setattr(encode, "_LISTS", ((4, 16, 8, 1),))  # the shipped lists take seconds in the interpreter
    if options or dead is not None:  # one case with Triton's encoder: it takes most of the interpreter's time
        monkeypatch.setattr(triton, "topk_encode", lambda *a: run(BACKENDS["reference"], "topk_encode", H, *a), False)
    fused, calls = sae_adam.sae_backward_adam, []

    def counted(*arguments):
        calls.append(arguments)
        return fused(*arguments)

    monkeypatch.setattr(triton, "sae_backward_adam", counted, raising=False)
    start = [normal(H, N, D), normal(H, F, D), normal(H, F), normal(H, F, D), normal(H, D)]
    results = []
    for backend in ("triton", "reference"):
        x, *parameters = (t.clone() for t in start)
        parameters = [p.requires_grad_() for p in parameters]
        optimizer = rk.SAEAdam(*parameters, lr=1e-2, backend=backend, **options)
        rk.sae_step(x, *parameters, K, dead=dead, optimizer=optimizer, backend=backend)
        output = rk.sae_step(x, *parameters, K, dead=dead, backend=backend)
        assert rk.last_backend("sae_step") == backend
        results.append([*output, *parameters, *(p.grad for p in parameters)])
    assert len(calls) == ("max_grad_norm" not in options)  # Adam ran inside the backward
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
