"""`python -m benches.gpu.heads`: 32 autoencoders of d = 128 in one call, by both paths of the encoder, on a GPU.

Columns: encode of all heads and of one by every path (what triton_kernels/encode.py chooses is for this table to say),
and the training step of all heads in one call, on the Triton and on the CUDA back-end, beside a loop of single steps
and one of dense eager steps, the contestant that the target of 4x is set against. Prediction for an H200: encode 0.6 to
0.7 ms per head grouped and 2.45 chunked; measured 1.1 grouped, 1.65 and 2.07 chunked. The paths are compared first: the
share of entries with the same latent, on all rows.
"""

from __future__ import annotations

import json
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
from .clock import attempt, measure


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
    device: Annotated[str, typer.Option(help="cuda, or cpu under Triton's interpreter, to see that it runs.")] = "cuda",
) -> None:
    """Prints one JSON object per line and measurement."""
    sizes = Shape.parse(shape)
    k = sizes.k
    x, parameters = inputs(sizes, heads, device)
    W_enc, b_enc, _, b_dec = parameters
    we = W_enc.to(torch.bfloat16)

    def tell(name: str, result: dict[str, Any]) -> None:
        print(json.dumps({"shape": f"{heads} x {sizes}", "name": name, **result}), flush=True)

    one = (x[0], we[0], b_enc[0], k, b_dec[0])
    chosen = [path.strip() for path in paths.split(";")]
    if unknown := set(chosen) - set(encode.PATHS):
        raise typer.BadParameter(f"no such path: {', '.join(sorted(unknown))}", param_hint="--paths")
    by_path = [encode.topk_encode(*one, path=path)[1] for path in chosen]
    for path, indices in zip(chosen[1:], by_path[1:], strict=True):
        same = (by_path[0][:, :, None] == indices[:, None, :]).any(2).float().mean().item()
        tell(f"{chosen[0]} and {path}, agreement", {"same_latents": same})
    del by_path
    for path in chosen:
        everything = (x, we, b_enc, k, b_dec)
        tell(
            f"encode, one head, {path}",
            attempt(lambda p=path: measure(lambda: encode.topk_encode(*one, path=p), rounds)),
        )
        tell(
            f"encode, all heads, {path}",
            attempt(lambda p=path, a=everything: measure(lambda: encode.topk_encode(*a, path=p), rounds)),
        )

    def step_of(leaves: list[Tensor], rows: Tensor, backend: str = "triton", **state: Any) -> Any:
        optimizer = rk.SAEAdam(*leaves, lr=LR, remove_parallel_grad=False, **state)

        def call() -> None:
            with torch.autocast(device, dtype=torch.bfloat16):
                rk.sae_step(rows, *leaves, k, optimizer=optimizer, backend=backend)

        return call

    def together(backend: str = "triton", **state: Any) -> dict[str, Any]:
        return measure(step_of([p.clone().requires_grad_() for p in parameters], x, backend, **state), rounds)

    def compact() -> dict[str, Any]:
        wide = [p.clone() for p in parameters]
        wide[0], wide[2] = wide[0].to(torch.bfloat16), wide[2].to(torch.bfloat16)
        leaves = [p.requires_grad_() for p in wide]
        return measure(step_of(leaves, x, split_master=True, moment_dtype=torch.bfloat16), rounds)

    def loop(step: Any) -> dict[str, Any]:
        calls = [step([p[h].clone().requires_grad_() for p in parameters], x[h]) for h in range(heads)]
        return measure(lambda: [call() for call in calls], rounds)

    def dense(leaves: list[Tensor], rows: Tensor) -> Any:
        return peers.autograd_step(torch_paths.dense_loss, rows, leaves, k)

    tell("step, all heads", attempt(together))
    tell("step, all heads compact", attempt(compact))
    tell("step, all heads, cuda", attempt(lambda: together("cuda", copy_dtype=torch.bfloat16)))
    tell("step, loop over heads", attempt(lambda: loop(step_of)))
    tell("step, dense loop over heads", attempt(lambda: loop(dense)))


if __name__ == "__main__":
    typer.run(main)
