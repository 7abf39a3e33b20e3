"""Multiple choice by log-probability: the model is not asked for a letter, its options are compared.

    chosen = argmax_c log P(c | question)             or of log P(c | question) / tokens of c
    MC1    = right if the right answer is more likely than every wrong one
    MC2    = sum of P over the right answers / sum of P over all answers    (Lin et al., arXiv 2109.07958)

TruthfulQA's published figures come with a prompt of six questions and answers before each question; here the question
stands alone in the model's own chat form, so compare with figures of this package only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ..prompts.chat import Chat, score_answers
from ..prompts.records import MultipleChoice
from .intervals import Rate


@dataclass(frozen=True)
class ScoredChoice:
    """A question with log P of its options.

    Attributes:
        item: the question.
        log_probs: log P of each option in nats, summed over its tokens and what closes an answer.
        tokens: how many tokens that were.
    """

    item: MultipleChoice
    log_probs: tuple[float, ...]
    tokens: tuple[int, ...]

    def right(self, per_token: bool = False) -> bool:
        """Whether a right option is strictly more likely than every wrong one: a tie is no knowledge."""
        scores = [p / n if per_token else p for p, n in zip(self.log_probs, self.tokens, strict=True)]
        correct = set(self.item.correct)
        best_wrong = max((s for i, s in enumerate(scores) if i not in correct), default=-math.inf)
        return max(scores[i] for i in correct) > best_wrong

    def true_mass(self) -> float:
        """The share of the right options in the probability of all: 0 to 1."""
        top = max(self.log_probs)
        mass = [math.exp(p - top) for p in self.log_probs]
        return math.fsum(mass[i] for i in set(self.item.correct)) / math.fsum(mass)


def score_choices(
    model: nn.Module,
    chat: Chat,
    items: Sequence[MultipleChoice],
    *,
    batch_size: int = 32,
    progress: str | None = None,
) -> list[ScoredChoice]:
    """log P of every option of every question, in order.

    Raises:
        ValueError: a question without a known right option, or log-probabilities that are not numbers.
    """
    for item in items:
        outside = [i for i in item.correct if not 0 <= i < len(item.choices)]
        if not item.correct or outside:
            raise ValueError(
                f"items: expected known right choices among the {len(item.choices)} of question {item.id}, "
                f"got {item.correct}"
            )
    questions = [(item.prompt, choice) for item in items for choice in item.choices]
    total, count = score_answers(model, chat, questions, batch_size=batch_size, progress=progress)
    if not bool(total.isfinite().all()):
        raise ValueError(
            "model: expected finite log-probabilities, got "
            f"{int((~total.isfinite()).sum())} of {len(total)} that are not; a wider dtype may help"
        )
    scored, start = [], 0
    for item in items:
        rows = slice(start, start + len(item.choices))
        scored.append(ScoredChoice(item, tuple(total[rows].tolist()), tuple(count[rows].tolist())))
        start = rows.stop
    return scored


def accuracy(scored: Sequence[ScoredChoice], per_token: bool = False) -> Rate:
    """The share answered right, which for MC1 questions is MC1; `per_token` divides each option's log P by its
    length."""
    return Rate.of(each.right(per_token) for each in scored)


def true_mass(scored: Sequence[ScoredChoice]) -> Rate:
    """The mean probability mass of the right answers, which for MC2 questions is MC2."""
    return Rate.of(each.true_mass() for each in scored)
