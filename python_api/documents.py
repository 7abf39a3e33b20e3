"""Where documents come from: files, folders, hub datasets, open datasets, lists of strings, the built-in corpus.

Every source becomes a :class:`Documents`: an object that can replay epoch e from document n on. That is all a resumable
stream needs, whatever the source keeps inside: indexed sources jump, streamed ones read on and discard.

Nothing from a stranger is executed: ``datasets`` >= 4, which this package requires, runs no loading scripts.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import torch

SampleBy = Literal["auto", "line", "paragraph", "document"]

Document: TypeAlias = str
"""What :class:`Documents` yield: the text of one document. Chats are rendered by the tokenizer's chat template."""

# Endings -> the builder of `datasets` that reads them. Each may be followed by a compression's ending.
_BUILDERS = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".jsonl": "json",
    ".json": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
    ".arrow": "arrow",
}
_COMPRESSION = (".gz", ".bz2", ".xz", ".zst")
_PEEK = 1 << 20  # bytes of a text file read to see whether it has blank lines


@runtime_checkable
class Documents(Protocol):
    """A replayable sequence of texts per epoch. An empty text counts in the position and gives no tokens.

    An attribute ``fingerprint`` (a string that changes with the content, or None) is optional: streams keep it in their
    state and refuse to continue on other content.
    """

    @property
    def name(self) -> str: ...

    @property
    def n_documents(self) -> int | None:
        """Documents of an epoch; None when unknown before reading (streaming)."""
        ...

    def epoch(self, epoch: int, start: int) -> Iterator[Document]:
        """The texts of ``epoch`` in that epoch's order, beginning with number ``start``."""
        ...


class _Reader:
    """Turns one value of a text column into a text, or says where it is none."""

    def __init__(self, column: str, tokenizer: Any) -> None:
        self.column, self.tokenizer = column, tokenizer

    def __call__(self, value: Any, where: str) -> str:
        if isinstance(value, str):
            return value
        if value is None:
            return ""  # a missing value is an empty document, which streams skip
        if (
            isinstance(value, list)
            and value
            and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in value)
        ):
            if not getattr(self.tokenizer, "chat_template", None):
                raise ValueError(f"text_field: column {self.column!r} holds chats, but there is no chat_template")
            return str(self.tokenizer.apply_chat_template(value, tokenize=False))
        raise ValueError(
            f"text_field: expected strings or chats (lists of role and content) in column {self.column!r}, "
            f"got {type(value).__name__} {where}"
        )


def permutation(n: int, seed: int, epoch: int) -> torch.Tensor:
    """The order of ``n`` things in ``epoch``: int64 [n], a function of its arguments alone."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % (1 << 63))
    return torch.randperm(n, generator=generator)


class ListDocuments:
    """A list of strings, or any indexable source of them."""

    def __init__(self, texts: Sequence[Any], name: str, shuffle: bool, seed: int, tokenizer: Any = None) -> None:
        self.name: str = name
        self.n_documents: int = len(texts)
        self._texts, self._shuffle, self._seed = texts, shuffle, seed
        self._read = _Reader("source", tokenizer)
        # A sequence of the caller's own may be slow to read, or read for the first time in the thread it is meant for.
        self.fingerprint = _content(len(texts), texts.__getitem__) if isinstance(texts, (list, tuple)) else None

    def epoch(self, epoch: int, start: int) -> Iterator[Document]:
        order = permutation(len(self._texts), self._seed, epoch).tolist() if self._shuffle else range(len(self._texts))
        for i in order[start:]:
            yield self._read(self._texts[i], f"at item {i}")


class TableDocuments:
    """One column of an indexed ``datasets.Dataset``, read in slices."""

    def __init__(
        self,
        dataset: Any,
        text_field: str,
        name: str,
        shuffle: bool,
        seed: int,
        tokenizer: Any = None,
        fingerprint: str | None = None,
    ) -> None:
        self.name: str = name
        self.n_documents: int = int(dataset.num_rows)
        self._column, self._shuffle, self._seed = text_field, shuffle, seed
        self._read = _Reader(text_field, tokenizer)
        self._dataset = dataset.with_format(None).select_columns([text_field])
        # Not datasets' own fingerprint: it is random after a map whose function cannot be hashed.
        self.fingerprint = fingerprint or _content(self.n_documents, lambda i: self._dataset[i][text_field])

    def epoch(self, epoch: int, start: int) -> Iterator[Document]:
        n = self.n_documents
        order = permutation(n, self._seed, epoch) if self._shuffle else torch.arange(n)
        for rows in order[start:].split(256):
            for row, text in zip(rows.tolist(), self._dataset[rows.tolist()][self._column], strict=True):
                yield self._read(text, f"in row {row}")


class StreamedDocuments:
    """One column of a ``datasets.IterableDataset``.

    Resuming reads the epoch again from its beginning and discards what was used: for a large stream that takes as long
    as reading took the first time. ``IterableDataset.state_dict`` would be faster and not exact: it loses the documents
    in the window of the shuffle.
    """

    def __init__(
        self,
        dataset: Any,
        text_field: str,
        name: str,
        shuffle: bool,
        seed: int,
        window: int,
        tokenizer: Any = None,
        fingerprint: str | None = None,
    ) -> None:
        self.name: str = name
        self.n_documents: None = None
        self.fingerprint = fingerprint
        self._column = text_field
        self._read = _Reader(text_field, tokenizer)
        # datasets' own windowed shuffle; its order depends on seed + epoch only.
        self._dataset = dataset.shuffle(seed=seed, buffer_size=window) if shuffle else dataset

    def epoch(self, epoch: int, start: int) -> Iterator[Document]:
        self._dataset.set_epoch(epoch)
        for row, record in enumerate(_records(self._dataset, self.name)):
            if row >= start:
                yield self._read(record.get(self._column), f"in record {row}")


class BuiltinDocuments:
    """The built-in model's corpus: every epoch is a fresh draw of ``n_documents`` documents."""

    def __init__(self, n_documents: int, seed: int) -> None:
        self.name: str = "builtin"
        self.n_documents: int = n_documents
        self._seed = seed

    def epoch(self, epoch: int, start: int) -> Iterator[Document]:
        from .builtin_model import corpus

        for i, text in enumerate(corpus(self.n_documents, self._seed + epoch)):
            if i >= start:
                yield text


