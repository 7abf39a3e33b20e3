"""Options of `pytest benches`, and the session's bench."""

from __future__ import annotations

import pytest

from benches import memory
from benches.harness import PROBE, Bench
from benches.shapes import COLUMNS, GROUPS


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("refusal_kernels benchmarks")
    group.addoption(
        "--shapes", default="", help="N,d,F,k, several separated by spaces (default: the four of the README)"
    )
    group.addoption("--groups", default=" ".join(GROUPS), help="encode decode backward step crossover, by spaces")
    group.addoption("--columns", default=" ".join((*COLUMNS, "autograd")), help="of these, by spaces")
    group.addoption("--rounds", default=4, type=int, help="turns of every column")
    group.addoption("--device", default="cpu", help="cpu or cuda; cuda times with events")
    group.addoption("--backend", default=None, help="back-end of our column (default: what auto takes)")
    group.addoption("--no-memory", action="store_true", help="do not measure peak memory")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("device") != "cpu":
        config.option.benchmark_timer = "benches.timers.cuda_event"
    if "crossover" in config.getoption("groups").split() or config.getoption("no_memory"):
        return
    if config.getoption("device") == "cpu" and memory.supported() and not config.option.collectonly:
        config.stash[PROBE] = memory.MemoryProbe()


def pytest_unconfigure(config: pytest.Config) -> None:
    if (probe := config.stash.get(PROBE, None)) is not None:
        probe.close()


@pytest.fixture(scope="session")
def bench(request: pytest.FixtureRequest) -> Bench:
    return Bench(request.config)
