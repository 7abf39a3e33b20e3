"""topk_encode: the k largest of relu((x - b_dec) W_enc^T + b_enc) per row, exactly, without ever holding [N, F].

    pre = (x - b_dec) W_enc^T + b_enc       accumulated in fp32
    values, indices = the first k of a stable descending sort of relu(pre)

How. Rows are taken in blocks of R and latents in chunks of C, so that a chunk of pre-activations, [R, C] fp32, stays
in the L2 cache. Each chunk is one GEMM into a reused buffer and one filter pass over it:

* A row keeps a candidate list of at most CAPACITY keys (pre-activation bits << 32 | 0x7fffffff - latent) and a
  limit: the pre-activation of the k-th best latent so far. Chunks come in ascending order of the latent, so a later
  latent enters only by being strictly greater than the limit: an equal one would lose the tie. Nothing else of the
  chunk is written anywhere.
* When the list is about to overflow, the same program reduces it to its k best (bitonic top-k over the 64-bit keys,
  which are all different) and raises the limit. On data in random order that happens about log(F / CAPACITY) /
  log(CAPACITY / k) times per row, the "geometric phases" of a threshold filter; on rows sorted in ascending order
  it happens every CAPACITY - k latents. So overflow is no special case: there is no flag, no host synchronisation
  and no second code path, only more work.
* The limit starts below zero and zeros are candidates too, hence rows with fewer than k positives end with zeros at
  the lowest unused latents. NaN takes the largest key and so ranks first.

b_dec. fp32 rows are centred before the product. 16-bit operands cannot hold x - b_dec, so there b_dec is cut in two:

    pre = (x - pivot) W_enc^T + (b_enc - W_enc (b_dec - pivot))

pivot_c is b_dec_c rounded to 16 bit where x_nc - pivot_c is a 16-bit number in every row of the call, which is so
wherever all rows lie within a factor of two of it (Sterbenz), and 0 elsewhere. Nothing is rounded before the product,
and what is added after it is small: at most 2^-9 |b_dec_c| where the pivot is taken, at most about 2 max_n |x_nc -
b_dec_c| where it is not. So a pre-activation has the error of an fp32 sum over the largest centred entry that each
column has in this call, not over x, however far the rows lie from the origin; a row may differ in its last bits
with the company it is in. inf and NaN in x, b_dec and b_enc give what they give in (x - b_dec) W_enc^T + b_enc; only
finite bf16 numbers near the end of the range can overflow in x W_enc^T where their difference would not.

k > 1024 does not fit a list in registers: there, chunks are merged by `torch.topk` over the 64-bit keys (slower,
equally exact).

Narrow rows and heads: [H, N, d] rows and [H, F, d] weights go through grouped_encode.py in one launch where it takes
the shape, and head by head through chunks where it does not; one autoencoder goes there where d is small (`path_of`).

Work: 2 N F d flop. Bytes that must move: x and W_enc once per row block, N F 4 written to and read from L2, N k 16
out. Roofline prediction (N 32768, d 4096, F 131072, k 64, bf16, H200): GEMM 44.5 ms, filter 1 to 2 ms, selection
about 1 ms; the pivot and the centred rows read x twice and write it once, 0.2 ms. Measured: 62.1 ms where
the product alone takes 50.7: the filter and the launches of 128 chunks take five times what was predicted for them.

Workspace, whatever N and F: R C 4 bytes (at most 128 MB on a GPU) + R CAPACITY 8 bytes (at most 32 MB); with b_dec also
R d times the element size of centred rows and, in 16 bit, F 4 bytes of folded bias.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .grouped_encode import encode_rows, supports
from .launch import Configuration, Tiles, integers, next_power_of_2, on_device, pointers


@triton.jit
def rank_bits(pre):
    """Non-negative int32 that orders like relu(pre): -0 and negatives are 0, NaN is above infinity."""
    bits = tl.where(pre > 0, pre.to(tl.int32, bitcast=True), 0)
    return tl.where(pre != pre, 0x7FFFFFFF, bits)


@triton.jit
def _key(bits, latent):
    return (bits.to(tl.int64) << 32) | (0x7FFFFFFF - latent).to(tl.int64)


@triton.jit(do_not_specialize=["rows"])
def _gemm_kernel(
    x_ptr, w_ptr, out_ptr, rows, columns, d,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """out [rows, columns] fp32 = x [rows, d] w [columns, d]^T; "ieee" so that fp32 operands are not cut to tf32."""
    # Tiles are walked in groups of GROUP_M row tiles, so that the programs in flight share W tiles in L2.
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(rows, BLOCK_M)
    tiles_n = tl.cdiv(columns, BLOCK_N)
    group = pid // (GROUP_M * tiles_n)
    group_rows = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    tile_m = group * GROUP_M + (pid % (GROUP_M * tiles_n)) % group_rows
    tile_n = (pid % (GROUP_M * tiles_n)) // group_rows

    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    x_tile = x_ptr + m.to(tl.int64)[:, None] * d + inner[None, :]
    w_tile = w_ptr + n.to(tl.int64)[None, :] * d + inner[:, None]
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, d, BLOCK_K):
        live = inner < d - start
        a = tl.load(x_tile, mask=(m < rows)[:, None] & live[None, :], other=0.0)
        b = tl.load(w_tile, mask=(n < columns)[None, :] & live[:, None], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
        x_tile += BLOCK_K
        w_tile += BLOCK_K
    out = out_ptr + m.to(tl.int64)[:, None] * columns + n[None, :]
    tl.store(out, total, mask=(m < rows)[:, None] & (n < columns)[None, :])


@triton.jit(do_not_specialize=["n"])
def _pivot_kernel(x_ptr, pivot_ptr, n, d, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """pivot [d] becomes 0 in the columns where some x - pivot would be rounded in x's dtype; of every head.

    A program may find a 0 that another has stored, and then has nothing to add: the outcome is the same in any order.
    """
    head = tl.program_id(2).to(tl.int64)
    x_ptr += head * n * d
    pivot_ptr += head * d
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    live = column < d
    pivot = tl.load(pivot_ptr + column, mask=live, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + row[:, None] * d + column[None, :], mask=(row < n)[:, None] & live[None, :], other=0.0)
    moved = x.to(tl.float32) - pivot[None, :]
    rounded = (moved.to(x_ptr.dtype.element_ty).to(tl.float32) != moved) & (moved == moved)
    drop = tl.max(rounded.to(tl.int32), axis=0) > 0
    tl.store(pivot_ptr + column, tl.zeros([BLOCK_D], pivot_ptr.dtype.element_ty), mask=live & drop)


@triton.jit(do_not_specialize=["n_latents"])
def _fold_bias_kernel(
    w_ptr, b_enc_ptr, b_dec_ptr, out_ptr, n_latents, d, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """out [F] = b_enc - W_enc b_dec in fp32: what of b_dec is not subtracted from the rows; of every head."""
    head = tl.program_id(1).to(tl.int64)
    w_ptr += head * n_latents * d
    b_enc_ptr += head * n_latents
    b_dec_ptr += head * d
    out_ptr += head * n_latents
    latent = tl.program_id(0).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    exists = latent < n_latents
    total = tl.zeros([BLOCK_F], dtype=tl.float32)
    for start in range(0, d, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        live = column < d
        w = tl.load(w_ptr + latent[:, None] * d + column[None, :], mask=exists[:, None] & live[None, :], other=0.0)
        shift = tl.load(b_dec_ptr + column, mask=live, other=0.0)
        total += tl.sum(w.to(tl.float32) * shift[None, :], axis=1)
    tl.store(out_ptr + latent, tl.load(b_enc_ptr + latent, mask=exists) - total, mask=exists)


@triton.jit(do_not_specialize=["last"])
def _filter_kernel(
    pre_ptr, bias_ptr, keys_ptr, count_ptr, limit_ptr, columns, first, last, k,
    K: tl.constexpr, CAPACITY: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """One program owns one row: scans its chunk [columns] in order and appends what beats the row's limit.

    After the `last` chunk (1, else 0) the row's first k keys are the result, in order.
    """
    row = tl.program_id(0).to(tl.int64)
    pre_ptr += row * columns
    keys_ptr += row * CAPACITY
    bias_ptr += first
    count = 0
    limit = -1
    if first > 0:
        count = tl.load(count_ptr + row)
        limit = tl.load(limit_ptr + row)
    lane = tl.arange(0, STEP)
    # A step is loaded while the one before is judged, and added to its bias only then: a load waits where it is used.
    next_pre = tl.load(pre_ptr + lane, mask=lane < columns, other=0.0)
    next_bias = tl.load(bias_ptr + lane, mask=lane < columns, other=0.0)
    # The last chunk ends with one empty step that only reduces the list: the top-k is compiled once.
    for start in range(0, columns + last * STEP, STEP):
        column = start + lane
        live = column < columns
        pre = next_pre + next_bias
        ahead = column + STEP
        next_pre = tl.load(pre_ptr + ahead, mask=ahead < columns, other=0.0)
        next_bias = tl.load(bias_ptr + ahead, mask=ahead < columns, other=0.0)
        bits = tl.where(live, rank_bits(pre), -1)
        keep = bits > limit
        found = tl.sum(keep.to(tl.int32))
        finish = start >= columns
        if finish | (found > 0):
            if finish | (count + found > CAPACITY):
                slot = tl.arange(0, CAPACITY)
                # The list lives in global memory: the barriers order the appends of other threads before this read, and
                # this read before the stores that reuse its slots.
                tl.debug_barrier()
                listed = tl.load(keys_ptr + slot, mask=slot < count, other=-1)
                tl.debug_barrier()
                best = tl.topk(listed, K)
                rank = tl.arange(0, K)
                tl.store(keys_ptr + rank, best, mask=rank < k)
                limit = tl.max(tl.where(rank == k - 1, best >> 32, -1)).to(tl.int32)
                count = k
                keep = bits > limit
                found = tl.sum(keep.to(tl.int32))
            place = count + tl.cumsum(keep.to(tl.int32)) - 1
            tl.store(keys_ptr + place, _key(bits, first + column), mask=keep)
            count += found
    tl.store(count_ptr + row, count)
    tl.store(limit_ptr + row, limit)


@triton.jit
def _pack_kernel(pre_ptr, bias_ptr, keys_ptr, columns, first, k, width, BLOCK: tl.constexpr):
    """keys [R, width][:, k:] = the chunk's keys, beside the k best of the chunks before (large k only)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = column < columns
    pre = tl.load(pre_ptr + row * columns + column, mask=live, other=0.0)
    pre += tl.load(bias_ptr + first + column, mask=live, other=0.0)
    tl.store(keys_ptr + row * width + k + column, _key(rank_bits(pre), first + column), mask=live)


