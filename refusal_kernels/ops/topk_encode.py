"""topk_encode: encoder product, ReLU and exact top-k selection in one operator, with gradients to every float input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import requested_backend
from ..checks import check_encoder, check_k, compute_dtype, matmul_dtype
from .library import apply, define, once, pick, primitive_of, without_autocast


def topk_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: int,
    b_dec: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The k largest ReLU'd latents of each row: the encoder of a TopK sparse autoencoder, without an [N, F] buffer.

    Equivalent to::

        pre = (x - b_dec) @ W_enc.T + b_enc                                   # accumulated in fp32 (fp64 for fp64)
        values, indices = torch.sort(pre.relu(), descending=True, stable=True)
        values, indices = values[..., :k], indices[..., :k]

    So: exact; value descending; ties go to the lower index; a row with fewer than k positives is filled up with value
    0 and the lowest unused indices (always k distinct valid indices); NaN ranks first, so it reaches the loss instead
    of hiding. No gradient passes through a value of 0. Deterministic: same input, same bits.

    With a head axis, which is there if and only if W_enc has three dimensions, H autoencoders in one call, equivalent
    to::

        values, indices = map(torch.stack, zip(*(topk_encode(x[h], W_enc[h], b_enc[h], k, b_dec[h]) for h in range(H))))

    Args:
        x: [..., d], any strides, fp32, bf16, fp16 (fp64 on the reference and CPU back-ends); may be empty;
            [H, ..., d] with a head axis.
        W_enc: [F, d], or [H, F, d]. Mixed dtypes of x and W_enc are promoted; under autocast both take the autocast
            dtype.
        b_enc: [F], or [H, F].
        k: 1 <= k <= F.
        b_dec: [d], or [H, d], or None, subtracted from x.
        backend: "reference", "cpu", "triton", "cuda", "triton-int8", "auto", or None for the `use_backend` /
            environment choice.

    Returns:
        values [..., k] in the (promoted) dtype of x and W_enc, and indices [..., k] int64, with a head axis [H, ..., k]
        and within the head, 0 to F - 1.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or range; the message names it.
        BackendError: an explicitly requested back-end cannot run this.
        NotImplementedError: under the transforms of torch.func (grad, vmap, ...).

    Source: Gao et al., arXiv 2406.04093, equation 3 (TopK after ReLU).
    """
    n_latents, d = check_encoder("topk_encode", x, W_enc, b_enc, b_dec, heads=True)
    k = check_k("topk_encode", k, n_latents, meaning=f"F = W_enc.shape[{W_enc.dim() - 2}]")
    dtype = matmul_dtype(x.device.type, x.dtype, W_enc.dtype)
    # Settled here so that the backward pass, which may run outside a `use_backend` block, takes the same back-end.
    backend = requested_backend(backend)
    rows = x.reshape(*W_enc.shape[:-2], -1, d).to(dtype)
    values, indices = apply("topk_encode", _TopKEncode, rows, W_enc.to(dtype), b_enc, b_dec, k, backend)
    return values.reshape(*x.shape[:-1], k), indices.reshape(*x.shape[:-1], k)


class _TopKEncode(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None, k: int, backend: str | None
    ) -> tuple[Tensor, Tensor]:
        values, indices = _topk_encode(x, W_enc, b_enc, k, b_dec, backend)
        ctx.save_for_backward(values, indices, x, W_enc, b_dec)
        ctx.mark_non_differentiable(indices)
        ctx.b_enc_dtype, ctx.backend = b_enc.dtype, backend
        return values, indices

    @staticmethod
    @once
    def backward(ctx: Any, grad_values: Tensor, _grad_indices: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        values, indices, x, W_enc, b_dec = ctx.saved_tensors
        need_x, need_W, need_b_enc, need_b_dec = ctx.needs_input_grad[:4]
        dx, dW_enc, db_enc = _topk_encode_backward(
            grad_values, values, indices, x, W_enc, b_dec, need_x, need_W, ctx.backend
        )
        db_dec = None
        if need_b_dec:
            # Every row of x has b_dec subtracted, so db_dec = -sum_n dx_n = -(sum_n dpre_n) W_enc: one product with
            # [F].
            db = db_enc.to(W_enc.dtype)
            through = torch.mv(W_enc.t(), db) if W_enc.dim() == 2 else torch.bmm(db[:, None], W_enc)[:, 0]
            db_dec = -through.to(b_dec.dtype)
        return (
            dx if need_x else None,
            dW_enc if need_W else None,
            db_enc.to(ctx.b_enc_dtype) if need_b_enc else None,
            db_dec,
            None,
            None,
        )


def _forward(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, b_dec: Tensor | None, backend: str | None
) -> tuple[Tensor, Tensor]:
    chosen = pick("topk_encode", x, k, W_enc.shape[-2], backend)
    ct = compute_dtype(x.dtype)
    b_dec = None if b_dec is None else b_dec.to(ct).contiguous()
    with without_autocast(x.device.type):
        encode = primitive_of(chosen, "topk_encode", W_enc)
        return encode(x.contiguous(), W_enc.contiguous(), b_enc.to(ct).contiguous(), k, b_dec)


def _backward(
    grad_values: Tensor,
    values: Tensor,
    indices: Tensor,
    x: Tensor,
    W_enc: Tensor,
    b_dec: Tensor | None,
    need_x: bool,
    need_W: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    chosen = pick("topk_encode", x, values.shape[-1], W_enc.shape[-2], backend, "topk_encode_backward")
    b_dec = None if b_dec is None else b_dec.to(compute_dtype(x.dtype)).contiguous()
    with without_autocast(x.device.type):
        dx, dW_enc, db_enc = primitive_of(chosen, "topk_encode_backward", W_enc)(
            grad_values.to(values.dtype).contiguous(),
            values.contiguous(),
            indices.contiguous(),
            x.contiguous(),
            W_enc.contiguous(),
            b_dec,
            need_x,
            need_W,
        )
    # An operator's schema has no optional outputs: what was not asked for comes back empty.
    return dx if need_x else x.new_empty(0), dW_enc if need_W else x.new_empty(0), db_enc


def _forward_fake(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, b_dec: Tensor | None, backend: str | None
) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:-1], k)
    return x.new_empty(shape), x.new_empty(shape, dtype=torch.int64)


def _backward_fake(
    grad_values: Tensor,
    values: Tensor,
    indices: Tensor,
    x: Tensor,
    W_enc: Tensor,
    b_dec: Tensor | None,
    need_x: bool,
    need_W: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if need_x else (0,)),
        W_enc.new_empty(W_enc.shape if need_W else (0,), dtype=x.dtype if not need_W else W_enc.dtype),
        x.new_empty(W_enc.shape[:-1], dtype=compute_dtype(x.dtype)),
    )


_topk_encode = define(
    "topk_encode(Tensor x, Tensor W_enc, Tensor b_enc, SymInt k, Tensor? b_dec, str? backend) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
)
_topk_encode_backward = define(
    "topk_encode_backward(Tensor grad_values, Tensor values, Tensor indices, Tensor x, Tensor W_enc, Tensor? b_dec, "
    "bool need_x, bool need_W, str? backend) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
