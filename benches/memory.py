"""Peak extra memory of one call: what it adds to the resident memory of the process, its result included.

Measured by the kernel's high-water mark (VmHWM), reset just before the call, so it sees what C++ allocates as well as
what torch does, and counts only pages that were touched. Inputs, parameters and optimiser state exist before; buffers
that an implementation keeps between calls count, because the call measured is the first of its process. Every
measurement is a process of its own, forked from a server that forked before any thread of OpenMP existed.
On a GPU torch's own peak counter takes its place, in the process at hand.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import os
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from .columns import Case, Column
from .problem import Problem
from .shapes import Shape

MB = 1e6


def _status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def release() -> None:
    """Gives free memory back to the system, what only reference cycles hold included."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library: what it retains is not counted
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def supported() -> bool:
    """Whether this system has a resettable high-water mark (Linux)."""
    return hasattr(os, "fork") and os.access("/proc/self/clear_refs", os.W_OK)


def peak_of_call(column: Column) -> float:
    """Bytes that one call adds at its peak."""
    args = column.prepare()
    release()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    result = column.run(*args)
    peak = _status("VmHWM")
    del result
    return float(max(0, peak - before))


def cuda_peak_of_call(column: Column) -> float:
    """The same on a GPU, by torch's counter of allocated bytes."""
    args = column.prepare()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = column.run(*args)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    del result
    return float(peak - before)


def _measure(connection: Connection, problem: Problem, group: str, name: str, options: dict[str, Any]) -> None:
    torch.set_num_threads(options["threads"])
    case = Case(problem, group, options["backend"], dict(options["forms"]))
    column = case.column(name)
    # The BLAS library's own buffers are nobody's doing: they appear with the first product of this size.
    with torch.no_grad():
        torch.mm(problem.x, problem.W_enc.t())
    if name == "compile":
        column.run(*column.prepare())  # compiling is not the call, nor are the gradients that it leaves
        for parameter in problem.parameters:
            parameter.grad = None
    connection.send(peak_of_call(column))


def _serve(connection: Connection) -> None:
    context = multiprocessing.get_context("fork")
    problem: Problem | None = None
    torch.set_num_threads(1)  # no pool of threads that a fork would lose
    while (request := connection.recv()) is not None:
        shape, group, name, options = request
        if problem is None or problem.shape != shape:
            problem = None
            problem = Problem(shape, distinct=False)
            problem.codes  # noqa: B018
        ours, theirs = context.Pipe()
        worker = context.Process(target=_measure, args=(theirs, problem, group, name, options))
        worker.start()
        theirs.close()
        try:
            connection.send(ours.recv())
        except EOFError:
            connection.send(None)
        worker.join()


class MemoryProbe:
    """Starts the server. Make one before the first parallel torch operation of the process."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("fork")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,))
        self._process.start()
        theirs.close()

    def peak(self, shape: Shape, group: str, name: str, forms: dict[str, str], backend: str | None) -> float | None:
        """Bytes added at the peak of a column's call, or None where its process died."""
        options = {"threads": torch.get_num_threads(), "forms": forms, "backend": backend}
        self._connection.send((shape, group, name, options))
        return self._connection.recv()

    def close(self) -> None:
        self._connection.send(None)
        self._process.join()
