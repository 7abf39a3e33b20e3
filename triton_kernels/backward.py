"""The backward passes: sparse_decode_backward, topk_encode_backward, and sae_backward for the training step.

    dv_nj     = <g_n, W_dec[i_nj]>                        g = scale * e, or the incoming gradient
    dpre_nj   = dv_nj where values_nj != 0, else 0
    dW_dec[f] = sum over entries (n, j) with i_nj = f of  values_nj g_n
    dW_enc[f] = sum of dpre_nj (x_n - b_dec),    db_enc[f] = sum of dpre_nj

The weight gradients are latent-major: whoever owns a latent adds up its gradient rows alone, in a fixed order, without
atomics. latents.py does dv and the rows of both matrices in one pass, for rows that registers hold (d <= 8192); wider
rows, and gradients whose coefficients are already known, go through `_dvalues_kernel` (token-major) and rows.py, which
cut d.

Heads: all tensors may have a head axis in front; tokens and latents are then numbered through all heads, h N + n and
h F + f (csc.py), in the same launches. Sums have the bits of a loop over heads, except those of hot latents, whose
segments are as long as the entries of all heads together make them.

Bytes and roofline: latents.py for sae_backward and for sparse_decode_backward with both gradients (there N k d
gathered, half of sae_backward's), rows.py for dW alone; dv alone gathers N k d of W_dec, 2 N k d flop, 17.2 GB and 3.3
to 4 ms at the shape that they name.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .csc import csc_from_indices
from .decode import sparse_decode
from .latents import LATENT_BLOCKS, block_tiles, latent_kernel, launch_gradients
from .launch import ABSENT, Configuration, Tiles, device_scalar, integers, next_power_of_2, on_device, pointers
from .rows import ROWS_BLOCKS, combine_kernel, combine_tiles, launch_rows, rows_kernel, with_flags

_PARTIAL_BYTES = 64 << 20  # bound on the workspace of hot segments
_WIDEST_ROW = 8192  # a row that 16 warps hold in registers beside its gradients


@triton.jit
def _dvalues_kernel(
    g_ptr, indices_ptr, w_ptr, scale_ptr, dvalues_ptr, k, d, UNROLL: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """dvalues[n, j] = scale * <g_n, W[indices_nj]> for UNROLL neighbouring j of one token, any d."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.program_id(1) * UNROLL + tl.arange(0, UNROLL)
    used = slot < k
    latent = tl.load(indices_ptr + token * k + slot, mask=used, other=0).to(tl.int64)
    total = tl.zeros([UNROLL, BLOCK_D], dtype=tl.float32)
    for start in range(0, d, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        live = column < d
        g = tl.load(g_ptr + token * d + column, mask=live, other=0.0).to(tl.float32)
        w = tl.load(w_ptr + latent[:, None] * d + column[None, :], mask=used[:, None] & live[None, :], other=0.0)
        total += g[None, :] * w.to(tl.float32)
    dv = tl.sum(total, axis=1) * tl.load(scale_ptr)
    tl.store(dvalues_ptr + token * k + slot, dv.to(dvalues_ptr.dtype.element_ty), mask=used)


_DVALUES = Tiles({"UNROLL": 8, "BLOCK_D": 512}, num_warps=4)


def segment_length(entries: int, d: int) -> int:
    """Entries per segment: at least 256, and long enough that the partial rows of both matrices fit their workspace."""
    return max(256, next_power_of_2(-(-2 * entries * 2 * d * 4 // _PARTIAL_BYTES)))


def _launch_dvalues(g: Tensor, indices: Tensor, W: Tensor, scale: float | Tensor, dvalues: Tensor) -> None:
    *lead, k = indices.shape
    n = torch.Size(lead).numel()
    if W.dim() == 3:
        first = torch.arange(W.shape[0], device=W.device) * W.shape[1]
        indices = indices + first[:, None, None]
    if n:
        _dvalues_kernel[(n, triton.cdiv(k, _DVALUES.constexprs["UNROLL"]))](
            g, indices, W, device_scalar(scale, g.device), dvalues, k, W.shape[-1], **_DVALUES.options()
        )


def sparse_decode_backward(
    grad: Tensor,
    values: Tensor,
    indices: Tensor,
    W_dec: Tensor,
    need_values: bool,
    need_W: bool,
    *,
    segment: int | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """(dvalues [N, k] in values' dtype or None, dW_dec [F, d] in W_dec's dtype or None); sums in fp32.

    grad [N, d]; values, indices [N, k]; W_dec [F, d]. `segment` overrides the entries per segment of hot latents.

    Equivalent to: dvalues = (grad[:, None] * W_dec[indices]).sum(-1);
    dW_dec = zeros_like(W_dec).index_add(0, indices.flatten(), (values[..., None] * grad[:, None]).flatten(0, 1)).
    """
    n_latents, d = W_dec.shape[-2:]
    dvalues = torch.empty_like(values) if need_values else None
    dW_dec = torch.empty_like(W_dec) if need_W else None
    with on_device(grad):
        if dW_dec is None:
            if dvalues is not None:
                _launch_dvalues(grad, indices, W_dec, 1.0, dvalues)
            return dvalues, None
        csc = csc_from_indices(indices, n_latents, segment or segment_length(indices.numel(), d))
        if dvalues is not None and d <= _WIDEST_ROW:
            launch_gradients(grad, None, values, csc, W_dec, None, 1.0, dvalues, dW_dec, None, None, accumulate=False)
        else:
            if dvalues is not None:
                _launch_dvalues(grad, indices, W_dec, 1.0, dvalues)
            launch_rows(grad, values, csc, None, 1.0, dW_dec, None, accumulate=False)
    return dvalues, dW_dec


def topk_encode_backward(
    grad_values: Tensor,
    values: Tensor,
    indices: Tensor,
    x: Tensor,
    W_enc: Tensor,
    b_dec: Tensor | None,
    need_x: bool,
    need_W: bool,
    *,
    segment: int | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """(dx [N, d] in x's dtype or None, dW_enc [F, d] in W_enc's dtype or None, db_enc [F] fp32); sums in fp32.

    With dpre = where(values != 0, grad_values, 0): dx_n = sum_j dpre_nj W_enc[indices_nj], a decode with other weights;
    dW_enc[f] = sum of dpre (x_n - b_dec) and db_enc[f] = sum of dpre over the entries of latent f.
    """
    n_latents, d = W_enc.shape[-2:]
    dpre = torch.where(values != 0, grad_values, 0)
    dx = sparse_decode(dpre, indices, W_enc, None) if need_x else None
    dW_enc = torch.empty_like(W_enc) if need_W else None
    db_enc = torch.empty(W_enc.shape[:-1], dtype=torch.float32, device=x.device)
    with on_device(x):
        csc = csc_from_indices(indices, n_latents, segment or segment_length(indices.numel(), d))
        launch_rows(x if need_W else None, dpre, csc, b_dec, 1.0, dW_enc, db_enc, accumulate=False)
    return dx, dW_enc, db_enc


def sae_backward(
    e: Tensor,
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    W_enc: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None,
    scale: float | Tensor,
    dW_enc: Tensor,
    db_enc: Tensor,
    dW_dec: Tensor,
    *,
    accumulate: bool = True,
    segment: int | None = None,
) -> None:
    """Adds the gradients of scale/2 * sum_n ||e_n||^2 to dW_enc [F, d], db_enc [F], dW_dec [F, d] (fp32), in one pass.

    e = x_hat - x and x are [N, d]; values, indices [N, k]; `scale` a float or a 0-dim tensor on the device.
    `accumulate=False` overwrites the buffers, rows of unused latents with zeros, and saves reading them.
    """
    n_latents, d = W_dec.shape[-2:]
    if values.numel() == 0:
        if not accumulate:
            for buffer in (dW_enc, db_enc, dW_dec):
                buffer.zero_()
        return
    with on_device(e):
        csc = csc_from_indices(indices, n_latents, segment or segment_length(indices.numel(), d))
        if d <= _WIDEST_ROW:
            launch_gradients(e, x, values, csc, W_dec, b_dec, scale, None, dW_dec, dW_enc, db_enc, accumulate)
            return
        dpre = torch.empty(values.shape, dtype=torch.float32, device=e.device)
        _launch_dvalues(e, indices, W_dec, scale, dpre)
        dpre = torch.where(values != 0, dpre, 0)
        launch_rows(e, values, csc, None, scale, dW_dec, None, accumulate)
        launch_rows(x, dpre, csc, b_dec, 1.0, dW_enc, db_enc, accumulate)


def configurations() -> Iterator[Configuration]:
    """Every kernel of this file, latents.py and rows.py in every dtype that the three operators launch.

    `order` is int64 from N k = 2^31 on; that is compiled at the widest block of each form.
    """
    for name in ("bf16", "fp16", "fp32"):
        for order in ("i32", "i64"):
            yield from _latent_configurations(name, order)
            yield from _rows_configurations(name, order)
        for index, out in (("i64", name), ("i32", name), *([("i64", "fp32")] if name != "fp32" else [])):
            yield Configuration(
                _dvalues_kernel,
                f"backward.dvalues[{name},{index},{out}]",
                {
                    **pointers(name, "g", "w"),
                    **pointers(index, "indices"),
                    **pointers("fp32", "scale"),
                    **pointers(out, "dvalues"),
                    **integers("k", "d"),
                },
                _DVALUES,
                ("k", "d"),
                variant=(index, out) != ("i64", name),
            )
        for accumulate in (True, False) if name == "fp32" else (False,):
            yield Configuration(
                combine_kernel,
                f"backward.combine[{name},{'+=' if accumulate else '='}]",
                {
                    **pointers("fp32", "part"),
                    **pointers(name, "out"),
                    **pointers("i64", "offsets", "ends", "segment_latent"),
                    **integers("d", "n_latents", "segment"),
                },
                combine_tiles(accumulate),
                ("d",),
                variant=not accumulate,
            )


def _csc_signature(order: str) -> dict[str, str]:
    return {
        **pointers(order, "order"),
        **pointers("i64", "offsets", "ends", "segment_latent"),
        **integers("k", "d", "n_latents", "segments", "segment", "head_latents"),
    }


def _latent_configurations(name: str, order: str) -> Iterator[Configuration]:
    step = {"ENCODER": True, "DVALUES": False, "HAS_BIAS": True, "ACCUMULATE": True}
    store = {**step, "ACCUMULATE": False}
    decoder = {"ENCODER": False, "DVALUES": True, "HAS_BIAS": False, "ACCUMULATE": False}
    # Form: flags, dtypes of the weights and of the gradients, and the widths at which an operator launches it.
    forms: dict[str, tuple[dict[str, bool], str, str, tuple[tuple[int, int, int, int], ...]]] = {
        "+=": (step, name, "fp32", LATENT_BLOCKS),
        "=": (store, name, "fp32", LATENT_BLOCKS),
        "decoder": (decoder, name, name, LATENT_BLOCKS),
    }
    if name != "fp32":  # with fp32 rows the parts of hot latents are those of "="
        forms["parts"] = (store, name, name, LATENT_BLOCKS[:-1])
        forms["parts at fp32 weights"] = (store, "fp32", name, LATENT_BLOCKS[:-1])
    for form, (flags, weights, gradient, blocks) in forms.items():
        encoder = flags["ENCODER"]
        for block in blocks if order == "i32" else blocks[-1:]:
            main = form == "+=" or (not form.startswith("parts") and block == LATENT_BLOCKS[-2])
            yield Configuration(
                latent_kernel,
                f"backward.latent[{name},{order},{block[0]},{form}]",
                {
                    **_csc_signature(order),
                    **pointers(name, "e", "values"),
                    "x_ptr": f"*{name}" if encoder else ABSENT,
                    "dvalues_ptr": ABSENT if encoder else f"*{name}",
                    "b_dec_ptr": "*fp32" if encoder else ABSENT,
                    **pointers(weights, "w"),
                    **pointers("fp32", "scale", "part_dec", "part_enc", "part_db"),
                    **pointers(gradient, "dw_dec"),
                    **dict.fromkeys(("dw_enc_ptr", "db_ptr"), f"*{gradient}" if encoder else ABSENT),
                },
                block_tiles(block, **flags),
                ("k", "d"),
                variant=not main or order == "i64",
            )


def _rows_configurations(name: str, order: str) -> Iterator[Configuration]:
    # Form: dtypes of the coefficients and of the sum, (ROWS, HAS_BIAS, SUM, ACCUMULATE), widths.
    forms = {
        "encoder": (name, name, (True, True, True, False), ROWS_BLOCKS),
        "csr encoder": (name, name, (True, True, True, False), ROWS_BLOCKS),
        "csr decoder": (name, name, (True, False, False, False), ROWS_BLOCKS),
        "encoder-bias": (name, name, (True, False, True, False), ROWS_BLOCKS),
        "decoder": (name, name, (True, False, False, False), ROWS_BLOCKS),
        "wide decoder +=": (name, "fp32", (True, False, False, True), ROWS_BLOCKS[-1:]),
        "wide encoder +=": ("fp32", "fp32", (True, True, True, True), ROWS_BLOCKS[-1:]),
        "b_enc": (name, name, (False, True, True, False), ROWS_BLOCKS[:1]),
        "b_enc-bias": (name, name, (False, False, True, False), ROWS_BLOCKS[:1]),
        "csr b_enc": (name, name, (False, True, True, False), ROWS_BLOCKS[:1]),
    }
    if name != "fp32":  # else these are "decoder" and "encoder"
        forms["wide decoder ="] = (name, "fp32", (True, False, False, False), ROWS_BLOCKS[-1:])
        forms["wide encoder ="] = ("fp32", "fp32", (True, True, True, False), ROWS_BLOCKS[-1:])
    for form, (coefficient, out, flags, blocks) in forms.items():
        rows, has_bias, total, _ = flags
        csr = form.startswith("csr")
        for block in blocks if order == "i32" else blocks[-1:]:
            yield Configuration(
                rows_kernel,
                f"backward.{'rows' if rows else 'sums'}[{name},{order},{block[0]},{form}]",
                {
                    **_csc_signature(order),
                    "rows_ptr": f"*{name}" if rows else ABSENT,
                    **pointers(coefficient, "coefficients"),
                    "out_ptr": f"*{out}" if rows else ABSENT,
                    "tokens_ptr": "*i32" if csr else ABSENT,
                    "b_dec_ptr": "*fp32" if has_bias else ABSENT,
                    "db_ptr": "*fp32" if total else ABSENT,
                    **pointers("fp32", "scale", "part", "part_db"),
                },
                with_flags(
                    block,
                    CSR=csr and rows,
                    **dict(zip(("ROWS", "HAS_BIAS", "SUM", "ACCUMULATE"), flags, strict=True)),
                ),
                ("k", "d"),
                variant=form != "encoder" or order == "i64",
            )
