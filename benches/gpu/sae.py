"""`python -m benches.gpu.sae --shape N,d,F,k`: encode, its parts, and the training step of one shape against PyTorch.

bf16 autocast, fp32 parameters and moments. Columns: dense (PyTorch eager), compile (the same compiled), sparse (topk,
embedding_bag, index_add_), ours (`sae_step`, the optimiser inside; a second time with state in 8 bytes a weight, master
weights in halves and bf16 moments), and the product x W_enc^T alone, the floor of any exact encoder without lower
precision. What is timed is compared first: the encoder with a stable sort of fp32 pre-activations on sampled rows, the
losses of all steps with each other.

With TRITON_INTERPRET=1 and `--device cpu --shape 2,16,32,2` every column runs through without a GPU, in a minute, to
see that it does; bf16 numbers mean nothing there.
"""

from __future__ import annotations

import json
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

import refusal_kernels as rk
from refusal_kernels.backends import BACKENDS
from refusal_kernels.triton_kernels import csc as transposed
from refusal_kernels.triton_kernels import int8_screen
from refusal_kernels.triton_kernels.backward import segment_length

from .. import torch_paths
from ..problem import LR, Problem
from ..shapes import Shape
from . import peers
from .clock import attempt, measure

SAMPLE = 256  # rows whose encoding is compared
SAME = 0.995  # of the sampled entries: bf16 operands, fp32 sums in another order


def encode_agreement(problem: Problem, x: Tensor, values: Tensor, indices: Tensor) -> dict[str, float]:
    """Share of the sampled rows' latents that a stable sort of fp32 sums selects too, and the largest error of a value
    relative to the row's first."""
    rows = torch.linspace(0, x.shape[0] - 1, min(SAMPLE, x.shape[0]), device=x.device).long()
    W = problem.W_enc.to(torch.bfloat16).float()
    pre = torch.addmm(problem.b_enc, x[rows].float() - problem.b_dec, W.T).relu_()
    best = torch.sort(pre, dim=1, descending=True, stable=True)
    wanted = best.indices[:, : problem.shape.k]
    hit = (indices[rows, :, None] == wanted[:, None, :]).any(2)
    off = (values[rows].float() - pre.gather(1, indices[rows])).abs() / best.values[:, :1].clamp(min=1e-6)
    return {"same_latents": hit.float().mean().item(), "value_error": off.max().item()}


def screened(problem: Problem, x: Tensor, W_enc: Tensor) -> dict[str, Any]:
    """What the 8-bit screen left: products computed per row that it took, the share of rows that it gave up, and its
    agreement as above."""
    k = problem.shape.k
    values, indices = rk.topk_encode(x, W_enc, problem.b_enc, k, problem.b_dec, backend="triton-int8")
    agreement = encode_agreement(problem, x, values, indices)
    computed = int8_screen.screen(x, W_enc, problem.b_enc, k, problem.b_dec, values, indices)
    taken = computed[(computed >= 0) & (computed < problem.shape.f)].float()
    return {"computed": taken.mean().item(), "given_up": (computed < 0).float().mean().item(), **agreement}


