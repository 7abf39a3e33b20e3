"""TrainConfig: every setting of a training run, its default, its meaning, and which of them may change on resume."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import torch

from .models import resolve_device

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# The annotations of TrainConfig's plain fields, and what a value may be: a config may come from a file.
_KINDS: dict[str, tuple[type, ...]] = {"str": (str,), "bool": (bool,), "int": (int,), "float": (float, int)}

# Settings that do not touch the arithmetic of the run: a resumed run may change them and still end in the same bits.
FREE_ON_RESUME = frozenset(
    {
        "out",
        "checkpoint_every",
        "keep_checkpoints",
        "log_every",
        "eval_tokens",
        "loss_after",
        "trackers",
        "trust_remote_code",
    }
)


@dataclass
class TrainConfig:
    """Settings of a training run. Where no source is named the default is this project's own.

    What to train on:
        model: "builtin", a folder, or a hub name: anything `AutoModelForCausalLM` loads whose layers have
            `self_attn.o_proj`.
        data: "builtin", a file (.txt, .jsonl, .parquet, .csv), a folder of such files, or the name of a hub data set.
        text_field, split, data_config, streaming: which column, split and configuration of it; read it as a stream.
        layers: decoder layers whose o_proj input is learned, one SAE each, all in one pass of the model. Empty: the
            middle layer.
        context_length: tokens per sequence.  sequences: sequences per forward pass of the model.
        buffer_tokens: tokens in the shuffle buffer, at least 2 batches: buffer_tokens x d_in x layers x 4 bytes
            (2 in bf16). None: 8 batches.
        eval_tokens: held-out tokens for the evaluation at the end, from documents that are never trained on.
        loss_after: in the evaluation, count the model's loss only after this token of a document, e.g. what opens
            answers. None: everywhere (with the built-in corpus: after "<asst>", where the tokenizer has that token).
        trust_remote_code: run Python code that comes with a hub model.

    The SAE (Gao et al., arXiv 2406.04093):
        k: active latents per token.  expansion: latents per input dimension, F = expansion x d_in.  latents: F itself;
            it overrides expansion.

    Optimisation:
        tokens: training tokens in total.  batch_tokens: tokens per step.
        lr: peak rate of Adam; None means 2e-4 (F / 16384)^-0.5, the 1/sqrt(F) law of Gao et al., section 3.
        warmup_fraction, decay_fraction: share of the steps that rise linearly from 0 and fall linearly to 0.
        betas, eps: Adam's.
        aux_alpha, k_aux, dead_after_tokens: AuxK's weight, its number of latents (None: d_in // 2), and how many tokens
            without firing make a latent dead. Gao et al., A.2: 1/32, about d/2, 10M.
        max_grad_norm: clip the gradient of each SAE to this global norm; None turns it off. Clipping needs the whole
            gradient before the first weight may move, so the optimiser is then not fused into the backward pass.
        dtype: of the model and the activations. The SAE's weights are always fp32; with bfloat16 on a GPU the matrix
            products run in bf16 under autocast, and the optimiser keeps the weights' copies for it, 2 bytes a weight.
        moments: float32 or bfloat16, of Adam's moments of the SAE's two matrices. In bfloat16 they are rounded
            stochastically (refusal_kernels.compact) and take half.
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1".  backend: of the operators; None chooses.
        seed: of initialisation, document order and shuffling.

    Output:
        out: the run's folder.  checkpoint_every: steps between checkpoints, 0 for none but the last.
        keep_checkpoints: how many stay.  log_every: steps between log lines (one host synchronisation each).
        trackers: names for accelerate ("tensorboard", "wandb", ...).

    Memory of a run: the model; 6 x F x d_in x 4 bytes per layer for the SAE and Adam's two moments (8 x with clipping,
    which holds the gradient; 4 x and 6 x with moments in bfloat16); the buffer as above.
    """

    model: str = "builtin"
    data: str = "builtin"
    layers: list[int] = field(default_factory=list)
    out: str = "sae-run"
    text_field: str = "text"
    split: str = "train"
    data_config: str | None = None
    streaming: bool = False
    context_length: int = 128
    sequences: int = 16
    buffer_tokens: int | None = None
    eval_tokens: int = 65_536
    loss_after: str | None = None
    trust_remote_code: bool = False

    k: int = 64
    expansion: int = 16
    latents: int | None = None

    tokens: int = 10_000_000
    batch_tokens: int = 8192
    lr: float | None = None
    warmup_fraction: float = 0.05
    decay_fraction: float = 0.2
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    aux_alpha: float = 1 / 32
    k_aux: int | None = None
    dead_after_tokens: int = 10_000_000
    max_grad_norm: float | None = None
    dtype: str = "float32"
    moments: str = "float32"
    device: str = "auto"
    backend: str | None = None
    seed: int = 0

    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    log_every: int = 20
    trackers: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            kind, _, optional = str(f.type).partition(" | ")
            value = getattr(self, f.name)
            if kind not in _KINDS or (optional and value is None):
                continue
            if not isinstance(value, _KINDS[kind]) or (isinstance(value, bool) and kind != "bool"):
                raise TypeError(f"{f.name} must be of type {f.type}; got {value!r}")
        for name in ("layers", "betas", "trackers"):
            if not isinstance(getattr(self, name), (list, tuple)):
                raise TypeError(f"{name} must be a list; got {getattr(self, name)!r}")
        self._require("betas", len(self.betas) == 2, "be two numbers")
        # JSON and the command line give lists and strings; one form inside, so that two configs compare equal.
        self.layers = sorted({int(layer) for layer in self.layers})
        self.betas = (float(self.betas[0]), float(self.betas[1]))
        self.trackers = list(self.trackers)
        for name, least in (
            ("context_length", 2),
            ("sequences", 1),
            ("k", 1),
            ("expansion", 1),
            ("tokens", 1),
            ("batch_tokens", 1),
            ("dead_after_tokens", 1),
            ("checkpoint_every", 0),
            ("keep_checkpoints", 1),
            ("log_every", 1),
            ("eval_tokens", 1),
        ):
            self._require(name, getattr(self, name) >= least, f"be at least {least}")
        for name in ("latents", "k_aux", "buffer_tokens"):
            self._require(name, getattr(self, name) is None or getattr(self, name) >= 1, "be at least 1, or None")
        self._require(
            "buffer_tokens",
            self.buffer_tokens is None or self.buffer_tokens >= 2 * self.batch_tokens,
            f"be at least 2 batches = {2 * self.batch_tokens}, or None",
        )
        self._require("seed", 0 <= self.seed < 2**63, "be at least 0 and below 2^63")
        self._parsed_device()
        self._require("layers", all(layer >= 0 for layer in self.layers), "be layer numbers from 0")
        for name in ("warmup_fraction", "decay_fraction"):
            self._require(name, 0 <= getattr(self, name) <= 1, "lie in [0, 1]")
        self._require(
            "decay_fraction", self.warmup_fraction + self.decay_fraction <= 1, "leave room: warm-up + decay <= 1"
        )
        self._require("lr", self.lr is None or (self.lr > 0 and math.isfinite(self.lr)), "be positive, or None")
        self._require("betas", all(0 <= beta < 1 for beta in self.betas), "lie in [0, 1)")
        self._require("eps", self.eps > 0, "be positive")
        self._require("aux_alpha", self.aux_alpha >= 0, "be at least 0")
        self._require("max_grad_norm", self.max_grad_norm is None or self.max_grad_norm > 0, "be positive, or None")
        for name in ("dtype", "moments"):
            self._require(name, getattr(self, name) in DTYPES, f"be one of {', '.join(DTYPES)}")

    def _require(self, name: str, holds: bool, expectation: str) -> None:
        if not holds:
            raise ValueError(f"{name} must {expectation}; got {getattr(self, name)!r}")

    @property
    def total_steps(self) -> int:
        """Steps of the whole run: tokens / batch_tokens, rounded up."""
        return math.ceil(self.tokens / self.batch_tokens)

    def n_latents(self, d_in: int) -> int:
        """F for activations of width d_in."""
        return self.latents if self.latents is not None else self.expansion * d_in

    def peak_lr(self, n_latents: int) -> float:
        """The given rate, or 2e-4 (F / 16384)^-0.5."""
        return self.lr if self.lr is not None else 2e-4 * (n_latents / 16384) ** -0.5

    def lr_factor(self, step: int) -> float:
        """The share of the peak rate at `step` (0-based): linear warm-up, plateau, linear decay to 1 / decay steps."""
        total = self.total_steps
        warmup = round(self.warmup_fraction * total)
        decay = round(self.decay_fraction * total)
        rise = (step + 1) / warmup if step < warmup else 1.0
        fall = (total - step) / decay if step > total - decay else 1.0
        return min(rise, fall)

    def resolved_device(self) -> torch.device:
        """The device that `device` means on this machine; ValueError where there is none such."""
        return resolve_device(self.device)

    def _parsed_device(self) -> torch.device | None:
        # Whether the machine has it is asked later: a run's settings can be read on another one.
        try:
            return None if self.device == "auto" else torch.device(self.device)
        except RuntimeError:
            raise ValueError(f"device must be auto, cpu, cuda or cuda:N; got {self.device!r}") from None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "config") -> TrainConfig:
        """The config that `to_dict` wrote into `source`; ValueError names the source and what is wrong."""
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(values.keys() - known):
            raise ValueError(f"{source}: unknown settings {', '.join(unknown)}")
        try:
            return cls(**values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{source}: {error}") from None

    def differences(self, other: TrainConfig) -> list[str]:
        """`name is mine (the run has theirs)` for every setting that may not change on resume and does."""
        mine, theirs = self.to_dict(), other.to_dict()
        return [
            f"{name} is {mine[name]!r} (the run has {theirs[name]!r})"
            for name in mine
            if name not in FREE_ON_RESUME and mine[name] != theirs[name]
        ]
