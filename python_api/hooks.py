"""Hooks on the input of ``self_attn.o_proj``: find the attention layers, read z, change z, put everything back.

z is what the heads write before the output projection mixes them: for every token the concatenation of the heads'
outputs, ``[..., n_heads * head_dim]``. Head i owns columns ``i * head_dim … (i + 1) * head_dim``. Under grouped-query
attention there are fewer key/value heads than query heads; z always has the *query* heads. head_dim need not be
``d_model / n_heads`` (Gemma, Mistral-Nemo, Qwen3), so it is read off o_proj's input width and never computed from d_model.

Everything that changes z is a context manager made of ordinary forward pre-hooks on ``o_proj``: :func:`scale_heads`,
:func:`ablate_heads`, :func:`patch_heads`, :func:`splice`. They compose by nesting, in the order in which they are
entered: an inner context receives z as the outer ones left it. They are differentiable (nothing is done in place),
and on leaving, also by an exception, only their own hooks are removed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

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
    config = getattr(model, "config", None)
    if config is None:
        raise TypeError(f"model: expected a transformers causal LM with a .config, got {type(model).__name__}")
    get = getattr(config, "get_text_config", None)
    return get(decoder=True) if callable(get) else config


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The ModuleList of decoder layers, found by structure: its members have ``self_attn.o_proj``.

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
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and any(_o_proj(layer) is not None for layer in module)
    ]
    if not stacks:
        found = sorted({n.rsplit(".", 1)[-1] for n, _ in model.named_modules() if n.endswith(("_proj", "c_proj", "dense"))})
        hint = f"; its projections are called {', '.join(found)}" if found else ""
        raise ValueError(f"model: {type(model).__name__} has no layer with self_attn.o_proj{hint}")
    if len(stacks) > 1:  # a vision or audio tower beside the language model
        depth = getattr(_text_config(model), "num_hidden_layers", None)
        matching = [stack for stack in stacks if len(stack) == depth]
        if len(matching) != 1:
            raise ValueError(
                f"model: {type(model).__name__} has {len(stacks)} stacks of layers with self_attn.o_proj "
                f"(lengths {[len(s) for s in stacks]}); pass the language model alone"
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


def o_proj_of(model: nn.Module, layer: int) -> nn.Module:
    """The ``o_proj`` module of decoder layer ``layer``.

    Raises:
        TypeError: ``layer`` is not an int.
        ValueError: out of range, the layer has none, or its weights are on the meta device (nothing was loaded).
    """
    layers = decoder_layers(model)
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise TypeError(f"layer: expected an int, got {layer!r}")
    if not 0 <= layer < len(layers):
        raise ValueError(f"layer: expected 0 <= layer < {len(layers)} ({type(model).__name__}), got {layer}")
    o_proj = _o_proj(layers[layer])
    if o_proj is None:
        raise ValueError(f"layer: layer {layer} ({type(layers[layer]).__name__}) has no self_attn.o_proj")
    # Accelerate keeps off-loaded weights on meta between calls and brings them in by its own hook: that is fine.
    if any(p.is_meta for p in o_proj.parameters()) and not any(hasattr(m, "_hf_hook") for m in o_proj.modules()):
        raise ValueError(
            f"model: weights of layer {layer} are on the meta device; load them (from_pretrained) before running"
        )
    return o_proj


def resolve_layers(model: nn.Module, layers: Iterable[int] | None) -> list[int]:
    """Sorted layer indices; ``None`` means every layer that has ``self_attn.o_proj``.

    Raises:
        TypeError, ValueError: empty, repeated, out of range (naming the argument).
    """
    if layers is None:
        return list(attention_geometry(model).layers)
    if isinstance(layers, (int, str)) or not isinstance(layers, Iterable):
        raise TypeError(f"layers: expected a sequence of ints, got {layers!r}")
    chosen = list(layers)
    for layer in chosen:
        o_proj_of(model, layer)
    if not chosen:
        raise ValueError("layers: expected at least one layer, got none")
    if len(set(chosen)) != len(chosen):
        raise ValueError(f"layers: expected distinct layers, got {chosen}")
    return sorted(chosen)


def check_head(geometry: AttentionGeometry, layer: int, head: Any) -> int:
    """``head`` if it is a query head of ``layer``; TypeError or ValueError naming it otherwise."""
    if isinstance(head, bool) or not isinstance(head, int):
        raise TypeError(f"heads: expected int heads for layer {layer}, got {head!r}")
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


def hook_z(model: nn.Module, layer: int, edit: Callable[[Tensor], Tensor | None]) -> Any:
    """Register ``edit`` on the input of o_proj of ``layer``; returns torch's removable handle.

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

    return o_proj_of(model, layer).register_forward_pre_hook(pre_hook, with_kwargs=True)


