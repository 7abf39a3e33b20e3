"""Checks of the projection operators' arguments; orthonormality is measured once per basis and version of it.

A projection onto span(U) is U U^T g only for orthonormal columns, and nothing about a wrong result would show: so a
basis is measured, and refused with the measured deviation. That costs 2 n r^2 flops and, on a GPU, a wait of the
host for one number, at the first call with a basis and after each in-place change of it; a tensor object that stays as
it is costs a dictionary look-up. Not measured: while a CUDA graph is being captured, where the host cannot wait.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..checks import FLOAT_DTYPES, check_number, check_same_device, check_shape, check_tensor, describe

# Columns rounded to a dtype of unit roundoff u deviate by at most 2 u sqrt(r); one that is meant to be orthonormal and
# computed in fp32 by less than this.
LEAST_TOLERANCE = 5e-4

# Basis -> its version when it was found orthonormal, and its address: `.data` can be replaced, which counts nothing.
# The numbers that were measured are held, so that no others can come to lie at their address.
_measured: WeakIdKeyDictionary = WeakIdKeyDictionary()


def check_strength(op: str, strength: Any) -> float:
    """`strength` as a float in [0, 1]."""
    return check_number(op, "strength", strength, "a number in [0, 1]", lambda v: 0 <= v <= 1)


def check_dim(op: str, name: str, dim: Any, tensor: Tensor) -> int:
    """`dim` as a non-negative int that counts a dimension of `tensor`."""
    if isinstance(dim, (bool, Tensor)) or not hasattr(dim, "__index__"):
        raise TypeError(f"{op}: {name} must be an integer; got {describe(dim)}")
    dim = operator.index(dim)
    if not -tensor.dim() <= dim < tensor.dim():
        raise ValueError(
            f"{op}: {name} must be in [{-tensor.dim()}, {tensor.dim() - 1}] for a tensor of shape "
            f"{tuple(tensor.shape)}; got {dim}"
        )
    return dim % tensor.dim()


def check_projection(op: str, g: Any, basis: Any, dim: Any, only_against: Any, prefix: str = "") -> int:
    """Checks g [..., n, ...], basis [n, r] and only_against [n] or None, but no values; returns dim as >= 0."""
    g_name = f"{prefix}tensor" if prefix else "g"
    check_tensor(op, g_name, g, FLOAT_DTYPES, min_dim=1)
    check_tensor(op, f"{prefix}basis", basis, FLOAT_DTYPES)
    dim = check_dim(op, f"{prefix}dim", dim, g)
    n = g.shape[dim]
    if basis.dim() != 2 or basis.shape[0] != n:
        raise ValueError(
            f"{op}: {prefix}basis must be a matrix [n, r] with n = {g_name}.shape[{dim}] = {n}; got {describe(basis)}"
        )
    if only_against is not None:
        check_tensor(op, f"{prefix}only_against", only_against, FLOAT_DTYPES)
        check_shape(op, f"{prefix}only_against", only_against, (n,), f"[{g_name}.shape[{dim}]]")
    tensors = {g_name: g, f"{prefix}basis": basis, f"{prefix}only_against": only_against}
    check_same_device(op, **tensors)
    return dim


def version(tensor: Tensor) -> int | None:
    """Counts the in-place changes of a tensor; None for one that does not count them (made in inference mode)."""
    return None if tensor.is_inference() else tensor._version


def tolerance(basis: Tensor) -> float:
    """The largest ||U^T U - I|| (Frobenius) of a basis [n, r] that counts as orthonormal: see LEAST_TOLERANCE."""
    return max(LEAST_TOLERANCE, 2 * torch.finfo(basis.dtype).eps) * math.sqrt(basis.shape[1])


@torch.no_grad()
def check_orthonormal(op: str, name: str, basis: Tensor) -> None:
    """Measures ||U^T U - I|| of basis [n, r] unless it was measured before; ValueError when it is too large, or NaN."""
    n, r = basis.shape
    if r == 0 or (basis.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    now = version(basis)
    if now is not None and _measured.get(basis, (None,))[:2] == (now, basis.data_ptr()):
        return
    if r > n:
        raise ValueError(f"{op}: {name} must have at most as many columns as rows; got {describe(basis)}")
    u = basis.detach().to(torch.float64 if basis.dtype == torch.float64 else torch.float32)
    with torch.autocast(basis.device.type, enabled=False):
        gram = u.T @ u
    gram.diagonal().sub_(1)
    deviation, allowed = torch.linalg.vector_norm(gram).item(), tolerance(basis)
    if not deviation <= allowed:  # also true for NaN
        raise ValueError(
            f"{op}: {name} must have orthonormal columns, ||U^T U - I|| <= {allowed:.2g}; got {deviation:.3g} for "
            f"{describe(basis)} (orthonormal_basis makes one of any vectors)"
        )
    if now is not None:
        _measured[basis] = now, basis.data_ptr(), basis.detach()
