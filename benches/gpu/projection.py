"""`python -m benches.gpu.projection`: `ProjectionPlan.apply_` on the 448 LoRA matrices of Llama-3-8B, on a GPU.

The problem and its columns are those of `benches.projection`; here device time by events, our call also replayed from a
CUDA graph, which leaves out what the host does. Predictions for an H200: 0.15, 0.38, 0.65 ms at r = 8, 64, 128
(triton_kernels/projection.py). "ours, cuda" is the back-end of that name, one launch a call; predictions in a graph:
0.14, 0.36, 0.72 ms (csrc/cuda/projection.cu).

After them the columns of `benches.projected_adam`, an optimizer's step on the same matrices. Predictions for an H200,
beside what the host does: fused AdamW 0.27 ms at any r; AdamW, then the projection of the difference, 0.74, 0.97,
1.23 ms; rk.ProjectedAdamW 0.42, 0.66, 0.92 ms (triton_kernels/projected_adam.py).
"""

from __future__ import annotations

import functools
import json
from typing import Any

import torch

import refusal_kernels as rk

from .. import projected_adam, projection
from .clock import attempt, measure

RANKS = (8, 64, 128)


def graph_of(run: object) -> torch.cuda.CUDAGraph:
    """`run` captured, after a call on a side stream that compiles."""
    assert callable(run)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def of_cuda(entries: list[projection.Entry], graph: bool) -> dict[str, Any]:
    """Our call on the CUDA C++ back-end: checked, then timed as it is or from a graph."""
    run = rk.ProjectionPlan(entries, backend="cuda").apply_
    error = projection.check(entries, {"ours": run})
    return {"error": error, **measure(graph_of(run).replay if graph else run, 20)}


@torch.no_grad()
def main() -> None:
    """One JSON object per line and column."""
    torch.backends.cuda.matmul.allow_tf32 = False
    for rank in RANKS:
        entries = projection.problem(32, rank, "cuda")
        names = projection.columns(entries, "triton")
        error = projection.check(entries, {"ours": names["ours"]})
        names["ours, graph"] = graph_of(names["ours"]).replay
        shared = {"r": rank, "bytes": projection.least_bytes(entries), "error": error}
        for name, run in names.items():
            print(json.dumps({**shared, "name": name, **attempt(lambda run=run: measure(run, 20))}), flush=True)
        for name in ("ours, cuda", "ours, cuda, graph"):
            row = attempt(functools.partial(of_cuda, entries, name.endswith("graph")))
            print(json.dumps({**shared, "name": name, **row}), flush=True)
        with torch.enable_grad():
            steps, error = projected_adam.columns(entries, "triton")
        for name, run in steps.items():
            row = {"r": rank, "error": error, "name": f"step, {name}"}
            print(json.dumps({**row, **attempt(lambda run=run: measure(run, 20))}), flush=True)
        del entries, names, steps


if __name__ == "__main__":
    main()
