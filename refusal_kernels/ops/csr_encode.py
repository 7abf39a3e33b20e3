"""batch_topk_encode and threshold_encode: encoders whose rows keep as many latents as they have, with gradients.

Both give the code in CSR form: values [nnz] and latents [nnz] row after row, each row by ascending latent, and offsets
[N + 1], so that row n owns the entries offsets[n] .. offsets[n + 1]. Ascending latents, not descending values: it is
the canonical order of CSR, which other sparse libraries expect and a decoder gathers best, and it needs no word on
ties.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import requested_backend
from ..checks import check_encoder, check_k, check_threshold, compute_dtype, matmul_dtype
from .library import apply, define, once, pick, without_autocast

Csr = tuple[Tensor, Tensor, Tensor]


def batch_topk_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: int,
    b_dec: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Csr:
    """The N k largest ReLU'd latents of a whole batch of N rows, k per row on average: BatchTopK.

    Equivalent to::

        codes = ((x - b_dec) @ W_enc.T + b_enc).relu().flatten()              # accumulated in fp32 (fp64 for fp64)
        best = torch.sort(codes, descending=True, stable=True).indices[: N * k]
        flat = best[codes[best].to(dtype) != 0].sort().values                 # n F + latent
        values, latents = codes[flat].to(dtype), flat % F
        offsets = torch.searchsorted(flat, torch.arange(N + 1) * F)

    So: exact; ties go to the lower row, then to the lower latent; entries of value 0 are left out, so there are fewer
    than N k where fewer are positive, and a row may have none; NaN ranks first, so it reaches the loss instead of
    hiding. Deterministic: same input, same bits. A row's code depends on its batch: for inference see
    `threshold_encode`.

    Extra memory beside the result: a constant workspace and, on the cpu back-end, 32 to 48 bytes for each of N k
    entries and thread and 80 more while the code is put together; on triton 24, and 100 more while the best are
    chosen. Never [N, F], except on the reference back-end, which is dense.

    Args:
        x: [..., d], any strides, fp32, bf16, fp16 (fp64 on the reference and CPU back-ends); may be empty. All leading
            dimensions together are the batch: N is their product.
        W_enc: [F, d]. Mixed dtypes of x and W_enc are promoted; under autocast both take the autocast dtype.
        b_enc: [F].
        k: 1 <= k <= F, an integer.
        b_dec: [d] or None, subtracted from x.
        backend: "reference", "cpu", "triton", "cuda", "triton-int8", "auto", or None for the `use_backend` /
            environment choice.

    Returns:
        values [nnz] in the (promoted) dtype of x and W_enc, latents [nnz] int64, ascending within a row, and offsets
        [N + 1] int64. values are differentiable in x, W_enc, b_enc and b_dec.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or range; the message names it.
        BackendError: an explicitly requested back-end cannot run this.
        NotImplementedError: under the transforms of torch.func (grad, vmap, ...).

    Source: Bussmann et al., arXiv 2412.06410, section 3.
    """
    n_latents, d = check_encoder("batch_topk_encode", x, W_enc, b_enc, b_dec)
    k = check_k("batch_topk_encode", k, n_latents)
    dtype = matmul_dtype(x.device.type, x.dtype, W_enc.dtype)
    rows = x.reshape(-1, d).to(dtype)
    backend = requested_backend(backend)  # settled here for the backward pass too
    return apply("batch_topk_encode", _CsrEncode, rows, W_enc.to(dtype), b_enc, b_dec, k, None, backend)


def threshold_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: float | Tensor,
    b_dec: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Csr:
    """The latents whose pre-activation exceeds a threshold: JumpReLU, as used for inference.

    Equivalent to::

        pre = ((x - b_dec) @ W_enc.T + b_enc).reshape(-1, F)                  # accumulated in fp32 (fp64 for fp64)
        keep = (pre > threshold) & (pre.to(dtype) > 0) | pre.isnan()
        n, latents = keep.nonzero(as_tuple=True)
        values, offsets = pre[keep].to(dtype), torch.cat([zeros(1), keep.sum(1).cumsum(0)])

    So: strictly above, and the value is the pre-activation itself; positive as well, whatever the threshold, as ReLU
    before the jump has it in SAELens and dictionary_learning; a NaN is kept, so it reaches the loss instead of hiding.
    Rows may be empty. Deterministic: same input, same bits.

    No gradient leads to the threshold, as from the comparison above: the derivative is 0 almost everywhere, and the
    straight-through estimators that train thresholds belong to the training that chooses one.

    Extra memory beside the result: a constant workspace and about 70 bytes per entry of the result. Never [N, F],
    except on the reference back-end, which is dense.

    Args:
        x: [..., d], any strides, fp32, bf16, fp16 (fp64 on the reference and CPU back-ends); may be empty.
        W_enc: [F, d]. Mixed dtypes of x and W_enc are promoted; under autocast both take the autocast dtype.
        b_enc: [F].
        threshold: a number that is not NaN, or a tensor [] or [F]; compared in fp32 (fp64 for fp64). A latent whose
            threshold in a tensor is NaN keeps nothing but NaN.
        b_dec: [d] or None, subtracted from x.
        backend: "reference", "cpu", "triton", "cuda", "triton-int8", "auto", or None for the `use_backend` /
            environment choice.

    Returns:
        values [nnz] in the (promoted) dtype of x and W_enc, latents [nnz] int64, ascending within a row, and offsets
        [N + 1] int64, with N the product of the leading dimensions. values are differentiable in x, W_enc, b_enc and
        b_dec.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or range; the message names it.
        BackendError: an explicitly requested back-end cannot run this.
        NotImplementedError: under the transforms of torch.func (grad, vmap, ...).

    Source: Rajamanoharan et al., arXiv 2407.14435, section 3.
    """
    n_latents, d = check_encoder("threshold_encode", x, W_enc, b_enc, b_dec)
    dtype = matmul_dtype(x.device.type, x.dtype, W_enc.dtype)
    rows = x.reshape(-1, d).to(dtype)
    least = check_threshold("threshold_encode", threshold, n_latents, rows)
    backend = requested_backend(backend)  # settled here for the backward pass too
    return apply("threshold_encode", _CsrEncode, rows, W_enc.to(dtype), b_enc, b_dec, None, least, backend)


class _CsrEncode(torch.autograd.Function):
    """Of k and threshold one is given: which of them tells the operator."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        b_dec: Tensor | None,
        k: int | None,
        threshold: Tensor | None,
        backend: str | None,
    ) -> Csr:
        if threshold is None:
            values, latents, offsets = _batch_topk_encode(x, W_enc, b_enc, k, b_dec, backend)
        else:
            values, latents, offsets = _threshold_encode(x, W_enc, b_enc, threshold, b_dec, backend)
        ctx.save_for_backward(latents, offsets, x, W_enc, b_dec)
        ctx.mark_non_differentiable(latents, offsets)
        ctx.op = "batch_topk_encode" if threshold is None else "threshold_encode"
        ctx.b_enc_dtype, ctx.backend = b_enc.dtype, backend
        return values, latents, offsets

    @staticmethod
    @once
    def backward(ctx: Any, grad_values: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        latents, offsets, x, W_enc, b_dec = ctx.saved_tensors
        need_x, need_W, need_b_enc, need_b_dec = ctx.needs_input_grad[:4]
        dx, dW_enc, db_enc = _csr_encode_backward(
            grad_values, latents, offsets, x, W_enc, b_dec, need_x, need_W, ctx.op, ctx.backend
        )
        db_dec = None
        if need_b_dec:  # as in topk_encode: every row of x has b_dec subtracted
            db_dec = -torch.mv(W_enc.t(), db_enc.to(W_enc.dtype)).to(b_dec.dtype)
        return (
            dx if need_x else None,
            dW_enc if need_W else None,
            db_enc.to(ctx.b_enc_dtype) if need_b_enc else None,
            db_dec,
            None,
            None,
            None,
        )


def _batch_topk(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, b_dec: Tensor | None, backend: str | None) -> Csr:
    chosen = pick("batch_topk_encode", x, k, W_enc.shape[0], backend)
    with without_autocast(x.device.type):
        b_enc, b_dec = _biases(x, b_enc, b_dec)
        return chosen.batch_topk_encode(x.contiguous(), W_enc.contiguous(), b_enc, k, b_dec)  # type: ignore[attr-defined]


def _threshold(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, b_dec: Tensor | None, backend: str | None
) -> Csr:
    chosen = pick("threshold_encode", x, 0, W_enc.shape[0], backend)
    with without_autocast(x.device.type):
        b_enc, b_dec = _biases(x, b_enc, b_dec)
        least = threshold.to(compute_dtype(x.dtype)).contiguous()
        return chosen.threshold_encode(x.contiguous(), W_enc.contiguous(), b_enc, least, b_dec)  # type: ignore[attr-defined]


def _biases(x: Tensor, b_enc: Tensor, b_dec: Tensor | None) -> tuple[Tensor, Tensor | None]:
    ct = compute_dtype(x.dtype)
    return b_enc.to(ct).contiguous(), None if b_dec is None else b_dec.to(ct).contiguous()


def _backward(
    grad_values: Tensor,
    latents: Tensor,
    offsets: Tensor,
    x: Tensor,
    W_enc: Tensor,
    b_dec: Tensor | None,
    need_x: bool,
    need_W: bool,
    op: str,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    chosen = pick(op, x, 0, W_enc.shape[0], backend, f"{op}_backward")
    b_dec = None if b_dec is None else b_dec.to(compute_dtype(x.dtype)).contiguous()
    with without_autocast(x.device.type):
        dx, dW_enc, db_enc = chosen.csr_encode_backward(  # type: ignore[attr-defined]
            grad_values.to(x.dtype).contiguous(),
            latents.contiguous(),
            offsets.contiguous(),
            x.contiguous(),
            W_enc.contiguous(),
            b_dec,
            need_x,
            need_W,
        )
    # An operator's schema has no optional outputs: what was not asked for comes back empty.
    return x.new_empty(0) if dx is None else dx, x.new_empty(0) if dW_enc is None else dW_enc, db_enc


def _code_fake(x: Tensor) -> Csr:
    nnz = torch.library.get_ctx().new_dynamic_size()
    return (
        x.new_empty((nnz,)),
        x.new_empty((nnz,), dtype=torch.int64),
        x.new_empty((x.shape[0] + 1,), dtype=torch.int64),
    )


def _batch_topk_fake(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, b_dec: Tensor | None, backend: str | None) -> Csr:
    return _code_fake(x)


def _threshold_fake(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, b_dec: Tensor | None, backend: str | None
) -> Csr:
    return _code_fake(x)


def _backward_fake(
    grad_values: Tensor,
    latents: Tensor,
    offsets: Tensor,
    x: Tensor,
    W_enc: Tensor,
    b_dec: Tensor | None,
    need_x: bool,
    need_W: bool,
    op: str,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if need_x else (0,)),
        W_enc.new_empty(W_enc.shape if need_W else (0,), dtype=W_enc.dtype if need_W else x.dtype),
        x.new_empty((W_enc.shape[0],), dtype=compute_dtype(x.dtype)),
    )


_batch_topk_encode = define(
    "batch_topk_encode(Tensor x, Tensor W_enc, Tensor b_enc, SymInt k, Tensor? b_dec, str? backend) -> "
    "(Tensor, Tensor, Tensor)",
    _batch_topk,
    _batch_topk_fake,
)
_threshold_encode = define(
    "threshold_encode(Tensor x, Tensor W_enc, Tensor b_enc, Tensor threshold, Tensor? b_dec, str? backend) -> "
    "(Tensor, Tensor, Tensor)",
    _threshold,
    _threshold_fake,
)
_csr_encode_backward = define(
    "csr_encode_backward(Tensor grad_values, Tensor latents, Tensor offsets, Tensor x, Tensor W_enc, Tensor? b_dec, "
    "bool need_x, bool need_W, str op, str? backend) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
