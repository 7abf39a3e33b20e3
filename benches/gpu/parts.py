"""The parts of a training step, one call each: encode, decode, transpose, backward; what benches.gpu.sae times."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import refusal_kernels as rk
from refusal_kernels.backends import BACKENDS
from refusal_kernels.triton_kernels import csc, encode, int8_screen
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
    rows.attempt("encode, ours", lambda: measure(o.encode, rounds), path=encode.path_of(o.W_enc.shape, k))
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


def measure_csr(o: Operands, rounds: int, rows: Rows) -> None:
    """Rows of codes with k latents per row on average: BatchTopK, a threshold that leaves as many, their decoder."""
    weights = (o.W_enc, o.b_enc)
    values, latents, offsets = rk.batch_topk_encode(o.x, *weights, o.k, o.b_dec)
    least = values.min().float()

    def eager() -> Any:
        pre = torch.addmm(o.b_enc.to(o.x.dtype), o.x - o.b_dec.to(o.x.dtype), o.W_enc.T).relu_()
        return pre.flatten().topk(o.x.shape[0] * o.k)

    def timed(name: str, run: Callable[[], Any]) -> None:
        rows.attempt(name, lambda: measure(run, rounds))

    timed("encode, batch top-k", lambda: rk.batch_topk_encode(o.x, *weights, o.k, o.b_dec))
    timed("encode, batch top-k, torch", eager)
    timed("encode, threshold", lambda: rk.threshold_encode(o.x, *weights, least, o.b_dec))
    code = (values, latents, offsets)
    rows.attempt("encode, batch top-k, agreement", lambda: csr_agreement(o, code, least))
    rows.attempt(
        "encode, threshold, agreement",
        lambda: csr_agreement(o, rk.threshold_encode(o.x, *weights, least, o.b_dec), least),
    )
    timed("decode, CSR", lambda: rk.sparse_decode_csr(*code, o.W_dec, o.b_dec))


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


def sampled(o: Operands) -> tuple[Tensor, Tensor]:
    """Numbers of SAMPLE rows, and their pre-activations after the ReLU in fp32 sums."""
    rows = torch.linspace(0, o.x.shape[0] - 1, min(SAMPLE, o.x.shape[0]), device=o.x.device).long()
    centred = o.x[rows].float() - o.b_dec
    pre = torch.empty(len(rows), o.W_enc.shape[0], device=o.x.device)
    for first in range(0, o.W_enc.shape[0], 1 << 16):
        part = slice(first, first + (1 << 16))
        pre[:, part] = torch.addmm(o.b_enc[part], centred, o.W_enc[part].float().T).relu_()
    return rows, pre


def agreement(o: Operands, values: Tensor, indices: Tensor) -> dict[str, float]:
    """Share of the sampled rows' latents that a stable sort of fp32 sums selects too, and the largest error of a value
    relative to the row's first."""
    rows, pre = sampled(o)
    best = torch.sort(pre, dim=1, descending=True, stable=True)
    wanted = best.indices[:, : o.k]
    hit = (indices[rows, :, None] == wanted[:, None, :]).any(2)
    off = (values[rows].float() - pre.gather(1, indices[rows])).abs() / best.values[:, :1].clamp(min=1e-6)
    return {"same_latents": hit.float().mean().item(), "value_error": off.max().item()}


def csr_agreement(o: Operands, code: tuple[Tensor, Tensor, Tensor], least: Tensor) -> dict[str, float]:
    """Of the sampled rows' latents in the code and of those above `least` in fp32 sums the share that is in both, and
    the largest error of a value relative to its row's largest. What is rounded to `least` in either counts as both."""
    values, latents, offsets = code
    rows, pre = sampled(o)
    got = torch.zeros_like(pre)
    for i, (start, end) in enumerate(zip(offsets[rows].tolist(), offsets[rows + 1].tolist(), strict=True)):
        got[i, latents[start:end]] = values[start:end].float()
    rounded = pre.to(values.dtype).float()
    sure = (got > least) | (rounded > least)
    both = (got > 0) & (rounded >= least)
    same = (both & sure).sum() / sure.sum().clamp(min=1)
    off = torch.where(both, (got - pre).abs(), 0).amax(1) / pre.amax(1).clamp(min=1e-6)
    return {"same_latents": same.item(), "value_error": off.max().item()}


def screened(o: Operands) -> dict[str, Any]:
    """What the 8-bit screen left: products computed per row that it took, the share of rows that it gave up, and its
    agreement as above."""
    values, indices = o.encode("triton-int8")
    found = agreement(o, values, indices)
    computed = int8_screen.screen(o.x, o.W_enc, o.b_enc, o.k, o.b_dec, values, indices)
    taken = computed[(computed >= 0) & (computed < o.W_enc.shape[0])].float()
    return {"computed": taken.mean().item(), "given_up": (computed < 0).float().mean().item(), **found}
