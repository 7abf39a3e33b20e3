"""The forms of data sets of questions with options, and the prompt that is made of one."""

from __future__ import annotations

import string
from collections.abc import Callable
from typing import Any

from .records import MultipleChoice
from .sources import Row, Rows, row_category, row_id


def holds_choices(data: Rows) -> bool:
    """Whether `data` holds questions with options, in any form that is known."""
    try:
        return is_truthful(data) or bool(choice_form(data))
    except ValueError:
        return False


def is_truthful(data: Rows) -> bool:
    """Whether `data` is TruthfulQA's multiple choice."""
    return data.has("question", "mc1_targets", "mc2_targets")


def truthful_choice(row: Row, targets: str) -> MultipleChoice:
    """A row of TruthfulQA's multiple choice; `targets` is "mc1" or "mc2"."""
    given = row[f"{targets}_targets"]
    # The original file maps option -> 0 or 1; the hub keeps two lists.
    pairs = list(zip(given["choices"], given["labels"], strict=True)) if "labels" in given else list(given.items())
    question = row["question"].strip()
    correct = tuple(i for i, (_, right) in enumerate(pairs) if right)
    return MultipleChoice(question, tuple(text for text, _ in pairs), correct, question, row_category(row), row_id(row))


Form = Callable[[Row], tuple[str, list[str], list[str], str]]
"""A row as (question, labels, texts, label of the right option or "")."""


def choice_form(data: Rows) -> Form:
    """How the rows of `data` are read, by the nesting of its first row. ValueError where no known one fits."""
    row = data.rows[0]
    question, choices = row.get("question"), row.get("choices")
    asked = data.first_of(("question", "question_stem"))
    if isinstance(question, dict) and {"stem", "choices"} <= question.keys():
        return lambda row: (
            row["question"]["stem"],
            [str(option["label"]) for option in row["question"]["choices"]],
            [option["text"] for option in row["question"]["choices"]],
            str(row.get("answerkey") or ""),
        )
    if asked and isinstance(choices, dict) and {"label", "text"} <= choices.keys():
        return lambda row: (
            row[asked],
            [str(label) for label in row["choices"]["label"]],
            list(row["choices"]["text"]),
            str(row.get("answerkey") or ""),
        )
    if asked and isinstance(choices, list) and all(isinstance(option, str) for option in choices):
        return lambda row: (
            row[asked],
            list(string.ascii_uppercase[: len(row["choices"])]),
            list(row["choices"]),
            _letter(row.get("answer")),
        )
    raise data.misfit(
        "questions with options",
        "question.stem with question.choices, question with choices.label and choices.text, question with a list "
        "of choices, or question with mc1_targets and mc2_targets",
    )


def _letter(answer: Any) -> str:
    if isinstance(answer, int) and not isinstance(answer, bool):
        return string.ascii_uppercase[answer] if 0 <= answer < 26 else ""  # -1 marks an unknown label
    return str(answer or "")


def lettered(row: Row, form: Form, answer_with: str) -> MultipleChoice:
    """A row as a prompt with lettered options, answered with the "letter" or the "text" of one."""
    question, labels, texts, right = form(row)
    if right and right not in labels:
        raise ValueError(f"source: expected an answer among {', '.join(labels)} in row {row_id(row)!r}, got {right!r}")
    question = question.strip()
    options = "\n".join(f"{label}. {text}" for label, text in zip(labels, texts, strict=True))
    prompt = f"{question}\n{options}\nAnswer with the {answer_with} of the right option."
    concept = row["question"] if isinstance(row.get("question"), dict) else row
    correct = (labels.index(right),) if right else ()
    choices = tuple(labels if answer_with == "letter" else texts)
    return MultipleChoice(prompt, choices, correct, question, row_category(concept), row_id(row))
