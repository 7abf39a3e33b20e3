"""The plain PyTorch back-end: every primitive, every device, every float dtype."""

from __future__ import annotations

import torch

from .. import reference
from .base import Backend, Request


class ReferenceBackend(Backend):
    name = "reference"
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

    topk_encode = staticmethod(reference.topk_encode)
    topk_encode_backward = staticmethod(reference.topk_encode_backward)
    sparse_decode = staticmethod(reference.sparse_decode)
    sparse_decode_backward = staticmethod(reference.sparse_decode_backward)
    batch_topk_encode = staticmethod(reference.batch_topk_encode)
    threshold_encode = staticmethod(reference.threshold_encode)
    csr_encode_backward = staticmethod(reference.csr_encode_backward)
    sparse_decode_csr = staticmethod(reference.sparse_decode_csr)
    sparse_decode_csr_backward = staticmethod(reference.sparse_decode_csr_backward)
    decode_residual = staticmethod(reference.decode_residual)
    sae_backward = staticmethod(reference.sae_backward)
    adam_rows = staticmethod(reference.adam_rows)
    project_out = staticmethod(reference.project_out)
    project_out_grouped = staticmethod(reference.project_out_grouped)

    def unavailable_reason(self) -> str | None:
        return None

    def not_supported_reasons(self, op: str, request: Request) -> list[str]:
        return []
