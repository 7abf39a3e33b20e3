"""What every test file gets: GPU tests skip with a reason, and a repository root to find sources by."""

from __future__ import annotations

import ctypes
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


class AheadOfTime:
    """Every Triton kernel compiled ahead of time, in processes of its own: twelve minutes of two cores.

    Begun by one process of the lowest priority when a session has tests for it, so that it is nearly done then;
    `result` gives what is left to all cores.
    """

    PARTS = 8
    CAPABILITIES = (80, 90, 100)

    def __init__(self) -> None:
        self._parts: queue.SimpleQueue[int] = queue.SimpleQueue()
        for part in range(self.PARTS):
            self._parts.put(part)
        self._kernels: list[dict[str, Any]] = []
        self._errors: list[str] = []
        self._running: set[subprocess.Popen[str]] = set()
        self._threads: list[threading.Thread] = []
        self._cache = tempfile.TemporaryDirectory(prefix="triton-cache-", ignore_cleanup_errors=True)

    def work(self, workers: int) -> None:
        """Adds threads that take parts until none is left."""
        for _ in range(workers):
            self._threads.append(threading.Thread(target=self._take_parts, daemon=True))
            self._threads[-1].start()

    def result(self) -> list[dict[str, Any]]:
        """What `refusal_kernels.triton_kernels.aot` printed of every configuration and architecture."""
        self.work(max(1, min(8, os.cpu_count() or 2) - len(self._threads)))
        for thread in self._threads:
            thread.join()
        assert not self._errors, self._errors[0]
        return self._kernels

    def stop(self) -> None:
        """Ends what is still running: the session was interrupted, or its tests did not come to it."""
        while not self._parts.empty():
            self._parts.get()
        for process in list(self._running):
            process.kill()
        for thread in self._threads:
            thread.join()
        self._cache.cleanup()

    def _take_parts(self) -> None:
        # The interpreter must be off, whatever this session runs under. Without line info the machine code is the same
        # and comes a fifth sooner.
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        environment |= {"TRITON_CACHE_DIR": self._cache.name, "TRITON_DISABLE_LINE_INFO": "1", "OMP_NUM_THREADS": "1"}
        while True:
            try:
                part = self._parts.get_nowait()
            except queue.Empty:
                return
            command = ["nice", "-n", "19", sys.executable, "-m", "refusal_kernels.triton_kernels.aot"]
            command += ["--part", f"{part}/{self.PARTS}", "--capability", *map(str, self.CAPABILITIES)]
            pipe = subprocess.PIPE
            process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)
            self._running.add(process)
            out, err = process.communicate()
            self._running.discard(process)
            if process.returncode != 0:
                self._errors.append(err[-8000:])
                return
            self._kernels += [json.loads(line) for line in out.splitlines()]


def pytest_collection_finish(session: pytest.Session) -> None:
    if session.config.option.collectonly or "TRITON_INTERPRET" in os.environ:
        return
    if any(item.path.name == "test_triton_aot.py" for item in session.items):
        session.config.stash[AHEAD] = ahead = AheadOfTime()
        ahead.work(1)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if (ahead := session.config.stash.get(AHEAD, None)) is not None:
        ahead.stop()


def launched() -> set[str]:
    """Names, as in the registry, of the Triton kernels that this process has had for a device."""
    from refusal_kernels.triton_kernels.registry import configurations

    return {
        configuration.label.partition("[")[0]
        for configuration in configurations()
        if any(caches[0] for caches in configuration.kernel.device_caches.values())
    }


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """On a GPU a line per kernel that ran, which `benches.gpu` keeps: that all tests passed says nothing of others."""
    if torch.cuda.is_available() and "TRITON_INTERPRET" not in os.environ:
        for name in sorted(launched()):
            terminalreporter.write_line(f"launched {name}")


AHEAD = pytest.StashKey[AheadOfTime]()


@pytest.fixture(scope="session")
def compiled(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """Every Triton kernel × shipped configuration as ptxas reports it."""
    return request.config.stash[AHEAD].result()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", metavar="i/n", help="every n-th of the tests, from the i-th (from 0) on")
    parser.addoption("--thin", action="store_true", help="of a test and back-end, every value of every parameter once")


def thinned(items: list[pytest.Item]) -> Iterator[pytest.Item]:
    """Of every test function and back-end so many that each value of each parameter occurs.

    The next one is that which shows the most values not seen yet. What is compiled on the host for a GPU test takes
    seconds: all combinations do not fit into the minutes of `benches.gpu`.
    """
    groups: dict[tuple[str, str], list[tuple[pytest.Item, set[str]]]] = {}
    for item in items:
        parameters = dict(item.callspec.params) if hasattr(item, "callspec") else {}
        group = (item.nodeid.partition("[")[0], str(parameters.get("backend")))
        groups.setdefault(group, []).append((item, {f"{name}={value}" for name, value in parameters.items()}))
    for members in groups.values():
        unseen = set().union(*(values for _, values in members))
        while True:
            item, values = max(members, key=lambda member: len(member[1] & unseen))
            yield item
            if not (unseen := unseen - values):
                break


@pytest.hookimpl(trylast=True)  # after -m and -k, or a part might have all that they leave
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--thin"):
        kept = set(thinned(items))
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = [item for item in items if item in kept]
    if part := config.getoption("--part"):
        first, step = map(int, part.split("/"))
        # First what compiles longest: a kernel of the encoder of many heads takes half a minute. Last what never ran
        # and whose programs wait for each other: one that waited forever would take its process's other tests along.
        items.sort(key=lambda item: ("one_launch" in item.nodeid, "heads" not in item.nodeid))
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


def emulation(tmp_path_factory: pytest.TempPathFactory, source: str) -> ctypes.CDLL:
    """A kernel's algorithm from csrc/cuda compiled for the CPU, fibers for the threads (tests/cuda)."""
    if (compiler := shutil.which("g++")) is None:
        pytest.skip("no g++ on this machine")
    out = tmp_path_factory.mktemp("emulation") / f"{source}.so"
    flags = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-shared", "-fPIC"]
    command = [compiler, *flags, f"-I{ROOT / 'csrc/cuda'}", str(ROOT / f"tests/cuda/{source}.cpp"), "-o", str(out)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return ctypes.CDLL(str(out))


@pytest.fixture(scope="session")
def emulated_row_filter(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """csrc/cuda/row_filter_warp.h, by 32 fibers."""
    loaded = emulation(tmp_path_factory, "row_filter")
    loaded.filter_chunk.restype = ctypes.c_char_p
    return loaded


@pytest.fixture(scope="session")
def emulated_backward(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """csrc/cuda/sae_backward_team.h, by as many fibers as a team has threads."""
    loaded = emulation(tmp_path_factory, "sae_backward")
    loaded.emulate_sae_backward.restype = ctypes.c_char_p
    return loaded


@pytest.fixture(scope="session")
def emulated_adam(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """csrc/cuda/sae_adam_team.h, likewise."""
    loaded = emulation(tmp_path_factory, "sae_adam")
    loaded.emulate_sae_backward_adam.restype = ctypes.c_char_p
    return loaded


@pytest.fixture(scope="session")
def emulated_projection(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """csrc/cuda/projection_block.h, by as many fibers as a cluster of blocks has threads."""
    loaded = emulation(tmp_path_factory, "projection")
    loaded.emulate_projection.restype = loaded.emulate_table.restype = ctypes.c_char_p
    return loaded
