"""Read z, the input of ``o_proj``, from any transformers causal LM: the activations the method works on.

    with capture(model, layers=[1, 3]) as cap:
        z = cap.run(batch)              # {1: [tokens, d_z], 3: [tokens, d_z]}, padding left out

``run`` stops the forward as soon as the deepest hooked layer's z is there: its o_proj and MLP, the later layers, the
final norm and the lm_head, which in a small model with a large vocabulary is most of the work, are never computed.
On leaving the context, by an exception too, the model is what it was: hooks, training flags, configuration.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .edits import ablate_heads, patch_heads, scale_heads, splice
from .hooks import (
    AttentionGeometry,
    HeadSelection,
    Positions,
    attention_geometry,
    head_columns,
    hook_z,
    o_proj_modules,
    resolve_heads,
    resolve_layers,
    token_mask,
)

__all__ = [
    "AttentionGeometry",
    "Capture",
    "Positions",
    "ablate_heads",
    "attention_geometry",
    "capture",
    "patch_heads",
    "scale_heads",
    "splice",
]


class _Stop(BaseException):
    """Unwinds the forward after the deepest hooked layer; BaseException, so that no ``except Exception`` eats it."""


class Capture:
    """What :func:`capture` yields. Not to be built by hand.

    Attributes:
        layers: hooked layers, ascending.
        heads: per layer the selected heads, None for all.
        widths: per layer the columns of what is captured, ``n_selected_heads * head_dim``.
        z: per layer the latest forward's z, ``[batch, tokens, width]``, padding included. Filled by every forward of
            the model inside the context, also by a plain ``model(**batch)``, which runs to its end; emptied by
            :meth:`run`.
    """

    def __init__(self, model: nn.Module, layers: list[int], heads: HeadSelection, per_head: bool, detach: bool) -> None:
        geometry = attention_geometry(model)
        self.layers = layers
        self.heads = resolve_heads(model, layers, heads)
        self.head_dims = {layer: geometry.head_dims[layer] for layer in layers}
        self.widths = {
            layer: (geometry.n_heads if chosen is None else len(chosen)) * self.head_dims[layer]
            for layer, chosen in self.heads.items()
        }
        self.z: dict[int, Tensor] = {}
        self._model = model
        self._per_head = per_head
        self._detach = detach
        self._stop: _Stop | None = None  # set while run() is under way
        self._open = True
        self._columns = {
            layer: None if chosen is None else head_columns(self.head_dims[layer], chosen)
            for layer, chosen in self.heads.items()
        }
        # Accelerate brings off-loaded weights in before a module and takes them out after it; unwinding from the
        # middle would skip the second half, so such models run to the end.
        self._stops_early = not any(getattr(getattr(m, "_hf_hook", None), "offload", False) for m in model.modules())

    def _record(self, layer: int, z: Tensor) -> None:
        if self._detach:
            z = z.detach()
        columns = self._columns[layer]
        if columns is not None:
            z = z.index_select(-1, columns.to(z.device))
        self.z[layer] = z
        if self._stop is not None and self._stops_early and layer == self.layers[-1]:
            raise self._stop

    def run(self, batch: Mapping[str, Any] | Tensor, positions: Tensor | None = None) -> dict[int, Tensor]:
        """Run the model up to the deepest hooked layer and return z of the real tokens.

        Args:
            batch: keyword arguments of the model (``input_ids``, ``attention_mask``, …, as a tokenizer or a
                :class:`~refusal_kernels.python_api.tokens.TokenStream` returns them) or input_ids alone. Tensors are
                moved to the model's device. ``use_cache`` is off unless given.
            positions: bool ``[batch, tokens]``, tokens to return; default: where ``attention_mask`` is 1, or all.

        Returns:
            ``{layer: z}``, z ``[n, width]`` (``[n, heads, head_dim]`` with ``per_head``), rows in reading order (row by
            row, left to right), in the model's dtype. The same n rows for every layer.

        Raises:
            ValueError: a mask that does not fit, or the context was left; also whatever the model itself raises.
        """
        if not self._open:
            raise ValueError("capture: run was called after the end of the with block, where the hooks are gone")
        kwargs: dict[str, Any] = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
        device = _input_device(self._model)
        if device is not None:
            kwargs = {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in kwargs.items()}
        kwargs.setdefault("use_cache", False)
        self.z.clear()
        self._stop = stop = _Stop()
        try:
            with torch.no_grad() if self._detach else nullcontext():
                self._model(**kwargs)
        except _Stop as reached:
            if reached is not stop:  # another, outer capture's
                raise
        finally:
            self._stop = None
            captured, self.z = self.z, {}  # keep nothing alive, also after an error
        mask = positions
        if mask is None:
            mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        name = "positions" if positions is not None else "attention_mask"
        return self._flatten(captured, mask, name)

    def _close(self) -> None:
        self._open = False

    def _flatten(self, captured: dict[int, Tensor], mask: Tensor | None, name: str) -> dict[int, Tensor]:
        rows: Tensor | None = None
        out: dict[int, Tensor] = {}
        for layer in self.layers:
            z = captured[layer]
            if mask is not None and rows is None:
                # Resolved where the mask lives: a mask on the CPU costs the GPU no synchronisation.
                rows = token_mask(mask, z.shape[0], z.shape[1], mask.device, name).reshape(-1).nonzero()[:, 0]
            flat = z.reshape(-1, z.shape[-1])
            if rows is not None and rows.numel() != flat.shape[0]:
                flat = flat.index_select(0, rows.to(flat.device))
            out[layer] = flat.unflatten(-1, (-1, self.head_dims[layer])) if self._per_head else flat
        return out


def _input_device(model: nn.Module) -> torch.device | None:
    get = getattr(model, "get_input_embeddings", None)
    embedding = get() if callable(get) else None
    weight = getattr(embedding, "weight", None)
    if not isinstance(weight, Tensor) or weight.is_meta:
        return None
    return weight.device


@contextmanager
def capture(
    model: nn.Module,
    layers: Iterable[int] | None = None,
    heads: HeadSelection = None,
    *,
    per_head: bool = False,
    detach: bool = True,
    eval_mode: bool = True,
) -> Iterator[Capture]:
    """Context manager: capture z, the concatenated head outputs before ``o_proj``.

    Args:
        model: a transformers causal LM whose layers have ``self_attn.o_proj`` (Llama, Qwen2/3, Mistral, Gemma 1-3, …),
            bare or wrapped by PEFT.
        layers: layers to hook, 0-based; None for all.
        heads: None for the whole z; a sequence of heads for every layer, or ``{layer: heads}``. Columns come in the
            order given.
        per_head: return ``[tokens, heads, head_dim]`` instead of ``[tokens, heads * head_dim]``.
        detach: cut z off the graph, and run under ``torch.no_grad``. False keeps it in the graph, for attribution:
            ``torch.autograd.grad(metric, cap.z[layer])`` after a plain ``model(**batch)``. Leave ``heads`` None then;
            a selection of columns is a copy beside the model's path and gets no gradient.
        eval_mode: dropout would make z noise, so the model is in eval mode inside; each module's flag is restored.

    Yields:
        a :class:`Capture`; call its ``run(batch)``.

    Edits (:func:`scale_heads`, :func:`splice`, …) entered outside are seen in z; entered inside they are not, at the
    hooked layer itself, because hooks run in the order of entering.

    Raises:
        TypeError: model is no module, or compiled; layers or heads of the wrong type.
        ValueError: no ``self_attn.o_proj``, layer or head out of range, weights on the meta device.
    """
    chosen = resolve_layers(model, layers)
    cap = Capture(model, chosen, heads, per_head, detach)
    with ExitStack() as stack:
        stack.callback(cap._close)
        if eval_mode:
            training = [module for module in model.modules() if module.training]
            stack.callback(_set_training, training)
            for module in training:  # not model.eval(): wrappers may override it
                module.training = False
        for layer, module in o_proj_modules(model, chosen).items():
            stack.callback(hook_z(module, partial(cap._record, layer)).remove)
        yield cap


def _set_training(modules: list[nn.Module]) -> None:
    for module in modules:
        module.training = True
