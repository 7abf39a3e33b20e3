"""Rows rounded to 8 bits with bounds, and the product of two such matrices: what int8_screen.py consists of.

Rotation. Rounding with one scale per row loses everything to a row's largest entry, so rows are rotated first, which
changes no product: y = H D v, where D flips signs by a fixed hash of the column and H is Hadamard's matrix on every 128
columns (d is padded by zeros to a multiple). H is left unnormalised, H H^T = 128, and the 1 / 128 goes into the product
of the scales, where it is exact. H's rows come in an order of their own, the same for both operands.

Rounding. s = max |y| / 127, q = y / s to the nearest integer, so

    v = D H^T (s q + dy) / 128,   <v, w> = (s_v s_w <q_v, q_w> + <dy_v, y_w> + <s_v q_v, dy_w>) / 128

Stored are s, norm >= ||v|| and rest >= ||dy|| / sqrt(128). What they must cover, with u = 2^-24:

* The butterfly has 7 levels of sums, each rounded once and each sqrt(2) times a rotation: the computed y is within
  ((1 + u)^7 - 1) ||y|| < 8 u ||y|| of H D v. dy is measured from the computed y in fp32, y - s q with at most two
  roundings: 2 u (||y|| + ||s q||) < 5 u ||y||. So 2^-20 ||y||, 16 u, is added to rest.
* A sum of squares: d / 128 <= 512 terms per lane, then 128 lanes in any order; it is off by less than 2^-14 of itself,
  and the square root (approximate on GPUs) by 2^-20. Norm and rest are multiplied by 1.001, which leaves more than
  2^-11 for what is computed with them.
* Rows whose largest |y| is below 2^-32 would lose squares to underflow: q = 0, and norm = rest = 2^-32 sqrt(d). Zeros
  have norm = rest = 0. Above 2^50, infinite or NaN: q = 0 and norm = rest = infinity, which says that nothing is known.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import ABSENT, Configuration, Tiles, integers, pointers

BLOCK = 128  # columns of a block of the rotation
FACTS = 3  # numbers that are stored of a row: s, norm, rest
_BLOCK = tl.constexpr(BLOCK)
_SMALLEST, _LARGEST = tl.constexpr(2.0**-32), tl.constexpr(2.0**50)
_OVER, _ROTATED = tl.constexpr(1.001), tl.constexpr(2.0**-20)
_OF_NORMALISED = tl.constexpr(128**-0.5)


@triton.jit
def _rotated(row_ptr, shift_ptr, row, exists, start, d):
    """y [ROWS, 128] in fp32: columns start .. start + 128 of H D (v - shift) of the rows [ROWS]."""
    column = start + tl.arange(0, _BLOCK)
    live = column < d
    v = tl.load(row_ptr + row[:, None] * d + column[None, :], mask=exists[:, None] & live[None, :], other=0.0)
    v = v.to(tl.float32)
    if shift_ptr is not None:
        v = tl.where(live[None, :], v - tl.load(shift_ptr + column, mask=live, other=0.0)[None, :], 0.0)
    mixed = column.to(tl.uint32) * 0x9E3779B1
    mixed = (mixed ^ (mixed >> 15)) * 0x85EBCA77
    y = tl.where(((mixed >> 13) & 1)[None, :] == 1, -v, v)
    for _ in tl.static_range(7):  # the same step seven times: neighbours meet, and the two halves are laid side by side
        even, odd = tl.split(tl.reshape(y, [y.shape[0], _BLOCK // 2, 2]))
        y = tl.reshape(tl.trans(tl.join(even + odd, even - odd), (0, 2, 1)), [y.shape[0], _BLOCK])
    return y


@triton.jit(do_not_specialize=["n"])
def _round_kernel(rows_ptr, shift_ptr, q_ptr, facts_ptr, n, d, padded, ROWS: tl.constexpr):
    """q [n, padded] int8 and facts [3, n] fp32 of rows [n, d] - shift [d]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = row < n
    largest = tl.zeros([ROWS, _BLOCK], tl.float32)
    squares = tl.zeros([ROWS, _BLOCK], tl.float32)
    strange = tl.zeros([ROWS, _BLOCK], tl.int32)  # a maximum may lose a NaN
    for start in range(0, padded, _BLOCK):
        y = _rotated(rows_ptr, shift_ptr, row, exists, start, d)
        largest = tl.maximum(largest, tl.abs(y))
        squares += y * y
        strange |= (~(tl.abs(y) <= _LARGEST)).to(tl.int32)
    most = tl.max(largest, axis=1)
    unknown = tl.max(strange, axis=1) > 0
    ordinary = ~unknown & (most >= _SMALLEST)
    tiny = tl.where(most > 0.0, _SMALLEST * tl.sqrt(padded.to(tl.float32)), 0.0)
    most = tl.where(ordinary, most, 1.0)
    scale = tl.where(ordinary, most / 127.0, 0.0)
    inverse = 127.0 / most
    # Twice the rotation costs less than keeping the row, whatever its length.
    left = tl.zeros([ROWS, _BLOCK], tl.float32)
    for start in range(0, padded, _BLOCK):
        y = _rotated(rows_ptr, shift_ptr, row, exists, start, d)
        q = tl.where(ordinary[:, None], tl.floor(y * inverse[:, None] + 0.5), 0.0)
        rest = y - q * scale[:, None]
        left += rest * rest
        out = q_ptr + row[:, None] * padded + start + tl.arange(0, _BLOCK)[None, :]
        tl.store(out, q.to(tl.int8), mask=exists[:, None])
    norm = _OVER * tl.sqrt(tl.sum(squares, axis=1))
    rest = _OVER * tl.sqrt(tl.sum(left, axis=1)) + _ROTATED * norm
    other = tl.where(unknown, float("inf"), tiny)
    tl.store(facts_ptr + row, scale, mask=exists)
    tl.store(facts_ptr + n + row, tl.where(ordinary, norm * _OF_NORMALISED, other), mask=exists)
    tl.store(facts_ptr + 2 * n.to(tl.int64) + row, tl.where(ordinary, rest * _OF_NORMALISED, other), mask=exists)


