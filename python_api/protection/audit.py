"""audit: what fine-tuning did to a refusal basis, by two measures.

Leak, per constrained layer and side: which share of dW violates the constraint (`leak.py`). It says whether the promise
was kept.
Drift, per layer of the basis: how far the refusal features themselves moved on given prompts,

    drift = E|f' - f| / E|f|        f = z U (or SAE latents) of the untouched model, f' of the fine-tuned one.

It says whether keeping the promise was enough: a leak of 0 with a large drift means that other modules changed what
flows into U.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from ..capturing import capture
from ..features.basis import RefusalBasis
from .adapters import adapted_modules, adapter_names, base_weight, check_peft_model, compress_names
from .leak import Leak, dense_leak, lora_leak
from .protect import Protection
from .sites import Constraint, constraints_for
from .stepping import ProtectionWarning

if TYPE_CHECKING:
    from ..prompts.chat import Chat
    from ..sae import TopKSAE

Latents = Mapping[int, "tuple[TopKSAE, Sequence[int]]"]


@dataclass(frozen=True)
class Drift:
    """How far the refusal features of one layer moved.

    Attributes:
        layer, features: which layer, how many features.
        scale: E|f| of the untouched model over prompts' tokens and features.
        change: E|f' - f|.
        ratio: change / scale.
    """

    layer: int
    features: int
    scale: float
    change: float

    @property
    def ratio(self) -> float:
        return self.change / self.scale if self.scale > 0 else 0.0 if self.change == 0 else float("inf")


@dataclass
class Audit:
    """Leaks and drifts of one model.

    Attributes:
        leaks: per constrained layer and side.
        drifts: per layer of the basis; empty without prompts.
        unconstrained: trained modules that no constraint holds.
    """

    leaks: list[Leak]
    drifts: list[Drift] = field(default_factory=list)
    unconstrained: list[str] = field(default_factory=list)

    @property
    def leak(self) -> float:
        """The largest leak."""
        return max((leak.rho for leak in self.leaks), default=0.0)

    @property
    def drift(self) -> float | None:
        """The largest drift; None where none was measured."""
        return max((drift.ratio for drift in self.drifts), default=None)

    def logs(self) -> dict[str, float]:
        """The two numbers for a training log."""
        values = {"refusal_leak": self.leak}
        return values if self.drift is None else {**values, "refusal_drift": self.drift}

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        drifts = [{**asdict(drift), "ratio": drift.ratio} for drift in self.drifts]
        leaks = [asdict(leak) for leak in self.leaks]
        return {**self.logs(), "leaks": leaks, "drifts": drifts, "unconstrained": self.unconstrained}

    def table(self) -> str:
        """As text."""
        rows: list[tuple[str, ...]] = [("module", "side", "sites", "rank", "|dW|", "leak")]
        rows += [
            (leak.module, leak.side, "+".join(leak.sites), str(leak.rank), f"{leak.norm:.3g}", f"{leak.rho:.1e}")
            for leak in self.leaks
        ]
        text = _columns(rows, 3)
        if self.drifts:
            rows = [("layer", "features", "E|f|", "E|f' - f|", "drift")]
            rows += [
                (str(d.layer), str(d.features), f"{d.scale:.3g}", f"{d.change:.3g}", f"{d.ratio:.3f}")
                for d in self.drifts
            ]
            text += "\n\n" + _columns(rows, 0)
        if self.unconstrained:
            text += f"\n\ntrained without a constraint: {compress_names(self.unconstrained)}"
        return text

    __str__ = table


def _columns(rows: Sequence[Sequence[str]], left: int) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    aligned = [
        [cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        for row in rows
    ]
    return "\n".join("  ".join(row).rstrip() for row in aligned)


def audit(
    model: Protection | nn.Module,
    basis: RefusalBasis | None = None,
    *,
    sites: str | Sequence[str] | None = None,
    chat: Chat | None = None,
    prompts: Sequence[str] | None = None,
    reference: nn.Module | None = None,
    latents: Latents | None = None,
    batch_size: int = 32,
) -> Audit:
    """Leak, and with prompts drift, of a protected model, a trained PEFT model or any fine-tuned model.

    Args:
        model: a Protection; or a PEFT model, compared with itself without adapters; or with `reference` any model of
            the same architecture (merged, fully fine-tuned).
        basis, sites: the basis and sites to measure; a Protection's own by default, and ("o_proj", "v_proj").
        chat, prompts: prompts on whose tokens drift is measured.
        reference: the untouched model, instead of the model without adapters.
        latents: layer -> (SAE, latent ids): drift of these latents instead of z U.

    Raises:
        TypeError, ValueError: arguments that do not belong together, or a model in which nothing was trained.
    """
    adapters: Sequence[str] | None = None
    unconstrained: list[str]
    if isinstance(model, Protection):
        protection, model = model, model.model
        adapters, basis = protection.adapters, basis or protection.basis
        if words := protection.unheld():
            warnings.warn(f"audit: {words}", ProtectionWarning, stacklevel=2)
        if sites is None and basis is protection.basis and reference is None:
            found = Audit(protection.leaks(), unconstrained=list(protection.unconstrained))
            return _with_drift(found, model, basis, chat, prompts, reference, latents, batch_size)
    if basis is None:
        raise ValueError("basis: needed, unless the model is a Protection")
    chosen = ("o_proj", "v_proj") if sites is None else sites
    if reference is not None:
        leaks, unconstrained = _dense(model, reference, basis, chosen)
    else:
        peft_model = check_peft_model(model, "model")
        names = adapter_names(peft_model, adapters)
        adapted = adapted_modules(peft_model, names)
        constraints = constraints_for(peft_model.get_base_model(), list(adapted.linears), basis, chosen)
        _check_any(constraints, adapted.paths)
        leaks = [lora_leak(adapted.linears[c.module], names, c) for c in constraints]
        unconstrained = _rest(adapted.paths, constraints)
    return _with_drift(Audit(leaks, [], unconstrained), model, basis, chat, prompts, reference, latents, batch_size)


def _check_any(constraints: Sequence[Constraint], trained: Sequence[str]) -> None:
    if not constraints:
        raise ValueError(
            f"sites: hold none of the trained modules, {compress_names(trained) or 'of which there are none'}"
        )


def _rest(trained: Sequence[str], constraints: Sequence[Constraint]) -> list[str]:
    held = {c.module for c in constraints}
    return [path for path in trained if path not in held]


def _dense(
    model: nn.Module, reference: nn.Module, basis: RefusalBasis, sites: str | Sequence[str]
) -> tuple[list[Leak], list[str]]:
    """Leaks of dW = W' - W, layer by layer, for models that need not have adapters."""
    inside = model.get_base_model() if isinstance(model, PeftModel) else model
    modules = dict(inside.named_modules())
    moved = []
    for path, before in reference.named_modules():
        if not isinstance(before, nn.Linear):
            continue
        after = modules.get(path)
        if after is None or base_weight(after).shape != base_weight(before).shape:
            raise ValueError(f"reference: its {path} has no counterpart of its shape in the model")
        if not torch.equal(_effective(after), base_weight(before).to(_effective(after).device)):
            moved.append(path)
    constraints = constraints_for(reference, moved, basis, sites)
    _check_any(constraints, moved)
    leaks = []
    for c in constraints:
        after = _effective(modules[c.module])
        leaks.append(dense_leak(after - base_weight(reference.get_submodule(c.module)).to(after.device), c))
    return leaks, _rest(moved, constraints)


