"""AuxK with a head axis: what a loop over heads gives, with lists of dead latents of different lengths."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import refusal_kernels as rk
from refusal_kernels.training import auxk

BACKENDS = ("reference", "cpu")
H, N, D, F, K = 4, 20, 6, 14, 3
# One head with few, one with none, one where all are dead, one where padding begins after two.
DEAD = torch.full((H, F), -1)
DEAD[0, :4] = torch.tensor([1, 5, 6, 13])
DEAD[2] = torch.arange(F)
DEAD[3, :2] = torch.tensor([0, 9])


@pytest.fixture(autouse=True)
def _seed_and_poison():
    torch.manual_seed(3)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def problem(dtype: torch.dtype = torch.float64) -> tuple[Tensor, list[Tensor]]:
    shapes = ((H, F, D), (H, F), (H, F, D), (H, D))
    return torch.randn(H, N, D, dtype=dtype), [torch.randn(s, dtype=dtype).requires_grad_() for s in shapes]


def of_head(parameters: list[Tensor], h: int) -> list[Tensor]:
    return [p[h].detach().clone().requires_grad_() for p in parameters]


def listed(h: int) -> Tensor:
    return DEAD[h][DEAD[h] >= 0]


@pytest.mark.parametrize("k_aux", [1, 3, 5, 300, None])
def test_the_loss_and_its_gradients_are_those_of_a_loop(k_aux):
    x, parameters = problem()
    x.requires_grad_()
    residual = torch.randn_like(x)
    W_enc, b_enc, W_dec, b_dec = parameters
    loss = rk.aux_k_loss(x, residual, W_enc, b_enc, W_dec, b_dec, DEAD, k_aux)
    assert loss.shape == (H,)
    assert loss[1] == 0
    loss.sum().backward()
    for h in range(H):
        own, alone = x[h].detach().clone().requires_grad_(), of_head(parameters, h)
        value = rk.aux_k_loss(own, residual[h], *alone, listed(h), k_aux)
        torch.testing.assert_close(loss[h], value)
        if value.requires_grad:
            value.backward()
        for mine, theirs in zip((x, *parameters), (own, *alone), strict=True):
            expected = torch.zeros_like(theirs) if theirs.grad is None else theirs.grad
            torch.testing.assert_close(mine.grad[h], expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["accumulate", "step", "clipped", "halves"])
@pytest.mark.parametrize("k_aux", [2, None])
@pytest.mark.parametrize("chunk", [None, 64])
def test_a_step_is_a_loop_of_steps(monkeypatch, backend, mode, k_aux, chunk):
    if chunk is not None:
        monkeypatch.setattr(auxk, "CHUNK_ELEMENTS", chunk)  # one token at a time with heads, some without
    x, parameters = problem(torch.float32)
    if mode == "halves":
        parameters = [p.detach().bfloat16().requires_grad_() if p.dim() == 3 else p for p in parameters]
        x = x.bfloat16()
    options = {"lr": 0.01, "eps": 1e-3, "split_master": mode == "halves"}
    if mode == "clipped":  # above the norm of all: what clips nothing together clips nothing apart
        options["max_grad_norm"] = 1e6
    optimizer = None if mode == "accumulate" else rk.SAEAdam(*parameters, **options)
    apart = [of_head(parameters, h) for h in range(H)]
    loop = [None if optimizer is None else rk.SAEAdam(*p, **options) for p in apart]
    for _ in range(2):
        out = rk.sae_step(x, *parameters, K, dead=DEAD, k_aux=k_aux, optimizer=optimizer, backend=backend)
        assert rk.last_backend("sae_step") == backend
        assert out.aux_loss.shape == (H,)
        for h in range(H):
            alone = rk.sae_step(x[h], *apart[h], K, dead=listed(h), k_aux=k_aux, optimizer=loop[h], backend=backend)
            torch.testing.assert_close(out.aux_loss[h], alone.aux_loss, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(out.loss[h], alone.loss, rtol=1e-4, atol=1e-4)
    for i, parameter in enumerate(parameters):
        for h in range(H):
            if optimizer is None:
                torch.testing.assert_close(parameter.grad[h], apart[h][i].grad, rtol=1e-4, atol=1e-4)
            else:
                mine, theirs = optimizer.master(parameter)[h], loop[h].master(apart[h][i])
                torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)


def test_chunks_count_the_elements_of_all_heads(monkeypatch):
    sizes = []
    whole = auxk._plus_product
    monkeypatch.setattr(auxk, "CHUNK_ELEMENTS", 2 * DEAD.numel())

    def seen(base: Tensor, a: Tensor, b: Tensor, operands: torch.dtype | None) -> Tensor:
        sizes.append(a.shape[1])
        return whole(base, a, b, operands)

    monkeypatch.setattr(auxk, "_plus_product", seen)
    x, parameters = problem()
    auxk.aux_k_gradients(x, torch.randn_like(x), *parameters, DEAD, 3, 1.0)
    assert set(sizes) == {2}


@pytest.mark.parametrize("heads", [False, True])
def test_16_bit_products_have_rows_of_whole_vectors_within_the_chunk_bound(monkeypatch, heads):
    """cuBLAS is slow on rows that do not begin at 16-byte boundaries; what fills them up counts as elements too."""
    shapes = []
    whole = auxk._product

    def seen(a: Tensor, b: Tensor, operands: torch.dtype | None) -> Tensor:
        shapes.extend((a.shape, b.shape))
        return whole(a, b, operands)

    x, parameters = problem(torch.float32)
    dead = DEAD if heads else listed(0)
    if not heads:
        x, parameters = x[0], of_head(parameters, 0)
    rows = dead.shape[0] if heads else 1
    bound = 2 * rows * auxk.PRODUCT_ROWS
    monkeypatch.setattr(auxk, "CHUNK_ELEMENTS", bound)
    monkeypatch.setattr(auxk, "_operands", lambda weights: torch.bfloat16)
    monkeypatch.setattr(auxk, "_product", seen)
    found = auxk.aux_k_gradients(x, torch.randn_like(x), *parameters, dead, 3, 1.0)
    assert (found.dW_enc.shape[-2], found.db_enc.shape) == (dead.shape[-1], dead.shape)
    activations = [shape for shape in shapes if auxk.PRODUCT_ROWS in shape[-2:] and D not in shape[-2:]]
    assert activations  # [tokens, filled-up D] or its transpose
    assert all(shape.numel() <= bound for shape in activations)


def test_padding_does_not_carry_a_broken_head_into_living_latents():
    """An infinite residual in the head without dead latents: 0 times it is NaN, in no row of W."""
    x, (W_enc, b_enc, W_dec, b_dec) = problem(torch.float32)
    e = torch.randn_like(x)
    e[1, 0, 0] = torch.inf
    gradients = auxk.aux_k_gradients(x, e, W_enc, b_enc, W_dec, b_dec, DEAD, 3, 1.0)
    for gradient in (gradients.dW_enc, gradients.dW_dec, gradients.db_enc):
        assert gradient.isfinite().all()
        assert not gradient[1].any()
        assert gradient[0, :4].any()


def test_nothing_dead_costs_nothing():
    x, parameters = problem(torch.float32)
    plain = rk.sae_step(x, *parameters, K)
    grads = [p.grad.clone() for p in parameters]
    for p in parameters:
        p.grad = None
    empty = rk.sae_step(x, *parameters, K, dead=torch.empty(H, 0, dtype=torch.int64))
    assert all(torch.equal(a, b) for a, b in zip(plain, empty, strict=True))
    assert all(torch.equal(a, p.grad) for a, p in zip(grads, parameters, strict=True))


def test_the_tracked_latents_of_one_head_get_gradients_by_auxk_alone():
    """Encoder rows so short that head 1 never chooses them: they are found dead there, and reached through AuxK."""
    x, parameters = problem(torch.float32)
    with torch.no_grad():
        parameters[0][1, :5] *= 1e-6
        parameters[1][1, :5], parameters[1][1, 5:] = 0, 9
    tracker = rk.DeadLatents(F, dead_after_tokens=2 * N, refresh_every=1, heads=H)
    for _ in range(2):
        tracker.update(rk.sae_step(x, *parameters, K).fire_counts, N)
    assert tracker.rows[1, :5].tolist() == [0, 1, 2, 3, 4]
    assert not parameters[0].grad[1, :5].any()
    rk.sae_step(x, *parameters, K, dead=tracker.rows, k_aux=F)
    assert parameters[0].grad[1, :5].any(1).all()
    assert parameters[2].grad[1, :5].any(1).all()


def test_the_tracker_pads_each_heads_list():
    tracker = rk.DeadLatents(4, dead_after_tokens=10, refresh_every=1, heads=3)
    assert tracker.rows.shape == (3, 0)
    counts = torch.tensor([[1, 0, 0, 1], [1, 1, 1, 1], [1, 1, 0, 1]])
    tracker.update(counts, 10)
    assert tracker.rows.tolist() == [[1, 2], [-1, -1], [2, -1]]
    assert tracker.fraction == pytest.approx(3 / 12)
    other = rk.DeadLatents(4, dead_after_tokens=10, refresh_every=1, heads=3)
    other.load_state_dict(tracker.state_dict())
    assert torch.equal(other.rows, tracker.rows)
    assert other.fraction == tracker.fraction
    with pytest.raises(ValueError, match=r"fire_counts must have shape \[H, F\]"):
        tracker.update(counts[0], 10)
    with pytest.raises(ValueError, match="tokens_since_fired must have shape"):
        rk.DeadLatents(4).load_state_dict(tracker.state_dict())
    with pytest.raises(ValueError, match=r"rows must have shape \[3, D\]; got \(2,\)"):
        other.load_state_dict({**tracker.state_dict(), "rows": torch.tensor([1, 2])})
    with pytest.raises(ValueError, match="heads must be an integer of at least 1; got 0"):
        rk.DeadLatents(4, heads=0)


@pytest.mark.parametrize(
    ("dead", "message"),
    [
        (torch.tensor([1, 2]), r"dead must have shape \[H, D\] with H = W_enc.shape\[0\] = 4.*; got shape \(2,\)"),
        (DEAD[:2], r"dead must have shape \[H, D\] .*; got shape \(2, 14\)"),
        (torch.full((H, 1), F), "dead must hold latents in .* F = 14, or -1 behind them; got 14 to 14"),
        (torch.tensor([[1, -1, 2]] * H), "dead must have -1 behind a head's latents only; got a latent after a -1"),
        (torch.zeros(H, 1), "dead must"),
    ],
)
def test_what_is_wrong_is_named(dead, message):
    x, parameters = problem(torch.float32)
    with pytest.raises((ValueError, TypeError), match=message):
        rk.sae_step(x, *parameters, K, dead=dead)
    with pytest.raises((ValueError, TypeError), match=r"dead must be a vector \[D\]"):
        rk.sae_step(x[0], *of_head(parameters, 0), K, dead=DEAD)


@pytest.mark.parametrize("heads", [False, True])
def test_16_bit_products_are_those_of_autocast(monkeypatch, heads):
    """What a GPU does: operands rounded to bf16, fp32 sums; beside autograd under autocast, against fp64."""
    x, parameters = problem(torch.float32)
    dead, k_aux = (DEAD, 5) if heads else (listed(0), 3)
    if not heads:
        x, parameters = x[0], of_head(parameters, 0)
    W_enc, b_enc, W_dec, b_dec = parameters
    e = torch.randn_like(x)

    def by_autograd(dtype: torch.dtype) -> list[Tensor]:
        leaves = [p.detach().to(dtype).requires_grad_() for p in parameters]
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            rk.aux_k_loss(x.to(dtype), -e.to(dtype), *leaves, dead, k_aux).sum().backward()
        rows = auxk.flat_rows(dead, F) if heads else dead
        gradients = [p.grad.reshape(-1, D)[rows].double() for p in (leaves[0], leaves[2])]
        return [g.masked_fill((dead < 0)[..., None], 0) for g in gradients]

    narrow = [W_enc.detach().bfloat16(), b_enc.detach(), W_dec.detach().bfloat16(), b_dec.detach()]
    monkeypatch.setattr(auxk, "_operands", lambda weights: weights.dtype)
    mine = auxk.aux_k_gradients(x, e, *narrow, dead, k_aux, 1.0)
    monkeypatch.setattr(auxk, "_operands", lambda weights: None)
    wide = auxk.aux_k_gradients(x, e, *narrow, dead, k_aux, 1.0)
    assert not torch.equal(mine.dW_enc, wide.dW_enc)
    others = by_autograd(torch.float32), by_autograd(torch.float64)
    for actual, own, exact in zip((mine.dW_enc, mine.dW_dec), *others, strict=True):
        assert actual.dtype == torch.float32
        assert (actual - exact).norm() <= 2 * (own - exact).norm() + 1e-2 * exact.norm()


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize(("size", "weight"), [(1 / 64, 1e-6), (1.0, 1e-6), (500.0, 1.0)])
def test_fp16_products_neither_vanish_nor_overflow(monkeypatch, heads, size, weight):
    """2 weight / n times an error of 0.005 is no fp16 number any more, and 500 times the width of a row too large a
    one: errors are brought to length 1 for the products."""
    x, (W_enc, b_enc, W_dec, b_dec) = problem(torch.float32)
    W_dec = W_dec * 100 if size > 1 else W_dec  # errors x W_dec beyond 65504
    e = torch.randn_like(x) * size * (0.3 if size <= 1 else 60)
    x = x * size
    given = [x, e, W_enc.half(), b_enc, W_dec.half(), b_dec]
    dead, k_aux = (DEAD, 5) if heads else (listed(0), 3)
    if not heads:
        given = [t[0] for t in given]
    monkeypatch.setattr(auxk, "_operands", lambda weights: torch.float16 if weights.dtype == torch.float16 else None)
    mine = auxk.aux_k_gradients(*given, dead, k_aux, weight)
    exact = auxk.aux_k_gradients(*(t.double() for t in given), dead, k_aux, weight)
    for actual, wanted in ((mine.dW_enc, exact.dW_enc), (mine.dW_dec, exact.dW_dec), (mine.db_enc, exact.db_enc)):
        assert (actual - wanted).norm() <= 3e-3 * wanted.norm()


@pytest.mark.parametrize("heads", [False, True])
def test_nothing_dead_gives_a_loss_that_backward_takes(heads):
    x, parameters = problem(torch.float32)
    dead = torch.empty(H, 0, dtype=torch.int64)
    if not heads:
        x, parameters, dead = x[0], of_head(parameters, 0), dead[0]
    loss = rk.aux_k_loss(x, x, *parameters, dead)
    assert loss.shape == x.shape[:-2]
    loss.sum().backward()
    assert not loss.any()
    with pytest.raises(ValueError, match="fire_counts must have one of the dtypes"):
        rk.DeadLatents(3).update(torch.tensor([1.0, 0.0, torch.nan]), 2)
