"""lora_projection.py in one launch: the second sweep over U and G as close behind the first as it can be.

    c = U^T G,  G -= s U c                 (plans that lora_projection.py takes; nothing chooses this form yet)

With two launches the second sweep begins when the first has read everything, so U and G come from DRAM twice. Here both
sweeps are items of one list, in which a slab of rows is updated soon after it was read, while the L2 still has it:

    coefficients   U^T G over one slab, [r, 16] fp32, into a workspace; the last of a block of 16 fibres adds up the
                   block's slabs in ascending order and stores s c
    update         waits for the c of its block, subtracts U c from one slab

The last one adds, not every update, because slabs are small: 56 updates that each add 56 slabs, as a matrix of 14336
rows has, would read three times as much as U and G are.

Order. A program takes the next number of a counter, its ticket, and works on that item of the list. In the list all
coefficients of a block stand before its updates, so whoever waits, waits for coefficients of lower tickets, whose
programs have started and wait for nobody: the launch ends, however many programs run at a time and in whatever order
the device starts them. Between the last coefficients of a block and its first update stand those of `lag` slabs more,
and about as many updates: twice `lag` is the number of programs that run at a time, so c is there when its update
starts. Sums are those of two launches with slabs of the same size, in the same order: every call gives the same bits.

Memory model. What the threads of a program store is ordered before the barrier, which is ordered before one thread's
release; the acquire of the thread that sees the count is ordered before a barrier, and that before the loads. In the
PTX for sm_90 this was read: st.global of the partial sums, bar.sync, atom.acq_rel.gpu, bar.sync, ld.global.cg of the
partial sums; st.global of c, bar.sync, red.release.gpu; and in the update a loop of ld.acquire.gpu (what Triton 3.9
makes of an addition of 0) and bar.sync, then ld.global.cg of c. Nothing was moved over these; in the machine code
MEMBAR.ALL.GPU stands before a release and CCTL.IVALL, which empties the L1, after an acquire.

Size of a slab. Between the two visits of a slab, 2 lag others are visited. At r = 64, 256 rows are 64 KB of U and 16 of
G; three programs on each of 132 SMs make lag 198, so 2 * 198 * 80 KB = 32 MB of an H200's 50 MB of L2. With 512 rows
it would be 65 MB; with 128, 16 MB, but then what a program takes to begin and to end, 3 to 4 us by estimate, is more
than what it takes to read. r = 16: 512 rows, 26 MB (8: 19 MB); r = 32: 384 rows, 29 MB; r = 128, where registers leave
two programs on an SM: 256 rows, 2 * 132 * 144 KB = 39 MB.

Bytes of the 448 LoRA matrices of lora_projection.py at r = 8, 64, 128. DRAM: U and G once, G written, 0.41, 0.91, 1.48
GB, and partial sums written, 0.01, 0.04, 0.08. L2 to the SMs and back, where a basis counts for every matrix that has
it: U and G twice, G written, 0.67, 1.85, 3.19 GB; partial sums and c, 0.02, 0.13, 0.25. Prediction for an H200, made
before any measurement: 0.10, 0.22, 0.36 ms of DRAM at 4.3 TB/s, 0.12, 0.36, 0.63 ms of L2 at 5.5 TB/s. The L2 is the
roof: at the share of their roof that the two launches reach, 0.75, that is 0.17, 0.48, 0.83 ms (two launches, measured
in a CUDA graph: 0.25, 0.50, 0.94). Less than that at r >= 64 needs fewer bytes to the SMs: one read of U for all
matrices that share it would save a tenth.

STATUS: compiled for sm_80/90/100 and interpreted, not run on a GPU.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Configuration, Tiles, on_device
from .lora_projection import RANKS, WIDTH, fits, lora_tiles, padded_rank, rows_of

FIELDS = 16  # of an item, int64: a line of the L2, so that no load waits for another as with a table of descriptors
FIRST = 32  # where the counters of blocks begin: that of tickets has a line of the L2 for itself


@triton.jit
def lora_lagged_kernel(
    items_ptr, partial_ptr, sums_ptr, counters_ptr, like_ptr, strength,
    BN: tl.constexpr, BF: tl.constexpr, RANK: tl.constexpr, PADDED: tl.constexpr,
    STAGES: tl.constexpr, TOGETHER: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    """One item of the list: the coefficients of one slab of one block of fibres, or its update."""
    ticket = tl.atomic_add(counters_ptr, 1, sem="relaxed", scope="gpu")
    if ticket == tl.num_programs(0) - 1:
        tl.store(counters_ptr, 0)  # for the next launch: in this one every program has taken its ticket
    item = items_ptr + ticket.to(tl.int64) * FIELDS
    source = tl.multiple_of(tl.load(item).to(tl.pointer_type(like_ptr.dtype.element_ty)), 16)
    basis = tl.multiple_of(tl.load(item + 1).to(tl.pointer_type(tl.float32)), 16)
    against = tl.load(item + 2)
    n = tl.multiple_of(tl.load(item + 3), 16)
    fibres = tl.multiple_of(tl.load(item + 4), 16)
    contiguous = tl.load(item + 5)  # 1: the projected dimension is the contiguous one
    is_update = tl.load(item + 6)
    begin = tl.multiple_of(tl.load(item + 7), BN)
    end = tl.load(item + 8)
    first_fibre = tl.multiple_of(tl.load(item + 9), BF)
    slab = tl.load(item + 10)
    slabs = tl.load(item + 11)
    partial = partial_ptr + tl.multiple_of(tl.load(item + 12), PADDED * BF)
    sums = sums_ptr + tl.multiple_of(tl.load(item + 13), PADDED * BF)
    # Of this block: slabs whose partial sums are stored, then 1 for c, then updates that will not look again.
    counter = counters_ptr + tl.load(item + 14)
    rank = tl.arange(0, PADDED)
    lane = tl.arange(0, BF)
    place = rank[:, None] * BF + lane[None, :]
    fibre = first_fibre + lane
    if is_update == 0:
        total = tl.zeros([PADDED, BF], dtype=tl.float32)
        if contiguous == 1:
            for start in tl.range(begin, end, BN, num_stages=STAGES):
                line = start + tl.arange(0, BN)
                u = rows_of(basis, line, rank, RANK, PADDED)
                g = tl.load(source + fibre[:, None] * n + line[None, :]).to(tl.float32)
                total = tl.dot(tl.trans(u), tl.trans(g), total, input_precision="tf32x3")
        else:
            for start in tl.range(begin, end, BN, num_stages=STAGES):
                line = start + tl.arange(0, BN)
                u = rows_of(basis, line, rank, RANK, PADDED)
                g = tl.load(source + line[:, None] * fibres + fibre[None, :]).to(tl.float32)
                total = tl.dot(tl.trans(u), g, total, input_precision="tf32x3")
        tl.store(partial + slab * PADDED * BF + place, total)
        # One thread counts for all, so all must have stored; and what they stored is released with the count.
        tl.debug_barrier()
        arrived = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
        if arrived == slabs - 1:
            tl.debug_barrier()
            c = tl.zeros([PADDED, BF], dtype=tl.float32)
            # Loads of several slabs at a time: one by one, every addition would wait for the way to the L2 and back.
            # .cg: from the L2, where the others' stores are.
            for first in range(0, slabs, TOGETHER):
                for i in tl.static_range(TOGETHER):
                    other = first + i
                    live = rank < tl.where(other < slabs, RANK, 0)
                    at = partial + other * PADDED * BF + place
                    c += tl.load(at, mask=live[:, None], other=0.0, cache_modifier=".cg")
            if against != 0:
                direction = tl.load(against.to(tl.pointer_type(tl.float32)) + rank, mask=rank < RANK, other=0.0)
                opposed = tl.sum(direction[:, None] * c, axis=0) < 0.0
                c = tl.where(opposed[None, :], c, 0.0)
            tl.store(sums + place, c * strength)
            tl.debug_barrier()
            tl.atomic_add(counter, 1, sem="release", scope="gpu")
    else:
        seen = tl.atomic_add(counter, 0, sem="acquire", scope="gpu")
        while seen <= slabs:
            seen = tl.atomic_add(counter, 0, sem="acquire", scope="gpu")
        tl.debug_barrier()  # one thread has seen it; the others load after it
        c = tl.load(sums + place, cache_modifier=".cg")
        # The counter stood at slabs + 1 when the first update came here and rises by one with each: the last finds 2
        # slabs. All others have then seen what they waited for, and nobody in this launch looks again. The next launch
        # begins when this one has ended. (One that is cut off leaves other numbers, but no context to launch in.)
        if tl.atomic_add(counter, 1, sem="relaxed", scope="gpu") == 2 * slabs:
            tl.store(counter, 0)
        if contiguous == 1:
            turned = tl.trans(c)
            for start in tl.range(begin, end, BN, num_stages=STAGES):
                line = start + tl.arange(0, BN)
                u = rows_of(basis, line, rank, RANK, PADDED)
                at = source + fibre[:, None] * n + line[None, :]
                g = tl.load(at).to(tl.float32) - tl.dot(turned, tl.trans(u), input_precision="tf32x3")
                tl.store(at, g.to(source.dtype.element_ty))
        else:
            for start in tl.range(begin, end, BN, num_stages=STAGES):
                line = start + tl.arange(0, BN)
                u = rows_of(basis, line, rank, RANK, PADDED)
                at = source + line[:, None] * fibres + fibre[None, :]
                g = tl.load(at).to(tl.float32) - tl.dot(u, c, input_precision="tf32x3")
                tl.store(at, g.to(source.dtype.element_ty))


@dataclass(frozen=True)
class Sizes:
    """What a width of the basis is worked on with; see the module's docstring."""

    rows: int  # of a slab
    programs: int  # that run on an SM at a time: registers and shared memory of sm_90
    together: int  # slabs whose partial sums are loaded at a time


