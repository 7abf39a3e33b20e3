"""What a PEFT model adapts: the LoRA layers of its adapters by path, and which of them a constraint can hold exactly.

LoRA on a linear layer adds dW = scaling * B A, A [r, in], B [out, r] (Hu et al. 2106.09685). A constraint on dW's input
is one on A, a constraint on its output one on B; that is exact as long as nothing else stands between the factors and
dW. DoRA, the other variants and the initialisations that rewrite the base weights put something there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

# These set W <- W - dW_0 and start from dW_0 != 0: projecting A or B would change the model before the first step.
_REWRITES_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")


@dataclass(frozen=True)
class Adapted:
    """The modules that adapters touch.

    Attributes:
        linears: path in the base model ("model.layers.3.self_attn.o_proj") -> LoRA layer whose factors are plain
            linears for every adapter asked for.
        others: path -> (why its update is no plain product of two linear factors, whether its base layer is linear).
    """

    linears: dict[str, LoraLayer]
    others: dict[str, tuple[str, bool]]

    @property
    def paths(self) -> list[str]:
        return [*self.linears, *self.others]

    @property
    def linear_paths(self) -> list[str]:
        """The paths whose base layer is linear, constrained exactly or not."""
        return [*self.linears, *(path for path, (_, linear) in self.others.items() if linear)]


def check_peft_model(model: Any, name: str = "peft_model") -> PeftModel:
    """`model` if it is a peft.PeftModel; TypeError that says what to pass instead."""
    if isinstance(model, PeftModel):
        return model
    if hasattr(model, "_orig_mod"):
        raise TypeError(f"{name}: got the result of torch.compile; protect the model first, then compile it")
    inside = getattr(model, "module", None)
    hint = "; protect the model before it is wrapped" if isinstance(inside, PeftModel) else " (peft.get_peft_model)"
    raise TypeError(f"{name}: expected a peft.PeftModel{hint}, got {type(model).__name__}")


def adapter_names(model: PeftModel, adapter: str | Sequence[str] | None) -> tuple[str, ...]:
    """The adapters meant: one by name, several, or None for all active ones. ValueError for one the model lacks."""
    if adapter is None:
        return tuple(model.active_adapters)
    names = (adapter,) if isinstance(adapter, str) else tuple(adapter)
    unknown = [name for name in names if name not in model.peft_config]
    if unknown or not names:
        raise ValueError(f"adapter: expected one of {sorted(model.peft_config)}, got {unknown or names}")
    return names


def check_exact(model: PeftModel, names: Iterable[str]) -> None:
    """ValueError unless every adapter is LoRA whose dW is scaling * B A on top of untouched base weights."""
    for name in names:
        config = model.peft_config[name]
        kind = getattr(config.peft_type, "value", config.peft_type)
        if kind != "LORA":
            raise ValueError(f"adapter: {name!r} is {kind}; only LoRA has factors that can be constrained exactly")
        if getattr(config, "use_dora", False):
            raise ValueError(
                f"adapter: {name!r} uses DoRA, whose magnitudes rescale W + dW, so that no constraint on the factors "
                "holds W's own reading and writing; train it with use_dora=False"
            )
        start = getattr(config, "init_lora_weights", True)
        if isinstance(start, str) and start.lower().startswith(_REWRITES_BASE):
            raise ValueError(
                f"adapter: {name!r} was made with init_lora_weights={start!r}, which moves a part of the base weights "
                "into the adapter: projecting it would change the model itself; use the default, 'gaussian', 'eva' or "
                "'orthogonal'"
            )
        if getattr(config, "layer_replication", None):
            raise ValueError(f"adapter: {name!r} uses layer_replication, so a basis' layers are not the model's")


def adapted_modules(model: PeftModel, names: Sequence[str]) -> Adapted:
    """Every module of the base model that one of the adapters `names` touches."""
    linears: dict[str, LoraLayer] = {}
    others: dict[str, tuple[str, bool]] = {}
    for path, module in model.get_base_model().named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        # ParamWrapper and other nested tuner layers repeat the path with .base_layer behind it.
        has = [name for name in names if any(name in getattr(module, part, {}) for part in module.adapter_layer_names)]
        if not has:
            continue
        why = _inexact(module, has)
        if why is None:
            assert isinstance(module, LoraLayer)
            linears[path] = module
        else:
            others[path] = (why, hasattr(module.get_base_layer(), "in_features"))
    return Adapted(linears, others)


def _inexact(module: BaseTunerLayer, names: Sequence[str]) -> str | None:
    if not isinstance(module, LoraLayer):
        return f"{type(module).__name__} is no LoRA layer"
    for name in names:
        if name in module.lora_embedding_A:
            return "LoRA on an embedding"
        if name in module.lora_variant:
            return f"the LoRA variant {type(module.lora_variant[name]).__name__}"
        if type(module).__name__ == "ParamWrapper":
            return "LoRA on a parameter of several matrices"
        for factor in (module.lora_A[name], module.lora_B[name]):
            if not isinstance(factor, nn.Linear):
                return f"LoRA factors of type {type(factor).__name__}"
        if module.lora_B[name].bias is not None:
            return "lora_bias adds a trained constant to the output"
    return None


def trained_outside(model: PeftModel) -> list[str]:
    """Parameters of the base model that are trained as a whole: modules_to_save, unfrozen weights, biases, tokens."""
    factors = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, BaseTunerLayer)
        for part in module.adapter_layer_names
        for parameter in _parameters(getattr(module, part, None))
    }
    return [
        name.removeprefix("base_model.model.")
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in factors
    ]


def trained_adapters(model: PeftModel) -> list[str]:
    """Names of the adapters of which a factor is trained."""
    found = {
        name
        for module in model.modules()
        if isinstance(module, BaseTunerLayer)
        for part in module.adapter_layer_names
        if isinstance(container := getattr(module, part, None), (nn.ModuleDict, nn.ParameterDict))
        for name, item in container.items()
        if any(p.requires_grad for p in ([item] if isinstance(item, nn.Parameter) else item.parameters()))
    }
    return sorted(found)


def _parameters(container: Any) -> Iterable[nn.Parameter]:
    if isinstance(container, (nn.ModuleDict, nn.ParameterDict)):
        return container.parameters()
    return ()


def base_weight(module: nn.Module) -> Tensor:
    """The weight [out, in] of the linear layer under adapters, fp32, dequantised where it is quantised."""
    from peft.utils.integrations import dequantize_module_weight

    inner = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    weight: Tensor = dequantize_module_weight(inner)
    if getattr(module, "fan_in_fan_out", False):
        weight = weight.T
    return weight.detach().float()


def compress_names(paths: Iterable[str]) -> str:
    """Module paths in as few words as possible: "model.layers.{0-4}.self_attn.{q_proj,k_proj}"."""
    indices: dict[tuple[str, str], list[int]] = {}
    for path in dict.fromkeys(paths):
        numbers = re.findall(r"(?<=\.)\d+(?=\.)", path)
        shape = re.sub(r"(?<=\.)\d+(?=\.)", "*", path, count=1)
        stem, _, leaf = shape.rpartition(".")
        indices.setdefault((stem, leaf), []).extend([int(numbers[0])] if numbers else [])
    merged: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for (stem, leaf), numbered in indices.items():
        merged.setdefault((stem, tuple(sorted(numbered))), []).append(leaf)
    words = []
    for (stem, found), leaves in merged.items():
        leaf = leaves[0] if len(leaves) == 1 else "{" + ",".join(leaves) + "}"
        text = f"{stem}.{leaf}" if stem else leaf
        words.append(text.replace("*", _ranges(found), 1) if found else text)
    return ", ".join(words)


def _ranges(numbers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    text = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return text if len(numbers) == 1 else "{" + text + "}"