class _Tokens:
    """Resolves :data:`Positions` against the z of the running forward to a bool mask ``[batch, tokens]`` or None."""

    def __init__(self, positions: Positions) -> None:
        self.positions = positions
        self.attention_mask: Tensor | None = None
        if isinstance(positions, str) and positions != "unmasked":
            raise ValueError(f"positions: expected None, a mask, a slice, integers or 'unmasked', got {positions!r}")

    def watch(self, model: nn.Module) -> Any | None:
        """For ``"unmasked"``: remember the attention_mask of every call of the model."""
        if not (isinstance(self.positions, str) and self.positions == "unmasked"):
            return None

        def remember(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            mask = kwargs.get("attention_mask")
            if mask is None and len(args) > 1 and isinstance(args[1], Tensor):
                mask = args[1]  # forward(input_ids, attention_mask, …) in every causal LM of transformers
            self.attention_mask = mask

        return model.register_forward_pre_hook(remember, with_kwargs=True)

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
            raise ValueError(f"{name}: expected a bool or 0/1 mask over tokens, got other integers; pass a list of positions")
        mask = mask != 0
    return mask[:, -tokens:].to(device).expand(batch, tokens)


@contextmanager
def edit_z(model: nn.Module, edits: Mapping[int, ZEdit], positions: Positions = None) -> Iterator[None]:
    """Replace z by ``edits[layer](z)`` at ``positions``, elsewhere keep it: the common part of all edits below."""
    tokens = _Tokens(positions)

    def at_positions(edit: ZEdit) -> ZEdit:
        def run(z: Tensor) -> Tensor:
            mask = tokens(z)
            new = edit(z)
            # where(), not a multiplication by the mask: untouched tokens keep their bits, and inf stays inf.
            return new if mask is None else torch.where(mask[..., None], new, z)

        return run

    with _hooked(model, {layer: at_positions(edit) for layer, edit in edits.items()}, tokens):
        yield


@contextmanager
def _hooked(model: nn.Module, hooks: Mapping[int, ZEdit], tokens: _Tokens) -> Iterator[None]:
    for layer in hooks:
        o_proj_of(model, layer)  # every error before the first hook
    with ExitStack() as stack:
        watcher = tokens.watch(model)
        if watcher is not None:
            stack.callback(watcher.remove)
        for layer, hook in hooks.items():
            stack.callback(hook_z(model, layer, hook).remove)
        yield


# ------------------------------------------------------------------------------------------------- the edits


def _per_layer(argument: Any, name: str) -> Mapping[int, Any]:
    if not isinstance(argument, Mapping) or not argument:
        raise TypeError(f"{name}: expected a non-empty dict keyed by layer, got {argument!r}")
    return argument


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
    geometry = attention_geometry(model)
    edits: dict[int, ZEdit] = {}
    for layer, per_head in _per_layer(factors, "factors").items():
        o_proj_of(model, layer)
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
    geometry = attention_geometry(model)
    layers = list(_per_layer(heads, "heads"))
    for layer in layers:
        o_proj_of(model, layer)
    edits: dict[int, ZEdit] = {}
    for layer, chosen in resolve_heads(model, layers, heads).items():
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
        TypeError, ValueError: bad layer or head (on entering), or a shape that does not broadcast (when the model runs).
    """
    geometry = attention_geometry(model)
    edits: dict[int, ZEdit] = {}
    for layer, given in _per_layer(values, "values").items():
        o_proj_of(model, layer)
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
        heads: as in :func:`~refusal_kernels.python_api.capture.capture`: f sees and replaces only these heads' columns.

    An f that returns its argument leaves the logits bit for bit as they were.
    """
    geometry = attention_geometry(model)
    layers = list(_per_layer(functions, "functions"))
    for layer in layers:
        o_proj_of(model, layer)
        if not callable(functions[layer]):
            raise TypeError(f"functions: expected a callable for layer {layer}, got {functions[layer]!r}")
    selection = resolve_heads(model, layers, heads)
    tokens = _Tokens(positions)
    hooks = {
        layer: _splicer(functions[layer], tokens, selection[layer], geometry.head_dims[layer], layer) for layer in layers
    }
    with _hooked(model, hooks, tokens):
        yield


def _splicer(function: ZEdit, tokens: _Tokens, heads: list[int] | None, head_dim: int, layer: int) -> ZEdit:
    columns = None if heads is None else head_columns(head_dim, heads)

    def edit(z: Tensor) -> Tensor:
        mask = tokens(z)
        x = z if mask is None else z[mask]
        at = None if columns is None else columns.to(z.device)
        part = x if at is None else x.index_select(-1, at)
        new = function(part)
        if not isinstance(new, Tensor) or new.shape != part.shape:
            got = list(new.shape) if isinstance(new, Tensor) else type(new).__name__
            raise ValueError(f"functions: expected a tensor {list(part.shape)} from layer {layer}'s function, got {got}")
        new = new.to(device=z.device, dtype=z.dtype)
        if at is not None:
            new = x.index_copy(x.dim() - 1, at, new)
        return new if mask is None else z.index_put((mask,), new)

    return edit
