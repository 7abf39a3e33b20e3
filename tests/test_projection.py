"""project_out, ProjectionPlan and orthonormal_basis on every back-end that runs on CPU tensors without an interpreter.

Tolerance: error against the fp64 reference at most twice that of plain PyTorch in the same dtype (three times for
gradients) plus one rounding of the result.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterator

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import refusal_kernels as rk
from refusal_kernels import native, reference
from refusal_kernels.ops import basis_checks

BACKENDS = ("reference", "cpu")
LOW = (torch.bfloat16, torch.float16)
ALL_DTYPES = (torch.float32, torch.float64, *LOW)
every_backend = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True)
def _seed_and_poison() -> Iterator[None]:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.use_deterministic_algorithms(True, warn_only=True)  # fresh outputs are filled with NaN
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


def basis(n: int, r: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.linalg.qr(torch.randn(n, r, dtype=torch.float64))[0].to(dtype).contiguous()


def plain(g: Tensor, u: Tensor, dim: int, strength: float, against: Tensor | None) -> Tensor:
    """The formula, written another way than the reference."""
    rest = [s for i, s in enumerate(g.shape) if i != dim % g.dim()]
    fibres = g.movedim(dim, 0).reshape(g.shape[dim], math.prod(rest))
    component = u @ (u.T @ fibres)
    if against is not None:
        component = torch.where(against @ component < 0, component, 0)
    return (fibres - strength * component).reshape(g.shape[dim], *rest).movedim(0, dim)


def close(actual: Tensor, exact: Tensor, torch_result: Tensor, factor: float = 2) -> None:
    """The tolerance rule. Inputs are of size 1, and what is left of one that lies in the span is rounding of that; in
    fp64 the reference is no more exact than what it judges."""
    assert actual.shape == exact.shape
    if exact.numel() == 0:
        return
    eps = torch.finfo(actual.dtype).eps * (16 if actual.dtype == torch.float64 else 1)
    rounding = eps * exact.abs().max().clamp(min=1)
    error, own = (actual.double() - exact).abs(), (torch_result.double() - exact).abs()
    assert error.max() <= factor * own.max() + rounding
    assert error.mean() <= factor * own.mean() + rounding / 2


def strided(data: st.DataObject, shape: list[int], dtype: torch.dtype) -> Tensor:
    """Random numbers of a shape in a random layout: permuted, and perhaps every other element of a larger tensor."""
    order = data.draw(st.permutations(range(len(shape))))
    step = data.draw(st.sampled_from([1, 2]))
    memory = torch.randn([shape[i] for i in order[:-1]] + [shape[order[-1]] * step]).to(dtype)
    return memory[..., ::step].permute([order.index(i) for i in range(len(shape))])


# --- project_out ------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
@every_backend
def test_any_shape_stride_dim_rank_and_dtype(backend: str, data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(0, 20), min_size=1, max_size=4))
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    n = shape[dim] = data.draw(st.integers(0, 300 if len(shape) < 3 else 40))
    r = data.draw(st.integers(0, n))
    dtype = data.draw(st.sampled_from(ALL_DTYPES))
    strength = data.draw(st.sampled_from([0.0, 0.3, 1.0]))
    g, u = strided(data, shape, dtype), basis(n, r, torch.float64 if dtype == torch.float64 else torch.float32)
    y = rk.project_out(g, u, dim, strength, backend=backend)
    assert rk.last_backend("project_out") == backend
    assert (y.shape, y.dtype, y.is_contiguous()) == (g.shape, dtype, True)
    exact = plain(g.double(), u.double(), dim, strength, None)
    close(y, exact, plain(g.to(u.dtype), u, dim, strength, None).to(dtype))
    inside = g.detach().clone(memory_format=torch.preserve_format)
    rk.ProjectionPlan([(inside, u, dim)], strength, backend=backend).apply_()
    if backend == "cpu":
        assert torch.equal(inside, y)
    close(inside, exact, y)


@every_backend
@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize(("rows", "n", "r"), [(16, 1500, 8), (48, 2100, 130), (100, 70, 70), (1, 40, 3)])
def test_both_sides_leave_nothing_in_the_span(backend: str, dtype: torch.dtype, rows: int, n: int, r: int) -> None:
    u = basis(n, r, torch.float64 if dtype == torch.float64 else torch.float32)
    g = torch.randn(n, rows).to(dtype)
    left = rk.project_out(g, u, 0, backend=backend)
    right = rk.project_out(g.T.contiguous(), u, 1, backend=backend)
    if backend == "cpu":  # a fibre's result does not depend on how it lies in memory
        assert torch.equal(left, right.T)
    assert torch.linalg.vector_norm(u.double().T @ left.double()) <= 8 * torch.finfo(dtype).eps * g.double().norm()
    close(left, plain(g.double(), u.double(), 0, 1.0, None), plain(g.to(u.dtype), u, 0, 1.0, None).to(dtype))
    close(right.T, left.double(), left)
    if dtype not in LOW:  # whose rounding has a component in the span again
        torch.testing.assert_close(rk.project_out(left, u, 0, backend=backend), left, rtol=0, atol=1e-5)


@every_backend
@pytest.mark.parametrize("dtype", LOW)
def test_low_precision_is_accumulated_in_fp32(backend: str, dtype: torch.dtype) -> None:
    # 4096 ones: a 16-bit running sum would stop at 256 or 2048.
    u = torch.full((4096, 1), 1 / 64)
    assert rk.project_out(torch.ones(3, 4096, dtype=dtype), u, 1, backend=backend).abs().max() == 0


@every_backend
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_only_against_projects_opposing_fibres_only(backend: str, dim: int) -> None:
    u = basis(40, 4)
    g = torch.randn(40, 30) if dim == 0 else torch.randn(30, 40)
    direction = torch.randn(40)
    y = rk.project_out(g, u, dim, 0.7, only_against=direction, backend=backend)
    fibres, out = (g, y) if dim == 0 else (g.T, y.T)
    opposes = direction @ (u @ (u.T @ fibres)) < 0
    assert 0 < opposes.sum() < 30
    assert torch.equal(out[:, ~opposes], fibres[:, ~opposes])
    whole = rk.project_out(g, u, dim, 0.7, backend=backend)
    torch.testing.assert_close(out[:, opposes], (whole if dim == 0 else whole.T)[:, opposes])
    # Orthogonal to the span, it opposes nothing.
    nothing = direction - u @ (u.T @ direction)
    outside = rk.project_out(g * 0, u, dim, only_against=nothing, backend=backend)
    assert torch.equal(outside, g * 0)


@every_backend
def test_nan_and_infinity_stay_in_their_fibres(backend: str) -> None:
    u, g, direction = basis(40, 4), torch.randn(40, 21), torch.randn(40)
    g[3, 5], g[7, 9] = math.nan, math.inf
    y = rk.project_out(g, u, 0, backend=backend)
    assert y.isfinite().all(0).tolist() == [i not in (5, 9) for i in range(21)]
    masked = rk.project_out(g, u, 0, only_against=direction, backend=backend)
    assert masked[:, 5].isnan().sum() == 1


@every_backend
def test_gradients(backend: str) -> None:
    u = basis(8, 3, torch.float64).requires_grad_()
    direction = torch.randn(8, dtype=torch.float64)
    for dim, shape in ((0, (8, 5)), (1, (2, 8, 3)), (-1, (8,)), (-1, (4, 8))):
        g = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for against in (None, direction):

            def function(g: Tensor, u: Tensor, dim: int = dim, against: Tensor | None = against) -> Tensor:
                return rk.project_out(g, u, dim, 0.7, only_against=against, backend=backend)

            assert torch.autograd.gradcheck(function, (g, u))
    assert rk.last_backend("project_out_backward") == backend


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
def test_gradients_as_accurate_as_torch(backend: str, dtype: torch.dtype) -> None:
    g, u, grad = torch.randn(33, 50).to(dtype), basis(50, 6), torch.randn(33, 50).to(dtype)
    results = []
    for kind in (torch.float64, torch.float32):
        leaves = [t.detach().to(kind, copy=True).requires_grad_() for t in (g, u)]
        plain(*leaves, 1, 0.7, None).backward(grad.to(kind))
        results.append([leaf.grad for leaf in leaves])
    leaves = [t.clone().requires_grad_() for t in (g, u)]
    rk.project_out(*leaves, 1, 0.7, backend=backend).backward(grad)
    for leaf, exact, own in zip(leaves, *results, strict=True):
        assert leaf.grad.dtype == leaf.dtype
        close(leaf.grad, exact, own.to(leaf.dtype), 3)


def test_transforms_of_torch_func_are_refused() -> None:
    u, g = basis(6, 2), torch.randn(3, 6)
    with pytest.raises(NotImplementedError, match=r"project_out: the transforms of torch\.func"):
        torch.func.grad(lambda t: rk.project_out(t, u, 1).sum())(g)


@every_backend
def test_autocast_does_not_round_the_projection(backend: str) -> None:
    g, u = torch.randn(16, 64), basis(64, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = rk.project_out(g, u, 1, backend=backend)
        inside = g.clone()
        rk.ProjectionPlan([(inside, u, 1)], backend=backend).apply_()
        fresh = rk.orthonormal_basis(torch.randn(64, 5))
    assert y.dtype == torch.float32
    assert torch.equal(y, rk.project_out(g, u, 1, backend=backend))
    assert torch.equal(inside, y)
    assert (fresh.T @ fresh - torch.eye(5)).abs().max() < 1e-6


@every_backend
def test_opcheck_and_fullgraph(backend: str) -> None:
    ops = torch.ops.refusal_kernels
    g, u, direction = torch.randn(4, 6, 3), basis(6, 2), torch.randn(6)
    for against in (None, direction):
        torch.library.opcheck(ops.project_out.default, (g.transpose(0, 2), 1, u, 0.5, against, backend))
        for flags in ((True, True), (True, False), (False, True)):
            torch.library.opcheck(ops.project_out_backward.default, (g, g, 1, u, 0.5, against, *flags, backend))

    def loss(g: Tensor, u: Tensor) -> Tensor:
        return rk.project_out(g, u, 1, 0.5, only_against=direction, backend=backend).square().sum()

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    gradients = []
    for function in (loss, compiled):
        leaves = [t.clone().requires_grad_() for t in (g, u)]
        function(*leaves).backward()
        gradients.append([leaf.grad for leaf in leaves])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
    torch.compiler.reset()
    meta = rk.project_out(g.to("meta"), u.to("meta"), 1)
    assert (meta.device.type, meta.shape) == ("meta", g.shape)


# --- refusals ---------------------------------------------------------------------------------------------------------

G, U = torch.randn(5, 8), basis(8, 3)
INVALID = [
    (lambda: rk.project_out(G.long(), U, 1), "g must have one of the dtypes"),
    (lambda: rk.project_out(torch.tensor(1.0), U, 0), "g must have at least 1 dimension"),
    (lambda: rk.project_out(G, U.long(), 1), "basis must have one of the dtypes"),
    (lambda: rk.project_out(G, U, 0), r"basis must be a matrix \[n, r\] with n = g.shape\[0\] = 5; got .*\(8, 3\)"),
    (lambda: rk.project_out(G, U[:, 0], 1), "basis must be a matrix"),
    (lambda: rk.project_out(G, U, 2), r"dim must be in \[-2, 1\] .*got 2"),
    (lambda: rk.project_out(G, U, 1, 1.5), r"strength must be a number in \[0, 1\]; got 1.5"),
    (lambda: rk.project_out(G, U, 1, math.nan), r"strength must be a number in \[0, 1\]; got nan"),
    (lambda: rk.project_out(G, U, 1, only_against=torch.randn(5)), r"only_against must have shape .* = \(8,\)"),
    (lambda: rk.project_out(G, U.to("meta"), 1), "all tensors must be on one device; g is on cpu"),
    (lambda: rk.project_out(G, U * 1.01, 1), r"orthonormal columns, \|\|U\^T U - I\|\| <= 0\.\d+; got 0\.0348"),
    (lambda: rk.project_out(G, U * math.nan, 1), "orthonormal columns.*got nan"),
    (lambda: rk.project_out(G, torch.randn(8, 9), 1), "basis must have at most as many columns as rows"),
    (lambda: rk.project_out(G, U, 1, backend="fastest"), "backend must be one of"),
    (lambda: rk.ProjectionPlan([(G, U, 1), (G.clone(), U * 2, 1)]), r"entries\[1\] basis must have orthonormal"),
    (lambda: rk.ProjectionPlan([(G, U, 0)]), r"entries\[0\] basis must be a matrix .* entries\[0\] tensor.shape\[0\]"),
    (lambda: rk.ProjectionPlan([(G, U, 1)], 2), "strength must be a number"),
    (lambda: rk.ProjectionPlan([(G, U, 1)], only_against=[]), "only_against must have one item per entry = 1; got 0"),
    (lambda: rk.ProjectionPlan([(G, U, 1)], only_against=[U[:, :2]]), r"entries\[0\] only_against must have shape"),
    (lambda: rk.ProjectionPlan([(G, U, 1), (G, U, 1)]), r"entries\[0\] and entries\[1\] must not share memory"),
    (lambda: rk.ProjectionPlan([(G, U, 1), (U.T, U, 1)]), r"entries\[1\] and entries\[0\] basis must not share memory"),
    (lambda: rk.ProjectionPlan([(G[:1].expand(5, 8), U, 1)]), r"entries\[0\] tensor must have a place .*expanded"),
    (lambda: rk.ProjectionPlan([(G.as_strided((3, 8), (4, 1)), U, 1)]), r"entries\[0\] tensor must have a place"),
]


@pytest.mark.parametrize(("call", "message"), INVALID, ids=[str(i) for i in range(len(INVALID))])
def test_refusals_name_the_argument(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rk.project_out([1.0], U, 1), "g must be a torch.Tensor"),
        (lambda: rk.project_out(G, U, 1.0), "dim must be an integer; got float"),
        (lambda: rk.project_out(G, U, 1, "1"), "strength must be a number"),
        (lambda: rk.ProjectionPlan(G), "entries must be a sequence"),
        (lambda: rk.ProjectionPlan([(G, U)]), r"entries\[0\] must be \(tensor, basis, dim\)"),
        (lambda: rk.ProjectionPlan([(G, U, 1)], only_against=U[:, 0]), "only_against must be None or a sequence"),
        (lambda: rk.orthonormal_basis([1.0]), "vectors must be a torch.Tensor"),
    ],
)
def test_wrong_types_are_refused(call, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call()


def test_an_explicit_back_end_never_falls_back() -> None:
    with pytest.raises(rk.BackendError, match="The back-end 'cuda' cannot run project_out"):
        rk.project_out(G, U, 1, backend="cuda")


def test_a_basis_is_measured_once_per_version(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []
    norm = torch.linalg.vector_norm

    def counting(gram: Tensor) -> Tensor:
        measured.append(gram.shape)
        return norm(gram)

    monkeypatch.setattr(torch.linalg, "vector_norm", counting)
    u = basis(8, 3)
    for _ in range(3):
        rk.project_out(G, u, 1)
    plan = rk.ProjectionPlan([(G.clone(), u, 1)])
    plan.apply_()
    assert len(measured) == 1
    u.mul_(-1)
    rk.project_out(G, u, 1)
    assert len(measured) == 2
    u.mul_(2)
    with pytest.raises(ValueError, match="orthonormal"):
        rk.project_out(G, u, 1)
    with pytest.raises(ValueError, match=r"entries\[0\] basis must have orthonormal"):
        plan.apply_()


def test_a_basis_rounded_to_16_bits_counts_as_orthonormal() -> None:
    for dtype in LOW:
        for n, r in ((64, 64), (4096, 16)):
            u = basis(n, r).to(dtype)
            basis_checks.check_orthonormal("test", "basis", u)
            rk.project_out(torch.randn(2, n), u, 1)


# --- ProjectionPlan ---------------------------------------------------------------------------------------------------


def mixed() -> tuple[list[tuple[Tensor, Tensor, int]], list[Tensor | None]]:
    """Sides, shapes, dtypes, strides and directions of all kinds; two bases are shared."""
    a, b, c = basis(48, 5), basis(1100, 20), basis(7, 7, torch.float64)
    base = torch.randn(48, 64)
    entries = [
        (torch.randn(48, 16), a, 0),
        (torch.randn(16, 48).to(torch.bfloat16), a, -1),
        (torch.randn(3, 48, 5).to(torch.float16), a, 1),
        (torch.randn(1100, 16), b, 0),
        (torch.randn(40, 1100).T, b, 0),
        (torch.randn(1100), b, 0),
        (base[:, :30], a, 0),
        (base[:, 30:], a, 0),
        (torch.randn(9, 7, dtype=torch.float64), c, 1),
        (torch.randn(9, 7), c, 1),
        (torch.randn(0, 48), a, 1),
        (torch.randn(4, 48), torch.empty(48, 0), 1),
    ]
    directions = [torch.randn(u.shape[0]) if i % 2 else None for i, (_, u, _) in enumerate(entries)]
    return entries, directions


@every_backend
@pytest.mark.parametrize("directed", [False, True])
def test_plan_equals_single_calls(backend: str, directed: bool) -> None:
    entries, directions = mixed()
    directions = directions if directed else [None] * len(entries)
    expected = [
        rk.project_out(t, u, dim, 0.6, only_against=d, backend=backend)
        for (t, u, dim), d in zip(entries, directions, strict=True)
    ]
    plan = rk.ProjectionPlan(entries, 0.6, only_against=directions, backend=backend)
    versions = [t._version for t, _, _ in entries]
    plan.apply_()
    assert rk.last_backend("project_out") == backend
    for (tensor, _, _), want, version in zip(entries, expected, versions, strict=True):
        assert torch.equal(tensor, want)
        assert tensor._version > version  # autograd sees that it was changed
    assert len(plan) == len(entries)
    assert "12 tensors" in repr(plan)


def test_same_bits_for_any_number_of_threads_and_any_company() -> None:
    results = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        torch.manual_seed(1)
        entries, _ = mixed()
        rk.ProjectionPlan(entries, backend="cpu").apply_()
        torch.manual_seed(1)
        alone, _ = mixed()
        for entry in alone:
            rk.ProjectionPlan([entry], backend="cpu").apply_()
        results += [[t for t, _, _ in entries], [t for t, _, _ in alone]]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@every_backend
def test_plan_sees_later_changes(backend: str) -> None:
    u, v = basis(20, 3), basis(20, 3)
    parameter = torch.nn.Parameter(torch.randn(20, 40))
    direction = torch.randn(20)
    plan = rk.ProjectionPlan([(parameter, u, 0)], only_against=[direction], backend=backend)

    def check() -> None:
        want = rk.project_out(parameter.detach(), u, 0, only_against=direction, backend=backend)
        assert not torch.equal(want, parameter)
        plan.apply_()
        assert torch.equal(parameter, want)

    check()
    with torch.no_grad():
        parameter.copy_(torch.randn(20, 40))
    check()
    parameter.data = torch.randn(20, 40)
    check()
    u.copy_(v)
    check()
    direction.neg_()
    check()
    parameter.data = torch.randn(20, 5)
    with pytest.raises(ValueError, match=r"entries\[0\] tensor had shape \(20, 40\) when the plan was built"):
        plan.apply_()


def test_plan_in_inference_mode_and_empty_plan() -> None:
    with torch.inference_mode():
        tensor, u = torch.randn(6, 20), rk.orthonormal_basis(torch.randn(20, 2))
        rk.ProjectionPlan([(tensor, u, 1)]).apply_()
        assert (tensor @ u).abs().max() < 1e-5
    rk.ProjectionPlan([]).apply_()


def test_plan_refuses_before_anything_is_changed() -> None:
    entries, _ = mixed()
    before = [t.clone() for t, _, _ in entries]
    with pytest.raises(rk.BackendError, match="cuda"):
        rk.ProjectionPlan(entries, backend="cuda").apply_()
    assert all(torch.equal(t, b) for (t, _, _), b in zip(entries, before, strict=True))


@pytest.mark.skipif(native.load_error() is not None, reason="the CPU kernels are not there")
@pytest.mark.parametrize("isa", ["default", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_every_instruction_set_and_nothing_outside(isa: str, dtype: torch.dtype) -> None:
    ops = torch.ops.refusal_kernels_cpu
    try:
        ops.set_isa(isa)
    except RuntimeError as error:
        pytest.skip(str(error).splitlines()[0])
    try:
        for shape, dim, r in (((50, 16), 0, 8), ((1030, 33), 0, 19), ((7, 90), 1, 90), ((3, 40, 48), 1, 12)):
            u = basis(shape[dim], r, torch.float64 if dtype == torch.float64 else torch.float32)
            memory = torch.full([s + 2 for s in shape], math.nan, dtype=dtype)
            inner = memory[tuple(slice(1, -1) for _ in shape)]
            inner.copy_(torch.randn(shape))
            original = inner.clone()
            rk.ProjectionPlan([(inner, u, dim)], backend="cpu").apply_()
            close(
                inner,
                plain(original.double(), u.double(), dim, 1.0, None),
                plain(original.to(u.dtype), u, dim, 1.0, None).to(dtype),
            )
            assert memory.isnan().sum() == memory.numel() - inner.numel()
            assert torch.equal(rk.project_out(original, u, dim, backend="cpu"), inner)
    finally:
        ops.set_isa("auto")


@pytest.mark.skipif(native.load_error() is not None, reason="the CPU kernels are not there")
def test_raw_operators_check_their_arguments() -> None:
    ops = torch.ops.refusal_kernels_cpu
    with pytest.raises(RuntimeError, match="dim must be a dimension of tensor 0; got 2"):
        ops.project_out(G, 2, U, 1.0, None)
    with pytest.raises(RuntimeError, match=r"basis must have shape \[5, 3\]"):
        ops.project_out(G, 0, U, 1.0, None)
    with pytest.raises(RuntimeError, match="must have one number per tensor = 1"):
        ops.project_out_grouped([G], [], [U], [0], [], [-1], 1.0)
    with pytest.raises(RuntimeError, match="must count bases"):
        ops.project_out_grouped([G], [1], [U], [1], [], [-1], 1.0)
    with pytest.raises(RuntimeError, match="must count bases"):
        ops.project_out_table([G], [1], [U], [1], [], [-1])
    for wrong in (torch.zeros(0, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), torch.zeros(3)):
        with pytest.raises(RuntimeError, match="expected a table of project_out_table"):
            ops.project_out_by_table(wrong, 1.0)


@pytest.mark.skipif(native.load_error() is not None, reason="the CPU kernels are not there")
def test_a_table_is_the_grouped_call() -> None:
    """Bit for bit: every type, a transposed, a sliced and a four-dimensional tensor, shared bases, directions."""
    ops = torch.ops.refusal_kernels_cpu
    bases = [basis(24, 3), basis(24, 3, torch.float64), basis(7, 7)]
    against = [torch.randn(3)]

    def tensors() -> list[Tensor]:
        torch.manual_seed(1)
        wide = torch.randn(40, 48)
        return [
            torch.randn(16, 24), torch.randn(16, 24).T, wide[3:27, ::2], torch.randn(2, 24, 3, 5).transpose(0, 2),
            torch.randn(24, 5).bfloat16(), torch.randn(5, 24).half(), torch.randn(24, 9).double(), torch.randn(7),
        ]  # fmt: skip

    dims, of, directed = [1, 0, 0, 1, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0, 1, 2], [-1, 0, -1, 0, -1, -1, -1, -1]
    one, other = tensors(), tensors()
    ops.project_out_grouped(one, dims, bases, of, against, directed, 0.7)
    table = ops.project_out_table(other, dims, bases, of, against, directed)
    assert all(torch.equal(a, b) for a, b in zip(other, tensors(), strict=True))
    ops.project_out_by_table(table, 0.7)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(one, tensors(), strict=True))


# --- orthonormal_basis ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_basis_spans_the_vectors_and_is_orthonormal_to_rounding(dtype: torch.dtype) -> None:
    vectors = torch.randn(200, 30).to(dtype)
    u = rk.orthonormal_basis(vectors)
    assert u.shape == (200, 30)
    assert u.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert u.is_contiguous()
    gram = u.double().T @ u.double() - torch.eye(30, dtype=torch.float64)
    # The polish works in fp64: beyond its own sums of 200 products nothing is lost in fp32, and a little in fp64.
    assert gram.abs().max() <= (8 if dtype == torch.float64 else 2) * torch.finfo(u.dtype).eps
    residual = vectors.double() - u.double() @ (u.double().T @ vectors.double())
    assert residual.norm() <= 1e-5 * vectors.double().norm()
    assert torch.equal(u, rk.orthonormal_basis(vectors))
    assert (u.gather(0, u.abs().argmax(0, keepdim=True)) > 0).all()
    flipped = rk.orthonormal_basis(-vectors.T.contiguous().T)
    torch.testing.assert_close(u, flipped, rtol=0, atol=1e-5)


def test_near_duplicates_are_dropped() -> None:
    vectors = torch.randn(50, 4)
    doubled = torch.cat([vectors, vectors + 1e-4 * torch.randn(50, 4)], dim=1)
    assert rk.orthonormal_basis(doubled).shape == (50, 4)
    assert rk.orthonormal_basis(doubled, rtol=0).shape == (50, 8)
    assert rk.orthonormal_basis(vectors[:, :1].repeat(1, 3), rtol=0).shape == (50, 1)
    assert rk.orthonormal_basis(torch.randn(4, 50)).shape == (4, 4)


def test_nothing_spans_nothing() -> None:
    for vectors in (torch.zeros(5, 3), torch.empty(5, 0), torch.empty(0, 3)):
        u = rk.orthonormal_basis(vectors)
        assert u.shape == (vectors.shape[0], 0)
    g = torch.randn(2, 5)
    assert torch.equal(rk.project_out(g, rk.orthonormal_basis(torch.zeros(5, 3)), 1), g)


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e30])
def test_scale_does_not_matter(scale: float) -> None:
    u = rk.orthonormal_basis(torch.eye(6)[:, :2] * scale)
    assert torch.equal(u.abs().sum(1), torch.tensor([1.0, 1, 0, 0, 0, 0]))


@pytest.mark.parametrize(
    ("vectors", "rtol", "message"),
    [
        (torch.tensor([[1.0, math.nan]]), 1e-3, "vectors must be finite"),
        (torch.tensor([[1.0, -math.inf]]), 1e-3, "vectors must be finite"),
        (torch.ones(3), 1e-3, r"vectors must be a matrix \[n, m\]"),
        (torch.ones(3, 2, 1), 1e-3, "vectors must be a matrix"),
        (torch.ones(3, 2, dtype=torch.int64), 1e-3, "vectors must have one of the dtypes"),
        (torch.ones(3, 2), 1.0, r"rtol must be a number in \[0, 1\)"),
        (torch.ones(3, 2), -1e-3, "rtol must be"),
    ],
)
def test_basis_refuses(vectors: Tensor, rtol: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rk.orthonormal_basis(vectors, rtol)


def test_reference_is_the_formula() -> None:
    g, u, direction = torch.randn(3, 9, 4, dtype=torch.float64), basis(9, 3, torch.float64), torch.randn(9).double()
    torch.testing.assert_close(
        reference.project_out(g, 1, u, 0.4, u.T @ direction), plain(g, u, 1, 0.4, direction), rtol=0, atol=1e-14
    )


def test_a_plan_refuses_what_is_not_in_memory_as_it_is() -> None:
    U = torch.eye(5)[:, :2]
    for tensor, words in (
        (torch.complex(torch.randn(6, 5), torch.randn(6, 5)).conj().imag, "must stand in memory as it is.*negated"),
        (torch._efficientzerotensor((6, 5)), "must stand in memory as it is.*implicit zeros"),
        (torch.empty(6, 5, device="meta"), "must hold data"),
    ):
        with pytest.raises(ValueError, match=rf"entries\[0\] tensor {words}"):
            rk.ProjectionPlan([(tensor, U.to(tensor.device), 1)])


@pytest.mark.parametrize("applied", [False, True])
def test_a_plan_can_be_pickled(applied: bool) -> None:
    tensor, U = torch.randn(6, 5), torch.eye(5)[:, :2]
    plan = rk.ProjectionPlan([(tensor, U, 1)])
    if applied:
        plan.apply_()
        tensor.normal_()
    other = pickle.loads(pickle.dumps(plan))
    other.apply_()
    assert not other._tensors[0][:, :2].any()
    assert tensor[:, :2].any()
    plan.apply_()
    assert torch.equal(other._tensors[0], tensor)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_plan_sees_other_data_of_a_basis_and_of_a_tensor(backend: str) -> None:
    tensor, U, v = torch.randn(6, 5), torch.eye(5)[:, :2].contiguous(), torch.ones(5)
    before = U.data
    plan = rk.ProjectionPlan([(tensor, U, 1)], backend=backend)
    directed = rk.ProjectionPlan([(tensor, U, 1)], only_against=[v], backend=backend)
    plan.apply_()
    U.data = torch.eye(5)[:, 3:].contiguous()
    tensor.normal_()
    plan.apply_()
    assert not tensor[:, 3:].any()
    assert torch.equal(before, torch.eye(5)[:, :2])  # what it was taken over from is left alone
    v.data = -torch.ones(5)
    tensor.copy_(torch.ones(6, 5))
    directed.apply_()
    assert not tensor[:, 3:].any()
    U.data = torch.ones(5, 2)
    with pytest.raises(ValueError, match="must have orthonormal columns"):
        plan.apply_()
    U.data = torch.eye(5)[:, :3].contiguous()
    with pytest.raises(ValueError, match=r"entries\[0\] basis had shape \(5, 2\) when the plan was built"):
        plan.apply_()
    U.data, tensor.data = before, tensor.double()
    with pytest.raises(
        ValueError, match=r"entries\[0\] tensor had shape .* dtype torch.float32.*; got .* torch.float64"
    ):
        plan.apply_()


def test_a_basis_of_no_data_is_refused() -> None:
    with pytest.raises(ValueError, match="vectors must hold data"):
        rk.orthonormal_basis(torch.empty(3, 2, device="meta"))


def test_numbers_of_numpy_and_of_too_many_digits() -> None:
    import numpy as np

    tensor, U = torch.randn(6, 5), torch.eye(5)[:, :2]
    assert torch.equal(rk.project_out(tensor, U, np.int64(1)), rk.project_out(tensor, U, 1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="strength must be a number in"):
        rk.project_out(tensor, U, 1, 10**400)
    with pytest.raises(TypeError, match=r"g must be a torch.Tensor; got ndarray") as refused:
        rk.project_out(np.zeros((100, 100)), U, 1)  # type: ignore[arg-type]
    assert len(str(refused.value)) < 300


def test_other_data_at_the_address_of_the_old_is_seen():
    """As far as the allocator goes along: each replacement frees what a later one may take. Held in bf16, a basis is
    taken over as a copy, which keeps nobody from its address."""

    def replace(t: torch.Tensor, wanted: torch.Tensor) -> None:
        address = t.data_ptr()
        for _ in range(100):
            t.data = wanted.clone()
            if t.data_ptr() == address:
                break

    q = torch.linalg.qr(torch.randn(512, 64))[0]
    bases = [b.to(torch.bfloat16) for b in (q, q.flip(0), q.roll(7, 0))]
    direction = torch.randn(512)
    tensor, basis, towards = torch.randn(512, 16), bases[0].clone(), direction.clone()
    plan = rk.ProjectionPlan([(tensor, basis, 0)], only_against=[towards])
    for other, sign in ((bases[1], 1), (bases[2], 1), (bases[2], -1)):
        basis.data, towards.data = basis.data.clone(), towards.data.clone()
        plan.apply_()
        replace(basis, other)
        replace(towards, direction * sign)
        tensor.copy_(torch.randn(512, 16))
        wanted = rk.project_out(tensor.clone(), other, 0, only_against=direction * sign)
        plan.apply_()
        torch.testing.assert_close(tensor, wanted)
