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

from refusal_kernels import native, reference
from refusal_kernels.backends.cuda import PROJECTION_RANKS, CudaBackend
from refusal_kernels.backends.triton import TritonBackend

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


@every_dtype
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("r", [5, 16, 64, 128, 200])
def test_every_dtype_and_side(project: Project, dtype: torch.dtype, dim: int, r: int) -> None:
    """Ranks that fill their shape and that do not; the sides are the same sums."""
    n = 603
    u, g = a_basis(n, r), torch.randn(n, 16).to(dtype)
    entry = Entry(g.clone() if dim == 0 else g.T.contiguous(), dim, u)
    ran = project([entry])
    close(entry.tensor if dim == 0 else entry.tensor.T, g, Entry(g, 0, u))
    way = {torch.float32: (WIDE32, WORDS)}.get(dtype, (WIDE16, ELEMENTS))[dim]  # 603 is odd: no pairs
    assert ran.ways == way
    if dim == 1:
        even = torch.randn(16, n + 1).to(dtype)[:, :n]
        even.copy_(g.T)
        ran = project([Entry(even, 1, u)])
        assert ran.ways == (WORDS if dtype == torch.float32 else PAIRS16)
        assert torch.equal(even, entry.tensor)


def layouts(dtype: torch.dtype) -> list[tuple[str, Tensor, int]]:
    """Tensors inside of larger ones, by what is odd about them, and the projected dimension."""

    def odd(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype)

    return [
        ("few fibres", odd(70, 8)[:, :5], 0),
        ("fibres of several blocks", odd(70, 40), 0),
        ("a last chunk that ends early", odd(70, 40)[:, :35], 0),
        ("begins anywhere", odd(70, 41)[:, 1:36], 0),
        ("begins anywhere in rows that do not", odd(70, 48)[:, 1:36], 0),
        ("every other row", odd(140, 24)[::2], 0),
        ("every other fibre", odd(70, 48)[:, ::2], 0),
        ("right, transposed", odd(70, 24).T, 1),
        ("right, begins anywhere", odd(24, 73)[:, 1:71], 1),
        ("right, begins at an odd place of even rows", odd(24, 74)[:, 1:71], 1),
        ("right, every other", odd(24, 140)[:, ::2], 1),
        ("between two dimensions", odd(3, 70, 5), 1),
        ("between two that are wide", odd(2, 70, 32), 1),
        ("between two that are narrow", odd(3, 70, 8), 1),
        ("between two that end early", odd(3, 70, 8)[:, :, :6], 1),
        ("between two, the outer one odd", odd(3000).as_strided((2, 70, 16), (70 * 16 + 2, 16, 1)), 1),
        ("four dimensions that do not join", odd(3, 5, 70, 4).transpose(0, 1)[:, :2], 2),
        ("a vector", odd(70), 0),
        ("a column of a matrix", odd(70, 3)[:, 1], 0),
    ]


@every_dtype
@pytest.mark.parametrize("number", range(19))
def test_any_layout_and_nothing_beside_it(project: Project, dtype: torch.dtype, number: int) -> None:
    name, tensor, dim = layouts(dtype)[number]
    base = tensor if tensor._base is None else tensor._base
    before, around = tensor.clone(), base.clone()
    u = a_basis(70, 20)
    entry = Entry(tensor, dim, u)
    project([entry], 0.9, backwards=number % 2 == 1)
    close(tensor, before, Entry(before, dim, u), 0.9)
    tensor.copy_(before)
    assert torch.equal(base, around), name
    project([entry], 0.9, PLAIN)
    close(tensor, before, Entry(before, dim, u), 0.9)


def test_the_layouts_take_every_way(project: Project) -> None:
    found = 0
    for _, tensor, dim in itertools.chain.from_iterable(map(layouts, TYPES)):
        found |= project([Entry(tensor, dim, a_basis(70, 2))], 0.0, PLAIN).ways
    assert found == WIDE32 | WORDS | WIDE16 | PAIRS16 | ELEMENTS


