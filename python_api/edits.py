"""Change z inside a model for the length of a ``with``: scale, remove, replace heads; splice in a reconstruction.

Everything here is a context manager made of ordinary forward pre-hooks on ``o_proj``. They compose by nesting, in the
order in which they are entered: an inner context receives z as the outer ones left it. They are differentiable
(nothing is done in place), and on leaving, also by an exception, only their own hooks are removed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .hooks import (
    AttentionGeometry,
    HeadSelection,
    Positions,
    TokenSelector,
    ZEdit,
    attention_geometry,
    check_head,
    head_columns,
    hooked,
    o_proj_modules,
    resolve_heads,
)

__all__ = ["ablate_heads", "edit_z", "patch_heads", "scale_heads", "splice"]


@contextmanager
def edit_z(model: nn.Module, edits: Mapping[int, ZEdit], positions: Positions = None) -> Iterator[None]:
    """Replace z by ``edits[layer](z)`` at ``positions``, elsewhere keep it: the common part of all edits below."""
    tokens = TokenSelector(positions)

    def at_positions(edit: ZEdit) -> ZEdit:
        def run(z: Tensor) -> Tensor:
            mask = tokens(z)
            new = edit(z)
            # where(), not a multiplication by the mask: untouched tokens keep their bits, and inf stays inf.
            return new if mask is None else torch.where(mask[..., None], new, z)

        return run

    with hooked(model, {layer: at_positions(edit) for layer, edit in edits.items()}, tokens):
        yield


def _geometry(model: nn.Module, argument: Any, name: str) -> AttentionGeometry:
    """The model's geometry, once ``argument`` is known to be keyed by layers that can be hooked."""
    if not isinstance(argument, Mapping) or not argument:
        raise TypeError(f"{name}: expected a non-empty dict keyed by layer, got {argument!r}")
    o_proj_modules(model, argument)
    return attention_geometry(model)


def scale_heads(
    model: nn.Module, factors: Mapping[int, Mapping[int, float | Tensor]], positions: Positions = None
) -> AbstractContextManager[None]:
    """Context manager: multiply the z of single heads.

    Args:
        model: transformers causal LM.
        factors: ``{layer: {head: factor}}``; a factor is a float or a 0-dim tensor, through which gradients flow.
        positions: tokens to touch, see :data:`Positions`.

    Equivalent to: multiplying columns ``head * head_dim … (head + 1) * head_dim`` of ``o_proj.weight`` by the factor
    (when ``positions`` is None).

    Raises:
        TypeError, ValueError: bad layer, head, factor (on entering) or positions (when the model runs).
    """
    geometry = _geometry(model, factors, "factors")
    edits: dict[int, ZEdit] = {}
    for layer, per_head in factors.items():
        if not isinstance(per_head, Mapping):
            raise TypeError(f"factors: expected {{head: factor}} for layer {layer}, got {per_head!r}")
        scale = {check_head(geometry, layer, head): factor for head, factor in per_head.items()}
        for head, factor in scale.items():
            if isinstance(factor, Tensor) and factor.dim() != 0:
                raise ValueError(f"factors: expected a 0-dim tensor for head {head}, got shape {list(factor.shape)}")
            if not isinstance(factor, (int, float, Tensor)) or isinstance(factor, bool):
                raise TypeError(f"factors: expected a float or tensor for head {head}, got {factor!r}")
        edits[layer] = _scaler(scale, geometry.n_heads, geometry.head_dims[layer])
    return edit_z(model, edits, positions)


def _scaler(scale: Mapping[int, float | Tensor], n_heads: int, head_dim: int) -> ZEdit:
    def edit(z: Tensor) -> Tensor:
        one = torch.ones((), dtype=z.dtype, device=z.device)
        per_head = torch.stack([torch.as_tensor(scale.get(h, one)).to(one) for h in range(n_heads)])
        return z * per_head.repeat_interleave(head_dim)

    return edit


def ablate_heads(
    model: nn.Module, heads: Mapping[int, Sequence[int]], positions: Positions = None
) -> AbstractContextManager[None]:
    """Context manager: set the z of whole heads to zero.

    Args:
        model: transformers causal LM.
        heads: ``{layer: [head, …]}``.
        positions: tokens to touch, see :data:`Positions`.

    Equivalent to: zeroing the heads' columns of ``o_proj.weight`` (when ``positions`` is None). Unlike a factor of 0
    it also removes inf and NaN.
    """
    geometry = _geometry(model, heads, "heads")
    edits: dict[int, ZEdit] = {}
    for layer, chosen in resolve_heads(model, list(heads), heads).items():
        columns = torch.zeros(geometry.n_heads * geometry.head_dims[layer], dtype=torch.bool)
        if chosen is None:
            columns[:] = True
        else:
            columns[head_columns(geometry.head_dims[layer], chosen)] = True
        edits[layer] = partial(_zero_columns, columns)
    return edit_z(model, edits, positions)


