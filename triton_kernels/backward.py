"""The backward passes, latent-major: whoever owns a latent adds up its gradient rows alone, in a fixed order, without
atomics.

    dv_nj     = <g_n, W_dec[i_nj]>                        g = scale * e, or the incoming gradient
    dpre_nj   = dv_nj where values_nj != 0, else 0
    dW_dec[f] = sum over entries (n, j) with i_nj = f of  values_nj g_n
    dW_enc[f] = sum of dpre_nj (x_n - b_dec),    db_enc[f] = sum of dpre_nj

Entries come from a stable CSC of the indices (csc.py), so a latent's tokens are added in ascending order, the same
bits every time. `_latent_kernel` keeps the latent's decoder row and its gradient rows in registers and reads each of
e_n and x_n once for all three results; the [N, k, d] products that a scatter would need never exist. It holds one
whole row, d <= 8192. Wider rows, and gradients whose coefficients are already known, go through `_dvalues_kernel`
(token-major) and `_rows_kernel`, which cut d.

A hot latent (more than `segment` entries) is worked on by several programs. Each writes its partial row to a
workspace and `_combine_kernel` adds the parts in order. Programs of hot segments come first in the grid, so the
longest work starts first.

Bytes (sae_backward): N k 2 d times the element size gathered + W_dec once + the gradients 2 F d 4 (written, or read
and written when accumulating); 6 N k d flop. Roofline prediction (N 32768, d 4096, F 131072, k 64, bf16, H200): 34.4
GB gathered at 60 % from HBM + 4.3 GB, 7 to 8 ms. Compiled for sm_80/90/100, checked in the interpreter, not yet run
on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .csc import CSC, csc_from_indices
from .decode import sparse_decode
from .launch import Configuration, Tiles, device_scalar, next_power_of_2, on_device

_PARTIAL_BYTES = 64 << 20  # bound on the workspace of hot segments
_WIDEST_ROW = 8192  # a row that 16 warps hold in registers beside its gradients


@triton.jit
def _work_of(pid, offsets_ptr, ends_ptr, segment_latent_ptr, n_latents, segments, segment):
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
def _emit(out_row, part_row, column, live, row, hot, ACCUMULATE: tl.constexpr):
    """A finished (piece of a) gradient row: into the workspace for a hot segment, else into (or onto) the gradient."""
    if hot:
        tl.store(part_row + column, row, mask=live)
    else:
        if ACCUMULATE:
            row += tl.load(out_row + column, mask=live, other=0.0).to(tl.float32)
        tl.store(out_row + column, row.to(out_row.dtype.element_ty), mask=live)


@triton.jit
def add_entries(
    begin, end, w, column, live, scale, e_ptr, x_ptr, values_ptr, order_ptr, b_dec_ptr, dvalues_ptr, k, d,
    ENCODER: tl.constexpr, DVALUES: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_D: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """(dW_dec row, dW_enc row, db) summed over the CSC entries begin .. end of the latent whose decoder row is w."""
    lane = tl.arange(0, UNROLL)
    dw_dec = tl.zeros([BLOCK_D], dtype=tl.float32)
    dw_enc = tl.zeros([BLOCK_D], dtype=tl.float32)
    db = 0.0
    for position in range(begin, end, UNROLL):
        used = position + lane < end
        entry = tl.load(order_ptr + position + lane, mask=used, other=0)
        source = (entry // k).to(tl.int64)[:, None] * d + column[None, :]
        inside = used[:, None] & live[None, :]
        value = tl.load(values_ptr + entry, mask=used, other=0.0).to(tl.float32)
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


@triton.jit(do_not_specialize=["segments", "segment", "n_latents"])
def _latent_kernel(
    e_ptr, x_ptr, values_ptr, order_ptr, offsets_ptr, ends_ptr, segment_latent_ptr, w_ptr, b_dec_ptr, scale_ptr,
    dvalues_ptr, dw_dec_ptr, dw_enc_ptr, db_ptr, part_dec_ptr, part_enc_ptr, part_db_ptr,
    k, d, n_latents, segments, segment,
    ENCODER: tl.constexpr, DVALUES: tl.constexpr, HAS_BIAS: tl.constexpr, ACCUMULATE: tl.constexpr,
    BLOCK_D: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """One program = one latent, or one segment of a hot one: dv, dW_dec and (ENCODER) dW_enc, db of its entries."""
    pid = tl.program_id(0)
    hot = pid < segments
    latent, begin, end, active = _work_of(pid, offsets_ptr, ends_ptr, segment_latent_ptr, n_latents, segments, segment)
    if ACCUMULATE:
        active = active & (begin < end)
    if active:
        column = tl.arange(0, BLOCK_D)
        live = column < d
        w = tl.load(w_ptr + latent * d + column, mask=live, other=0.0).to(tl.float32)
        dw_dec, dw_enc, db = add_entries(
            begin, end, w, column, live, tl.load(scale_ptr), e_ptr, x_ptr, values_ptr, order_ptr, b_dec_ptr,
            dvalues_ptr, k, d, ENCODER, DVALUES, HAS_BIAS, BLOCK_D, UNROLL,
        )  # fmt: skip
        part = pid.to(tl.int64) * d
        _emit(dw_dec_ptr + latent * d, part_dec_ptr + part, column, live, dw_dec, hot, ACCUMULATE)
        if ENCODER:
            _emit(dw_enc_ptr + latent * d, part_enc_ptr + part, column, live, dw_enc, hot, ACCUMULATE)
            one = tl.arange(0, 1)
            _emit(db_ptr + latent, part_db_ptr + pid, one, one == 0, tl.zeros([1], tl.float32) + db, hot, ACCUMULATE)


@triton.jit(do_not_specialize=["segments", "segment", "n_latents"])
def _rows_kernel(
    rows_ptr, coefficients_ptr, order_ptr, offsets_ptr, ends_ptr, segment_latent_ptr, b_dec_ptr, scale_ptr,
    out_ptr, db_ptr, part_ptr, part_db_ptr, k, d, n_latents, segments, segment,
    ROWS: tl.constexpr, HAS_BIAS: tl.constexpr, SUM: tl.constexpr, ACCUMULATE: tl.constexpr,
    BLOCK_D: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """out[f] = scale * sum of c_nj (rows_n - b_dec) in BLOCK_D columns, and (SUM) db[f] = scale * sum of c_nj."""
    pid = tl.program_id(0)
    hot = pid < segments
    latent, begin, end, active = _work_of(pid, offsets_ptr, ends_ptr, segment_latent_ptr, n_latents, segments, segment)
    if ACCUMULATE:
        active = active & (begin < end)
    if active:
        column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        live = column < d
        lane = tl.arange(0, UNROLL)
        scale = tl.load(scale_ptr)
        total = tl.zeros([BLOCK_D], dtype=tl.float32)
        db = 0.0
        for position in range(begin, end, UNROLL):
            used = position + lane < end
            entry = tl.load(order_ptr + position + lane, mask=used, other=0)
            c = tl.load(coefficients_ptr + entry, mask=used, other=0.0).to(tl.float32) * scale
            if SUM:
                db += tl.sum(c)
            if ROWS:
                source = (entry // k).to(tl.int64)[:, None] * d + column[None, :]
                rows = tl.load(rows_ptr + source, mask=used[:, None] & live[None, :], other=0.0).to(tl.float32)
                if HAS_BIAS:
                    rows -= tl.load(b_dec_ptr + column, mask=live, other=0.0)[None, :]
                total += tl.sum(c[:, None] * rows, axis=0)
        if ROWS:
            _emit(out_ptr + latent * d, part_ptr + pid.to(tl.int64) * d, column, live, total, hot, ACCUMULATE)
        if SUM:
            one = tl.arange(0, 1)
            leader = one == tl.program_id(1)
            _emit(db_ptr + latent, part_db_ptr + pid, one, leader, tl.zeros([1], tl.float32) + db, hot, ACCUMULATE)


@triton.jit(do_not_specialize=["segment", "n_latents"])
def _combine_kernel(
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


@triton.jit
def _dvalues_kernel(
    g_ptr, indices_ptr, w_ptr, scale_ptr, dvalues_ptr, k, d, UNROLL: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """dvalues[n, j] = scale * <g_n, W[indices_nj]> for UNROLL neighbouring j of one token, any d."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.program_id(1) * UNROLL + tl.arange(0, UNROLL)
    used = slot < k
    latent = tl.load(indices_ptr + token * k + slot, mask=used, other=0).to(tl.int64)
    total = tl.zeros([UNROLL, BLOCK_D], dtype=tl.float32)
    for start in range(0, d, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        live = column < d
        g = tl.load(g_ptr + token * d + column, mask=live, other=0.0).to(tl.float32)
        w = tl.load(w_ptr + latent[:, None] * d + column[None, :], mask=used[:, None] & live[None, :], other=0.0)
        total += g[None, :] * w.to(tl.float32)
    dv = tl.sum(total, axis=1) * tl.load(scale_ptr)
    tl.store(dvalues_ptr + token * k + slot, dv.to(dvalues_ptr.dtype.element_ty), mask=used)


# (BLOCK_D, UNROLL, warps): a thread holds 4 to 16 elements of every row.
_LATENT_BLOCKS = ((128, 4, 1), (512, 2, 2), (1024, 2, 2), (2048, 2, 4), (4096, 2, 16), (8192, 1, 16))
_ROWS_BLOCKS = ((128, 8, 1), (512, 8, 2), (1024, 4, 4))
_DVALUES = Tiles({"UNROLL": 8, "BLOCK_D": 512}, num_warps=4)
_COMBINE_BLOCK, _COMBINE_WARPS = 512, 4


def latent_tiles(d: int, **flags: bool) -> Tiles:
    """Tiles of `_latent_kernel` for rows of d <= 8192 elements."""
    return _with_flags(next(b for b in _LATENT_BLOCKS if b[0] >= d), **flags)


def rows_tiles(d: int, **flags: bool) -> Tiles:
    return _with_flags(next((b for b in _ROWS_BLOCKS if b[0] >= d), _ROWS_BLOCKS[-1]), **flags)


def _with_flags(block: tuple[int, int, int], **flags: bool) -> Tiles:
    return Tiles({**flags, "BLOCK_D": block[0], "UNROLL": block[1]}, block[2])


def _combine_tiles(accumulate: bool) -> Tiles:
    return Tiles({"ACCUMULATE": accumulate, "BLOCK_D": _COMBINE_BLOCK}, _COMBINE_WARPS)


def segment_length(entries: int, d: int) -> int:
    """Entries per segment: at least 256, and long enough that the partial rows of both matrices fit their workspace."""
    return max(256, next_power_of_2(-(-2 * entries * 2 * d * 4 // _PARTIAL_BYTES)))


def _combine(part: Tensor, out: Tensor, csc: CSC, accumulate: bool) -> None:
    """out [F, d] gets the rows of hot latents from part [segments, d]."""
    segments, d = part.shape
    if segments:
        _combine_kernel[(segments, triton.cdiv(d, _COMBINE_BLOCK))](
            part, out, csc.offsets, csc.segment_ends, csc.segment_latent, d, out.shape[0], csc.segment,
            **_combine_tiles(accumulate).options(),
        )  # fmt: skip


def _launch_latents(
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
    """Launches `_latent_kernel` into (dW_dec, dW_enc, db_enc); returns the parts of the hot latents' rows."""
    n_latents, d = W_dec.shape
    segments = csc.segment_latent.numel()
    encoder = x is not None
    part_dec = torch.empty(segments, d, dtype=torch.float32, device=e.device)
    part_enc = torch.empty(segments if encoder else 0, d, dtype=torch.float32, device=e.device)
    part_db = torch.empty(segments, 1, dtype=torch.float32, device=e.device)
    programs = segments if hot_only else segments + n_latents
    if programs:
        tiles = latent_tiles(
            d, ENCODER=encoder, DVALUES=dvalues is not None, HAS_BIAS=b_dec is not None, ACCUMULATE=accumulate
        )
        _latent_kernel[(programs,)](
            e, x, values, csc.order, csc.offsets, csc.segment_ends, csc.segment_latent, W_dec, b_dec,
            device_scalar(scale, e.device), dvalues, *gradients, part_dec, part_enc, part_db,
            values.shape[1], d, n_latents, segments, csc.segment, **tiles.options(),
        )  # fmt: skip
    return part_dec, part_enc, part_db


def hot_parts(
    e: Tensor, x: Tensor, values: Tensor, csc: CSC, W_dec: Tensor, b_dec: Tensor | None, scale: float | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Parts [segments, d], [segments, d], [segments, 1] of dW_dec, dW_enc, db_enc of the hot latents alone."""
    # Hot programs write parts only; e stands in for the gradients, whose type decides the unused stores' type.
    return _launch_latents(e, x, values, csc, W_dec, b_dec, scale, None, (e, e, e), accumulate=False, hot_only=True)


def _launch_gradients(
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
    parts = _launch_latents(e, x, values, csc, W_dec, b_dec, scale, dvalues, gradients, accumulate)
    for part, gradient in zip(parts, gradients, strict=True):
        if gradient is not None:
            _combine(part, gradient.view(gradient.shape[0], -1), csc, accumulate)


def _launch_rows(
    rows: Tensor | None,
    coefficients: Tensor,
    csc: CSC,
    b_dec: Tensor | None,
    scale: float | Tensor,
    out: Tensor | None,
    db: Tensor | None,
    accumulate: bool,
) -> None:
    n_latents = csc.offsets.numel() - 1
    d = 1 if out is None else out.shape[1]
    segments = csc.segment_latent.numel()
    part = torch.empty(segments if out is not None else 0, d, dtype=torch.float32, device=coefficients.device)
    part_db = torch.empty(segments, 1, dtype=torch.float32, device=coefficients.device)
    tiles = rows_tiles(d, ROWS=out is not None, HAS_BIAS=b_dec is not None, SUM=db is not None, ACCUMULATE=accumulate)
    _rows_kernel[(segments + n_latents, triton.cdiv(d, tiles.constexprs["BLOCK_D"]))](
        rows, coefficients, csc.order, csc.offsets, csc.segment_ends, csc.segment_latent, b_dec,
        device_scalar(scale, coefficients.device), out, db, part, part_db,
        coefficients.shape[1], d, n_latents, segments, csc.segment, **tiles.options(),
    )  # fmt: skip
    if out is not None:
        _combine(part, out, csc, accumulate)
    if db is not None:
        _combine(part_db, db.view(n_latents, 1), csc, accumulate)


def _launch_dvalues(g: Tensor, indices: Tensor, W: Tensor, scale: float | Tensor, dvalues: Tensor) -> None:
    n, k = indices.shape
    if n:
        _dvalues_kernel[(n, triton.cdiv(k, _DVALUES.constexprs["UNROLL"]))](
            g, indices, W, device_scalar(scale, g.device), dvalues, k, W.shape[1], **_DVALUES.options()
        )


def sparse_decode_backward(
    grad: Tensor,
    values: Tensor,
    indices: Tensor,
    W_dec: Tensor,
    need_values: bool,
    need_W: bool,
    *,
    segment: int | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """(dvalues [N, k] in values' dtype or None, dW_dec [F, d] in W_dec's dtype or None); sums in fp32.

    grad [N, d]; values, indices [N, k]; W_dec [F, d]. `segment` overrides the entries per segment of hot latents.

    Equivalent to: dvalues = (grad[:, None] * W_dec[indices]).sum(-1);
    dW_dec = zeros_like(W_dec).index_add(0, indices.flatten(), (values[..., None] * grad[:, None]).flatten(0, 1)).
    """
    n_latents, d = W_dec.shape
    dvalues = torch.empty_like(values) if need_values else None
    dW_dec = torch.empty_like(W_dec) if need_W else None
    with on_device(grad):
        if dW_dec is None:
            if dvalues is not None:
                _launch_dvalues(grad, indices, W_dec, 1.0, dvalues)
            return dvalues, None
        csc = csc_from_indices(indices, n_latents, segment or segment_length(indices.numel(), d))
        if dvalues is not None and d <= _WIDEST_ROW:
            _launch_gradients(grad, None, values, csc, W_dec, None, 1.0, dvalues, dW_dec, None, None, accumulate=False)
        else:
            if dvalues is not None:
                _launch_dvalues(grad, indices, W_dec, 1.0, dvalues)
            _launch_rows(grad, values, csc, None, 1.0, dW_dec, None, accumulate=False)
    return dvalues, dW_dec


def topk_encode_backward(
    grad_values: Tensor,
    values: Tensor,
    indices: Tensor,
    x: Tensor,
    W_enc: Tensor,
    b_dec: Tensor | None,
    need_x: bool,
    need_W: bool,
    *,
    segment: int | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """(dx [N, d] in x's dtype or None, dW_enc [F, d] in W_enc's dtype or None, db_enc [F] fp32); sums in fp32.

    With dpre = where(values != 0, grad_values, 0): dx_n = sum_j dpre_nj W_enc[indices_nj], a decode with other weights;
    dW_enc[f] = sum of dpre (x_n - b_dec) and db_enc[f] = sum of dpre over the entries of latent f.
    """
    n_latents, d = W_enc.shape
    dpre = torch.where(values != 0, grad_values, 0)
    dx = sparse_decode(dpre, indices, W_enc, None) if need_x else None
    dW_enc = torch.empty_like(W_enc) if need_W else None
    db_enc = torch.empty(n_latents, dtype=torch.float32, device=x.device)
    with on_device(x):
        csc = csc_from_indices(indices, n_latents, segment or segment_length(indices.numel(), d))
        _launch_rows(x if need_W else None, dpre, csc, b_dec, 1.0, dW_enc, db_enc, accumulate=False)
    return dx, dW_enc, db_enc


def sae_backward(
    e: Tensor,
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    W_enc: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None,
    scale: float | Tensor,
    dW_enc: Tensor,
    db_enc: Tensor,
    dW_dec: Tensor,
    *,
    accumulate: bool = True,
    segment: int | None = None,
) -> None:
    """Adds the gradients of scale/2 * sum_n ||e_n||^2 to dW_enc [F, d], db_enc [F], dW_dec [F, d] (fp32), in one pass.

    e = x_hat - x and x are [N, d]; values, indices [N, k]; `scale` a float or a 0-dim tensor on the device.
    `accumulate=False` overwrites the buffers, rows of unused latents with zeros, and saves reading them.
    """
    n_latents, d = W_dec.shape
    if values.numel() == 0:
        if not accumulate:
            for buffer in (dW_enc, db_enc, dW_dec):
                buffer.zero_()
        return
    with on_device(e):
        csc = csc_from_indices(indices, n_latents, segment or segment_length(indices.numel(), d))
        if d <= _WIDEST_ROW:
            _launch_gradients(e, x, values, csc, W_dec, b_dec, scale, None, dW_dec, dW_enc, db_enc, accumulate)
            return
        dpre = torch.empty(values.shape, dtype=torch.float32, device=e.device)
        _launch_dvalues(e, indices, W_dec, scale, dpre)
        dpre = torch.where(values != 0, dpre, 0)
        _launch_rows(e, values, csc, None, scale, dW_dec, None, accumulate)
        _launch_rows(x, dpre, csc, b_dec, 1.0, dW_enc, db_enc, accumulate)


def configurations() -> Iterator[Configuration]:
    """Every kernel of this file as it ships: all widths in the training form, the other forms at one width."""
    csc = {"order_ptr": "*i32", "offsets_ptr": "*i64", "ends_ptr": "*i64", "segment_latent_ptr": "*i64"}
    sizes = {"k": "i32", "d": "i32", "n_latents": "i32", "segments": "i32", "segment": "i32"}
    aligned = ("k", "d")
    for name in ("bf16", "fp32"):
        training = {"ENCODER": True, "DVALUES": False, "HAS_BIAS": True, "ACCUMULATE": True}
        decoder = {"ENCODER": False, "DVALUES": True, "HAS_BIAS": False, "ACCUMULATE": False}
        store = {**training, "ACCUMULATE": False}
        forms = [(block, training, "+=") for block in _LATENT_BLOCKS]
        forms += [(_LATENT_BLOCKS[-2], decoder, "decoder"), (_LATENT_BLOCKS[-2], store, "=")]
        for block, flags, form in forms:
            yield Configuration(
                _latent_kernel,
                f"backward.latent[{name},{block[0]},{form}]",
                {
                    "e_ptr": f"*{name}",
                    "x_ptr": f"*{name}",
                    "values_ptr": f"*{name}",
                    **csc,
                    "w_ptr": f"*{name}",
                    "b_dec_ptr": "*fp32",
                    "scale_ptr": "*fp32",
                    "dvalues_ptr": f"*{name}",
                    "dw_dec_ptr": f"*{name}" if form == "decoder" else "*fp32",
                    "dw_enc_ptr": "*fp32",
                    "db_ptr": "*fp32",
                    "part_dec_ptr": "*fp32",
                    "part_enc_ptr": "*fp32",
                    "part_db_ptr": "*fp32",
                    **sizes,
                },
                _with_flags(block, **flags),
                aligned,
            )
        for block in _ROWS_BLOCKS:
            yield Configuration(
                _rows_kernel,
                f"backward.rows[{name},{block[0]}]",
                {
                    "rows_ptr": f"*{name}",
                    "coefficients_ptr": f"*{name}",
                    **csc,
                    "b_dec_ptr": "*fp32",
                    "scale_ptr": "*fp32",
                    "out_ptr": f"*{name}",
                    "db_ptr": "*fp32",
                    "part_ptr": "*fp32",
                    "part_db_ptr": "*fp32",
                    **sizes,
                },
                _with_flags(block, ROWS=True, HAS_BIAS=True, SUM=True, ACCUMULATE=False),
                aligned,
            )
        yield Configuration(
            _dvalues_kernel,
            f"backward.dvalues[{name}]",
            {
                "g_ptr": f"*{name}",
                "indices_ptr": "*i64",
                "w_ptr": f"*{name}",
                "scale_ptr": "*fp32",
                "dvalues_ptr": f"*{name}",
                "k": "i32",
                "d": "i32",
            },
            _DVALUES,
            aligned,
        )
    yield Configuration(
        _combine_kernel,
        "backward.combine",
        {
            "part_ptr": "*fp32",
            "out_ptr": "*fp32",
            "offsets_ptr": "*i64",
            "ends_ptr": "*i64",
            "segment_latent_ptr": "*i64",
            "d": "i32",
            "n_latents": "i32",
            "segment": "i32",
        },
        _combine_tiles(True),
        ("d",),
    )
