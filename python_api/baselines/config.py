"""FinetuneConfig: every setting of a fine-tuning run, its default and where the default comes from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

Method = Literal["sft", "lora", "safelora", "salora", "gradient", "update", "weight", "forward"]
METHODS: tuple[str, ...] = get_args(Method)
PROJECTIONS = ("gradient", "update", "weight", "forward")  # the modes of `protection.protect`

# Settings that change neither data nor arithmetic: a resumed run may set them otherwise.
FREE_ON_RESUME = frozenset({"checkpoint_every", "keep_checkpoints", "log_every"})


@dataclass(frozen=True)
class FinetuneConfig:
    """Settings of `finetune`. The paper publishes none of its own; the defaults are the usual ones of LoRA.

    method:
        "sft" (every weight), "lora" (arXiv 2106.09685), "safelora" (2405.16833), "salora" (2501.01765), or LoRA that is
        kept off a refusal basis in one of the four modes of `protection.protect`: "gradient", "update", "weight",
        "forward".

    LoRA:
        r, alpha, dropout: rank, scale (dW = alpha / r B A), dropout before A.
        targets: ends of module names, or ("all-linear",) for every linear layer but the output; None means q_proj,
            v_proj and o_proj, with SaLoRA q_proj and v_proj, as published.

    Optimisation:
        lr, weight_decay, optimizer: "adamw" or "sgd" (under which the gradient mode is exact).
        batch_size, accumulate: dialogues per forward pass; passes per step.
        epochs, steps: passes over the data; steps overrides them.
        warmup: share of the steps with a rising rate; it falls linearly to 0 after them.
        max_grad_norm: the gradient is clipped to this norm.
        max_length: tokens of prompt and answer; longer dialogues are left out, with a warning.
        gradient_checkpointing: less memory for more time.
        bf16: autocast to bfloat16; the weights stay as they were loaded.
        seed: of A's initial values, dropout, the order of the data, and which poison is drawn.

    Data:
        poison_fraction: share of the final data that is poison, from 0 to below 1.

    Protection (the four projection modes):
        sites: of `protection.protect`; None is its default.  strength: 1 removes the component, 0 nothing.

    SafeLoRA:
        safelora_select: "threshold" projects where the cosine is at most safelora_threshold, "number" the
            safelora_number modules of smallest cosine.
        safelora_exact: the projector on the top-r left singular vectors of V in place of V V^T / ||V||.

    SaLoRA:
        salora_safety_rank, salora_task_rank: directions held fixed, and written to at the start, per module.
        salora_samples: harmful prompts with the model's own refusals, and task samples, of each at most this many.

    Output:
        checkpoint_every: steps between checkpoints; 0 for none but that of an interruption.
        keep_checkpoints: how many stay.  log_every: steps between log lines.
    """

    method: str = "lora"

    r: int = 16
    alpha: int = 16
    dropout: float = 0.0
    targets: tuple[str, ...] | None = None

    lr: float = 1e-4
    weight_decay: float = 0.0
    optimizer: str = "adamw"
    batch_size: int = 16
    accumulate: int = 1
    epochs: float = 1.0
    steps: int | None = None
    warmup: float = 0.03
    max_grad_norm: float = 1.0
    max_length: int = 1024
    gradient_checkpointing: bool = False
    bf16: bool = False
    seed: int = 0

    poison_fraction: float = 0.0

    sites: tuple[str, ...] | None = None
    strength: float = 1.0

    safelora_select: str = "threshold"
    safelora_threshold: float = 0.5
    safelora_number: int = 10
    safelora_exact: bool = False

    salora_safety_rank: int = 32
    salora_task_rank: int = 32
    salora_samples: int = 128

    checkpoint_every: int = 0
    keep_checkpoints: int = 2
    log_every: int = 10

    def __post_init__(self) -> None:
        for name in ("targets", "sites"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        _one_of(self, "method", METHODS)
        _one_of(self, "optimizer", ("adamw", "sgd"))
        _one_of(self, "safelora_select", ("threshold", "number"))
        for name in ("r", "alpha", "batch_size", "accumulate", "max_length", "keep_checkpoints", "log_every"):
            _at_least(self, name, 1)
        for name in ("safelora_number", "salora_safety_rank", "salora_task_rank", "salora_samples"):
            _at_least(self, name, 1)
        _at_least(self, "checkpoint_every", 0)
        if self.steps is not None:
            _at_least(self, "steps", 1)
        for name in ("lr", "epochs", "max_grad_norm"):
            _within(self, name, "above 0", lambda value: value > 0)
        _within(self, "weight_decay", "from 0 on", lambda value: value >= 0)
        for name in ("dropout", "poison_fraction"):
            _within(self, name, "from 0 to below 1", lambda value: 0 <= value < 1)
        for name in ("warmup", "strength"):
            _within(self, name, "from 0 to 1", lambda value: 0 <= value <= 1)
        _within(self, "safelora_threshold", "from -1 to 1", lambda value: -1 <= value <= 1)
        if self.method == "sft" and self.targets is not None:
            raise ValueError(f"targets: expected None with method 'sft', which trains every weight; got {self.targets}")

    @property
    def uses_adapter(self) -> bool:
        return self.method != "sft"

    @property
    def lora_targets(self) -> str | list[str]:
        """What PEFT's `target_modules` takes."""
        if self.targets is None:
            return ["q_proj", "v_proj"] if self.method == "salora" else ["q_proj", "v_proj", "o_proj"]
        return "all-linear" if self.targets == ("all-linear",) else list(self.targets)

    def to_dict(self) -> dict[str, Any]:
        """As JSON keeps it."""
        return {
            name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str) -> FinetuneConfig:
        """The settings of a file; ValueError names `where` and the settings this version does not know."""
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"{where}: expected settings of this version, got {', '.join(unknown)}")
        return cls(**values)


def _one_of(config: FinetuneConfig, name: str, allowed: tuple[str, ...]) -> None:
    if getattr(config, name) not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}; got {getattr(config, name)!r}")


def _at_least(config: FinetuneConfig, name: str, least: int) -> None:
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: expected a whole number from {least} on, got {value!r}")


def _within(config: FinetuneConfig, name: str, range_: str, fits: Callable[[float], bool]) -> None:
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not fits(value):
        raise ValueError(f"{name}: expected a number {range_}, got {value!r}")
