"""The gradients of a decoder's code and rows, and of the encoder's rows, latent-major and in one pass over e and x.

    dv_nj     = scale <e_n, W_dec[i_nj]>
    dpre_nj   = dv_nj where values_nj != 0, else 0
    dW_dec[f] = scale * sum over entries (n, j) with i_nj = f of  values_nj e_n
    dW_enc[f] = sum of dpre_nj (x_n - b_dec),    db_enc[f] = sum of dpre_nj

`latent_kernel` keeps the latent's decoder row and its gradient rows in registers and reads each of e_n and x_n once for
all three results; the [N, k, d] products that a scatter would need never exist. It holds one whole row, d <= 8192. The
order of summation and the division of hot latents into segments are those of rows.py.

Bytes: N k 2 d times the element size gathered + W_dec once + the gradients 2 F d 4 (written, or read and written when
accumulating); 6 N k d flop. Roofline prediction (N 32768, d 4096, F 131072, k 64, bf16, H200): 34.4 GB gathered at 60 %
from HBM + 4.3 GB, 7 to 8 ms. Measured: 19.6 ms with the transposition of the codes (0.4), gradients written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .csc import CSC
from .launch import Tiles, device_scalar
from .rows import bias_of, combine, emit, head_latents, work_of


@triton.jit
def rounded_to(row, ptr):
    """A row of fp32 weights as the activations' dtype holds it: under autocast the forward pass saw no other."""
    return row.to(ptr.dtype.element_ty).to(tl.float32)