# Columns of U, padded. Four slabs at 32 columns, where eight take the registers of a third program.
SIZES = {16: Sizes(512, 3, 8), 32: Sizes(384, 3, 4), 64: Sizes(256, 3, 8), 128: Sizes(256, 2, 8)}
SMS = 132  # where there is no device to ask


def lagged_tiles(rank: int, padded: int) -> Tiles:
    """lora_projection.py's, but for the slab, which is in the items."""
    shared = lora_tiles(rank, padded)
    constexprs = {name: value for name, value in shared.constexprs.items() if name != "SLAB"}
    constexprs |= {"TOGETHER": SIZES[padded].together, "FIELDS": FIELDS}
    return Tiles(constexprs, shared.num_warps, shared.num_stages)


def default_lag(device: torch.device, padded: int) -> int:
    """Slabs between the coefficients of a block and its updates: half as many as programs run at a time."""
    sms = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else SMS
    return sms * SIZES[padded].programs // 2


def order(slabs: list[int], lag: int) -> Iterator[tuple[bool, int, int]]:
    """(whether an update, block, slab) of every item, for blocks of so many slabs.

    Coefficients by block and slab. Updates in the same order, as soon as the coefficients of `lag` slabs stand between
    them and the last of their block, but at most two after each, so that reads of DRAM and of L2 are mixed; the rest
    where no coefficients are left.
    """
    waiting: deque[tuple[int, int, int]] = deque()  # coefficients that must be out, block, slab
    out = 0
    for block, of_block in enumerate(slabs):
        for slab in range(of_block):
            yield False, block, slab
            out += 1
            if slab == of_block - 1:
                waiting.extend((out + lag, block, other) for other in range(of_block))
            for _ in range(2):
                if waiting and waiting[0][0] <= out:
                    yield True, *waiting.popleft()[1:]
    for _, block, slab in waiting:
        yield True, block, slab


