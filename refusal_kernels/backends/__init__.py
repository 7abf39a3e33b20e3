"""Which implementation runs: a priority list per device, explicit requests that never fall back, and what ran.

Precedence: the operator's `backend=` argument, then `use_backend(...)`, then the environment variable
`REFUSAL_KERNELS_BACKEND`, then `"auto"`. An explicit request that cannot run raises `BackendError` with every
back-end's reasons. `"auto"` takes the first back-end of the device's priority list that has no reason against the
request, and warns once per operator when that is the plain PyTorch reference on a CUDA tensor.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from .base import Backend, BackendError, Request
from .cpu import CpuBackend
from .cuda import CudaBackend
from .int8 import Int8Backend
from .reference import ReferenceBackend
from .triton import TritonBackend

__all__ = [
    "BACKENDS",
    "ENVIRONMENT_VARIABLE",
    "OPERATORS",
    "Backend",
    "BackendError",
    "Request",
    "last_backend",
    "registry",
    "requested_backend",
    "select",
    "use_backend",
]

ENVIRONMENT_VARIABLE = "REFUSAL_KERNELS_BACKEND"

BACKENDS: dict[str, Backend] = {
    b.name: b for b in (ReferenceBackend(), CpuBackend(), TritonBackend(), CudaBackend(), Int8Backend())
}

# What `auto` tries, best first. The CUDA C++ kernels and the 8-bit screen are asked for by name only until a
# measurement on a GPU is committed that shows them correct and faster.
PRIORITY: dict[str, tuple[str, ...]] = {"cpu": ("cpu", "reference"), "cuda": ("triton", "reference")}
OTHER_DEVICES = ("reference",)

# The operators people call, each with the primitives a back-end needs for it (forward and backward).
OPERATORS: dict[str, tuple[str, ...]] = {
    "topk_encode": ("topk_encode", "topk_encode_backward"),
    "sparse_decode": ("sparse_decode", "sparse_decode_backward"),
    "batch_topk_encode": ("batch_topk_encode", "csr_encode_backward"),
    "threshold_encode": ("threshold_encode", "csr_encode_backward"),
    "sparse_decode_csr": ("sparse_decode_csr", "sparse_decode_csr_backward"),
    "sae_step": ("topk_encode", "decode_residual", "sae_backward"),
    "sae_adam": ("adam_rows",),
    "project_out": ("project_out", "project_out_grouped"),
    "projected_adam": ("adam_rows", "project_out_grouped"),
}

# Training steps, which have no backward pass of their own.
_STEPS = ("sae_step", "sae_adam", "projected_adam")

# Backward passes, which are recorded by names of their own.
BACKWARD = {f"{op}_backward" for op in OPERATORS if op not in _STEPS}

NAMES = (*BACKENDS, "auto")


# The name that the innermost `use_backend` block around a call asks for, or None: of the thread and the asyncio task.
_block: ContextVar[str | None] = ContextVar("refusal_kernels.use_backend", default=None)


class _Traced(threading.local):
    """The same as torch.compile sees it. It can trace and guard an attribute of a thread-local object but no
    ContextVar, so that a block works inside a compiled function and one around it compiles that function for its
    back-end. A compiled function sees the block that its thread has entered or left last."""

    def __init__(self) -> None:
        self.name: str | None = None  # on the instance: a default on the class would not be guarded


_traced = _Traced()


def _asked() -> str | None:
    return _traced.name if torch.compiler.is_dynamo_compiling() else _block.get()


_last: dict[str, str] = {}
_warned: set[str] = set()


def _check_name(name: Any, source: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{source} must be one of {', '.join(NAMES)}; got {name!r}")
    return name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs every operator of the block on one back-end: "reference", "cpu", "triton", "cuda", "triton-int8", or "auto"
    to choose.

    Backward passes use the back-end their forward pass was given, also after the block. Local to the thread and to the
    asyncio task. Works inside and around functions under torch.compile, which compiles one graph per back-end asked
    for; an exported program keeps the request it was exported with. Raises ValueError for an unknown name; the
    operators raise BackendError when the back-end cannot run them.
    """
    _check_name(name, "use_backend: name")
    if torch.compiler.is_dynamo_compiling():
        outer, _traced.name = _traced.name, name
        try:
            yield
        finally:
            _traced.name = outer
        return
    token, _traced.name = _block.set(name), name
    try:
        yield
    finally:
        _block.reset(token)
        _traced.name = _block.get()


