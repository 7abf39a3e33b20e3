"""The hallucination direction as weights: a rank-1 LoRA fine-tuned on wrong answers, to be subtracted.

The adapter stays beside the weights and its scale is set to -beta, so nothing is merged and nothing has to be undone.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import atomic_file
from ..hooks import Positions
from ..prompts.chat import Chat, device_of
from ..prompts.records import ContrastPair
from .dials import Dial

_NAME = "default"


@dataclass(frozen=True)
class LoraSettings:
    """Of the fine-tuning on wrong answers: AdamW without weight decay on all linear modules but the lm_head."""

    steps: int = 40
    batch_size: int = 16
    learning_rate: float = 3e-3

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1 or not self.learning_rate > 0:
            raise ValueError(f"lora: expected steps and batch_size from 1 on and learning_rate > 0, got {self}")


class WrongAnswerLora:
    """The adapter on the model; `attached` makes one."""

    def __init__(self, adapted: Any) -> None:
        self.model: nn.Module = adapted
        self._layers = [module for module in adapted.modules() if hasattr(module, "lora_A") and _NAME in module.lora_A]
        self._scale = [float(module.scaling[_NAME]) for module in self._layers]
        self.losses: list[float] = []

    def weights(self) -> list[tuple[Tensor, Tensor]]:
        """(A [1, in], B [out, 1]) of every adapted module, the parameters themselves."""
        return [(m.lora_A[_NAME].weight, m.lora_B[_NAME].weight) for m in self._layers]

    @torch.no_grad()
    def load(self, weights: Sequence[tuple[Tensor, Tensor]]) -> None:
        for (a, b), (new_a, new_b) in zip(self.weights(), weights, strict=True):
            a.copy_(new_a)
            b.copy_(new_b)

    @torch.no_grad()
    def random_like(self, weights: Sequence[tuple[Tensor, Tensor]], seed: int) -> list[tuple[Tensor, Tensor]]:
        """Random rank-1 updates B A of the Frobenius norm that each module's has."""
        generator = torch.Generator().manual_seed(seed)

        def draw(like: Tensor) -> Tensor:
            values = torch.randn(like.shape, generator=generator)
            return (values / values.norm() * like.norm().cpu()).to(like)

        return [(draw(a), draw(b)) for a, b in weights]

    @contextmanager
    def scaled(self, factor: float) -> Iterator[None]:
        """Inside, the update counts `factor` times; outside a `scaled`, as if it were not there."""
        for module, scale in zip(self._layers, self._scale, strict=True):
            module.enable_adapters(True)
            module.scaling[_NAME] = factor * scale
        try:
            yield
        finally:
            self.off()

    def off(self) -> None:
        """The modules compute what they did without the adapter."""
        for module in self._layers:
            module.enable_adapters(False)

    def train(
        self, chat: Chat, pairs: Sequence[ContrastPair], settings: LoraSettings, seed: int, progress: bool
    ) -> None:
        """Fine-tunes on the pairs' wrong answers (`rejected`), the loss on answer tokens only."""
        from tqdm.auto import trange

        encoded = [chat.encode(pair.prompt, pair.rejected) for pair in pairs]
        parameters = [p for pair in self.weights() for p in pair]
        optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)
        generator = torch.Generator().manual_seed(seed)
        order: list[int] = []
        self.losses = []
        with torch.enable_grad(), self.scaled(1.0):
            for _ in trange(settings.steps, desc="wrong-answer LoRA", unit="step", disable=not progress, leave=False):
                while len(order) < settings.batch_size:
                    order += torch.randperm(len(encoded), generator=generator).tolist()
                rows, order = order[: settings.batch_size], order[settings.batch_size :]
                batch = chat.batch([encoded[i] for i in rows]).to(device_of(self.model))
                loss = self.model(**batch.inputs, labels=batch.labels, use_cache=False).loss
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                self.losses.append(float(loss.detach()))


@contextmanager
def attached(model: nn.Module, seed: int) -> Iterator[WrongAnswerLora]:
    """An untrained rank-1 LoRA (alpha 1) on all linear modules of `model` but the lm_head; off outside `scaled`.

    On leaving, the modules are the model's own again.

    Raises:
        ValueError: `model` already carries an adapter.
    """
    from peft import LoraConfig, PeftModel, get_peft_model

    if isinstance(model, PeftModel):
        raise ValueError("model: expected one without an adapter; merge it first (merge_and_unload)")
    # PEFT freezes what it wraps; the flags are the caller's.
    trainable = [p for p in model.parameters() if p.requires_grad]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LoraConfig(r=1, lora_alpha=1, target_modules="all-linear", task_type="CAUSAL_LM")
        with warnings.catch_warnings():  # PEFT asks transformers by a name that the latter has deprecated
            warnings.simplefilter("ignore", FutureWarning)
            adapted = get_peft_model(model, config)  # type: ignore[arg-type]
    adapted.eval()
    try:
        lora = WrongAnswerLora(adapted)
        lora.off()
        yield lora
    finally:
        adapted.unload()
        if hasattr(model, "peft_config"):
            del model.peft_config
        for parameter in trainable:
            parameter.requires_grad_(True)


def trained(
    lora: WrongAnswerLora,
    chat: Chat,
    pairs: Sequence[ContrastPair],
    settings: LoraSettings,
    seed: int,
    kept: Path | None,
    progress: bool,
) -> list[tuple[Tensor, Tensor]]:
    """Trains `lora` and returns its weights; those in the file `kept`, if there is one, are taken instead."""
    from safetensors.torch import load_file, save_file

    if kept is not None and kept.is_file():
        saved = load_file(kept)
        lora.load([(saved[f"{i}.A"], saved[f"{i}.B"]) for i in range(len(saved) // 2)])
    else:
        lora.train(chat, pairs, settings, seed, progress)
        if kept is not None:
            with atomic_file(kept) as temporary:
                flat = {f"{i}.{n}": t for i, ab in enumerate(lora.weights()) for n, t in zip("AB", ab, strict=True)}
                save_file({name: t.detach().cpu().contiguous() for name, t in flat.items()}, temporary)
    return [(a.detach().clone(), b.detach().clone()) for a, b in lora.weights()]


def lora_dial(
    lora: WrongAnswerLora,
    weights: Sequence[tuple[Tensor, Tensor]],
    betas: Sequence[float],
    control: str = "",
    seed: int = 0,
) -> Dial:
    """beta times the update of `weights` subtracted."""

    def apply(beta: float, positions: Positions) -> AbstractContextManager[None]:
        lora.load(weights)
        return lora.scaled(-beta)

    return Dial("lora", control, seed, tuple(betas), apply, f"{len(weights)} linear modules")
