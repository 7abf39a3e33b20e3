"""The Triton back-end with an 8-bit screen in the encoder (triton_kernels/int8_screen.py). By explicit request only.

topk_encode, and with it sae_step, is exact as ever and deterministic; everything else is the Triton back-end's.
On an H200 it took twice the time of the ordinary encoder (`benches.gpu.sae`, column others).
"""

from __future__ import annotations

import importlib

from torch import Tensor

from .base import Request
from .triton import TritonBackend

# triton_kernels/int8_screen.py has the same numbers; reading them there would import Triton.
MOST_K, MOST_COLUMNS = 256, 65536


class Int8Backend(TritonBackend):
    name = "triton-int8"
    takes_heads = TritonBackend.takes_heads - {"topk_encode"}

    def not_supported_reasons(self, op: str, request: Request) -> list[str]:
        reasons = super().not_supported_reasons(op, request)
        if op in ("topk_encode", "sae_step"):
            if request.k > MOST_K:
                reasons.append(f"its 8-bit screen takes k up to {MOST_K}, not {request.k}")
            if request.d > MOST_COLUMNS:
                reasons.append(f"its 8-bit screen takes d up to {MOST_COLUMNS}, not {request.d}")
        return reasons

    def topk_encode(
        self, x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, b_dec: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """As in refusal_kernels.reference. The host waits once, for the number of rows that the screen gives up."""
        screen = importlib.import_module("refusal_kernels.triton_kernels.int8_screen")
        return screen.topk_encode(x, W_enc, b_enc, k, b_dec)
