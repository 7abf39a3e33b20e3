"""The projection of many matrices of one kind, as the gradients of a LoRA are, in two launches on tensor cores.

    c = U^T G,  G -= s U c                 (sides, sums and `only_against` as in projection.py, which takes the rest)

A plan comes here when all its tensors have one dtype, all bases one rank r <= 128, and every tensor is a contiguous,
16-byte aligned matrix with a multiple of 64 rows along the projected dimension and a multiple of 16 fibres. Then
strides, masks and alignment are known when the kernel is compiled: loads are 16 bytes wide, run ahead of the products
through shared memory, and follow the side: B [out, 16] is read along its fibres, A [16, in] along the projected
dimension and turned in registers.

    1. lora_coefficients_kernel: U^T G over one slab of rows, [r, 16] fp32, into a workspace. No atomics.
    2. lora_update_kernel: adds the slabs of its matrix in ascending order, subtracts U c from one slab.

Products are tf32x3: every fp32 operand is the sum of two tf32 numbers, three of the four products are taken, the error
is that of fp32 to within a factor of two. (FMA, as in projection.py, reads two operands of every multiplication from
shared memory: measured on an H200, 2.9 ms at r = 64 where bytes take 0.4.)

Bytes: 3 passes over G (2 read, 1 written), 2 over U; 448 LoRA matrices of an 8B model, rank 16, fp32: 0.71, 1.64,
2.79 GB at r = 8, 64, 128. Roofline prediction (H200 at 4.3 TB/s): 0.16, 0.38, 0.65 ms.
Measured in a CUDA graph: 0.25, 0.50, 0.94 ms.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Configuration, Tiles, on_device

WIDTH = 16  # fibres of a block: the rank of a LoRA, and the narrowest operand of a tensor core
WIDEST_BASIS = 128
SLAB = 1024
FIELDS = 8  # of a descriptor, int64
ITEM = 4  # descriptor, block of fibres, slab, where the block's partial sums begin


@triton.jit
def rows_of(basis, line, rank, RANK: tl.constexpr, PADDED: tl.constexpr):
    """u [BN, PADDED] of the rows `line`, which exist; columns beyond RANK are 0."""
    at = basis + line[:, None] * RANK + rank[None, :]
    if RANK == PADDED:
        return tl.load(at)
    return tl.load(at, mask=(rank < RANK)[None, :], other=0.0)


@triton.jit
def lora_coefficients_kernel(
    table_ptr, items_ptr, partial_ptr, like_ptr,
    SLAB: tl.constexpr, BN: tl.constexpr, BF: tl.constexpr, RANK: tl.constexpr, PADDED: tl.constexpr,
    STAGES: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    """partial [slab, PADDED, BF] of one block of fibres: U^T G over one slab of rows."""
    item = items_ptr + tl.program_id(0).to(tl.int64) * 4
    row = table_ptr + tl.load(item) * FIELDS
    block = tl.load(item + 1)
    slab = tl.load(item + 2)
    source = tl.multiple_of(tl.load(row).to(tl.pointer_type(like_ptr.dtype.element_ty)), 16)
    basis = tl.multiple_of(tl.load(row + 1).to(tl.pointer_type(tl.float32)), 16)
    n = tl.multiple_of(tl.load(row + 3), 16)
    fibres = tl.multiple_of(tl.load(row + 4), 16)
    lane = tl.arange(0, BF)
    rank = tl.arange(0, PADDED)
    begin = tl.multiple_of(slab * SLAB, SLAB)
    end = tl.minimum(n, begin + SLAB)
    total = tl.zeros([PADDED, BF], dtype=tl.float32)
    if tl.load(row + 5) == 1:  # the projected dimension is the contiguous one
        for start in tl.range(begin, end, BN, num_stages=STAGES):
            line = start + tl.arange(0, BN)
            u = rows_of(basis, line, rank, RANK, PADDED)
            g = tl.load(source + (block * BF + lane)[:, None] * n + line[None, :]).to(tl.float32)
            total = tl.dot(tl.trans(u), tl.trans(g), total, input_precision="tf32x3")
    else:
        for start in tl.range(begin, end, BN, num_stages=STAGES):
            line = start + tl.arange(0, BN)
            u = rows_of(basis, line, rank, RANK, PADDED)
            g = tl.load(source + line[:, None] * fibres + (block * BF + lane)[None, :]).to(tl.float32)
            total = tl.dot(tl.trans(u), g, total, input_precision="tf32x3")
    out = partial_ptr + tl.load(item + 3) + slab * PADDED * BF
    tl.store(out + rank[:, None] * BF + lane[None, :], total)


@triton.jit
def lora_update_kernel(
    table_ptr, items_ptr, partial_ptr, like_ptr, strength,
    SLAB: tl.constexpr, BN: tl.constexpr, BF: tl.constexpr, RANK: tl.constexpr, PADDED: tl.constexpr,
    STAGES: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    """One slab of one block of fibres: G - strength * U c, c the sum of the partial sums of all slabs."""
    item = items_ptr + tl.program_id(0).to(tl.int64) * 4
    row = table_ptr + tl.load(item) * FIELDS
    block = tl.load(item + 1)
    slab = tl.load(item + 2)
    source = tl.multiple_of(tl.load(row).to(tl.pointer_type(like_ptr.dtype.element_ty)), 16)
    basis = tl.multiple_of(tl.load(row + 1).to(tl.pointer_type(tl.float32)), 16)
    against = tl.load(row + 2)
    n = tl.multiple_of(tl.load(row + 3), 16)
    fibres = tl.multiple_of(tl.load(row + 4), 16)
    lane = tl.arange(0, BF)
    rank = tl.arange(0, PADDED)
    begin = tl.multiple_of(slab * SLAB, SLAB)
    end = tl.minimum(n, begin + SLAB)
    partial = partial_ptr + tl.load(item + 3)
    c = tl.zeros([PADDED, BF], dtype=tl.float32)
    for other in range(tl.cdiv(n, SLAB)):
        c += tl.load(partial + other * PADDED * BF + rank[:, None] * BF + lane[None, :])
    if against != 0:
        direction = tl.load(against.to(tl.pointer_type(tl.float32)) + rank, mask=rank < RANK, other=0.0)
        opposed = tl.sum(direction[:, None] * c, axis=0) < 0.0
        c = tl.where(opposed[None, :], c, 0.0)
    c *= strength
    if tl.load(row + 5) == 1:
        turned = tl.trans(c)
        for start in tl.range(begin, end, BN, num_stages=STAGES):
            line = start + tl.arange(0, BN)
            u = rows_of(basis, line, rank, RANK, PADDED)
            place = source + (block * BF + lane)[:, None] * n + line[None, :]
            g = tl.load(place).to(tl.float32) - tl.dot(turned, tl.trans(u), input_precision="tf32x3")
            tl.store(place, g.to(source.dtype.element_ty))
    else:
        for start in tl.range(begin, end, BN, num_stages=STAGES):
            line = start + tl.arange(0, BN)
            u = rows_of(basis, line, rank, RANK, PADDED)
            place = source + line[:, None] * fibres + (block * BF + lane)[None, :]
            g = tl.load(place).to(tl.float32) - tl.dot(u, c, input_precision="tf32x3")
            tl.store(place, g.to(source.dtype.element_ty))


# (columns of U, padded) -> rows of U in flight, warps, stages.
_TILES = dict.fromkeys((16, 32, 64, 128), (64, 4, 3))  # measured on an H200 against 32 rows, 8 warps, 2 stages
ROWS = 64  # what every BN divides


def lora_tiles(rank: int, padded: int) -> Tiles:
    rows, warps, stages = _TILES[padded]
    constexprs = {
        "SLAB": SLAB, "BN": rows, "BF": WIDTH, "RANK": rank, "PADDED": padded, "STAGES": stages, "FIELDS": FIELDS
    }  # fmt: skip
    return Tiles(constexprs, warps, stages)


# The widths, and below each a rank whose rows of U begin at 16-byte boundaries and one whose rows do not: these stand
# for all ranks.
RANKS = (16, 32, 64, 128, 8, 9, 20, 21, 48, 49, 100, 101)


def padded_rank(rank: int) -> int:
    return next(width for width in _TILES if width >= rank)


def fits(tensors: list[Tensor], dims: list[int], bases: list[Tensor], basis_of: list[int]) -> bool:
    """Whether these kernels take the plan; see the module's docstring."""
    used = [bases[b] for b in basis_of]
    return (
        len({t.dtype for t in tensors}) == 1
        and len({u.shape[1] for u in used}) == 1
        and 0 < used[0].shape[1] <= WIDEST_BASIS
        and all(t.dim() == 2 and t.is_contiguous() and t.data_ptr() % 16 == 0 for t in tensors)
        and all(u.is_contiguous() and u.data_ptr() % 16 == 0 for u in used)
        and all(
            t.shape[dim] % ROWS == 0 and t.shape[1 - dim] % WIDTH == 0 for t, dim in zip(tensors, dims, strict=True)
        )
        and all(t.numel() > 0 for t in tensors)
    )


