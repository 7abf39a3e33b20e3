"""The parts of a training step, one call each: encode, decode, transpose, backward; what benches.gpu.sae times."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import refusal_kernels as rk
from refusal_kernels.backends import BACKENDS
from refusal_kernels.triton_kernels import csc, int8_screen
from refusal_kernels.triton_kernels.backward import segment_length

from .clock import measure
from .rows import Rows

SAMPLE = 256  # rows whose encoding is compared
PRODUCT_BYTES = 4 << 30  # of the product's output at a time


@dataclass(frozen=True)
class Operands:
    """x [N, d] and weights [F, d] in bf16, biases in fp32."""

    x: Tensor
    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    k: int

    def encode(self, backend: str = "triton") -> tuple[Tensor, Tensor]:
        return rk.topk_encode(self.x, self.W_enc, self.b_enc, self.k, self.b_dec, backend=backend)


def measure_parts(o: Operands, rounds: int, rows: Rows) -> None:
    """Rows of the Triton back-end, of PyTorch, and of the product alone."""
    n, k = o.x.shape[0], o.k
    n_latents, d = o.W_enc.shape

    def timed(name: str, run: Callable[[], Any]) -> None:
        rows.attempt(name, lambda: measure(run, rounds))

    def alone() -> dict[str, Any]:
        block = min(n, max(1, PRODUCT_BYTES // (2 * n_latents)))
        product = torch.empty(block, n_latents, dtype=o.x.dtype, device=o.x.device)

        def run() -> None:
            for start in range(0, n, block):
                torch.mm(o.x[start : start + block], o.W_enc.T, out=product[: min(block, n - start)])

        return measure(run, rounds)

    def eager() -> tuple[Tensor, Tensor]:
        return torch.addmm(o.b_enc.to(o.x.dtype), o.x - o.b_dec.to(o.x.dtype), o.W_enc.T).relu_().topk(k, dim=1)

    rows.attempt("product alone", alone)
    timed("encode, torch", eager)
    timed("encode, ours", o.encode)
    backend: Any = BACKENDS["triton"]
    values, indices = o.encode()
    rows.attempt("encode, agreement", lambda: agreement(o, values, indices))
    e, _ = backend.decode_residual(o.x, values, indices, o.W_dec, o.b_dec)
    timed("decode + residual, ours", lambda: backend.decode_residual(o.x, values, indices, o.W_dec, o.b_dec))
    timed("decode, embedding_bag", lambda: torch.nn.functional.embedding_bag(
        indices, o.W_dec, mode="sum", per_sample_weights=values))  # fmt: skip
    timed("transpose, ours", lambda: csc.csc_from_indices(indices, n_latents, segment_length(n * k, d)))
    rows.attempt("backward, ours", lambda: backward(o, e, values, indices, "triton", rounds))


def measure_others(o: Operands, rounds: int, rows: Rows) -> None:
    """Rows of the back-ends that run by explicit request only."""

    def timed(name: str, run: Callable[[], Any]) -> None:
        rows.attempt(name, lambda: measure(run, rounds))

    values, indices = o.encode()
    backend: Any = BACKENDS["triton"]
    e, _ = backend.decode_residual(o.x, values, indices, o.W_dec, o.b_dec)
    timed("decode, cuda", lambda: rk.sparse_decode(values, indices, o.W_dec, o.b_dec, backend="cuda"))
    timed("encode, cuda filter", lambda: o.encode("cuda"))
    rows.attempt("encode, cuda filter, agreement", lambda: agreement(o, *o.encode("cuda")))
    rows.attempt("backward, cuda", lambda: backward(o, e, values, indices, "cuda", rounds))
    timed("encode, int8 screen", lambda: o.encode("triton-int8"))
    rows.attempt("encode, int8 screen, left", lambda: screened(o))


def backward(o: Operands, e: Tensor, values: Tensor, indices: Tensor, backend: str, rounds: int) -> dict[str, Any]:
    """sae_backward into gradients of its own."""
    n_latents, d = o.W_enc.shape
    gradients = [torch.zeros(size, device=o.x.device) for size in ((n_latents, d), (n_latents,), (n_latents, d))]
    chosen: Any = BACKENDS[backend]
    weights = (o.W_enc, o.W_dec, o.b_dec)
    return measure(
        lambda: chosen.sae_backward(
            e, o.x, values, indices, *weights, 2 / o.x.shape[0], *gradients, accumulate=False
        ),
        rounds,
    )  # fmt: skip


def agreement(o: Operands, values: Tensor, indices: Tensor) -> dict[str, float]:
    """Share of the sampled rows' latents that a stable sort of fp32 sums selects too, and the largest error of a value
    relative to the row's first."""
    rows = torch.linspace(0, o.x.shape[0] - 1, min(SAMPLE, o.x.shape[0]), device=o.x.device).long()
    centred = o.x[rows].float() - o.b_dec
    pre = torch.empty(len(rows), o.W_enc.shape[0], device=o.x.device)
    for first in range(0, o.W_enc.shape[0], 1 << 16):
        part = slice(first, first + (1 << 16))
        pre[:, part] = torch.addmm(o.b_enc[part], centred, o.W_enc[part].float().T).relu_()
    best = torch.sort(pre, dim=1, descending=True, stable=True)
    wanted = best.indices[:, : o.k]
    hit = (indices[rows, :, None] == wanted[:, None, :]).any(2)
    off = (values[rows].float() - pre.gather(1, indices[rows])).abs() / best.values[:, :1].clamp(min=1e-6)
    return {"same_latents": hit.float().mean().item(), "value_error": off.max().item()}


def screened(o: Operands) -> dict[str, Any]:
    """What the 8-bit screen left: products computed per row that it took, the share of rows that it gave up, and its
    agreement as above."""
    values, indices = o.encode("triton-int8")
    found = agreement(o, values, indices)
    computed = int8_screen.screen(o.x, o.W_enc, o.b_enc, o.k, o.b_dec, values, indices)
    taken = computed[(computed >= 0) & (computed < o.W_enc.shape[0])].float()
    return {"computed": taken.mean().item(), "given_up": (computed < 0).float().mean().item(), **found}
