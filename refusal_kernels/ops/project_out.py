"""project_out: what is left of a tensor outside a subspace along one of its dimensions, with gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import Backend, requested_backend, select
from ..backends.base import Request
from ..checks import compute_dtype
from ..reference import coefficients
from .basis_checks import check_orthonormal, check_projection, check_strength
from .library import apply, define, once, without_autocast


def project_out(
    g: Tensor,
    basis: Tensor,
    dim: int,
    strength: float = 1.0,
    *,
    only_against: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """g without (a share of) its component along span(basis) in dimension dim.

    Equivalent to, with U = basis and fibres along dim as columns::

        c = U.T @ g                                      # accumulated in fp32 (fp64 for fp64)
        if only_against is not None:
            c = c * (c.T @ (U.T @ only_against) < 0)     # per fibre: <U U^T g, only_against> < 0
        g - strength * U @ c                             # rounded once, to the dtype of g

    For a matrix G [out, in], dim=0 is G - s U (U^T G), dim=1 is G - s (G U) U^T. The sums keep their precision under
    autocast: what is projected out must not come back as rounding.

    Args:
        g: any shape of at least one dimension, any strides, fp32, bf16, fp16 (fp64 on the reference and CPU
            back-ends); may be empty.
        basis: U [n, r] with orthonormal columns, n = g.shape[dim], 0 <= r <= n, in any float dtype; used in fp32 (fp64
            for fp64 g). `orthonormal_basis` makes one. It is measured at the first call with this tensor and after each
            in-place change of it; on a GPU the host waits for that one number, except while a CUDA graph is captured,
            when nothing is measured.
        dim: the dimension of g in which the subspace lies; may be negative.
        strength: s in [0, 1]; 1 removes the component.
        only_against: a direction [n]. The component is then taken out only of those fibres along dim where it opposes
            this direction, its inner product with it being negative (SafeGrad, arXiv 2508.07172, projects conflicting
            gradients only); the others, and fibres with NaN, stay as they are. It gets no gradient.
        backend: "reference", "cpu", "triton", "cuda", "auto", or None for the `use_backend` / environment choice.

    Returns:
        A new contiguous tensor of g's shape and dtype. Differentiable in g and basis (once), the choice of fibres held
        fixed. Deterministic: the same bits for any number of threads.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or range, or basis is not orthonormal; the message
            names it and gives the measured ||U^T U - I||.
        TypeError: an argument is not of the kind described.
        BackendError: an explicitly requested back-end cannot run this.
        NotImplementedError: under the transforms of torch.func (grad, vmap, ...).
    """
    dim = check_projection("project_out", g, basis, dim, only_against)
    strength = check_strength("project_out", strength)
    backend = requested_backend(backend)  # settled here for the backward pass too
    return apply("project_out", _ProjectOut, g, dim, basis, strength, only_against, backend)


class _ProjectOut(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, g: Tensor, dim: int, basis: Tensor, strength: float, only_against: Tensor | None, backend: str | None
    ) -> Tensor:
        # The gradient in g needs g itself only to know which fibres were projected.
        need_g = ctx.needs_input_grad[2] or only_against is not None
        ctx.save_for_backward(g if need_g else None, basis, only_against)
        ctx.dim, ctx.strength, ctx.backend = dim, strength, backend
        return _project_out(g, dim, basis, strength, only_against, backend)

    @staticmethod
    @once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        g, basis, only_against = ctx.saved_tensors
        need_g, _, need_basis = ctx.needs_input_grad[:3]
        dg, dbasis = _project_out_backward(
            grad, g, ctx.dim, basis, ctx.strength, only_against, need_g, need_basis, ctx.backend
        )
        return dg if need_g else None, None, dbasis if need_basis else None, None, None, None


def pick_projection(tensor: Tensor, backend: str | None, record_as: str | None = None) -> Backend:
    """The back-end that projects a tensor of this device and dtype; `backend` as from `requested_backend`."""
    return select("project_out", Request(tensor.device.type, tensor.dtype), backend, record_as)


def against_coefficients(basis: Tensor, direction: Tensor) -> Tensor:
    """U^T v [r]: <U U^T g, v> is the inner product of U^T g with it. basis [n, r] in the compute dtype."""
    return direction.to(basis.dtype) @ basis


def _forward(
    g: Tensor, dim: int, basis: Tensor, strength: float, only_against: Tensor | None, backend: str | None
) -> Tensor:
    chosen = pick_projection(g, backend)
    check_orthonormal("project_out", "basis", basis)
    with without_autocast(g.device.type):
        u = basis.to(compute_dtype(g.dtype)).contiguous()
        against = None if only_against is None else against_coefficients(u, only_against)
        return chosen.project_out(g, dim, u, strength, against)  # type: ignore[attr-defined]


def _backward(
    grad: Tensor,
    g: Tensor | None,
    dim: int,
    basis: Tensor,
    strength: float,
    only_against: Tensor | None,
    need_g: bool,
    need_basis: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """With P = U U^T and M the choice of fibres, y = g - s P g M: dg = d - s P d M, as P is its own transpose, and
    dU = -s (d M c_g^T + g M c_d^T) from the coefficients c = U^T g and U^T d."""
    chosen = pick_projection(grad, backend, "project_out_backward")
    dg, dbasis = grad.new_empty(0), basis.new_empty(0)
    with without_autocast(grad.device.type):
        u = basis.to(compute_dtype(grad.dtype)).contiguous()
        chosen_fibres = None
        if only_against is not None:
            assert g is not None
            chosen_fibres = coefficients(g, dim, u) @ against_coefficients(u, only_against) < 0
        if need_g:
            dg = chosen.project_out(grad, dim, u, strength, None)  # type: ignore[attr-defined]
            if chosen_fibres is not None:
                dg = torch.where(chosen_fibres.unsqueeze(dim), dg, grad)
        if need_basis:
            assert g is not None
            of_g, of_grad = coefficients(g, dim, u), coefficients(grad, dim, u)
            if chosen_fibres is not None:
                of_g, of_grad = (c.masked_fill(~chosen_fibres.unsqueeze(-1), 0) for c in (of_g, of_grad))
            pairs = ((grad, of_g), (g, of_grad))
            terms = [_fibres(t, dim, u.dtype).T @ c.reshape(-1, u.shape[1]) for t, c in pairs]
            dbasis = ((terms[0] + terms[1]) * -strength).to(basis.dtype)
    return dg.contiguous(), dbasis


def _fibres(tensor: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """[fibres, n], the fibres of a tensor along dim."""
    moved = tensor.movedim(dim, -1).to(dtype)
    return moved.reshape(moved.shape[:-1].numel(), moved.shape[-1])


def _forward_fake(
    g: Tensor, dim: int, basis: Tensor, strength: float, only_against: Tensor | None, backend: str | None
) -> Tensor:
    return g.new_empty(g.shape)


def _backward_fake(
    grad: Tensor,
    g: Tensor | None,
    dim: int,
    basis: Tensor,
    strength: float,
    only_against: Tensor | None,
    need_g: bool,
    need_basis: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    return (
        grad.new_empty(grad.shape if need_g else (0,)),
        basis.new_empty(basis.shape if need_basis else (0,)),
    )


_project_out = define(
    "project_out(Tensor g, int dim, Tensor basis, float strength, Tensor? only_against, str? backend) -> Tensor",
    _forward,
    _forward_fake,
)
_project_out_backward = define(
    "project_out_backward(Tensor grad, Tensor? g, int dim, Tensor basis, float strength, Tensor? only_against, "
    "bool need_g, bool need_basis, str? backend) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)
