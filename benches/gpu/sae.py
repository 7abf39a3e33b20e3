"""`python -m benches.gpu.sae --shape N,d,F,k`: the training step of one shape and its parts, against PyTorch, on a GPU.

bf16 autocast, fp32 parameters and moments. Columns, in the order in which they are worth their time:

parts      the product x W_enc^T alone (the floor of any exact encoder without lower precision), encode, decode with the
           residual, the transpose, the backward, each on the Triton back-end beside PyTorch's
ours       `sae_step`, the optimiser inside
dense      PyTorch eager
default    ours with the options that SAEAdam has by default: the gradient along a decoder row is taken out. The peers
           leave it in, and so do all other columns
compact    ours with state in 8 bytes a weight: master weights in halves, bf16 moments
dead       ours with a tenth of the latents dead, for AuxK
sparse     topk, embedding_bag, index_add_
compile    dense, compiled
copies     ours with the 16-bit copies kept that every other step makes anew of its fp32 weights
cuda       the same on the CUDA back-end, its row filter and its step; cuda-compact: with compact state
others     the parts on back-ends that run by explicit request only: CUDA's row filter, decode and backward, the 8-bit
           screen
csr        codes with k latents per row on average: BatchTopK, a threshold, and their decoder

What is timed is compared: the encoder with a stable sort of fp32 pre-activations on sampled rows, the first losses of
all steps with each other, within the bounds of benches/gpu/rows.py. A column that the device has no memory for says so;
any other error, and a comparison outside its bound, is the command's exit status after all columns have run.

With TRITON_INTERPRET=1 and `--device cpu --shape 2,16,32,2` every column runs through without a GPU, in a minute, to
see that it does; bf16 numbers mean nothing there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

import refusal_kernels as rk

from .. import torch_paths
from ..problem import LR, Problem
from ..shapes import Shape
from . import parts, peers
from .clock import measure
from .model import least_step_bytes
from .rows import Rows

STEPS = ("ours", "dense", "compact", "default", "dead", "sparse", "compile", "copies", "cuda", "cuda-compact")
COPIES: dict[str, Any] = {"copy_dtype": torch.bfloat16}
COMPACT: dict[str, Any] = {"split_master": True, "moment_dtype": torch.bfloat16}


def leaves_of(shape: Shape, device: str, halves: bool) -> list[Tensor]:
    """The problem's parameters, made anew: every step starts from the same ones, and no copy of them is kept."""
    parameters = Problem(shape, device, distinct=False).parameters
    return [(p.to(torch.bfloat16) if halves and p.dim() == 2 else p).requires_grad_() for p in parameters]


def our_step(
    x: Tensor, leaves: list[Tensor], k: int, dead: Tensor | None = None, backend: str = "triton", **state: Any
) -> Callable[[], Tensor]:
    optimizer = rk.SAEAdam(*leaves, lr=LR, **{"remove_parallel_grad": False, **state})

    def call() -> Tensor:
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            return rk.sae_step(x, *leaves, k, dead=dead, optimizer=optimizer, backend=backend).loss

    return call


def steps(x: Tensor, shape: Shape) -> dict[str, tuple[str, Callable[[list[Tensor]], Callable[[], Tensor]]]]:
    """Column -> (its name in the results, what makes one call of it)."""
    k = shape.k

    def dead(leaves: list[Tensor]) -> Callable[[], Tensor]:
        return our_step(x, leaves, k, torch.arange(shape.f // 10, device=x.device) * 10)

    def compiled(leaves: list[Tensor]) -> Callable[[], Tensor]:
        return peers.autograd_step(torch.compile(torch_paths.dense_loss, dynamic=False), x, leaves, k)

    return {
        "ours": ("step, ours", lambda leaves: our_step(x, leaves, k)),
        "dense": ("step, dense", lambda leaves: peers.autograd_step(torch_paths.dense_loss, x, leaves, k)),
        "compact": ("step, ours compact", lambda leaves: our_step(x, leaves, k, **COMPACT)),
        "default": ("step, ours, default options", lambda leaves: our_step(x, leaves, k, remove_parallel_grad=True)),
        "dead": ("step, ours, a tenth dead", dead),
        "sparse": ("step, sparse", lambda leaves: peers.sparse_step(x, leaves, k)),
        "compile": ("step, compile", compiled),
        "copies": ("step, ours, copies", lambda leaves: our_step(x, leaves, k, **COPIES)),
        # Runs before 2026-11-29 have "step, cuda": gradients written, and read by Adam.
        "cuda": (
            "step, cuda, Adam inside",
            lambda leaves: our_step(x, leaves, k, backend="cuda", **COPIES),
        ),
        "cuda-compact": (
            "step, cuda compact, Adam inside",
            lambda leaves: our_step(x, leaves, k, backend="cuda", **COMPACT),
        ),
    }


def bench(shape: Shape, columns: list[str], rounds: int, device: str = "cuda") -> None:
    """Prints one JSON object per line and measurement."""
    torch.backends.cuda.matmul.allow_tf32 = False
    problem = Problem(shape, device, distinct=False)
    x = problem.x.to(torch.bfloat16)

    rows = Rows(compared=device == "cuda", shape=str(shape))
    if {"parts", "others", "csr"} & set(columns):
        operands = parts.Operands(
            x, problem.W_enc.to(torch.bfloat16), problem.b_enc, problem.W_dec.to(torch.bfloat16), problem.b_dec, shape.k
        )
        del problem  # the fp32 weights: at F = 2^20 they do not fit beside everything else
        if "parts" in columns:
            rows.section("parts", lambda: parts.measure_parts(operands, rounds, rows))
        if "others" in columns:
            rows.section("others", lambda: parts.measure_others(operands, rounds, rows))
        if "csr" in columns:
            rows.section("csr", lambda: parts.measure_csr(operands, rounds, rows))
        del operands
    else:
        del problem
    if device == "cuda":
        torch.cuda.empty_cache()

    has = torch.cuda.mem_get_info()[1] if device == "cuda" else None
    for column, (name, make) in steps(x, shape).items():
        if column not in columns:
            continue
        needs = least_step_bytes(column, shape)
        if has is not None and needs > has:
            rows.tell({"name": name, "error": f"needs at least {needs / 1e9:.0f} GB; the device has {has / 1e9:.0f}"})
            continue

        def run(column: str = column, make: Any = make) -> dict[str, Any]:
            call = make(leaves_of(shape, device, halves=column.endswith("compact")))
            return {"first_loss": float(call()), **measure(call, rounds)}

        rows.attempt(name, run)
        torch._dynamo.reset()
    rows.end()


def main(
    shape: Annotated[str, typer.Option(help="N,d,F,k.")],
    columns: Annotated[
        str, typer.Option(help=f"Of parts, {', '.join(STEPS)}, others, csr.")
    ] = "parts ours dense sparse",
    rounds: Annotated[int, typer.Option(min=1, help="Calls of each column at most.")] = 7,
    device: Annotated[str, typer.Option(help="cuda, or cpu under Triton's interpreter, to see that it runs.")] = "cuda",
) -> None:
    """Prints one JSON object per line and measurement."""
    chosen = columns.split()
    if unknown := set(chosen) - {"parts", "others", "csr", *STEPS}:
        raise typer.BadParameter(f"no such column: {', '.join(sorted(unknown))}", param_hint="--columns")
    bench(Shape.parse(shape), chosen, rounds, device)


if __name__ == "__main__":
    typer.run(main)
