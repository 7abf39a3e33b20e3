"""What a back-end is: a name, the primitives it has, and reasons why it cannot run a request."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import compact

_CHUNK = 1 << 20  # elements of a chunk of adam_compact_rows


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
    # Whether it takes bf16 moments and master weights in halves, by low_W_enc, low_W_dec and salts behind the others.
    fuses_compact_state: bool = False
    # Whether sae_backward takes `accumulate=False`: what stands in the buffers is then overwritten, not added to.
    overwrites_gradients: bool = False
    # Whether it writes 16-bit copies of fp32 weights in its pass, by copy_W_enc and copy_W_dec behind those.
    fuses_copies: bool = False

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

    def adam_compact_rows(self, W: Tensor, low: Tensor | None, g: Tensor, m: Tensor, v: Tensor, *rest: Any) -> None:
        """`adam_rows` on state in fewer bytes (refusal_kernels.compact); `rest` is its own, then `salt`.

        m and v [F, d] are both fp32 or both bf16, rounded stochastically: with the lower 16 bits of an element's random
        word and the upper 16. With `low` [F, d] int16, W is bf16 and the pair is the fp32 master weights in halves.
        Here by way of chunks of rows in fp32.
        """
        adam_rows = self.primitive("adam_rows")
        assert adam_rows is not None, f"{self.name} has no adam_rows, which not_supported_reasons says first"
        *arguments, salt = rest
        rows = max(1, _CHUNK // W.shape[-1])
        for first in range(0, W.shape[0], rows):
            part = slice(first, first + rows)
            w = W[part] if low is None else compact.join(W[part], low[part])
            moments = [t[part].to(w.dtype) for t in (m, v)]
            adam_rows(w, g[part].to(w.dtype), *moments, *arguments)
            if low is not None:
                W[part], low[part] = compact.split(w)
            if m.dtype == torch.bfloat16:  # else they were stepped in place
                bits = compact.random_bits(w.numel(), first * W.shape[-1], salt, W.device).view(w.shape)
                for stored, wide, own in zip((m, v), moments, (bits & 0xFFFF, bits >> 16), strict=True):
                    stored[part] = compact.to_bfloat16(wide, own)

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