@triton.jit
def add_entries(
    begin, end, w, column, live, scale, e_ptr, x_ptr, values_ptr, order_ptr, b_dec_ptr, dvalues_ptr, k, d,
    ENCODER: tl.constexpr, DVALUES: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_D: tl.constexpr, UNROLL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """(dW_dec row, dW_enc row, db) summed over the CSC entries begin .. end of the latent whose decoder row is w."""
    lane = tl.arange(0, UNROLL)
    dw_dec = tl.zeros([BLOCK_D], dtype=tl.float32)
    dw_enc = tl.zeros([BLOCK_D], dtype=tl.float32)
    db = 0.0
    for position in tl.range(begin, end, UNROLL, num_stages=STAGES):
        used = position + lane < end
        entry = tl.load(order_ptr + position + lane, mask=used, other=0)
        source = (entry // k).to(tl.int64)[:, None] * d + column[None, :]
        inside = used[:, None] & live[None, :]
        value = tl.load(values_ptr + entry, mask=used, other=0.0).to(tl.float32)
        if ENCODER:
            # Fillers of value 0 have no gradient, and 0 times an infinity in their row would be NaN.
            inside = inside & (value != 0.0)[:, None]
        e = tl.load(e_ptr + source, mask=inside, other=0.0).to(tl.float32)
        dv = tl.sum(e * w[None, :], axis=1) * scale
        dw_dec += tl.sum((value * scale)[:, None] * e, axis=0)
        if DVALUES:
            tl.store(dvalues_ptr + entry, dv.to(dvalues_ptr.dtype.element_ty), mask=used)
        if ENCODER:
            dpre = tl.where(value != 0.0, dv, 0.0)
            x = tl.load(x_ptr + source, mask=inside, other=0.0).to(tl.float32)
            if HAS_BIAS:
                # From L1 every time: kept in registers it would cost as many as a gradient row.
                x -= tl.load(b_dec_ptr + column, mask=live, other=0.0)[None, :]
            dw_enc += tl.sum(dpre[:, None] * x, axis=0)
            db += tl.sum(dpre)
    return dw_dec, dw_enc, db


@triton.jit(do_not_specialize=["segments", "segment", "n_latents", "head_latents"])
def latent_kernel(
    e_ptr, x_ptr, values_ptr, order_ptr, offsets_ptr, ends_ptr, segment_latent_ptr, w_ptr, b_dec_ptr, scale_ptr,
    dvalues_ptr, dw_dec_ptr, dw_enc_ptr, db_ptr, part_dec_ptr, part_enc_ptr, part_db_ptr,
    k, d, n_latents, segments, segment, head_latents,
    ENCODER: tl.constexpr, DVALUES: tl.constexpr, HAS_BIAS: tl.constexpr, ACCUMULATE: tl.constexpr,
    BLOCK_D: tl.constexpr, UNROLL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program = one latent, or one segment of a hot one: dv, dW_dec and (ENCODER) dW_enc, db of its entries."""
    pid = tl.program_id(0)
    hot = pid < segments
    latent, begin, end, active = work_of(pid, offsets_ptr, ends_ptr, segment_latent_ptr, n_latents, segments, segment)
    if ACCUMULATE:
        active = active & (begin < end)
    if active:
        column = tl.arange(0, BLOCK_D)
        live = column < d
        if HAS_BIAS:
            b_dec_ptr = bias_of(b_dec_ptr, latent, head_latents, d)
        w = rounded_to(tl.load(w_ptr + latent * d + column, mask=live, other=0.0).to(tl.float32), e_ptr)
        dw_dec, dw_enc, db = add_entries(
            begin, end, w, column, live, tl.load(scale_ptr), e_ptr, x_ptr, values_ptr, order_ptr, b_dec_ptr,
            dvalues_ptr, k, d, ENCODER, DVALUES, HAS_BIAS, BLOCK_D, UNROLL, STAGES,
        )  # fmt: skip
        part = pid.to(tl.int64) * d
        emit(dw_dec_ptr + latent * d, part_dec_ptr + part, column, live, dw_dec, hot, ACCUMULATE)
        if ENCODER:
            emit(dw_enc_ptr + latent * d, part_enc_ptr + part, column, live, dw_enc, hot, ACCUMULATE)
            one = tl.arange(0, 1)
            emit(db_ptr + latent, part_db_ptr + pid, one, one == 0, tl.zeros([1], tl.float32) + db, hot, ACCUMULATE)


# (BLOCK_D, UNROLL, warps, stages): a thread holds 4 to 16 elements of every row; with 16, fp16 rows of 2048 spill on
# sm_100. From two stages on, the rows of the next entries are on their way while these are added; fp32 rows of 8192
# would spill with them on sm_90, and 16-bit rows of 512 with two stages, but not with three, on sm_100.
LATENT_BLOCKS = (
    (128, 4, 1, 2),
    (512, 2, 2, 3),
    (1024, 2, 2, 2),
    (2048, 2, 8, 2),
    (4096, 2, 16, 2),
    (8192, 1, 16, 1),
)


def block_tiles(block: tuple[int, int, int, int], **flags: bool) -> Tiles:
    """Tiles of a kernel around `add_entries`."""
    return Tiles({**flags, "BLOCK_D": block[0], "UNROLL": block[1], "STAGES": block[3]}, block[2])


def latent_tiles(d: int, **flags: bool) -> Tiles:
    """Tiles of `latent_kernel` for rows of d <= 8192 elements."""
    return block_tiles(next(b for b in LATENT_BLOCKS if b[0] >= d), **flags)


def launch_latents(
    e: Tensor,
    x: Tensor | None,
    values: Tensor,
    csc: CSC,
    W_dec: Tensor,
    b_dec: Tensor | None,
    scale: float | Tensor,
    dvalues: Tensor | None,
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None],
    accumulate: bool,
    hot_only: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches `latent_kernel` into (dW_dec, dW_enc, db_enc); returns the parts of the hot latents' rows."""
    d = W_dec.shape[-1]
    n_latents = W_dec.numel() // d
    segments = csc.segment_latent.numel()
    encoder = x is not None
    part_dec = torch.empty(segments, d, dtype=torch.float32, device=e.device)
    part_enc = torch.empty(segments if encoder else 0, d, dtype=torch.float32, device=e.device)
    part_db = torch.empty(segments, 1, dtype=torch.float32, device=e.device)
    programs = segments if hot_only else segments + n_latents
    if programs:
        tiles = latent_tiles(
            d,
            ENCODER=encoder,
            DVALUES=dvalues is not None,
            HAS_BIAS=b_dec is not None,
            ACCUMULATE=accumulate,
        )
        latent_kernel[(programs,)](
            e, x, values, csc.order, csc.offsets, csc.segment_ends, csc.segment_latent, W_dec, b_dec,
            device_scalar(scale, e.device), dvalues, *gradients, part_dec, part_enc, part_db,
            values.shape[-1], d, n_latents, segments, csc.segment, head_latents(n_latents, b_dec), **tiles.options(),
        )  # fmt: skip
    return part_dec, part_enc, part_db


def hot_parts(
    e: Tensor, x: Tensor, values: Tensor, csc: CSC, W_dec: Tensor, b_dec: Tensor | None, scale: float | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Parts [segments, d], [segments, d], [segments, 1] of dW_dec, dW_enc, db_enc of the hot latents alone."""
    # Hot programs write parts only; e stands in for the gradients, whose type decides the unused stores' type.
    return launch_latents(e, x, values, csc, W_dec, b_dec, scale, None, (e, e, e), accumulate=False, hot_only=True)


def launch_gradients(
    e: Tensor,
    x: Tensor | None,
    values: Tensor,
    csc: CSC,
    W_dec: Tensor,
    b_dec: Tensor | None,
    scale: float | Tensor,
    dvalues: Tensor | None,
    dW_dec: Tensor,
    dW_enc: Tensor | None,
    db_enc: Tensor | None,
    accumulate: bool,
) -> None:
    gradients = (dW_dec, dW_enc, db_enc)
    parts = launch_latents(e, x, values, csc, W_dec, b_dec, scale, dvalues, gradients, accumulate)
    for part, gradient in zip(parts, gradients, strict=True):
        if gradient is not None:
            combine(part, gradient.view(-1, part.shape[1]), csc, accumulate)
