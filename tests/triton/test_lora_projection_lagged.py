"""The projection of LoRA matrices in one launch: the order of its work by itself, and the kernel in the interpreter.

The interpreter runs programs one after the other, so nobody waits where the order is right; that an update does wait is
tried with counters that say it must.
"""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

import refusal_kernels as rk
from benches.gpu import projection as benchmark
from benches.projection import TOLERANCE
from refusal_kernels import reference
from refusal_kernels.triton_kernels import lora_projection, projection
from refusal_kernels.triton_kernels import lora_projection_lagged as lagged

# (side of the projection, n, fibres): slabs of 64 and 256 that are full, part of one, and several blocks of fibres.
LORA = [(0, 576, 16), (1, 64, 16), (1, 640, 32), (0, 192, 48), (1, 640, 16)]
BASIS_OF = [0, 1, 2, 3, 2]  # one is shared


@pytest.fixture(autouse=True)
def _poison_and_no_end():
    """`empty` is filled with NaN, and who waits for what never comes is interrupted."""

    def stop(number: int, frame: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 120)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@contextmanager
def seconds_only(seconds: float) -> Iterator[None]:
    left = signal.setitimer(signal.ITIMER_REAL, seconds)[0]
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, left)


def problem(rank: int, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], tuple]:
    """Tensors, and the other arguments of `prepare`: some fibres are projected against a direction only."""
    torch.manual_seed(rank)
    tensors = [torch.randn((n, fibres) if dim == 0 else (fibres, n)).to(dtype) for dim, n, fibres in LORA]
    # Not orthonormal where n < rank: the kernels do not ask.
    bases = [(torch.randn(LORA[i][1], rank) / LORA[i][1] ** 0.5).contiguous() for i in sorted(set(BASIS_OF))]
    return tensors, ([dim for dim, _, _ in LORA], bases, BASIS_OF, [torch.randn(rank)], [-1, 0, 0, -1, -1], 0.7)


def copies(tensors: list[Tensor]) -> list[Tensor]:
    return [t.clone() for t in tensors]


@pytest.mark.parametrize(
    ("slabs", "lag"),
    [([56, 16, 4, 4, 4, 16, 1, 1, 1, 1] * 6, 20), ([16] * 40, 198), ([1] * 50, 0), ([3, 5], 100), ([7], 2), ([], 3)],
)
def test_updates_follow_the_coefficients_of_their_block_at_a_distance(slabs, lag):
    listed = list(lagged.order(slabs, lag))
    everything = [(block, slab) for block, of_block in enumerate(slabs) for slab in range(of_block)]
    of_kind = {kind: [place for update, *place in listed if update == kind] for kind in (False, True)}
    assert of_kind[False] == of_kind[True] == [list(place) for place in everything]
    # How many coefficients stand before each item, and those of which blocks are complete there.
    out = 0
    between = []
    for update, block, slab in listed:
        if update:
            end = sum(slabs[: block + 1])
            assert out >= end
            between.append(out - end)
            assert between[-1] >= lag or out == len(everything)
        else:
            out += 1
            assert (block, slab) == everything[out - 1]
    # Nor much further: what is in flight has to stay in the L2.
    assert all(distance <= lag + max(slabs) for distance in between)
    if between and lag + slabs[0] <= len(everything):
        assert between[0] == lag
    # Mixed: where coefficients are left, never more than two updates in a row.
    kinds = "".join("u" if update else "c" for update, _, _ in listed).rstrip("u")
    assert "uuu" not in kinds


def test_a_large_block_does_not_delay_the_updates_of_all_after_it():
    out, between = 0, []
    slabs = [56] + [4] * 100
    for update, block, _ in lagged.order(slabs, 10):
        out += not update
        if update and block > 50:
            between.append(out - sum(slabs[: block + 1]))
    assert between[0] == 10
    assert max(between) <= 10 + 4


