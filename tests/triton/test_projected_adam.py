"""ProjectedAdamW on Triton's kernels, in the interpreter: both sides, slabs, ranks, and what the fused ones leave."""

import pytest
import torch
from torch import nn

import refusal_kernels as rk
from refusal_kernels.triton_kernels import projected_adam, projection

OPTIONS = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.3}
# (side of the projection, n, fibres): slabs that are full, part of one, and several blocks of fibres.
LORA = [(0, 1088, 16), (1, 64, 16), (1, 1152, 32), (0, 192, 48)]


def problem(ranks):
    """Parameters and bases of LORA, a basis of each rank in turn."""
    torch.manual_seed(0)
    parameters, bases = [], []
    for i, (dim, n, fibres) in enumerate(LORA):
        parameters.append(nn.Parameter(torch.randn((n, fibres) if dim == 0 else (fibres, n))))
        bases.append((torch.linalg.qr(torch.randn(n, ranks[i % len(ranks)]))[0].contiguous(), dim))
    return parameters, bases


def stepped(parameters, bases, backend, dtype=torch.float32, steps=2, strength=0.7, aligned=True):
    """Copies of the parameters after some steps, and the optimizer."""
    moved = [nn.Parameter(p.detach().to(dtype, copy=True)) for p in parameters]
    held = [(p, u.to(dtype), dim) for p, (u, dim) in zip(moved, bases, strict=True)]
    optimizer = rk.ProjectedAdamW(moved, held, strength=strength, backend=backend, **OPTIONS)
    for seed in range(steps):
        torch.manual_seed(seed)
        for p in moved:
            g = torch.randn(p.shape).to(dtype)
            p.grad = g if aligned else torch.cat([g.new_zeros(1), g.flatten()])[1:].view(p.shape)
        optimizer.step()
    assert rk.last_backend("projected_adam") == backend
    return moved, optimizer


def compare(parameters, bases, moved):
    exact, own = (stepped(parameters, bases, "reference", dtype)[0] for dtype in (torch.float64, torch.float32))
    for p, old, e, o in zip(moved, parameters, exact, own, strict=True):
        ours, torchs = ((q.double() - e).abs() for q in (p, o))
        assert ours.max() <= 2 * torchs.max() + 1e-6
        assert ours.mean() <= 2 * torchs.mean() + 1e-8
        assert (p - old).abs().max() > 1e-2


@pytest.mark.parametrize("rank", [16, 60])
def test_two_launches_are_adamw_and_the_projection_of_its_update(monkeypatch, rank):
    monkeypatch.setattr(projection, "prepare_projection", None)  # the composed form is not used
    parameters, bases = problem([rank])
    moved, optimizer = stepped(parameters, bases, "triton")
    compare(parameters, bases, moved)
    again, other = stepped(parameters, bases, "triton", aligned=False)
    for p, q in zip(moved, again, strict=True):
        assert torch.equal(p, q)
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.state[p][name], other.state[q][name])


def test_each_rank_has_its_launches_and_the_update_stays_out(monkeypatch):
    prepared = []

    def prepare(*arguments, of=projected_adam.prepare):
        prepared.append(len(arguments[0]))
        return of(*arguments)

    monkeypatch.setattr(projected_adam, "prepare", prepare)
    parameters, bases = problem([3, 16])
    moved, _ = stepped(parameters, bases, "triton", strength=1.0, steps=3)
    assert prepared == [2, 2]  # once each for all steps
    for p, old, (u, dim) in zip(moved, parameters, bases, strict=True):
        update = (p.double() - old.double()).movedim(dim, -1)
        assert (update @ u.double()).norm() < 1e-6 * update.norm()


def test_a_step_asks_no_tensor_operation_of_each_parameter():
    """448 small matrices are a matter of the host's time: a step's operations do not grow in number with them."""

    class Counting(torch.utils._python_dispatch.TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.calls += 1
            return func(*args, **(kwargs or {}))

    def operations(copies):
        parameters, bases = problem([16])
        parameters = [nn.Parameter(p.detach().clone()) for p in parameters * copies]
        optimizer = rk.ProjectedAdamW(
            parameters, [(p, *b) for p, b in zip(parameters, bases * copies, strict=True)], backend="triton"
        )
        for p in parameters:
            p.grad = torch.ones_like(p)
        optimizer.step()
        launches = []
        optimizer._groups[0].batches[0].run = lambda *arguments: launches.append(arguments)
        with Counting() as counting:
            optimizer.step()
        assert len(launches) == 1
        return counting.calls

    assert operations(1) == operations(5) <= 12


def test_what_the_fused_kernels_do_not_take_goes_by_the_primitives(monkeypatch):
    monkeypatch.setattr(projected_adam, "prepare", None)
    torch.manual_seed(1)
    parameters = [nn.Parameter(torch.randn(*shape)) for shape in ((60, 16), (64, 7), (33,), (5, 64, 2))]
    parameters.append(nn.Parameter(torch.randn(16, 64).T))  # strides
    bases = [
        (torch.linalg.qr(torch.randn(n, 3))[0].contiguous(), dim) for n, dim in ((60, 0), (64, 0), (33, 0), (64, 1))
    ]
    bases.append((bases[1][0], 0))
    moved, _ = stepped(parameters, bases, "triton")
    compare(parameters, bases, moved)
