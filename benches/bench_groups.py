"""encode, decode, backward and the whole training step: every column of every group, verified, then timed in turns."""

from __future__ import annotations

from typing import Any

import pytest

from benches.harness import Bench, measure, turns
from benches.shapes import Shape


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = turns(metafunc.config, crossover=False)
    ids = [f"{group}-{shape}-{turn}-{column}" for shape, group, turn, column in cases]
    metafunc.parametrize(("shape", "group", "turn", "column"), cases, ids=ids)


def test_column(benchmark: Any, bench: Bench, shape: Shape, group: str, turn: int, column: str) -> None:
    measure(benchmark, bench, shape, group, turn, column)
