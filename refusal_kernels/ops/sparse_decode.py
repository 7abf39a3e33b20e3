"""sparse_decode: the decoder of a sparse autoencoder from k values and indices per row, with gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import cpu_kernel, requested_backend
from ..checks import check_decoder, check_index_range, compute_dtype, matmul_dtype
from .library import apply, define, once, only_the_value_is_wanted, pick, primitive_of, without_autocast


def sparse_decode(
    values: Tensor,
    indices: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Weighted sum of k decoder rows per token, without a dense code.

    Equivalent to::

        x_hat = (values[..., None] * W_dec[indices]).sum(-2) + b_dec          # accumulated in fp32 (fp64 for fp64)

    With a head axis, which is there if and only if W_dec has three dimensions, H decoders in one call, equivalent to::

        x_hat = torch.stack([sparse_decode(values[h], indices[h], W_dec[h], b_dec[h]) for h in range(H)])

    Args:
        values: [..., k], any sign, fp32, bf16, fp16 (fp64 on the reference and CPU back-ends); may be empty;
            [H, ..., k] with a head axis.
        indices: shape of values, int64 or int32 in [0, F), with a head axis within the head; duplicates add up.
            Checked on the CPU; on a GPU, where a check would stop the stream, an index outside [0, F) is undefined
            behaviour.
        W_dec: [F, d], one row per latent, or [H, F, d]. Mixed dtypes of values and W_dec are promoted; under autocast
            both take the autocast dtype.
        b_dec: [d], or [H, d], or None.
        backend: "reference", "cpu", "triton", "cuda", "triton-int8", "auto", or None for the `use_backend` /
            environment choice.

    Returns:
        x_hat [..., d], with a head axis [H, ..., d], in the (promoted) dtype of values and W_dec. Differentiable in
        values, W_dec and b_dec.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or range; the message names it.
        BackendError: an explicitly requested back-end cannot run this.
        NotImplementedError: under the transforms of torch.func (grad, vmap, ...).

    Source: Gao et al., arXiv 2406.04093, section 2.1.
    """
    if only_the_value_is_wanted() and (x_hat := _at_once(values, indices, W_dec, b_dec, backend)) is not None:
        return x_hat
    _, d = check_decoder("sparse_decode", values, indices, W_dec, b_dec)
    dtype = matmul_dtype(values.device.type, values.dtype, W_dec.dtype)
    backend = requested_backend(backend)  # settled here for the backward pass too
    shape = values.shape[:-1]
    if values.dim() != W_dec.dim():
        heads = W_dec.shape[:-2]
        # reshape(-1, 0) could not tell the number of rows
        rows = *heads, shape[len(heads) :].numel(), values.shape[-1]
        values, indices = values.reshape(rows), indices.reshape(rows)
    x_hat = apply("sparse_decode", _SparseDecode, values.to(dtype), indices, W_dec.to(dtype), b_dec, backend)
    return x_hat if len(shape) == W_dec.dim() - 1 else x_hat.reshape(*shape, d)


def _at_once(
    values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor | None, backend: str | None
) -> Tensor | None:
    """The C++ kernel's answer for arguments that it takes as they are, or None for the long way.

    At d = 128 the kernel takes as long as the long way's Python, several times as long when caches are cold. The kernel
    checks every argument itself; what it refuses is refused once more, in this operator's words, on the long way.
    """
    try:
        if (
            values.dim() == 2
            and values.dtype == W_dec.dtype
            and values.is_cpu
            and indices.is_contiguous()
            and values.is_contiguous()
            and W_dec.is_contiguous()
            and (b_dec is None or (b_dec.dtype == compute_dtype(W_dec.dtype) and b_dec.is_contiguous()))
            and (kernel := cpu_kernel("sparse_decode", backend)) is not None
        ):
            return kernel(values, indices, W_dec, b_dec)
    except (AttributeError, RuntimeError):
        pass
    return None


class _SparseDecode(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor | None, backend: str | None
    ) -> Tensor:
        x_hat = _sparse_decode(values, indices, W_dec, b_dec, backend)
        ctx.save_for_backward(values, indices, W_dec)
        ctx.b_dec_dtype, ctx.backend = None if b_dec is None else b_dec.dtype, backend
        return x_hat

    @staticmethod
    @once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        values, indices, W_dec = ctx.saved_tensors
        need_values, _, need_W, need_b_dec = ctx.needs_input_grad[:4]
        dvalues = dW_dec = None
        if need_values or need_W:
            dvalues, dW_dec = _sparse_decode_backward(grad, values, indices, W_dec, need_values, need_W, ctx.backend)
        db_dec = grad.sum(-2, dtype=compute_dtype(grad.dtype)).to(ctx.b_dec_dtype) if need_b_dec else None
        return dvalues if need_values else None, None, dW_dec if need_W else None, db_dec, None


def _forward(values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor | None, backend: str | None) -> Tensor:
    chosen = pick("sparse_decode", W_dec, values.shape[-1], W_dec.shape[-2], backend)
    b_dec = None if b_dec is None else b_dec.to(compute_dtype(W_dec.dtype)).contiguous()
    if chosen.name != "cpu":
        check_index_range("sparse_decode", indices, W_dec)
    try:
        with without_autocast(W_dec.device.type):
            decode = primitive_of(chosen, "sparse_decode", W_dec)
            return decode(values.contiguous(), indices.contiguous(), W_dec.contiguous(), b_dec)
    except RuntimeError:
        # The C++ kernels look at the range themselves, and a second look would cost a tenth of a call at d = 128; only
        # their refusal is put in this operator's words.
        check_index_range("sparse_decode", indices, W_dec)
        raise


def _backward(
    grad: Tensor, values: Tensor, indices: Tensor, W_dec: Tensor, need_values: bool, need_W: bool, backend: str | None
) -> tuple[Tensor, Tensor]:
    chosen = pick("sparse_decode", W_dec, values.shape[-1], W_dec.shape[-2], backend, "sparse_decode_backward")
    with without_autocast(W_dec.device.type):
        dvalues, dW_dec = primitive_of(chosen, "sparse_decode_backward", W_dec)(
            grad.to(W_dec.dtype).contiguous(),
            values.contiguous(),
            indices.contiguous(),
            W_dec.contiguous(),
            need_values,
            need_W,
        )
    return dvalues if need_values else values.new_empty(0), dW_dec if need_W else W_dec.new_empty(0)


def _forward_fake(values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor | None, backend: str | None) -> Tensor:
    return W_dec.new_empty((*values.shape[:-1], W_dec.shape[-1]))


def _backward_fake(
    grad: Tensor, values: Tensor, indices: Tensor, W_dec: Tensor, need_values: bool, need_W: bool, backend: str | None
) -> tuple[Tensor, Tensor]:
    return (
        values.new_empty(values.shape if need_values else (0,)),
        W_dec.new_empty(W_dec.shape if need_W else (0,)),
    )


_sparse_decode = define(
    "sparse_decode(Tensor values, Tensor indices, Tensor W_dec, Tensor? b_dec, str? backend) -> Tensor",
    _forward,
    _forward_fake,
)
_sparse_decode_backward = define(
    "sparse_decode_backward(Tensor grad, Tensor values, Tensor indices, Tensor W_dec, bool need_values, bool need_W, "
    "str? backend) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)
