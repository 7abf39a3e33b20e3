"""Time and memory of a call on the device."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

FLUSH_BYTES = 256 << 20  # more than any L2


def measure(run: Callable[[], Any], rounds: int = 10, seconds: float = 3.0) -> dict[str, Any]:
    """{"ms": median, "calls": every call's milliseconds, "extra_mb": peak memory above what was allocated before}.

    CUDA events around each call, L2 overwritten before it; at most `rounds` calls and about `seconds` in all, after one
    call that compiles and warms up. Without a GPU the host's clock and no memory, so that a benchmark can be tried.
    """
    if not torch.cuda.is_available():
        return _on_the_cpu(run, rounds, seconds)
    device = torch.device("cuda")
    flush = torch.empty(FLUSH_BYTES >> 2, device=device)
    run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    calls: list[float] = []
    while len(calls) < rounds and sum(calls) < seconds * 1e3:
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        result = run()
        end.record()
        end.synchronize()
        calls.append(start.elapsed_time(end))
        del result
    extra = torch.cuda.max_memory_allocated() - before
    return {"ms": statistics.median(calls), "calls": [round(c, 4) for c in calls], "extra_mb": round(extra / 1e6, 1)}


HOLD = 3.0  # times what the host takes to enqueue a call: the device is held that long, and twice that where too short
NOT_AHEAD = "the host was not ahead of the device"
LONGEST_HOLD = 200.0  # milliseconds; a call that the host is not through with by then waits for the device itself


def behind_other_work(run: Callable[[], Any], rounds: int = 10, seconds: float = 3.0) -> dict[str, Any]:
    """As `measure`, with the device busy while the host enqueues the call: what the call takes of a device that others
    keep busy, as a training step does. `measure` finds the device idle, so that of a call of few short kernels it
    measures the host.

    A kernel that does nothing but wait goes before the start event, for as long as the host needs and longer. That the
    host was ahead is seen from the start event, which must not have come when the whole call was enqueued; such calls
    alone count. {"error": why} where there was none. Adds "host_ms", what the host took to enqueue a call.
    """
    if not torch.cuda.is_available():
        return _on_the_cpu(run, rounds, seconds)
    flush = torch.empty(FLUSH_BYTES >> 2, device="cuda")
    run()
    torch.cuda.synchronize()
    cycles = _cycles_of_a_millisecond()
    began = time.perf_counter()
    run()
    hold = max(1.0, HOLD * 1e3 * (time.perf_counter() - began))
    torch.cuda.synchronize()
    calls: list[float] = []
    hosts: list[float] = []
    left = time.perf_counter() + seconds
    while len(calls) < rounds and hold <= LONGEST_HOLD and (not calls or time.perf_counter() < left):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(int(hold * cycles))
        start.record()
        began = time.perf_counter()
        result = run()
        host = 1e3 * (time.perf_counter() - began)
        end.record()
        ahead = not start.query()
        end.synchronize()
        del result
        if ahead:
            calls.append(start.elapsed_time(end))
            hosts.append(host)
        else:
            hold *= 2
    if not calls:
        return {"error": f"{NOT_AHEAD}, which was held for {hold / 2:.0f} ms"}
    return {
        "ms": statistics.median(calls), "calls": [round(c, 4) for c in calls],
        "host_ms": round(statistics.median(hosts), 4),
    }  # fmt: skip


def _cycles_of_a_millisecond() -> float:
    """Of `torch.cuda._sleep`, whose unit is the device's clock."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(1000)  # the first launch loads the kernel
    start.record()
    torch.cuda._sleep(1_000_000)
    end.record()
    end.synchronize()
    return 1_000_000 / start.elapsed_time(end)


def _on_the_cpu(run: Callable[[], Any], rounds: int, seconds: float) -> dict[str, Any]:
    run()
    calls: list[float] = []
    while len(calls) < rounds and sum(calls) < seconds * 1e3:
        start = time.perf_counter()
        run()
        calls.append(1e3 * (time.perf_counter() - start))
    return {"ms": statistics.median(calls), "calls": [round(c, 4) for c in calls]}


def attempt(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result, or {"error": why}: one contestant that does not fit into memory must not cost the others. With
    "lost" where no later call of this process can run on the device either."""
    try:
        return run()
    except torch.cuda.OutOfMemoryError as error:
        # The second sentence says how much was asked for.
        return {"error": "out of memory: " + str(error).split(". ", 1)[-1].split(". ")[0]}
    except Exception as error:
        found: dict[str, Any] = {
            "error": f"{type(error).__name__}: {str(error).splitlines()[0][:300] if str(error) else ''}"
        }
        return found | ({"lost": True} if device_is_lost() else {})
    finally:
        with contextlib.suppress(RuntimeError):  # after an illegal access every call raises
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def device_is_lost() -> bool:
    """Whether the device takes no more calls: after an illegal access every call of the process fails."""
    if not torch.cuda.is_available():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
