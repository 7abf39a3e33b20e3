"""The backward passes of codes whose rows have different lengths: sparse_decode_csr_backward and csr_encode_backward.

    dvalues_i = <g_n, W_dec[l_i]>                         entry i of row n, of latent l_i
    dW_dec[f] = sum over entries i with l_i = f of  values_i g_n
    dW_enc[f] = sum of dvalues_i (x_n - b_dec),    db_enc[f] = sum of dvalues_i,    dx_n = sum_i dvalues_i W_enc[l_i]

Latent-major, as in backward.py: the weight gradients are rows.py over a stable CSC of the latents, in a fixed order,
without atomics; dx is a decode with other weights. The row of an entry comes from an array [nnz] int32 that is built
here. dvalues are entry-major: neighbouring entries mostly share g_n, which the first-level cache holds.

Bytes: dvalues and each weight gradient gather nnz d times the element size. Roofline prediction (nnz 2.1 M, d 4096, F
131072, bf16, H200): 17.2 GB and 3.5 to 4 ms each. Compiled for sm_80/90/100, checked in the interpreter, not run on a
GPU.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .backward import segment_length
from .csc import csc_from_indices, tokens_of
from .decode import sparse_decode_csr
from .launch import Configuration, Tiles, integers, on_device, pointers
from .rows import launch_rows


@triton.jit(do_not_specialize=["entries"])
def _entry_dots_kernel(
    g_ptr, latents_ptr, tokens_ptr, w_ptr, dvalues_ptr, entries, d, UNROLL: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """dvalues[i] = <g[tokens_i], W[latents_i]> for UNROLL neighbouring entries, any d."""
    entry = tl.program_id(0).to(tl.int64) * UNROLL + tl.arange(0, UNROLL)
    used = entry < entries
    token = tl.load(tokens_ptr + entry, mask=used, other=0).to(tl.int64)
    latent = tl.load(latents_ptr + entry, mask=used, other=0)
    total = tl.zeros([UNROLL, BLOCK_D], dtype=tl.float32)
    for start in range(0, d, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        inside = used[:, None] & (column < d)[None, :]
        g = tl.load(g_ptr + token[:, None] * d + column[None, :], mask=inside, other=0.0).to(tl.float32)
        w = tl.load(w_ptr + latent[:, None] * d + column[None, :], mask=inside, other=0.0).to(tl.float32)
        total += g * w
    tl.store(dvalues_ptr + entry, tl.sum(total, axis=1).to(dvalues_ptr.dtype.element_ty), mask=used)


_DOTS = Tiles({"UNROLL": 8, "BLOCK_D": 512}, num_warps=4)


def sparse_decode_csr_backward(
    grad: Tensor,
    values: Tensor,
    latents: Tensor,
    offsets: Tensor,
    W_dec: Tensor,
    need_values: bool,
    need_W: bool,
    *,
    segment: int | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """(dvalues [nnz] in values' dtype or None, dW_dec [F, d] in W_dec's dtype or None); sums in fp32.

    grad [N, d]; values [nnz]; latents [nnz] and offsets [N + 1] int64; W_dec [F, d]. `segment` overrides the entries
    per segment of hot latents.

    Equivalent to: dvalues = (grad[row] * W_dec[latents]).sum(1); dW_dec = zeros_like(W_dec).index_add(0, latents,
    values[:, None] * grad[row]), with row = arange(N).repeat_interleave(offsets.diff()).
    """
    n_latents, d = W_dec.shape
    entries = latents.numel()
    dvalues = torch.empty_like(values) if need_values else None
    dW_dec = torch.empty_like(W_dec) if need_W else None
    with on_device(grad):
        tokens = tokens_of(offsets, entries)
        if dvalues is not None and entries:
            grid = (triton.cdiv(entries, _DOTS.constexprs["UNROLL"]),)
            _entry_dots_kernel[grid](grad, latents, tokens, W_dec, dvalues, entries, d, **_DOTS.options())
        if dW_dec is not None:
            csc = csc_from_indices(latents, n_latents, segment or segment_length(entries, d))
            launch_rows(grad, values, csc, None, 1.0, dW_dec, None, accumulate=False, tokens=tokens)
    return dvalues, dW_dec


def csr_encode_backward(
    grad_values: Tensor,
    latents: Tensor,
    offsets: Tensor,
    x: Tensor,
    W_enc: Tensor,
    b_dec: Tensor | None,
    need_x: bool,
    need_W: bool,
    *,
    segment: int | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """(dx [N, d] in x's dtype or None, dW_enc [F, d] in W_enc's dtype or None, db_enc [F] fp32); sums in fp32.

    grad_values [nnz]; latents [nnz] and offsets [N + 1] int64; x [N, d]; W_enc [F, d]; b_dec [d] fp32 or None.

    Equivalent to: topk_encode_backward (backward.py) without zeros among the values.
    """
    n_latents, d = W_enc.shape
    entries = latents.numel()
    dx = sparse_decode_csr(grad_values, latents, offsets, W_enc, None) if need_x else None
    dW_enc = torch.empty_like(W_enc) if need_W else None
    db_enc = torch.empty(n_latents, dtype=torch.float32, device=x.device)
    with on_device(x):
        csc = csc_from_indices(latents, n_latents, segment or segment_length(entries, d))
        # One form of the kernel for both: subtracting zeros is cheaper than compiling another.
        shift = torch.zeros(d, dtype=torch.float32, device=x.device) if b_dec is None else b_dec
        rows = x if need_W else None
        tokens = tokens_of(offsets, entries)
        launch_rows(rows, grad_values, csc, shift, 1.0, dW_enc, db_enc, accumulate=False, tokens=tokens)
    return dx, dW_enc, db_enc


def configurations() -> Iterator[Configuration]:
    """The kernel of this file in every dtype; the others are those of backward.py and decode.py."""
    for name in ("bf16", "fp16", "fp32"):
        yield Configuration(
            _entry_dots_kernel,
            f"backward_csr.dots[{name}]",
            {
                **pointers(name, "g", "w", "dvalues"),
                **pointers("i64", "latents"),
                **pointers("i32", "tokens"),
                **integers("entries", "d"),
            },
            _DOTS,
            ("d",),
            variant=name != "bf16",
        )
