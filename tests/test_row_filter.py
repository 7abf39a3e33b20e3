"""The CUDA row filter's algorithm, without a GPU: csrc/cuda/row_filter_warp.h by 32 fibers in the place of 32 lanes.

The same header is compiled by g++ that nvcc compiles into the kernel. What this cannot show: the hardware's memory
model, alignment faults, speed. `-m gpu` (tests/test_gpu.py) runs the kernel itself.
"""

from __future__ import annotations

import ctypes
import math
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent


Select = Callable[..., tuple[Tensor, Tensor]]


@pytest.fixture
def select(emulated_row_filter: ctypes.CDLL) -> Select:
    def run(
        pre: Tensor, bias: Tensor, k: int, chunk: int, vector: bool = False, backwards: bool = False, head: int = 0
    ) -> tuple[Tensor, Tensor]:
        """values, indices [R, k] of pre [R, F] taken in chunks of columns; `head`: a smaller one first, by scalars."""
        rows, n_latents = pre.shape
        keys = torch.full((rows, emulated_row_filter.capacity()), -1, dtype=torch.int64)
        count, limit = (torch.full((rows,), 0x5A5A5A5A, dtype=torch.int32) for _ in range(2))
        bias = bias.contiguous()
        for first in [*([0] if head else []), *range(head, n_latents, chunk)]:
            part = pre[:, first : (head if first < head else first + chunk)].contiguous()
            last = first + part.shape[1] == n_latents
            pointers = [ctypes.c_void_p(t.data_ptr()) for t in (part, bias, keys, count, limit)]
            flags = (int(last), int(vector and first >= head), int(backwards))
            problem = emulated_row_filter.filter_chunk(*pointers, ctypes.c_int64(rows), part.shape[1], first, k, *flags)
            assert problem is None, problem
        best = keys[:, :k]
        values = (best >> 32).to(torch.int32).view(torch.float32)
        return values, 0x7FFFFFFF - (best & 0x7FFFFFFF)

    return run


