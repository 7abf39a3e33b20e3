"""ProjectedAdamW: AdamW with the update projected, what it leaves alone, its state, and protection through it."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import refusal_kernels as rk

BACKENDS = ("reference", "cpu")
OPTIONS: dict[str, Any] = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.3}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def basis_of(n: int, r: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, r, generator=generator, dtype=torch.float64))[0].to(dtype)


def problem(dtype: torch.dtype = torch.float32) -> tuple[list[nn.Parameter], list[tuple[Tensor, Tensor, int]]]:
    """Parameters of many shapes and strides, and the bases of all but the last two; two entries share one."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(16, 96), (16, 96), (130, 16), (40, 24), (3, 20, 5), (33,), (7, 9), (11,)]
    parameters = [
        nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes
    ]
    parameters[3].data = parameters[3].data.T.contiguous().T  # held with strides of its own
    shared = basis_of(96, 5, dtype)
    bases: list[Tensor] = [
        shared,
        shared,
        *(basis_of(n, r, dtype, n) for n, r in ((130, 7), (40, 40), (20, 1), (33, 2))),
    ]
    return parameters, list(zip(parameters, bases, (1, -1, 0, 0, 1, 0), strict=False))  # type: ignore[arg-type]


def give_gradients(parameters: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def twin(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    return [copy.deepcopy(p) for p in parameters]


def difference_step(optimizer: Any, held: list[tuple[Tensor, Tensor, int]], strength: float) -> None:
    """AdamW, then p_old + (I - s U U^T) (p_new - p_old)."""
    before = [p.detach().clone() for p, _, _ in held]
    optimizer.step()
    with torch.no_grad():
        for (p, basis, dim), old in zip(held, before, strict=True):
            p.copy_(old + rk.project_out(p - old, basis, dim, strength, backend="reference"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_is_adamw_and_a_projection_of_the_difference(backend: str, strength: float, dtype: torch.dtype) -> None:
    parameters, bases = problem(dtype)
    before = twin(parameters)
    exact = [nn.Parameter(p.detach().double().clone()) for p in parameters]
    plain = twin(parameters)
    optimizer = rk.ProjectedAdamW(parameters, bases, strength=strength, backend=backend, **OPTIONS)
    reference, torchs = torch.optim.AdamW(exact, **OPTIONS), torch.optim.AdamW(plain, **OPTIONS)
    held = [(e, u.double(), dim) for e, (_, u, dim) in zip(exact, bases, strict=False)]
    for seed in range(6):
        give_gradients(parameters, seed)
        for p, e, q in zip(parameters, exact, plain, strict=True):
            assert p.grad is not None
            e.grad, q.grad = p.grad.double(), p.grad.clone()
        optimizer.step()
        difference_step(reference, held, strength)
        torchs.step()
    assert rk.last_backend("projected_adam") == backend
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    for p, e, old in zip(parameters, exact, before, strict=True):
        assert strength == 1 or (p - old).abs().max() > 1e-3  # it moved
        assert (p.double() - e).abs().max() < tolerance * e.abs().max()
    for p, q in zip(parameters[-2:], plain[-2:], strict=True):
        assert torch.equal(p, q)  # not held: torch's own step
    if strength == 0:
        for p, q in zip(parameters, plain, strict=True):
            assert (p - q).abs().max() < tolerance * q.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_update_stays_out_of_the_subspace(backend: str) -> None:
    parameters, bases = problem()
    start = [p.detach().double() for p in parameters]
    optimizer = rk.ProjectedAdamW(parameters, bases, backend=backend, **{**OPTIONS, "lr": 0.01})
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=200, cycle_momentum=False)
    plain = twin(parameters)
    torchs = torch.optim.AdamW(plain, **OPTIONS)
    for seed in range(200):
        give_gradients(parameters, seed)
        for p, q in zip(parameters, plain, strict=True):
            q.grad = p.grad
        optimizer.step()
        schedule.step()
        torchs.step()
    for i, (_, basis, dim) in enumerate(bases):

        def share(p: Tensor, i: int = i, basis: Tensor = basis, dim: int = dim) -> float:
            moved = (p.detach().double() - start[i]).movedim(dim, -1)
            return float((moved @ basis.double()).norm() / moved.norm())

        if basis.shape[1] < basis.shape[0]:
            assert share(parameters[i]) < 1e-6
        else:  # nothing is left to move in
            assert (parameters[i] - start[i]).abs().max() < 1e-6
        assert share(plain[i]) > 1e-2


def test_groups_have_their_own_numbers_and_a_parameter_without_gradient_is_left_alone() -> None:
    """Counts of steps differ as well, once a parameter has missed one."""
    parameters, bases = problem(torch.float64)
    others = twin(parameters)

    def groups(of: list[nn.Parameter]) -> list[dict[str, Any]]:
        return [
            {"params": of[:2] + of[6:7], "lr": 0.05, "weight_decay": 0.0},
            {"params": of[2:6] + of[7:], "eps": 1e-3},
        ]

    optimizer = rk.ProjectedAdamW(groups(parameters), bases)
    reference = torch.optim.AdamW(groups(others))
    held = [(q, u, dim) for q, (_, u, dim) in zip(others, bases, strict=False)]
    for seed in range(4):
        give_gradients(parameters, seed)
        if seed == 1:
            parameters[1].grad = parameters[4].grad = parameters[7].grad = None
        for p, q in zip(parameters, others, strict=True):
            q.grad = p.grad
        kept = [p.detach().clone() for p in parameters]
        optimizer.step()
        difference_step(reference, held, 1.0)
        if seed == 1:
            assert all(torch.equal(parameters[i], kept[i]) for i in (1, 4, 7))
    for p, q in zip(parameters, others, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)
    assert [float(optimizer.state[p]["step"]) for p in (parameters[0], parameters[1])] == [4, 3]


def test_a_state_that_is_changed_between_steps_is_seen() -> None:
    """What was looked up of the parameters at one step does not outlive a change before the next."""
    parameters, bases = problem(torch.float64)
    others = twin(parameters)
    optimizer, reference = rk.ProjectedAdamW(parameters, bases), torch.optim.AdamW(others)
    held = [(q, u, dim) for q, (_, u, dim) in zip(others, bases, strict=False)]

    def change(number: int, of: torch.optim.Optimizer, some: list[nn.Parameter]) -> None:
        if number == 1:
            of.state[some[0]]["exp_avg"] = torch.full_like(some[0], 0.5)
        if number == 2:
            of.state[some[1]]["step"].fill_(9)
        if number == 3:
            of.state[some[2]] = {}
        if number == 4:
            of.state.pop(some[3])
        if number == 5:
            of.state[some[4]]["step"] = torch.tensor(1.0)
        if number == 6:
            of.param_groups[0]["params"] = some[::-1]
        if number == 7:
            of.state[some[5]].clear()

    for number in range(9):
        for some, stepped in ((parameters, optimizer), (others, reference)):
            change(number, stepped, some)
            give_gradients(some, number)
        optimizer.step()
        difference_step(reference, held, 1.0)
        for p, q in zip(parameters, others, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)
            assert optimizer.state[p]["step"] == reference.state[q]["step"]


def test_counts_that_are_given_away_stand_still() -> None:
    parameters, bases = problem()
    optimizer = rk.ProjectedAdamW(parameters, bases)
    again = rk.ProjectedAdamW(others := twin(parameters), [(q, *b[1:]) for q, b in zip(others, bases, strict=False)])
    for some in (parameters, others):
        give_gradients(some, 0)
    optimizer.step()
    kept = optimizer.state_dict()
    again.load_state_dict(optimizer.state_dict())
    optimizer.step()
    assert {float(state["step"]) for state in kept["state"].values()} == {1.0}
    assert {float(again.state[q]["step"]) for q in others} == {1.0}
    again.step()
    assert (
        {float(again.state[q]["step"]) for q in others}
        == {2.0}
        == {float(optimizer.state[p]["step"]) for p in parameters}
    )


@pytest.mark.parametrize("way", ["state_dict", "pickle"])
def test_a_resumed_run_repeats_an_uninterrupted_one(way: str) -> None:
    parameters, bases = problem()
    optimizer = rk.ProjectedAdamW(parameters, bases, **OPTIONS)
    for seed in range(3):
        give_gradients(parameters, seed)
        optimizer.step()
    if way == "pickle":
        again, others = pickle.loads(pickle.dumps((optimizer, parameters)))
    else:
        buffer = io.BytesIO()
        torch.save(optimizer.state_dict(), buffer)
        buffer.seek(0)
        others = twin(parameters)
        again = rk.ProjectedAdamW(others, [(q, u, dim) for q, (_, u, dim) in zip(others, bases, strict=False)])
        again.load_state_dict(torch.load(buffer, weights_only=True))
    for seed in range(3, 6):
        for some, stepped in ((parameters, optimizer), (others, again)):
            give_gradients(some, seed)
            stepped.step()
    assert all(torch.equal(p, q) for p, q in zip(parameters, others, strict=True))
    assert again.held(others[2])[1] == 0
    assert torch.equal(again.held(others[2])[0], bases[2][1])


def test_state_goes_to_and_from_torchs_adamw_and_its_options_are_not_offered() -> None:
    parameters, bases = problem(torch.float64)
    others = twin(parameters)
    optimizer, torchs = rk.ProjectedAdamW(parameters, bases, strength=0.0), torch.optim.AdamW(others)
    for seed in range(2):
        for some, stepped in ((parameters, optimizer), (others, torchs)):
            give_gradients(some, seed)
            stepped.step()
    ours, theirs = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(torchs.state_dict())
    optimizer.load_state_dict(theirs)
    torchs.load_state_dict(ours)
    for some, stepped in ((parameters, optimizer), (others, torchs)):
        give_gradients(some, 2)
        stepped.step()
    for p, q in zip(parameters, others, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)
    theirs["param_groups"][0]["amsgrad"] = True
    with pytest.raises(ValueError, match="amsgrad is not offered"):
        optimizer.load_state_dict(theirs)
    with pytest.raises(ValueError, match="maximize is not offered"):
        rk.ProjectedAdamW([{"params": parameters, "maximize": True}], [])


def test_gradscaler_steps_it_and_skips_what_is_not_finite() -> None:
    parameters, bases = problem()
    others = twin(parameters)
    optimizer = rk.ProjectedAdamW(parameters, bases, **OPTIONS)
    unscaled = rk.ProjectedAdamW(others, [(q, u, d) for q, (_, u, d) in zip(others, bases, strict=False)], **OPTIONS)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for seed in range(3):
        give_gradients(others, seed)
        scaler.scale(torch.zeros(()))
        for p, q in zip(parameters, others, strict=True):
            assert q.grad is not None
            p.grad = q.grad * scaler.get_scale()
        if seed == 1:
            assert parameters[0].grad is not None
            parameters[0].grad[0, 0] = torch.inf
        else:
            unscaled.step()
        scaler.step(optimizer)
        scaler.update()
    for p, q in zip(parameters, others, strict=True):
        assert torch.equal(p, q)


def test_replaced_storage_and_a_changed_basis() -> None:
    """The copies of the bases stand; a parameter's `.data` may move."""
    parameters, bases = problem()
    others = twin(parameters)
    optimizer = rk.ProjectedAdamW(parameters, bases, **OPTIONS)
    again = rk.ProjectedAdamW(
        others, [(q, u.clone(), d) for q, (_, u, d) in zip(others, bases, strict=False)], **OPTIONS
    )
    for seed in range(3):
        for some, stepped in ((parameters, optimizer), (others, again)):
            give_gradients(some, seed)
            stepped.step()
        for p in parameters:
            p.data = p.data.clone()
        bases[2][1].zero_()
    assert all(torch.equal(p, q) for p, q in zip(parameters, others, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_basis_without_columns_and_an_empty_parameter_hold_nothing(backend: str) -> None:
    parameters = [nn.Parameter(torch.ones(6, 4)), nn.Parameter(torch.ones(6, 0)), nn.Parameter(torch.ones(6, 4))]
    bases = [(parameters[0], torch.empty(6, 0), 0), (parameters[1], basis_of(6, 2), 0)]
    optimizer = rk.ProjectedAdamW(parameters, bases, backend=backend)
    give_gradients(parameters, 0)
    parameters[2].grad = parameters[0].grad
    optimizer.step()
    assert optimizer.held(parameters[0]) is optimizer.held(parameters[1]) is None
    assert torch.equal(parameters[0], parameters[2])


def test_the_step_counts_as_a_change_and_takes_a_closure() -> None:
    parameter = nn.Parameter(torch.ones(6, 4))
    optimizer = rk.ProjectedAdamW([parameter], [(parameter, basis_of(6, 2), 0)], lr=0.1)
    held = (parameter * parameter).sum()
    version = parameter._version

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = parameter.sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 24
    assert parameter._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        held.backward()


P = nn.Parameter(torch.ones(6, 4))
U = torch.eye(6)[:, :2].contiguous()


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"bases": P}, TypeError, "bases must be a sequence of"),
        ({"bases": [(P, U)]}, TypeError, r"bases\[0\] must be \(parameter, basis, dim\)"),
        ({"bases": [(nn.Parameter(torch.ones(6, 4)), U, 0)]}, ValueError, r"bases\[0\] must name one of params"),
        ({"bases": [(P, U, 0), (P, U, 0)]}, ValueError, r"bases\[1\] must name a parameter of its own"),
        ({"bases": [(P, U, 1)]}, ValueError, r"bases\[0\] basis must be a matrix"),
        ({"bases": [(P, U, 2)]}, ValueError, r"bases\[0\] dim must be in"),
        ({"bases": [(P, 2 * U, 0)]}, ValueError, r"bases\[0\] basis must have orthonormal columns"),
        ({"strength": 1.5}, ValueError, "strength must be a number in"),
        ({"lr": -1.0}, ValueError, "lr must be"),
        ({"eps": -1.0}, ValueError, "eps must be"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay must be"),
        ({"betas": (0.9, 1.0)}, ValueError, "betas must be"),
        ({"backend": "cub"}, ValueError, "backend must be one of"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=f"(ProjectedAdamW: )?{words}"):
        rk.ProjectedAdamW([P], **{"bases": [(P, U, 0)], **changes})


def test_16_bits_sparse_gradients_and_a_backend_that_cannot_run_are_refused() -> None:
    half = nn.Parameter(torch.ones(6, 4, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="must be fp32 or fp64"):
        rk.ProjectedAdamW([half], [(half, U, 0)])
    parameter = nn.Parameter(torch.ones(6, 4))
    optimizer = rk.ProjectedAdamW([parameter], [(parameter, U, 0)], backend="cuda")
    parameter.grad = torch.ones(6, 4)
    with pytest.raises(rk.BackendError, match="projected_adam"):
        optimizer.step()
    parameter.grad = torch.ones(6, 4).to_sparse()
    with pytest.raises(ValueError, match="gradients must be dense"):
        optimizer.step()
    assert torch.equal(parameter, torch.ones(6, 4))
    assert not optimizer.state