@dataclass(frozen=True)
class Launch:
    """A prepared plan: one launch a call.

    A call must have ended on the device before the next of the same plan begins, as with two launches: they share
    tensors and workspace, and here counters.
    """

    items: Tensor
    partial: Tensor
    sums: Tensor
    counters: Tensor  # 0 before and after a launch
    strength: float
    tiles: Tiles
    tensors: list[Tensor]
    held: tuple[list[Tensor], list[Tensor]]  # the items have their addresses

    def __call__(self) -> None:
        like = self.tensors[0]
        with on_device(like):
            lora_lagged_kernel[(self.items.shape[0],)](
                self.items, self.partial, self.sums, self.counters, like, self.strength, **self.tiles.options()
            )


def prepare(
    tensors: list[Tensor],
    dims: list[int],
    bases: list[Tensor],
    basis_of: list[int],
    against: list[Tensor],
    against_of: list[int],
    strength: float,
    *,
    slab: int | None = None,
    lag: int | None = None,
) -> Launch:
    """lora_projection.prepare in one launch a call. `slab`: rows, a multiple of 64; `lag` as in `order`."""
    rank = bases[basis_of[0]].shape[1]
    padded = padded_rank(rank)
    part, device = padded * WIDTH, tensors[0].device
    height = slab or SIZES[padded].rows
    blocks: list[tuple[list[int], int, int, int]] = []  # fields of all its items, first fibre, slabs, partial sums at
    size = 0
    for tensor, dim, b, a in zip(tensors, dims, basis_of, against_of, strict=True):
        n, fibres = tensor.shape[dim], tensor.shape[1 - dim]
        address = 0 if a < 0 else against[a].data_ptr()
        fields = [tensor.data_ptr(), bases[b].data_ptr(), address, n, fibres, int(dim == 1)]
        slabs = triton.cdiv(n, height)
        for first in range(0, fibres, WIDTH):
            blocks.append((fields, first, slabs, size))
            size += slabs * part
    items = []
    for update, block, index in order([b[2] for b in blocks], default_lag(device, padded) if lag is None else lag):
        fields, first, slabs, place = blocks[block]
        begin, end = index * height, min(fields[3], (index + 1) * height)
        row = [*fields, int(update), begin, end, first, index, slabs, place, block * part, FIRST + block]
        items.append(row + [0] * (FIELDS - len(row)))
    return Launch(
        items=torch.tensor(items, dtype=torch.int64, device=device),
        partial=torch.empty(size, dtype=torch.float32, device=device),
        sums=torch.empty(len(blocks) * part, dtype=torch.float32, device=device),
        counters=torch.zeros(FIRST + len(blocks), dtype=torch.int32, device=device),
        strength=strength,
        tiles=lagged_tiles(rank, padded),
        tensors=tensors,
        held=(bases, against),
    )