def _zero_columns(columns: Tensor, z: Tensor) -> Tensor:
    return z.masked_fill(columns.to(z.device), 0.0)


def patch_heads(
    model: nn.Module, values: Mapping[int, Tensor | Mapping[int, Tensor]], positions: Positions = None
) -> AbstractContextManager[None]:
    """Context manager: replace the z of heads, or of whole layers, by given values (activation patching).

    Args:
        model: transformers causal LM.
        values: ``{layer: {head: v}}`` with v broadcastable to ``[batch, tokens, head_dim]`` (a mean ``[head_dim]``, or
            another run's activations), or ``{layer: v}`` with v broadcastable to ``[batch, tokens, n_heads*head_dim]``.
        positions: tokens to touch, see :data:`Positions`.

    Raises:
        TypeError, ValueError: bad layer or head (at once), or a shape that does not broadcast (when the model runs).
    """
    geometry = _geometry(model, values, "values")
    edits: dict[int, ZEdit] = {}
    for layer, given in values.items():
        h = geometry.head_dims[layer]
        if isinstance(given, Tensor):
            edits[layer] = _patcher({None: given}, h, layer)
        elif isinstance(given, Mapping):
            edits[layer] = _patcher({check_head(geometry, layer, k): v for k, v in given.items()}, h, layer)
        else:
            raise TypeError(f"values: expected a tensor or {{head: tensor}} for layer {layer}, got {given!r}")
    return edit_z(model, edits, positions)


def _patcher(values: Mapping[int | None, Tensor], head_dim: int, layer: int) -> ZEdit:
    def edit(z: Tensor) -> Tensor:
        pieces = list(z.split(head_dim, dim=-1))
        for head, value in values.items():
            target = z if head is None else pieces[head]
            try:
                new = value.to(device=z.device, dtype=z.dtype).expand(target.shape)
            except RuntimeError:
                what = "the whole z" if head is None else f"head {head}"
                raise ValueError(
                    f"values: expected a tensor that broadcasts to {list(target.shape)} for {what} of layer {layer}, "
                    f"got {list(value.shape)}"
                ) from None
            if head is None:
                return new
            pieces[head] = new
        return torch.cat(pieces, dim=-1)

    return edit


@contextmanager
def splice(
    model: nn.Module,
    functions: Mapping[int, ZEdit],
    positions: Positions = None,
    heads: HeadSelection = None,
) -> Iterator[None]:
    """Context manager: replace z by ``functions[layer](z)``, for instance by a sparse autoencoder's reconstruction.

    Args:
        model: transformers causal LM.
        functions: ``{layer: f}``. f receives z ``[batch, tokens, d]`` (without ``positions``) or only the touched
            tokens ``[n, d]`` (with), and returns the same shape in any floating dtype; gradients flow through it.
            d is ``n_heads * head_dim``, or ``len(heads) * head_dim`` under a selection.
        positions: tokens to touch, see :data:`Positions`; ``"unmasked"`` leaves padding alone.
        heads: as in :func:`~refusal_kernels.python_api.capture`: f sees and replaces only these heads' columns.

    An f that returns its argument leaves the logits bit for bit as they were.
    """
    geometry = _geometry(model, functions, "functions")
    for layer, function in functions.items():
        if not callable(function):
            raise TypeError(f"functions: expected a callable for layer {layer}, got {function!r}")
    selection = resolve_heads(model, list(functions), heads)
    tokens = TokenSelector(positions)
    hooks = {
        layer: _splicer(function, tokens, selection[layer], geometry.head_dims[layer], layer)
        for layer, function in functions.items()
    }
    with hooked(model, hooks, tokens):
        yield


def _splicer(function: ZEdit, tokens: TokenSelector, heads: list[int] | None, head_dim: int, layer: int) -> ZEdit:
    columns = None if heads is None else head_columns(head_dim, heads)

    def edit(z: Tensor) -> Tensor:
        mask = tokens(z)
        x = z if mask is None else z[mask]
        at = None if columns is None else columns.to(z.device)
        part = x if at is None else x.index_select(-1, at)
        new = function(part)
        if not isinstance(new, Tensor) or new.shape != part.shape:
            got = list(new.shape) if isinstance(new, Tensor) else type(new).__name__
            raise ValueError(f"functions: expected {list(part.shape)} from the function of layer {layer}, got {got}")
        new = new.to(device=z.device, dtype=z.dtype)
        if at is not None:
            new = x.index_copy(x.dim() - 1, at, new)
        return new if mask is None else z.index_put((mask,), new)

    return edit
