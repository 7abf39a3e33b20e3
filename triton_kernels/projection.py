"""project_out for many tensors in two launches: G -= s U (U^T G) along one dimension of each.

A table of descriptors in device memory says where each tensor, its basis and its strides are, so that one grid covers
hundreds of matrices of any mix of shapes, sides and dtypes; a table of items says which block of fibres and which slab
of rows a program works on. Both are built once per plan.

    1. coefficients_kernel: one slab of SLAB rows of U^T G, [r, BF] fp32, into a workspace. No atomics.
    2. update_kernel: adds the slabs of its block in ascending order, decides which fibres are projected, and subtracts
       from one slab of G. Every program of a block adds up the same numbers in the same order.

The order of every sum follows from n and r: deterministic, and a plan gives the bits of single calls. Left and right
side differ in strides only. A right side needs no second launch in principle, its rows being independent; but the 16
rows of a LoRA matrix are then one program, and slabs give the device n / SLAB times as many.

U is taken in tiles of TR columns: at 128 in one piece, and at 64 beside 64 fibres, the accumulators spill. The products
are "ieee", by FMA: what tf32 would leave of the component in span(U) is 1e-3 of it, which is what the projection is
there to remove, and tf32x3 spills with some compiler versions. FMA is not the limit where it matters: at r = 128 the
448 LoRA matrices of an 8B model take 21 GFLOP, 0.36 ms of an H200's 60 TFLOP/s, against 0.65 ms for the bytes of two
sweeps.

Bytes: 3 passes over G (2 read, 1 written), 2 over U. Roofline prediction (those 448 matrices, rank 16, fp32, H200 at
4.3 TB/s): 0.15 ms at r = 8, 0.38 ms at 64, 0.65 ms at 128. Measured: 1.1, 2.9 and 5.4 ms; FMA reads two operands of
every multiplication from shared memory, and strides known only at run time make every load one number wide. Such plans
therefore take lora_projection.py, where they fit.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import lora_projection
from .launch import Configuration, Tiles, on_device

SLAB = 2048
FIELDS = 16  # of a descriptor, int64: see `_descriptor`
ITEM = 4  # numbers of an item: descriptor, block of fibres, slab, where the block's partial sums begin
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@triton.jit
def load_numbers(address, offset, mask, kind):
    """fp32 numbers at `offset` elements from a byte address; kind: 0 fp32, 1 bf16, 2 fp16."""
    if kind == 0:
        numbers = tl.load(address.to(tl.pointer_type(tl.float32)) + offset, mask=mask, other=0.0)
    elif kind == 1:
        numbers = tl.load(address.to(tl.pointer_type(tl.bfloat16)) + offset, mask=mask, other=0.0).to(tl.float32)
    else:
        numbers = tl.load(address.to(tl.pointer_type(tl.float16)) + offset, mask=mask, other=0.0).to(tl.float32)
    return numbers


@triton.jit
def store_numbers(address, offset, numbers, mask, kind):
    """The way back, rounded to nearest."""
    if kind == 0:
        tl.store(address.to(tl.pointer_type(tl.float32)) + offset, numbers, mask=mask)
    elif kind == 1:
        tl.store(address.to(tl.pointer_type(tl.bfloat16)) + offset, numbers.to(tl.bfloat16), mask=mask)
    else:
        tl.store(address.to(tl.pointer_type(tl.float16)) + offset, numbers.to(tl.float16), mask=mask)


@triton.jit
def fibre_offsets(fibre, inner, outer_stride, inner_stride):
    return (fibre // inner) * outer_stride + (fibre % inner) * inner_stride


@triton.jit
def coefficients_kernel(
    table_ptr, items_ptr, partial_ptr,
    SLAB: tl.constexpr, BF: tl.constexpr, BN: tl.constexpr, TR: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    """partial [slab, r, BF] of one block of fibres: U^T G over one slab of rows."""
    item = items_ptr + tl.program_id(0).to(tl.int64) * 4
    row = table_ptr + tl.load(item) * FIELDS
    slab = tl.load(item + 2)
    n = tl.load(row + 5)
    r = tl.load(row + 6)
    source = tl.load(row)
    basis = tl.load(row + 2).to(tl.pointer_type(tl.float32))
    kind = tl.load(row + 4)
    stride = tl.load(row + 11)
    lane = tl.arange(0, BF)
    fibre = tl.load(item + 1) * BF + lane
    live = fibre < tl.load(row + 7)
    at = fibre_offsets(fibre, tl.load(row + 8), tl.load(row + 9), tl.load(row + 10))
    out = partial_ptr + tl.load(item + 3) + slab * r * BF
    begin = slab * SLAB
    end = tl.minimum(n, begin + SLAB)
    for tile in range(0, r, TR):
        rank = tile + tl.arange(0, TR)
        wanted = rank < r
        total = tl.zeros([TR, BF], dtype=tl.float32)
        for start in range(begin, end, BN):
            line = start + tl.arange(0, BN)
            inside = line < end
            g = load_numbers(source, line[:, None] * stride + at[None, :], inside[:, None] & live[None, :], kind)
            u = tl.load(basis + line[None, :] * r + rank[:, None], mask=inside[None, :] & wanted[:, None], other=0.0)
            total = tl.dot(u, g, total, input_precision="ieee")
        tl.store(out + rank[:, None] * BF + lane[None, :], total, mask=wanted[:, None])


@triton.jit
def update_kernel(
    table_ptr, items_ptr, partial_ptr, sums_ptr, strength,
    SLAB: tl.constexpr, BF: tl.constexpr, BN: tl.constexpr, TR: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    """One slab of one block of fibres: G - strength * U c, from the partial sums of all slabs."""
    item = items_ptr + tl.program_id(0).to(tl.int64) * 4
    row = table_ptr + tl.load(item) * FIELDS
    slab = tl.load(item + 2)
    n = tl.load(row + 5)
    r = tl.load(row + 6)
    basis = tl.load(row + 2).to(tl.pointer_type(tl.float32))
    against = tl.load(row + 3)
    kind = tl.load(row + 4)
    lane = tl.arange(0, BF)
    first = tl.load(item + 3)
    partial = partial_ptr + first
    sums = sums_ptr + first + slab * r * BF  # a place of this program's own
    product = tl.zeros([BF], dtype=tl.float32)
    for tile in range(0, r, TR):
        rank = tile + tl.arange(0, TR)
        wanted = rank < r
        place = rank[:, None] * BF + lane[None, :]
        total = tl.zeros([TR, BF], dtype=tl.float32)
        for other in range(tl.load(row + 15)):
            total += tl.load(partial + other * r * BF + place, mask=wanted[:, None], other=0.0)
        tl.store(sums + place, total, mask=wanted[:, None])
        if against != 0:
            direction = tl.load(against.to(tl.pointer_type(tl.float32)) + rank, mask=wanted, other=0.0)
            product += tl.sum(direction[:, None] * total, axis=0)
    # Whoever reads a sum back need not be the thread that stored it.
    tl.debug_barrier()
    projected = (product < 0.0) | (against == 0)
    fibre = tl.load(item + 1) * BF + lane
    live = fibre < tl.load(row + 7)
    inner = tl.load(row + 8)
    source = tl.load(row)
    target = tl.load(row + 1)
    from_stride = tl.load(row + 11)
    to_stride = tl.load(row + 14)
    from_at = fibre_offsets(fibre, inner, tl.load(row + 9), tl.load(row + 10))
    to_at = fibre_offsets(fibre, inner, tl.load(row + 12), tl.load(row + 13))
    begin = slab * SLAB
    end = tl.minimum(n, begin + SLAB)
    for start in range(begin, end, BN):
        line = start + tl.arange(0, BN)
        inside = line < end
        component = tl.zeros([BN, BF], dtype=tl.float32)
        for tile in range(0, r, TR):
            rank = tile + tl.arange(0, TR)
            wanted = rank < r
            u = tl.load(basis + line[:, None] * r + rank[None, :], mask=inside[:, None] & wanted[None, :], other=0.0)
            c = tl.load(sums + rank[:, None] * BF + lane[None, :], mask=wanted[:, None], other=0.0)
            component = tl.dot(u, c, component, input_precision="ieee")
        mask = inside[:, None] & live[None, :]
        g = load_numbers(source, line[:, None] * from_stride + from_at[None, :], mask, kind)
        g = tl.where(projected[None, :], g - strength * component, g)
        store_numbers(target, line[:, None] * to_stride + to_at[None, :], g, mask, kind)


@triton.jit(do_not_specialize=[f"v{i}" for i in range(FIELDS)])
def table_kernel(
    table_ptr, v0: tl.int64, v1: tl.int64, v2: tl.int64, v3: tl.int64, v4: tl.int64, v5: tl.int64, v6: tl.int64,
    v7: tl.int64, v8: tl.int64, v9: tl.int64, v10: tl.int64, v11: tl.int64, v12: tl.int64, v13: tl.int64, v14: tl.int64,
    v15: tl.int64,
):  # fmt: skip
    """A table of one row from arguments: no copy from the host, so a single call can be captured in a CUDA graph."""
    tl.store(table_ptr, v0)
    tl.store(table_ptr + 1, v1)
    tl.store(table_ptr + 2, v2)
    tl.store(table_ptr + 3, v3)
    tl.store(table_ptr + 4, v4)
    tl.store(table_ptr + 5, v5)
    tl.store(table_ptr + 6, v6)
    tl.store(table_ptr + 7, v7)
    tl.store(table_ptr + 8, v8)
    tl.store(table_ptr + 9, v9)
    tl.store(table_ptr + 10, v10)
    tl.store(table_ptr + 11, v11)
    tl.store(table_ptr + 12, v12)
    tl.store(table_ptr + 13, v13)
    tl.store(table_ptr + 14, v14)
    tl.store(table_ptr + 15, v15)


# (fibres, columns of U) of a tile -> warps: 16 fibres for LoRA matrices, 64 for wide ones; few columns for small bases.
_WARPS = {(16, 16): 4, (16, 64): 8, (64, 16): 8, (64, 32): 8}
_ROWS = 32
_TABLE = Tiles({}, num_warps=4)


def projection_tiles(block: tuple[int, int]) -> Tiles:
    constexprs = {"SLAB": SLAB, "BF": block[0], "BN": _ROWS, "TR": block[1], "FIELDS": FIELDS}
    return Tiles(constexprs, _WARPS[block], num_stages=2)


def choose_tiles(fibres: list[int], ranks: list[int]) -> Tiles:
    """64 fibres per block where that wastes less than half as many lanes again as 16; TR by the widest basis."""
    padded = {width: sum(triton.cdiv(f, width) * width for f in fibres) for width in (16, 64)}
    width = 64 if 2 * padded[64] <= 3 * padded[16] else 16
    return projection_tiles((width, max(tr for bf, tr in _WARPS if bf == width and (tr == 16 or max(ranks) > 16))))


def _axes(source: Tensor, target: Tensor, dim: int) -> list[tuple[int, int, int]]:
    """(size, stride in source, stride in target) of the other dimensions, neighbours joined where they can be."""
    axes: list[tuple[int, int, int]] = []
    for axis in range(source.dim()):
        size, a, b = source.shape[axis], source.stride(axis), target.stride(axis)
        if axis == dim or size == 1:
            continue
        if axes and axes[-1][1:] == (size * a, size * b):
            axes[-1] = (axes[-1][0] * size, a, b)
        else:
            axes.append((size, a, b))
    return axes


def _descriptors(
    source: Tensor, target: Tensor, dim: int, basis: Tensor, against: Tensor | None
) -> Iterator[list[int]]:
    """Rows of the table for a tensor: one, or one per element of the dimensions beyond two that cannot be joined."""
    axes = _axes(source, target, dim)
    split, (outer, inner) = axes[:-2], ([(1, 0, 0)] * 2 + axes)[-2:]
    n, r = basis.shape
    for place in itertools.product(*(range(size) for size, _, _ in split)):
        skipped = [sum(i * axis[which] for i, axis in zip(place, split, strict=True)) for which in (1, 2)]
        yield [
            source.data_ptr() + skipped[0] * source.element_size(),
            target.data_ptr() + skipped[1] * target.element_size(),
            basis.data_ptr(),
            0 if against is None else against.data_ptr(),
            KINDS[source.dtype],
            n,
            r,
            outer[0] * inner[0],
            inner[0],
            outer[1],
            inner[1],
            source.stride(dim),
            outer[2],
            inner[2],
            target.stride(dim),
            triton.cdiv(n, SLAB),
        ]


def _items(rows: list[list[int]], width: int) -> tuple[list[int], int]:
    """The items of all rows, flat, and the size of the workspace in numbers."""
    items: list[int] = []
    size = 0
    for number, row in enumerate(rows):
        r, fibres, slabs = row[6], row[7], row[15]
        for block in range(triton.cdiv(fibres, width)):
            for slab in range(slabs):
                items += (number, block, slab, size)
            size += slabs * r * width
    return items, size


def _launch(table: Tensor, items: Tensor, work: Tensor, strength: float, tiles: Tiles) -> None:
    grid = (items.numel() // ITEM,)
    coefficients_kernel[grid](table, items, work[0], **tiles.options())
    update_kernel[grid](table, items, work[0], work[1], strength, **tiles.options())


def project_out(g: Tensor, dim: int, basis: Tensor, strength: float, against: Tensor | None) -> Tensor:
    """g - strength * (component along span(basis) in dimension dim), contiguous.

    g of any shape and strides, fp32, bf16, fp16; basis [n, r] fp32 contiguous; against [r] fp32 or None.

    Equivalent to: reference.project_out, accumulated in fp32.
    """
    if g.numel() == 0 or basis.shape[1] == 0:
        return g.clone(memory_format=torch.contiguous_format)
    out = torch.empty(g.shape, dtype=g.dtype, device=g.device)
    if len(_axes(g, out, dim)) > 2:  # two layouts that one descriptor cannot walk together
        g = g.contiguous()
    (row,) = _descriptors(g, out, dim, basis, against)
    tiles = choose_tiles([row[7]], [row[6]])
    width = tiles.constexprs["BF"]
    slabs, blocks, size = row[15], triton.cdiv(row[7], width), row[15] * row[6] * width
    with on_device(g):
        table = torch.empty(FIELDS, dtype=torch.int64, device=g.device)
        table_kernel[(1,)](table, *row, **_TABLE.options())
        number = torch.arange(blocks * slabs, device=g.device)
        block = number // slabs
        items = torch.stack((torch.zeros_like(number), block, number % slabs, block * size), dim=1)
        work = torch.empty(2, blocks * size, dtype=torch.float32, device=g.device)
        _launch(table, items, work, strength, tiles)
    return out


def prepare_projection(
    tensors: list[Tensor],
    dims: list[int],
    bases: list[Tensor],
    basis_of: list[int],
    against: list[Tensor],
    against_of: list[int],
    strength: float,
) -> Callable[[], None]:
    """`project_out_grouped` with its tables and workspace made: two launches a call, for as long as the tensors keep
    their places in memory."""
    if tensors and lora_projection.fits(tensors, dims, bases, basis_of):
        return lora_projection.prepare(tensors, dims, bases, basis_of, against, against_of, strength)
    rows: list[list[int]] = []
    for tensor, dim, b, a in zip(tensors, dims, basis_of, against_of, strict=True):
        if tensor.numel() > 0 and bases[b].shape[1] > 0:
            rows += _descriptors(tensor, tensor, dim, bases[b], None if a < 0 else against[a])
    if not rows:
        return lambda: None
    device = tensors[0].device
    tiles = choose_tiles([row[7] for row in rows], [row[6] for row in rows])
    numbers, size = _items(rows, tiles.constexprs["BF"])
    table = torch.tensor(rows, dtype=torch.int64, device=device)
    items = torch.tensor(numbers, dtype=torch.int64, device=device)
    work = torch.empty(2, size, dtype=torch.float32, device=device)
    held = (tensors, bases, against)  # the table has their addresses

    def run() -> None:
        with on_device(held[0][0]):
            _launch(table, items, work, strength, tiles)

    return run


def project_out_grouped(*arguments: Any) -> None:
    """`project_out` of every tensor in place; arguments as in reference.project_out_grouped."""
    prepare_projection(*arguments)()


def configurations() -> Iterator[Configuration]:
    """Both kernels at every tile, which every dtype shares, and the writer of a single table."""
    addresses = {"table_ptr": "*i64", "items_ptr": "*i64", "partial_ptr": "*fp32"}
    for block in _WARPS:
        tiles, name = projection_tiles(block), f"{block[0]},{block[1]}"
        yield Configuration(coefficients_kernel, f"projection.coefficients[{name}]", addresses, tiles)
        signature = {**addresses, "sums_ptr": "*fp32", "strength": "fp32"}
        yield Configuration(update_kernel, f"projection.update[{name}]", signature, tiles)
    values = {f"v{i}": "i64" for i in range(FIELDS)}
    yield Configuration(table_kernel, "projection.table", {"table_ptr": "*i64", **values}, _TABLE)
