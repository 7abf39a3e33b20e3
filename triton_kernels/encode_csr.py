"""batch_topk_encode and threshold_encode: the pre-activations above a limit, in CSR form, without ever holding [N, F].

    pre = (x - b_dec) W_enc^T + b_enc       accumulated in fp32
    batch_topk: the N k largest of relu(pre) in the whole batch, ties to the lower position n F + latent
    threshold:  all pre > threshold that are positive

How. The chunks [R, C] of pre-activations are those of encode.py, one GEMM each into a buffer that stays in the L2
cache. Two passes over a chunk append what passes to a pool of (bits of the value, position): `_count_kernel` counts per
row, a prefix sum gives every row its place, `_write_kernel` writes. So the pool's order is fixed: no atomics.

* threshold: the pool is emptied into a piece of its exact size whenever the next chunk might not fit.
* batch_topk: then the pool is reduced to its N k best instead, and the worst of them becomes the limit of what follows.
  It keeps rising: of N F pre-activations in random order about N k (1 + ln(F / k)) are ever written. An equal value is
  let in while it may still win its tie, that is within the block of rows in which the limit was found; so constant data
  fills the pool again and again, which costs time and not memory.
* In the end one sort by position makes CSR of it.

The host waits when a pool might overflow (it then learns how full the pool is) and once for the size of the result. A
CUDA graph cannot capture either operator: its output's size is data.

Work: 2 N F d flop, the chunk read twice from L2. Roofline prediction (N 32768, d 4096, F 131072, k 64, bf16, H200):
GEMM 44.5 ms, the two passes 4 ms, about 270 waits of 20 us, 5 ms; five reductions of 15 M entries, 10 ms. Compiled for
sm_80/90/100, checked in the interpreter, not run on a GPU.

Workspace: a chunk (encode.py), and with it 24 bytes per element of two chunks; batch_topk: 24 bytes per entry of N k,
and while it is reduced about 100 more; threshold: 12 bytes per entry of the result, and about 50 while it is sorted.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .encode import centring, chunk_shape, chunks, rank_bits
from .launch import ABSENT, Configuration, Tiles, integers, on_device, pointers


@triton.jit
def _kept(
    pre_ptr, bias_ptr, least_ptr, limit_ptr, column, columns, first, HAS_LEAST: tl.constexpr
):  # fmt: skip
    """(bits of relu(pre), whether they are wanted) of some columns of one row of a chunk."""
    live = column < columns
    pre = tl.load(pre_ptr + column, mask=live, other=0.0)
    pre += tl.load(bias_ptr + first + column, mask=live, other=0.0)
    bits = rank_bits(pre)
    keep = live & (bits >= tl.load(limit_ptr))  # the limit is at least 1
    if HAS_LEAST:
        least = tl.load(least_ptr + first + column, mask=live, other=0.0)
        keep = keep & ((pre > least) | (pre != pre))
    return bits, keep


@triton.jit
def _count_kernel(
    pre_ptr, bias_ptr, least_ptr, limit_ptr, count_ptr, columns, first, HAS_LEAST: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """count [R] int32: how many of a row's columns are kept."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], dtype=tl.int32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        _, keep = _kept(pre_ptr + row * columns, bias_ptr, least_ptr, limit_ptr, column, columns, first, HAS_LEAST)
        total += keep.to(tl.int32)
    tl.store(count_ptr + row, tl.sum(total))


