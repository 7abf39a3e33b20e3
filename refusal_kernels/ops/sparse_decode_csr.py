"""sparse_decode_csr: the decoder from a code whose rows have different lengths, with gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import requested_backend
from ..checks import check_csr_decoder, check_index_range, check_offsets, compute_dtype, matmul_dtype
from .library import apply, define, once, pick, without_autocast


def sparse_decode_csr(
    values: Tensor,
    latents: Tensor,
    offsets: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Weighted sum of as many decoder rows per token as its code has entries, without a dense code.

    Equivalent to::

        codes = torch.zeros(N, F)
        row = torch.arange(N).repeat_interleave(offsets.diff())
        codes.index_put_((row, latents), values, accumulate=True)
        x_hat = codes @ W_dec + b_dec                                         # accumulated in fp32 (fp64 for fp64)

    (but a weight that no entry of a row names cannot reach it, not even as 0 * inf). A row without entries is b_dec, or
    0. Deterministic: same input, same bits.

    Args:
        values: [nnz], any sign, fp32, bf16, fp16 (fp64 on the reference and CPU back-ends); may be empty.
        latents: [nnz] int64 or int32 in [0, F), in any order within a row; duplicates add up.
        offsets: [N + 1] int64 or int32: row n owns the entries offsets[n] .. offsets[n + 1]. Begins with 0, never
            falls, ends with nnz.
        W_dec: [F, d], one row per latent. Mixed dtypes of values and W_dec are promoted; under autocast both take the
            autocast dtype.
        b_dec: [d] or None.
        backend: "reference", "cpu", "triton", "cuda", "triton-int8", "auto", or None for the `use_backend` /
            environment choice.

    What latents and offsets hold is checked on the CPU; on a GPU, where a check would stop the stream, anything else
    than the above is undefined behaviour.

    Returns:
        x_hat [N, d] in the (promoted) dtype of values and W_dec. Differentiable in values, W_dec and b_dec.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or range; the message names it.
        BackendError: an explicitly requested back-end cannot run this.
        NotImplementedError: under the transforms of torch.func (grad, vmap, ...).
    """
    check_csr_decoder("sparse_decode_csr", values, latents, offsets, W_dec, b_dec)
    dtype = matmul_dtype(values.device.type, values.dtype, W_dec.dtype)
    backend = requested_backend(backend)  # settled here for the backward pass too
    latents, offsets = latents.long(), offsets.long()  # kernels know one type of index here: 12 bytes an entry at most
    return apply(
        "sparse_decode_csr", _SparseDecodeCsr, values.to(dtype), latents, offsets, W_dec.to(dtype), b_dec, backend
    )


class _SparseDecodeCsr(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        values: Tensor,
        latents: Tensor,
        offsets: Tensor,
        W_dec: Tensor,
        b_dec: Tensor | None,
        backend: str | None,
    ) -> Tensor:
        x_hat = _sparse_decode_csr(values, latents, offsets, W_dec, b_dec, backend)
        ctx.save_for_backward(values, latents, offsets, W_dec)
        ctx.b_dec_dtype, ctx.backend = None if b_dec is None else b_dec.dtype, backend
        return x_hat

    @staticmethod
    @once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        values, latents, offsets, W_dec = ctx.saved_tensors
        need_values, _, _, need_W, need_b_dec = ctx.needs_input_grad[:5]
        dvalues = dW_dec = None
        if need_values or need_W:
            dvalues, dW_dec = _sparse_decode_csr_backward(
                grad, values, latents, offsets, W_dec, need_values, need_W, ctx.backend
            )
        db_dec = grad.sum(0, dtype=compute_dtype(grad.dtype)).to(ctx.b_dec_dtype) if need_b_dec else None
        return dvalues if need_values else None, None, None, dW_dec if need_W else None, db_dec, None


def _forward(
    values: Tensor, latents: Tensor, offsets: Tensor, W_dec: Tensor, b_dec: Tensor | None, backend: str | None
) -> Tensor:
    chosen = pick("sparse_decode_csr", W_dec, 0, W_dec.shape[0], backend)
    b_dec = None if b_dec is None else b_dec.to(compute_dtype(W_dec.dtype)).contiguous()
    if chosen.name != "cpu":
        _check_code(values, latents, offsets, W_dec)
    try:
        with without_autocast(W_dec.device.type):
            return chosen.sparse_decode_csr(  # type: ignore[attr-defined]
                values.contiguous(), latents.contiguous(), offsets.contiguous(), W_dec.contiguous(), b_dec
            )
    except RuntimeError:
        _check_code(values, latents, offsets, W_dec)  # the C++ kernels have looked, and only their refusal is reworded
        raise


def _check_code(values: Tensor, latents: Tensor, offsets: Tensor, W_dec: Tensor) -> None:
    check_offsets("sparse_decode_csr", offsets, values.shape[0])
    check_index_range("sparse_decode_csr", latents, W_dec, "latents")


def _backward(
    grad: Tensor,
    values: Tensor,
    latents: Tensor,
    offsets: Tensor,
    W_dec: Tensor,
    need_values: bool,
    need_W: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    chosen = pick("sparse_decode_csr", W_dec, 0, W_dec.shape[0], backend, "sparse_decode_csr_backward")
    with without_autocast(W_dec.device.type):
        dvalues, dW_dec = chosen.sparse_decode_csr_backward(  # type: ignore[attr-defined]
            grad.to(W_dec.dtype).contiguous(),
            values.contiguous(),
            latents.contiguous(),
            offsets.contiguous(),
            W_dec.contiguous(),
            need_values,
            need_W,
        )
    return values.new_empty(0) if dvalues is None else dvalues, W_dec.new_empty(0) if dW_dec is None else dW_dec


def _forward_fake(
    values: Tensor, latents: Tensor, offsets: Tensor, W_dec: Tensor, b_dec: Tensor | None, backend: str | None
) -> Tensor:
    return W_dec.new_empty((offsets.shape[0] - 1, W_dec.shape[1]))


def _backward_fake(
    grad: Tensor,
    values: Tensor,
    latents: Tensor,
    offsets: Tensor,
    W_dec: Tensor,
    need_values: bool,
    need_W: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    return (
        values.new_empty(values.shape if need_values else (0,)),
        W_dec.new_empty(W_dec.shape if need_W else (0,)),
    )


_sparse_decode_csr = define(
    "sparse_decode_csr(Tensor values, Tensor latents, Tensor offsets, Tensor W_dec, Tensor? b_dec, str? backend) -> "
    "Tensor",
    _forward,
    _forward_fake,
)
_sparse_decode_csr_backward = define(
    "sparse_decode_csr_backward(Tensor grad, Tensor values, Tensor latents, Tensor offsets, Tensor W_dec, "
    "bool need_values, bool need_W, str? backend) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)
