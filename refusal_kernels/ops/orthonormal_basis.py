"""orthonormal_basis: an orthonormal basis of the span of given vectors, near-duplicates dropped."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import FLOAT_DTYPES, check_number, check_tensor, compute_dtype, describe
from .library import without_autocast


@torch.no_grad()
def orthonormal_basis(vectors: Tensor, rtol: float = 1e-3) -> Tensor:
    """The directions that n-dimensional vectors span, strongest first.

    Equivalent to, up to the polish of the last bits and the signs::

        U, s, _ = torch.linalg.svd(vectors, full_matrices=False)
        U[:, s > rtol * s[0]]

    Vectors weigh by their length: normalise them first where each direction is to count alike. The sign of each column
    makes its entry of largest magnitude positive (the first of them on a tie), so the result does not depend on the
    signs that the decomposition happens to return. One Newton-Schulz step in fp64, U (3 I - U^T U) / 2, then brings
    the columns from the decomposition's error to one rounding of the result.

    Args:
        vectors: [n, m], one vector per column, fp32, bf16, fp16 or fp64, any strides.
        rtol: in [0, 1): a direction is kept when its singular value exceeds rtol times the largest one. Values below
            max(n, m) * eps, what rounding leaves of nothing, count as that.

    Returns:
        U [n, r] contiguous, r <= min(n, m), in fp32 (fp64 for fp64 vectors), without gradient. Without vectors
        (m = 0, n = 0) or with zeros alone there is no direction: r = 0.

    Raises:
        ValueError: vectors is not a matrix of floats or holds NaN or infinity; rtol is out of range.
        TypeError: vectors is not a tensor, rtol not a number.

    On a GPU the host waits for the result, whose width it has to know.
    """
    check_tensor("orthonormal_basis", "vectors", vectors, FLOAT_DTYPES)
    if vectors.device.type == "meta":
        raise ValueError(f"orthonormal_basis: vectors must hold data, as r follows from them; got {describe(vectors)}")
    if vectors.dim() != 2:
        raise ValueError(f"orthonormal_basis: vectors must be a matrix [n, m] of columns; got {describe(vectors)}")
    rtol = check_number("orthonormal_basis", "rtol", rtol, "a number in [0, 1)", lambda v: 0 <= v < 1)
    dtype = compute_dtype(vectors.dtype)
    if vectors.numel() == 0:
        return vectors.new_empty((vectors.shape[0], 0), dtype=dtype)
    largest = vectors.abs().max().item()  # NaN when there is one
    if not largest < float("inf"):
        raise ValueError(f"orthonormal_basis: vectors must be finite; got {describe(vectors)} with NaN or infinity")
    if largest == 0:
        return vectors.new_empty((vectors.shape[0], 0), dtype=dtype)
    with without_autocast(vectors.device.type):
        scaled = (vectors.detach().double() / largest).to(dtype)  # neither overflow nor subnormal numbers on the way
        left, values, _ = torch.linalg.svd(scaled, full_matrices=False)
        least = max(rtol, max(vectors.shape) * torch.finfo(dtype).eps)
        basis = left[:, values > least * values[0]].double()
        identity = torch.eye(basis.shape[1], dtype=basis.dtype, device=basis.device)
        basis = basis @ (3 * identity - basis.T @ basis) / 2
        strongest = basis.abs().argmax(0, keepdim=True)
        return (basis * basis.gather(0, strongest).sign()).to(dtype).contiguous()
