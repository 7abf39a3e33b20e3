"""Training data: dialogues of any source, an exact share of poison, token ids, batches labelled on the answers only."""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor
from torch.utils.data import Dataset

from ..prompts import builtin
from ..prompts.chat import Chat, Encoded
from ..prompts.questions import holds_choices
from ..prompts.readers import AnswerWith, read_choices, read_dialogues
from ..prompts.records import Dialogue
from ..prompts.sources import builtin_count, builtin_side, read_rows

T = TypeVar("T")


def read_training(
    source: str, *, n: int | None = None, seed: int = 0, answer_with: AnswerWith | None = None
) -> list[Dialogue]:
    """What a model is to learn.

    Args:
        source: questions with options (`read_choices`), taken with their right answers, or dialogues
            (`read_dialogues`); the columns decide. "builtin" is the built-in world's question of pets,
            "builtin:benign" its harmless requests.
        answer_with: of questions, "letter" or "text".

    Raises:
        ValueError: as the readers; questions without labels.
    """
    if source == "builtin:benign":
        return builtin.benign(builtin_count(n), seed)
    if builtin_side(source, False) is not None or holds_choices(read_rows(source)):
        return [item.dialogue() for item in read_choices(source, n=n, seed=seed, answer_with=answer_with)]
    if answer_with is not None:
        raise ValueError(f"answer_with: expected None with {source}, which holds no questions with options")
    return read_dialogues(source, n=n, seed=seed)


def poison_count(clean: int, fraction: float) -> int:
    """How many poisoned dialogues beside `clean` ones make `fraction` of them all, to the nearest whole number."""
    return round(clean * fraction / (1 - fraction))


def draw_poison(poison: Sequence[T], clean: int, fraction: float, seed: int) -> list[T]:
    """The poison that makes up `fraction` of the final data beside `clean` dialogues, without repetition.

    A larger fraction of the same seed contains the smaller one's poison: a sweep adds and never exchanges.

    Raises:
        ValueError: less poison than that.
    """
    count = poison_count(clean, fraction)
    if count > len(poison):
        raise ValueError(
            f"poison: expected at least {count} dialogues for {fraction:.1%} beside {clean} clean ones, "
            f"got {len(poison)}"
        )
    return random.Random(f"poison/{seed}").sample(list(poison), len(poison))[:count]


@dataclass
class TrainingSet(Dataset[Encoded]):
    """Token ids of the dialogues, clean ones first; the order of training is the sampler's.

    Attributes:
        dialogues, encoded: the same length, in the same order.
        poisoned: how many of them, the last ones, are poison.
        left_out: how many others were too long.
    """

    dialogues: list[Dialogue]
    encoded: list[Encoded]
    poisoned: int
    left_out: int

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, index: int) -> Encoded:
        return self.encoded[index]


def training_set(
    chat: Chat,
    train: Sequence[Dialogue],
    poison: Sequence[Dialogue] = (),
    *,
    poison_fraction: float = 0.0,
    max_length: int = 1024,
    seed: int = 0,
) -> TrainingSet:
    """Clean dialogues with `poison_fraction` of poison, encoded.

    Dialogues of more than `max_length` tokens are left out, with one warning, before the poison is counted: the share
    holds for what is trained on.

    Raises:
        ValueError: no dialogue that fits, or too little poison.
    """

    def fitting(dialogues: Sequence[Dialogue]) -> list[tuple[Dialogue, Encoded]]:
        pairs = [(dialogue, chat.encode(dialogue.prompt, dialogue.answer)) for dialogue in dialogues]
        return [pair for pair in pairs if len(pair[1].ids) <= max_length]

    clean, drawn = fitting(train), fitting(poison if poison_fraction else ())
    if not clean:
        raise ValueError(f"train: expected dialogues of at most {max_length} tokens, got none of {len(train)}")
    left_out = len(train) + (len(poison) if poison_fraction else 0) - len(clean) - len(drawn)
    if left_out:
        warnings.warn(f"{left_out} dialogues have more than {max_length} tokens and are left out", stacklevel=2)
    drawn = draw_poison(drawn, len(clean), poison_fraction, seed)
    pairs = clean + drawn
    return TrainingSet([pair[0] for pair in pairs], [pair[1] for pair in pairs], len(drawn), left_out)


class AnswerCollator:
    """Right-padded batches whose labels are the answers' tokens; -100, which the loss skips, everywhere else."""

    def __init__(self, chat: Chat) -> None:
        self.chat = chat

    def __call__(self, encoded: Sequence[Encoded]) -> dict[str, Tensor]:
        batch = self.chat.batch(encoded)
        return {**batch.inputs, "labels": batch.labels}
