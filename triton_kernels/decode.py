"""sparse_decode, sparse_decode_csr, decode_residual: the weighted sum of rows of W_dec per token, with bias, residual
and loss in the pass.

    x_hat_n = sum_j values_nj W_dec[indices_nj] + b_dec      (CSR: over the entries offsets[n] .. offsets[n + 1])
    e_n = x_hat_n - x_n,  sq_n = ||e_n||^2                (decode_residual)

One program computes BLOCK_D columns of one token: UNROLL rows of W_dec are in flight at once, each slot keeps its own
fp32 sum, and the slots are added at the end, in a fixed order. The token is the fast grid axis and the block of
columns the slow one, so that while a slice of W_dec is in use (F x BLOCK_D elements) it can stay in L2. The residual
goes to memory once and x_hat not at all; the squared norm of each slice is stored apart and the slices are added in
order: deterministic, no atomics.

Heads: values and indices [H, N, k], W_dec [H, F, d], b_dec [H, d] are H N tokens of one launch; a token finds its
head's matrix by dividing its number by N.

Bytes: N k d gathered from W_dec + N d read (x) + N d written, times the element size; 2 N k d flop (0.5 to 1 flop per
byte). Roofline prediction (N 32768, d 4096, k 64, bf16, H200): 17.2 GB + 0.5 GB, 3.3 to 4.0 ms, depending on how much
L2 absorbs. Measured: 2.39 ms with the residual; L2 absorbs more than predicted, because the grid's slow axis is narrow.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import ABSENT, Configuration, Tiles, integers, next_power_of_2, on_device, pointers


@triton.jit(do_not_specialize=["rows", "n_latents"])
def _decode_kernel(
    values_ptr, indices_ptr, offsets_ptr, w_ptr, bias_ptr, x_ptr, out_ptr, sq_ptr, k, d, rows, n_latents,
    HEADS: tl.constexpr, CSR: tl.constexpr, HAS_BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    BLOCK_D: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """`rows` tokens and `n_latents` rows of W per head are read with HEADS only."""
    token = tl.program_id(0).to(tl.int64)
    if HEADS:
        head = (tl.program_id(0) // rows).to(tl.int64)
        w_ptr += head * n_latents * d
        bias_ptr += head * d
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    live = column < d
    slot = tl.arange(0, UNROLL)
    begin = token * k
    entries = k
    if CSR:
        begin = tl.load(offsets_ptr + token)
        entries = (tl.load(offsets_ptr + token + 1) - begin).to(tl.int32)
    values_ptr += begin
    indices_ptr += begin
    sums = tl.zeros([UNROLL, BLOCK_D], dtype=tl.float32)
    for start in range(0, entries, UNROLL):
        used = start + slot < entries
        latent = tl.load(indices_ptr + start + slot, mask=used, other=0).to(tl.int64)
        value = tl.load(values_ptr + start + slot, mask=used, other=0.0).to(tl.float32)
        w = tl.load(w_ptr + latent[:, None] * d + column[None, :], mask=used[:, None] & live[None, :], other=0.0)
        sums += value[:, None] * w.to(tl.float32)
    total = tl.sum(sums, axis=0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + column, mask=live, other=0.0)
    if RESIDUAL:
        x = tl.load(x_ptr + token * d + column, mask=live, other=0.0)
        total = tl.where(live, total - x.to(tl.float32), 0.0)
        tl.store(sq_ptr + token * tl.num_programs(1) + tl.program_id(1), tl.sum(total * total))
    tl.store(out_ptr + token * d + column, total.to(out_ptr.dtype.element_ty), mask=live)


# (BLOCK_D, UNROLL, warps). One warp and 256 columns at any d: a slice of W_dec that narrow stays in L2.
_BLOCKS = ((128, 8, 1), (256, 4, 1))


# What a configuration of the kernel does beyond the plain sum.
_FORMS = {"": {}, "+residual": {"RESIDUAL": True}, "+csr": {"CSR": True}, "+heads": {"HEADS": True}}
_FORMS["+heads+residual"] = {**_FORMS["+heads"], **_FORMS["+residual"]}


def _decode_tiles(block: tuple[int, int, int], has_bias: bool, form: str) -> Tiles:
    flags = {"HEADS": False, "CSR": False, "RESIDUAL": False, **_FORMS[form], "HAS_BIAS": has_bias}
    return Tiles({**flags, "BLOCK_D": block[0], "UNROLL": block[1]}, block[2])


def decode_tiles(d: int, has_bias: bool, form: str = "") -> Tiles:
    """The widest block that d fills; wider d takes several of the widest."""
    width = min(next_power_of_2(d), _BLOCKS[-1][0])
    return _decode_tiles(next(b for b in _BLOCKS if b[0] >= width), has_bias, form)


def _of_heads(indices: Tensor, W_dec: Tensor, b_dec: Tensor | None) -> tuple[Tensor, Tensor]:
    """Indices and bias in the one form that the kernel is compiled for with heads: int64, and zeros for no bias."""
    if b_dec is None:
        b_dec = torch.zeros(W_dec.shape[0], W_dec.shape[2], dtype=torch.float32, device=W_dec.device)
    return indices.to(torch.int64), b_dec


def sparse_decode(values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor | None) -> Tensor:
    """x_hat [N, d] in W_dec's dtype.

    values [N, k]; indices [N, k] int32 or int64 in [0, F); W_dec [F, d]; b_dec [d] fp32 or None; or all of them with a
    head axis in front.

    Equivalent to: (values[..., None] * W_dec[indices]).sum(1) + b_dec, accumulated in fp32.
    """
    *lead, k = values.shape
    n_latents, d = W_dec.shape[-2:]
    out = torch.empty(*lead, d, dtype=W_dec.dtype, device=W_dec.device)
    if out.numel() == 0:
        return out
    heads = W_dec.dim() == 3
    if heads:
        indices, b_dec = _of_heads(indices, W_dec, b_dec)
    tiles = decode_tiles(d, b_dec is not None, "+heads" if heads else "")
    grid = (out.numel() // d, triton.cdiv(d, tiles.constexprs["BLOCK_D"]))
    with on_device(W_dec):
        # Pointers that the flags leave unused are given some tensor of the right type.
        _decode_kernel[grid](
            values, indices, None, W_dec, b_dec, out, out, None, k, d, lead[-1], n_latents, **tiles.options()
        )
    return out


def sparse_decode_csr(values: Tensor, latents: Tensor, offsets: Tensor, W_dec: Tensor, b_dec: Tensor | None) -> Tensor:
    """x_hat [N, d] in W_dec's dtype.

    values [nnz]; latents [nnz] int64 in [0, F); offsets [N + 1] int64; W_dec [F, d]; b_dec [d] fp32 or None. A row's
    entries are added in their order by one program: the longest row decides when the last program ends.

    Equivalent to: the product of the CSR matrix (values, latents, offsets) and W_dec, + b_dec, accumulated in fp32.
    """
    n, (n_latents, d) = offsets.numel() - 1, W_dec.shape
    out = torch.empty(n, d, dtype=W_dec.dtype, device=W_dec.device)
    if n == 0:
        return out
    tiles = decode_tiles(d, b_dec is not None, "+csr")
    grid = (n, triton.cdiv(d, tiles.constexprs["BLOCK_D"]))
    with on_device(W_dec):
        _decode_kernel[grid](
            values, latents, offsets, W_dec, b_dec, out, out, None, 0, d, n, n_latents, **tiles.options()
        )
    return out


def decode_residual(
    x: Tensor, values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor | None
) -> tuple[Tensor, Tensor]:
    """e [N, d] = x_hat - x in x's dtype and ||e_n||^2 [N] fp32 (of e before it is rounded), in one pass; with a head
    axis in front of all tensors [H, N, d] and [H, N].

    Equivalent to: e = sparse_decode(values, indices, W_dec, b_dec) - x; (e, e.square().sum(1)), accumulated in fp32.
    """
    *lead, k = values.shape
    n_latents, d = W_dec.shape[-2:]
    heads = W_dec.dim() == 3
    if heads:
        indices, b_dec = _of_heads(indices, W_dec, b_dec)
    e = torch.empty_like(x)
    tiles = decode_tiles(d, b_dec is not None, "+heads+residual" if heads else "+residual")
    blocks = triton.cdiv(d, tiles.constexprs["BLOCK_D"])
    sq = torch.empty(*lead, blocks, dtype=torch.float32, device=x.device)
    if e.numel() > 0:
        with on_device(x):
            _decode_kernel[(e.numel() // d, blocks)](
                values, indices, None, W_dec, b_dec, x, e, sq, k, d, lead[-1], n_latents, **tiles.options()
            )
    return e, sq.sum(-1)


def configurations() -> Iterator[Configuration]:
    """The kernel at every width in every dtype: sparse_decode for either index type, decode_residual for the int64 of
    topk_encode and with the bias that a training step has, sparse_decode_csr for the int64 that every CSR code has
    here; the decodes with and without bias. With heads in the one form that `_of_heads` makes."""
    forms = [("i64", True, "+residual"), ("i64", True, "+csr"), ("i64", False, "+csr")]
    forms += [(index, has_bias, "") for index in ("i64", "i32") for has_bias in (True, False)]
    forms += [("i64", True, form) for form in ("+heads", "+heads+residual")]
    for name in ("bf16", "fp16", "fp32"):
        for block in _BLOCKS:
            for index, has_bias, form in forms:
                flags = ("+bias" if has_bias else "") + form
                main = block == _BLOCKS[-1] or (has_bias and form == "+residual")
                rare = form == "+csr" and not (has_bias and name == "bf16")
                yield Configuration(
                    _decode_kernel,
                    f"decode[{name},{index},{block[0]}{flags}]",
                    {
                        **pointers(name, "values", "w", "x", "out"),
                        **pointers(index, "indices"),
                        "offsets_ptr": "*i64" if form == "+csr" else ABSENT,
                        "bias_ptr": "*fp32" if has_bias else ABSENT,
                        "sq_ptr": "*fp32" if form.endswith("+residual") else ABSENT,
                        **integers("k", "d", "rows", "n_latents"),
                    },
                    _decode_tiles(block, has_bias, form),
                    ("k", "d"),
                    variant=not main or index == "i32" or rare or form.startswith("+heads"),
                )
