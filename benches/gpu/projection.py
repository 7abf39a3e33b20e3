"""`python -m benches.gpu.projection`: `ProjectionPlan.apply_` on the 448 LoRA matrices of Llama-3-8B, on a GPU.

The problem and its columns are those of `benches.projection`; here device time by events. A call finds the device idle,
so that where the host takes longer than the kernels these times are the host's. Two columns leave it out: "graph", our
call replayed from a CUDA graph, and "queue full", our call enqueued behind other work, as after a backward pass.
"ours, cuda" is the back-end of that name, one launch a call; "ours, one launch" the Triton back-end's other form, which
nothing chooses before it is measured; at r = 64 other sizes of it are timed too. On an H200, ms at r = 8, 64, 128:

    graph        predicted          measured, 2026-11-27
    ours         0.15 0.38 0.65     0.25 0.50 0.93      (triton_kernels/projection.py)
    ours, cuda   0.14 0.36 0.72     0.28 0.77 1.41      (csrc/cuda/projection.cu)
    one launch   0.17 0.48 0.83     not yet             (triton_kernels/lora_projection_lagged.py)

After them the columns of `benches.projected_adam`, an optimizer's step on the same matrices; measured called from
Python, in the faster of two runs of that day. "queue full" has not been measured, and is what the predictions are of:

    fused AdamW                 0.27 0.27 0.27     1.7 1.7 1.6
    then the difference         0.74 0.97 1.23     2.4 2.7 3.1
    rk.ProjectedAdamW           0.42 0.66 0.92     2.7 2.9 3.3     (triton_kernels/projected_adam.py; another since)
    ours, projection alone                         0.45 0.83 1.16
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

import refusal_kernels as rk
from refusal_kernels.triton_kernels import lora_projection_lagged as lagged

from .. import projected_adam, projection
from .clock import attempt, behind_other_work, measure
from .rows import Rows

RANKS = (8, 64, 128)
# Sizes of the one launch beside its own, at r = VARIED: what they change is what it reads from DRAM and how long its
# programs wait.
VARIED = 64
SIZES: dict[str, dict[str, int]] = {
    "slabs of 128": {"slab": 128},
    "slabs of 512": {"slab": 512},
    "lag of 99": {"lag": 99},
}


def graph_of(run: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """`run` captured, after a call on a side stream that compiles."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def checked(
    entries: list[projection.Entry], how: str, backend: str, path: str = lagged.PATHS[0], **sizes: int
) -> dict[str, Any]:
    """Our call on a back-end, by a path of the Triton one: checked, then timed as it is, from a graph or behind other
    work."""
    run = rk.ProjectionPlan(entries, backend=backend).apply_
    with lagged.using(path, **sizes):
        error = projection.check(entries, {"ours": run})
    if how == "queue full":
        return {"error": error, **behind_other_work(run, 20)}
    return {"error": error, **measure(graph_of(run).replay if how == "graph" else run, 20)}


def three_ways(name: str, **arguments: Any) -> dict[str, dict[str, Any]]:
    """Column -> arguments of `checked`."""
    return {name + (how and f", {how}"): {"how": how, **arguments} for how in ("", "graph", "queue full")}


def in_one_launch(rank: int) -> dict[str, dict[str, Any]]:
    """The same, of the Triton back-end's other form, in other sizes too at r = VARIED."""
    one = {"backend": "triton", "path": lagged.PATHS[1]}
    varied = SIZES if rank == VARIED else {}
    return three_ways("ours, one launch", **one) | {
        f"ours, one launch, {name}, graph": {"how": "graph", **one, **sizes} for name, sizes in varied.items()
    }


@torch.no_grad()
def main() -> None:
    """One JSON object per line and column."""
    torch.backends.cuda.matmul.allow_tf32 = False

    rows = Rows()
    tell = rows.tell
    for rank in RANKS:
        entries = projection.problem(32, rank, "cuda")
        names = projection.columns(entries, "triton")
        shared: dict[str, Any] = {"r": rank, "bytes": projection.least_bytes(entries)}
        ours = names["ours"]
        compared = attempt(lambda e=entries, run=ours: {"error": projection.check(e, {"ours": run})})  # type: ignore[misc]
        captured = attempt(lambda run=ours: {"graph": graph_of(run)})  # type: ignore[misc]
        if isinstance(compared["error"], str):  # what is wrong is not timed, and costs no other column
            tell({**shared, "name": "ours", **compared})
            del names["ours"]
        else:
            shared |= compared
            if "graph" in captured:
                names["ours, graph"] = captured["graph"].replay
            else:
                tell({**shared, "name": "ours, graph", **captured})
        for name, run in names.items():
            tell({**shared, "name": name, **attempt(lambda run=run: measure(run, 20))})
        if "ours" in names:
            queued = attempt(lambda run=ours: behind_other_work(run, 20))  # type: ignore[misc]
            tell({**shared, "name": "ours, queue full", **queued})
        for name, arguments in three_ways("ours, cuda", backend="cuda").items():
            tell({**shared, "name": name, **attempt(functools.partial(checked, entries, **arguments))})
        with torch.enable_grad():
            made = attempt(lambda e=entries: {"columns": projected_adam.columns(e, "triton")})  # type: ignore[misc]
        steps, off = made.get("columns", ({}, None))
        if "error" in made:
            tell({"r": rank, "name": "optimizer, ours", **made})
        for name, run in steps.items():
            row = {"r": rank, "error": off, "name": f"optimizer, {name}"}
            tell({**row, **attempt(lambda run=run: measure(run, 20))})
            queued = attempt(lambda run=run: behind_other_work(run, 20))  # type: ignore[misc]
            tell({**row, "name": f"{row['name']}, queue full", **queued})
        del entries, names, made, steps
    for rank in RANKS:  # last: its programs wait for each other, and one that waited forever would end the stage
        entries = projection.problem(32, rank, "cuda")
        shared = {"r": rank, "bytes": projection.least_bytes(entries)}
        for name, arguments in in_one_launch(rank).items():
            tell({**shared, "name": name, **attempt(functools.partial(checked, entries, **arguments))})
        del entries
    rows.end()


if __name__ == "__main__":
    main()