@triton.jit
def _unpack_kernel(keys_ptr, values_ptr, indices_ptr, k, width, BLOCK: tl.constexpr):
    """values, indices [R, k] from the first k of each row of keys [R, width]."""
    row = tl.program_id(0).to(tl.int64)
    rank = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(keys_ptr + row * width + rank, mask=rank < k, other=0)
    value = (key >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    tl.store(values_ptr + row * k + rank, value.to(values_ptr.dtype.element_ty), mask=rank < k)
    tl.store(indices_ptr + row * k + rank, 0x7FFFFFFF - (key & 0x7FFFFFFF), mask=rank < k)


# (largest k, list capacity, step, warps). capacity - step >= k, or an append could overflow after a reduction.
# Lists are short on purpose: bitonic top-k of C keys costs C log(C)^2, so several short reductions beat one long one.
# One warp a row wherever its registers hold the list: a sum over a step is then a few shuffles, where several warps
# would meet at a barrier.
_LISTS = ((64, 256, 128, 1), (256, 512, 256, 1), (1024, 2048, 1024, 8))
_LARGEST_BUFFER, _LARGEST_LISTS = 128 << 20, 32 << 20  # bytes of pre-activations and of candidates
_PIVOT = Tiles({"BLOCK_N": 32, "BLOCK_D": 128}, num_warps=4)
_BIAS = Tiles({"BLOCK_F": 16, "BLOCK_D": 256}, num_warps=4)
_PACK = Tiles({"BLOCK": 1024}, num_warps=4)
_UNPACK = Tiles({"BLOCK": 64}, num_warps=1)


def _list_tiles(largest: int, capacity: int, step: int, warps: int) -> Tiles:
    return Tiles({"K": largest, "CAPACITY": capacity, "STEP": step}, warps)


def list_tiles(k: int) -> Tiles | None:
    """Tiles of the filter for this k, or None where k takes the merging route."""
    return next((_list_tiles(*row) for row in _LISTS if k <= row[0]), None)


def gemm_tiles(dtype: torch.dtype) -> Tiles:
    # fp32 "ieee" runs on FMA units, where 64 x 64 is what registers hold. 16 bit: 128 x 256 tiles spill on sm_100.
    if dtype == torch.float32:
        return Tiles({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16, "GROUP_M": 8}, num_warps=4, num_stages=3)
    return Tiles({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "GROUP_M": 8}, num_warps=8, num_stages=3)


def _has_mm_with_fp32_output() -> bool:
    return hasattr(torch.ops.aten.mm, "dtype_out")


def project(x: Tensor, W: Tensor, out: Tensor) -> None:
    """out [R, C] fp32 = x [R, d] W [C, d]^T, by cuBLAS where it can write fp32 from these operands, else by Triton."""
    if x.is_cuda and x.dtype == torch.float32:
        torch.mm(x, W.T, out=out)
    elif x.is_cuda and _has_mm_with_fp32_output():
        torch.ops.aten.mm.dtype_out(x, W.T, torch.float32, out=out)
    else:
        triton_project(x, W, out)


def triton_project(x: Tensor, W: Tensor, out: Tensor) -> None:
    """The same product by `_gemm_kernel` alone: any device that Triton runs on."""
    rows, columns = out.shape
    tiles = gemm_tiles(x.dtype)
    grid = (triton.cdiv(rows, tiles.constexprs["BLOCK_M"]) * triton.cdiv(columns, tiles.constexprs["BLOCK_N"]),)
    _gemm_kernel[grid](x, W, out, rows, columns, x.shape[1], **tiles.options())


def pivot_of(x: Tensor, b_dec: Tensor) -> Tensor:
    """pivot [d] in the 16-bit dtype of x [N, d]: b_dec [d], rounded, where x - pivot is exact for all rows, else 0. Or
    [H, d] of x [H, N, d] and b_dec [H, d]."""
    pivot = b_dec.to(x.dtype)
    pivot = torch.where(pivot.isfinite(), pivot, 0)
    *heads, n, d = x.shape
    grid = (triton.cdiv(n, _PIVOT.constexprs["BLOCK_N"]), triton.cdiv(d, _PIVOT.constexprs["BLOCK_D"]), *heads)
    _pivot_kernel[grid](x, pivot, n, d, **_PIVOT.options())
    return pivot


def centring(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None) -> tuple[Tensor | None, Tensor]:
    """(what is subtracted from the rows before the product or None, what is added after it); heads or none."""
    if b_dec is None or x.dtype == torch.float32:
        return b_dec, b_enc
    shift = pivot_of(x, b_dec)
    bias = torch.empty_like(b_enc)
    n_latents, d = W_enc.shape[-2:]
    grid = (triton.cdiv(n_latents, _BIAS.constexprs["BLOCK_F"]), *W_enc.shape[:-2])
    _fold_bias_kernel[grid](W_enc, b_enc, b_dec - shift, bias, n_latents, d, **_BIAS.options())
    return shift, bias


def chunks(
    x: Tensor, W_enc: Tensor, shift: Tensor | None, rows: int, columns: int
) -> Iterator[tuple[int, int, Tensor]]:
    """(first row, first latent, pre [r, c] fp32 without bias) of every chunk, all latents of a block of rows before the
    next block. `pre` lives in one buffer: the next chunk overwrites it."""
    buffer = torch.empty(rows * columns, dtype=torch.float32, device=x.device)
    centred = torch.empty(rows if shift is not None else 0, x.shape[1], dtype=x.dtype, device=x.device)
    for top in range(0, x.shape[0], rows):
        block = x[top : top + rows]
        r = block.shape[0]
        if shift is not None:
            block = torch.sub(block, shift, out=centred[:r])
        for first in range(0, W_enc.shape[0], columns):
            w = W_enc[first : first + columns]
            pre = buffer[: r * w.shape[0]].view(r, w.shape[0])
            project(block, w, pre)
            yield top, first, pre


def chunk_shape(x: Tensor, n_latents: int, k: int) -> tuple[int, int]:
    """(R, C): rows and latents of one chunk. On a GPU the fp32 buffer may be larger than the L2, because every further
    chunk costs the start and the end of two kernels: `benches.gpu.encode` has 8192 x 4096 at 62.0 ms, the best of 7,
    and 4096 x 2048, which the L2 holds, at 64.2 (H200, the docstring's shape)."""
    elements = (_LARGEST_BUFFER if x.is_cuda else 1 << 20) // 4
    lists = list_tiles(k)
    capacity = 4 * next_power_of_2(k) if lists is None else lists.constexprs["CAPACITY"]
    # Many rows, few latents: the rows of a launch are what keeps the filter's warps busy.
    rows = max(1, min(x.shape[0], 1 << 13, elements // 2048, _LARGEST_LISTS // (8 * capacity)))
    columns = max(1024, min(elements // rows, 8192) // 1024 * 1024)
    return rows, min(columns, n_latents)


@dataclass(frozen=True)
class RowFilter:
    """The kernel that selects from a chunk, for k that fit its lists.

    `run(pre, bias, keys, count, limit, first, last, k)`: the chunk pre [r, c] of the latents first .. first + c goes
    into the lists keys [R, capacity], count and limit [R]; after the last one the first k keys of a row are the result.
    """

    capacity: int
    run: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, bool, int], None]


def triton_filter(tiles: Tiles) -> RowFilter:
    """`_filter_kernel` with one row of `_LISTS`, for k up to its K."""

    def run(
        pre: Tensor, bias: Tensor, keys: Tensor, count: Tensor, limit: Tensor, first: int, last: bool, k: int
    ) -> None:
        r, c = pre.shape
        _filter_kernel[(r,)](pre, bias, keys, count, limit, c, first, int(last), k, **tiles.options())

    return RowFilter(tiles.constexprs["CAPACITY"], run)


def topk_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: int,
    b_dec: Tensor | None,
    *,
    chunk: tuple[int, int] | None = None,
    path: str | None = None,
    row_filter: RowFilter | None = None,
) -> tuple[Tensor, Tensor]:
    """values [N, k] in x's dtype and indices [N, k] int64; see the module's docstring.

    x [N, d] and W_enc [F, d] share one dtype of fp32, bf16, fp16; b_enc [F] and b_dec [d] are fp32; 1 <= k <= F < 2^31;
    or all of them with a head axis in front. `path` is one of PATHS or None for `path_of`'s choice. `chunk` = (rows,
    latents) overrides the size of the work buffer, `row_filter` the kernel that selects: either is for chunks, which
    None stands for then.

    Equivalent to: torch.sort(torch.relu((x - b_dec) @ W_enc.T + b_enc), descending=True, stable=True), first k columns.
    """
    values = torch.empty(*x.shape[:-1], k, dtype=x.dtype, device=x.device)
    indices = torch.empty(*x.shape[:-1], k, dtype=torch.int64, device=x.device)
    if x.numel() == 0:
        return values, indices
    path = path or ("chunked" if chunk or row_filter else path_of(W_enc.shape, k))
    if path != "chunked":
        with on_device(x):
            shift, bias = centring(x, W_enc, b_enc, b_dec)
            heads = x.dim() - 2  # 0 or 1: a head axis of 1 is put where there is none
            arguments = (t if heads or t is None else t[None] for t in (x, W_enc, bias, shift, values, indices))
            rows = None if chunk is None else chunk[0]
            encode_rows(*arguments, rows=rows, kept=3 if path == "grouped, 3 keys" else 2)  # type: ignore[arg-type]
    elif W_enc.dim() == 3:
        for head in range(W_enc.shape[0]):
            one = (x[head], W_enc[head], b_enc[head], k, None if b_dec is None else b_dec[head])
            _encode_in_chunks(*one, values[head], indices[head], chunk, row_filter)
    else:
        _encode_in_chunks(x, W_enc, b_enc, k, b_dec, values, indices, chunk, row_filter)
    return values, indices


# How a code is made: grouped_encode.py with two or three keys of each group, or in chunks.
PATHS = ("grouped", "grouped, 3 keys", "chunked")


# The largest d, F and k at which "grouped" was measured ahead for one autoencoder: at N 65536 on an H200
# (`benches.gpu.heads`) 1.31 and 1.63 ms where "chunked" took 1.85 and 2.54. It is ahead by what it does not write, 8
# bytes for the 2 d flop of a pre-activation, more so where d is less. `benches.gpu.paths` says what may be added.
_GROUPED_ALONE = ((128, 4096, 32),)


def path_of(shape: Sequence[int], k: int) -> str:
    """The path for W_enc of `shape` [F, d] or [H, F, d]: "grouped" (grouped_encode.py) for one autoencoder where it was
    measured ahead, for several wherever it takes the shape: "chunked" takes them one after the other."""
    n_latents, d = shape[-2:]
    if len(shape) == 3:
        return "grouped" if supports(d, n_latents, k) else "chunked"
    measured = any(d <= most[0] and n_latents <= most[1] and k <= most[2] for most in _GROUPED_ALONE)
    return "grouped" if measured else "chunked"


def _encode_in_chunks(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: int,
    b_dec: Tensor | None,
    values: Tensor,
    indices: Tensor,
    chunk: tuple[int, int] | None,
    row_filter: RowFilter | None,
) -> None:
    """values, indices [N, k] of x [N, d] with W_enc [F, d], by chunks of pre-activations and the filter."""
    n, n_latents = x.shape[0], W_enc.shape[0]
    rows, columns = chunk or chunk_shape(x, n_latents, k)
    rows, columns = min(rows, n), min(columns, n_latents)
    if row_filter is None and (lists := list_tiles(k)) is not None:
        row_filter = triton_filter(lists)
    with on_device(x):
        shift, bias = centring(x, W_enc, b_enc, b_dec)
        width = k + columns if row_filter is None else row_filter.capacity
        keys = torch.empty(rows, width, dtype=torch.int64, device=x.device)
        count = torch.empty(rows, dtype=torch.int32, device=x.device)
        limit = torch.empty(rows, dtype=torch.int32, device=x.device)
        for top, first, pre in chunks(x, W_enc, shift, rows, columns):
            r, c = pre.shape
            if row_filter is not None:
                row_filter.run(pre, bias, keys, count, limit, first, first + c == n_latents, k)
            else:
                if first == 0:
                    keys[:, :k] = -1
                pack_grid = (r, triton.cdiv(c, _PACK.constexprs["BLOCK"]))
                _pack_kernel[pack_grid](pre, bias, keys, c, first, k, width, **_PACK.options())
                # -1 at first, all different afterwards: which of equal keys is taken cannot matter.
                keys[:r, :k] = torch.topk(keys[:r, : k + c], k, dim=1, sorted=True).values
            if first + c == n_latents:
                unpack_grid = (r, triton.cdiv(k, _UNPACK.constexprs["BLOCK"]))
                block = slice(top, top + r)
                _unpack_kernel[unpack_grid](keys, values[block], indices[block], k, width, **_UNPACK.options())


def configurations() -> Iterator[Configuration]:
    """Every kernel of this file as it ships."""
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16"), (torch.float32, "fp32")):
        yield Configuration(
            _gemm_kernel,
            f"encode.gemm[{name}]",
            {"x_ptr": f"*{name}", "w_ptr": f"*{name}", "out_ptr": "*fp32", **integers("rows", "columns", "d")},
            gemm_tiles(dtype),
            ("columns", "d"),
            tensor_cores=dtype != torch.float32,
        )
        yield Configuration(
            _unpack_kernel,
            f"encode.unpack[{name}]",
            {"keys_ptr": "*i64", "values_ptr": f"*{name}", "indices_ptr": "*i64", **integers("k", "width")},
            _UNPACK,
            ("k", "width"),
        )
        if dtype == torch.float32:
            continue
        yield Configuration(
            _pivot_kernel,
            f"encode.pivot[{name}]",
            {"x_ptr": f"*{name}", "pivot_ptr": f"*{name}", **integers("n", "d")},
            _PIVOT,
            ("d",),
        )
        yield Configuration(
            _fold_bias_kernel,
            f"encode.fold_bias[{name}]",
            {"w_ptr": f"*{name}", **pointers("fp32", "b_enc", "b_dec", "out"), **integers("n_latents", "d")},
            _BIAS,
            ("d",),
        )
    chunk = {**pointers("fp32", "pre", "bias"), "keys_ptr": "*i64"}
    for row in _LISTS:
        yield Configuration(
            _filter_kernel,
            f"encode.filter[k<={row[0]}]",
            {**chunk, **pointers("i32", "count", "limit"), **integers("columns", "first", "last", "k")},
            _list_tiles(*row),
            ("columns", "first", "k"),
        )
    yield Configuration(
        _pack_kernel,
        "encode.pack",
        {**chunk, **integers("columns", "first", "k", "width")},
        _PACK,
        ("columns", "first"),
    )
