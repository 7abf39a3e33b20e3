"""What every test file gets: GPU tests skip with a reason, and a repository root to find sources by."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", metavar="i/n", help="every n-th of the tests, from the i-th (from 0) on")


@pytest.hookimpl(trylast=True)  # after -m and -k, or a part might have all that they leave
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if part := config.getoption("--part"):
        first, step = map(int, part.split("/"))
        config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if i % step != first])
        items[:] = items[first::step]
    if torch.cuda.is_available():
        return
    why = "this torch is built without CUDA" if torch.version.cuda is None else "no CUDA device"
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the repository this test file lies in."""
    return ROOT
