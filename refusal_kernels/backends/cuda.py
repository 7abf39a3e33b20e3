"""The CUDA C++ back-end of refusal_kernels._C. It runs by explicit request only: no measurement has it ahead yet.

topk_encode is the chunked encoder of the Triton back-end (cuBLAS and, for b_dec, Triton kernels) with the row filter of
csrc/cuda in the place of Triton's, and its gradient is Triton's: so it needs Triton as well.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from .. import native
from .base import Backend, Request
from .triton import TritonBackend

# Primitive -> the operator of torch.ops.refusal_kernels_cuda that it stands on.
_PRIMITIVES = {
    "sparse_decode": "sparse_decode",
    "sparse_decode_backward": "sparse_decode_backward",
    "topk_encode": "row_filter",
    "topk_encode_backward": "row_filter",
}
# csrc/cuda/row_filter.h: keys of a row's list, and the largest k.
FILTER_CAPACITY, FILTER_MOST_K = 512, 256


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
        if name not in _PRIMITIVES or native.operator("refusal_kernels_cuda", _PRIMITIVES[name]) is None:
            return None
        return self._operator(name) if name == "sparse_decode" else getattr(self, name)

    def not_supported_reasons(self, op: str, request: Request) -> list[str]:
        reasons = super().not_supported_reasons(op, request)
        if op == "topk_encode":
            if (missing := TritonBackend().unavailable_reason()) is not None:
                reasons.append(missing)
            if request.k > FILTER_MOST_K:
                reasons.append(f"its row filter takes k up to {FILTER_MOST_K}, not {request.k}")
        return reasons

    @staticmethod
    def _operator(name: str) -> Any:
        return native.operator("refusal_kernels_cuda", name)

    def topk_encode(
        self, x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, b_dec: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """As in refusal_kernels.reference."""
        encode = importlib.import_module("refusal_kernels.triton_kernels.encode")
        row_filter = encode.RowFilter(FILTER_CAPACITY, self._operator("row_filter"))
        return encode.topk_encode(x, W_enc, b_enc, k, b_dec, row_filter=row_filter)

    def topk_encode_backward(self, *arguments: Any) -> Any:
        """As in refusal_kernels.reference; Triton's kernels."""
        backward = importlib.import_module("refusal_kernels.triton_kernels.backward")
        return backward.topk_encode_backward(*arguments)

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
