"""The CUDA C++ back-end of refusal_kernels._C. It runs by explicit request only: no GPU has measured it yet."""

from __future__ import annotations

from typing import Any

import torch

from .. import native
from .base import Backend

_PRIMITIVES = ("sparse_decode", "sparse_decode_backward")


class CudaBackend(Backend):
    name = "cuda"
    device_types = ("cuda",)

    def unavailable_reason(self) -> str | None:
        if (error := native.load_error()) is not None:
            return error
        if native.operator("refusal_kernels_cuda", "sparse_decode") is None:
            return "refusal_kernels._C was built without CUDA; build it again where nvcc is, or with RK_CUDA=ON"
        if not torch.cuda.is_available():
            return "there is no CUDA device"
        return None

    def primitive(self, name: str) -> Any | None:
        return native.operator("refusal_kernels_cuda", name) if name in _PRIMITIVES else None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or (bound := self.primitive(name)) is None:
            raise AttributeError(f"the cuda back-end has no primitive {name!r}")
        return bound
