"""SafeLoRA (Hsu et al., arXiv 2405.16833): project trained adapters onto the aligned minus the unaligned weights.

Per target weight, V = W_aligned - W_base and C = V V^T / ||V||_F. Where cos(C B A, B A) <= tau, B becomes C B.

C is no projector (C² != C), and its scale is that of V: on an isotropic V it shrinks the update to about a thousandth,
so an effect of C on refusals may be that of a smaller update. `exact=True` takes the projector on the top-r left
singular vectors of V in its place, r being the adapter's rank.

Nothing of size [out, out] is formed: with G_A = A A^T and G_B = B^T B, both [r, r], ||B A||² = tr(G_B G_A), and
likewise for C B.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class SafeLoRARow:
    """What became of one adapted module: cos(C B A, B A), nan where B A = 0, and whether B was projected."""

    module: str
    cosine: float
    projected: bool

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def aligned_projection(b: Tensor, v: Tensor, exact: bool = False) -> Tensor:
    """C B.

    Args:
        b: B [out, r].
        v: V = W_aligned - W_base [out, in], not zero.
        exact: C = U U^T of the top-r left singular vectors of V, in place of V V^T / ||V||_F.

    Returns:
        [out, r] in the dtype of `b`, computed in fp32.
    """
    v, wide = v.float(), b.float()
    if exact:
        rank = min(b.shape[1], *v.shape)
        u = torch.linalg.svd(v, full_matrices=False).U[:, :rank]
        return (u @ (u.T @ wide)).to(b.dtype)
    return (v @ (v.T @ wide) / torch.linalg.norm(v)).to(b.dtype)


def product_cosine(b1: Tensor, b2: Tensor, a: Tensor) -> float:
    """cos(B1 A, B2 A) of the flattened products, in fp64; nan where one is zero. b1, b2 [out, r], a [r, in]."""
    b1, b2, a = b1.double(), b2.double(), a.double()
    gram = a @ a.T

    def inner(x: Tensor, y: Tensor) -> float:
        return float(((x.T @ y) * gram).sum())  # tr((X A)^T (Y A)) = <X^T Y, A A^T>

    norms = math.sqrt(max(inner(b1, b1), 0) * max(inner(b2, b2), 0))
    return inner(b1, b2) / norms if norms else math.nan


@torch.no_grad()
def apply_safelora(
    model: nn.Module,
    base_model: nn.Module,
    *,
    select: str = "threshold",
    threshold: float = 0.5,
    number: int = 10,
    exact: bool = False,
) -> list[SafeLoRARow]:
    """Projects the adapter of a trained PEFT model in place; the adapter keeps its shape and opens in plain PEFT.

    Args:
        model: a PeftModel on the aligned model, LoRA without DoRA.
        base_model: the unaligned model of the same architecture. Weights are paired by name.
        select: "threshold", or "number": the `number` modules of smallest cosine.

    Returns:
        One row per adapted module, in the model's order.

    Raises:
        ValueError: a module that `base_model` lacks or has in another shape, or whose weights are equal in both models:
            V = 0 says nothing about alignment.
    """
    found: list[tuple[str, Any, Tensor, float]] = []
    for name, layer, v in _alignment(model, base_model):
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        projected = aligned_projection(b, v, exact)
        found.append((name, layer, projected, product_cosine(projected, b, a)))
    if select == "number":
        order = sorted(range(len(found)), key=lambda i: math.inf if math.isnan(found[i][3]) else found[i][3])
        chosen = set(order[:number])
    else:
        chosen = {i for i, (*_, cosine) in enumerate(found) if cosine <= threshold}
    for i in chosen:
        _, layer, projected, _ = found[i]
        layer.lora_B["default"].weight.copy_(projected)
    return [SafeLoRARow(name, cosine, i in chosen) for i, (name, _, _, cosine) in enumerate(found)]


def check_unaligned(model: nn.Module, base_model: nn.Module) -> None:
    """Raises what `apply_safelora` would raise: to be called before hours of training."""
    for _ in _alignment(model, base_model):
        pass


def _alignment(model: nn.Module, base_model: nn.Module) -> Iterator[tuple[str, Any, Tensor]]:
    """(path, LoRA layer, V = W_aligned - W_base in fp32) of every adapted module."""
    plain = dict(base_model.named_modules())
    for name, layer in lora_layers(model):
        other = getattr(plain.get(name), "weight", None)
        aligned = layer.base_layer.weight.detach()
        if other is None or other.shape != aligned.shape:
            got = "none" if other is None else list(other.shape)
            raise ValueError(f"base_model: expected a weight {name} of shape {list(aligned.shape)}, got {got}")
        v = aligned.float() - other.detach().to(aligned.device).float()
        if not v.any():
            raise ValueError(f"base_model: expected the unaligned model, got one with the same weights in {name}")
        yield name, layer, v


def lora_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """(path in the untouched base model, PEFT's LoRA layer) of every adapted linear of a PeftModel, in its order."""
    from peft.tuners.lora import LoraLayer

    prefix = "base_model.model."
    return [
        (name.removeprefix(prefix), module)
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and "default" in module.lora_A
    ]
