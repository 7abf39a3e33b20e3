"""SaLoRA (Li et al., arXiv 2501.01765): an adapter behind a fixed projector that leaves safety outputs alone.

Per target weight W [out, in], from the inputs X_s [n, in] of the response tokens of harmful prompts with the model's
own refusals, and the inputs X_t of task samples:

    V_s = top right singular vectors of X_s W^T [out, safety_rank]        C = I - V_s V_s^T, fixed
    V_d = top right singular vectors of X_t W^T [out, task_rank]
    W = U2 S V2 (rank r)        B_0 = V_d V_d^T U2 S^½ [out, r]        A_0 = S^½ V2^T [r, in]
    W <- W - (alpha / r) C B_0 A_0                forward  W x + (alpha / r) C B A x

The published scale has r = alpha, where alpha / r is 1; with the factor in the first place as well, the model before
training is the untouched model at any scale. For X_t the answers' tokens are taken, as for X_s.

The trained adapter is saved as an ordinary one on the *untouched* base model: W + (alpha / r) (C B A - C B_0 A_0) is
LoRA of rank 2r with B' = [C B, -C B_0] and A' = [A; A_0]. Plain PEFT opens it, without changed base weights and without
this package.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import atomic_file
from ..prompts.chat import Chat, by_length, device_of
from .safelora import lora_layers


@dataclass
class ModuleStart:
    """What SaLoRA fixes of one module before training: v_s [out, safety_rank], b_0 [out, r], a_0 [r, in], all fp32."""

    v_s: Tensor
    b_0: Tensor
    a_0: Tensor


def module_start(weight: Tensor, x_s: Tensor, x_t: Tensor, r: int, safety_rank: int, task_rank: int) -> ModuleStart:
    """The formulas above for one weight, in fp32.

    Args:
        weight: W [out, in].
        x_s, x_t: inputs [tokens, in] at safety and task answers.

    Raises:
        ValueError: a safety rank that leaves nothing of the output free, or ranks that the samples do not have.
    """
    weight, x_s, x_t = weight.float(), x_s.float(), x_t.float()
    out = weight.shape[0]
    if safety_rank >= out:
        raise ValueError(
            f"salora_safety_rank: expected less than the {out} outputs of the weight, got {safety_rank}: nothing would "
            "be left to train"
        )
    for name, rank, x in (("safety", safety_rank, x_s), ("task", task_rank, x_t)):
        if rank > min(len(x), out):
            raise ValueError(
                f"salora_{name}_rank: expected at most {min(len(x), out)}, for {len(x)} tokens and {out} outputs; "
                f"got {rank}"
            )
    v_s = _right_singular(x_s @ weight.T, safety_rank)
    v_d = _right_singular(x_t @ weight.T, task_rank)
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    if r > len(s):
        raise ValueError(f"r: expected at most the {len(s)} singular values of the weight, got {r}")
    root = s[:r].sqrt()
    return ModuleStart(v_s, v_d @ (v_d.T @ (u[:, :r] * root)), (root[:, None] * vh[:r]).contiguous())


def _right_singular(y: Tensor, rank: int) -> Tensor:
    return torch.linalg.svd(y, full_matrices=False).Vh[:rank].T.contiguous()


@torch.inference_mode()
def answer_inputs(
    model: nn.Module,
    chat: Chat,
    questions: Sequence[tuple[str, str]],
    modules: dict[str, nn.Module],
    batch_size: int = 16,
) -> dict[str, Tensor]:
    """The inputs [tokens, in] that `modules` get at the answers' tokens, on the CPU, in their own dtype."""
    encoded = [chat.encode(prompt, answer) for prompt, answer in questions]
    kept: dict[str, list[Tensor]] = {name: [] for name in modules}
    at = torch.empty(0)

    def keep(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        kept[name].append(args[0][at].cpu())

    handles = [module.register_forward_pre_hook(partial(keep, name)) for name, module in modules.items()]
    try:
        for rows in by_length([len(e.ids) for e in encoded], batch_size):
            batch = chat.batch([encoded[i] for i in rows]).to(device_of(model))
            at = batch.targets
            model(**batch.inputs, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.cat(parts) for name, parts in kept.items()}


def find_starts(
    model: nn.Module,
    chat: Chat,
    refusals: Sequence[tuple[str, str]],
    tasks: Sequence[tuple[str, str]],
    *,
    r: int,
    safety_rank: int = 32,
    task_rank: int = 32,
) -> dict[str, ModuleStart]:
    """What SaLoRA fixes, for every adapted module of a fresh PeftModel, whose B is still 0.

    Args:
        refusals: (harmful prompt, the model's own refusal).  tasks: (prompt, answer) of the data to be learned.

    Raises:
        ValueError: as `module_start`, with the module's name.
    """
    layers = {name: layer.base_layer for name, layer in lora_layers(model)}
    safe, task = (answer_inputs(model, chat, questions, layers) for questions in (refusals, tasks))
    starts = {}
    for name, layer in layers.items():
        weight = layer.weight.detach()
        try:
            x_s, x_t = safe.pop(name).to(weight.device), task.pop(name).to(weight.device)
            starts[name] = module_start(weight, x_s, x_t, r, safety_rank, task_rank)
        except ValueError as error:
            raise ValueError(f"{error} (in {name})") from error
    return starts


def save_starts(path: Path, starts: dict[str, ModuleStart]) -> None:
    """Writes them as safetensors: a resumed run must continue behind the same projectors."""
    from safetensors.torch import save_file

    tensors = {f"{name}.{part}": getattr(s, part).cpu() for name, s in starts.items() for part in ("v_s", "b_0", "a_0")}
    with atomic_file(path) as temporary:
        save_file(tensors, temporary)


def load_starts(path: Path) -> dict[str, ModuleStart]:
    """What `save_starts` wrote."""
    from safetensors.torch import load_file

    tensors = load_file(path)
    names = dict.fromkeys(name.rpartition(".")[0] for name in tensors)
    return {name: ModuleStart(*(tensors[f"{name}.{part}"] for part in ("v_s", "b_0", "a_0"))) for name in names}


class SaLoRA:
    """Puts the starts into a fresh PeftModel: changes W, sets A and B, projects what B gives out.

    Args:
        model: a PeftModel with the adapter "default", LoRA without DoRA.
        starts: one per adapted module.

    The base weights stay changed until `deploy`.
    """

    @torch.no_grad()
    def __init__(self, model: Any, starts: dict[str, ModuleStart]) -> None:
        self.model, self.starts = model, starts
        self._kept: dict[str, Tensor] = {}
        self._parts: dict[str, tuple[Any, ModuleStart]] = {}
        self._handles: list[Any] = []
        for name, layer in lora_layers(model):
            device = layer.base_layer.weight.device
            start = ModuleStart(*(part.to(device) for part in (starts[name].v_s, starts[name].b_0, starts[name].a_0)))
            weight, a, b = layer.base_layer.weight, layer.lora_A["default"], layer.lora_B["default"]
            self._kept[name] = weight.detach().cpu().clone()
            change = layer.scaling["default"] * _project(start.b_0, start.v_s) @ start.a_0
            weight.copy_(weight.float() - change)
            a.weight.copy_(start.a_0)
            b.weight.copy_(start.b_0)
            self._handles.append(b.register_forward_hook(partial(_project_output, start.v_s)))
            self._parts[name] = (layer, start)

    @torch.no_grad()
    def deploy(self) -> Any:
        """Gives W its untouched values back and returns the model with one ordinary adapter of rank 2r."""
        from peft import get_peft_model

        for handle in self._handles:
            handle.remove()
        factors: dict[str, tuple[Tensor, Tensor]] = {}
        for name, (layer, start) in self._parts.items():
            layer.base_layer.weight.copy_(self._kept[name])
            a, b = layer.lora_A["default"].weight.float(), layer.lora_B["default"].weight.float()
            both = torch.cat([_project(b, start.v_s), -_project(start.b_0, start.v_s)], 1)
            factors[name] = both, torch.cat([a, start.a_0])
        config = self.model.peft_config["default"]
        plain = self.model.unload()
        # The scale stays alpha / r.
        config = dataclasses.replace(config, r=2 * config.r, lora_alpha=2 * config.lora_alpha)
        deployed = get_peft_model(plain, config)
        for name, layer in lora_layers(deployed):
            b, a = factors[name]
            layer.lora_B["default"].weight.copy_(b)
            layer.lora_A["default"].weight.copy_(a)
        return deployed


def _project(b: Tensor, v: Tensor) -> Tensor:
    """C B = (I - V V^T) B."""
    return b - v @ (v.T @ b)


def _project_output(v: Tensor, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
    # Outside autocast: rounding V to bf16 would leave a 2^-9 of the output in the space that is to stay untouched.
    with torch.autocast(out.device.type, enabled=False):
        wide = out.float()
        return (wide - (wide @ v) @ v.T).to(out.dtype)
