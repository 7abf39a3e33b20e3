"""What a back-end is: a name, the primitives it has, and reasons why it cannot run a request."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class BackendError(RuntimeError):
    """An explicitly requested back-end cannot run the operator; the message lists every back-end with its reasons."""


@dataclass(frozen=True)
class Request:
    """What a back-end is asked for: device type, the dtype of the rows, and the sizes that matter (0: not known)."""

    device_type: str
    dtype: torch.dtype
    n_latents: int = 0
    d: int = 0
    k: int = 0

    def __str__(self) -> str:
        sizes = ", ".join(f"{n} = {v}" for n, v in (("F", self.n_latents), ("d", self.d), ("k", self.k)) if v)
        return f"device {self.device_type}, dtype {self.dtype}" + (f", {sizes}" if sizes else "")


class Backend:
    """Base of all back-ends. The primitives are methods with the signatures of `refusal_kernels.reference`; they take
    contiguous 2-D tensors on one device (the projection's any shape and strides), checked by the caller, and know
    nothing of autograd. Those in `takes_heads` take a head axis in front of every tensor too (heads.py)."""

    name: str = ""
    device_types: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    takes_heads: frozenset[str] = frozenset()
    # Whether sae_backward_adam takes 16-bit activations beside fp32 weights, as a step under autocast has them.
    fuses_mixed_precision: bool = False

    def unavailable_reason(self) -> str | None:
        """Why this back-end cannot run anything in this process, or None."""
        raise NotImplementedError(f"{type(self).__name__} must say whether it is available")

    def primitive(self, name: str) -> Any | None:
        """The callable of a primitive, or None where this back-end has none."""
        return getattr(self, name, None)

    def prepare_projection(self, *arguments: Any) -> Callable[[], None]:
        """A call of `project_out_grouped` with these arguments that can be made many times; what depends on them alone
        is done here, once. The caller keeps the tensors alive and calls only while each lies where it lay."""
        primitive = self.primitive("project_out_grouped")
        assert primitive is not None, f"{self.name} has no project_out_grouped, which not_supported_reasons says first"
        return functools.partial(primitive, *arguments)

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
        """run(gradients, lr, beta1, beta2, eps, bias_correction1, bias_correction2, weight_decay): a step of AdamW on
        every parameter, without `strength` of what it would move along span(bases[basis_of[i]]) in dims[i].

        Moments and gradients are contiguous, a parameter need not be. Here from the primitives, by way of a workspace
        of the parameters' size: AdamW's movement d, which begins as the weight decay's; its projection; p += d.
        """
        adam_rows = self.primitive("adam_rows")
        assert adam_rows is not None, f"{self.name} has no adam_rows, which not_supported_reasons says first"
        moved = [torch.empty(p.shape, dtype=p.dtype, device=p.device) for p in parameters]
        project = self.prepare_projection(moved, dims, bases, basis_of, [], [-1] * len(moved), strength)

        def run(gradients: list[Tensor], *numbers: float) -> None:
            *adam, weight_decay = numbers
            for p, g, m, v, d in zip(parameters, gradients, exp_avgs, exp_avg_sqs, moved, strict=True):
                torch.mul(p, -adam[0] * weight_decay, out=d)
                rows = (t.view(1, -1) for t in (d, g, m, v))
                adam_rows(*rows, *adam, None, False, False)
            project()
            torch._foreach_add_(parameters, moved)

        return run

    def not_supported_reasons(self, op: str, request: Request) -> list[str]:
        """Every reason why `op` cannot run here for `request`; empty when it can."""
        from . import OPERATORS

        reasons = []
        if (unavailable := self.unavailable_reason()) is not None:
            reasons.append(unavailable)
        if missing := [p for p in OPERATORS[op] if self.primitive(p) is None]:
            reasons.append(f"has no kernel for {', '.join(missing)}")
        if request.device_type not in self.device_types:
            reasons.append(f"runs on {' and '.join(self.device_types)} tensors, not on {request.device_type}")
        if request.dtype not in self.dtypes:
            known = ", ".join(str(d).removeprefix("torch.") for d in self.dtypes)
            reasons.append(f"takes {known}, not {str(request.dtype).removeprefix('torch.')}")
        return reasons