# How the Triton back-end calls a plan that lora_projection.py takes.
PATHS = ("two launches", "one launch")
_chosen: ContextVar[tuple[str, int | None, int | None]] = ContextVar("path", default=(PATHS[0], None, None))


@contextlib.contextmanager
def using(path: str, slab: int | None = None, lag: int | None = None) -> Iterator[None]:
    """Plans that are first called in the block go by `path` of PATHS, and stay with it; for measurements and tests."""
    if path not in PATHS:
        raise ValueError(f"path must be one of {', '.join(PATHS)}; got {path!r}")
    token = _chosen.set((path, slab, lag))
    try:
        yield
    finally:
        _chosen.reset(token)


def prepare_if_chosen(*arguments: Any) -> Callable[[], None] | None:
    """`prepare` where a block of `using` asks for it and the plan fits, else None."""
    path, slab, lag = _chosen.get()
    tensors, dims, bases, basis_of = arguments[:4]
    if path != PATHS[1] or not tensors or not fits(tensors, dims, bases, basis_of):
        return None
    return prepare(*arguments, slab=slab, lag=lag)


def configurations() -> Iterator[Configuration]:
    """The kernel as lora_projection.py's are registered."""
    fixed = {
        "items_ptr": "*i64", "partial_ptr": "*fp32", "sums_ptr": "*fp32", "counters_ptr": "*i32", "strength": "fp32"
    }  # fmt: skip
    for name, rank in itertools.product(("fp32", "bf16", "fp16"), RANKS):
        padded = padded_rank(rank)
        yield Configuration(
            lora_lagged_kernel,
            f"lora_projection.lagged[{name},{rank}]",
            {**fixed, "like_ptr": f"*{name}"},
            lagged_tiles(rank, padded),
            variant=name == "fp16" or rank != padded,
        )
