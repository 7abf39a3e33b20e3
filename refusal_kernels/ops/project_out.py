"""project_out: what is left of a tensor outside a subspace along one dimension; in place for many tensors at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def project_out(g: Tensor, basis: Tensor, dim: int, strength: float = 1.0, *, backend: str | None = None) -> Tensor:
    """g - strength * (component of g along span(basis) in dimension dim); basis [g.shape[dim], r] orthonormal."""
    moved = g.movedim(dim, -1).float()
    u = basis.float()
    return (moved - strength * (moved @ u) @ u.T).movedim(-1, dim).to(g.dtype)


class ProjectionPlan:
    """[(tensor, basis, dim), ...]; `apply_()` projects every tensor in place."""

    def __init__(
        self, entries: Sequence[tuple[Tensor, Tensor, int]], strength: float = 1.0, *, backend: str | None = None
    ) -> None:
        self.entries, self.strength = list(entries), strength

    @torch.no_grad()
    def apply_(self) -> None:
        for tensor, basis, dim in self.entries:
            tensor.copy_(project_out(tensor, basis, dim, self.strength))
