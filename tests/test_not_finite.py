"""Infinities and NaN stay where the mathematics puts them: the reference and the kernels agree on every entry."""

from __future__ import annotations

import math

import pytest
import torch

import refusal_kernels as rk

N, D, F, K = 9, 5, 23, 3
NOT_FINITE = (math.nan, math.inf, -math.inf)


def assert_backends_agree(run) -> None:
    """`run(backend)` gives tensors with the same finite entries, of the same values, on the reference and the kernels;
    the last one, a weight gradient, has entries of both kinds."""
    results = []
    for backend in ("reference", "cpu"):
        torch.manual_seed(0)
        results.append(run(backend))
    for reference, kernels in zip(*results, strict=True):
        assert torch.equal(reference.isfinite(), kernels.isfinite())
        torch.testing.assert_close(reference[reference.isfinite()], kernels[kernels.isfinite()])
    assert results[0][-1].isfinite().any()
    assert not results[0][-1].isfinite().all()


def autoencoder(bad: float) -> list[torch.Tensor]:
    """x, W_enc, b_enc, W_dec, b_dec. Token 4 holds `bad`, on which latent 20 alone fires where it is an infinity: its
    other pairs only fill the row up. Token 7 fires nowhere."""
    x = torch.randn(N, D)
    x[4, 1] = bad
    x[7] = 0.0
    W_enc, W_dec = torch.randn(F, D), torch.randn(F, D)
    W_enc[:, 1] = W_enc[:, 1].abs() * -math.copysign(1.0, bad)
    W_enc[20, 1] *= -1
    return [x, *(t.requires_grad_() for t in (W_enc, torch.full((F,), -0.1), W_dec, torch.zeros(D)))]


@pytest.mark.parametrize("bad", NOT_FINITE)
def test_a_bad_token_reaches_its_own_latents_only(bad):
    def encode(backend):
        x, W_enc, b_enc, _, b_dec = autoencoder(bad)
        x.requires_grad_()
        values, _ = rk.topk_encode(x, W_enc, b_enc, K, b_dec, backend=backend)
        values.backward(torch.randn(N, K))
        return [values.detach(), x.grad, b_enc.grad, W_enc.grad]

    assert_backends_agree(encode)


@pytest.mark.parametrize("bad", NOT_FINITE)
def test_decode_reads_and_writes_the_selected_rows_only(bad):
    def decode(backend):
        values, W_dec = torch.randn(N, K), torch.randn(F, D)
        values[2] = 0.0
        W_dec[5, 0] = bad
        values.requires_grad_()
        W_dec.requires_grad_()
        indices = torch.arange(N * K).reshape(N, K) % F
        x_hat = rk.sparse_decode(values, indices, W_dec, backend=backend)
        grad = torch.randn(N, D)
        grad[2, 2] = grad[3, 2] = bad
        x_hat.backward(grad)
        return [x_hat.detach(), values.grad, W_dec.grad]

    assert_backends_agree(decode)


@pytest.mark.parametrize("bad", NOT_FINITE)
def test_a_training_step_keeps_a_bad_token_to_its_own_latents(bad):
    def step(backend):
        x, W_enc, b_enc, W_dec, b_dec = autoencoder(bad)
        rk.sae_step(x, W_enc, b_enc, W_dec, b_dec, K, backend=backend)
        return [b_enc.grad, W_enc.grad, W_dec.grad]

    assert_backends_agree(step)
