"""Sites: which linear maps of a model a refusal basis constrains, on which side, and what each constraint promises.

A constraint names a linear layer W [out, in], a side and orthonormal directions U. With dW what fine-tuning adds:

    input side    dW U = 0, U [in, r]      (W + dW) u = W u for every u in span U: what is read from U stays
    output side   U^T dW = 0, U [out, r]   U^T (W + dW) x = U^T W x for every x: what is written into U stays

They are different promises. Neither says that the refusal content stays what it was: other modules may change what
flows into U, which is why `audit` reports drift beside the leak.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

import refusal_kernels as rk

from ..features.basis import RefusalBasis
from ..hooks import AttentionGeometry, attention_geometry, find_decoder, resolve_layers
from .adapters import base_weight, compress_names

Side = Literal["input", "output"]

# Of merged directions only what rounding made is dropped: a promise of 1e-6 cannot give up directions of size 1e-3.
_RTOL = 1e-5


@dataclass(frozen=True)
class Constraint:
    """dW U = 0 (side "input", U [in, r]) or U^T dW = 0 (side "output", U [out, r]) for one linear layer.

    Attributes:
        module: path in the base model, "model.layers.3.self_attn.o_proj".
        U: orthonormal columns, fp32.
        sites: the sites it came from.
    """

    module: str
    side: Side
    U: Tensor
    sites: tuple[str, ...]

    @property
    def rank(self) -> int:
        return self.U.shape[1]


@dataclass(frozen=True)
class _Model:
    base: nn.Module
    stack: str
    layers: nn.ModuleList
    geometry: AttentionGeometry
    modules: frozenset[str]
    basis: RefusalBasis

    def path(self, layer: int, name: str) -> str:
        return f"{self.stack}.{layer}.{name}"

    def adapted(self, layer: int, *names: str) -> list[str]:
        return [path for name in names if (path := self.path(layer, name)) in self.modules]


def o_proj(model: _Model) -> list[Constraint]:
    """Site "o_proj": the input side of the basis layers' output projections, with U as it is.

    Promises: the refusal features of z reach the residual stream as before, (W_o + dW) u = W_o u for u in span U.
    """
    return [
        Constraint(path, "input", basis, ("o_proj",))
        for layer, basis in _z(model).items()
        for path in model.adapted(layer, "self_attn.o_proj")
    ]


def v_proj(model: _Model) -> list[Constraint]:
    """Site "v_proj": the output side of the basis layers' value projections.

    Promises: at every token the values' components along U_v are as before, U_v^T (W_v + dW) x = U_v^T W_v x. With
    unchanged attention weights the features u · z are then unchanged too, for z is an average of values per head.
    U_v is block diagonal over the key/value heads: the block of a kv head is the orthonormalised stack of the slices
    of U that belong to the query heads it serves.

    Raises:
        ValueError: a block has as many directions as the head is wide, which would freeze the head.
    """
    found = []
    for layer, basis in _z(model).items():
        module = getattr(getattr(model.layers[layer], "self_attn", None), "v_proj", None)
        if module is None:
            raise ValueError(f"sites: layer {layer} has no self_attn.v_proj, which the site 'v_proj' constrains")
        if not model.adapted(layer, "self_attn.v_proj"):
            continue
        found.append(Constraint(model.path(layer, "self_attn.v_proj"), "output", _values(model, layer, basis), ()))
    return [Constraint(c.module, c.side, c.U, ("v_proj",)) for c in found]


def _values(model: _Model, layer: int, basis: Tensor) -> Tensor:
    geometry, width = model.geometry, model.geometry.head_dims[layer]
    shared = geometry.n_heads // geometry.n_kv_heads
    out = _width(model.base.get_submodule(model.path(layer, "self_attn.v_proj")), "output")
    if out != geometry.n_kv_heads * width:
        raise ValueError(
            f"sites: v_proj of layer {layer} writes {out} columns, expected {geometry.n_kv_heads} key/value heads of "
            f"{width}"
        )
    blocks = []
    for head in range(geometry.n_kv_heads):
        rows = basis[head * shared * width : (head + 1) * shared * width]
        stacked = rows.reshape(shared, width, -1).transpose(0, 1).reshape(width, -1)
        # A head outside the basis has rows of rounding noise, which must not be scaled up to directions.
        stacked = stacked[:, stacked.norm(dim=0) > _RTOL]
        block = rk.orthonormal_basis(stacked, rtol=_RTOL) if stacked.shape[1] else stacked
        if block.shape[1] >= width:
            raise ValueError(
                f"sites: the basis of layer {layer} has rank {block.shape[1]} in key/value head {head}, all of its "
                f"{width} dimensions, so that 'v_proj' would freeze it; use fewer directions (here {basis.shape[1]}, "
                f"each counting {shared} times) or leave 'v_proj' out"
            )
        blocks.append(block)
    return torch.block_diag(*blocks)


def residual(model: _Model) -> list[Constraint]:
    """Site "residual": the lift U_res = orth(W_o U), the directions in which a basis layer l writes its features.

    Writers: the output side of o_proj and down_proj in the layers >= l, U_res^T dW = 0. Promises: what these adapters
    add to the residual stream has no component in span U_res.
    Readers: the input side of gate_proj and up_proj in the layers >= l, and of q_proj, k_proj and v_proj in the layers
    > l (those of layer l itself read before W_o writes). They read gamma * h / rms(h), so the constraint is
    dW (gamma * u) = 0 for u in span U_res. Promises: what these adapters add depends on the residual stream's part in
    span U_res only through the scalar rms(h).
    Several basis layers: a module is held to the union of the lifts of all basis layers before it.

    Raises:
        ValueError: the architecture puts something else than one RMSNorm between residual stream and linear layers.
    """
    found = []
    for layer, basis in _z(model).items():
        weight = base_weight(model.layers[layer].get_submodule("self_attn.o_proj"))
        lifted = rk.orthonormal_basis(weight @ basis.to(weight.device), rtol=_RTOL)
        for later in range(layer, len(model.layers)):
            found += [
                Constraint(path, "output", lifted, ("residual",))
                for path in model.adapted(later, "self_attn.o_proj", "mlp.down_proj")
            ]
            readers = {"post_attention_layernorm": model.adapted(later, "mlp.gate_proj", "mlp.up_proj")}
            if later > layer:
                attention = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
                readers["input_layernorm"] = model.adapted(later, *attention)
            for norm, paths in readers.items():
                if paths:
                    gamma = _gamma(model.layers[later], norm, later)
                    read = rk.orthonormal_basis(gamma[:, None] * lifted.to(gamma.device), rtol=_RTOL)
                    found += [Constraint(path, "input", read, ("residual",)) for path in paths]
    return found


def _gamma(layer: nn.Module, name: str, index: int) -> Tensor:
    """The gains of an RMSNorm, whatever its parametrisation (Gemma's are 1 + weight), read off what it does."""
    norm = getattr(layer, name, None)
    if norm is None or hasattr(layer, "pre_feedforward_layernorm"):
        raise ValueError(
            f"sites: 'residual' needs one RMSNorm, {name}, before the linear layers of layer {index} and none behind "
            f"them; {type(layer).__name__} is built otherwise"
        )
    weight = next(norm.parameters())
    probe = torch.randn(2, len(weight), generator=torch.Generator().manual_seed(0)).to(weight.device)
    with torch.no_grad():  # fp32 in, so that a bf16 model's gains are not rounded once more
        ones, seen = norm(torch.ones_like(probe))[0].float(), norm(probe).float()
    expected = ones * probe / probe.square().mean(1, keepdim=True).sqrt()
    if not torch.allclose(seen, expected, rtol=0, atol=1e-2 * float(expected.abs().max())):
        raise ValueError(f"sites: {name} of layer {index} ({type(norm).__name__}) is no RMSNorm, as 'residual' needs")
    return ones


def every_input(model: _Model) -> list[Constraint]:
    """Site "all": the input side of every adapted linear, each with its own basis of input activations.

    Promises: on activations in span U (those of the prompts the basis was made of) every adapted layer computes what it
    computed before, (W + dW) x = W x; what leaves the span changes freely.

    Raises:
        ValueError: an adapted linear for which `basis.inputs` has no entry.
    """
    missing = [path for path in model.modules if path not in model.basis.inputs]
    if missing:
        raise ValueError(
            "sites: 'all' needs an input basis for every adapted linear; basis.inputs has none for "
            f"{compress_names(sorted(missing))} (it has {compress_names(model.basis.inputs) or 'nothing'})"
        )
    return [
        Constraint(path, "input", _checked(basis, f"basis.inputs[{path!r}]"), ("all",))
        for path, basis in model.basis.inputs.items()
        if path in model.modules
    ]


SITES: dict[str, Callable[[_Model], list[Constraint]]] = {
    "o_proj": o_proj,
    "v_proj": v_proj,
    "residual": residual,
    "all": every_input,
}


def constraints_for(
    base: nn.Module, modules: Collection[str], basis: RefusalBasis, sites: str | Sequence[str] = ("o_proj", "v_proj")
) -> list[Constraint]:
    """The constraints of `sites` on those linear layers of `base` that `modules` names, one per layer and side.

    q_proj and k_proj have no exact linear constraint from z: they decide when a feature fires. Constraints on the same
    layer and side are merged into one of the spans' union.

    Args:
        base: the model without adapters' wrappers around it (`peft_model.get_base_model()`), its weights untouched.
        modules: paths of the layers that are trained; a site constrains none beside these.

    Raises:
        ValueError: an unknown site, a basis that does not fit the model, or directions that fill a layer's side.
    """
    if not isinstance(sites, (str, Sequence)) or not all(isinstance(name, str) for name in sites):
        raise TypeError(f"sites: expected names out of {', '.join(SITES)}; got {sites!r}")
    names = (sites,) if isinstance(sites, str) else tuple(sites)
    unknown = [name for name in names if name not in SITES]
    if unknown or not names:
        raise ValueError(f"sites: expected some of {', '.join(SITES)}; got {', '.join(unknown) or 'none'}")
    stack, layers = find_decoder(base)
    model = _Model(base, stack, layers, attention_geometry(base), frozenset(modules), basis)
    grouped: dict[tuple[str, Side], list[Constraint]] = {}
    for name in dict.fromkeys(names):
        for constraint in SITES[name](model):
            grouped.setdefault((constraint.module, constraint.side), []).append(constraint)
    return [_merge(base, group) for _, group in sorted(grouped.items())]


def _merge(base: nn.Module, group: list[Constraint]) -> Constraint:
    first = group[0]
    width = _width(base.get_submodule(first.module), first.side)
    sites = tuple(dict.fromkeys(site for c in group for site in c.sites))
    for c in group:
        if c.U.shape[0] != width:
            raise ValueError(
                f"basis: for the {first.side} of {first.module} ({', '.join(c.sites)}) expected directions of width "
                f"{width}, got {list(c.U.shape)}"
            )
    U = first.U
    if len(group) > 1:
        U = rk.orthonormal_basis(torch.cat([c.U.to(U.device) for c in group], 1), rtol=_RTOL)
    if U.shape[1] >= width:
        raise ValueError(
            f"sites: {', '.join(sites)} constrain all {width} dimensions of the {first.side} of {first.module}, which "
            "would freeze it; use fewer directions or layers"
        )
    return Constraint(first.module, first.side, _polish(U), sites)


def _z(model: _Model) -> dict[int, Tensor]:
    if not model.basis.z:
        raise ValueError("basis: has no directions in z, which the sites o_proj, v_proj and residual start from")
    resolve_layers(model.base, model.basis.z)
    found = {}
    for layer, basis in sorted(model.basis.z.items()):
        width = model.geometry.n_heads * model.geometry.head_dims[layer]
        if basis.shape[:1] != (width,):
            raise ValueError(f"basis: z[{layer}] must be [{width}, r] for this model, got {list(basis.shape)}")
        found[layer] = _checked(basis, f"basis.z[{layer}]")
    return found


def _checked(basis: Tensor, name: str) -> Tensor:
    if basis.dim() != 2 or not 0 < basis.shape[1] <= basis.shape[0] or not basis.is_floating_point():
        raise ValueError(f"{name}: expected a float tensor [n, r], 0 < r <= n, got {basis.dtype} {list(basis.shape)}")
    exact = basis.detach().double()
    error = (exact.T @ exact - torch.eye(basis.shape[1], dtype=torch.float64, device=basis.device)).abs().max()
    if not error <= 1e-3:  # NaN included
        raise ValueError(f"{name}: expected orthonormal columns, but U^T U is off the identity by {float(error):.2g}")
    return _polish(exact)


def _polish(basis: Tensor) -> Tensor:
    """The same span with columns orthonormal to fp32's last digit: what U misses of that, a projection leaks."""
    return torch.linalg.qr(basis.double()).Q.float().contiguous()


def _width(module: nn.Module, side: Side) -> int:
    return int(getattr(module, "in_features" if side == "input" else "out_features"))
