"""Every primitive in plain PyTorch: what the kernels compute, on any device and in any float dtype.

This is the oracle of the tests and the back-end of last resort: each function is the equation it stands for. The
encoder is dense on purpose, with the [N, F] pre-activations that the kernels exist to avoid. What comes after it sums
over the selected pairs (n, indices[n, j]) alone, as the kernels do: a product with the dense code matrix would carry
an infinity or NaN into every other row, because 0 * inf is NaN. Shapes: x [N, d], W_enc and W_dec [F, d], b_enc [F],
b_dec [d], values and indices [N, k]. Sums are accumulated in fp32 (fp64 for fp64 inputs) and rounded once at the end.
A code whose rows have different lengths is in CSR form: values and latents [nnz], offsets [N + 1], and row n owns the
entries offsets[n] .. offsets[n + 1].

Source of the equations: Gao et al., "Scaling and evaluating sparse autoencoders", arXiv 2406.04093, sections 2 and A.2;
Bussmann et al., "BatchTopK sparse autoencoders", arXiv 2412.06410; Rajamanoharan et al., "Jumping ahead", arXiv
2407.14435 (JumpReLU).
The projection at the end takes tensors of any shape and strides.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import compute_dtype


def _gather(weights: Tensor, indices: Tensor, rows: Tensor) -> Tensor:
    """[N, d]: sum_j weights[n, j] rows[indices[n, j]], from rows [F, d]; one slot at a time, so no [N, k, d]."""
    ct = compute_dtype(rows.dtype)
    total = torch.zeros(indices.shape[0], rows.shape[1], dtype=ct, device=rows.device)
    for weight, index in zip(weights.to(ct).T, indices.T, strict=True):
        total += weight[:, None] * rows[index].to(ct)
    return total


def _scatter(weights: Tensor, indices: Tensor, rows: Tensor, n_latents: int, skip: Tensor | None = None) -> Tensor:
    """[F, d]: row f is the sum of weights[n, j] rows[n] over the pairs with indices[n, j] = f, from rows [N, d]; the
    transpose of `_gather`. Pairs where `skip` [N, k] is true do not count, whatever their row holds."""
    ct = compute_dtype(rows.dtype)
    total = torch.zeros(n_latents, rows.shape[1], dtype=ct, device=rows.device)
    for j, (weight, index) in enumerate(zip(weights.to(ct).T, indices.T, strict=True)):
        part = weight[:, None] * rows.to(ct)
        if skip is not None:
            part = part.masked_fill(skip[:, j, None], 0)
        if total.is_cuda:  # in a fixed order: index_add_ would use atomics there
            total.index_put_((index.long(),), part, accumulate=True)
        else:
            total.index_add_(0, index, part)
    return total


def _centred(x: Tensor, b_dec: Tensor | None) -> Tensor:
    x = x.to(compute_dtype(x.dtype))
    return x if b_dec is None else x - b_dec.to(x.dtype)


def _pre_activations(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None) -> Tensor:
    """[N, F] in the compute dtype."""
    ct = compute_dtype(x.dtype)
    return _centred(x, b_dec) @ W_enc.to(ct).T + b_enc.to(ct)


def topk_encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, b_dec: Tensor | None) -> tuple[Tensor, Tensor]:
    """values [N, k], indices [N, k] int64: the k largest of relu((x - b_dec) W_enc^T + b_enc), ties to the lower index.

    A stable descending sort is the whole contract: NaN sorts first, zeros (and -0) tie and so fill up with the lowest
    unused indices.
    """
    pre = _pre_activations(x, W_enc, b_enc, b_dec)
    ordered, order = torch.sort(torch.relu(pre), dim=1, descending=True, stable=True)
    return ordered[:, :k].to(x.dtype).contiguous(), order[:, :k].contiguous()


def topk_encode_backward(
    grad_values: Tensor,
    values: Tensor,
    indices: Tensor,
    x: Tensor,
    W_enc: Tensor,
    b_dec: Tensor | None,
    need_x: bool,
    need_W: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """(dx [N, d] or None, dW_enc [F, d] or None, db_enc [F]); no gradient passes through a value of exactly 0."""
    n_latents = W_enc.shape[0]
    zero = values == 0
    dpre = torch.where(zero, 0, grad_values)
    dx = _gather(dpre, indices, W_enc).to(x.dtype) if need_x else None
    dW_enc = _scatter(dpre, indices, _centred(x, b_dec), n_latents, zero).to(W_enc.dtype) if need_W else None
    return dx, dW_enc, _bias_gradient(dpre, indices, n_latents)


def _bias_gradient(dpre: Tensor, indices: Tensor, n_latents: int) -> Tensor:
    """db_enc [F]: dpre summed by latent."""
    ones = torch.ones(dpre.shape[0], 1, dtype=compute_dtype(dpre.dtype), device=dpre.device)
    return _scatter(dpre, indices, ones, n_latents).squeeze(1)


def sparse_decode(values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor | None) -> Tensor:
    """x_hat [N, d] = sum_j values_j W_dec[indices_j] + b_dec."""
    x_hat = _gather(values, indices, W_dec)
    return (x_hat if b_dec is None else x_hat + b_dec.to(x_hat.dtype)).to(W_dec.dtype)


def sparse_decode_backward(
    grad: Tensor, values: Tensor, indices: Tensor, W_dec: Tensor, need_values: bool, need_W: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(dvalues [N, k] = <grad_n, W_dec[indices_nj]> or None, dW_dec [F, d] = codes^T grad or None)."""
    ct = compute_dtype(W_dec.dtype)
    g = grad.to(ct)
    dvalues = torch.gather(g @ W_dec.to(ct).T, 1, indices.long()).to(values.dtype) if need_values else None
    dW_dec = _scatter(values, indices, g, W_dec.shape[0]).to(W_dec.dtype) if need_W else None
    return dvalues, dW_dec


