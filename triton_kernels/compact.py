"""Loads and stores of training state in fewer bytes: what refusal_kernels.compact says in PyTorch, inside the kernels.

A pointer to int16 is to bf16 numbers as words: moments, rounded stochastically when they are stored, or, where a second
pointer to int16 comes with it, the upper halves of fp32 master weights whose lower halves are there. Conversions are
integer arithmetic: the same bits from every compiler and in the interpreter, whose own casts to bf16 truncate.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def load_wide(ptr, low_ptr, at, live):
    """fp32 numbers at `ptr + at`, 0 where not `live`."""
    if ptr.dtype.element_ty == tl.int16:
        word = tl.load(ptr + at, mask=live, other=0).to(tl.int32) << 16
        if low_ptr is not None:
            word += tl.load(low_ptr + at, mask=live, other=0).to(tl.int32)
        return word.to(tl.float32, bitcast=True)
    else:
        return tl.load(ptr + at, mask=live, other=0.0).to(tl.float32)


@triton.jit
def store_weight(ptr, low_ptr, at, live, w):
    """fp32 numbers to `ptr + at`: in halves, rounded to nearest, or as they are."""
    if low_ptr is not None:
        word = tl.where(w == w, w.to(tl.int32, bitcast=True), 0x7FC00000)
        tl.store(ptr + at, (word + 0x8000 >> 16).to(tl.int16), mask=live)
        tl.store(low_ptr + at, word.to(tl.int16), mask=live)
    else:
        tl.store(ptr + at, w.to(ptr.dtype.element_ty), mask=live)


@triton.jit
def store_copy(ptr, at, live, w):
    """fp32 numbers rounded to nearest, ties to even, to `ptr + at`, as PyTorch's cast rounds them: bf16 numbers as
    their words."""
    if ptr.dtype.element_ty == tl.int16:
        word = w.to(tl.int32, bitcast=True)
        word = tl.where(w == w, word + 0x7FFF + (word >> 16 & 1), 0x7FC00000)
        tl.store(ptr + at, (word >> 16).to(tl.int16), mask=live)
    else:
        tl.store(ptr + at, w.to(ptr.dtype.element_ty), mask=live)


@triton.jit
def store_moment(ptr, at, live, m, bits):
    """fp32 numbers to `ptr + at`; to bf16 words away from zero where the lower half plus `bits`, int32 in [0, 2^16),
    carries."""
    if ptr.dtype.element_ty == tl.int16:
        word = tl.where(m == m, m.to(tl.int32, bitcast=True) + bits, 0x7FC00000)
        tl.store(ptr + at, (word >> 16).to(tl.int16), mask=live)
    else:
        tl.store(ptr + at, m.to(ptr.dtype.element_ty), mask=live)


@triton.jit
def random_words(ptr, at, salt):
    """32 bits for each element number `at` where moments are bf16 words, else nothing."""
    if ptr.dtype.element_ty == tl.int16:
        x = at.to(tl.uint32) ^ salt.to(tl.uint32)
        x = (x >> 16 ^ x) * 0x45D9F3B
        x = (x >> 16 ^ x) * 0x45D9F3B
        return x >> 16 ^ x
    else:
        return at.to(tl.uint32)


@triton.jit
def store_moments(m_ptr, v_ptr, at, live, m, v, salt):
    """Both moments; the lower 16 random bits of an element are the first one's, the upper the second's."""
    bits = random_words(m_ptr, at, salt)
    store_moment(m_ptr, at, live, m, (bits & 0xFFFF).to(tl.int32))
    store_moment(v_ptr, at, live, v, (bits >> 16).to(tl.int32))


@triton.jit
def upper_half(w):
    """fp32 master weights as the forward pass saw them: their bf16 halves."""
    return (w.to(tl.int32, bitcast=True) + 0x8000 & -65536).to(tl.float32, bitcast=True)


def words(numbers: Tensor) -> Tensor:
    """A moment or a copy as the kernels take it: bf16 numbers as their words."""
    return numbers.view(torch.int16) if numbers.dtype == torch.bfloat16 else numbers
