"""`python -m benches.host`: what the host does in a call whose device time is small, on the 448 LoRA matrices.

ProjectionPlan.apply_ and the step of ProjectedAdamW on Triton's back-end, with every launch left out, so that what is
timed is Python and PyTorch alone and needs no GPU. Beside them the step of torch.optim.AdamW, fused, on the same
parameters, which computes as well: its matrices are 1/16 as long as Llama-3-8B's, so that it has little to compute.
On a GPU a call takes this and the launches before the device begins; where the device has other work meanwhile, it
costs nothing (benches.gpu.projection has both).
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from torch import nn

import refusal_kernels as rk
from refusal_kernels.backends import BACKENDS
from refusal_kernels.ops import projection_plan
from refusal_kernels.training import projected_adam as training
from refusal_kernels.triton_kernels import lora_projection, projected_adam

from . import projection

SHORTER = 16


class NoLaunch:
    """In a kernel's place: takes its grid and arguments and does nothing."""

    def __getitem__(self, grid: Any) -> NoLaunch:
        return self

    def __call__(self, *arguments: Any, **options: Any) -> None:
        pass


@contextlib.contextmanager
def without_launches() -> Iterator[None]:
    """Triton's back-end for CPU tensors, whose projection's kernels are not launched."""
    triton = BACKENDS["triton"]
    with contextlib.ExitStack() as stack:
        for module in (lora_projection, projected_adam):
            for name in [name for name in vars(module) if name.endswith("_kernel")]:
                stack.enter_context(mock.patch.object(module, name, NoLaunch()))
        stack.enter_context(mock.patch.object(projection_plan, "pick_projection", return_value=triton))
        stack.enter_context(mock.patch.object(training, "select", return_value=triton))
        yield


def calls(rank: int) -> dict[str, Callable[[], Any]]:
    """name -> one call."""
    shorter = {name: (i // SHORTER, o // SHORTER, of) for name, (i, o, of) in projection.LINEARS.items()}
    with mock.patch.object(projection, "LINEARS", shorter):
        entries = projection.problem(32, rank, "cpu")
    held, plain = ([nn.Parameter(w.clone()) for w, _, _ in entries] for _ in range(2))
    for p in (*held, *plain):
        p.grad = torch.zeros_like(p)
    optimizer = rk.ProjectedAdamW(held, [(p, u, dim) for p, (_, u, dim) in zip(held, entries, strict=True)])
    return {
        "ProjectionPlan.apply_": rk.ProjectionPlan(entries).apply_,
        "ProjectedAdamW.step": optimizer.step,
        "torch.optim.AdamW.step, fused, computed": torch.optim.AdamW(plain, fused=True).step,
    }


def main(
    rank: Annotated[int, typer.Option(min=1, max=projection.KEYS // SHORTER, help="Columns of the bases.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of every call.")] = 100,
) -> None:
    """Prints microseconds, least and median, of each call; they take turns."""
    with without_launches():
        found = calls(rank)
        times: dict[str, list[float]] = {name: [] for name in found}
        for run in found.values():
            run()
        for _ in range(rounds):
            for name, run in found.items():
                start = time.perf_counter()
                run()
                times[name].append(1e6 * (time.perf_counter() - start))
    for name, of in times.items():
        print(f"{name}: {min(of):.0f} at least, {statistics.median(of):.0f} median, us")


if __name__ == "__main__":
    typer.run(main)
