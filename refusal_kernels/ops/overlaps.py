"""Which of many tensors share memory: what is updated in place, grouped and in any order, must not."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..checks import check_in_memory, describe


def check_writable(op: str, name: str, tensor: Tensor) -> None:
    """Every element of `tensor` has a place of its own, so that each can be updated on its own."""
    check_in_memory(op, name, tensor)
    axes = sorted((stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1)
    extent = 1
    for stride, size in axes:
        if stride < extent:
            break
        extent = stride * (size - 1) + extent
    else:
        return
    if tensor.numel() == 0 or (axes[0][0] > 0 and int(_marks(tensor).sum()) == tensor.numel()):
        return
    raise ValueError(
        f"{op}: {name} must have a place in memory for each of its elements, because it is updated in place; "
        f"got {describe(tensor)} with strides {tensor.stride()} (expanded?)"
    )


def check_no_overlaps(op: str, written: Mapping[str, Tensor], read: Mapping[str, Tensor]) -> None:
    """No tensor of `written` shares an element with another one of `written` or with one of `read`.

    Sorted by address, each tensor is compared with those that begin before it ends; only for pairs whose ranges meet,
    such as interleaved column blocks, is every element looked at.
    """
    named = [(name, tensor, True) for name, tensor in written.items()]
    named += [(name, tensor, False) for name, tensor in read.items()]
    spans = [(str(tensor.device), *_span(tensor), i) for i, (_, tensor, _) in enumerate(named) if tensor.numel() > 0]
    spans.sort()
    open_spans: list[tuple[str, int, int, int]] = []
    for device, begin, end, i in spans:
        open_spans = [s for s in open_spans if s[0] == device and s[2] > begin]
        for other in sorted(s[3] for s in open_spans):
            first, second = sorted((i, other))
            (a_name, a, _), (b_name, b, b_written) = named[first], named[second]
            if (named[i][2] or named[other][2]) and _share_a_byte(a, b):
                why = "each is updated in place" if b_written else "one is read while the other is updated"
                raise ValueError(f"{op}: {a_name} and {b_name} must not share memory, because {why}")
        open_spans.append((device, begin, end, i))


def _span(tensor: Tensor) -> tuple[int, int]:
    """Addresses of the first byte and past the last."""
    start = tensor.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (1 + last) * tensor.element_size()


def _marks(tensor: Tensor, unit: int = 0, start: int = 0, end: int = 0) -> Tensor:
    """[(end - start) / unit] bool: which units of `unit` bytes belong to the tensor (default: its own elements)."""
    size = tensor.element_size()
    own_start, own_end = _span(tensor)
    unit, start, end = unit or size, start or own_start, end or own_end
    marks = torch.zeros((end - start) // unit, dtype=torch.bool, device="cpu")
    each = size // unit
    shape, strides = (*tensor.shape, each), (*(stride * each for stride in tensor.stride()), 1)
    marks.as_strided(shape, strides, (own_start - start) // unit).fill_(True)
    return marks


def _share_a_byte(a: Tensor, b: Tensor) -> bool:
    (a_start, a_end), (b_start, b_end) = _span(a), _span(b)
    start, end = max(a_start, b_start), min(a_end, b_end)
    if a.is_contiguous() and b.is_contiguous():
        return start < end
    unit = math.gcd(a.element_size(), b.element_size(), abs(a_start - b_start))
    start, end = min(a_start, b_start), max(a_end, b_end)
    return bool((_marks(a, unit, start, end) & _marks(b, unit, start, end)).any())