@pytest.mark.parametrize("form", [CLUSTER, PLAIN])
def test_a_group_of_every_dtype_shares_bases_and_directions(project: Project, form: int) -> None:
    u, v = a_basis(300, 60), a_basis(2300, 64)  # one of one block, one of eight
    against = torch.randn(300) @ u
    entries = [
        Entry(torch.randn(300, 16), 0, u),
        Entry(torch.randn(16, 2300), 1, v, torch.randn(2300) @ v),
        Entry(torch.randn(16, 300).to(torch.bfloat16), 1, u, against),
        Entry(torch.randn(300, 33).to(torch.float16), 0, u, against),
        Entry(torch.randn(2300, 3), 0, v),
        Entry(torch.randn(7, 300), 1, u, against),
    ]
    before = [e.tensor.clone() for e in entries]
    ran = project(entries, 0.6, form)
    # 16 + 8 blocks of the long ones, 1 + 1 + 3 + 1 of the short: 3 clusters and one that is not full.
    assert ran.blocks == 16 + 8
    for entry, old in zip(entries, before, strict=True):
        close(entry.tensor, old, entry, 0.6)
    alone = [b.clone() for b in before]
    for tensor, entry in zip(alone, entries, strict=True):
        project([entry._replace(tensor=tensor)], 0.6, SINGLE)
        assert torch.equal(tensor, entry.tensor), "a group gives the bits of single calls"


@pytest.mark.parametrize("r", [8, 20, 256])
@pytest.mark.parametrize("dim", [0, 1])
def test_only_opposing_fibres_are_projected(project: Project, r: int, dim: int) -> None:
    u, direction, g = a_basis(300, r), torch.randn(300), torch.randn(300, 30)
    g[3, 5], g[7, 9] = math.nan, math.inf
    tensor = g.clone() if dim == 0 else g.T.contiguous()
    project([Entry(tensor, dim, u, direction @ u)])
    got = tensor if dim == 0 else tensor.T
    opposes = direction @ (u @ (u.T @ g)) < 0
    assert 0 < opposes.sum() < 28
    assert not opposes[[5, 9]].any()
    assert got[:, ~opposes].equal(g[:, ~opposes]) or got[:, ~opposes].nan_to_num().equal(g[:, ~opposes].nan_to_num())
    finite = [i for i in range(30) if i not in (5, 9)]
    torch.testing.assert_close(
        got[:, finite], reference.project_out(g[:, finite], 0, u, 1.0, direction @ u), rtol=0, atol=2e-6
    )


def test_nan_and_infinity_stay_in_their_fibres(project: Project) -> None:
    g = torch.randn(200, 21)
    g[3, 5], g[7, 9] = math.nan, math.inf
    project([Entry(g, 0, a_basis(200, 11))])
    assert g.isfinite().all(0).tolist() == [i not in (5, 9) for i in range(21)]


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_what_is_left_has_no_component(project: Project, strength: float) -> None:
    u, g = a_basis(1100, 50), torch.randn(1100, 16)
    before = g.clone()
    project([Entry(g, 0, u)], strength)
    if strength == 0:
        assert torch.equal(g, before)
    else:
        assert torch.linalg.vector_norm(u.double().T @ g.double()) <= 1e-6 * before.norm()


# --- the way from Python ----------------------------------------------------------------------------------------------


