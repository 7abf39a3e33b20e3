"""What an evaluation found: rates with their intervals, as JSON and as a table."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoint import write_json, write_text
from .intervals import Rate

_JUDGE_NAMES = {"strongreject": "fine-tuned judge", "rubric": "rubric"}


@dataclass
class SafetyReport:
    """What was measured; what was not asked for is empty.

    Attributes:
        model: its name.
        asr: judge -> attack success on the harmful prompts.
        score: StrongREJECT judge -> mean score on the harmful prompts.
        unparsed: judge -> answers on which it gave no verdict.
        outcomes: "harmful" and "benign" -> outcome -> share.
        over_refusal: judge -> share of refusals on the benign prompts.
        world: "harmful" and "benign" -> verdict of the built-in world -> share.
        accuracy: "summed" and "per token" -> share of multiple-choice questions answered right.
        truthfulqa: "MC1" and "MC2".
        commonsense: task -> accuracy.
        settings: what the figures depend on.
        rows: one dict per answer with every judge's verdict.
    """

    model: str
    asr: dict[str, Rate] = field(default_factory=dict)
    score: dict[str, Rate] = field(default_factory=dict)
    unparsed: dict[str, int] = field(default_factory=dict)
    outcomes: dict[str, dict[str, Rate]] = field(default_factory=dict)
    over_refusal: dict[str, Rate] = field(default_factory=dict)
    world: dict[str, dict[str, Rate]] = field(default_factory=dict)
    accuracy: dict[str, Rate] = field(default_factory=dict)
    truthfulqa: dict[str, Rate] = field(default_factory=dict)
    commonsense: dict[str, Rate] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the rows, rates as dicts of value, low, high, hits and n."""

        def plain(value: Any) -> Any:
            if isinstance(value, Rate):
                return value.to_dict()
            return {key: plain(item) for key, item in value.items()} if isinstance(value, dict) else value

        return {name: plain(value) for name, value in vars(self).items() if name != "rows"}

    def table(self) -> str:
        """The report as lines of text: figure, rate, 95 % interval, prompts."""
        lines: list[tuple[str, Rate]] = []
        lines += [(f"ASR, {judge}", rate) for judge, rate in self.asr.items()]
        lines += [(f"StrongREJECT score, {_JUDGE_NAMES[judge]}", rate) for judge, rate in self.score.items()]
        for name, shares in self.outcomes.items():
            lines += [(f"{name} prompts {outcome}", rate) for outcome, rate in shares.items()]
        for name, shares in self.world.items():
            lines += [(f"{name} prompts, world: {verdict}", rate) for verdict, rate in shares.items()]
        lines += [(f"over-refusal, {judge}", rate) for judge, rate in self.over_refusal.items()]
        lines += [(f"multiple choice, {how}", rate) for how, rate in self.accuracy.items()]
        lines += [(f"TruthfulQA {name}", rate) for name, rate in self.truthfulqa.items()]
        lines += list(self.commonsense.items())
        width = max((len(name) for name, _ in lines), default=0)
        text = [f"{name:<{width}}  {_percent(rate)}" for name, rate in lines]
        text += [f"no verdict from {judge} on {count} answers" for judge, count in self.unparsed.items() if count]
        return "\n".join(text)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """report.json, and judgements.jsonl with one line per answer."""
        out = Path(folder)
        write_json(out / "report.json", self.to_dict())
        write_text(out / "judgements.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows))


def _percent(rate: Rate) -> str:
    if not rate.n:
        return "     -"
    return f"{100 * rate.value:5.1f} %  [{100 * rate.low:5.1f}, {100 * rate.high:5.1f}]  n = {rate.n}"