_ENTRIES = 1 << 14  # of a CSR code, whose rows [d] are in memory at once


def rows_of(offsets: Tensor, entries: int) -> Tensor:
    """[nnz] int64: the row of every entry."""
    lengths = offsets[1:] - offsets[:-1]
    return torch.arange(lengths.numel(), device=offsets.device).repeat_interleave(lengths, output_size=entries)


def _sum_entries(weights: Tensor, sources: Tensor, targets: Tensor, rows: Tensor, n_targets: int) -> Tensor:
    """[n_targets, d]: row t is the sum of weights[i] rows[sources[i]] over the entries i with targets[i] = t."""
    ct = compute_dtype(rows.dtype)
    total = torch.zeros(n_targets, rows.shape[1], dtype=ct, device=rows.device)
    for weight, source, target in zip(*(t.split(_ENTRIES) for t in (weights, sources, targets)), strict=True):
        part = weight.to(ct)[:, None] * rows[source].to(ct)
        if total.is_cuda:  # in a fixed order: index_add_ would use atomics there
            total.index_put_((target,), part, accumulate=True)
        else:
            total.index_add_(0, target, part)
    return total


def _csr(pre: Tensor, flat: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The CSR code of pre [N, F] at the ascending positions `flat` = n F + latent."""
    n, n_latents = pre.shape
    starts = torch.arange(n + 1, device=pre.device) * n_latents
    return pre.flatten()[flat].to(dtype), flat % n_latents, torch.searchsorted(flat, starts)


def batch_topk_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, b_dec: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """values, latents [nnz], offsets [N + 1]: the N k largest of relu((x - b_dec) W_enc^T + b_enc) in the whole batch,
    ties to the lower position n F + latent, NaN first; those of value 0 (in x's dtype) are left out."""
    pre = _pre_activations(x, W_enc, b_enc, b_dec)
    order = torch.sort(torch.relu(pre).flatten(), descending=True, stable=True).indices[: x.shape[0] * k]
    best = pre.flatten()[order].to(x.dtype)
    return _csr(pre, order[(best > 0) | best.isnan()].sort().values, x.dtype)


def threshold_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, b_dec: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """values, latents [nnz], offsets [N + 1]: the pre-activations above both 0 (in x's dtype) and threshold [F], and
    every NaN."""
    pre = _pre_activations(x, W_enc, b_enc, b_dec)
    keep = (pre > threshold.to(pre.dtype)) & (pre.to(x.dtype) > 0) | pre.isnan()
    return _csr(pre, keep.flatten().nonzero().squeeze(1), x.dtype)


def csr_encode_backward(
    grad_values: Tensor,
    latents: Tensor,
    offsets: Tensor,
    x: Tensor,
    W_enc: Tensor,
    b_dec: Tensor | None,
    need_x: bool,
    need_W: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """(dx [N, d] or None, dW_enc [F, d] or None, db_enc [F]) of a code that an encoder gave: no value of it is 0."""
    n_latents, rows = W_enc.shape[0], rows_of(offsets, latents.numel())
    dx = _sum_entries(grad_values, latents, rows, W_enc, x.shape[0]).to(x.dtype) if need_x else None
    dW_enc = None
    if need_W:
        dW_enc = _sum_entries(grad_values, rows, latents, _centred(x, b_dec), n_latents).to(W_enc.dtype)
    one = torch.ones(1, 1, dtype=compute_dtype(x.dtype), device=x.device)
    db_enc = _sum_entries(grad_values, torch.zeros_like(latents), latents, one, n_latents).squeeze(1)
    return dx, dW_enc, db_enc


def sparse_decode_csr(values: Tensor, latents: Tensor, offsets: Tensor, W_dec: Tensor, b_dec: Tensor | None) -> Tensor:
    """x_hat [N, d]: the sum of values_i W_dec[latents_i] over the entries i of row n, + b_dec."""
    n = offsets.numel() - 1
    x_hat = _sum_entries(values, latents, rows_of(offsets, latents.numel()), W_dec, n)
    return (x_hat if b_dec is None else x_hat + b_dec.to(x_hat.dtype)).to(W_dec.dtype)


def sparse_decode_csr_backward(
    grad: Tensor,
    values: Tensor,
    latents: Tensor,
    offsets: Tensor,
    W_dec: Tensor,
    need_values: bool,
    need_W: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """(dvalues [nnz] = <grad_n, W_dec[latents_i]> or None, dW_dec [F, d] or None)."""
    ct = compute_dtype(W_dec.dtype)
    rows, g = rows_of(offsets, latents.numel()), grad.to(ct)
    dvalues = dW_dec = None
    if need_values:
        dvalues = torch.empty_like(values)
        for part, row, latent in zip(*(t.split(_ENTRIES) for t in (dvalues, rows, latents)), strict=True):
            part.copy_((g[row] * W_dec[latent].to(ct)).sum(1))
    if need_W:
        dW_dec = _sum_entries(values, rows, latents, g, W_dec.shape[0]).to(W_dec.dtype)
    return dvalues, dW_dec


def decode_residual(
    x: Tensor, values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(e [N, d] = x_hat - x, ||e_n||^2 [N] in the compute dtype)."""
    e = _gather(values, indices, W_dec) - _centred(x, b_dec)
    return e.to(x.dtype), e.square().sum(1)


def sae_backward(
    e: Tensor,
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    W_enc: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None,
    scale: float,
    dW_enc: Tensor,
    db_enc: Tensor,
    dW_dec: Tensor,
) -> None:
    """Adds the gradients of scale/2 * sum_n ||e_n||^2 with respect to W_enc, b_enc and W_dec to the given buffers."""
    n_latents = W_enc.shape[0]
    ct = compute_dtype(e.dtype)
    g = scale * e.to(ct)
    zero = values == 0  # did not fire: the pair only fills the row up
    dpre = torch.gather(g @ W_dec.to(ct).T, 1, indices.long()).masked_fill(zero, 0)
    dW_dec += _scatter(values, indices, g, n_latents, zero)
    dW_enc += _scatter(dpre, indices, _centred(x, b_dec), n_latents, zero)
    db_enc += _bias_gradient(dpre, indices, n_latents)


def adam_rows(
    W: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    bias_correction1: float,
    bias_correction2: float,
    grad_scale: Tensor | None,
    remove_parallel: bool,
    unit_norm: bool,
) -> None:
    """One step of torch.optim.Adam on the rows of W [F, d], in place; m and v are its exp_avg and exp_avg_sq.

    `remove_parallel` takes <g, w> w / ||w||^2 out of each row's gradient first; `unit_norm` divides each row by its
    norm afterwards. Rows of zero norm are left as they are by both. `grad_scale` is a 0-dim tensor (gradient clipping)
    or None.
    """
    g = g.to(m.dtype)
    if remove_parallel:
        w = W.to(m.dtype)
        squared_norm = w.square().sum(1, keepdim=True)
        g = g - torch.where(squared_norm > 0, (g * w).sum(1, keepdim=True) / squared_norm, 0) * w
    if grad_scale is not None:
        g = g * grad_scale.to(m.dtype)
    m.mul_(beta1).add_(g, alpha=1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    denominator = (v.sqrt() / bias_correction2**0.5).add_(eps)
    updated = W.to(m.dtype).addcdiv_(m, denominator, value=-lr / bias_correction1)
    if unit_norm:
        norm = updated.square().sum(1, keepdim=True).sqrt()
        updated = updated / torch.where(norm > 0, norm, 1)
    W.copy_(updated)


def coefficients(g: Tensor, dim: int, basis: Tensor) -> Tensor:
    """[..., r]: U^T g for each fibre of g along dim; basis [n, r] sets the dtype."""
    return g.movedim(dim, -1).to(basis.dtype) @ basis


def project_out(g: Tensor, dim: int, basis: Tensor, strength: float, against: Tensor | None) -> Tensor:
    """g - strength * (component of g along span(basis) in dimension dim), contiguous, in g's dtype.

    basis [n, r] in the compute dtype. `against` [r] is U^T v for a direction v, or None: with it, only fibres whose
    component has a negative inner product with v are changed.
    """
    c = coefficients(g, dim, basis)
    if against is not None:
        c = c.masked_fill(~(c @ against < 0).unsqueeze(-1), 0)
    component = (c @ basis.T).movedim(-1, dim)
    return (g.to(basis.dtype) - strength * component).to(g.dtype).contiguous()


def project_out_grouped(
    tensors: list[Tensor],
    dims: list[int],
    bases: list[Tensor],
    basis_of: list[int],
    against: list[Tensor],
    against_of: list[int],
    strength: float,
) -> None:
    """`project_out` of every tensor, in place: the i-th with bases[basis_of[i]] and against[against_of[i]], or without
    a direction where against_of[i] is -1."""
    for tensor, dim, b, a in zip(tensors, dims, basis_of, against_of, strict=True):
        tensor.copy_(project_out(tensor, dim, bases[b], strength, None if a < 0 else against[a]))