def _effective(module: nn.Module) -> Tensor:
    """W + dW of a linear layer with or without adapters, fp32."""
    weight = base_weight(module)
    for name in getattr(module, "active_adapters", ()) if not getattr(module, "merged", False) else ():
        if name in getattr(module, "lora_A", ()):
            weight = weight + module.get_delta_weight(name).detach().float()  # type: ignore[operator]
    return weight


def _with_drift(
    found: Audit,
    model: nn.Module,
    basis: RefusalBasis,
    chat: Chat | None,
    prompts: Sequence[str] | None,
    reference: nn.Module | None,
    latents: Latents | None,
    batch_size: int,
) -> Audit:
    if prompts is None and latents is None and chat is None:
        return found
    if chat is None or not prompts:
        raise ValueError("prompts: drift needs chat and at least one prompt")
    layers = sorted(latents if latents is not None else basis.z)
    if not layers:
        raise ValueError("basis: has no directions in z and no latents were given, so there is no drift to measure")
    sums = {layer: torch.zeros(2, dtype=torch.float64) for layer in layers}
    counts = dict.fromkeys(layers, 0)
    for start in range(0, len(prompts), batch_size):
        batch = chat.prompt_batch(prompts[start : start + batch_size])
        with capture(model, layers) as seen:
            after = seen.run(batch)
        if reference is None:
            assert isinstance(model, PeftModel)
        without = model.disable_adapter() if reference is None else nullcontext()  # type: ignore[operator]
        with without, capture(model if reference is None else reference, layers) as seen:
            before = seen.run(batch)
        for layer in layers:
            f = _features(before[layer], layer, basis, latents)
            change = (_features(after[layer].to(before[layer].device), layer, basis, latents) - f).abs().sum()
            sums[layer] += torch.stack([f.abs().sum(), change]).double().cpu()
            counts[layer] += f.numel()
    width = {layer: len(latents[layer][1]) if latents is not None else basis.z[layer].shape[1] for layer in layers}
    for layer in layers:
        scale, change = (sums[layer] / counts[layer]).tolist()
        found.drifts.append(Drift(layer, width[layer], scale, change))
    return found


@torch.no_grad()
def _features(z: Tensor, layer: int, basis: RefusalBasis, latents: Latents | None) -> Tensor:
    """[tokens, r] fp32: z U, or the activations of the chosen latents."""
    if latents is None:
        return z.float() @ basis.z[layer].to(z.device, torch.float32)
    sae, chosen = latents[layer]
    ids = torch.as_tensor(list(chosen), device=z.device)
    values, indices = sae.encode(z.to(sae.W_enc.dtype))
    return (values[:, :, None] * (indices[:, :, None] == ids)).sum(1).float()
