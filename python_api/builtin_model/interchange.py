"""Editing z, the input of o_proj, while a plain ``LlamaForCausalLM`` runs.

Used three times: to train the routing of refusal (train.py), to test it (gate.py), and by whoever wants to repeat it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Edit = Callable[[Tensor], Tensor]


@contextmanager
def edited(model: Any, edits: Mapping[int, Edit]) -> Iterator[None]:
    """While open, layer ``l`` reads ``edits[l](z)`` in place of z, [batch, tokens, heads * head_dim].

    Gradients flow through the edit. The hooks are gone on leaving, also after an exception.
    """
    layers = model.model.layers

    def hook(edit: Edit) -> Callable[[nn.Module, tuple[Tensor]], tuple[Tensor]]:
        return lambda _module, args: (edit(args[0]),)

    handles = [layers[i].self_attn.o_proj.register_forward_pre_hook(hook(edit)) for i, edit in edits.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def difference_basis(differences: Tensor, rank: int) -> Tensor:
    """Orthonormal U [m, rank] for twin differences [n, m]: their mean first, then the leading directions of the rest.

    Equivalent to: the mean normalised, then the right singular vectors of what is left after projecting it out.
    """
    if not 1 <= rank <= min(differences.shape):
        raise ValueError(f"rank: expected 1 to {min(differences.shape)}, got {rank}")
    mean = differences.mean(0)
    first = mean / mean.norm().clamp_min(1e-12)
    rest = differences - (differences @ first)[:, None] * first
    others = torch.linalg.svd(rest, full_matrices=False).Vh[: rank - 1].T
    return torch.linalg.qr(torch.cat([first[:, None], others], 1)).Q


def random_basis(m: int, rank: int, generator: torch.Generator) -> Tensor:
    """Orthonormal U [m, rank], uniform over subspaces."""
    return torch.linalg.qr(torch.randn(m, rank, generator=generator)).Q


def remove(z: Tensor, basis: Tensor, towards: Tensor | None = None) -> Tensor:
    """z without its component in span(basis) [m, r]; or, with ``towards`` [m], with that component set to its.

    Equivalent to: ``z - (z - towards) @ basis @ basis.T``, ``towards`` being zero by default.
    """
    offset = z if towards is None else z - towards
    return z - offset @ basis @ basis.T