@triton.jit(do_not_specialize=["rows"])
def _product_kernel(
    x_ptr, w_ptr, out_ptr, rows, columns, d,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """out [rows, columns] int32 = x [rows, d] w [columns, d]^T of int8, exactly; d is a multiple of BLOCK_K."""
    # Tiles are walked as in encode.py.
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
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.int32)
    for _ in range(0, d, BLOCK_K):
        a = tl.load(x_tile, mask=(m < rows)[:, None], other=0)
        b = tl.load(w_tile, mask=(n < columns)[None, :], other=0)
        total = tl.dot(a, b, total, out_dtype=tl.int32)
        x_tile += BLOCK_K
        w_tile += BLOCK_K
    out = out_ptr + m.to(tl.int64)[:, None] * columns + n[None, :]
    tl.store(out, total, mask=(m < rows)[:, None] & (n < columns)[None, :])


_ROUND = Tiles({"ROWS": 16}, num_warps=4)
_PRODUCT = Tiles({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128, "GROUP_M": 8}, num_warps=8, num_stages=3)
_CUBLAS_ROWS, _CUBLAS_COLUMNS = 17, 8  # the fewest rows, and what columns must be a multiple of, for torch._int_mm


def padded(d: int) -> int:
    """Columns of a rotated row."""
    return triton.cdiv(d, BLOCK) * BLOCK


def round_rows(rows: Tensor, shift: Tensor | None, q: Tensor, facts: Tensor) -> None:
    """q [n, padded(d)] int8 and facts [3, n] fp32 (s, norm, rest) of rows [n, d] - shift [d] fp32."""
    n, d = rows.shape
    grid = (triton.cdiv(n, _ROUND.constexprs["ROWS"]),)
    _round_kernel[grid](rows, shift, q, facts, n, d, q.shape[1], **_ROUND.options())


def product(x: Tensor, W: Tensor, out: Tensor) -> None:
    """out [R, C] int32 = x [R, d] W [C, d]^T of int8, by cuBLAS where it takes the shape, else by Triton."""
    rows, columns = out.shape
    if x.is_cuda and hasattr(torch, "_int_mm") and rows >= _CUBLAS_ROWS and columns % _CUBLAS_COLUMNS == 0:
        torch._int_mm(x, W.T, out=out)
        return
    tiles = _PRODUCT
    grid = (triton.cdiv(rows, tiles.constexprs["BLOCK_M"]) * triton.cdiv(columns, tiles.constexprs["BLOCK_N"]),)
    _product_kernel[grid](x, W, out, rows, columns, x.shape[1], **tiles.options())


def configurations() -> Iterator[Configuration]:
    """Both kernels of this file as they ship."""
    for name in ("bf16", "fp16", "fp32"):
        for shifted in (True, False):  # rows, latents
            yield Configuration(
                _round_kernel,
                f"int8.round[{name}{',shift' if shifted else ''}]",
                {
                    **pointers(name, "rows"),
                    "shift_ptr": "*fp32" if shifted else ABSENT,
                    **pointers("i8", "q"),
                    **pointers("fp32", "facts"),
                    **integers("n", "d", "padded"),
                },
                _ROUND,
                ("d", "padded"),
                variant=name != "bf16",
            )
    yield Configuration(
        _product_kernel,
        "int8.product",
        {**pointers("i8", "x", "w"), **pointers("i32", "out"), **integers("rows", "columns", "d")},
        _PRODUCT,
        ("columns", "d"),
        tensor_cores=True,
    )