@pytest.fixture
def backend(emulated_projection: ctypes.CDLL, project: Project, monkeypatch: pytest.MonkeyPatch) -> CudaBackend:
    """The back-end with its own tables and, in the place of its launches, the emulation."""
    if native.operator("refusal_kernels_cuda", "projection_table") is None:
        pytest.skip("refusal_kernels._C was built without CUDA")
    launches: list[int] = []
    tables: dict[int, list[int]] = {}  # by address: begin and end of what it may read

    def operator(name: str) -> Any:
        def table(tensors: list[Tensor], dims: list[int], bases: list[Tensor], *rest: Any) -> Any:
            found = native.operator("refusal_kernels_cuda", name)(tensors, dims, bases, *rest)
            tables[found[0].data_ptr()] = list(itertools.chain.from_iterable(map(range_of, [*tensors, *bases])))
            return found

        def by_table(table: Tensor, items: Tensor, shape: int, strength: float) -> None:
            launches.append(shape)
            ranges = tables[table.data_ptr()]
            problem = emulated_projection.emulate_table(
                ctypes.c_void_p(table.data_ptr()), ctypes.c_void_p(items.data_ptr()), ctypes.c_int64(items.shape[0]),
                ctypes.c_float(strength), shape, (ctypes.c_int64 * len(ranges))(*ranges),
                ctypes.c_int64(len(ranges) // 2),
            )  # fmt: skip
            assert problem is None, problem

        def in_place(g: Tensor, dim: int, basis: Tensor, strength: float, against: Tensor | None) -> None:
            project([Entry(g, dim, basis, against)], strength, SINGLE)

        return {"projection_table": table, "project_out_by_table": by_table, "project_out_in_place": in_place}[name]

    monkeypatch.setattr(CudaBackend, "_operator", staticmethod(operator))
    monkeypatch.setattr(CudaBackend, "launches", launches, raising=False)
    return CudaBackend()


def test_a_prepared_group_is_one_launch_per_width(backend: CudaBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Widths 8 and 64 are the kernel's, 260 is Triton's; empty tensors are nobody's."""
    bases = [a_basis(100, 50), a_basis(100, 8), a_basis(300, 260), a_basis(100, 64), torch.empty(100, 0)]
    shapes = [(100, 16), (16, 100), (300, 3), (5, 100), (0, 100), (100, 2), (100, 7)]
    dims, basis_of, against_of = [0, 1, 0, 1, 1, 0, 0], [0, 1, 2, 3, 3, 4, 0], [-1, -1, -1, -1, -1, -1, 0]
    against = [torch.randn(50)]
    tensors = [torch.randn(shape) for shape in shapes]
    before = [t.clone() for t in tensors]
    of_triton: list[tuple[int, ...]] = []

    def prepare(self: TritonBackend, *arguments: Any) -> Callable[[], None]:
        of_triton.extend(tuple(t.shape) for t in arguments[0])
        return lambda: reference.project_out_grouped(*arguments)

    monkeypatch.setattr(TritonBackend, "prepare_projection", prepare)
    run = backend.prepare_projection(tensors, dims, bases, basis_of, against, against_of, 0.5)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    run()
    assert sorted(backend.launches) == [0, 3]  # type: ignore[attr-defined]
    assert of_triton == [(300, 3)]
    for tensor, old, dim, b, a in zip(tensors, before, dims, basis_of, against_of, strict=True):
        if tensor.numel() > 0:
            close(tensor, old, Entry(tensor, dim, bases[b], None if a < 0 else against[a]), 0.5)
    once = [t.clone() for t in tensors]
    for tensor, old in zip(tensors, before, strict=True):
        tensor.copy_(old)
    run()
    assert all(torch.equal(a, b) for a, b in zip(tensors, once, strict=True))


def test_project_out_is_a_copy_in_place(backend: CudaBackend) -> None:
    u, g = a_basis(60, 7), torch.randn(5, 60, 9).to(torch.bfloat16).transpose(0, 2)
    against = torch.randn(60) @ u
    for direction in (None, against):
        got = backend.project_out(g, 1, u, 0.5, direction)
        assert got.is_contiguous()
        close(got, g, Entry(g, 1, u, direction), 0.5)
    assert torch.equal(backend.project_out(g, 1, u[:, :0].contiguous(), 0.5, None), g)
    assert backend.project_out(g[:0], 1, u, 0.5, None).shape == (0, 60, 5)


def test_tables_are_checked() -> None:
    table = native.operator("refusal_kernels_cuda", "projection_table")
    if table is None:
        pytest.skip("refusal_kernels._C was built without CUDA")
    g, u = torch.randn(20, 6), a_basis(20, 3)
    matrices, items, shape = table([g, g[:, :3]], [0, 0], [u], [0, 0], [], [-1, -1])
    assert (matrices.shape, matrices.dtype, items.dtype, shape) == ((2, 11), torch.int64, torch.int32, 0)
    assert items.tolist() == [[0, 0, 0, 1], [1, 0, 0, 1], *[[-1, 0, 0, 1]] * 6]
    wide = a_basis(300, 257)
    for arguments, message in [
        (([g], [2], [u], [0], [], [-1]), "dim must be a dimension of its tensor; got 2"),
        (([g], [1], [u], [0], [], [-1]), r"basis must be \[n, r\]"),
        (([g], [0], [u.T], [0], [], [-1]), "basis must be float32, contiguous"),
        (([g], [0], [u.double()], [0], [], [-1]), "basis must be float32, contiguous"),
        (([g.double()], [0], [u], [0], [], [-1]), "tensor must be float32, bfloat16 or float16"),
        (([torch.randn(300, 2)], [0], [wide], [0], [], [-1]), "1 <= r <= 256"),
        (([g], [0], [u], [1], [], [-1]), "must count bases and against"),
        (([g], [0], [u], [0], [], [0]), "must count bases and against"),
        (([g], [0], [u], [0], [torch.randn(4)], [0]), "against must have r elements"),
        (([g], [0, 0], [u], [0], [], [-1]), "must have one number per tensor"),
        (([g, g], [0, 0], [u, a_basis(20, 9)], [0, 1], [], [-1, -1]), "bases of different widths"),
        (([], [], [], [], [], []), "a table needs a tensor"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            table(*arguments)


def test_the_widths_are_those_of_the_kernels(emulated_projection: ctypes.CDLL) -> None:
    shapes = [emulated_projection.projection_shape_of(ctypes.c_int64(r)) for r in range(1, 257)]
    assert shapes == [next(i for i, width in enumerate(PROJECTION_RANKS) if width >= r) for r in range(1, 257)]
