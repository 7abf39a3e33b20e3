"""The CUDA projection's algorithm, without a GPU: csrc/cuda/projection_block.h by fibers in the place of threads.

The same headers are compiled by g++ that nvcc compiles into the kernels, in every shape: the threads of a cluster of
eight blocks are as many fibers, warps run one after the other in two orders, copies arrive when they are waited for and
not before, they are held to their tensors and to their alignment. What this cannot show: the hardware's memory model,
speed. `-m gpu` (tests/test_gpu.py) runs the kernel itself.

Tolerance: error against fp64 at most twice that of plain PyTorch in the same dtype, plus one rounding of the result.
"""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from refusal_kernels import reference

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
CLUSTER, PLAIN, SINGLE = 0, 1, 2
# The ways in which a matrix comes to shared memory, as bits (csrc/cuda/projection.h).
WIDE32, WORDS, WIDE16, PAIRS16, ELEMENTS = (1 << i for i in range(5))
every_dtype = pytest.mark.parametrize("dtype", TYPES)


class Entry(NamedTuple):
    tensor: Tensor
    dim: int
    basis: Tensor
    against: Tensor | None = None  # [r]


class Ran(NamedTuple):
    ways: int
    blocks: int


Project = Callable[..., Ran]


def range_of(t: Tensor) -> tuple[int, int]:
    """Begin and end of a tensor's memory, whatever its strides."""
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()


@pytest.fixture
def project(emulated_projection: ctypes.CDLL) -> Project:
    def run(entries: list[Entry], strength: float = 1.0, form: int = CLUSTER, backwards: bool = False) -> Ran:
        """project_out_grouped in place; all bases must have the same shape of kernel."""
        numbers: list[int] = []
        ranges: list[int] = []
        for tensor, dim, basis, against in entries:
            assert basis.is_contiguous()
            numbers += [tensor.data_ptr(), TYPES[tensor.dtype], dim, basis.data_ptr(), basis.shape[1]]
            numbers += [0 if against is None else against.data_ptr(), tensor.dim(), *tensor.shape, *tensor.stride()]
            ranges += [*range_of(tensor), *range_of(basis)]
        (shape,) = {emulated_projection.projection_shape_of(ctypes.c_int64(e.basis.shape[1])) for e in entries}
        ways, blocks = ctypes.c_int32(), ctypes.c_int64()
        problem = emulated_projection.emulate_projection(
            (ctypes.c_int64 * len(numbers))(*numbers), ctypes.c_int64(len(entries)),
            (ctypes.c_int64 * len(ranges))(*ranges), ctypes.c_int64(len(ranges) // 2), ctypes.c_float(strength),
            shape, form, int(backwards), ctypes.byref(ways), ctypes.byref(blocks),
        )  # fmt: skip
        assert problem is None, problem
        return Ran(ways.value, blocks.value)

    return run


def a_basis(n: int, r: int) -> Tensor:
    return torch.linalg.qr(torch.randn(n, r, dtype=torch.float64))[0].float().contiguous()


def close(got: Tensor, before: Tensor, entry: Entry, strength: float = 1.0) -> None:
    _, dim, basis, against = entry
    wide = None if against is None else against.double()
    exact = reference.project_out(before.double(), dim, basis.double(), strength, wide)
    own = reference.project_out(before, dim, basis, strength, against)
    rounding = torch.finfo(before.dtype).eps * exact.abs().max().clamp(min=1)
    error, own_error = (got.double() - exact).abs(), (own.double() - exact).abs()
    assert error.max() <= 2 * own_error.max() + rounding
    assert error.mean() <= 2 * own_error.mean() + rounding / 2


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# n, r: every shape, padded and not, slabs of one tile, of all in the ring, of more, teams of 1 to 8.
SIZES = [(700, 1), (4100, 8), (40, 12), (2050, 16), (600, 30), (130, 64), (2500, 64), (517, 100), (300, 256)]


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize(("n", "r"), SIZES)
def test_equals_the_reference(project: Project, n: int, r: int, dim: int) -> None:
    entry = Entry(torch.randn(n, 16) if dim == 0 else torch.randn(16, n), dim, a_basis(n, r))
    before, results = entry.tensor.clone(), []
    for form, backwards in itertools.product((CLUSTER, PLAIN, SINGLE), (False, True)):
        entry.tensor.copy_(before)
        project([entry], 0.7, form, backwards)
        results.append(entry.tensor.clone())
    close(results[0], before, entry, 0.7)
    assert all(torch.equal(results[0], other) for other in results[1:])