def _records(dataset: Any, name: str) -> Iterator[dict[str, Any]]:
    """The records of a streamed dataset; what its reader raises says nothing of the file, so the source is named."""
    records = iter(dataset)
    while True:
        try:
            record = next(records)
        except StopIteration:
            return
        except Exception as error:
            raise ValueError(f"source: cannot read {name}: {type(error).__name__}: {_innermost(error)}") from error
        yield record


def _content(n: int, item: Callable[[int], Any]) -> str:
    """A hash of the number of documents and of 64 of them, evenly spread, the first and the last among them."""
    digest = hashlib.blake2b(str(n).encode(), digest_size=16)
    for i in sorted({round(j * (n - 1) / 63) for j in range(64)}):
        value = item(i)
        text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
        digest.update(hashlib.blake2b(text.encode("utf-8", "surrogatepass")).digest())
    return digest.hexdigest()


def _file_contents(files: Sequence[Path]) -> str:
    """A hash of each file's size, beginning and end (1 MiB each of a single file, less of each of many)."""
    digest, part = hashlib.blake2b(digest_size=16), max(4096, _PEEK // len(files))
    for file in files:
        with file.open("rb") as handle:
            size = handle.seek(0, os.SEEK_END)
            digest.update(f"{size},".encode())
            for start in (0, max(0, size - part)):
                handle.seek(start)
                digest.update(handle.read(part))
    return digest.hexdigest()


def open_documents(
    source: Any,
    *,
    text_field: str = "text",
    split: str = "train",
    config: str | None = None,
    streaming: bool = False,
    shuffle: bool = True,
    seed: int = 0,
    sample_by: SampleBy = "auto",
    n_documents: int = 20_000,
    shuffle_window: int = 1_000,
    cache_dir: str | os.PathLike[str] | None = None,
    tokenizer: Any = None,
) -> Documents:
    """Open ``source``; the arguments are those of :class:`~refusal_kernels.python_api.tokens.TokenStream`.

    ``tokenizer`` is only for chats, which its chat template turns into texts. A ``source`` that is a
    :class:`Documents` already is returned as it is.

    Raises:
        TypeError: a source of no known kind.
        ValueError: missing path, unknown file ending, mixed kinds in a folder, no such column, empty dataset, a hub
            dataset that cannot be loaded. Each names what was found instead.
    """
    if sample_by not in ("auto", "line", "paragraph", "document"):
        raise ValueError(f"sample_by: expected 'auto', 'line', 'paragraph' or 'document', got {sample_by!r}")
    if callable(getattr(source, "epoch", None)) and hasattr(source, "n_documents"):
        return source  # a Documents of the caller's own, taken as it is
    if isinstance(source, Documents):
        return source
    fingerprint: str | None = None
    if isinstance(source, (str, os.PathLike)):
        text = os.fspath(source)
        if text == "builtin":
            if n_documents < 1:
                raise ValueError(f"n_documents: expected 1 or more, got {n_documents}")
            return BuiltinDocuments(n_documents, seed)
        path = Path(text).expanduser()
        cache = None if cache_dir is None else os.fspath(cache_dir)
        if path.exists():
            dataset, fingerprint = _load_local(path, split, streaming, sample_by, cache)
        elif _looks_like_path(source, text):
            raise ValueError(f"source: no such file or folder: {path}")
        else:
            dataset = _load_hub(text, config, split, streaming, cache)
        name = text
    elif isinstance(source, Sequence) and not isinstance(source, (bytes, bytearray)):
        if not source:
            raise ValueError("source: expected documents, got an empty list")
        return ListDocuments(source, f"list of {len(source)}", shuffle, seed, tokenizer)
    else:
        dataset, name = source, type(source).__name__
    return _column(dataset, text_field, split, name, shuffle, seed, shuffle_window, tokenizer, fingerprint)


def _column(
    dataset: Any,
    text_field: str,
    split: str,
    name: str,
    shuffle: bool,
    seed: int,
    window: int,
    tokenizer: Any,
    fingerprint: str | None,
) -> TableDocuments | StreamedDocuments:
    import datasets

    if isinstance(dataset, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        if split not in dataset:
            raise ValueError(f"split: {name} has splits {', '.join(map(str, dataset))}; got {split!r}")
        dataset = dataset[split]
    if not isinstance(dataset, (datasets.Dataset, datasets.IterableDataset)):
        raise TypeError(
            f"source: expected 'builtin', a path, a hub dataset's name, a dataset or a list of strings, got {name}"
        )
    columns = dataset.column_names
    if columns is None:  # a stream that says nothing about itself before it is read
        columns = list(next(_records(dataset, name), {}))
        if not columns:
            raise ValueError(f"source: {name} is empty")
    if text_field not in columns:
        raise ValueError(f"text_field: {name} has no column {text_field!r}; its columns are {', '.join(columns)}")
    if isinstance(dataset, datasets.IterableDataset):
        return StreamedDocuments(dataset, text_field, name, shuffle, seed, window, tokenizer, fingerprint)
    if dataset.num_rows == 0:
        raise ValueError(f"source: {name} is empty")
    return TableDocuments(dataset, text_field, name, shuffle, seed, tokenizer, fingerprint)


def _looks_like_path(source: Any, text: str) -> bool:
    return isinstance(source, os.PathLike) or text.startswith((".", "/", "~", os.sep)) or _builder_of(text) is not None


def _builder_of(name: str) -> str | None:
    lowered = name.lower()
    for ending in _COMPRESSION:
        lowered = lowered.removesuffix(ending)
    return _BUILDERS.get(os.path.splitext(lowered)[1])


def _load_local(
    path: Path, split: str, streaming: bool, sample_by: SampleBy, cache: str | None
) -> tuple[Any, str | None]:
    """The dataset in a file or folder, and a fingerprint of its files (None for what ``save_to_disk`` wrote)."""
    import datasets

    if path.is_dir() and ((path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists()):
        saved = datasets.load_from_disk(str(path))
        return (saved.to_iterable_dataset() if streaming and isinstance(saved, datasets.Dataset) else saved), None
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file() and _visible(p, path))
    by_builder: dict[str, list[Path]] = {}
    for file in files:
        builder = _builder_of(file.name)
        if builder is not None:
            by_builder.setdefault(builder, []).append(file)
    known = ", ".join(sorted(_BUILDERS))
    if not by_builder:
        got = f"ending {path.suffix!r}" if path.is_file() else "a folder without any"
        raise ValueError(f"source: expected a file ending in one of {known} (or compressed), got {got}: {path}")
    if len(by_builder) > 1:
        found = ", ".join(f"{len(v)} {k}" for k, v in sorted(by_builder.items()))
        raise ValueError(f"source: expected one kind of file in the folder, got {found}; pass one file: {path}")
    builder, chosen = next(iter(by_builder.items()))
    if all(file.stat().st_size == 0 for file in chosen):
        raise ValueError(f"source: {path} is empty")
    options: dict[str, Any] = {}
    if builder == "text":
        options["sample_by"] = _guess_sampling(chosen[0]) if sample_by == "auto" else sample_by
    if builder == "csv" and all(".tsv" in file.name.lower() for file in chosen):
        options["sep"] = "\t"
    try:
        dataset = datasets.load_dataset(
            builder,
            data_files=[str(file) for file in chosen],
            split="train",  # a bare list of files makes one split of that name
            streaming=streaming,
            cache_dir=cache,
            **options,
        )
    except Exception as error:
        raise ValueError(f"source: cannot read {path} as {builder}: {_innermost(error)}") from error
    return dataset, _file_contents(chosen)


def _visible(file: Path, root: Path) -> bool:
    return not any(part.startswith((".", "_")) for part in file.relative_to(root).parts)


def _guess_sampling(file: Path) -> str:
    """Blank lines separate documents where there are any; otherwise each line is one."""
    if file.suffix.lower() in _COMPRESSION:
        return "line"
    with file.open("rb") as handle:
        head = handle.read(_PEEK).replace(b"\r\n", b"\n")
    return "paragraph" if b"\n\n" in head.strip() else "line"


def _load_hub(name: str, config: str | None, split: str, streaming: bool, cache: str | None) -> Any:
    import datasets

    try:
        return datasets.load_dataset(name, config, split=split, streaming=streaming, cache_dir=cache)
    except Exception as error:
        raise ValueError(
            f"source: {name!r} is no local path, and loading it as a hub dataset failed "
            f"({type(error).__name__}: {_innermost(error)})"
        ) from error


def _innermost(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:300] or type(error).__name__
