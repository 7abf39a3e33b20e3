"""The head axis of a primitive: H autoencoders of one shape, W [H, F, d], in one call.

A back-end whose kernels know the axis names the primitives in `Backend.takes_heads` and gets the tensors as they are;
for every other one the primitive runs head by head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import Backend


def run(chosen: Backend, name: str, n_heads: int | None, *arguments: Any, **options: Any) -> Any:
    """`chosen`'s primitive on `arguments`; with `n_heads` all tensors with dimensions have the head axis in front.

    Equivalent to, with heads: the results of the primitive on each head's tensors, stacked; what it writes in place,
    it writes into each head's part.
    """
    primitive = getattr(chosen, name)
    if n_heads is None or name in chosen.takes_heads:
        return primitive(*arguments, **options)
    results = [primitive(*(_of_head(argument, head) for argument in arguments), **options) for head in range(n_heads)]
    if not isinstance(results[0], tuple):
        return _stack(results)
    return tuple(_stack(list(parts)) for parts in zip(*results, strict=True))


def _of_head(argument: Any, head: int) -> Any:
    return argument[head] if isinstance(argument, Tensor) and argument.dim() > 0 else argument


def _stack(parts: list[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return torch.stack(present) if present else None
