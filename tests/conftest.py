"""What every test file gets: GPU tests skip with a reason, and a repository root to find sources by."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
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


@pytest.fixture(scope="session")
def emulated_row_filter(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """csrc/cuda/row_filter_warp.h compiled for the CPU, 32 fibers for the lanes of a warp (tests/cuda)."""
    if (compiler := shutil.which("g++")) is None:
        pytest.skip("no g++ on this machine")
    out = tmp_path_factory.mktemp("emulation") / "row_filter.so"
    flags = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-shared", "-fPIC"]
    command = [compiler, *flags, f"-I{ROOT / 'csrc/cuda'}", str(ROOT / "tests/cuda/row_filter.cpp"), "-o", str(out)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    loaded = ctypes.CDLL(str(out))
    loaded.filter_chunk.restype = ctypes.c_char_p
    return loaded
