"""`python -m benches.projected_adam`: AdamW that stays out of a subspace, on the 448 LoRA matrices of Llama-3-8B.

The matrices and bases of `benches.projection`; a step of each column has the same gradients and starts from the same
weights, moments at the second step:

    AdamW         torch.optim.AdamW, fused=True: no projection, the bytes that any step has to move
    difference    the same between what mode "update" does without rk.ProjectedAdamW: a copy of the weights, then the
                  difference, its projection by ProjectionPlan, and the sum
    ours          rk.ProjectedAdamW

Columns take turns; before each call caches are filled with something else; times are the best call. Before anything is
timed, ours is compared with `difference`. Bytes per parameter, as predictions, beside the bases: 28, 72, and for ours
40 (Triton) or 60 (CPU); see refusal_kernels/training/projected_adam.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

import refusal_kernels as rk

from . import projection
from .projection import Entry

TOLERANCE = 1e-5  # of the largest update, between ours and the projected difference
SCALE = 0.01  # of the weights: rounding of larger ones would be seen beside an update
OPTIONS: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.01}


def columns(entries: list[Entry], backend: str | None) -> tuple[dict[str, Callable[[], Any]], float]:
    """(name -> one step, the largest deviation of ours from the difference after two steps)."""
    generator = torch.Generator(entries[0][0].device).manual_seed(1)
    gradients = [torch.empty_like(w).normal_(generator=generator) for w, _, _ in entries]

    def parameters() -> list[nn.Parameter]:
        made = [nn.Parameter(SCALE * w) for w, _, _ in entries]
        for p, g in zip(made, gradients, strict=True):
            p.grad = g
        return made

    plain, hooked, held = parameters(), parameters(), parameters()
    adamw = torch.optim.AdamW(plain, fused=True, **OPTIONS)
    inner = torch.optim.AdamW(hooked, fused=True, **OPTIONS)
    before: list[Tensor] = [torch.empty_like(p) for p in hooked]
    rest = [(u, dim) for _, u, dim in entries]
    plan = rk.ProjectionPlan([(p, *r) for p, r in zip(hooked, rest, strict=True)], backend=backend)
    ours = rk.ProjectedAdamW(held, [(p, *r) for p, r in zip(held, rest, strict=True)], backend=backend, **OPTIONS)

    @torch.no_grad()
    def difference() -> None:
        torch._foreach_copy_(before, hooked)
        inner.step()
        torch._foreach_sub_(hooked, before)
        plan.apply_()
        torch._foreach_add_(hooked, before)

    names: dict[str, Callable[[], Any]] = {"AdamW": adamw.step, "difference": difference, "ours": ours.step}
    for run in (*names.values(), *names.values()):
        run()
    error = 0.0
    for p, q, (w, _, _) in zip(held, hooked, entries, strict=True):
        error = max(error, ((p - q).abs().max() / (q - SCALE * w).abs().max()).item())
    if not error <= TOLERANCE:
        raise AssertionError(f"ours is off by {error:.2g} of the largest update")
    return names, error


def main(
    ranks: Annotated[str, typer.Option(help="Columns of the bases, separated by spaces.")] = "8 64",
    layers: Annotated[int, typer.Option(min=1, help="Layers of the model.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of every column.")] = 5,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    backend: Annotated[
        str | None, typer.Option(help="Back-end of ours and the plan; default: what auto takes.")
    ] = None,
) -> None:
    """Times a step of each column; prints milliseconds."""
    if not all(rank.isdecimal() and 0 < int(rank) <= projection.KEYS for rank in ranks.split()):
        raise typer.BadParameter(f"ranks are integers from 1 to {projection.KEYS}; got {ranks!r}", param_hint="--ranks")
    for rank in map(int, ranks.split()):
        entries = projection.problem(layers, rank, device)
        names, error = columns(entries, backend)
        times = projection.measure(names, rounds, entries[0][0].device)
        best = "  ".join(f"{name} {1e3 * min(calls):.1f}" for name, calls in times.items())
        where = f"{rk.last_backend('projected_adam')}, {torch.get_num_threads()} threads"
        print(f"r = {rank}: {len(entries)} matrices, {where}, off by {error:.1e}; ms: {best}", flush=True)
        del entries, names


if __name__ == "__main__":
    typer.run(main)
