"""Hooks on the input of ``self_attn.o_proj``: find the attention layers, read z, change z, put everything back.

z is what the heads write before the output projection mixes them: for every token the concatenation of the heads'
outputs, ``[..., n_heads * head_dim]``. Head i owns columns ``i * head_dim … (i + 1) * head_dim``. Under grouped-query
attention there are fewer key/value heads than query heads; z always has the *query* heads. head_dim need not be
``d_model / n_heads`` (Gemma, Mistral-Nemo, Qwen3), so it is read off o_proj's input width.

The readers are in ``capture``, the writers in ``edits``; both are ordinary forward pre-hooks made here.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Positions: TypeAlias = "Tensor | slice | Sequence[int] | Literal['unmasked'] | None"
"""Which tokens an edit touches.

* ``None``: all.
* a bool (or 0/1 integer) tensor ``[batch, tokens]`` or ``[tokens]``: those that are True. An ``attention_mask`` fits.
* a slice or a sequence of integers: these token positions in every row; negative ones count from the end.
* ``"unmasked"``: where the ``attention_mask`` that the model was called with is 1 (all, when it got none).
"""

ZEdit: TypeAlias = Callable[[Tensor], Tensor]


# ---------------------------------------------------------------------------------------------- finding the layers


@dataclass(frozen=True)
class AttentionGeometry:
    """Sizes of a model's attention, as :func:`attention_geometry` reads them off the modules.

    Attributes:
        n_layers: decoder layers (also counting layers without ``self_attn.o_proj``, as in hybrid models).
        n_heads: query heads of a layer.
        n_kv_heads: key/value heads of a layer; equal to ``n_heads`` without grouped-query attention.
        head_dims: per layer, the columns of z a head owns; 0 for a layer without ``self_attn.o_proj``.
        d_model: width of the residual stream (o_proj's output).
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dims: tuple[int, ...]
    d_model: int

    @property
    def layers(self) -> tuple[int, ...]:
        """Indices of the layers that have ``self_attn.o_proj`` and can be hooked."""
        return tuple(i for i, h in enumerate(self.head_dims) if h)

    @property
    def head_dim(self) -> int:
        """The head width, when all layers share one (ValueError otherwise)."""
        sizes = {h for h in self.head_dims if h}
        if len(sizes) != 1:
            raise ValueError(f"head_dim: layers differ ({sorted(sizes)}); read head_dims[layer] instead")
        return sizes.pop()

    @property
    def d_z(self) -> int:
        """Width of z, ``n_heads * head_dim``."""
        return self.n_heads * self.head_dim

    def kv_head(self, head: int) -> int:
        """The key/value head that query head ``head`` reads."""
        return head // (self.n_heads // self.n_kv_heads)


def _text_config(model: nn.Module) -> Any:
    # The outermost module that has one: wrappers such as DistributedDataParallel do not.
    config = next((m.config for m in model.modules() if hasattr(m, "config")), None)
    if config is None:
        raise TypeError(f"model: expected a transformers causal LM with a .config, got {type(model).__name__}")
    get = getattr(config, "get_text_config", None)
    return get(decoder=True) if callable(get) else config


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The ModuleList of decoder layers; see :func:`find_decoder`."""
    return find_decoder(model)[1]


def find_decoder(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Path and ModuleList of the decoder layers, found by structure: its members have ``self_attn.o_proj``.

    Wrappers (PEFT, DistributedDataParallel, a multimodal model around a language model) only lengthen the path.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``, or is the product of ``torch.compile`` (hooks on a compiled
            graph would not run).
        ValueError: no layer with ``self_attn.o_proj``, or several stacks of them and none matches the text config.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if hasattr(model, "_orig_mod"):
        raise TypeError("model: got the result of torch.compile; pass the original model (model._orig_mod)")
    stacks = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and any(_o_proj(layer) is not None for layer in module)
    ]
    if not stacks:
        names = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
        found = sorted(name for name in names if name.endswith(("_proj", "dense")))
        hint = f"; its projections are called {', '.join(found)}" if found else ""
        raise ValueError(f"model: {type(model).__name__} has no layer with self_attn.o_proj{hint}")
    if len(stacks) > 1:  # a vision or audio tower beside the language model
        depth = getattr(_text_config(model), "num_hidden_layers", None)
        matching = [(name, stack) for name, stack in stacks if len(stack) == depth]
        if len(matching) != 1:
            raise ValueError(
                f"model: {type(model).__name__} has {len(stacks)} stacks of layers with self_attn.o_proj "
                f"(lengths {[len(stack) for _, stack in stacks]}); pass the language model alone"
            )
        return matching[0]
    return stacks[0]


def _o_proj(layer: nn.Module) -> nn.Module | None:
    module = getattr(getattr(layer, "self_attn", None), "o_proj", None)
    return module if isinstance(module, nn.Module) else None


def _in_features(o_proj: nn.Module) -> int:
    width = getattr(o_proj, "in_features", None)
    if width is None:
        weight = getattr(o_proj, "weight", None)
        if not isinstance(weight, Tensor) or weight.dim() != 2:
            raise ValueError(f"model: cannot read the input width of self_attn.o_proj ({type(o_proj).__name__})")
        width = weight.shape[1]
    return int(width)


def attention_geometry(model: nn.Module) -> AttentionGeometry:
    """Layers, heads, key/value heads and head width of a transformers causal LM.

    Raises:
        TypeError, ValueError: as :func:`decoder_layers`; also if o_proj's width is not a multiple of the head count.
    """
    layers = decoder_layers(model)
    config = _text_config(model)
    n_heads = getattr(config, "num_attention_heads", None)
    if not isinstance(n_heads, int):
        raise ValueError(f"model.config.num_attention_heads: expected an int, got {n_heads!r}")
    n_kv_heads = getattr(config, "num_key_value_heads", None) or n_heads
    head_dims, d_model = [], 0
    for i, layer in enumerate(layers):
        o_proj = _o_proj(layer)
        if o_proj is None:
            head_dims.append(0)
            continue
        width = _in_features(o_proj)
        if width % n_heads:
            raise ValueError(f"model: o_proj of layer {i} reads {width} columns, no multiple of {n_heads} heads")
        head_dims.append(width // n_heads)
        d_model = int(getattr(o_proj, "out_features", 0) or getattr(config, "hidden_size", 0))
    return AttentionGeometry(len(layers), n_heads, int(n_kv_heads), tuple(head_dims), d_model)


def o_proj_modules(model: nn.Module, layers: Iterable[int]) -> dict[int, nn.Module]:
    """The ``o_proj`` modules of decoder ``layers``, by layer, from one walk over the model.

    Raises:
        TypeError: a layer is not an integer (numpy's and other libraries' count as such).
        ValueError: out of range, the layer has none, or its weights are on the meta device (nothing was loaded).
    """
    stack = decoder_layers(model)
    found: dict[int, nn.Module] = {}
    for layer in (as_int("layer", layer) for layer in layers):
        if not 0 <= layer < len(stack):
            raise ValueError(f"layer: expected 0 <= layer < {len(stack)} ({type(model).__name__}), got {layer}")
        o_proj = _o_proj(stack[layer])
        if o_proj is None:
            raise ValueError(f"layer: layer {layer} ({type(stack[layer]).__name__}) has no self_attn.o_proj")
        # Accelerate keeps off-loaded weights on meta between calls and brings them in by its own hook: that is fine.
        if any(p.is_meta for p in o_proj.parameters()) and not any(hasattr(m, "_hf_hook") for m in o_proj.modules()):
            raise ValueError(
                f"model: weights of layer {layer} are on the meta device; load them (from_pretrained) before running"
            )
        found[layer] = o_proj
    return found


def as_int(name: str, value: Any) -> int:
    """``value`` as an int, for any integral type; TypeError naming it otherwise."""
    if not isinstance(value, (bool, float, str)):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise TypeError(f"{name}: expected an int, got {value!r}")


def o_proj_of(model: nn.Module, layer: int) -> nn.Module:
    """The ``o_proj`` module of one decoder layer; errors as :func:`o_proj_modules`."""
    return o_proj_modules(model, [layer])[layer]


def resolve_layers(model: nn.Module, layers: Iterable[int] | None) -> list[int]:
    """Sorted layer indices; ``None`` means every layer that has ``self_attn.o_proj``.

    Raises:
        TypeError, ValueError: empty, repeated, out of range (naming the argument).
    """
    if layers is None:
        return list(attention_geometry(model).layers)
    if isinstance(layers, (int, str)) or not isinstance(layers, Iterable):
        raise TypeError(f"layers: expected a sequence of ints, got {layers!r}")
    chosen = [as_int("layer", layer) for layer in layers]
    o_proj_modules(model, chosen)
    if not chosen:
        raise ValueError("layers: expected at least one layer, got none")
    if len(set(chosen)) != len(chosen):
        raise ValueError(f"layers: expected distinct layers, got {chosen}")
    return sorted(chosen)


def check_head(geometry: AttentionGeometry, layer: int, head: Any) -> int:
    """``head`` if it is a query head of ``layer``; TypeError or ValueError naming it otherwise."""
    head = as_int(f"heads of layer {layer}", head)
    if not 0 <= head < geometry.n_heads:
        raise ValueError(f"heads: expected 0 <= head < {geometry.n_heads} for layer {layer}, got {head}")
    return head


HeadSelection: TypeAlias = "Sequence[int] | Mapping[int, Sequence[int] | None] | None"


def resolve_heads(model: nn.Module, layers: Sequence[int], heads: HeadSelection) -> dict[int, list[int] | None]:
    """Per layer the selected heads in the caller's order, ``None`` meaning all of them.

    ``heads`` may be one sequence for every layer, or ``{layer: heads}`` in which missing layers keep all heads.
    """
    if heads is None:
        return dict.fromkeys(layers)
    geometry = attention_geometry(model)
    if isinstance(heads, Mapping):
        unknown = sorted(set(heads) - set(layers))
        if unknown:
            raise ValueError(f"heads: names layers {unknown}, but the hooked layers are {list(layers)}")
        per_layer = {layer: heads.get(layer) for layer in layers}
    elif isinstance(heads, Sequence) and not isinstance(heads, str):
        per_layer = dict.fromkeys(layers, heads)
    else:
        raise TypeError(f"heads: expected a sequence of ints or {{layer: sequence of ints}}, got {heads!r}")
    out: dict[int, list[int] | None] = {}
    for layer, chosen in per_layer.items():
        if chosen is None:
            out[layer] = None
            continue
        selected = [check_head(geometry, layer, head) for head in chosen]
        if not selected or len(set(selected)) != len(selected):
            raise ValueError(f"heads: expected distinct heads, at least one, for layer {layer}, got {selected}")
        out[layer] = selected
    return out


def head_columns(head_dim: int, heads: Sequence[int]) -> Tensor:
    """Columns of z that ``heads`` own, in the order of ``heads``: int64 ``[len(heads) * head_dim]``."""
    starts = torch.as_tensor(list(heads), dtype=torch.int64) * head_dim
    return (starts[:, None] + torch.arange(head_dim)).reshape(-1)


# ------------------------------------------------------------------------------------------------- hooking z


def hook_z(o_proj: nn.Module, edit: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
    """Register ``edit`` on the input of ``o_proj``.

    ``edit`` gets z ``[batch, tokens, n_heads * head_dim]`` and returns its replacement, or None to leave it alone.
    """

    def pre_hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            new = edit(args[0])
            return None if new is None else ((new, *args[1:]), kwargs)
        # nn.Linear's parameter is called "input"; a few wrappers call it "x" and are called by keyword.
        name = next(key for key, value in kwargs.items() if isinstance(value, Tensor))
        new = edit(kwargs[name])
        return None if new is None else (args, {**kwargs, name: new})

    return o_proj.register_forward_pre_hook(pre_hook, with_kwargs=True)


class TokenSelector:
    """Resolves :data:`Positions` against the z of the running forward to a bool mask ``[batch, tokens]`` or None."""

    def __init__(self, positions: Positions) -> None:
        self.positions = positions
        self.attention_mask: Tensor | None = None
        if isinstance(positions, str) and positions != "unmasked":
            raise ValueError(f"positions: expected None, a mask, a slice, integers or 'unmasked', got {positions!r}")

    def watch(self, model: nn.Module) -> list[RemovableHandle]:
        """For ``"unmasked"``: remember the attention_mask of every call, whichever of the nested modules is called.

        Wrappers forward some calls past themselves (``generate`` of a PEFT model enters at the model it wraps), and
        inner modules may get the mask expanded to four dimensions or as a dict; so all modules that contain the
        decoder layers are watched, and the innermost mask of two dimensions counts.
        """
        if not (isinstance(self.positions, str) and self.positions == "unmasked"):
            return []

        def remember(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            mask = kwargs.get("attention_mask")
            if mask is None and len(args) > 1:
                mask = args[1]  # forward(input_ids, attention_mask, …) in every causal LM of transformers
            if mask is None or (isinstance(mask, Tensor) and mask.dim() == 2):
                self.attention_mask = mask

        parts = find_decoder(model)[0].split(".")[:-1]
        paths = [".".join(parts[:n]) for n in range(len(parts) + 1)]
        return [model.get_submodule(path).register_forward_pre_hook(remember, with_kwargs=True) for path in paths]

    def __call__(self, z: Tensor) -> Tensor | None:
        positions = self.positions
        batch, tokens = z.shape[0], z.shape[1]
        if positions is None:
            return None
        if isinstance(positions, str):
            if self.attention_mask is None:
                return None
            return token_mask(self.attention_mask, batch, tokens, z.device, "attention_mask")
        if isinstance(positions, Tensor):
            return token_mask(positions, batch, tokens, z.device, "positions")
        mask = torch.zeros(tokens, dtype=torch.bool)
        if isinstance(positions, slice):
            mask[positions] = True
        else:
            for p in positions:
                if isinstance(p, bool) or not isinstance(p, int) or not -tokens <= p < tokens:
                    raise ValueError(f"positions: expected ints in [-{tokens}, {tokens}), got {p!r}")
                mask[p] = True
        return mask.to(z.device).expand(batch, tokens)


def token_mask(mask: Tensor, batch: int, tokens: int, device: torch.device, name: str) -> Tensor:
    """``mask`` as bool ``[batch, tokens]`` on ``device``.

    A mask longer than the forward's tokens is an attention mask that also covers a key/value cache; its last columns
    belong to this forward.
    """
    if mask.dim() not in (1, 2) or mask.is_floating_point():
        raise ValueError(
            f"{name}: expected a bool or 0/1 integer tensor [batch, tokens] or [tokens], "
            f"got {mask.dtype} {list(mask.shape)}"
        )
    if mask.dim() == 1:
        mask = mask[None]
    if mask.shape[0] not in (1, batch) or mask.shape[1] < tokens or (mask.shape[1] > tokens and name == "positions"):
        raise ValueError(f"{name}: expected shape [{batch}, {tokens}] (or [{tokens}]), got {list(mask.shape)}")
    if mask.dtype != torch.bool:
        if bool(((mask != 0) & (mask != 1)).any()):
            raise ValueError(f"{name}: expected a bool or 0/1 mask over tokens, got other integers; use a list of ints")
        mask = mask != 0
    return mask[:, -tokens:].to(device).expand(batch, tokens)


@contextmanager
def hooked(model: nn.Module, hooks: Mapping[int, ZEdit], selector: TokenSelector) -> Iterator[None]:
    """Run ``hooks[layer]`` on z inside the context; every error comes before the first hook is registered."""
    modules = o_proj_modules(model, hooks)
    with ExitStack() as stack:
        for watcher in selector.watch(model):
            stack.callback(watcher.remove)
        for layer, hook in hooks.items():
            stack.callback(hook_z(modules[layer], hook).remove)
        yield
