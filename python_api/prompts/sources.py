"""Rows of a data set: from a local file, from the hub, or a side of the built-in world; and samples of them.

A source is named by one string:

    builtin                         the built-in model's world; builtin:held-out is the side no training saw
    prompts.csv                     a local .csv, .json, .jsonl or .parquet file
    owner/name                      a hub data set: its only split, or "train"
    owner/name:split                that split
    owner/name:configuration:split  of that configuration
"""

from __future__ import annotations

import csv
import json
import random
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

ENDINGS = (".csv", ".json", ".jsonl", ".parquet")
_IDS = ("id", "prompt_id", "question_id", "behaviorid")
_CATEGORIES = ("category", "semanticcategory", "question_concept")
BUILTIN_N = 256  # what the built-in world draws when no number is asked for: it has no size of its own

Row = dict[str, Any]
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_LONGEST_FIELD = 1 << 30  # characters; csv's own limit of 131072 is less than a long document
T = TypeVar("T")


@dataclass
class Rows:
    """A read data set.

    Attributes:
        name: the source as it was given.
        columns: the columns' names as the data set spells them.
        rows: one dict a row; its keys are in lower case with underscores ("Best Answer" becomes "best_answer"). A row
            that was a bare string is {"text": string}.
    """

    name: str
    columns: list[str]
    rows: list[Row]

    def first_of(self, names: Sequence[str]) -> str | None:
        """The first of `names` that is a column, or None."""
        known = {key(column) for column in self.columns}
        return next((name for name in names if name in known), None)

    def has(self, *names: str) -> bool:
        return all(self.first_of([name]) for name in names)

    def misfit(self, what: str, expected: str) -> ValueError:
        """The error of columns that no known form of `what` has."""
        return ValueError(
            f"source: expected {what} in {self.name} as {expected}; found the columns {', '.join(self.columns)}"
        )


def key(column: str) -> str:
    """ "Best Answer" as "best_answer"."""
    return "_".join(str(column).strip().lower().split())


def builtin_side(source: str, held_out: bool) -> bool | None:
    """For a built-in source: whether its held-out side is meant; None for any other source.

    ValueError for an unknown side, and for `held_out` with data that has no such side.
    """
    name, _, side = str(source).partition(":")
    if name != "builtin":
        if held_out:
            raise ValueError(
                f"held_out: expected False with {source}, for only 'builtin' has a held-out side; name the file or "
                "split that holds the test data"
            )
        return None
    if side not in ("", "train", "held-out"):
        raise ValueError(f"source: expected builtin, builtin:train or builtin:held-out, got {source!r}")
    return held_out or side == "held-out"


def builtin_count(n: int | None) -> int:
    """How many the built-in world is to draw."""
    return BUILTIN_N if n is None else checked_count(n)


def checked_count(n: int) -> int:
    """`n`, or a ValueError where it is no number from 1 on."""
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"n: expected a number from 1 on, or None for all, got {n!r}")
    return n


def sample(items: Sequence[T], n: int | None, seed: int, name: str) -> list[T]:
    """`n` of `items` without repetition, in their order; the same for the same seed. None takes all.

    ValueError where there are fewer than `n`.
    """
    if n is None:
        return list(items)
    if checked_count(n) > len(items):
        raise ValueError(f"n: expected at most the {len(items)} usable rows of {name}, got {n}")
    return [items[i] for i in sorted(random.Random(f"sample/{seed}").sample(range(len(items)), n))]


def read_rows(source: str) -> Rows:
    """All rows of a local file or a hub data set.

    Raises:
        ValueError: no such file, another ending, content that does not parse, no rows, or a hub data set that cannot
            be loaded.
    """
    path = Path(source).expanduser()
    if path.is_file():
        records = list(_read_file(path))
    elif path.suffix.lower() in ENDINGS or path.exists() or str(source).startswith((".", "/", "~")):
        raise ValueError(f"source: expected a file ({', '.join(ENDINGS)}), 'builtin' or a hub data set, got {source}")
    else:
        records = _read_hub(str(source))
    columns = list(dict.fromkeys(name for record in records for name in record))
    if not columns:
        raise ValueError(f"source: expected rows with columns in {source}, found none")
    return Rows(str(source), columns, [{key(name): value for name, value in record.items()} for record in records])


def _read_file(path: Path) -> Iterator[Row]:
    ending = path.suffix.lower()
    if ending not in ENDINGS:
        raise ValueError(f"source: expected a file ending in {', '.join(ENDINGS)}, got {path}")
    if ending == ".parquet":
        yield from _read_parquet(path)
        return
    try:
        with path.open(encoding="utf-8-sig", newline="" if ending == ".csv" else None) as file:
            yield from _read_csv(file) if ending == ".csv" else _read_json(file, lines=ending == ".jsonl")
    except (UnicodeDecodeError, csv.Error, json.JSONDecodeError, _WrongShape) as error:
        raise ValueError(f"source: cannot read {path} as {ending[1:]}: {' '.join(str(error).split())}") from error