@triton.jit(do_not_specialize=["top"])
def _write_kernel(
    pre_ptr, bias_ptr, least_ptr, limit_ptr, count_ptr, ends_ptr, filled_ptr, bits_ptr, position_ptr,
    columns, first, top, n_latents, HAS_LEAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The kept columns of a row, in order, behind the `filled` entries of the pool and those of the rows before."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.load(filled_ptr) + tl.load(ends_ptr + row) - tl.load(count_ptr + row)
    position = (row + top) * n_latents + first
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        bits, keep = _kept(pre_ptr + row * columns, bias_ptr, least_ptr, limit_ptr, column, columns, first, HAS_LEAST)
        wanted = keep.to(tl.int32)
        found = tl.sum(wanted)
        if found > 0:
            to = place + tl.cumsum(wanted) - 1
            tl.store(bits_ptr + to, bits, mask=keep)
            tl.store(position_ptr + to, position + column, mask=keep)
            place += found


_BLOCK = 1024


def _tiles(has_least: bool) -> Tiles:
    return Tiles({"HAS_LEAST": has_least, "BLOCK": _BLOCK}, num_warps=4)


# The smallest bits of an fp32 number that does not round to 0: an entry of value 0 is none.
_SMALLEST = {torch.float32: 0x00000001, torch.bfloat16: 0x00008001, torch.float16: 0x33000001}
_NAN = 0x7FFFFFFF  # the bits of every NaN (encode.py)


def batch_topk_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: int,
    b_dec: Tensor | None,
    *,
    chunk: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """values [nnz] in x's dtype, latents [nnz] int64 ascending within a row, offsets [N + 1] int64, nnz <= N k.

    x [N, d] and W_enc [F, d] share one dtype of fp32, bf16, fp16; b_enc [F] and b_dec [d] are fp32; 1 <= k <= F < 2^31.
    `chunk` = (rows, latents) overrides the size of the work buffer.

    Equivalent to: the N k first of a stable descending sort of relu((x - b_dec) @ W_enc.T + b_enc), flattened.
    """
    return _encode(x, W_enc, b_enc, b_dec, None, x.shape[0] * k, chunk)


def threshold_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    b_dec: Tensor | None,
    *,
    chunk: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """values [nnz] in x's dtype, latents [nnz] int64 ascending within a row, offsets [N + 1] int64.

    As `batch_topk_encode`, with threshold [F] fp32. Equivalent to: the entries of pre = (x - b_dec) @ W_enc.T + b_enc
    where (pre > threshold) & (pre.to(x.dtype) > 0) | pre.isnan().
    """
    return _encode(x, W_enc, b_enc, b_dec, threshold, 0, chunk)


def _encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor | None,
    least: Tensor | None,
    most: int,
    chunk: tuple[int, int] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """All entries above `least` [F], or the `most` best."""
    n, n_latents = x.shape[0], W_enc.shape[0]
    device = x.device
    rows, columns = chunk or chunk_shape(x, n_latents, 1)
    rows, columns = max(1, min(rows, n)), min(columns, n_latents)
    capacity = min(2 * most + 2 * rows * columns, n * n_latents)
    tiles = _tiles(least is not None).options()
    with on_device(x):
        shift, bias = centring(x, W_enc, b_enc, b_dec) if n else (None, b_enc)
        bits = torch.empty(capacity, dtype=torch.int32, device=device)
        positions = torch.empty(capacity, dtype=torch.int64, device=device)
        filled = torch.zeros(1, dtype=torch.int64, device=device)
        limit = torch.full((1,), _SMALLEST[x.dtype], dtype=torch.int32, device=device)
        worst = limit - 1  # the last entry that a reduction has kept
        count = torch.empty(rows, dtype=torch.int32, device=device)
        pieces: list[tuple[Tensor, Tensor]] = []
        bound = 0  # what `filled` cannot exceed
        for top, first, pre in chunks(x, W_enc, shift, rows, columns):
            r, c = pre.shape
            if bound + r * c > capacity:
                bound = int(filled)
                if bound + r * c > capacity and most:
                    _reduce(bits, positions, bound, most)
                    limit = worst = bits[most - 1 : most].clone()
                    filled.fill_(most)
                    bound = most
                elif bound + r * c > capacity:
                    pieces.append((bits[:bound].clone(), positions[:bound].clone()))
                    filled.zero_()
                    bound = 0
            if first == 0:  # every entry so far lies before these rows: an equal one has lost its tie to them
                limit = worst.clamp(max=_NAN - 1) + 1
            _count_kernel[(r,)](pre, bias, least, limit, count, c, first, **tiles)
            ends = torch.cumsum(count[:r], 0)
            _write_kernel[(r,)](
                pre, bias, least, limit, count, ends, filled, bits, positions, c, first, top, n_latents, **tiles
            )
            filled += ends[-1:]
            bound += r * c
        bound = int(filled)
        if 0 < most < bound:
            _reduce(bits, positions, bound, most)
            bound = most
        pieces.append((bits[:bound], positions[:bound]))
        position, order = torch.sort(torch.cat([p for _, p in pieces]))
        values = torch.cat([b for b, _ in pieces])[order].view(torch.float32).to(x.dtype)
        starts = torch.arange(n + 1, device=device) * n_latents
        return values, position % n_latents, torch.searchsorted(position, starts)


def _reduce(bits: Tensor, positions: Tensor, filled: int, most: int) -> None:
    """Moves the `most` best of the first `filled` entries to the front, best first; equal values by position."""
    by_position = torch.sort(positions[:filled])
    value = bits[by_position.indices]
    best = torch.sort(value, descending=True, stable=True).indices[:most]
    bits[:most] = value[best]
    positions[:most] = by_position.values[best]


def configurations() -> Iterator[Configuration]:
    """Both kernels for both operators; pre-activations are fp32 whatever x is."""
    for has_least in (True, False):
        chunk = {
            **pointers("fp32", "pre", "bias"),
            "least_ptr": "*fp32" if has_least else ABSENT,
            **pointers("i32", "limit", "count"),
        }
        name = "threshold" if has_least else "batch_topk"
        yield Configuration(
            _count_kernel,
            f"encode_csr.count[{name}]",
            {**chunk, **integers("columns", "first")},
            _tiles(has_least),
            ("columns", "first"),
        )
        yield Configuration(
            _write_kernel,
            f"encode_csr.write[{name}]",
            {
                **chunk,
                **pointers("i64", "ends", "filled", "position"),
                **pointers("i32", "bits"),
                **integers("columns", "first", "top", "n_latents"),
            },
            _tiles(has_least),
            ("columns", "first", "n_latents"),
        )
