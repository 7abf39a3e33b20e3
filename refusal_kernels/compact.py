"""Training state in fewer bytes: moments rounded stochastically to bf16, fp32 master weights split into two halves.

Moments. Adam's second moment decays by 1 part in 1000 per step, a quarter of what separates two bf16 numbers: rounded
to nearest it would stand still. Rounded up with the probability of its remainder it is right on average. The random
numbers are a hash of the element's place and of a salt made of the step, so that every back-end, and a run that was
resumed, rounds alike.

Master weights. An fp32 number is its bf16 half, rounded to nearest (ties away from zero), and the 16 bits by which it
differs from it. The bf16 half *is* the weight of the forward pass, so no copy in 16 bits is ever made, and the pair is
the fp32 number exactly.

Source: stochastic rounding of optimiser state, Zamirai et al., arXiv 2010.06192; the hash is the integer finaliser
(x >> 16 ^ x) * 0x45d9f3b, twice.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

_Numbers = TypeVar("_Numbers", int, Tensor)

_MULTIPLIER = 0x45D9F3B
_WORD = 0xFFFFFFFF
QUIET_NAN = 0x7FC00000  # a GPU's own NaN, 0x7fffffff, would carry into the sign


def mix(x: _Numbers) -> _Numbers:
    """32 well-mixed bits of a number in [0, 2^32), or of each of an int64 tensor."""
    for _ in range(2):
        x = ((x >> 16 ^ x) * _MULTIPLIER) & _WORD
    return x >> 16 ^ x


def salt_of(step: int, tensor: int) -> int:
    """The salt of one tensor in one step, in [0, 2^31): an int32 for every kernel."""
    return mix((step * 4 + tensor) & _WORD) & 0x7FFFFFFF


def random_bits(n: int, first: int, salt: int, device: torch.device) -> Tensor:
    """int64 [n] in [0, 2^32): for the elements first .. first + n of a tensor."""
    return mix((torch.arange(first, first + n, device=device) & _WORD) ^ salt)


def to_bfloat16(x: Tensor, bits: Tensor) -> Tensor:
    """fp32 x rounded to bf16, away from zero where its lower 16 bits plus `bits` (int64 in [0, 2^16)) carry."""
    up = (x.contiguous().view(torch.int32) + bits.to(torch.int32)).masked_fill_(x.isnan(), QUIET_NAN)
    return (up >> 16).to(torch.int16).view(torch.bfloat16)


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """(bf16 weight, int16 rest) of fp32 master weights; `join` gives them back bit for bit (any NaN as one NaN)."""
    word = master.contiguous().view(torch.int32).masked_fill(master.isnan(), QUIET_NAN)
    high = (word + 0x8000 >> 16).to(torch.int16)
    return high.view(torch.bfloat16), word.to(torch.int16)


def join(high: Tensor, low: Tensor) -> Tensor:
    """The fp32 master weights whose halves `split` returned."""
    return ((high.contiguous().view(torch.int16).to(torch.int32) << 16) + low.to(torch.int32)).view(torch.float32)
