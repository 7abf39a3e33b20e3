"""`python -m benches.gpu.heads`: 32 autoencoders of d = 128 in one call, by both paths of the encoder, on a GPU.

Columns: encode of all heads and of one by every path (what triton_kernels/encode.py chooses is for this table to say),
and the training step of all heads in one call, on the Triton and on the CUDA back-end, beside a loop of single steps
and loops of PyTorch's: dense eager, the contestant that the target of 4x is set against, sparse, and compiled. As
theirs, our steps leave the gradient along a decoder row in; "default options" takes it out, as SAEAdam does by default.
Prediction for an H200: encode 0.6 to 0.7 ms per head grouped and 2.45 chunked; measured 1.1 grouped, 1.65 and 2.07
chunked. The paths are compared first, the share of entries with the same latent on all rows, and then first losses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

import refusal_kernels as rk
from refusal_kernels.triton_kernels import encode

from .. import torch_paths
from ..problem import LR, Problem
from ..shapes import Shape
from . import peers
from .clock import measure
from .rows import Rows

Step = Callable[[], Tensor]
STEPS = ("ours", "compact", "default", "cuda", "loop", "dense", "sparse", "compile")


def inputs(shape: Shape, heads: int, device: str) -> tuple[Tensor, list[Tensor]]:
    """x [H, N, d] bf16 and fp32 parameters with a head axis: one problem, its latents in another order in each head."""
    problem = Problem(shape, device, distinct=False)
    orders = [torch.randperm(shape.f, device=device) for _ in range(heads)]
    W_enc, b_enc, W_dec, b_dec = problem.parameters
    by_latent = [torch.stack([t[order] for order in orders]) for t in (W_enc, b_enc, W_dec)]
    x = problem.x.to(torch.bfloat16).expand(heads, -1, -1).contiguous()
    return x, [*by_latent, b_dec.expand(heads, -1).contiguous()]


def main(
    shape: Annotated[str, typer.Option(help="N,d,F,k of one head.")] = "65536,128,4096,32",
    heads: Annotated[int, typer.Option(min=1, help="Heads.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Calls of each column at most.")] = 7,
    paths: Annotated[str, typer.Option(help=f"Of the encoder: of {'; '.join(encode.PATHS)}.")] = "; ".join(
        encode.PATHS
    ),
    columns: Annotated[str, typer.Option(help=f"Of the step: of {', '.join(STEPS)}.")] = "ours compact cuda loop dense",
    device: Annotated[str, typer.Option(help="cuda, or cpu under Triton's interpreter, to see that it runs.")] = "cuda",
) -> None:
    """Prints one JSON object per line and measurement."""
    sizes = Shape.parse(shape)
    k = sizes.k
    x, parameters = inputs(sizes, heads, device)
    W_enc, b_enc, _, b_dec = parameters
    we = W_enc.to(torch.bfloat16)

    rows = Rows(compared=device == "cuda", shape=f"{heads} x {sizes}")
    one = (x[0], we[0], b_enc[0], k, b_dec[0])
    chosen = [path.strip() for path in paths.split(";") if path.strip()]
    if unknown := set(chosen) - set(encode.PATHS):
        raise typer.BadParameter(f"no such path: {', '.join(sorted(unknown))}", param_hint="--paths")
    if unknown := set(columns.split()) - set(STEPS):
        raise typer.BadParameter(f"no such column: {', '.join(sorted(unknown))}", param_hint="--columns")

    def agreement(path: str) -> dict[str, Any]:
        first, other = (encode.topk_encode(*one, path=p)[1] for p in (chosen[0], path))
        return {"same_latents": (first[:, :, None] == other[:, None, :]).any(2).float().mean().item()}

    for path in chosen[1:]:
        rows.attempt(f"{chosen[0]} and {path}, agreement", lambda p=path: agreement(p))  # type: ignore[misc]
    for path in chosen:
        everything = (x, we, b_enc, k, b_dec)
        for name, tensors in ((f"encode, one head, {path}", one), (f"encode, all heads, {path}", everything)):
            rows.attempt(name, lambda p=path, a=tensors: measure(lambda: encode.topk_encode(*a, path=p), rounds))  # type: ignore[misc]

    def step_of(leaves: list[Tensor], tokens: Tensor, backend: str = "triton", **state: Any) -> Step:
        optimizer = rk.SAEAdam(*leaves, lr=LR, **{"remove_parallel_grad": False, **state})

        def call() -> Tensor:
            with torch.autocast(device, dtype=torch.bfloat16):
                return rk.sae_step(tokens, *leaves, k, optimizer=optimizer, backend=backend).loss

        return call

    def timed(calls: list[Step]) -> dict[str, Any]:
        """All of them in one measurement, and the sum of their first losses."""
        first = sum(float(call().sum()) for call in calls)
        return {"first_loss": first, **measure(lambda: [call() for call in calls], rounds)}

    def together(backend: str = "triton", **state: Any) -> dict[str, Any]:
        return timed([step_of([p.clone().requires_grad_() for p in parameters], x, backend, **state)])

    def compact() -> dict[str, Any]:
        wide = [p.clone() for p in parameters]
        wide[0], wide[2] = wide[0].to(torch.bfloat16), wide[2].to(torch.bfloat16)
        leaves = [p.requires_grad_() for p in wide]
        return timed([step_of(leaves, x, split_master=True, moment_dtype=torch.bfloat16)])

    def loop(step: Callable[[list[Tensor], Tensor], Step]) -> dict[str, Any]:
        return timed([step([p[h].clone().requires_grad_() for p in parameters], x[h]) for h in range(heads)])

    def dense(leaves: list[Tensor], tokens: Tensor) -> Step:
        return peers.autograd_step(torch_paths.dense_loss, tokens, leaves, k)

    def sparse(leaves: list[Tensor], tokens: Tensor) -> Step:
        return peers.sparse_step(tokens, leaves, k)

    def compiled(leaves: list[Tensor], tokens: Tensor) -> Step:
        return peers.autograd_step(torch.compile(torch_paths.dense_loss, dynamic=False), tokens, leaves, k)

    steps: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
        "ours": ("step, all heads", together),
        "compact": ("step, all heads compact", compact),
        "default": ("step, all heads, default options", lambda: together(remove_parallel_grad=True)),
        "cuda": ("step, all heads, cuda", lambda: together("cuda", copy_dtype=torch.bfloat16)),
        "loop": ("step, loop over heads", lambda: loop(step_of)),
        "dense": ("step, dense loop over heads", lambda: loop(dense)),
        "sparse": ("step, sparse loop over heads", lambda: loop(sparse)),
        "compile": ("step, compile loop over heads", lambda: loop(compiled)),
    }
    for column in columns.split():
        rows.attempt(*steps[column])
    rows.end()


if __name__ == "__main__":
    typer.run(main)
