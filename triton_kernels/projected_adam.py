"""AdamW on many matrices of one kind, without what it would move along a basis, in two launches on tensor cores.

    m = beta1 m + (1 - beta1) g,  v = beta2 v + (1 - beta2) g^2
    d = -lr / bc1 * m / (sqrt(v / bc2) + eps) - lr weight_decay p          the movement of torch.optim.AdamW
    p += d - s U (U^T d)

    1. adam_coefficients_kernel: m, v and d of one slab of rows, and U^T d over it, [r, 16] fp32, into a workspace. No
       atomics: each element belongs to one program.
    2. adam_update_kernel: adds the slabs of its matrix in ascending order, moves one slab of p.

Matrices, blocks, slabs and products (tf32x3) are those of lora_projection.py, which says why; parameters of one rank
that it would take come here, fp32 only. Gradients have a table of addresses of their own: they may lie elsewhere at
every step, and everything else stays.

Bytes: 16 read and 12 written per parameter by the first sweep, 8 read and 4 written by the second: 40; and U twice.
Roofline prediction (448 LoRA matrices of an 8B model, rank 16, 42 M parameters, H200 at 4.3 TB/s): 0.42, 0.66, 0.92 ms
at r = 8, 64, 128; AdamW alone 0.27 ms. Measured there, called from Python, in the faster of two runs: 2.7, 2.9, 3.3 ms;
AdamW alone 1.7, 1.7, 1.6; AdamW and then the projection of the difference 2.4, 2.7, 3.1. Those are the host's times,
not the device's: AdamW alone took six times its bytes as well. The step asked several tensor operations of every
parameter then (a count read, another counted up); now it asks none (tests/triton/test_projected_adam.py), not measured
since.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .adam import adam_update
from .launch import Configuration, Tiles, on_device
from .lora_projection import ITEM, RANKS, WIDEST_BASIS, WIDTH, fits, lora_tiles, padded_rank, rows_of

FIELDS = 8  # of a descriptor, int64: addresses of p, m, v, d, U; n, fibres, whether the basis spans the last dimension


@triton.jit
def _move(
    place, g_at, m_at, v_at, p_at, d_at,
    step_size, beta1, one_minus_beta1, beta2, one_minus_beta2, eps, root_bc2, decay,
):  # fmt: skip
    """Adam at `place` of one matrix: m and v in place, the movement into d; returns it."""
    still = -decay * tl.load(p_at + place)
    d, m, v = adam_update(
        still, tl.load(g_at + place), tl.load(m_at + place), tl.load(v_at + place),
        step_size, beta1, one_minus_beta1, beta2, one_minus_beta2, eps, root_bc2,
    )  # fmt: skip
    tl.store(m_at + place, m)
    tl.store(v_at + place, v)
    tl.store(d_at + place, d)
    return d


@triton.jit
def _fp32_at(address):
    return tl.multiple_of(tl.load(address).to(tl.pointer_type(tl.float32)), 16)


@triton.jit
def adam_coefficients_kernel(
    table_ptr, gradients_ptr, items_ptr, partial_ptr,
    step_size, beta1, one_minus_beta1, beta2, one_minus_beta2, eps, root_bc2, decay,
    SLAB: tl.constexpr, BN: tl.constexpr, BF: tl.constexpr, RANK: tl.constexpr, PADDED: tl.constexpr,
    STAGES: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    """Adam on one slab of rows of one block of fibres, and partial [slab, PADDED, BF]: U^T d over it."""
    item = items_ptr + tl.program_id(0).to(tl.int64) * 4
    matrix = tl.load(item)
    row = table_ptr + matrix * FIELDS
    block = tl.load(item + 1)
    slab = tl.load(item + 2)
    g_at = _fp32_at(gradients_ptr + matrix)
    p_at = _fp32_at(row)
    m_at = _fp32_at(row + 1)
    v_at = _fp32_at(row + 2)
    d_at = _fp32_at(row + 3)
    basis = _fp32_at(row + 4)
    n = tl.multiple_of(tl.load(row + 5), 16)
    fibres = tl.multiple_of(tl.load(row + 6), 16)
    lane = tl.arange(0, BF)
    rank = tl.arange(0, PADDED)
    begin = tl.multiple_of(slab * SLAB, SLAB)
    end = tl.minimum(n, begin + SLAB)
    total = tl.zeros([PADDED, BF], dtype=tl.float32)
    if tl.load(row + 7) == 1:  # the projected dimension is the contiguous one
        for start in tl.range(begin, end, BN, num_stages=STAGES):
            line = start + tl.arange(0, BN)
            u = rows_of(basis, line, rank, RANK, PADDED)
            d = _move(
                (block * BF + lane)[:, None] * n + line[None, :], g_at, m_at, v_at, p_at, d_at,
                step_size, beta1, one_minus_beta1, beta2, one_minus_beta2, eps, root_bc2, decay,
            )  # fmt: skip
            total = tl.dot(tl.trans(u), tl.trans(d), total, input_precision="tf32x3")
    else:
        for start in tl.range(begin, end, BN, num_stages=STAGES):
            line = start + tl.arange(0, BN)
            u = rows_of(basis, line, rank, RANK, PADDED)
            d = _move(
                line[:, None] * fibres + (block * BF + lane)[None, :], g_at, m_at, v_at, p_at, d_at,
                step_size, beta1, one_minus_beta1, beta2, one_minus_beta2, eps, root_bc2, decay,
            )  # fmt: skip
            total = tl.dot(tl.trans(u), d, total, input_precision="tf32x3")
    out = partial_ptr + tl.load(item + 3) + slab * PADDED * BF
    tl.store(out + rank[:, None] * BF + lane[None, :], total)


@triton.jit
def adam_update_kernel(
    table_ptr, items_ptr, partial_ptr, strength,
    SLAB: tl.constexpr, BN: tl.constexpr, BF: tl.constexpr, RANK: tl.constexpr, PADDED: tl.constexpr,
    STAGES: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    """One slab of one block of fibres: p + d - strength * U c, c the sum of the partial sums of all slabs."""
    item = items_ptr + tl.program_id(0).to(tl.int64) * 4
    row = table_ptr + tl.load(item) * FIELDS
    block = tl.load(item + 1)
    slab = tl.load(item + 2)
    p_at = _fp32_at(row)
    d_at = _fp32_at(row + 3)
    basis = _fp32_at(row + 4)
    n = tl.multiple_of(tl.load(row + 5), 16)
    fibres = tl.multiple_of(tl.load(row + 6), 16)
    lane = tl.arange(0, BF)
    rank = tl.arange(0, PADDED)
    begin = tl.multiple_of(slab * SLAB, SLAB)
    end = tl.minimum(n, begin + SLAB)
    partial = partial_ptr + tl.load(item + 3)
    c = tl.zeros([PADDED, BF], dtype=tl.float32)
    for other in range(tl.cdiv(n, SLAB)):
        c += tl.load(partial + other * PADDED * BF + rank[:, None] * BF + lane[None, :])
    c *= strength
    if tl.load(row + 7) == 1:
        turned = tl.trans(c)
        for start in tl.range(begin, end, BN, num_stages=STAGES):
            line = start + tl.arange(0, BN)
            u = rows_of(basis, line, rank, RANK, PADDED)
            place = (block * BF + lane)[:, None] * n + line[None, :]
            d = tl.load(d_at + place) - tl.dot(turned, tl.trans(u), input_precision="tf32x3")
            tl.store(p_at + place, tl.load(p_at + place) + d)
    else:
        for start in tl.range(begin, end, BN, num_stages=STAGES):
            line = start + tl.arange(0, BN)
            u = rows_of(basis, line, rank, RANK, PADDED)
            place = line[:, None] * fibres + (block * BF + lane)[None, :]
            d = tl.load(d_at + place) - tl.dot(u, c, input_precision="tf32x3")
            tl.store(p_at + place, tl.load(p_at + place) + d)


def adam_tiles(rank: int) -> Tiles:
    """The projection's, with one stage less where they spill on sm_90: wide bases whose rows do not begin at 16-byte
    boundaries."""
    tiles = lora_tiles(rank, padded_rank(rank))
    if rank % 4 == 0 or tiles.constexprs["PADDED"] < WIDEST_BASIS:
        return tiles
    return dataclasses.replace(tiles, constexprs={**tiles.constexprs, "STAGES": 2}, num_stages=2)


def takes(parameter: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, dim: int, basis: Tensor) -> bool:
    """Whether these kernels step the parameter; those of one rank go together."""
    tensors = [parameter, exp_avg, exp_avg_sq]
    return parameter.dtype == torch.float32 and fits(tensors, [dim] * 3, [basis], [0] * 3)


def prepare(
    parameters: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    dims: list[int],
    bases: list[Tensor],
    basis_of: list[int],
    strength: float,
) -> Callable[..., None]:
    """Backend.prepare_projected_adam for parameters that this `takes`, of one rank: two launches a call."""
    tiles = adam_tiles(bases[basis_of[0]].shape[1])
    slab, part = tiles.constexprs["SLAB"], tiles.constexprs["PADDED"] * WIDTH
    moved = [torch.empty_like(p) for p in parameters]
    rows: list[list[int]] = []
    items: list[int] = []
    size = 0
    for number, (p, m, v, d, dim, b) in enumerate(
        zip(parameters, exp_avgs, exp_avg_sqs, moved, dims, basis_of, strict=True)
    ):
        n, fibres = p.shape[dim], p.shape[1 - dim]
        rows.append([*(t.data_ptr() for t in (p, m, v, d, bases[b])), n, fibres, int(dim == 1)])
        slabs = triton.cdiv(n, slab)
        for block in range(fibres // WIDTH):
            for index in range(slabs):
                items += (number, block, index, size)
            size += slabs * part
    device = parameters[0].device
    table = torch.tensor(rows, dtype=torch.int64, device=device)
    item_table = torch.tensor(items, dtype=torch.int64, device=device)
    work = torch.empty(size, dtype=torch.float32, device=device)
    held = (parameters, exp_avgs, exp_avg_sqs, moved, bases)  # the table has their addresses
    grid = (len(items) // ITEM,)
    known: tuple[list[int], list[int], Tensor] = ([], [], table)  # of the last gradients

    def run(gradients: list[Tensor], *numbers: float) -> None:
        nonlocal known
        lr, beta1, beta2, eps, bias_correction1, bias_correction2, weight_decay = numbers
        now = list(map(Tensor.data_ptr, gradients))
        if now != known[0]:
            # A gradient that is a view into a bucket of many can begin anywhere.
            unaligned = [i for i, address in enumerate(now) if address % 16]
            known = now, unaligned, _on_device(now, device)
        addresses = known[2]
        if known[1]:
            copies = {i: gradients[i].clone() for i in known[1]}
            addresses = _on_device([copies[i].data_ptr() if i in copies else at for i, at in enumerate(now)], device)
        scalars = (
            lr / bias_correction1, beta1, 1 - beta1, beta2, 1 - beta2, eps, bias_correction2**0.5, lr * weight_decay
        )  # fmt: skip
        with on_device(held[0][0]):
            adam_coefficients_kernel[grid](table, addresses, item_table, work, *scalars, **tiles.options())
            adam_update_kernel[grid](table, item_table, work, strength, **tiles.options())

    return run


def _on_device(addresses: list[int], device: torch.device) -> Tensor:
    """Without a wait for the stream, which a copy from memory that is not pinned would be."""
    table = torch.tensor(addresses, dtype=torch.int64, device="cpu")
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


def configurations() -> Iterator[Configuration]:
    """Both kernels at every width of the basis, the widest, which takes the most registers, on every architecture; and
    at the ranks that stand for all below a width."""
    adam = ("step_size", "beta1", "one_minus_beta1", "beta2", "one_minus_beta2", "eps", "root_bc2", "decay")
    tables = {"table_ptr": "*i64", "items_ptr": "*i64", "partial_ptr": "*fp32"}
    first = {"table_ptr": "*i64", "gradients_ptr": "*i64", "items_ptr": "*i64", "partial_ptr": "*fp32"}
    for rank in RANKS:
        tiles, variant = adam_tiles(rank), rank != 128
        yield Configuration(
            adam_coefficients_kernel,
            f"projected_adam.coefficients[{rank}]",
            {**first, **dict.fromkeys(adam, "fp32")},
            tiles,
            variant=variant,
        )
        yield Configuration(
            adam_update_kernel,
            f"projected_adam.update[{rank}]",
            {**tables, "strength": "fp32"},
            tiles,
            variant=variant,
        )