def expected(pre: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """A stable descending sort of relu(pre + bias), NaN first."""
    code = torch.relu(pre + bias)
    best = torch.sort(torch.where(code.isnan(), math.inf, code), dim=1, descending=True, stable=True).indices
    # NaN before infinity, each by ascending latent.
    nan_first = torch.sort(code.isnan().gather(1, best).int(), dim=1, descending=True, stable=True).indices
    indices = best.gather(1, nan_first)[:, :k]
    return code.gather(1, indices), indices


def same(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(found[1], wanted[1])
    assert torch.equal(found[0].nan_to_num(nan=-1.0), wanted[0].nan_to_num(nan=-1.0))


def rows_of(kind: str, n_latents: int) -> Tensor:
    torch.manual_seed(0)
    pre = torch.randn(3, n_latents)
    if kind == "ties":
        pre = torch.randint(-2, 3, pre.shape).float()
    elif kind == "ascending":
        pre = pre.sort(dim=1).values
    elif kind == "descending":
        pre = pre.sort(dim=1, descending=True).values
    elif kind == "equal":
        pre = torch.ones_like(pre)
    elif kind == "few positives":
        pre = torch.where(torch.rand_like(pre) < 0.99, -pre.abs(), pre)
    elif kind == "negative":
        pre = -pre.abs() - 0.1
    elif kind == "odd numbers":
        odd = torch.tensor([math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, -1e-45, 3e38])
        pre = odd[torch.randint(len(odd), pre.shape)]
    elif kind == "all nan":
        pre = torch.full_like(pre, math.nan)
    elif kind == "nan at first":  # the limit becomes NaN, which nothing beats, NaN least of all
        pre[:, :600] = torch.where(torch.rand(3, 600) < 0.5, math.nan, pre[:, :600])
        pre[:, 700::50], pre[:, 701::50] = math.nan, math.inf
    elif kind == "lonely nan":  # no other column of its step is a candidate
        pre = pre.sort(dim=1, descending=True).values
        pre[:, [700, 1000, n_latents - 1]] = math.nan
    elif kind == "an ulp above":  # fewer than k beat the limit, by its last bit
        pre = torch.ones_like(pre)
        pre[:, 600::150] = 1 + 2**-23
    elif kind == "-inf at first":
        pre[:, :1300] = -math.inf
    elif kind == "zero, then positive":  # the limit is 0 until a step in which more than a list's worth beats it
        pre = torch.where(torch.arange(n_latents) < 1330, -pre.abs(), pre.abs())
    elif kind == "nearly equal":  # differ in the last bits: the search must go through all of them
        pre = (torch.full(pre.shape, 1.5).view(torch.int32) + torch.randint(3, pre.shape, dtype=torch.int32)).view(
            torch.float32
        )
    return pre


KINDS = (
    "random", "ties", "ascending", "descending", "equal", "few positives", "negative", "odd numbers", "all nan",
    "nan at first", "lonely nan", "-inf at first", "an ulp above", "zero, then positive", "nearly equal",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("k", "chunk"), [(1, 640), (64, 640), (256, 640), (31, 2000), (256, 2000), (100, 90)])
def test_equals_a_stable_sort(select: Select, kind: str, k: int, chunk: int) -> None:
    """Several chunks and reductions, and a last chunk that is no multiple of anything."""
    pre = rows_of(kind, 1999)
    bias = (
        torch.zeros(1999)
        if kind in ("odd numbers", "nearly equal", "lonely nan", "an ulp above")
        else torch.randint(-1, 2, (1999,)).float()
    )
    same(select(pre, bias, k, chunk), expected(pre, bias, k))


@pytest.mark.parametrize("kind", ["random", "ascending", "odd numbers", "nan at first", "zero, then positive"])
@pytest.mark.parametrize("chunk", [4, 260, 1024, 1560])
def test_vector_loads_and_either_order_of_the_lanes_give_the_same_bits(select: Select, kind: str, chunk: int) -> None:
    pre, bias = rows_of(kind, 1560), torch.linspace(-0.01, 0.01, 1560)
    one = select(pre, bias, 48, chunk)
    same(one, expected(pre, bias, 48))
    for vector in (False, True):
        for backwards in (False, True):
            same(select(pre, bias, 48, chunk, vector, backwards), one)


@pytest.mark.parametrize("n_latents", [1, 5, 31, 32, 33, 255, 256])
def test_k_equal_to_the_number_of_latents(select: Select, n_latents: int) -> None:
    pre, bias = rows_of("ties", n_latents), torch.zeros(n_latents)
    same(select(pre, bias, n_latents, 100), expected(pre, bias, n_latents))


def test_a_list_that_is_exactly_full_is_reduced_once(select: Select, emulated_row_filter: ctypes.CDLL) -> None:
    """512 first columns fit; the 513th makes room first. Both sides of the edge, with the best at either end."""
    capacity = emulated_row_filter.capacity()
    for n in (capacity - 1, capacity, capacity + 1, 2 * capacity):
        for pre in (torch.arange(1.0, n + 1), torch.arange(n, 0, -1.0)):
            bias = torch.zeros(n)
            same(
                select(pre[None], bias, emulated_row_filter.most_k(), n),
                expected(pre[None], bias, emulated_row_filter.most_k()),
            )


@pytest.mark.parametrize("second", [255, 256])
@pytest.mark.parametrize("vector", [False, True])
@pytest.mark.parametrize("step", [256, 32])
def test_a_step_that_fills_the_list_exactly(
    select: Select, emulated_row_filter: ctypes.CDLL, second: int, vector: bool, step: int
) -> None:
    """Behind the k = 256 best there is room for 256 keys: two steps bring 1 and 255, which fit, or 1 and 256, which do
    not; in steps of 256 and in those of 32 that end a chunk, where the last of 32 decides."""
    capacity, k = emulated_row_filter.capacity(), emulated_row_filter.most_k()
    pre = torch.zeros(1, capacity + 512 + 32 if step == 256 else capacity + 320)
    pre[:, :capacity] = torch.arange(capacity, 0, -1.0)  # the limit is the capacity - k'th of them
    pre[:, capacity + 7] = 1e3
    start = capacity + (256 if step == 256 else 32)
    pre[:, start : start + second] = 2e3 + torch.arange(second)
    bias = torch.zeros(pre.shape[1])
    same(select(pre, bias, k, pre.shape[1], vector), expected(pre, bias, k))


@pytest.mark.parametrize("head", [1, 2, 3, 509])
def test_steps_begin_at_boundaries_of_a_vector(select: Select, head: int) -> None:
    """Chunks behind an odd one, bias and all: as many columns are taken at first as leave the rest aligned."""
    pre = rows_of("random", head + 2200)
    storage = torch.zeros(pre.shape[1] + 4)
    bias = storage[-head % 4 :][: pre.shape[1]]
    assert (bias.data_ptr() + 4 * head) % 16 == 0
    same(select(pre, bias, 64, 1100, True, head=head), expected(pre, bias, 64))


# Instructions of filter_rows<4> for sm_90a, counted in what `cuobjdump -sass` shows (nvcc 13.0): a step of 256 columns;
# what a step with survivors has besides; a column of 32 lanes that appends; a reduction, every 32 keys of its list and
# every bit of its search, at up to 128 keys; a row's part of a chunk; the sorted result of k = 64.
INSTRUCTIONS = {
    "steps": 30, "slow": 28, "appends": 18, "reductions": 90, "kept": 44, "bits": 45, "chunks": 170, "results": 700,
}  # fmt: skip


def test_what_a_canonical_row_costs(emulated_row_filter: ctypes.CDLL) -> None:
    """The figures of row_filter.cu: how often a Gaussian row of F 131072, k 64 in chunks of 4096 takes which way."""
    torch.manual_seed(0)
    rows, n_latents, chunk, k = 4, 131072, 4096, 64
    keys = torch.zeros(rows, emulated_row_filter.capacity(), dtype=torch.int64)
    count, limit = (torch.zeros(rows, dtype=torch.int32) for _ in range(2))
    met = (ctypes.c_int64 * 5)()
    emulated_row_filter.meetings(met)
    for first in range(0, n_latents, chunk):
        tensors = (torch.randn(rows, chunk), torch.zeros(n_latents), keys, count, limit)
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in tensors]
        last = int(first + chunk == n_latents)
        args = (*pointers, ctypes.c_int64(rows), chunk, first, k, last, 1, 0)
        assert emulated_row_filter.filter_chunk(*args) is None
    emulated_row_filter.meetings(met)
    anys, ballots, syncs, reductions, bits = (number / rows for number in met)

    chunks, steps = n_latents // chunk, n_latents / 256
    kept = syncs - 2 * reductions - (chunks - 1)  # a sync for every 32 keys, two around, one before a list is stored
    first_columns = emulated_row_filter.capacity() / 256  # steps that all of them enter without a vote
    times = {
        "steps": steps, "slow": (anys - steps + first_columns) / 8, "appends": ballots - kept, "reductions": reductions,
        "kept": kept, "bits": bits, "chunks": chunks, "results": 1,
    }  # fmt: skip
    quoted = {"slow": 200, "appends": 365, "reductions": 9.5, "bits": 106}
    assert {name: times[name] for name in quoted} == pytest.approx(quoted, rel=0.1)
    assert sum(INSTRUCTIONS[name] * number for name, number in times.items()) == pytest.approx(42000, rel=0.05)


def test_a_lane_that_does_not_meet_the_others_is_seen(tmp_path: Path) -> None:
    """The emulation finds what it is there for: a race, in one of the two orders, and lanes that part."""
    source = tmp_path / "wrong.cpp"
    source.write_text("""
#include "emulated_warp.h"
#include <cstdio>
int main() {
  int results[2];
  for (int reversed = 0; reversed < 2; ++reversed) {
    int shared = 0, seen = -1;
    EmulatedWarp::run([&] {
      if (EmulatedWarp::lane() == 0) shared = 1;   // no sync: does lane 5 see it?
      if (EmulatedWarp::lane() == 5) seen = shared;
    }, reversed != 0);
    results[reversed] = seen;
  }
  bool parted = false;
  try {
    EmulatedWarp::run([] {
      if (EmulatedWarp::lane() < 16) EmulatedWarp::sync();
      else EmulatedWarp::any(true);
    }, false);
  } catch (const std::runtime_error&) {
    parted = true;
  }
  std::printf("%d %d %d", results[0], results[1], parted);
}
""")
    program = tmp_path / "wrong"
    command = ["g++", "-std=c++20", f"-I{ROOT / 'tests/cuda'}", str(source), "-o", str(program)]
    subprocess.run(command, check=True)
    assert subprocess.run([str(program)], capture_output=True, text=True).stdout == "1 0 1"
