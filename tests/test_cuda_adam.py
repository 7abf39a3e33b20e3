"""The CUDA step's algorithm, without a GPU: csrc/cuda/sae_adam_team.h by fibers in the place of threads.

The same header is compiled by g++ that nvcc compiles into the kernels, in every shape and dtype that they are compiled
for; see tests/test_cuda_backward.py for what the fibers show and what they cannot. The parts of `-m gpu` run the
kernel itself.
"""

from __future__ import annotations

import ctypes
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from refusal_kernels import compact, native, reference
from refusal_kernels.backends.cuda import ADAM_TEAMS, CudaBackend

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
NUMBERS = (1e-2, 0.9, 0.999, 1e-8, 1 - 0.9**2, 1 - 0.999**2)
SALTS = (77, 2**31 - 9)


class _State(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weights", "low", "m", "v", "copy")), ("salt", ctypes.c_int64)
    ]  # fmt: skip


_POINTERS = ("e", "x", "W_dec", "b_dec", "scale", "tokens", "values", "offsets", "ends", "segment_latent")
_PARTS = ("part_enc", "part_db", "part_dec")
_MORE = ("b_enc", "m_b", "v_b", "position", "extra_enc", "extra_db", "extra_dec", "through")
_INTEGERS = (
    "type", "rows", "latents", "segments", "segment", "d", "heads", "teams", "positions", "extra_rows",
    "short_moments", "remove_parallel", "unit_norm", "reversed",
)  # fmt: skip
_NUMBERS = ("step_size", "beta1", "one_minus_beta1", "beta2", "one_minus_beta2", "eps", "inverse_root_bc2")


class _Call(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in (*_POINTERS, *_PARTS)),
        ("enc", _State),
        ("dec", _State),
        *((name, ctypes.c_void_p) for name in _MORE),
        *((name, ctypes.c_int64) for name in _INTEGERS),
        *((name, ctypes.c_double) for name in _NUMBERS),
        ("shape", ctypes.c_int64),
    ]


