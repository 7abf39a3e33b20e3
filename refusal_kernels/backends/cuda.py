"""The CUDA C++ back-end of refusal_kernels._C. It runs by explicit request only: no measurement has it ahead yet."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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
        if name not in _PRIMITIVES or native.operator("refusal_kernels_cuda", name) is None:
            return None
        return self.sparse_decode_backward if name == "sparse_decode_backward" else self._operator(name)

    @staticmethod
    def _operator(name: str) -> Any:
        return native.operator("refusal_kernels_cuda", name)

    def sparse_decode_backward(
        self, grad: Tensor, values: Tensor, indices: Tensor, W_dec: Tensor, need_values: bool, need_W: bool
    ) -> tuple[Tensor, Tensor]:
        """As in refusal_kernels.reference; a gradient that is not asked for comes back with no elements.

        Entries are sorted by latent here, not in C++: through the stable ABI of torch 2.11 a call of searchsorted ended
        the process.
        """
        order = offsets = None
        if need_W:
            latents, order = torch.sort(indices.reshape(-1), stable=True)
            boundaries = torch.arange(W_dec.shape[0] + 1, dtype=latents.dtype, device=latents.device)
            offsets = torch.searchsorted(latents, boundaries)
        return self._operator("sparse_decode_backward")(grad, values, indices, W_dec, order, offsets, need_values)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or (bound := self.primitive(name)) is None:
            raise AttributeError(f"the cuda back-end has no primitive {name!r}")
        return bound
