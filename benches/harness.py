"""The bench that keeps one problem alive over the turns of its columns, and one turn as a pytest-benchmark record."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

import refusal_kernels as rk
from benches import memory, model
from benches.columns import Case, Column, timed
from benches.problem import Problem
from benches.shapes import CROSSOVER_GROUPS, CROSSOVER_SHAPES, GROUPS, SHAPES, Shape

# A turn of a fast column is repeated until about this many seconds, at most MAX_REPEATS times.
TURN_SECONDS = 0.15
MAX_REPEATS = 10
LONG_FLOPS = 1e10
FALLBACK_CACHE_BYTES = 64 << 20

# The operator whose back-end a group of ours reports.
OPERATORS = {"encode": "topk_encode", "decode": "sparse_decode", "backward": "sae_step", "step": "sae_step"}

PROBE: pytest.StashKey[memory.MemoryProbe] = pytest.StashKey()


def turns(config: pytest.Config, crossover: bool) -> list[tuple[Shape, str, int, str]]:
    """(shape, group, turn, column) in the order in which they run: columns take turns, A B C A B C."""
    wanted = config.getoption("groups").split()
    if crossover:
        shapes, groups = CROSSOVER_SHAPES, (CROSSOVER_GROUPS if "crossover" in wanted else ())
        columns = ["dense", "ours"]
    else:
        given = config.getoption("shapes").split()
        shapes = tuple(Shape.parse(text) for text in given) or SHAPES
        groups = tuple(g for g in GROUPS if g in wanted)
        columns = config.getoption("columns").split()
    return [
        (shape, group, turn, column)
        for shape in shapes
        for group in groups
        for turn in range(config.getoption("rounds"))
        for column in columns
        if hasattr(Case, f"_{group}_{column}") and (turn % 2 == 0 or not long(shape, column))
    ]


def long(shape: Shape, column: str) -> bool:
    """Whether one call takes so long that the column sits out every other turn, and is a turn by itself."""
    return column in ("dense", "compile") and model.encode_flops(shape) > LONG_FLOPS


class Bench:
    """The problem and the case at hand; the previous ones are dropped when another shape or group begins."""

    def __init__(self, config: pytest.Config) -> None:
        self.device = torch.device(config.getoption("device"))
        self.backend = config.getoption("backend")
        self.probe = config.stash.get(PROBE, None)
        self._problem: Problem | None = None
        self._case: Case | None = None
        self._facts: dict[str, dict[str, Any]] = {}
        self._wanted = config.getoption("columns").split()
        self._peaks: dict[str, float | None] = {}
        self._forms: dict[str, str] = {}
        self._flush = torch.empty(self._cache_bytes() // 4, device=self.device)

    def _cache_bytes(self) -> int:
        if self.device.type == "cuda":
            return 2 * torch.cuda.get_device_properties(self.device).L2_cache_size
        try:
            with open("/sys/devices/system/cpu/cpu0/cache/index3/size") as size:
                return int(size.read().strip().removesuffix("K")) * 1024
        except (OSError, ValueError):
            return FALLBACK_CACHE_BYTES

    def flush(self) -> None:
        """Overwrites a buffer as large as the last-level cache, so that every call starts from memory."""
        self._flush.fill_(1.0)

    def case(self, shape: Shape, group: str) -> Case:
        if self._case is not None and (self._case.problem.shape, self._case.group) == (shape, group):
            return self._case
        stale = (
            self._problem is None or self._problem.shape != shape or self._case is None or self._case.group == "step"
        )
        self._case = None
        self._facts = {}
        if stale:
            self._problem = None
            self._forms = {}
            if "torch._dynamo" in sys.modules:  # importing it takes seconds, and nothing was compiled without it
                torch.compiler.reset()
        memory.release()  # columns and their case refer to each other
        if self._problem is None:
            self._problem = Problem(shape, str(self.device))
        self._case = Case(self._problem, group, self.backend, self._forms)
        self._peaks = self._probe_peaks(self._case)
        return self._case

    def facts(self, case: Case, column: Column) -> dict[str, Any]:
        """Verifies a column on its first turn; returns what was found: error, repeats per turn, peak memory."""
        if column.name not in self._facts:
            error = case.verify(column)
            repeats = 1
            if not long(case.problem.shape, column.name):
                repeats = max(1, min(MAX_REPEATS, int(TURN_SECONDS / timed(column, self.device))))
            self._facts[column.name] = {"max_error": error, "repeats": repeats, "peak_bytes": self._peak(column)}
        return self._facts[column.name]

    def _probe_peaks(self, case: Case) -> dict[str, float | None]:
        """Peak memory of the group's columns, before any of them has buffers, gradients or moments here: the process
        that measures has its own, and both together would be twice the memory."""
        if self.probe is None:
            return {}
        if "best" in self._wanted:
            case.choose_forms()
            memory.release()
        names = [name for name in self._wanted if name != "floor" and case.has(name)]
        return {name: self.probe.peak(case.problem.shape, case.group, name, case.forms, case.backend) for name in names}

    def _peak(self, column: Column) -> float | None:
        if self.device.type == "cuda" and column.name != "floor":
            return memory.cuda_peak_of_call(column)
        return self._peaks.get(column.name)

    def backend_of(self, case: Case, operator: str, name: str) -> str | None:
        """What ran our column, asked of the package after the call."""
        if name == "autograd":
            operator = "topk_encode_backward"
        elif case.group == "backward":
            return case.native.name
        return rk.last_backend(operator)

    def preparation(self, column: Column) -> Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]:
        """pytest-benchmark's setup: the column's arguments, then cold caches."""

        def setup() -> tuple[tuple[Any, ...], dict[str, Any]]:
            args = column.prepare()
            self.flush()
            return args, {}

        return setup


def measure(benchmark: Any, bench: Bench, shape: Shape, group: str, turn: int, name: str) -> None:
    """One turn of a column; pytest-benchmark's record carries what `results` needs to merge the turns."""
    case = bench.case(shape, group)
    column = case.column(name)
    facts = bench.facts(case, column)
    benchmark.group = f"{group} {shape}"
    benchmark.pedantic(column.run, setup=bench.preparation(column), rounds=facts["repeats"], iterations=1)
    if benchmark.stats is None:  # --benchmark-disable: verified and run once
        return
    seconds = benchmark.stats.stats.min
    backend = None
    if name in ("ours", "autograd"):
        backend = bench.backend_of(case, OPERATORS[group], name)
    benchmark.extra_info.update(
        shape=list(shape),
        group=group,
        column=name,
        turn=turn,
        form=column.form,
        forms=column.forms,
        backend=backend,
        gflops=model.flops(group, shape, column.dense) / seconds / 1e9,
        gbytes=model.bytes_moved(group, shape) / seconds / 1e9,
        max_error=facts["max_error"],
        peak_bytes=facts["peak_bytes"],
    )
