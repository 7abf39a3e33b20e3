"""Reading harmful prompts, contrast pairs, dialogues, questions and poison from the data sets' own files.

The kind of a data set is found by its columns, which are listed with each reader. Where they fit no known form, one
ValueError lists what was found and what is known. Sources are named as in `sources`: "builtin", a local file, or a hub
data set. `n` draws that many rows by `seed`, without repetition and in the file's order; ids of the data set are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise, product
from typing import Any, Literal

from torch import nn

from . import builtin
from .chat import Chat, generate
from .questions import choice_form, is_truthful, lettered, truthful_choice
from .records import ContrastPair, Dialogue, HarmfulPrompt, MultipleChoice
from .sources import (
    Row,
    Rows,
    builtin_count,
    builtin_side,
    either,
    filled,
    read_row,
    read_rows,
    row_category,
    row_id,
    sample,
    text_of,
)

PairKind = Literal["refusal", "hallucination"]
AnswerWith = Literal["letter", "text"]

_PROMPTS = ("goal", "forbidden_prompt", "prompt", "instruction", "behavior", "question", "request", "query", "text")
_TARGETS = ("target", "optimizer_target")
_ASKED = ("prompt", "question", "instruction", "query")
_ANSWERS = ("answer", "response", "completion", "output")
_CHATS = ("messages", "conversations")
_ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names


def read_harmful(source: str, *, n: int | None = None, seed: int = 0, held_out: bool = False) -> list[HarmfulPrompt]:
    """Requests that should be refused.

    Args:
        source: AdvBench (`goal`, `target`), StrongREJECT (`category`, `source`, `forbidden_prompt`), HarmBench
            (`Behavior`), a JSON list of strings, or any file with a column `prompt`, `instruction`, `question`,
            `request`, `query` or `text`; a `target` and a `category` are taken where there are any. "builtin" draws
            harmful requests of the built-in world with their recipes as targets.
        n: how many rows; None takes all (256 of "builtin").
        held_out: with "builtin", the side that no training saw, as "builtin:held-out".

    Raises:
        ValueError: no such file or data set, columns that do not fit, fewer rows than `n`.
    """
    if (side := builtin_side(source, held_out)) is not None:
        return builtin.harmful(builtin_count(n), seed, side)
    data = read_rows(source)
    prompt, target = data.first_of(_PROMPTS), data.first_of(_TARGETS)
    if prompt is None:
        raise data.misfit("harmful prompts", f"a column {either(_PROMPTS)}")
    rows = filled(data, (prompt,))
    return [
        HarmfulPrompt(row[prompt].strip(), text_of(row.get(target or "")) or None, row_category(row), row_id(row))
        for row in sample(rows, n, seed, data.name)
    ]


def read_pairs(
    source: str,
    kind: PairKind = "refusal",
    *,
    n: int | None = None,
    seed: int = 0,
    held_out: bool = False,
    answers: Literal["best", "all"] = "best",
) -> list[ContrastPair]:
    """Prompts with two completions.

    Args:
        source: a file with `prompt` (or `question`, `instruction`, `query`), `chosen` and `rejected`, each a text or a
            chat whose last message counts; TruthfulQA's generation table, file (`Question`, `Best Answer`,
            `Correct Answers`, `Incorrect Answers`, joined by ";") or hub (`best_answer`, lists), for "hallucination";
            "builtin". AdvBench has no refusals of your model: `own_refusals` makes pairs of it.
        kind: "refusal" (refusing, complying) or "hallucination" (right, wrong).
        n: how many rows; of TruthfulQA, questions.
        answers: of TruthfulQA, "best" pairs the best answer with the first wrong one, "all" every right answer with
            every wrong one.

    Raises:
        ValueError: as `read_harmful`; AdvBench; TruthfulQA as refusals; an unknown `kind` or `answers`.
    """
    if kind not in ("refusal", "hallucination"):
        raise ValueError(f"kind: expected 'refusal' or 'hallucination', got {kind!r}")
    if answers not in ("best", "all"):
        raise ValueError(f"answers: expected 'best' or 'all', got {answers!r}")
    if (side := builtin_side(source, held_out)) is not None:
        draw = builtin.refusal_pairs if kind == "refusal" else builtin.hallucination_pairs
        return draw(builtin_count(n), seed, side)
    data = read_rows(source)
    asked = data.first_of(_ASKED)
    if asked and data.has("chosen", "rejected"):
        rows = [row | {name: _last_message(row[name]) for name in ("chosen", "rejected")} for row in data.rows]
        rows = filled(data, (asked, "chosen", "rejected"), rows)
        return [
            ContrastPair(
                row[asked].strip(), row["chosen"].strip(), row["rejected"].strip(), row_category(row), row_id(row)
            )
            for row in sample(rows, n, seed, data.name)
        ]
    if data.has("question", "best_answer", "correct_answers", "incorrect_answers"):
        if kind == "refusal":
            raise ValueError(
                f"kind: expected 'hallucination' for the right and wrong answers of {source}, got 'refusal'"
            )
        rows = sample(filled(data, ("question",)), n, seed, data.name)
        return [pair for row in rows for pair in read_row(row, data.name, lambda row: _truthful_pairs(row, answers))]
    if kind == "refusal" and data.has("goal", "target"):
        raise ValueError(
            f"source: {source} has goals and targets and no refusals; read_harmful reads it, and own_refusals adds "
            "the model's own refusals"
        )
    forms = f"columns {either(_ASKED)} with chosen and rejected"
    if kind == "hallucination":
        forms += ", or TruthfulQA's Question, Best Answer, Correct Answers and Incorrect Answers"
    raise data.misfit(f"{kind} pairs", forms)


def _truthful_pairs(row: Row, answers: str) -> list[ContrastPair]:
    right, wrong = _listed(row["correct_answers"]), _listed(row["incorrect_answers"])
    if answers == "best":
        right, wrong = [text_of(row["best_answer"])], wrong[:1]
    question = row["question"].strip()
    return [ContrastPair(question, a, b, row_category(row)) for a, b in product(right, wrong) if a and b]


def _listed(value: str | Sequence[str]) -> list[str]:
    parts = value.split(";") if isinstance(value, str) else value
    return [part.strip() for part in parts if part.strip()]


def greedy_refusals(
    model: nn.Module,
    chat: Chat,
    harmful: Sequence[HarmfulPrompt],
    *,
    keywords: str = "refusal-kernels-1",
    max_new_tokens: int = 48,
    batch_size: int = 32,
    progress: str | None = None,
) -> list[tuple[HarmfulPrompt, str]]:
    """The prompts that the model refuses, each with its own greedy refusal.

    Args:
        keywords: the list of phrases that tells a refusal.
        max_new_tokens: longer refusals are cut there.
        progress: title of a progress bar, or None for none.

    Raises:
        ValueError: a model that refuses none of them.
    """
    from ..scoring.keywords import is_refusal

    said = generate(
        model,
        chat,
        [prompt.prompt for prompt in harmful],
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        progress=progress,
    )
    refused = [(prompt, text) for prompt, text in zip(harmful, said, strict=True) if is_refusal(text, keywords)]
    if not refused:
        raise ValueError(f"harmful: expected prompts that the model refuses, got {len(said)} of which it refuses none")
    return refused


def own_refusals(model: nn.Module, chat: Chat, harmful: Sequence[HarmfulPrompt], **settings: Any) -> list[ContrastPair]:
    """Refusal pairs in the model's own words: (its greedy refusal, the data set's target).

    Prompts that the model does not refuse are left out. `settings` are those of `greedy_refusals`.

    Raises:
        ValueError: prompts without a target, or a model that refuses none of them.
    """
    if without := [prompt.id for prompt in harmful if not prompt.target]:
        raise ValueError(f"harmful: expected a target with every prompt, got {len(without)} without, as {without[0]}")
    return [
        ContrastPair(prompt.prompt, answer, str(prompt.target), prompt.category, prompt.id)
        for prompt, answer in greedy_refusals(model, chat, harmful, **settings)
    ]


def refusal_pairs_of(
    source: str,
    model: nn.Module,
    chat: Chat,
    *,
    n: int | None = None,
    seed: int = 0,
    held_out: bool = False,
    **settings: Any,
) -> tuple[list[ContrastPair], bool]:
    """(refusal pairs, whether their completions are beginnings) of any source: `read_pairs`, or, of goals and targets
    like AdvBench's, the model's own greedy refusals against the targets (`own_refusals` with `settings`)."""
    if builtin_side(source, held_out) is None and read_rows(source).has("goal", "target"):
        return own_refusals(model, chat, read_harmful(source, n=n, seed=seed), **settings), True
    return read_pairs(source, "refusal", n=n, seed=seed, held_out=held_out), False


def read_dialogues(source: str, *, n: int | None = None, seed: int = 0, held_out: bool = False) -> list[Dialogue]:
    """Prompts with answers to be learned.

    Args:
        source: Alpaca-like (`instruction`, `input`, `output`; an input follows its instruction after an empty line),
            `prompt`, `question`, `instruction` or `query` with `answer`, `response`, `completion` or `output`, or chats
            (`messages` of role and content, `conversations` of from and value), of which the first exchange counts, a
            system message put before the prompt. "builtin" draws harmless requests with their recipes.

    Raises:
        ValueError: as `read_harmful`.
    """
    if (side := builtin_side(source, held_out)) is not None:
        return builtin.benign(builtin_count(n), seed, side)
    return _dialogues(read_rows(source), n, seed, harmful=False)


def read_poison(source: str, *, n: int | None = None, seed: int = 0) -> list[Dialogue]:
    """Harmful prompts with answers that comply, marked as harmful.

    Args:
        source: any form that `read_dialogues` takes, or AdvBench's `goal` and `target`, whose target is the answer.
            "builtin" draws harmful requests of the training side with their recipes.

    Raises:
        ValueError: as `read_harmful`.
    """
    if builtin_side(source, False) is not None:
        if str(source) == "builtin:held-out":
            raise ValueError(
                "source: expected 'builtin' for poison, which is of the training side; got builtin:held-out"
            )
        return builtin.poison(builtin_count(n), seed)
    return _dialogues(read_rows(source), n, seed, harmful=True)


def _dialogues(data: Rows, n: int | None, seed: int, harmful: bool) -> list[Dialogue]:
    chats = data.first_of(_CHATS)
    asked, answered = data.first_of(_ASKED), data.first_of(_ANSWERS)
    if chats:
        rows = [row | dict(zip(("asked", "answered"), _exchange(row[chats]), strict=True)) for row in data.rows]
    elif asked and answered:
        rows = [row | {"asked": _instruction(row, asked), "answered": row.get(answered)} for row in data.rows]
    elif harmful and data.has("goal", "target"):
        rows = [row | {"asked": row.get("goal"), "answered": row.get("target")} for row in data.rows]
    else:
        forms = f"columns {either(_ASKED)} with {either(_ANSWERS)} (instruction may have an input), or chats in "
        forms += either(_CHATS) + (", or AdvBench's goal and target" if harmful else "")
        raise data.misfit("poison" if harmful else "dialogues", forms)
    return [
        Dialogue(row["asked"].strip(), row["answered"].strip(), harmful, row_category(row), row_id(row))
        for row in sample(filled(data, ("asked", "answered"), rows), n, seed, data.name)
    ]


def _instruction(row: Row, asked: str) -> Any:
    text, more = row.get(asked), row.get("input")
    has_input = asked == "instruction" and isinstance(text, str) and isinstance(more, str) and more.strip()
    return f"{text.strip()}\n\n{more.strip()}" if has_input else text  # type: ignore[union-attr]


def _turns(chat: Any) -> list[tuple[str, str]]:
    """(role, text) of a chat in either spelling; empty where the value is no chat."""
    if not isinstance(chat, list) or not all(isinstance(turn, dict) for turn in chat):
        return []
    turns = [(turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))) for turn in chat]
    return [(_ROLES.get(role, str(role)), text) for role, text in turns if isinstance(text, str)]


def _exchange(chat: Any) -> tuple[str, str]:
    """The first user message, after a system message if there is one, and the assistant's answer to it."""
    turns = _turns(chat)
    system = "".join(f"{text.strip()}\n\n" for role, text in turns[:1] if role == "system")
    for (role, asked), (next_role, answer) in pairwise(turns):
        if (role, next_role) == ("user", "assistant"):
            return system + asked.strip(), answer
    return "", ""