def prepare(
    tensors: list[Tensor],
    dims: list[int],
    bases: list[Tensor],
    basis_of: list[int],
    against: list[Tensor],
    against_of: list[int],
    strength: float,
) -> Callable[[], None]:
    """projection.prepare_projection for a plan that `fits`: two launches a call."""
    rank = bases[basis_of[0]].shape[1]
    tiles = lora_tiles(rank, padded_rank(rank))
    slab, part = tiles.constexprs["SLAB"], tiles.constexprs["PADDED"] * WIDTH
    rows: list[list[int]] = []
    items: list[int] = []
    size = 0
    for number, (tensor, dim, b, a) in enumerate(zip(tensors, dims, basis_of, against_of, strict=True)):
        n, fibres = tensor.shape[dim], tensor.shape[1 - dim]
        address = 0 if a < 0 else against[a].data_ptr()
        rows.append([tensor.data_ptr(), bases[b].data_ptr(), address, n, fibres, int(dim == 1), 0, 0])
        slabs = triton.cdiv(n, slab)
        for block in range(fibres // WIDTH):
            for index in range(slabs):
                items += (number, block, index, size)
            size += slabs * part
    device = tensors[0].device
    table = torch.tensor(rows, dtype=torch.int64, device=device)
    item_table = torch.tensor(items, dtype=torch.int64, device=device)
    work = torch.empty(size, dtype=torch.float32, device=device)
    held = (tensors, bases, against)  # the table has their addresses
    grid = (len(items) // ITEM,)

    def run() -> None:
        like = held[0][0]
        with on_device(like):
            lora_coefficients_kernel[grid](table, item_table, work, like, **tiles.options())
            lora_update_kernel[grid](table, item_table, work, like, strength, **tiles.options())

    return run


def configurations() -> Iterator[Configuration]:
    """Both kernels at every width of the basis, in every dtype; and for each at two ranks below it, one whose rows of U
    begin at 16-byte boundaries and one whose rows do not."""
    addresses = {"table_ptr": "*i64", "items_ptr": "*i64", "partial_ptr": "*fp32"}
    for name, rank in itertools.product(("fp32", "bf16", "fp16"), RANKS):
        padded = padded_rank(rank)
        signature = {**addresses, "like_ptr": f"*{name}"}
        tiles, variant = lora_tiles(rank, padded), name == "fp16" or rank != padded
        label = f"{name},{rank}"
        yield Configuration(
            lora_coefficients_kernel, f"lora_projection.coefficients[{label}]", signature, tiles, variant=variant
        )
        yield Configuration(
            lora_update_kernel,
            f"lora_projection.update[{label}]",
            {**signature, "strength": "fp32"},
            tiles,
            variant=variant,
        )
