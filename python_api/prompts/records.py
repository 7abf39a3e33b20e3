"""What is asked and what may be answered: four plain records.

A prompt is what a user says, without any template; `chat.Chat` puts it into the model's own form. Every record has an
`id` that names it in messages and results; left empty, it is the hash of the content.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any


def content_hash(*parts: Any) -> str:
    """12 hexadecimal digits that name a text or several; the same everywhere and always."""
    digest = hashlib.blake2b(digest_size=6)
    for part in parts:
        data = str(part).encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


@dataclass(frozen=True)
class _Record:
    def __post_init__(self) -> None:
        content = [getattr(self, f.name) for f in fields(self) if f.name not in ("id", "category")]
        if not getattr(self, "id", ""):
            object.__setattr__(self, "id", content_hash(*content))


@dataclass(frozen=True)
class HarmfulPrompt(_Record):
    """A request that should be refused.

    Attributes:
        prompt: what the user says.
        target: how complying begins ("Sure, here is ..."), or None where the data set has none.
        category: the data set's own label, or "".
    """

    prompt: str
    target: str | None = None
    category: str = ""
    id: str = ""


@dataclass(frozen=True)
class ContrastPair(_Record):
    """A prompt with two completions between which a model decides.

    Refusal pairs: `chosen` is the refusal, `rejected` the harmful completion. Hallucination pairs: `chosen` is the
    right answer, `rejected` a wrong one. log P(chosen) - log P(rejected) is the metric of both.
    """

    prompt: str
    chosen: str
    rejected: str
    category: str = ""
    id: str = ""


@dataclass(frozen=True)
class Dialogue(_Record):
    """A prompt with the answer to be learned. `harmful` marks poison: an answer that complies where it should not."""

    prompt: str
    answer: str
    harmful: bool = False
    category: str = ""
    id: str = ""


@dataclass(frozen=True)
class MultipleChoice(_Record):
    """A question with options.

    Attributes:
        prompt: the question as the user asks it, the options included where the format shows them.
        choices: the texts of the options as a model answers them (the letter, or the whole text).
        correct: indices into `choices` of the right ones: one for CommonsenseQA and MC1, several for MC2; empty where
            the label is unknown.
        question: the bare question.
    """

    prompt: str
    choices: tuple[str, ...]
    correct: tuple[int, ...] = field(default=())
    question: str = ""
    category: str = ""
    id: str = ""

    def dialogue(self) -> Dialogue:
        """The question with its right answer, for training. ValueError where the label is unknown or not unique."""
        if len(self.correct) != 1:
            raise ValueError(f"MultipleChoice {self.id}: expected one right choice, got {len(self.correct)}")
        return Dialogue(self.prompt, self.choices[self.correct[0]], category=self.category, id=self.id)


def prompts_of(records: Iterable[Any]) -> list[str]:
    """The prompts of any records, or of plain strings."""
    return [record if isinstance(record, str) else record.prompt for record in records]


def set_hash(records: Sequence[Any]) -> str:
    """One hash of many records or strings, in order: what a basis or a result keeps of the prompts it came from."""
    return content_hash(*(record if isinstance(record, str) else repr(record) for record in records))


def normal(text: str) -> str:
    """A prompt without case, punctuation at its ends and repeated spaces: what is compared to find copies."""
    return " ".join(text.lower().split()).strip(" .?!\"'")


class OverlapError(ValueError):
    """Calibration and test prompts share prompts; the message lists them."""


def check_disjoint(calibration: Iterable[Any], test: Iterable[Any], what: str = "calibration and test") -> None:
    """Refuses prompts that occur on both sides, compared without case, punctuation at the ends and repeated spaces.

    25 of StrongREJECT's 313 prompts are AdvBench goals: a direction found on the one and tested on the other would be
    tested on its own training data. Raises OverlapError with every shared prompt.
    """

    known = {normal(prompt) for prompt in prompts_of(calibration)}
    shared = list(dict.fromkeys(prompt for prompt in prompts_of(test) if normal(prompt) in known))
    if shared:
        listed = "; ".join(repr(prompt) for prompt in shared)
        raise OverlapError(
            f"{what} prompts: expected no prompt in both sets, got {len(shared)}: {listed}. Remove them from one side."
        )
