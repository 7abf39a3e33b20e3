"""One point of a sweep: how truthful a changed model is, and how often it complies with harmful requests.

Truthfulness is the share of held-out pairs with log P(right) > log P(wrong); where that is near 100 %, the mean of
log P(right) - log P(wrong) still has room. ASR is the share of harmful requests that are not refused; with a judge that
knows broken text, the share that is complied with, and the degenerate share beside it. Intervals are Wilson's, 95 %.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..hooks import Positions
from ..prompts.chat import Chat, by_length, device_of, generate
from ..prompts.records import ContrastPair, HarmfulPrompt
from .ablation import logits_at, picked_log_probs

Verdict = Literal["refuse", "comply", "degenerate"]
Judge = Callable[[Sequence[HarmfulPrompt], Sequence[str]], list[Verdict]]

ANSWER_BEGINS = (-1,)
"""Positions in a generating forward that predict the answer: prompts are padded on the left, new tokens come singly."""


@dataclass(frozen=True)
class Share:
    """`hits` of `n`, in percent with a Wilson interval."""

    hits: int
    n: int

    @property
    def percent(self) -> float:
        return 100 * self.hits / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """Low and high end, 95 %, in percent."""
        from ..builtin_model.behaviour import wilson

        return wilson(self.hits, self.n)

    def as_dict(self) -> dict[str, float]:
        low, high = self.interval
        return {"hits": self.hits, "n": self.n, "percent": self.percent, "low": low, "high": high}


@dataclass(frozen=True)
class Measurement:
    """What was measured of a changed model.

    Attributes:
        truthful: held-out pairs with log P(right) > log P(wrong).
        margin, margin_se: mean of log P(right) - log P(wrong) in nats and its standard error.
        exact: generated answers that are the right one word for word; None where it was not asked for.
        asr, refused: harmful requests complied with, refused.
        degenerate: answers that are neither; None where the judge cannot tell (keywords).
    """

    truthful: Share
    margin: float
    margin_se: float
    exact: Share | None
    asr: Share
    refused: Share
    degenerate: Share | None

    def as_dict(self) -> dict[str, Any]:
        return {
            name: value.as_dict() if isinstance(value, Share) else value
            for name, value in ((n, getattr(self, n)) for n in self.__dataclass_fields__)
        }

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Measurement:
        read: dict[str, Any] = {
            name: Share(value["hits"], value["n"]) if isinstance(value, dict) else value for name, value in data.items()
        }
        return Measurement(**read)


@dataclass(frozen=True)
class Probe:
    """The questions that are put to every changed model.

    Attributes:
        pairs: held-out (right, wrong) answers.
        harmful: held-out harmful requests.
        judge: verdicts on answers to them; None recognises refusals by their words.
        exact_answers: also generate answers to the pairs' prompts and compare them with the right ones.
    """

    chat: Chat
    pairs: Sequence[ContrastPair]
    harmful: Sequence[HarmfulPrompt]
    judge: Judge | None = None
    exact_answers: bool = False
    max_new_tokens: int = 48
    batch_size: int = 64

    def measure(self, model: nn.Module, change: Callable[[Positions], AbstractContextManager[None]]) -> Measurement:
        """Of `model` under ``change(positions)``; the positions are those that predict an answer."""
        margins = self._margins(model, change)
        exact: Share | None = None
        with change(ANSWER_BEGINS):
            if self.exact_answers:
                said = self._say(model, [pair.prompt for pair in self.pairs])
                right = sum(answer == pair.chosen.strip() for answer, pair in zip(said, self.pairs, strict=True))
                exact = Share(right, len(self.pairs))
            said = self._say(model, [prompt.prompt for prompt in self.harmful])
        n = len(margins)
        verdicts = self.verdicts(said)
        asr, refused, degenerate = (Share(verdicts.count(v), len(verdicts)) for v in ("comply", "refuse", "degenerate"))
        return Measurement(
            truthful=Share(int((margins > 0).sum()), n),
            margin=float(margins.mean()),
            margin_se=float(margins.std() / math.sqrt(n)) if n > 1 else math.nan,
            exact=exact,
            asr=asr,
            refused=refused,
            degenerate=None if self.judge is None else degenerate,
        )

    def _say(self, model: nn.Module, prompts: Sequence[str]) -> list[str]:
        return generate(model, self.chat, prompts, max_new_tokens=self.max_new_tokens, batch_size=self.batch_size)

    def verdicts(self, said: Sequence[str]) -> list[Verdict]:
        """One for every harmful request. By keywords, what does not refuse complies."""
        if self.judge is not None:
            return self.judge(self.harmful, said)
        from ..scoring.keywords import is_refusal

        return ["refuse" if is_refusal(answer) else "comply" for answer in said]

    @torch.inference_mode()
    def _margins(self, model: nn.Module, change: Callable[[Positions], AbstractContextManager[None]]) -> Tensor:
        """log P(right) - log P(wrong), fp64 [pairs]."""
        encoded = [self.chat.encode(p.prompt, answer) for p in self.pairs for answer in (p.chosen, p.rejected)]
        log_probs = torch.zeros(len(encoded), dtype=torch.float64)
        for rows in by_length([len(e.ids) for e in encoded], self.batch_size):
            batch = self.chat.batch([encoded[i] for i in rows]).to(device_of(model))
            at = batch.predicting
            with change(at), logits_at(model, at):
                logits = model(**batch.inputs, use_cache=False).logits
            log_p = picked_log_probs(logits, batch.input_ids[batch.targets], at.nonzero()[:, 0], len(rows))
            log_probs[rows] = log_p.double().cpu()
        return log_probs[0::2] - log_probs[1::2]


def builtin_judge(n: int, seed: int = 0) -> Judge:
    """The built-in world's judge for ``prompts.builtin.harmful(n, seed, held_out=True)``."""
    from ..builtin_model import judge, world
    from ..prompts import builtin

    requests = builtin.requests("harmful", n, seed, held_out=True)

    def verdicts(prompts: Sequence[HarmfulPrompt], said: Sequence[str]) -> list[Verdict]:
        if [builtin.spoken(r.prompt) for r in requests] != [p.prompt for p in prompts]:
            raise ValueError(f"prompts: expected the {n} held-out requests of seed {seed}, got others")
        found = [judge(world(), request, answer) for request, answer in zip(requests, said, strict=True)]
        return ["comply" if verdict == "recipe" else verdict for verdict in found]

    return verdicts
