"""The torch.library namespace of the operators: schema, shape function, and the implementation that picks a back-end.

One operator per mathematical contract. The back-end is chosen inside the implementation, on real tensors, so a
compiled graph holds `refusal_kernels::topk_encode` and what the caller asked for, not a choice made while tracing.
Autograd lives outside, in the public functions: these raw operators give no gradient and know no `use_backend`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ..backends import Backend, select
from ..backends.base import Request
from ..backends.heads import run

LIBRARY = torch.library.Library("refusal_kernels", "DEF")


def define(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Registers one operator for every device and returns its bound overload."""
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"refusal_kernels::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.refusal_kernels, name).default


def pick(
    op: str, rows: torch.Tensor, k: int, n_latents: int, backend: str | None, record_as: str | None = None
) -> Backend:
    """The back-end for an operator whose row tensors look like `rows` [N, d]; `backend` as from `requested_backend`."""
    request = Request(rows.device.type, rows.dtype, n_latents=n_latents, d=rows.shape[-1], k=k)
    return select(op, request, backend, record_as)


def primitive_of(chosen: Backend, name: str, weights: torch.Tensor) -> Callable[..., Any]:
    """The back-end's primitive for weights [F, d], or [H, F, d] with a head axis on every tensor that it is given."""
    if weights.dim() == 2:
        return getattr(chosen, name)  # type: ignore[no-any-return]
    return functools.partial(run, chosen, name, weights.shape[0])


def only_the_value_is_wanted() -> bool:
    """Nothing around this call wants more of it than its result: no gradient mode, no transform of torch.func, no
    forward-mode differentiation, no compiler, dispatch mode or autocast. What an attribute of torch that is missing
    here would have said counts as a yes to something."""
    return not (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack()
        or torch.is_autocast_enabled("cpu")
    )


def apply(op: str, function: type[torch.autograd.Function], *args: Any) -> Any:
    """`function.apply(*args)`. A Function that torch.func could transform would cost several times as much per call;
    torch's own refusal speaks of a static method, and nothing is asked on the way unless it comes."""
    try:
        return function.apply(*args)
    except RuntimeError as error:
        if "setup_context" not in str(error):
            raise
        raise NotImplementedError(
            f"{op}: the transforms of torch.func (grad, vmap, jacrev, ...) are not supported; "
            "call it outside of them and use torch.autograd.grad or backward()"
        ) from None


class _OnceOnly(torch.autograd.Function):
    """A gradient as it is, connected with all that it was computed from by a backward pass that raises."""

    @staticmethod
    def forward(ctx: Any, gradient: torch.Tensor, *sources: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return gradient

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        raise RuntimeError(
            "refusal_kernels: gradients of gradients are not implemented; the operators are differentiable once"
        )


def once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """For the backward of a Function that is differentiable once. torch's `once_differentiable` leaves the second
    derivative out without a word where torch.autograd.grad asks for it by an input's name: the gradient that it returns
    leads to no input. Here it leads to all that were saved, and raises on the way."""
    first_only = once_differentiable(backward)

    @functools.wraps(backward)
    def wrapped(ctx: Any, *gradients: Any) -> Any:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():  # the latter without create_graph=True
            return first_only(ctx, *gradients)
        with torch.no_grad():
            results = backward(ctx, *gradients)
        used = [t for t in (*ctx.saved_tensors, *gradients) if isinstance(t, torch.Tensor) and t.requires_grad]
        if not used:
            return results
        several = results if isinstance(results, tuple) else (results,)
        connected = [_OnceOnly.apply(r, *used) if isinstance(r, torch.Tensor) else r for r in several]
        return tuple(connected) if isinstance(results, tuple) else connected[0]

    return wrapped


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Operand dtypes were settled by the public function; products inside an implementation must not be cast again."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
