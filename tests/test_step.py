"""sae_step, AuxK, SAEAdam and DeadLatents: equal to the plain PyTorch route they stand for, on each back-end."""

from __future__ import annotations

import copy

import pytest
import torch

import refusal_kernels as rk

BACKENDS = ("reference", "cpu")
N, D_IN, F, K = 70, 24, 90, 5
SHAPES = ((F, D_IN), (F,), (F, D_IN), (D_IN,))


@pytest.fixture(autouse=True)
def _seed_and_poison():
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def parameters(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    W_enc, b_enc, W_dec, b_dec = (torch.randn(s, dtype=dtype) for s in SHAPES)
    return [t.requires_grad_() for t in (W_enc, b_enc / 10, W_dec / W_dec.norm(dim=1, keepdim=True), b_dec)]


def twins(dtype: torch.dtype = torch.float64) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    first = parameters(dtype)
    return first, [p.detach().clone().requires_grad_() for p in first]


def plain_loss(x, parameters, k, dead=None, k_aux=None, aux_alpha=1 / 32, backend="reference"):
    """The autograd route: public operators, public AuxK loss."""
    W_enc, b_enc, W_dec, b_dec = parameters
    x = x.reshape(-1, x.shape[-1])
    values, indices = rk.topk_encode(x, W_enc, b_enc, k, b_dec, backend=backend)
    x_hat = rk.sparse_decode(values, indices, W_dec, b_dec, backend=backend)
    loss = (x_hat - x).square().sum() / x.shape[0]
    if dead is not None:
        loss = loss + aux_alpha * rk.aux_k_loss(x, x - x_hat, W_enc, b_enc, W_dec, b_dec, dead, k_aux)
    return loss


def plain_adam(parameters, steps, x, lr, max_grad_norm=None, dead=None):
    """The optimiser of the docstring, word for word."""
    adam = torch.optim.Adam(parameters, lr)
    W_dec = parameters[2]
    for _ in range(steps):
        adam.zero_grad()
        plain_loss(x, parameters, K, dead).backward()
        W_dec.grad -= (W_dec.grad * W_dec).sum(1, keepdim=True) / W_dec.square().sum(1, keepdim=True) * W_dec
        if max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
        adam.step()
        W_dec.data /= W_dec.data.norm(dim=1, keepdim=True)
    return adam


DEAD = torch.tensor([3, 4, 40, 71, 88])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k_aux", [2, 5, 300, None])
@pytest.mark.parametrize("dead", [None, DEAD, DEAD[:0]])
def test_gradients_equal_the_autograd_route(backend, k_aux, dead):
    x = torch.randn(2, N // 2, D_IN, dtype=torch.float64)
    mine, plain = twins()
    for _ in range(2):  # twice: gradients accumulate
        out = rk.sae_step(x, *mine, K, dead=dead, k_aux=k_aux, grad_scale=0.5, backend=backend)
        loss = plain_loss(x, plain, K, dead, k_aux)
        (0.5 * loss).backward()
    assert rk.last_backend("sae_step") == backend
    torch.testing.assert_close(out.loss, loss.detach())
    for a, b in zip(mine, plain, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_metrics(backend):
    x = torch.randn(N, D_IN, dtype=torch.float64)
    params = parameters()
    out = rk.sae_step(x, *params, K, backend=backend)
    _W_enc, _b_enc, W_dec, b_dec = (p.detach() for p in params)
    codes = torch.zeros(N, F, dtype=torch.float64).scatter(1, out.indices, out.values)
    e = codes @ W_dec + b_dec - x
    torch.testing.assert_close(out.mse, e.square().sum() / N)
    torch.testing.assert_close(out.fvu, e.square().sum() / (x - x.mean(0)).square().sum())
    torch.testing.assert_close(out.l0, (codes > 0).sum().float() / N)
    assert torch.equal(out.fire_counts, (codes > 0).sum(0))
    assert out.aux_loss == 0
    assert out.loss == out.mse
    assert not any(t.requires_grad for t in out)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dead", [None, DEAD])
@pytest.mark.parametrize("max_grad_norm", [None, 0.05, 1e9])
def test_step_with_optimizer_equals_plain_adam(backend, dead, max_grad_norm):
    x = torch.randn(N, D_IN, dtype=torch.float64)
    mine, plain = twins()
    optimizer = rk.SAEAdam(*mine, lr=0.03, max_grad_norm=max_grad_norm)
    for _ in range(4):
        rk.sae_step(x, *mine, K, dead=dead, optimizer=optimizer, backend=backend)
    adam = plain_adam(plain, 4, x, 0.03, max_grad_norm, dead)
    for a, b in zip(mine, plain, strict=True):
        assert a.grad is None
        torch.testing.assert_close(a, b)
        for moment in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(optimizer.state[a][moment], adam.state[b][moment])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("max_grad_norm", [None, 0.05])
def test_optimizer_on_its_own_equals_plain_adam(backend, max_grad_norm):
    x = torch.randn(N, D_IN, dtype=torch.float64)
    mine, plain = twins()
    optimizer = rk.SAEAdam(*mine, lr=0.03, max_grad_norm=max_grad_norm, backend=backend)
    for _ in range(3):
        optimizer.zero_grad()
        plain_loss(x, mine, K).backward()
        optimizer.step()
    assert rk.last_backend("sae_adam") == backend
    plain_adam(plain, 3, x, 0.03, max_grad_norm)
    for a, b in zip(mine, plain, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_fp32_step_stays_close_to_fp64(backend):
    x = torch.randn(400, D_IN)
    mine = parameters(torch.float32)
    exact = [p.detach().double().requires_grad_() for p in mine]
    out = rk.sae_step(x, *mine, K, dead=DEAD, backend=backend)
    want = rk.sae_step(x.double(), *exact, K, dead=DEAD, backend="reference")
    assert torch.equal(out.indices, want.indices)
    for a, b in zip(mine, exact, strict=True):
        assert (a.grad - b.grad).abs().max() <= 1e-5 * b.grad.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_step_is_deterministic_and_continues_from_a_checkpoint(backend):
    x = torch.randn(N, D_IN)

    def fresh():
        torch.manual_seed(5)
        params = parameters(torch.float32)
        return params, rk.SAEAdam(*params, lr=0.01)

    whole, optimizer = fresh()
    for _ in range(6):
        rk.sae_step(x, *whole, K, dead=DEAD, optimizer=optimizer, backend=backend)
    first, optimizer = fresh()
    for _ in range(3):
        rk.sae_step(x, *first, K, dead=DEAD, optimizer=optimizer, backend=backend)
    saved = copy.deepcopy(optimizer.state_dict())
    second = [p.detach().clone().requires_grad_() for p in first]
    optimizer = rk.SAEAdam(*second, lr=0.5)
    optimizer.load_state_dict(saved)
    for _ in range(3):
        rk.sae_step(x, *second, K, dead=DEAD, optimizer=optimizer, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(whole, second, strict=True))


def test_state_is_interchangeable_with_torch_adam():
    x = torch.randn(N, D_IN, dtype=torch.float64)
    mine, plain = twins()
    adam = torch.optim.Adam(plain, 0.03)
    plain_loss(x, plain, K).backward()
    adam.step()
    for a, b in zip(mine, plain, strict=True):
        a.data.copy_(b.data)
    optimizer = rk.SAEAdam(*mine, lr=0.03, unit_norm_decoder=False, remove_parallel_grad=False)
    optimizer.load_state_dict(copy.deepcopy(adam.state_dict()))
    rk.sae_step(x, *mine, K, optimizer=optimizer)
    adam.zero_grad()
    plain_loss(x, plain, K).backward()
    adam.step()
    for a, b in zip(mine, plain, strict=True):
        torch.testing.assert_close(a, b)
    torch.optim.Adam(plain, 0.03).load_state_dict(optimizer.state_dict())


def test_learning_rate_schedulers_work(recwarn):
    params = parameters(torch.float32)
    optimizer = rk.SAEAdam(*params, lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.0 if t else 1.0)
    rk.sae_step(torch.randn(N, D_IN), *params, K, optimizer=optimizer)
    scheduler.step()
    before = [p.detach().clone() for p in params]
    rk.sae_step(torch.randn(N, D_IN), *params, K, optimizer=optimizer)
    torch.testing.assert_close(params, before)  # lr 0: unit rows are only renormalised, to rounding
    assert not [w for w in recwarn if "lr_scheduler" in str(w.message)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_auxk_trains_the_encoder_of_dead_latents(backend):
    params = parameters(torch.float32)
    with torch.no_grad():
        params[1][DEAD] = -1.0  # they lose the main selection, and still come alive within the dead set
    x = torch.randn(N, D_IN)
    values, indices = rk.topk_encode(x, params[0].detach(), params[1].detach(), K, params[3].detach())
    idle = DEAD[~torch.isin(DEAD, indices[values > 0])]
    assert idle.numel() > 0
    rk.sae_step(x, *params, K, backend=backend)
    assert not params[0].grad[idle].any()
    assert not params[2].grad[idle].any()
    rk.sae_step(x, *params, K, dead=DEAD, backend=backend)
    for i in (0, 1, 2):
        assert params[i].grad[idle].abs().sum() > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_decoder_rows_keep_unit_norm_and_zero_rows_survive(backend):
    params = parameters(torch.float32)
    with torch.no_grad():
        params[2][7] = 0
        params[1][7] = -1e6
    optimizer = rk.SAEAdam(*params, lr=0.1)
    for _ in range(3):
        rk.sae_step(torch.randn(N, D_IN), *params, K, optimizer=optimizer, backend=backend)
    norms = params[2].detach().norm(dim=1)
    assert norms[7] == 0
    torch.testing.assert_close(norms[torch.arange(F) != 7], torch.ones(F - 1))


def test_frozen_parameters_and_low_precision_inputs():
    params = parameters(torch.float32)
    params[3].requires_grad_(False)
    rk.sae_step(torch.randn(N, D_IN).bfloat16(), *params, K)
    assert params[3].grad is None
    assert params[0].grad.dtype == torch.float32
    for dtype in (torch.bfloat16, torch.float16):
        params = parameters(torch.float32)
        with torch.autocast("cpu", dtype=dtype):
            out = rk.sae_step(torch.randn(N, D_IN), *params, K, dead=DEAD)
        assert out.values.dtype == dtype
        assert params[0].grad.dtype == torch.float32
        optimizer = rk.SAEAdam(*params, lr=0.01)
        before = params[0].detach().clone()
        with torch.autocast("cpu", dtype=dtype):
            rk.sae_step(torch.randn(N, D_IN), *params, K, optimizer=optimizer)
        assert not torch.equal(before, params[0])


def masked_adam_step(adam, parameters, max_grad_norm) -> None:
    """The optimiser of SAEAdam's docstring where some parameters have no gradient, which torch.optim leaves alone."""
    W_dec = parameters[2]
    if W_dec.grad is not None:
        W_dec.grad -= (W_dec.grad * W_dec).sum(1, keepdim=True) / W_dec.square().sum(1, keepdim=True) * W_dec
    if max_grad_norm is not None:
        torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    adam.step()
    if W_dec.grad is not None:
        W_dec.data /= W_dec.data.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("max_grad_norm", [None, 0.05])
@pytest.mark.parametrize("frozen", [(0,), (2,), (0, 1), (3,), (1, 2, 3)])
def test_frozen_parameters_do_not_move(backend, max_grad_norm, frozen):
    """Free, frozen, free again: their moments and step counts stand still meanwhile, as in torch.optim.Adam."""
    x = torch.randn(N, D_IN, dtype=torch.float64)
    inside, plain = twins()
    outside = [p.detach().clone().requires_grad_() for p in plain]
    fused = rk.SAEAdam(*inside, lr=0.03, max_grad_norm=max_grad_norm, backend=backend)
    alone = rk.SAEAdam(*outside, lr=0.03, max_grad_norm=max_grad_norm, backend=backend)
    adam = torch.optim.Adam(plain, 0.03)
    for free in (True, False, False, True):
        for parameters_ in (inside, outside, plain):
            for i in frozen:
                parameters_[i].requires_grad_(free)
        before = [p.detach().clone() for p in inside]
        rk.sae_step(x, *inside, K, dead=DEAD, optimizer=fused, backend=backend)
        for optimizer, others in ((alone, outside), (adam, plain)):
            optimizer.zero_grad()
            plain_loss(x, others, K, DEAD, backend=backend).backward()
        alone.step()
        masked_adam_step(adam, plain, max_grad_norm)
        for i, (a, b, c) in enumerate(zip(inside, outside, plain, strict=True)):
            torch.testing.assert_close(a, c)
            torch.testing.assert_close(b, c)
            assert torch.equal(a, before[i]) == (i in frozen and not free)
            assert fused.state[a]["step"] == alone.state[b]["step"] == adam.state[c]["step"]


def test_errors_name_what_is_wrong():
    params = parameters(torch.float32)
    x = torch.randn(N, D_IN)
    optimizer = rk.SAEAdam(*params)
    cases = [
        ({"k": F + 1}, "k must be at most"),
        ({"x": torch.randn(0, D_IN)}, "x must hold at least one token"),
        ({"x": torch.ones(2, D_IN, dtype=torch.int32)}, "x must have one of the dtypes"),
        ({"W_dec": torch.randn(F + 1, D_IN)}, r"W_dec must have shape \[F, d\]"),
        ({"W_dec": params[2] * 2}, "W_dec must be a leaf tensor"),
        ({"W_dec": params[2].detach().double()}, "W_dec must have the dtype of W_enc"),
        ({"dead": torch.tensor([1.0])}, "dead must have one of the dtypes int64"),
        ({"dead": torch.tensor([F])}, "dead must hold latents in"),
        ({"dead": torch.tensor([[1]])}, r"dead must be a vector \[D\]"),
        ({"k_aux": 0}, "k_aux must be at least 1"),
        ({"W_dec": params[0]}, "W_enc and W_dec must not share memory"),
        ({"aux_alpha": "a"}, "aux_alpha must be a finite number of at least 0; got str 'a'"),
        ({"aux_alpha": -1}, "aux_alpha must be a finite number of at least 0; got -1"),
        ({"aux_alpha": float("nan")}, "aux_alpha must be a finite number of at least 0; got nan"),
        ({"grad_scale": "a"}, "grad_scale must be a finite number; got str 'a'"),
        ({"grad_scale": float("inf")}, "grad_scale must be a finite number; got inf"),
        ({"backend": ["cpu"]}, r"backend must be one of reference, .*; got \['cpu'\]"),
        ({"optimizer": torch.optim.Adam(params)}, "optimizer must be a refusal_kernels.SAEAdam or None; got Adam"),
        ({"optimizer": rk.SAEAdam(*parameters(torch.float32))}, "optimizer must hold exactly the tensors"),
    ]
    for change, message in cases:
        arguments = {
            "x": x,
            "W_enc": params[0],
            "b_enc": params[1],
            "W_dec": params[2],
            "b_dec": params[3],
            "k": K,
            "optimizer": optimizer,
        }
        with pytest.raises((ValueError, TypeError), match=message):
            rk.sae_step(**{**arguments, **change})
    with pytest.raises(ValueError, match="at least one of W_enc, b_enc, W_dec, b_dec must require a gradient"):
        rk.sae_step(x, *(p.detach() for p in params), K)
    with pytest.raises(TypeError, match=r"aux_k_loss: b_dec must be a torch\.Tensor; got NoneType"):
        rk.aux_k_loss(x, x, *params[:3], None, DEAD)


def test_dead_latents_counts_tokens_and_refreshes():
    tracker = rk.DeadLatents(4, dead_after_tokens=20, refresh_every=2)
    fires = torch.tensor([1, 0, 0, 3])
    tracker.update(fires, 10)
    assert tracker.tokens_since_fired.tolist() == [0, 10, 10, 0]
    assert tracker.rows.numel() == 0
    tracker.update(fires, 10)
    assert tracker.rows.tolist() == [1, 2]
    assert tracker.fraction == 0.5
    tracker.update(torch.tensor([0, 5, 0, 0]), 10)
    assert tracker.rows.tolist() == [1, 2]  # rebuilt every second update only
    other = rk.DeadLatents(4, dead_after_tokens=20, refresh_every=2)
    other.load_state_dict(tracker.state_dict())
    for t in (tracker, other):
        t.update(torch.tensor([0, 0, 0, 0]), 10)
        assert t.rows.tolist() == [0, 2, 3]
    with pytest.raises(ValueError, match="fire_counts must have shape"):
        tracker.update(torch.zeros(5, dtype=torch.int64), 1)
    with pytest.raises(ValueError, match="tokens_since_fired must have shape"):
        rk.DeadLatents(5).load_state_dict(tracker.state_dict())
    with pytest.raises(ValueError, match="refresh_every must be an integer of at least 1; got 0"):
        rk.DeadLatents(5, refresh_every=0)
    with pytest.raises(TypeError, match="fire_counts must be a tensor"):
        tracker.update([1, 0, 0, 3], 10)
    for n_tokens in (-1, 2.5, "a"):
        with pytest.raises(ValueError, match="n_tokens must be an integer of at least 0"):
            tracker.update(fires, n_tokens)
    for state in ({}, [], {"tokens_since_fired": 3}):
        with pytest.raises(ValueError, match="state must hold tokens_since_fired, rows, updates"):
            tracker.load_state_dict(state)
    with pytest.raises(TypeError, match=r"rows must be a torch\.Tensor; got list"):
        tracker.load_state_dict({**other.state_dict(), "rows": [1]})
    assert tracker.tokens_since_fired.tolist() == other.tokens_since_fired.tolist()


def test_dead_counters_example():
    # [0, 1, 2, 3] fire at updates {1,2}, {3}, never, {1,2}: after the fourth update 20, 10, 40 and 20 tokens have
    # passed.
    tracker = rk.DeadLatents(4, dead_after_tokens=20, refresh_every=4)
    for fires in ([1, 0, 0, 1], [1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0]):
        tracker.update(torch.tensor(fires), 10)
    assert tracker.tokens_since_fired.tolist() == [20, 10, 40, 20]
    assert tracker.rows.tolist() == [0, 2, 3]