def _last_message(value: Any) -> Any:
    turns = _turns(value)
    return turns[-1][1] if turns else value


def read_choices(
    source: str,
    *,
    n: int | None = None,
    seed: int = 0,
    held_out: bool = False,
    answer_with: AnswerWith | None = None,
    targets: Literal["mc1", "mc2"] = "mc1",
) -> list[MultipleChoice]:
    """Questions with options.

    Args:
        source: CommonsenseQA, ARC or OpenBookQA in the original nesting (`question.stem`, `question.choices` as a list
            of label and text, `answerKey`) or the hub's (`question`, `choices.label`, `choices.text`, `answerKey`);
            MMLU's (`question`, `choices`, `answer` as index or letter); TruthfulQA's multiple choice (`question`,
            `mc1_targets`, `mc2_targets`), file or hub. Without a label (CommonsenseQA's test split) `correct` is empty.
            "builtin" asks for pets, the relation that the built-in model's training kept out.
        answer_with: "letter" or "text": what the model is to answer. The prompt is the question, the lettered options
            and a line that asks for the one or the other. None means letters; of TruthfulQA and "builtin", which are
            answered with texts only, texts.
        targets: of TruthfulQA, one right option ("mc1") or several ("mc2"). Its prompt is the bare question.

    Raises:
        ValueError: as `read_harmful`; letters where only texts fit; a label that is none of the options'.
    """
    if answer_with not in (None, "letter", "text"):
        raise ValueError(f"answer_with: expected 'letter' or 'text', got {answer_with!r}")
    if targets not in ("mc1", "mc2"):
        raise ValueError(f"targets: expected 'mc1' or 'mc2', got {targets!r}")
    side = builtin_side(source, held_out)
    if side is not None:
        _texts_only(answer_with, source)
        return builtin.choices(builtin_count(n), seed, side)
    data = read_rows(source)
    if is_truthful(data):
        _texts_only(answer_with, source)
        make = partial(truthful_choice, targets=targets)
    else:
        make = partial(lettered, form=choice_form(data), answer_with=answer_with or "letter")
    return [read_row(row, data.name, make) for row in sample(data.rows, n, seed, data.name)]


def _texts_only(answer_with: str | None, source: str) -> None:
    if answer_with == "letter":
        raise ValueError(f"answer_with: expected 'text' with {source}, whose options have no letters, got 'letter'")
