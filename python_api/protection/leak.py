"""Leak: which share of a weight update violates its constraint.

    rho = ||dW U||_F / ||dW||_F  (input side)        rho = ||U^T dW||_F / ||dW||_F  (output side)

0 where the promise holds, 1 where dW does nothing but break it; 0 for dW = 0. A leak of 0 is no proof of safety: other
layers may change what flows into U.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from .sites import Constraint, Side


@dataclass(frozen=True)
class Leak:
    """Leak of one layer and side.

    Attributes:
        module, side, sites, rank: of the constraint.
        norm: ||dW||_F, 0 for an adapter that has not moved.
        rho: the share of it that violates the constraint.
    """

    module: str
    side: Side
    sites: tuple[str, ...]
    rank: int
    norm: float
    rho: float


def lora_factors(layer: LoraLayer, adapters: Sequence[str]) -> tuple[Tensor, Tensor]:
    """(B [out, R], A [R, in]) in fp64 with dW = B A summed over `adapters`; B carries the scaling."""
    have = [name for name in adapters if name in layer.lora_A]
    up = [_exact(layer.lora_B[name].weight) * layer.scaling[name] for name in have]
    down = [_exact(layer.lora_A[name].weight) for name in have]
    return torch.cat(up, 1), torch.cat(down, 0)


def _exact(weight: Tensor | nn.Module) -> Tensor:
    assert isinstance(weight, Tensor)
    weight = weight.detach()
    return (weight.cpu() if weight.device.type == "mps" else weight).double()  # Metal has no fp64


def lora_leak(layer: LoraLayer, adapters: Sequence[str], constraint: Constraint) -> Leak:
    """Leak of the update that `adapters` make to one layer, without forming dW.

    With B = Q R, ||B M|| = ||R M||: two products of small matrices in fp64 instead of an [out, in] matrix.
    """
    up, down = lora_factors(layer, adapters)
    U = constraint.U.to(up.device, torch.float64)
    norm = float((torch.linalg.qr(up).R @ down).norm())
    if constraint.side == "input":
        inside = float((torch.linalg.qr(up).R @ (down @ U)).norm())
    else:
        inside = float(((U.T @ up) @ torch.linalg.qr(down.T).R.T).norm())
    return _leak(constraint, norm, inside)


def dense_leak(update: Tensor, constraint: Constraint) -> Leak:
    """Leak of an update dW [out, in] given as a matrix."""
    exact = _exact(update)
    U = constraint.U.to(exact.device, torch.float64)
    inside = exact @ U if constraint.side == "input" else U.T @ exact
    return _leak(constraint, float(exact.norm()), float(inside.norm()))


def _leak(c: Constraint, norm: float, inside: float) -> Leak:
    return Leak(c.module, c.side, c.sites, c.rank, norm, inside / norm if norm > 0 else 0.0)
