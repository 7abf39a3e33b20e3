"""`python -m benches.gpu.profile --shape N,d,F,k`: where the milliseconds of a training step go, kernel by kernel.

`torch.profiler` over a few steps of the columns of benches.gpu.sae, in the same process and after the calls that
compile and warm up; with --heads autoencoders of benches.gpu.heads in one call; with `--rank R` in the place of a shape
the projection of benches.gpu.projection and the optimizers on its matrices. A row per kernel: milliseconds and launches
per step, percent of the GPU's time in it; what is below 1 % is added up as "rest". The row "step" has the milliseconds
of the same step without the profiler, and what all kernels of it take together: between the two the GPU waited.

With TRITON_INTERPRET=1 and `--device cpu --shape 2,16,32,2` PyTorch's operators on the host stand in for kernels, to
see that it runs; that says nothing about a GPU.
"""

from __future__ import annotations

import functools
import re
from collections import defaultdict
from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import refusal_kernels as rk

from .. import projected_adam, projection
from ..problem import Problem
from ..shapes import Shape
from . import heads, sae
from .clock import attempt, measure
from .rows import Rows

Step = Callable[[], Any]

STEPS = 5  # under the profiler
LEAST_PERCENT = 1.0
LONGEST_NAME = 80


def short(name: str) -> str:
    """A kernel's name without return type, arguments and namespaces, and without its end where it is still long."""
    name = name.removeprefix("void ").replace("(anonymous namespace)::", "")
    depth = 0
    for at, letter in enumerate(name):
        depth += {"<": 1, ">": -1}.get(letter, 0)
        # "Memcpy DtoD (Device -> Device)" is a name too.
        if letter == "(" and depth == 0 and at and name[at - 1] != " ":
            name = name[:at]
            break
    name = re.sub(r"\b[A-Za-z_]\w*::", "", name)
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"


def kernels(call: Callable[[], Any], device: str) -> dict[str, tuple[float, float]]:
    """Short name -> (milliseconds, launches) per call; on a CPU, of operators."""
    on_gpu = device == "cuda"
    steps = STEPS if on_gpu else 1
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as recorded:
        for _ in range(steps):
            call()
        if on_gpu:
            torch.cuda.synchronize()
    found: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event in recorded.key_averages():
        # Beside kernels there are the calls that launch them and spans that others name; neither is the device's work.
        if event.device_type != (DeviceType.CUDA if on_gpu else DeviceType.CPU) or getattr(
            event, "is_user_annotation", False
        ):
            continue
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if microseconds > 0:
            total = found[short(event.key)]
            total[0] += microseconds / 1e3 / steps
            total[1] += event.count / steps
    return {name: (ms, launches) for name, (ms, launches) in found.items()}


def rows(found: dict[str, tuple[float, float]], wall: float) -> list[dict[str, Any]]:
    """The step first, then kernels from the longest on, the rest last."""
    busy = sum(ms for ms, _ in found.values())
    said: list[dict[str, Any]] = [{"name": "step", "ms": wall, "busy_ms": busy}]
    rest = [0.0, 0.0]
    for name, (ms, launches) in sorted(found.items(), key=lambda item: -item[1][0]):
        percent = 100 * ms / busy
        if percent < LEAST_PERCENT:
            rest = [rest[0] + ms, rest[1] + launches]
        else:
            said.append({"name": name, "ms": ms, "launches": launches, "percent": percent})
    if rest[1]:
        said.append({"name": "rest", "ms": rest[0], "launches": rest[1], "percent": 100 * rest[0] / busy})
    return said


def leaves_of_heads(parameters: list[Tensor], halves: bool) -> list[Tensor]:
    """As sae.leaves_of, with a head axis in front."""
    made = [p.to(torch.bfloat16) if halves and p.dim() == 3 else p.clone() for p in parameters]
    return [p.requires_grad_() for p in made]


def of_steps(sizes: Shape, columns: list[str], head_count: int, device: str) -> dict[str, Callable[[], Step]]:
    """Column -> what makes one step of it."""
    if head_count:
        x, parameters = heads.inputs(sizes, head_count, device)
    else:
        x = Problem(sizes, device, distinct=False).x.to(torch.bfloat16)

    def made(column: str) -> Step:
        halves = column.endswith("compact")
        leaves = leaves_of_heads(parameters, halves) if head_count else sae.leaves_of(sizes, device, halves)
        return sae.steps(x, sizes)[column][1](leaves)

    return {column: functools.partial(made, column) for column in columns}


def of_projection(rank: int, device: str) -> tuple[str, dict[str, Callable[[], Step]]]:
    """The same of the 448 LoRA matrices, with what they are called; on a CPU of one layer's, on the back-end there."""
    on_gpu = device == "cuda"
    entries = projection.problem(32 if on_gpu else 1, rank, device)
    backends = {"ours": "triton", "ours, cuda": "cuda"} if on_gpu else {"ours": None}

    def made(backend: str | None) -> Step:
        return rk.ProjectionPlan(entries, backend=backend).apply_

    steps, _ = projected_adam.columns(entries, backends["ours"])
    makers: dict[str, Callable[[], Step]] = {name: functools.partial(made, which) for name, which in backends.items()}
    makers |= {f"optimizer, {name}": (lambda step=step: step) for name, step in steps.items()}  # type: ignore[misc]
    return f"{len(entries)} LoRA matrices, r = {rank}", makers


def main(
    shape: Annotated[str, typer.Option(help="N,d,F,k; of one head with --heads.")] = "",
    columns: Annotated[str, typer.Option(help=f"Of {', '.join(sae.STEPS)}; with --shape.")] = "ours compact cuda",
    head_count: Annotated[int, typer.Option("--heads", min=0, help="Autoencoders in one call; 0: no head axis.")] = 0,
    rank: Annotated[int, typer.Option(min=0, help="Columns of the projection's bases, instead of a shape.")] = 0,
    rounds: Annotated[int, typer.Option(min=1, help="Calls without the profiler at most.")] = 5,
    device: Annotated[str, typer.Option(help="cuda, or cpu under Triton's interpreter, to see that it runs.")] = "cuda",
) -> None:
    """Prints one JSON object per line, column and kernel."""
    if bool(shape) == bool(rank):
        raise typer.BadParameter("one of --shape and --rank is needed")
    torch.backends.cuda.matmul.allow_tf32 = False
    if rank:
        named, made = of_projection(rank, device)
    else:
        sizes = Shape.parse(shape)
        if unknown := set(columns.split()) - set(sae.STEPS):
            raise typer.BadParameter(f"no such column: {', '.join(sorted(unknown))}", param_hint="--columns")
        named = f"{head_count} x {sizes}" if head_count else str(sizes)
        made = of_steps(sizes, columns.split(), head_count, device)
    told = Rows(shape=named)
    for column, make in made.items():

        def run(make: Callable[[], Step] = make) -> dict[str, Any]:
            call = make()
            wall = measure(call, rounds)["ms"]
            return {"rows": rows(kernels(call, device), wall)}

        found = attempt(run)
        for row in found.get("rows", [{"name": "step", **found}]):
            told.tell({"column": column, **row})
        torch._dynamo.reset()
    told.end()


if __name__ == "__main__":
    typer.run(main)