def bench(shape: Shape, columns: list[str], rounds: int, device: str = "cuda") -> dict[str, Any]:
    torch.backends.cuda.matmul.allow_tf32 = False
    problem = Problem(shape, device, distinct=False)
    n, d, f, k = shape
    x = problem.x.to(torch.bfloat16)
    results: dict[str, Any] = {}
    backend: Any = BACKENDS["triton"]

    def timed(name: str, run: Any) -> None:
        results[name] = attempt(lambda: measure(run, rounds))
        print(json.dumps({"shape": str(shape), "name": name, **results[name]}), flush=True)

    if "parts" in columns:
        we, wd = problem.W_enc.to(torch.bfloat16), problem.W_dec.to(torch.bfloat16)
        rows = min(n, max(1, (4 << 30) // (2 * f)))
        product = torch.empty(rows, f, dtype=torch.bfloat16, device=device)

        def alone() -> None:
            for start in range(0, n, rows):
                torch.mm(x[start : start + rows], we.T, out=product[: min(rows, n - start)])

        timed("product alone", alone)
        del product

        def eager() -> tuple[Tensor, Tensor]:
            return torch.addmm(problem.b_enc.to(x.dtype), x - problem.b_dec.to(x.dtype), we.T).relu_().topk(k, dim=1)

        if "dense" in columns:
            timed("encode, torch", eager)
        timed("encode, ours", lambda: backend.topk_encode(x, we, problem.b_enc, k, problem.b_dec))
        timed("encode, cuda filter", lambda: rk.topk_encode(x, we, problem.b_enc, k, problem.b_dec, backend="cuda"))
        timed("encode, int8 screen", lambda: rk.topk_encode(
            x, we, problem.b_enc, k, problem.b_dec, backend="triton-int8"))  # fmt: skip
        results["screen"] = {"name": "encode, int8 screen, left", **attempt(lambda: screened(problem, x, we))}
        print(json.dumps({"shape": str(shape), **results["screen"]}), flush=True)
        values, indices = backend.topk_encode(x, we, problem.b_enc, k, problem.b_dec)
        results["agreement"] = {"name": "encode, agreement", **encode_agreement(problem, x, values, indices)}
        print(json.dumps({"shape": str(shape), **results["agreement"]}), flush=True)
        e, _ = backend.decode_residual(x, values, indices, wd, problem.b_dec)
        timed("decode + residual, ours", lambda: backend.decode_residual(x, values, indices, wd, problem.b_dec))
        timed("decode, cuda", lambda: rk.sparse_decode(values, indices, wd, problem.b_dec, backend="cuda"))
        timed("decode, embedding_bag", lambda: torch.nn.functional.embedding_bag(
            indices, wd, mode="sum", per_sample_weights=values))  # fmt: skip
        timed("transpose, ours", lambda: transposed.csc_from_indices(indices, f, segment_length(n * k, d)))
        gradients = [torch.zeros(f, d, device=device), torch.zeros(f, device=device), torch.zeros(f, d, device=device)]
        timed("backward, ours", lambda: backend.sae_backward(
            e, x, values, indices, we, wd, problem.b_dec, 2 / n, *gradients, accumulate=False))  # fmt: skip
        cuda: Any = BACKENDS["cuda"]
        timed("backward, cuda", lambda: cuda.sae_backward(
            e, x, values, indices, we, wd, problem.b_dec, 2 / n, *gradients, accumulate=False))  # fmt: skip
        del gradients, values, indices, e, we, wd
        if device == "cuda":
            torch.cuda.empty_cache()

    leaves = [p.detach().requires_grad_() for p in problem.parameters]
    initial = [p.detach().cpu() for p in leaves]

    def fresh() -> list[Tensor]:
        with torch.no_grad():
            for leaf, start in zip(leaves, initial, strict=True):
                leaf.copy_(start)
                leaf.grad = None
        return leaves

    losses: dict[str, float] = {}

    def step(name: str, make: Any) -> None:
        def run() -> dict[str, Any]:
            call = make()
            losses[name] = float(call())
            return measure(call, rounds)

        fresh()
        results[name] = attempt(run)
        results[name]["first_loss"] = losses.get(name)
        print(json.dumps({"shape": str(shape), "name": name, **results[name]}), flush=True)
        torch._dynamo.reset()

    def ours(dead: Tensor | None = None, **state: Any) -> Any:
        optimizer = rk.SAEAdam(*leaves, lr=LR, remove_parallel_grad=False, **state)

        def call() -> Tensor:
            with torch.autocast(device, dtype=torch.bfloat16):
                return rk.sae_step(x, *leaves, k, dead=dead, optimizer=optimizer, backend="triton").loss

        return call

    if "ours" in columns:
        step("step, ours", ours)
        dead = torch.arange(f // 10, device=device) * 10
        step("step, ours, a tenth dead", lambda: ours(dead))
    if "sparse" in columns:
        step("step, sparse", lambda: peers.sparse_step(x, leaves, k))
    if "dense" in columns:
        step("step, dense", lambda: peers.autograd_step(torch_paths.dense_loss, x, leaves, k))
    if "compile" in columns:
        compiled = torch.compile(torch_paths.dense_loss, dynamic=False)
        step("step, compile", lambda: peers.autograd_step(compiled, x, leaves, k))
    if "ours" in columns:
        # Last, without the fp32 parameters: what of it fits a device depends on that.
        for tensor in (*problem.parameters, *leaves):
            tensor.grad, tensor.data = None, tensor.new_empty(0)
        leaves.clear()
        leaves.extend(p.to(device, torch.bfloat16 if p.dim() == 2 else p.dtype).requires_grad_() for p in initial)
        step("step, ours compact", lambda: ours(split_master=True, moment_dtype=torch.bfloat16))
    return results


def main(
    shape: Annotated[str, typer.Option(help="N,d,F,k.")],
    columns: Annotated[str, typer.Option(help="Of parts, ours, sparse, dense, compile.")] = "parts ours sparse dense",
    rounds: Annotated[int, typer.Option(min=1, help="Calls of each column at most.")] = 7,
    device: Annotated[str, typer.Option(help="cuda, or cpu under Triton's interpreter, to see that it runs.")] = "cuda",
) -> None:
    """Prints one JSON object per line and measurement."""
    bench(Shape.parse(shape), columns.split(), rounds, device)


if __name__ == "__main__":
    typer.run(main)
