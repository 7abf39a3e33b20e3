"""The Triton back-end: CUDA tensors, or CPU tensors in Triton's interpreter (TRITON_INTERPRET=1 before it starts)."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from typing import Any

from torch import Tensor

from .base import Backend, Request

_MODULES = {
    "topk_encode": "encode",
    "sparse_decode": "decode",
    "batch_topk_encode": "encode_csr",
    "threshold_encode": "encode_csr",
    "csr_encode_backward": "backward_csr",
    "sparse_decode_csr": "decode",
    "sparse_decode_csr_backward": "backward_csr",
    "decode_residual": "decode",
    "sparse_decode_backward": "backward",
    "topk_encode_backward": "backward",
    "sae_backward": "backward",
    "sae_backward_adam": "sae_adam",
    "adam_rows": "adam",
    "adam_compact_rows": "adam",
    "project_out": "projection",
    "project_out_grouped": "projection",
}


def interpreted() -> bool:
    """Whether Triton's interpreter is switched on, in which kernels run on CPU tensors (slowly, for tests)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def _import_error() -> str | None:
    try:
        importlib.import_module("triton")
    except ModuleNotFoundError as error:
        if error.name == "triton":
            return "the package triton is not installed; run: pip install triton"
        return f"the package triton cannot be imported ({error})"
    except Exception as error:  # a damaged installation: its reason belongs into the list of reasons
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"the package triton cannot be imported ({first_line})"
    return None


@functools.cache
def _primitive(name: str) -> Any:
    module = importlib.import_module(f"refusal_kernels.triton_kernels.{_MODULES[name]}")
    return getattr(module, name)


class TritonBackend(Backend):
    name = "triton"
    device_types = ("cuda",)
    fuses_mixed_precision = True
    fuses_compact_state = True
    fuses_copies = True
    overwrites_gradients = True
    takes_heads = frozenset(_MODULES) - {"project_out", "project_out_grouped"}

    def unavailable_reason(self) -> str | None:
        return _import_error()

    def primitive(self, name: str) -> Any | None:
        return getattr(self, name) if name in _MODULES else None

    def __getattr__(self, name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"the triton back-end has no primitive {name!r}")
        return _primitive(name)

    def adam_compact_rows(self, *arguments: Any) -> None:
        _primitive("adam_compact_rows")(*arguments)

    def prepare_projection(self, *arguments: Any) -> Callable[[], None]:
        lagged = importlib.import_module("refusal_kernels.triton_kernels.lora_projection_lagged")
        if (run := lagged.prepare_if_chosen(*arguments)) is not None:
            return run
        module = importlib.import_module("refusal_kernels.triton_kernels.projection")
        return module.prepare_projection(*arguments)

    def prepare_projected_adam(
        self,
        parameters: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        dims: list[int],
        bases: list[Tensor],
        basis_of: list[int],
        strength: float,
    ) -> Callable[..., None]:
        fused = importlib.import_module("refusal_kernels.triton_kernels.projected_adam")
        tensors = list(zip(parameters, exp_avgs, exp_avg_sqs, strict=True))
        groups: dict[int, list[int]] = {}  # of one rank each; -1: what the fused kernels do not take
        for i, (each, dim, b) in enumerate(zip(tensors, dims, basis_of, strict=True)):
            groups.setdefault(bases[b].shape[1] if fused.takes(*each, dim, bases[b]) else -1, []).append(i)
        runs = []
        for rank, members in groups.items():
            prepare = super().prepare_projected_adam if rank < 0 else fused.prepare
            p, m, v = ([each[i] for i in members] for each in (parameters, exp_avgs, exp_avg_sqs))
            of = [dims[i] for i in members], bases, [basis_of[i] for i in members]
            runs.append((members, prepare(p, m, v, *of, strength)))

        def run(gradients: list[Tensor], *numbers: float) -> None:
            for members, step in runs:
                step([gradients[i] for i in members], *numbers)

        return run

    def not_supported_reasons(self, op: str, request: Request) -> list[str]:
        if (unavailable := self.unavailable_reason()) is not None:
            return [unavailable]
        if interpreted() and request.device_type == "cpu":
            request = Request("cuda", request.dtype, request.n_latents, request.d, request.k)
        reasons = super().not_supported_reasons(op, request)
        if request.device_type == "cpu" and not interpreted():
            reasons.append("its interpreter for CPU tensors is off (set TRITON_INTERPRET=1 before Python starts)")
        return reasons