def at(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def operator_by(library: ctypes.CDLL, teams: int | None = None, backwards: bool = False) -> Callable[..., list[int]]:
    """torch.ops.refusal_kernels_cuda.sae_backward_adam by fibers; returns a list that holds the shape that ran."""

    def call(
        e: Tensor, x: Tensor, W_dec_seen: Tensor, b_dec: Tensor | None, scale: Tensor, tokens: Tensor, values: Tensor,
        offsets: Tensor, segment_ends: Tensor, segment_latent: Tensor, segment: int,
        W_enc: Tensor, low_enc: Tensor | None, m_enc: Tensor, v_enc: Tensor, copy_enc: Tensor | None,
        W_dec: Tensor, low_dec: Tensor | None, m_dec: Tensor, v_dec: Tensor, copy_dec: Tensor | None,
        b_enc: Tensor, m_b: Tensor, v_b: Tensor,
        position: Tensor | None, extra_enc: Tensor | None, extra_db: Tensor | None, extra_dec: Tensor | None,
        through: Tensor, step_size: float, beta1: float, one_minus_beta1: float, beta2: float, one_minus_beta2: float,
        eps: float, inverse_root_bc2: float, remove_parallel: bool, unit_norm: bool, salt_enc: int, salt_dec: int,
    ) -> list[int]:  # fmt: skip
        adam = (step_size, beta1, one_minus_beta1, beta2, one_minus_beta2, eps, inverse_root_bc2)
        (latents, d), segments, heads = W_dec.shape, segment_latent.numel(), through.shape[0]
        assert (e.dim(), W_enc.dim(), through.dim()) == (2, 2, 3)
        for t in (e, x, W_dec_seen, tokens, values, W_enc, m_enc, v_enc, W_dec, m_dec, v_dec, through):
            assert t.is_contiguous()
        assert through.shape[1] == min(library.most_teams(), latents // heads)
        shares = through if teams is None else torch.full((heads, teams, d), math.nan)
        parts = [torch.full((segments, size), math.nan) for size in (d, 1, d)]
        given = (e, x, W_dec_seen, b_dec, scale, tokens, values, offsets, segment_ends, segment_latent)
        more = (b_enc, m_b, v_b, position, extra_enc, extra_db, extra_dec, shares)
        integers = (
            TYPES[e.dtype], e.shape[0], latents, segments, segment, d, heads, shares.shape[1],
            0 if position is None else position.numel() // heads, 0 if extra_db is None else extra_db.numel() // heads,
            m_enc.dtype == torch.bfloat16, remove_parallel, unit_norm, backwards,
        )  # fmt: skip
        found = _Call(
            *map(at, given), *map(at, parts), _State(*map(at, (W_enc, low_enc, m_enc, v_enc, copy_enc)), salt_enc),
            _State(*map(at, (W_dec, low_dec, m_dec, v_dec, copy_dec)), salt_dec), *map(at, more), *map(int, integers),
            *adam, -1,
        )  # fmt: skip
        problem = library.emulate_sae_backward_adam(ctypes.byref(found))
        assert problem is None, problem
        if shares is not through:
            through.zero_()
            through[:, 0] = shares.sum(1)
        return [found.shape]

    return call


def test_the_operator_takes_what_the_emulation_takes(emulated_adam: ctypes.CDLL) -> None:
    """By name and in the same order: what the tests below hand over by fibers, the back-end hands to the kernel."""
    if native.operator("refusal_kernels_cuda", "sae_backward_adam") is None:
        pytest.skip("refusal_kernels._C was built without CUDA")
    schema = torch.ops.refusal_kernels_cuda.sae_backward_adam.default._schema
    assert [a.name for a in schema.arguments] == list(inspect.signature(operator_by(emulated_adam)).parameters)


def test_both_sides_know_how_many_teams_share_a_head(emulated_adam: ctypes.CDLL) -> None:
    assert emulated_adam.most_teams() == ADAM_TEAMS


class Problem(NamedTuple):
    """Arguments of sae_backward_adam; `state`: W_enc, b_enc, W_dec and the six moments."""

    e: Tensor
    x: Tensor
    values: Tensor
    indices: Tensor
    b_dec: Tensor | None
    state: list[Tensor]
    extras: list[Tensor | None]
    low: tuple[Tensor | None, Tensor | None] = (None, None)
    salts: tuple[int, int] | None = None


def problem(
    dtype: torch.dtype, d: int, form: str = "", extra: bool = False, heads: int | None = None, n: int = 23,
    n_latents: int = 9, k: int = 3, exact: bool = False,
) -> Problem:  # fmt: skip
    """Latent 0 is in most rows, the last two in none, a fifth of the entries are fillers. `form`: "halves", "moments",
    both. `exact`: multiples of 1/4, whose sums are exact."""
    lead = () if heads is None else (heads,)
    generator = torch.Generator().manual_seed(d + n + len(form))

    def normal(*size: int) -> Tensor:
        drawn = torch.randn(*lead, *size, generator=generator)
        return (drawn * 4).round() / 4 if exact else drawn

    choice = torch.rand(*lead, n, n_latents, generator=generator)
    choice[..., 0] = torch.where(choice[..., 0] < 0.9, 2.0, 0.0)
    choice[..., -2:] = -1
    indices = choice.topk(k, dim=-1).indices
    values = normal(n, k).abs() + 0.25
    values[torch.rand(*lead, n, k, generator=generator) < 0.2] = 0
    masters = [normal(n_latents, d) for _ in range(2)]
    masters[1][..., 3, :] = 0  # a row of zero norm
    low: tuple[Tensor | None, Tensor | None] = (None, None)
    if "halves" in form:
        halves = [compact.split(w) for w in masters]
        masters, low = [h for h, _ in halves], (halves[0][1], halves[1][1])
    moments = [f(*size) for size in ((n_latents, d), (n_latents,), (n_latents, d)) for f in (normal, normal)]
    moments[1::2] = [v.square() for v in moments[1::2]]
    if "moments" in form:
        for i in (0, 1, 4, 5):
            moments[i] = moments[i].to(torch.bfloat16)
    extras: list[Tensor | None] = [None] * 4
    if extra:
        rows = torch.tensor([n_latents - 1, 2, 0])
        if heads is not None:  # other latents in every head; what is padded with -1 must not matter
            rows = (rows + torch.arange(heads)[:, None]) % n_latents
            rows[-1, 1:] = -1
        extras = [rows, normal(3, d), normal(3), normal(3, d)]
    state = [masters[0], normal(n_latents), masters[1], *moments]
    e, x = normal(n, d).to(dtype), normal(n, d).to(dtype)
    return Problem(e, x, values.to(dtype), indices, normal(d), state, extras, low, SALTS if form else None)


def expected(p: Problem, parallel: bool, unit: bool, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor]:
    """(the state after the step, db_enc @ W_enc) of one head, from the reference's primitives."""
    wide = [t.to(dtype, copy=True) for t in p.state]
    for i, low in zip((0, 2), p.low, strict=True):
        if low is not None:
            wide[i] = compact.join(p.state[i], low).to(dtype)
    W_enc, b_enc, W_dec, *moments = wide
    if p.low[0] is None:
        seen = [w.to(p.e.dtype).to(dtype) for w in (p.state[0], p.state[2])]
    else:
        seen = [w.to(dtype) for w in (p.state[0], p.state[2])]
    gradients = [torch.zeros_like(t) for t in (W_enc, b_enc, W_dec)]
    rows = [None if t is None else t.to(dtype) for t in (p.e, p.x, p.values, p.b_dec)]
    reference.sae_backward(*rows[:3], p.indices, *seen, rows[3], 0.25, *gradients)
    if p.extras[0] is not None:
        live = p.extras[0] >= 0
        for gradient, more in zip(gradients, p.extras[1:], strict=True):
            gradient.index_add_(0, p.extras[0][live], more[live].to(dtype))  # type: ignore[index]
    through = gradients[1] @ seen[0]
    reference.adam_rows(W_enc, gradients[0], *moments[:2], *NUMBERS, None, False, False)
    reference.adam_rows(
        b_enc[None], gradients[1][None], moments[2][None], moments[3][None], *NUMBERS, None, False, False
    )
    reference.adam_rows(W_dec, gradients[2], *moments[4:], *NUMBERS, None, parallel, unit)
    return [W_enc, b_enc, W_dec, *moments], through


def head_of(p: Problem, h: int) -> Problem:
    part = [None if t is None else t[h] for t in p[:5]]
    return Problem(
        *part, [t[h] for t in p.state], [None if t is None else t[h] for t in p.extras],
        tuple(None if t is None else t[h] for t in p.low), p.salts,
    )  # type: ignore[arg-type]  # fmt: skip


Run = Callable[..., tuple[list[Tensor], Tensor, list[Tensor | None], list[int]]]


@pytest.fixture
def step(emulated_adam: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Run:
    """CudaBackend.sae_backward_adam with the fibers in the operator's place."""

    def run(
        p: Problem, parallel: bool = True, unit: bool = True, segment: int | None = None, teams: int | None = None,
        backwards: bool = False, copies: bool = False,
    ) -> tuple[list[Tensor], Tensor, list[Tensor | None], list[int]]:  # fmt: skip
        """(the state after the step with lower halves joined, through, [copies, lower halves], [shape])."""
        backend, ran = CudaBackend(), []
        by_fibers = operator_by(emulated_adam, teams, backwards)
        monkeypatch.setattr(backend, "_operator", lambda name: lambda *a: ran.extend(by_fibers(*a)), raising=False)
        monkeypatch.setattr(native, "operator", lambda *_: by_fibers)
        state = [t.clone() for t in p.state]
        low = [None if t is None else t.clone() for t in p.low]
        kept: list[Tensor | None] = [None, None]
        if copies:
            kept = [state[i].to(p.e.dtype) for i in (0, 2)]
        W_enc, b_enc, W_dec, *moments = state
        through = backend.sae_backward_adam(
            p.e, p.x, p.values, p.indices, W_enc, b_enc, W_dec, p.b_dec, 0.25, *moments, *NUMBERS, parallel, unit,
            *p.extras, *low, p.salts, *kept, segment=segment,
        )  # fmt: skip
        for i, rest in zip((0, 2), low, strict=True):
            if rest is not None:
                state[i] = compact.join(state[i], rest)
        return state, through, [*kept, *low], ran

    return run


def close(got: list[Tensor], p: Problem, parallel: bool = True, unit: bool = True) -> None:
    """At most three times the reference's error in fp32, plus some roundings; bf16 moments to their last place."""
    own, exact = (expected(p, parallel, unit, dtype) for dtype in (torch.float32, torch.float64))
    for mine, plain, wanted in zip(got, [*own[0], own[1]], [*exact[0], exact[1]], strict=True):
        rounding = 4 * torch.finfo(torch.float32).eps * wanted.abs().max()
        if mine.dtype == torch.bfloat16:
            torch.testing.assert_close(mine.double(), wanted, rtol=2**-7, atol=1e-6)
        else:
            assert (mine - wanted).abs().max() <= 3 * (plain - wanted).abs().max() + rounding


# Width in bytes and the shape that takes it.
WIDTHS = [(16, 0), (256, 0), (512, 1), (1040, 2), (2064, 3), (8192, 4), (8208, 5), (16384, 5)]
every_dtype = pytest.mark.parametrize("dtype", TYPES)


@every_dtype
@pytest.mark.parametrize(("width", "shape"), WIDTHS)
def test_a_step_at_every_width(step: Run, dtype: torch.dtype, width: int, shape: int) -> None:
    """fp32 weights and moments beside rows of any dtype, a hot latent in parts, copies, teams with several latents."""
    p = problem(dtype, width // dtype.itemsize)
    state, through, (copy_enc, copy_dec, *_), ran = step(p, segment=4, teams=4, copies=dtype != torch.float32)
    assert ran == [shape]
    close([*state, through], p)
    if dtype != torch.float32:
        assert copy_enc is not None
        assert copy_dec is not None
        assert torch.equal(copy_enc, state[0].to(dtype))
        assert torch.equal(copy_dec, state[2].to(dtype))


@pytest.mark.parametrize("form", ["halves", "moments", "halves and moments"])
@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("d", [64, 520, 4096])
def test_state_in_fewer_bytes(step: Run, form: str, extra: bool, d: int) -> None:
    p = problem(torch.bfloat16, d, form, extra)
    state, through, _, _ = step(p, segment=8, teams=3)
    close([*state, through], p)


def test_bf16_moments_beside_rows_of_fp32(step: Run) -> None:
    p = problem(torch.float32, 64, "moments")
    state, through, _, _ = step(p)
    close([*state, through], p)


def test_random_words_are_the_references(step: Run) -> None:
    """Gradients without rounding leave Adam's own arithmetic: the bf16 moments are the same numbers, but for one that
    lies where the random word decides by the last bit."""
    p = problem(torch.bfloat16, 64, "halves and moments", exact=True)
    state, *_ = step(p, parallel=False, unit=False)
    wanted, _ = expected(p, False, False)
    for i, salt, shift in zip((3, 4, 7, 8), (0, 0, 1, 1), (0, 16, 0, 16), strict=True):
        bits = compact.random_bits(wanted[i].numel(), 0, SALTS[salt], wanted[i].device).view(wanted[i].shape)
        own = compact.to_bfloat16(wanted[i], bits >> shift & 0xFFFF)
        assert (state[i] != own).float().mean() < 0.01
        assert (state[i] != wanted[i].to(torch.bfloat16)).float().mean() > 0.1, "they are not rounded to nearest"


@pytest.mark.parametrize(("parallel", "unit"), [(True, False), (False, True), (False, False)])
def test_each_constraint_alone(step: Run, parallel: bool, unit: bool) -> None:
    p = problem(torch.bfloat16, 2048)  # a team of several warps
    state, through, _, _ = step(p, parallel, unit, teams=2)
    close([*state, through], p, parallel, unit)
    norms = state[2].norm(dim=1)
    live = torch.arange(len(norms)) != 3
    assert torch.allclose(norms[live], torch.ones(()), atol=1e-6) == unit


@every_dtype
@pytest.mark.parametrize("d", [96, 1032, 2056, 4096])
def test_either_order_of_the_threads_gives_the_same_bits(step: Run, dtype: torch.dtype, d: int) -> None:
    p = problem(dtype, d, extra=True)
    one, other = (step(p, segment=5, teams=2, backwards=backwards) for backwards in (False, True))
    for a, b in zip([*one[0], one[1]], [*other[0], other[1]], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("form", ["", "halves and moments"])
@pytest.mark.parametrize("extra", [False, True])
def test_heads(step: Run, form: str, extra: bool) -> None:
    """Each head's step is its own; random words go by the element's number through all heads."""
    p = problem(torch.bfloat16, 64, form, extra, heads=3)
    state, through, _, _ = step(p, segment=6)
    assert through.shape == (3, 64)
    for h in range(3):
        close([*(t[h] for t in state), through[h]], head_of(p, h))
    if form:
        again, *_ = step(head_of(p, 2))
        assert not torch.equal(again[3], state[3][2]), "rounded by other words than as a head of its own"


def test_an_empty_batch_moves_by_momentum(step: Run) -> None:
    p = problem(torch.float32, 64)
    p = p._replace(**{name: getattr(p, name)[:0] for name in ("e", "x", "values", "indices")})
    state, through, _, _ = step(p)
    close([*state, through], p)
    assert not through.any()


def test_not_finite_numbers_stay_in_their_latents(step: Run) -> None:
    p = problem(torch.bfloat16, 64, "halves and moments")
    p.e[(p.indices == 2).any(1)] = math.nan
    assert (p.indices == 2).any()
    touched = p.indices[p.e.isnan().any(1) & (p.values != 0).any(1)].unique()
    state, _, (_, _, low, _), _ = step(p)
    for t in (state[2], state[7], state[8]):
        finite = t.isfinite().all(1)
        assert not finite[2]
        assert finite[[i for i in range(9) if i not in touched]].all()
    assert low is not None


@pytest.mark.parametrize("d", [130, 8200])
def test_what_the_kernel_does_not_take_goes_to_triton(step: Run, monkeypatch: pytest.MonkeyPatch, d: int) -> None:
    """Rows that do not begin at 16-byte boundaries, or are wider than a chunk."""
    called: list[Any] = []

    def by_triton(self: Any, *arguments: Any) -> Tensor:
        called.append(arguments)
        return torch.zeros(d)

    monkeypatch.setattr("refusal_kernels.backends.triton.TritonBackend.sae_backward_adam", by_triton, raising=False)
    step(problem(torch.bfloat16, d))
    assert len(called) == 1


@pytest.mark.gpu
@every_dtype
@pytest.mark.parametrize("form", ["", "halves", "halves and moments"])
@pytest.mark.parametrize("width", [16, 256, 1040, 4096, 8192, 16384])
def test_the_kernel_on_a_gpu(dtype: torch.dtype, form: str, width: int) -> None:
    """Hot latents, AuxK's rows, copies; the same bits twice."""
    if "halves" in form and dtype != torch.bfloat16:
        pytest.skip("halves are bf16")
    p = problem(dtype, width // dtype.itemsize, form, extra=True, n=400)
    results = []
    for _ in range(2):
        on_gpu = [None if t is None else t.cuda() for t in (*p[:5], *p.state, *p.extras, *p.low)]
        e, x, values, indices, b_dec, W_enc, b_enc, W_dec = on_gpu[:8]
        moments, extras, low = on_gpu[8:14], on_gpu[14:18], on_gpu[18:]
        kept = [None, None] if form or dtype == torch.float32 else [W_enc.to(dtype), W_dec.to(dtype)]
        through = CudaBackend().sae_backward_adam(
            e, x, values, indices, W_enc, b_enc, W_dec, b_dec, 0.25, *moments, *NUMBERS, True, True, *extras, *low,
            p.salts, *kept, segment=64,
        )  # fmt: skip
        if kept[0] is not None:
            assert torch.equal(kept[0], W_enc.to(dtype))
            assert torch.equal(kept[1], W_dec.to(dtype))
        state = [W_enc, b_enc, W_dec, *moments]
        for i, rest in zip((0, 2), low, strict=True):
            if rest is not None:
                state[i] = compact.join(state[i], rest)
        results.append([t.cpu() for t in (*state, through)])
    close(results[0], p)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
