"""The C++ back-end for CPU tensors: refusal_kernels._C."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from .. import native
from .base import Backend

_PRIMITIVES = (
    "topk_encode",
    "topk_encode_backward",
    "sparse_decode",
    "sparse_decode_backward",
    "batch_topk_encode",
    "threshold_encode",
    "csr_encode_backward",
    "sparse_decode_csr",
    "sparse_decode_csr_backward",
    "decode_residual",
    "sae_backward",
    "sae_backward_adam",
    "adam_rows",
    "adam_compact_rows",
    "project_out",
    "project_out_grouped",
    "project_out_table",
    "project_out_by_table",
)


class CpuBackend(Backend):
    name = "cpu"
    device_types = ("cpu",)
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

    def __init__(self) -> None:
        self._bound: dict[str, Any] = {}

    def unavailable_reason(self) -> str | None:
        return native.load_error()

    def primitive(self, name: str) -> Any | None:
        # Bound on first use: looking an overload up costs more than a small call itself.
        if name not in self._bound:
            self._bound[name] = native.operator("refusal_kernels_cpu", name) if name in _PRIMITIVES else None
        return self._bound[name]

    def prepare_projection(self, *arguments: Any) -> Callable[[], None]:
        *tensors, strength = arguments
        table = self.project_out_table(*tensors)
        return functools.partial(self.project_out_by_table, table, strength)

    def adam_compact_rows(self, *arguments: Any) -> None:
        (self.primitive("adam_compact_rows") or super().adam_compact_rows)(*arguments)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or (bound := self.primitive(name)) is None:
            raise AttributeError(f"the cpu back-end has no primitive {name!r}")
        return bound
