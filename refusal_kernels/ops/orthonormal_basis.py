"""orthonormal_basis: an orthonormal basis of the span of given vectors."""

from __future__ import annotations

import torch
from torch import Tensor


def orthonormal_basis(vectors: Tensor, rtol: float = 1e-3) -> Tensor:
    """[n, m] columns -> [n, r] orthonormal: left singular vectors of singular values above rtol * the largest."""
    u, s, _ = torch.linalg.svd(vectors.to(torch.float32), full_matrices=False)
    return u[:, s > rtol * s[:1]].contiguous()