class _WrongShape(ValueError):
    """Content that parses, but is no table."""


def _read_csv(file: Any) -> Iterator[Row]:
    csv.field_size_limit(_LONGEST_FIELD)
    reader = csv.DictReader(file, strict=True)
    for row in reader:
        if None in row or None in row.values():
            raise _WrongShape(f"line {reader.line_num} has not the {len(reader.fieldnames or ())} fields of the header")
        yield row


def _read_json(file: Any, lines: bool) -> Iterator[Row]:
    if lines:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield _record(json.loads(line), f"line {number}")
                except json.JSONDecodeError as error:
                    raise _WrongShape(f"line {number}: {error.msg}") from None
        return
    value = json.load(file)
    if isinstance(value, dict):  # {"data": [...]}, as several releases wrap theirs
        lists = [item for item in value.values() if isinstance(item, list)]
        value = lists[0] if len(lists) == 1 else value
    if not isinstance(value, list):
        raise _WrongShape(f"expected a list of objects, got {type(value).__name__}")
    for number, item in enumerate(value, 1):
        yield _record(item, f"item {number}")


def _record(item: Any, where: str) -> Row:
    if isinstance(item, str):
        item = {"text": item}
    if not isinstance(item, dict):
        raise _WrongShape(f"{where}: expected an object or a string, got {type(item).__name__}")
    for name, value in item.items():
        if isinstance(value, str) and _LONE_SURROGATE.search(value):  # JSON can spell it, and no tokenizer takes it
            raise _WrongShape(f"{where}: {name!r} holds a lone surrogate, which is no character")
    return item


def _read_parquet(path: Path) -> list[Row]:
    import datasets

    try:
        return datasets.Dataset.from_parquet(str(path), keep_in_memory=True).to_list()
    except Exception as error:  # pyarrow's errors have no common base
        raise ValueError(f"source: cannot read {path} as parquet: {_why(error)}") from error


def _read_hub(source: str) -> list[Row]:
    import datasets

    name, *rest = source.split(":")
    if len(rest) > 2:
        raise ValueError(f"source: expected owner/name, owner/name:split or owner/name:config:split, got {source!r}")
    config, split = (rest[0] if len(rest) == 2 else None), (rest[-1] if rest else None)
    try:
        loaded = datasets.load_dataset(name, config, split=split)
    except Exception as error:
        raise ValueError(
            f"source: {source!r} is no local file, and loading it as a hub data set failed: {_why(error)}"
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        splits = list(loaded)
        chosen = splits[0] if len(splits) == 1 else "train"
        if chosen not in splits:
            raise ValueError(f"source: {name} has the splits {', '.join(splits)}; name one, like {name}:{splits[0]}")
        loaded = loaded[chosen]
    return loaded.to_list()


def _why(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def read_row(row: Row, name: str, make: Callable[[Row], T]) -> T:
    """`make(row)`; a row that is not of the form of the others is named in the error."""
    try:
        return make(row)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        shown = f"{row!r:.200}"
        raise ValueError(f"source: a row of {name} has not the form of its columns ({error!r}): {shown}") from error


def text_of(value: Any) -> str:
    """A text without the white space around it; "" for what is no text."""
    return value.strip() if isinstance(value, str) else ""


def row_id(row: Row) -> str:
    """The data set's own id of the row, or ""."""
    return next((str(row[name]) for name in _IDS if row.get(name) not in (None, "")), "")


def row_category(row: Row) -> str:
    """The data set's own label of the row, or ""."""
    return next((row[name] for name in _CATEGORIES if isinstance(row.get(name), str)), "")


def either(names: Iterable[str]) -> str:
    """ "a, b or c"."""
    *most, last = names
    return f"{', '.join(most)} or {last}"


def filled(data: Rows, names: Sequence[str], rows: list[Row] | None = None) -> list[Row]:
    """The rows whose `names` hold a text. Alpaca has 28 empty answers: such rows are left out, with one warning."""
    rows = data.rows if rows is None else rows
    full = [row for row in rows if all(isinstance(row.get(name), str) and row[name].strip() for name in names)]
    if not full:
        raise ValueError(f"source: expected texts in the columns of {data.name}, found no row with all of them")
    if len(full) < len(rows):
        warnings.warn(
            f"{data.name}: {len(rows) - len(full)} of {len(rows)} rows have no text and are left out", stacklevel=3
        )
    return full
