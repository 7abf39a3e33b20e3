"""Does raising truthfulness lower refusal? Three dials (`dials`), each swept, each beside its random controls.

The claim is arXiv 2510.07775's: truthfulness and refusal share heads, so turning the one turns the other. For every
point of every sweep: truthfulness and ASR with intervals (`measuring`). Where a dial raised ASR, the heads that should
carry refusal are restored in the changed model (`patching`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from ..checkpoint import read_json, write_json
from ..hooks import attention_geometry
from ..prompts.chat import Chat
from ..prompts.records import ContrastPair, HarmfulPrompt, check_disjoint, content_hash, set_hash
from .ablation import evaluating
from .adapter import LoraSettings, attached, lora_dial, trained
from .dials import Dial, Head, iti_dial, random_heads, scale_dial, truthful_directions
from .influence import DEFAULT_REFINE, find_heads, model_fingerprint, versions
from .measuring import Judge, Measurement, Probe, Share
from .patching import refusals_with_heads_restored
from .scores import HeadScores

FORMAT = "refusal-kernels-tradeoff-1"
DIALS = ("iti", "scale", "lora")
POSITIVE_CONTROL = "refusal"


@dataclass(frozen=True)
class TradeoffSettings:
    """What is swept.

    Attributes:
        alphas: strengths of `iti`, in standard deviations of z along the direction.
        factors: of `scale`; 1 would be the untouched model.
        betas: of `lora`; 0 would be the untouched model.
        control_seeds: draws of every control.
        lora: the fine-tuning on wrong answers.
        seed: of the LoRA's start and order, and the first of the controls.
    """

    alphas: tuple[float, ...] = (2.0, 5.0, 10.0, 20.0)
    factors: tuple[float, ...] = (0.75, 0.5, 0.25, 0.0)
    betas: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0)
    control_seeds: int = 3
    lora: LoraSettings = field(default_factory=LoraSettings)
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("alphas", "factors", "betas"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise ValueError(f"{name}: expected distinct strengths, at least one, got {values!r}")
        if self.control_seeds < 1:
            raise ValueError(f"control_seeds: expected at least 1, got {self.control_seeds}")


@dataclass(frozen=True)
class Point:
    """One strength of one dial or of one draw of its control ("" is the dial itself)."""

    dial: str
    control: str
    seed: int
    strength: float
    measured: Measurement


@dataclass(frozen=True)
class Restoration:
    """Refusals at the strength of a dial that raised ASR most.

    Attributes:
        changed: refused under the dial; untouched is the base measurement's.
        heads, by: the heads restored, and why these ("overlap" or "refusal": the top refusal heads).
        restored: refused with their z restored.
        random: the same with as many random heads, one per draw.
    """

    dial: str
    strength: float
    changed: Share
    heads: tuple[Head, ...]
    by: str
    restored: Share
    random: tuple[Share, ...]


@dataclass
class TradeoffResult:
    """What `tradeoff` returns.

    Attributes:
        base: the untouched model.
        points: dials and controls.
        restorations: one per dial whose highest ASR is above the base's.
        acts_on: per dial and control what it acts on, in words.
        scores: the heads.
        provenance: model, data, settings, versions.
    """

    base: Measurement
    points: list[Point]
    restorations: list[Restoration]
    acts_on: dict[str, str]
    scores: HeadScores
    provenance: dict[str, Any]

    def of(self, dial: str, control: str | None = None) -> list[Point]:
        """Points of a dial: its own ("" or None), or those of one control."""
        return [p for p in self.points if p.dial == dial and p.control == (control or "")]

    def controls(self, dial: str) -> list[str]:
        """The kinds of control of a dial."""
        return list(dict.fromkeys(p.control for p in self.points if p.dial == dial and p.control))

    def as_dict(self) -> dict[str, Any]:
        def point(p: Point) -> dict[str, Any]:
            return {"dial": p.dial, "control": p.control, "seed": p.seed, "strength": p.strength} | p.measured.as_dict()

        def restoration(r: Restoration) -> dict[str, Any]:
            shares = {"changed": r.changed.as_dict(), "restored": r.restored.as_dict()}
            return asdict(r) | shares | {"random": [s.as_dict() for s in r.random]}

        return {
            "format": FORMAT,
            "base": self.base.as_dict(),
            "points": [point(p) for p in self.points],
            "restorations": [restoration(r) for r in self.restorations],
            "acts_on": self.acts_on,
            "overlap": [list(head) for head in self.scores.overlap().heads],
            "provenance": self.provenance,
        }


def tradeoff(
    model: nn.Module,
    tokenizer_or_chat: Any,
    hallucination_pairs: Sequence[ContrastPair],
    refusal_pairs: Sequence[ContrastPair],
    test_pairs: Sequence[ContrastPair],
    harmful: Sequence[HarmfulPrompt],
    *,
    settings: TradeoffSettings | None = None,
    top: int | None = None,
    refusal_beginnings: bool = False,
    judge: Judge | None = None,
    exact_answers: bool = False,
    max_new_tokens: int = 48,
    batch_size: int = 64,
    out: str | Path | None = None,
    resume: bool = True,
    progress: bool = True,
    model_name: str | None = None,
) -> TradeoffResult:
    """Sweeps the three dials and their controls.

    Args:
        model: transformers causal LM without an adapter; it is left as it was.
        tokenizer_or_chat: a tokenizer, or a Chat.
        hallucination_pairs, refusal_pairs: for calibration: heads, directions and the LoRA's wrong answers.
        test_pairs, harmful: for measuring; no prompt of theirs may be among the calibration's.
        refusal_beginnings: as in `find_heads`.
        top: how many heads `iti` and `scale` act on and how long the top lists are; default 10 % of all.
        judge: verdicts on answers to `harmful`, in order; None recognises refusals by their words.
        exact_answers: also count generated answers that equal the right one.
        max_new_tokens: of every generated answer.
        out: a folder that keeps every point, the LoRA and the head search; a later call goes on (`resume`).

    `iti` acts on the heads of largest probe accuracy, `scale` on those of largest s_hall, the positive
    control `refusal` on those of largest s_ref.

    Raises:
        OverlapError: calibration and test share prompts. TypeError, ValueError: as `find_heads`.
    """
    settings = settings or TradeoffSettings()
    chat = tokenizer_or_chat if isinstance(tokenizer_or_chat, Chat) else Chat(tokenizer_or_chat)
    if not test_pairs or not harmful:
        raise ValueError(f"test_pairs, harmful: expected some of each, got {len(test_pairs)} and {len(harmful)}")
    check_disjoint([*hallucination_pairs, *refusal_pairs], [*test_pairs, *harmful])
    probe = Probe(chat, test_pairs, harmful, judge, exact_answers, max_new_tokens, batch_size)
    geometry = attention_geometry(model)
    n_heads = len(geometry.layers) * geometry.n_heads
    scores = find_heads(
        model,
        chat,
        hallucination_pairs,
        refusal_pairs,
        top=top,
        refusal_beginnings=refusal_beginnings,
        refine=min(1.0, max(DEFAULT_REFINE, (top or 0) / n_heads)),
        batch_size=batch_size,
        out=out,
        resume=resume,
        progress=progress,
        model_name=model_name,
    )
    provenance = {
        "model": scores.provenance["model"],
        "model_fingerprint": model_fingerprint(model),
        "dtype": scores.provenance["dtype"],
        "data": {
            name: {"n": len(data), "hash": set_hash(list(data))}
            for name, data in (
                ("hallucination", hallucination_pairs),
                ("refusal", refusal_pairs),
                ("test_pairs", test_pairs),
                ("harmful", harmful),
            )
        },
        "settings": asdict(settings)
        | {"top": scores.k, "max_new_tokens": max_new_tokens, "exact_answers": exact_answers},
        "judge": "keywords" if judge is None else getattr(judge, "__qualname__", type(judge).__name__),
        "versions": versions(),
    }
    key = content_hash(json.dumps({n: v for n, v in provenance.items() if n != "versions"}, sort_keys=True))
    kept = _Kept(None if out is None else Path(out), key, resume)
    with (
        evaluating(model),
        _dials(model, chat, hallucination_pairs, scores, settings, kept, batch_size, progress) as dials,
    ):
        base, points = _sweep(model, probe, dials, kept, progress)
        restorations = _restore(model, probe, dials, base, points, scores, settings)
    acts_on = {f"{d.name}/{d.control}/{d.seed}": d.what for d in dials}
    return TradeoffResult(base, points, restorations, acts_on, scores, provenance)


@dataclass
class _Kept:
    """Finished points in ``<out>/points-<key>.json`` and the adapter beside it."""

    folder: Path | None
    key: str
    resume: bool

    def __post_init__(self) -> None:
        self.points: dict[str, Any] = {}
        if self.folder is not None and self.resume and self._path.is_file():
            self.points = read_json(self._path)

    @property
    def _path(self) -> Path:
        assert self.folder is not None
        return self.folder / f"points-{self.key}.json"

    @property
    def adapter(self) -> Path | None:
        """Where the LoRA is kept."""
        if self.folder is None:
            return None
        path = self.folder / f"wrong-answer-lora-{self.key}.safetensors"
        if not self.resume:
            path.unlink(missing_ok=True)
        return path

    def measured(self, label: str, measure: Callable[[], Measurement]) -> Measurement:
        if label not in self.points:
            self.points[label] = measure().as_dict()
            if self.folder is not None:
                write_json(self._path, self.points)
        return Measurement.from_dict(self.points[label])


@contextmanager
def _dials(
    model: nn.Module,
    chat: Chat,
    pairs: Sequence[ContrastPair],
    scores: HeadScores,
    settings: TradeoffSettings,
    kept: _Kept,
    batch_size: int,
    progress: bool,
) -> Iterator[list[Dial]]:
    """The dials, each followed by its controls; while open, the (switched off) LoRA is on the model."""
    found = truthful_directions(model, chat, pairs, batch_size)
    probed, hallucinating = found.top(scores.k), scores.top("hallucination")
    geometry = attention_geometry(model)
    seeds = range(settings.seed + 1, settings.seed + 1 + settings.control_seeds)
    dials = [iti_dial(model, found, probed, settings.alphas)]
    for seed in seeds:
        dials.append(iti_dial(model, found, probed, settings.alphas, "random directions", seed, random_directions=True))
    for seed in seeds:
        others = random_heads(geometry, scores.k, probed, seed)
        dials.append(iti_dial(model, found, others, settings.alphas, "random heads", seed))
    dials.append(scale_dial(model, hallucinating, settings.factors))
    for seed in seeds:
        others = random_heads(geometry, scores.k, hallucinating, seed)
        dials.append(scale_dial(model, others, settings.factors, "random heads", seed))
    dials.append(scale_dial(model, scores.top("refusal"), settings.factors, name=POSITIVE_CONTROL))
    with attached(model, settings.seed) as lora:
        weights = trained(lora, chat, pairs, settings.lora, settings.seed, kept.adapter, progress)
        dials.append(lora_dial(lora, weights, settings.betas))
        for seed in seeds:
            dials.append(lora_dial(lora, lora.random_like(weights, seed), settings.betas, "random update", seed))
        yield dials


def _sweep(
    model: nn.Module, probe: Probe, dials: Sequence[Dial], kept: _Kept, progress: bool
) -> tuple[Measurement, list[Point]]:
    from tqdm.auto import tqdm

    todo = [(dial, strength) for dial in dials for strength in dial.strengths]
    points: list[Point] = []
    with tqdm(total=len(todo) + 1, desc="sweep", unit="point", disable=not progress, leave=False) as bar:
        base = kept.measured("base", lambda: probe.measure(model, lambda _: nullcontext()))
        bar.update()
        for dial, strength in todo:
            measure = partial(probe.measure, model, partial(dial.apply, strength))
            points.append(
                Point(dial.name, dial.control, dial.seed, strength, kept.measured(dial.label(strength), measure))
            )
            bar.update()
    return base, points


def _restore(
    model: nn.Module,
    probe: Probe,
    dials: Sequence[Dial],
    base: Measurement,
    points: Sequence[Point],
    scores: HeadScores,
    settings: TradeoffSettings,
) -> list[Restoration]:
    overlap = scores.overlap().heads
    heads, by = (overlap, "overlap") if overlap else (tuple(scores.top("refusal")), "refusal")
    geometry = attention_geometry(model)
    draws = [
        random_heads(geometry, len(heads), heads, seed)
        for seed in range(settings.seed + 1, settings.seed + 1 + settings.control_seeds)
    ]
    out: list[Restoration] = []
    for dial in dials:
        if dial.control:
            continue
        worst = max((p for p in points if p.dial == dial.name and not p.control), key=lambda p: p.measured.asr.hits)
        if worst.measured.asr.hits <= base.asr.hits:
            continue
        restore = partial(refusals_with_heads_restored, model, probe, partial(dial.apply, worst.strength))
        random = tuple(restore(draw) for draw in draws)
        out.append(Restoration(dial.name, worst.strength, worst.measured.refused, heads, by, restore(heads), random))
    return out