def test_programs_of_two_for_each_lag_stand_between_a_sum_and_its_first_update():
    """So many run at a time where the default lag is taken."""
    device = torch.device("cpu")
    for padded, sizes in lagged.SIZES.items():
        lag = lagged.default_lag(device, padded)
        assert 2 * lag == lagged.SMS * sizes.programs
        slabs = [-(-n // sizes.rows) for n in (4096, 4096, 4096, 14336, 14336, 1024, 1024)] * 20
        ready: dict[int, int] = {}
        distances = []
        for ticket, (update, block, slab) in enumerate(lagged.order(slabs, lag)):
            if not update:
                ready[block] = ticket
            elif slab == 0:
                distances.append(ticket - ready[block])
        # The first have no updates between, the last no coefficients.
        steady = distances[len(distances) // 4 : -len(distances) // 4]
        assert min(steady) > 1.6 * lag


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("rank", [3, 16, 100])
def test_one_launch_is_the_projection_and_gives_the_bits_of_two(monkeypatch, dtype, rank):
    tensors, arguments = problem(rank, dtype)
    dims, bases, basis_of, against, against_of, _ = arguments
    ours, theirs = copies(tensors), copies(tensors)
    one = lagged.prepare(ours, *arguments, slab=256, lag=3)
    monkeypatch.setattr(lora_projection, "SLAB", 256)
    two = lora_projection.prepare(theirs, *arguments)
    one()
    two()
    for old, new, twin, dim, b, a in zip(tensors, ours, theirs, dims, basis_of, against_of, strict=True):
        exact, own = (
            reference.project_out(old.to(t), dim, bases[b].to(t), 0.7, None if a < 0 else against[0].to(t))
            for t in (torch.float64, torch.float32)
        )
        error, own_error = ((result.double() - exact).abs() for result in (new, own.to(dtype)))
        rounding = torch.finfo(dtype).eps * exact.abs().max()
        assert error.max() <= 2 * own_error.max() + rounding
        assert error.mean() <= 2 * own_error.mean() + rounding / 2
        assert not torch.equal(new, old)
        assert torch.equal(new, twin)


@pytest.mark.parametrize(("slab", "lag"), [(128, 0), (64, 5), (None, None)])
def test_every_call_finds_its_counters_at_zero(monkeypatch, slab, lag):
    """Whatever the distance, three calls in a row are three of the two launches."""
    tensors, arguments = problem(5)
    ours, theirs = copies(tensors), copies(tensors)
    one = lagged.prepare(ours, *arguments, slab=slab, lag=lag)
    monkeypatch.setattr(lora_projection, "SLAB", slab or lagged.SIZES[16].rows)
    two = lora_projection.prepare(theirs, *arguments)
    for _ in range(3):
        one.partial.fill_(torch.nan)
        one.sums.fill_(torch.nan)
        one()
        two()
        assert not one.counters.any()
        assert all(map(torch.equal, ours, theirs))


def test_an_update_waits_until_the_sum_of_all_slabs_is_there():
    """A launch of one update alone, with counters as if the others ran beside it."""
    tensors, arguments = problem(4)
    whole = lagged.prepare(tensors, *arguments, slab=256, lag=0)
    slabs, counter = 3, lagged.FIRST  # of the first block: 576 rows
    first = next(i for i, item in enumerate(whole.items.tolist()) if item[6] == 1)
    assert whole.items[first, 11] == slabs
    one = dataclasses.replace(whole, items=whole.items[first : first + 1].contiguous())
    one.sums.fill_(0.5)
    for stored in (0, 1, slabs - 1, slabs):
        one.counters[counter] = stored
        with pytest.raises(Exception, match="Timeout"), seconds_only(0.3):
            one()
        assert one.counters[0] == 0  # the ticket that it took was the only one
        assert one.counters[counter] == stored
    before = tensors[0].clone()
    one.counters[counter] = slabs + 1
    one()
    assert one.counters[counter] == slabs + 2  # two updates of the block are left, so nothing is reset
    assert not torch.equal(tensors[0][:256], before[:256])
    assert torch.equal(tensors[0][256:], before[256:])
    one.counters[counter] = 2 * slabs
    one()
    assert one.counters[counter] == 0


def test_a_block_asks_for_it(monkeypatch):
    """Nothing takes it by itself; in the block every plan of a fit does, and what does not fit goes its own way."""
    made, prepare = [], lagged.prepare

    def seen(*arguments, **sizes):
        made.append(sizes)
        return prepare(*arguments, **sizes)

    monkeypatch.setattr(lagged, "prepare", seen)
    u = torch.linalg.qr(torch.randn(192, 4))[0].contiguous()
    g, other = torch.randn(192, 16), torch.randn(192, 7)
    expected = rk.project_out(g, u, 0, backend="triton")
    for path, wanted in (("two launches", []), ("one launch", [{"slab": 128, "lag": 1}])):
        inside = g.clone()
        plan = rk.ProjectionPlan([(inside, u, 0)], backend="triton")
        with lagged.using(path, slab=128, lag=1):
            plan.apply_()
        assert made == wanted
        torch.testing.assert_close(inside, expected)
        inside.copy_(g)
        plan.apply_()  # it stays with what it was prepared with
        assert made == wanted
        torch.testing.assert_close(inside, expected)
    with lagged.using("one launch"):
        rk.ProjectionPlan([(other, u, 0)], backend="triton").apply_()
        projection.prepare_projection([], [], [], [], [], [], 1.0)()
    assert len(made) == 1
    rk.ProjectionPlan([(g.clone(), u, 0)], backend="triton").apply_()
    assert len(made) == 1
    with (
        pytest.raises(ValueError, match="path must be one of two launches, one launch; got 'three'"),
        lagged.using("three"),
    ):
        pass


def test_the_benchmark_checks_it_before_it_is_timed():
    tensors, (dims, bases, basis_of, *_) = problem(9)
    bases = [torch.linalg.qr(u)[0].contiguous() for u in bases]
    entries = [(t, bases[b], dim) for t, b, dim in zip(tensors, basis_of, dims, strict=True)]
    arguments = benchmark.in_one_launch(8)["ours, one launch"]
    assert arguments["path"] == "one launch"
    row = benchmark.checked(entries, **arguments)
    assert row["error"] <= TOLERANCE
    assert row["ms"] > 0