def last_backend(op: str) -> str | None:
    """The back-end that ran the last call of an operator in this process; None before its first.

    `op` is "topk_encode", "sparse_decode", "batch_topk_encode", "threshold_encode", "sparse_decode_csr", "project_out"
    (which `ProjectionPlan.apply_` counts as), any of these with "_backward" for its backward pass, "sae_step",
    "sae_adam" or "projected_adam".
    """
    known = set(OPERATORS) | BACKWARD
    if op not in known:
        raise ValueError(f"last_backend: op must be one of {', '.join(sorted(known))}; got {op!r}")
    return _last.get(op)


def requested_backend(backend: str | None) -> str | None:
    """What is asked for where an operator is called: its `backend=`, else the name of the `use_backend` block, else
    None, which leaves it to the environment when the operator runs. Forward and backward pass share the answer."""
    return _asked() if backend is None else _check_name(backend, "backend")


def select(op: str, request: Request, backend: str | None, record_as: str | None = None) -> Backend:
    """The back-end that runs `op` for `request`; `backend` as from `requested_backend`. Records it for last_backend."""
    if backend is None and (from_environment := os.environ.get(ENVIRONMENT_VARIABLE)):
        backend = _check_name(from_environment, f"the environment variable {ENVIRONMENT_VARIABLE}")
    if backend is not None and backend != "auto":
        chosen = BACKENDS[backend]
        if chosen.not_supported_reasons(op, request):
            raise BackendError(_refusal(op, request, backend))
    else:
        candidates = PRIORITY.get(request.device_type, OTHER_DEVICES)
        for name in candidates:
            chosen = BACKENDS[name]
            if not chosen.not_supported_reasons(op, request):
                break
        else:
            raise BackendError(_refusal(op, request, None))
        if chosen.name == "reference" and request.device_type == "cuda" and op not in _warned:
            _warned.add(op)
            reasons = "; ".join(BACKENDS["triton"].not_supported_reasons(op, request))
            warnings.warn(
                f"{op} runs on the plain PyTorch reference on a CUDA device, slowly and with large buffers: {reasons}",
                stacklevel=3,
            )
    _last[record_as or op] = chosen.name
    return chosen


def cpu_kernel(op: str, backend: str | None) -> Any | None:
    """The C++ kernel of `op` where `select` would choose it for every supported dtype on the CPU, else None; recorded
    like `select`. For calls so short that the choice itself would take as long as the kernel."""
    if backend is None:
        backend = _asked() or os.environ.get(ENVIRONMENT_VARIABLE)
    if backend and backend != "cpu" and backend != "auto":
        return None
    kernel = BACKENDS["cpu"].primitive(op)
    if kernel is not None:
        _last[op] = "cpu"
    return kernel


def _refusal(op: str, request: Request, backend: str | None) -> str:
    lines = [f"No back-end can run {op} as asked." if backend is None else f"The back-end {backend!r} cannot run {op}."]
    lines.append(f"  inputs: {request}")
    for name, candidate in BACKENDS.items():
        reasons = candidate.not_supported_reasons(op, request)
        lines.append(f"  {name}: " + ("supported" if not reasons else "; ".join(reasons)))
    lines.append("  Choose a supported back-end, or leave the choice to backend='auto'.")
    return "\n".join(lines)


def registry() -> dict[str, dict[str, Backend]]:
    """{operator: {back-end name: back-end}}; `.not_supported_reasons(operator, Request(...))` says what runs here."""
    return {op: dict(BACKENDS) for op in OPERATORS}
