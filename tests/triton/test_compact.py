"""State in fewer bytes in the Triton kernels, in the interpreter: against chunks in fp32 that torch rounds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import refusal_kernels as rk
from refusal_kernels import compact, reference
from refusal_kernels.backends import BACKENDS
from refusal_kernels.backends.base import Backend
from refusal_kernels.triton_kernels import adam, sae_adam

NUMBERS = (1e-2, 0.9, 0.999, 1e-8, 1 - 0.9**2, 1 - 0.999**2)
FORMS = ("moments", "halves", "both")


@pytest.fixture(autouse=True)
def _poison_empty_tensors():
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def state(form: str, *shape: int) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """W, low, m, v of a form."""
    m, v = torch.randn(shape), torch.rand(shape)
    if form != "halves":
        m, v = m.bfloat16(), v.bfloat16()
    W, low = compact.split(torch.randn(shape)) if form != "moments" else (torch.randn(shape), None)
    return W, low, m, v


def expected_step(W: Tensor, low: Tensor | None, *rest) -> None:
    """The formula: Backend's own, by way of the reference's adam_rows."""
    Backend.adam_compact_rows(BACKENDS["reference"], W, low, *rest)


def same(actual: tuple[Tensor | None, ...], wanted: tuple[Tensor | None, ...]) -> None:
    """W, low, m, v: fp32 to rounding; bf16 moments to the word, but for those that a last bit took across."""
    (W, low, *moments), (W2, low2, *moments2) = actual, wanted
    masters = (W, W2) if low is None else (compact.join(W, low), compact.join(W2, low2))
    torch.testing.assert_close(*masters, rtol=2e-6, atol=1e-6)
    for a, b in zip(moments, moments2, strict=True):
        if a.dtype == torch.float32:
            torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-6)
            continue
        apart = (a.view(torch.int16).int() - b.view(torch.int16).int()).abs()
        assert apart.max() <= 1
        assert (apart != 0).float().mean() < 0.01


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("rows", "d", "blocks"), [(4, 130, None), (3, 5, None), (2, 2500, ((128, 1),))])
@pytest.mark.parametrize("constraints", [(True, True), (False, False), (True, False)])
def test_adam_rows(monkeypatch, form, rows, d, blocks, constraints):
    if blocks is not None:
        monkeypatch.setattr(adam, "_ROW_BLOCKS", blocks)
    W, low, m, v = state(form, rows, d)
    g = torch.randn(rows, d)
    factor = torch.tensor(0.5)
    results = []
    for step in (adam.adam_compact_rows, expected_step):
        own = [None if t is None else t.clone() for t in (W, low, m, v)]
        step(own[0], own[1], g, *own[2:], *NUMBERS, factor, *constraints, 123456789)
        results.append(own)
    same(*results)


def test_nan_is_stored_as_nan():
    W, low, m, v = state("both", 2, 5)
    g = torch.randn(2, 5)
    g[0, 1] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    adam.adam_compact_rows(W, low, g, m, v, *NUMBERS, None, False, False, 7)
    for t in (W, m, v, compact.join(W, low)):
        assert t.isnan()[0, 1]
        assert t.isnan().sum() == 1


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("d", "segment", "wide"), [(7, 2, False), (130, None, False), (7, 2, True)])
@pytest.mark.parametrize("extra", [False, True])
def test_the_fused_step(monkeypatch, form, d, segment, wide, extra):
    if wide:
        monkeypatch.setattr(sae_adam, "_BLOCKS", ((4, 1, 1, 1),))
    n, n_latents, k = 6, 9, 3
    rows = torch.float16 if form == "moments" else torch.bfloat16
    indices = torch.stack([torch.randperm(n_latents)[:k] for _ in range(n)])
    values = torch.rand(n, k).to(rows)
    e, x, b_dec, b_enc = torch.randn(n, d).to(rows), torch.randn(n, d).to(rows), torch.randn(d), torch.randn(n_latents)
    encoder, decoder = state(form, n_latents, d), state(form, n_latents, d)
    m_b, v_b = torch.randn(n_latents), torch.rand(n_latents)
    extras = [torch.tensor([8, 2]), torch.randn(2, d), torch.randn(2), torch.randn(2, d)] if extra else [None] * 4
    salts = (77, 991)

    def clones(tensors):
        return [None if t is None else t.clone() for t in tensors]

    (We, le, me, ve), (Wd, ld, md, vd), (be, mb, vb) = map(clones, (encoder, decoder, (b_enc, m_b, v_b)))
    through = sae_adam.sae_backward_adam(
        e, x, values, indices, We, be, Wd, b_dec, 0.3, me, ve, mb, vb, md, vd, *NUMBERS, True, True, *extras, le, ld,
        salts, segment=segment,
    )  # fmt: skip

    (We2, le2, me2, ve2), (Wd2, ld2, md2, vd2), (be2, mb2, vb2) = map(clones, (encoder, decoder, (b_enc, m_b, v_b)))
    dWe, dbe, dWd = torch.zeros(n_latents, d), torch.zeros(n_latents), torch.zeros(n_latents, d)
    seen = We2.to(rows), Wd2.to(rows)
    reference.sae_backward(e, x, values, indices, *seen, b_dec, 0.3, dWe, dbe, dWd)
    if extra:
        for gradient, more in zip((dWe, dbe, dWd), extras[1:], strict=True):
            gradient.index_add_(0, extras[0], more)
    torch.testing.assert_close(through, dbe @ seen[0].float(), rtol=1e-4, atol=1e-4)
    expected_step(We2, le2, dWe, me2, ve2, *NUMBERS, None, False, False, salts[0])
    expected_step(Wd2, ld2, dWd, md2, vd2, *NUMBERS, None, True, True, salts[1])
    reference.adam_rows(be2[None], dbe[None], mb2[None], vb2[None], *NUMBERS, None, False, False)
    for actual, wanted in (((We, le, me, ve), (We2, le2, me2, ve2)), ((Wd, ld, md, vd), (Wd2, ld2, md2, vd2))):
        masters = [t[0].float() if t[1] is None else compact.join(t[0], t[1]) for t in (actual, wanted)]
        torch.testing.assert_close(*masters, rtol=1e-4, atol=1e-4)
        for a, b in zip(actual[2:], wanted[2:], strict=True):
            torch.testing.assert_close(a.float(), b.float(), rtol=2**-6, atol=1e-3)
    torch.testing.assert_close(be, be2, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_a_training_step_hands_the_state_to_the_one_kernel(monkeypatch, form):
    """Through sae_step. Encode and decode are the reference's: the interpreter multiplies bf16 words as integers."""
    triton = BACKENDS["triton"]
    monkeypatch.setattr(triton, "topk_encode", reference.topk_encode, raising=False)
    monkeypatch.setattr(triton, "decode_residual", reference.decode_residual, raising=False)
    fused, calls = sae_adam.sae_backward_adam, []

    def step(*arguments):
        calls.append(arguments)
        return fused(*arguments)

    monkeypatch.setattr(triton, "sae_backward_adam", step, raising=False)
    rows = torch.float16 if form == "moments" else torch.bfloat16
    weights = torch.float32 if form == "moments" else torch.bfloat16
    start = [torch.randn(12, 6).to(weights), torch.randn(12), torch.randn(12, 6).to(weights), torch.randn(6)]
    x = torch.randn(8, 6).to(rows)
    options = {"split_master": form != "moments", "moment_dtype": torch.float32 if form == "halves" else torch.bfloat16}
    after = []
    for backend in ("triton", "reference"):
        parameters = [t.clone().requires_grad_() for t in start]
        optimizer = rk.SAEAdam(*parameters, lr=0.01, **options)
        for _ in range(2):
            with torch.autocast("cpu", rows, enabled=form == "moments"):
                rk.sae_step(x, *parameters, 3, optimizer=optimizer, backend=backend)
        assert rk.last_backend("sae_step") == backend
        moments = [m.float() for p in parameters for m in optimizer.moments(p)]
        after.append([optimizer.master(p) for p in parameters] + moments)
    assert len(calls) == 2
    for a, b in zip(*after, strict=True):
        torch.testing.assert_close(a, b, rtol=2**-6, atol=2e-4)
