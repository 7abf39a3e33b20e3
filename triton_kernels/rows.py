"""Sums of weighted rows per latent, for coefficients that are already known: the weight gradients of both matrices.

    out[f] = scale * sum over entries (n, j) with i_nj = f of  c_nj (rows_n - b_dec)          [F, d]
    db[f]  = scale * sum of c_nj                                                              [F]

Entries come from a stable CSC of the indices (csc.py), so a latent's tokens are added in ascending order, the same
bits every time, without atomics: whoever owns a latent adds up its row alone.

An entry's row is its number divided by k; of a CSR code, whose rows have different lengths, it is read from `tokens`
[nnz] (csc.py).

A hot latent (more than `segment` entries) is worked on by several programs. Each writes its partial row to a
workspace and `combine_kernel` adds the parts in order. Programs of hot segments come first in the grid, so the
longest work starts first. latents.py divides its work in the same way, with the same helpers.

Bytes: N k d times the element size gathered + the sums F d written (or read and written when accumulating); 2 N k d
flop. Roofline prediction (N 32768, d 4096, F 131072, k 64, bf16, H200): 17.2 GB gathered at 60 % from HBM + 1.1 GB, 3.5
to 4 ms.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .csc import CSC
from .launch import Tiles, device_scalar


@triton.jit
def work_of(pid, offsets_ptr, ends_ptr, segment_latent_ptr, n_latents, segments, segment):
    """(latent, first entry, end, whether there is work) of a program; programs below `segments` serve hot latents."""
    latent = (pid - segments).to(tl.int64)
    if pid < segments:
        latent = tl.load(segment_latent_ptr + pid)
    exists = latent < n_latents
    begin = tl.load(offsets_ptr + latent, mask=exists, other=0)
    end = tl.load(offsets_ptr + latent + 1, mask=exists, other=0)
    active = exists & (end - begin <= segment)
    if pid < segments:
        parts = tl.cdiv(end - begin, segment)
        begin += (pid - (tl.load(ends_ptr + latent, mask=exists, other=0) - parts)) * segment
        end = tl.minimum(end, begin + segment)
        active = exists
    return latent, begin, end, active


@triton.jit
def emit(out_row, part_row, column, live, row, hot, ACCUMULATE: tl.constexpr):
    """A finished (piece of a) gradient row: into the workspace for a hot segment, else into (or onto) the gradient."""
    if hot:
        tl.store(part_row + column, row, mask=live)
    else:
        if ACCUMULATE:
            row += tl.load(out_row + column, mask=live, other=0.0).to(tl.float32)
        tl.store(out_row + column, row.to(out_row.dtype.element_ty), mask=live)


@triton.jit
def bias_of(b_dec_ptr, latent, head_latents, d):
    """The b_dec of a latent's head, from b_dec [H, d]; without heads `head_latents` is all of them and H is 1."""
    return b_dec_ptr + (latent.to(tl.int32) // head_latents) * d


@triton.jit(do_not_specialize=["segments", "segment", "n_latents", "head_latents"])
def rows_kernel(
    rows_ptr, coefficients_ptr, order_ptr, offsets_ptr, ends_ptr, segment_latent_ptr, tokens_ptr, b_dec_ptr, scale_ptr,
    out_ptr, db_ptr, part_ptr, part_db_ptr, k, d, n_latents, segments, segment, head_latents,
    CSR: tl.constexpr, ROWS: tl.constexpr, HAS_BIAS: tl.constexpr, SUM: tl.constexpr, ACCUMULATE: tl.constexpr,
    BLOCK_D: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """out[f] = scale * sum of c_nj (rows_n - b_dec) in BLOCK_D columns, and (SUM) db[f] = scale * sum of c_nj."""
    pid = tl.program_id(0)
    hot = pid < segments
    latent, begin, end, active = work_of(pid, offsets_ptr, ends_ptr, segment_latent_ptr, n_latents, segments, segment)
    if ACCUMULATE:
        active = active & (begin < end)
    if active:
        column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        live = column < d
        lane = tl.arange(0, UNROLL)
        scale = tl.load(scale_ptr)
        if HAS_BIAS:
            b_dec_ptr = bias_of(b_dec_ptr, latent, head_latents, d)
        total = tl.zeros([BLOCK_D], dtype=tl.float32)
        db = 0.0
        for position in range(begin, end, UNROLL):
            used = position + lane < end
            entry = tl.load(order_ptr + position + lane, mask=used, other=0)
            c = tl.load(coefficients_ptr + entry, mask=used, other=0.0).to(tl.float32) * scale
            if SUM:
                db += tl.sum(c)
            if ROWS:
                if CSR:
                    token = tl.load(tokens_ptr + entry, mask=used, other=0)
                else:
                    token = entry // k
                source = token.to(tl.int64)[:, None] * d + column[None, :]
                read = used
                if SUM:
                    # The encoder's gradient: fillers have none, and 0 times an infinity in their row would be NaN.
                    read = used & (c != 0.0)
                rows = tl.load(rows_ptr + source, mask=read[:, None] & live[None, :], other=0.0).to(tl.float32)
                if HAS_BIAS:
                    rows -= tl.load(b_dec_ptr + column, mask=live, other=0.0)[None, :]
                total += tl.sum(c[:, None] * rows, axis=0)
        if ROWS:
            emit(out_ptr + latent * d, part_ptr + pid.to(tl.int64) * d, column, live, total, hot, ACCUMULATE)
        if SUM:
            one = tl.arange(0, 1)
            leader = one == tl.program_id(1)
            emit(db_ptr + latent, part_db_ptr + pid, one, leader, tl.zeros([1], tl.float32) + db, hot, ACCUMULATE)


@triton.jit(do_not_specialize=["segment", "n_latents"])
def combine_kernel(
    part_ptr, out_ptr, offsets_ptr, ends_ptr, segment_latent_ptr, d, n_latents, segment,
    ACCUMULATE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The program of a hot latent's first segment adds the latent's parts [segments, d] in order."""
    pid = tl.program_id(0)
    latent = tl.load(segment_latent_ptr + pid)
    exists = latent < n_latents
    begin = tl.load(offsets_ptr + latent, mask=exists, other=0)
    end = tl.load(offsets_ptr + latent + 1, mask=exists, other=0)
    parts = tl.cdiv(end - begin, segment)
    first = tl.load(ends_ptr + latent, mask=exists, other=0) - parts
    if exists & (first == pid):
        column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        live = column < d
        total = tl.zeros([BLOCK_D], dtype=tl.float32)
        for part in range(first, first + parts):
            total += tl.load(part_ptr + part * d + column, mask=live, other=0.0)
        if ACCUMULATE:
            total += tl.load(out_ptr + latent * d + column, mask=live, other=0.0).to(tl.float32)
        tl.store(out_ptr + latent * d + column, total.to(out_ptr.dtype.element_ty), mask=live)


# (BLOCK_D, UNROLL, warps): a thread holds 4 to 16 elements of every row.
ROWS_BLOCKS = ((128, 8, 1), (512, 8, 2), (1024, 4, 4))
_COMBINE_BLOCK, _COMBINE_WARPS = 512, 4


def rows_tiles(d: int, **flags: bool) -> Tiles:
    return with_flags(next((b for b in ROWS_BLOCKS if b[0] >= d), ROWS_BLOCKS[-1]), **flags)


def with_flags(block: tuple[int, int, int], **flags: bool) -> Tiles:
    return Tiles({**flags, "BLOCK_D": block[0], "UNROLL": block[1]}, block[2])


def combine_tiles(accumulate: bool) -> Tiles:
    return Tiles({"ACCUMULATE": accumulate, "BLOCK_D": _COMBINE_BLOCK}, _COMBINE_WARPS)


def combine(part: Tensor, out: Tensor, csc: CSC, accumulate: bool) -> None:
    """out [F, d] gets the rows of hot latents from part [segments, d]."""
    segments, d = part.shape
    if segments:
        combine_kernel[(segments, triton.cdiv(d, _COMBINE_BLOCK))](
            part, out, csc.offsets, csc.segment_ends, csc.segment_latent, d, out.shape[0], csc.segment,
            **combine_tiles(accumulate).options(),
        )  # fmt: skip


def head_latents(n_latents: int, b_dec: Tensor | None) -> int:
    """How many of the `n_latents` latents share a row of b_dec [d] or [H, d]."""
    return n_latents if b_dec is None or b_dec.dim() == 1 else n_latents // b_dec.shape[0]


def launch_rows(
    rows: Tensor | None,
    coefficients: Tensor,
    csc: CSC,
    b_dec: Tensor | None,
    scale: float | Tensor,
    out: Tensor | None,
    db: Tensor | None,
    accumulate: bool,
    tokens: Tensor | None = None,
) -> None:
    """`coefficients` [N, k], or [nnz] with `tokens` [nnz] int32, the row of each entry."""
    n_latents = csc.offsets.numel() - 1
    d = 1 if out is None else out.shape[-1]
    segments = csc.segment_latent.numel()
    part = torch.empty(segments if out is not None else 0, d, dtype=torch.float32, device=coefficients.device)
    part_db = torch.empty(segments, 1, dtype=torch.float32, device=coefficients.device)
    tiles = rows_tiles(
        d,
        CSR=tokens is not None and out is not None,
        ROWS=out is not None,
        HAS_BIAS=b_dec is not None,
        SUM=db is not None,
        ACCUMULATE=accumulate,
    )
    rows_kernel[(segments + n_latents, triton.cdiv(d, tiles.constexprs["BLOCK_D"]))](
        rows, coefficients, csc.order, csc.offsets, csc.segment_ends, csc.segment_latent, tokens, b_dec,
        device_scalar(scale, coefficients.device), out, db, part, part_db,
        coefficients.shape[-1] if tokens is None else 0, d, n_latents, segments, csc.segment,
        head_latents(n_latents, b_dec), **tiles.options(),
    )  # fmt: skip
    if out is not None:
        combine(part, out.view(n_latents, d), csc, accumulate)
    if db is not None:
        combine(part_db, db.view(n_latents, 1), csc, accumulate)
