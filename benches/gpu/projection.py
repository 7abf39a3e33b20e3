"""`python -m benches.gpu.projection`: `ProjectionPlan.apply_` on the 448 LoRA matrices of Llama-3-8B, on a GPU.

The problem and its columns are those of `benches.projection`; here device time by events, our call also replayed from a
CUDA graph, which leaves out what the host does. Predictions for an H200: 0.15, 0.38, 0.65 ms at r = 8, 64, 128
(triton_kernels/projection.py). "ours, cuda" is the back-end of that name, one launch a call; predictions in a graph:
0.14, 0.36, 0.72 ms (csrc/cuda/projection.cu). "ours, one launch" is the Triton back-end's other form, which nothing
chooses before it is measured: 0.17, 0.48, 0.83 ms in a graph (triton_kernels/lora_projection_lagged.py, where slabs and
lag are explained, of which other sizes are timed at r = 64).

After them the columns of `benches.projected_adam`, an optimizer's step on the same matrices. Predictions for an H200,
beside what the host does: fused AdamW 0.27 ms at any r; AdamW, then the projection of the difference, 0.74, 0.97,
1.23 ms; rk.ProjectedAdamW 0.42, 0.66, 0.92 ms (triton_kernels/projected_adam.py).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

import torch

import refusal_kernels as rk
from refusal_kernels.triton_kernels import lora_projection_lagged as lagged

from .. import projected_adam, projection
from .clock import attempt, measure

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
    entries: list[projection.Entry], graph: bool, backend: str, path: str = lagged.PATHS[0], **sizes: int
) -> dict[str, Any]:
    """Our call on a back-end, by a path of the Triton one: checked, then timed as it is or from a graph."""
    run = rk.ProjectionPlan(entries, backend=backend).apply_
    with lagged.using(path, **sizes):
        error = projection.check(entries, {"ours": run})
    return {"error": error, **measure(graph_of(run).replay if graph else run, 20)}


def others(rank: int) -> dict[str, dict[str, Any]]:
    """Column -> arguments of `checked`."""
    cuda, one = {"backend": "cuda"}, {"backend": "triton", "path": lagged.PATHS[1]}
    found: dict[str, dict[str, Any]] = {
        "ours, cuda": {"graph": False, **cuda},
        "ours, cuda, graph": {"graph": True, **cuda},
        "ours, one launch": {"graph": False, **one},
        "ours, one launch, graph": {"graph": True, **one},
    }
    if rank == VARIED:
        found |= {f"ours, one launch, graph, {name}": {"graph": True, **one, **sizes} for name, sizes in SIZES.items()}
    return found


@torch.no_grad()
def main() -> None:
    """One JSON object per line and column."""
    torch.backends.cuda.matmul.allow_tf32 = False

    def tell(row: dict[str, Any]) -> None:
        print(json.dumps(row), flush=True)

    for rank in RANKS:
        entries = projection.problem(32, rank, "cuda")
        names = projection.columns(entries, "triton")
        shared: dict[str, Any] = {"r": rank, "bytes": projection.least_bytes(entries)}
        ours = names["ours"]
        checked = attempt(lambda e=entries, run=ours: {"error": projection.check(e, {"ours": run})})  # type: ignore[misc]
        captured = attempt(lambda run=ours: {"graph": graph_of(run)})  # type: ignore[misc]
        if isinstance(checked["error"], str):  # what is wrong is not timed, and costs no other column
            tell({**shared, "name": "ours", **checked})
            del names["ours"]
        else:
            shared |= checked
            if "graph" in captured:
                names["ours, graph"] = captured["graph"].replay
            else:
                tell({**shared, "name": "ours, graph", **captured})
        for name, run in names.items():
            tell({**shared, "name": name, **attempt(lambda run=run: measure(run, 20))})
        for name, arguments in others(rank).items():
            tell({**shared, "name": name, **attempt(functools.partial(checked, entries, **arguments))})
        with torch.enable_grad():
            made = attempt(lambda e=entries: {"columns": projected_adam.columns(e, "triton")})  # type: ignore[misc]
        steps, off = made.get("columns", ({}, None))
        if "error" in made:
            tell({"r": rank, "name": "optimizer, ours", **made})
        for name, run in steps.items():
            row = {"r": rank, "error": off, "name": f"optimizer, {name}"}
            tell({**row, **attempt(lambda run=run: measure(run, 20))})
        del entries, names, made, steps


if __name__ == "__main__":
    main()
