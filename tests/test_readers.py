"""Readers of harmful prompts, pairs, dialogues, questions and poison: every known form, written as its data set is."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from refusal_kernels.python_api.builtin_model.world import REFUSAL
from refusal_kernels.python_api.models import load_model
from refusal_kernels.python_api.prompts import builtin
from refusal_kernels.python_api.prompts.chat import Chat
from refusal_kernels.python_api.prompts.readers import (
    own_refusals,
    read_choices,
    read_dialogues,
    read_harmful,
    read_pairs,
    read_poison,
)
from refusal_kernels.python_api.prompts.records import HarmfulPrompt, check_disjoint
from refusal_kernels.python_api.prompts.sources import read_rows

ADVBENCH = [{"goal": f"Do bad thing {i}", "target": f"Sure, here is bad thing {i}"} for i in range(9)]
OPTIONS = [("A", "bank"), ("B", "library"), ("C", "mall"), ("D", "mat"), ("E", "park")]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def save(tmp_path: Path) -> Callable[[str, Any], str]:
    """Writes rows as the ending of the name says; gives the path."""

    def write(name: str, rows: Any) -> str:
        path = tmp_path / name
        if path.suffix == ".csv":
            with path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
        elif path.suffix == ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        elif path.suffix == ".parquet":
            datasets.Dataset.from_list(rows).to_parquet(str(path))
        else:
            path.write_text(json.dumps(rows))
        return str(path)

    return write


@pytest.mark.parametrize("name", ["a.csv", "a.json", "a.jsonl", "a.parquet"])
def test_advbench_reads_alike_from_every_kind_of_file(save: Any, name: str) -> None:
    prompts = read_harmful(save(name, ADVBENCH))
    assert [(p.prompt, p.target) for p in prompts] == [(row["goal"], row["target"]) for row in ADVBENCH]
    assert len({p.id for p in prompts}) == len(ADVBENCH)


def test_strongreject_and_harmbench_and_bare_strings(save: Any) -> None:
    quoted = 'Write "x", then\nexplain it'
    rows = [{"category": "Violence", "source": "custom", "forbidden_prompt": quoted}]
    assert read_harmful(save("s.csv", rows)) == [HarmfulPrompt(quoted, None, "Violence")]
    harmbench = [{"Behavior": "Do it", "SemanticCategory": "illegal", "BehaviorID": "do_it"}]
    (prompt,) = read_harmful(save("h.csv", harmbench))
    assert (prompt.prompt, prompt.category, prompt.id) == ("Do it", "illegal", "do_it")
    assert [p.prompt for p in read_harmful(save("strings.json", ["one", "two"]))] == ["one", "two"]
    assert [p.prompt for p in read_harmful(save("wrapped.json", {"data": [{"prompt": "one"}], "version": 1}))] == [
        "one"
    ]


def test_samples_are_of_their_seed_and_in_order(save: Any) -> None:
    source = save("a.csv", ADVBENCH)
    order = [row["goal"] for row in ADVBENCH]
    drawn = [[order.index(p.prompt) for p in read_harmful(source, n=4, seed=seed)] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(len(set(rows)) == 4 and rows == sorted(rows) for rows in drawn)
    with pytest.raises(ValueError, match="n: expected at most the 9 usable rows"):
        read_harmful(source, n=10)
    with pytest.raises(ValueError, match="n: expected a number from 1 on"):
        read_harmful(source, n=0)


def test_builtin_has_two_sides_that_do_not_overlap(save: Any) -> None:
    train, test = read_harmful("builtin", n=64), read_harmful("builtin:held-out", n=64)
    assert test == read_harmful("builtin", n=64, held_out=True) == builtin.harmful(64, held_out=True)
    check_disjoint(train, test)
    assert len(read_choices("builtin")) == 256
    with pytest.raises(ValueError, match="held_out"):
        read_harmful(save("a.csv", ADVBENCH), held_out=True)
    with pytest.raises(ValueError, match="builtin:held-out, got 'builtin:test'"):
        read_dialogues("builtin:test")
    with pytest.raises(ValueError, match="training side"):
        read_poison("builtin:held-out")


def test_pairs_of_texts_and_of_chats(save: Any) -> None:
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "Bad."}]
    source = save("p.jsonl", [{"id": 7, "prompt": "q", "chosen": "No.", "rejected": chat}])
    (pair,) = read_pairs(source)
    assert (pair.prompt, pair.chosen, pair.rejected, pair.id) == ("q", "No.", "Bad.", "7")
    assert read_pairs("builtin", n=5) == builtin.refusal_pairs(5)
    assert read_pairs("builtin", "hallucination", n=5) == builtin.hallucination_pairs(5)
    with pytest.raises(ValueError, match="kind"):
        read_pairs(source, "harm")  # type: ignore[arg-type]


def test_truthfulqa_generation_as_file_and_as_on_the_hub(save: Any) -> None:
    file = {
        "Type": "Adversarial",
        "Category": "Myths",
        "Question": "What if?",
        "Best Answer": "Nothing",
        "Correct Answers": "Nothing; Not much; ",
        "Incorrect Answers": "All; Some; None",
    }
    hub = {"question": "What if?", "category": "Myths", "best_answer": "Nothing"}
    hub |= {"correct_answers": ["Nothing", "Not much"], "incorrect_answers": ["All", "Some", "None"]}  # type: ignore[dict-item]
    for source in (save("t.csv", [file]), save("t.parquet", [hub])):
        (best,) = read_pairs(source, "hallucination")
        assert (best.chosen, best.rejected, best.category) == ("Nothing", "All", "Myths")
        every = read_pairs(source, "hallucination", answers="all")
        assert [(p.chosen, p.rejected) for p in every] == [
            (right, wrong) for right in ("Nothing", "Not much") for wrong in ("All", "Some", "None")
        ]
        with pytest.raises(ValueError, match="kind: expected 'hallucination'"):
            read_pairs(source, "refusal")


def test_own_refusals_are_the_models_words_and_only_of_what_it_refuses(save: Any) -> None:
    model, tokenizer = load_model("builtin", device="cpu")
    harmful = read_harmful("builtin", n=6)
    helped = [HarmfulPrompt(d.prompt, "sure ,") for d in builtin.benign(4, held_out=True)]
    pairs = own_refusals(model, Chat(tokenizer), [*harmful, *helped])
    assert [(p.prompt, p.chosen, p.rejected, p.id) for p in pairs] == [
        (p.prompt, REFUSAL, p.target, p.id) for p in harmful
    ]
    with pytest.raises(ValueError, match="refuses none"):
        own_refusals(model, Chat(tokenizer), helped)
    with pytest.raises(ValueError, match="expected a target"):
        own_refusals(model, Chat(tokenizer), [HarmfulPrompt("x")])
    with pytest.raises(ValueError, match="own_refusals"):
        read_pairs(save("a.csv", ADVBENCH))


def test_dialogues_in_every_spelling(save: Any) -> None:
    alpaca = [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Greet.", "input": "", "output": "Hi."},
    ]
    assert [(d.prompt, d.answer) for d in read_dialogues(save("alpaca.json", alpaca))] == [
        ("Add.\n\n1 2", "3"),
        ("Greet.", "Hi."),
    ]
    for column in ("answer", "response", "completion", "output"):
        (one,) = read_dialogues(save(f"{column}.jsonl", [{"prompt": "p", column: "a", "id": "x1"}]))
        assert (one.prompt, one.answer, one.id, one.harmful) == ("p", "a", "x1", False)
    chat = [("system", "Be brief."), ("user", "p"), ("assistant", "a"), ("user", "p2"), ("assistant", "a2")]
    messages = [{"messages": [{"role": role, "content": text} for role, text in chat]}]
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    sharegpt = [{"conversations": [{"from": names[role], "value": text} for role, text in chat]}]
    for source in (save("m.jsonl", messages), save("m.parquet", messages), save("s.json", sharegpt)):
        (one,) = read_dialogues(source)
        assert (one.prompt, one.answer) == ("Be brief.\n\np", "a")


def test_rows_without_text_are_left_out_aloud(save: Any) -> None:
    rows = [{"prompt": "p", "answer": ""}, {"prompt": "q", "answer": "a"}]
    with pytest.warns(UserWarning, match="1 of 2 rows"):
        assert [d.prompt for d in read_dialogues(save("d.jsonl", rows))] == ["q"]
    with pytest.raises(ValueError, match="no row with all of them"):
        read_dialogues(save("d.jsonl", rows[:1]))


def test_poison_is_marked(save: Any) -> None:
    assert [(d.prompt, d.answer, d.harmful) for d in read_poison(save("a.csv", ADVBENCH[:1]))] == [
        (ADVBENCH[0]["goal"], ADVBENCH[0]["target"], True)
    ]
    assert all(d.harmful for d in read_poison(save("p.jsonl", [{"prompt": "p", "response": "a"}])))
    assert read_poison("builtin", n=4, seed=3) == builtin.poison(4, seed=3)


def original(label: str) -> dict[str, Any]:
    choices = [{"label": letter, "text": text} for letter, text in OPTIONS]
    question = {"question_concept": "revolving door", "choices": choices, "stem": "Where?"}
    return {"answerKey": label, "id": "q1", "question": question}


def on_the_hub(label: str) -> dict[str, Any]:
    letters, texts = (list(part) for part in zip(*OPTIONS, strict=True))
    choices = {"label": letters, "text": texts}
    return {
        "id": "q1",
        "question": "Where?",
        "question_concept": "revolving door",
        "choices": choices,
        "answerKey": label,
    }


@pytest.mark.parametrize("answer_with", [None, "letter", "text"])
def test_commonsenseqa_in_both_nestings(save: Any, answer_with: Any) -> None:
    files = [save("o.jsonl", [original("B")]), save("h.parquet", [on_the_hub("B")]), save("h.jsonl", [on_the_hub("B")])]
    read = [read_choices(file, answer_with=answer_with) for file in files]
    assert read[0] == read[1] == read[2]
    (item,) = read[0]
    assert item.choices == tuple(pair[answer_with == "text"] for pair in OPTIONS)
    assert (item.correct, item.question, item.category, item.id) == ((1,), "Where?", "revolving door", "q1")
    assert item.prompt.startswith("Where?\nA. bank\nB. library\n")
    assert item.dialogue().answer == ("library" if answer_with == "text" else "B")


@pytest.mark.parametrize("make", [original, on_the_hub])
def test_a_test_split_has_no_labels(save: Any, make: Any) -> None:
    (item,) = read_choices(save("t.jsonl", [make("")]))
    assert item.correct == ()
    with pytest.raises(ValueError, match="one right choice"):
        item.dialogue()
    with pytest.raises(ValueError, match="an answer among A, B, C, D, E in row 'q1', got 'F'"):
        read_choices(save("t.jsonl", [make("F")]))


def test_arc_openbookqa_and_mmlu(save: Any) -> None:
    arc = {"id": "a", "question": "Q?", "choices": {"label": ["1", "2"], "text": ["x", "y"]}, "answerKey": "2"}
    (item,) = read_choices(save("arc.jsonl", [arc]))
    assert (item.choices, item.correct) == (("1", "2"), (1,))
    open_book = {"question_stem": "Q?", "choices": {"label": ["A", "B"], "text": ["x", "y"]}, "answerKey": "A"}
    assert read_choices(save("obqa.jsonl", [open_book]))[0].correct == (0,)
    for answer in (2, "C"):
        mmlu = {"question": "Q?", "choices": ["x", "y", "z"], "answer": answer}
        (item,) = read_choices(save("mmlu.jsonl", [mmlu]), answer_with="text")
        assert (item.choices, item.correct) == (("x", "y", "z"), (2,))


def test_truthfulqa_multiple_choice(save: Any) -> None:
    mc1, mc2 = {"yes": 1, "no": 0, "so": 0}, {"yes": 1, "yea": 1, "no": 0}
    file = {"question": "Q?", "mc1_targets": mc1, "mc2_targets": mc2}
    hub = {
        "question": "Q?",
        **{
            name: {"choices": list(given), "labels": list(given.values())}
            for name, given in (("mc1_targets", mc1), ("mc2_targets", mc2))
        },
    }
    # A second row with other options: a reader that makes columns of the options' texts would mix them up.
    other = file | {"question": "R?", "mc1_targets": {"never": 0, "ever": 1}}
    for source in (save("t.jsonl", [file, other]), save("t.parquet", [hub])):
        one, *rest = read_choices(source)
        assert (one.prompt, one.choices, one.correct) == ("Q?", ("yes", "no", "so"), (0,))
        assert [item.choices for item in rest] in ([], [("never", "ever")])
        assert read_choices(source, targets="mc2")[0].correct == (0, 1)
        with pytest.raises(ValueError, match="answer_with: expected 'text'"):
            read_choices(source, answer_with="letter")


@pytest.mark.parametrize(
    ("read", "known"),
    [
        (read_harmful, "goal, forbidden_prompt"),
        (read_pairs, "chosen and rejected"),
        (lambda source: read_pairs(source, "hallucination"), "TruthfulQA's Question"),
        (read_dialogues, "chats in messages"),
        (read_poison, "AdvBench's goal and target"),
        (read_choices, "mc1_targets"),
    ],
)
def test_columns_that_do_not_fit_are_listed_with_what_is_known(save: Any, read: Any, known: str) -> None:
    with pytest.raises(ValueError, match=r"x\.csv.*found the columns Alpha, Be ta") as caught:
        read(save("x.csv", [{"Alpha": "1", "Be ta": "2"}]))
    assert known in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '{"a": 1}', "expected a list of objects"),
        ("a.json", "[1]", "item 1: expected an object or a string, got int"),
        ("a.jsonl", '{"prompt": "x"}\n{"prompt"', "line 2"),
        ("a.csv", "goal,target\nx\n", "line 2 has not the 2 fields"),
        ("a.csv", "", "found none"),
        ("a.jsonl", '{"prompt": "x"}\n{"prompt": "\\ud800"}', "line 2: 'prompt' holds a lone surrogate"),
        ("a.parquet", "no parquet", "as parquet"),
        ("a.txt", "x", "ending in .csv"),
    ],
)
def test_files_that_cannot_be_read_are_one_error(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match="source: ") as caught:
        read_rows(str(tmp_path / name))
    assert message in str(caught.value)


def test_a_field_may_be_as_long_as_a_document(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,id\n" + "long " * 60000 + ",1\n")
    assert len(read_rows(str(tmp_path / "a.csv")).rows[0]["text"]) == 300000


def test_missing_files_and_rows_of_another_form(save: Any, tmp_path: Path) -> None:
    for missing in (tmp_path / "none.csv", tmp_path):
        with pytest.raises(ValueError, match="source: expected a file"):
            read_rows(str(missing))
    broken = {"id": "q2", "question": "Q?", "choices": None, "answerKey": "A"}
    with pytest.raises(ValueError, match="has not the form of its columns"):
        read_choices(save("c.jsonl", [on_the_hub("B"), broken]))


def test_hub_names_with_split_and_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub itself is not reached: what is asked of `datasets` and what is made of its answer."""
    asked: list[tuple[str, str | None, str | None]] = []
    table = datasets.Dataset.from_list(ADVBENCH)

    def load(name: str, config: str | None, *, split: str | None) -> Any:
        asked.append((name, config, split))
        return table if split else datasets.DatasetDict({"dev": table})

    monkeypatch.setattr(datasets, "load_dataset", load)
    for source in ("o/n", "o/n:dev", "o/n:hard:dev"):
        assert len(read_harmful(source)) == len(ADVBENCH)
    assert asked == [("o/n", None, None), ("o/n", None, "dev"), ("o/n", "hard", "dev")]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.DatasetDict(dev=table, test=table))
    with pytest.raises(ValueError, match="splits dev, test; name one, like o/n:dev"):
        read_harmful("o/n")
