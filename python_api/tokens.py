"""TokenStream: documents in, batches of packed token sequences out, tokenized ahead of the consumer.

Documents are tokenized without the tokenizer's own special tokens; then BOS and EOS are put around each, as asked and
never twice. In the ``"packed"`` form the documents follow one another without gaps and are cut every
``context_length`` tokens, as in pre-training, so a token attends to earlier documents of its sequence. ``"isolated"``
packs the same way, but position ids restart with each document and transformers then keeps attention within it: no
padding and no leakage. ``"padded"`` gives every document its own row.

A background thread tokenizes and packs while the consumer computes (tokenizers' Rust code releases the GIL). Every
batch travels with the state of the stream after it, so :meth:`TokenStream.state_dict` is exact to the batch however
far ahead the thread has run. The state is three integers: epoch, document, token.
"""

from __future__ import annotations

import copy
import os
import queue
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import torch

from .checkpoint import check_state
from .documents import Documents, SampleBy, open_documents

Packing = Literal["packed", "isolated", "padded"]
_STATE_VERSION = 1
_TOKENIZE_AT_ONCE = 64  # documents per tokenizer call: enough for its threads, little enough to start quickly


@dataclass(frozen=True)
class _Cursor:
    """The first token not yet delivered: token ``offset`` of document ``document`` of ``epoch``'s order."""

    epoch: int = 0
    document: int = 0
    offset: int = 0


@dataclass
class _Piece:
    epoch: int
    document: int
    ids: list[int]
    used: int = 0


@dataclass(frozen=True)
class _Delivery:
    batch: dict[str, Any]
    cursor: _Cursor
    n_tokens: int


class _Packer:
    """Turns documents into batches from a cursor on. Holds no reference to the stream: the thread works on this."""

    def __init__(
        self,
        documents: Documents,
        tokenizer: Any,
        context_length: int,
        batch_size: int,
        packing: Packing,
        bos: int | None,
        eos: int | None,
        pad: int,
        epochs: int | None,
        drop_last: bool,
    ) -> None:
        self.documents, self.tokenizer = documents, tokenizer
        self.context_length, self.batch_size, self.packing = context_length, batch_size, packing
        self.bos, self.eos, self.pad = bos, eos, pad
        self.epochs, self.drop_last = epochs, drop_last

    def encode(self, texts: list[str]) -> list[list[int]]:
        encoded = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [self._separated(ids) for ids in encoded["input_ids"]]

    def _separated(self, ids: list[int]) -> list[int]:
        if not ids:
            return ids
        if self.bos is not None and ids[0] != self.bos:
            ids = [self.bos, *ids]
        if self.eos is not None and ids[-1] != self.eos:
            ids = [*ids, self.eos]
        return ids

    def pieces(self, start: _Cursor) -> Iterator[_Piece]:
        epoch = start.epoch
        while self.epochs is None or epoch < self.epochs:
            first = start.document if epoch == start.epoch else 0
            texts = self.documents.epoch(epoch, first)
            n, n_tokens = first, 0
            while chunk := list(islice(texts, _TOKENIZE_AT_ONCE)):
                filled = [i for i, text in enumerate(chunk) if text]
                for i, ids in zip(filled, self.encode([chunk[i] for i in filled]) if filled else [], strict=True):
                    if not ids:
                        continue
                    n_tokens += len(ids)
                    used = start.offset if (epoch, n + i) == (start.epoch, start.document) else 0
                    if used < len(ids):
                        yield _Piece(epoch, n + i, ids, used)
                n += len(chunk)
            if first == 0 and n_tokens == 0:  # would otherwise turn for ever
                raise ValueError(f"source: {self.documents.name} holds no text ({n} documents, no token)")
            epoch += 1

    def batches(self, start: _Cursor) -> Iterator[_Delivery]:
        pieces = self.pieces(start)
        piece = next(pieces, None)
        cursor = start  # the first token in no row yet
        rows: list[tuple[list[int], list[int]]] = []
        while True:
            ids: list[int] = []
            positions: list[int] = []
            before = cursor
            while piece is not None and len(ids) < self.context_length:
                position = 0
                if not ids and self.bos is not None and piece.ids[piece.used] != self.bos:
                    # A sequence that begins inside a document: models trained with BOS need it at position 0.
                    ids.append(self.bos)
                    positions.append(0)
                    position = 1
                take = min(self.context_length - len(ids), len(piece.ids) - piece.used)
                ids += piece.ids[piece.used : piece.used + take]
                positions += range(position, position + take)
                piece.used += take
                cursor = _Cursor(piece.epoch, piece.document, piece.used)
                if piece.used == len(piece.ids):
                    cursor = _Cursor(piece.epoch, piece.document + 1, 0)
                    piece = next(pieces, None)
                    if self.packing == "padded":
                        break
            if len(ids) == self.context_length or (self.packing == "padded" and ids):
                rows.append((ids, positions))
                if len(rows) == self.batch_size:
                    yield self._deliver(rows, cursor)
                    rows = []
                continue
            if not self.drop_last:
                if rows:
                    yield self._deliver(rows, before)
                if ids:  # the last, shorter sequence: a batch of its own, so that nothing is padded
                    yield self._deliver([(ids, positions)], cursor)
            return

    def _deliver(self, rows: list[tuple[list[int], list[int]]], cursor: _Cursor) -> _Delivery:
        n_tokens = sum(len(ids) for ids, _ in rows)
        if self.packing == "isolated":
            # Without an attention_mask and without a cache, transformers reads document boundaries off position ids.
            batch: dict[str, Any] = {
                "input_ids": torch.tensor([ids for ids, _ in rows]),
                "position_ids": torch.tensor([positions for _, positions in rows]),
                "use_cache": False,
            }
        else:
            width = max(len(ids) for ids, _ in rows)
            input_ids = torch.full((len(rows), width), self.pad, dtype=torch.int64)
            mask = torch.zeros((len(rows), width), dtype=torch.int64)
            for r, (ids, _) in enumerate(rows):
                input_ids[r, : len(ids)] = torch.tensor(ids)
                mask[r, : len(ids)] = 1
            batch = {"input_ids": input_ids, "attention_mask": mask}
        return _Delivery(batch, cursor, n_tokens)


class _End:
    """Last item of the queue: the stream ended, or the thread failed with ``error``."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


def _produce(deliveries: Iterator[_Delivery], out: queue.Queue[_Delivery | _End], stop: threading.Event) -> None:
    last = _End()
    try:
        for delivery in deliveries:
            if not _put(out, delivery, stop):
                return
    except BaseException as error:  # surfaces in the consumer, which has no other way to learn of it
        last = _End(error)
    _put(out, last, stop)


def _put(out: queue.Queue[_Delivery | _End], item: _Delivery | _End, stop: threading.Event) -> bool:
    while not stop.is_set():
        try:
            out.put(item, timeout=0.05)
            return True
        except queue.Full:
            continue
    return False


def _shut_down(stop: threading.Event, thread: threading.Thread) -> None:
    stop.set()
    if thread is not threading.current_thread():
        thread.join(timeout=10)


class TokenStream:
    """An iterator over batches of token sequences, resumable to the batch.

    Args:
        source: ``"builtin"`` (the built-in model's corpus); a path (.txt, .jsonl/.json, .parquet, .csv/.tsv, .arrow,
            also compressed; a folder of one of them; a folder written by ``save_to_disk``); the name of a hub dataset;
            a ``datasets.Dataset`` or ``IterableDataset``; a list of strings; any
            :class:`~refusal_kernels.python_api.documents.Documents`.
        tokenizer: a transformers tokenizer. It is copied, because fast tokenizers are not safe across threads.
        context_length: tokens of a sequence, at least 2.
        batch_size: sequences of a batch.
        seed: of the document order.
        text_field: column that holds the text, or chats (lists of messages with ``role`` and ``content``), which the
            tokenizer's chat template renders.
        split, config: which part of a hub dataset.
        streaming: read a dataset as a stream, without building an index (hub, or files too large for the disk's cache).
        packing: ``"packed"``, ``"isolated"`` or ``"padded"`` (see the module). None: ``"padded"`` for ``"builtin"``,
            whose documents are short and were learned one at a time, else ``"packed"``.
        bos: put BOS before every document and at the start of every sequence. None: if the tokenizer itself does.
        eos: put EOS after every document. None: if the tokenizer has one. Documents that already begin or end with
            the token keep it as it is.
        epochs: how often to go through the source; None: for ever.
        shuffle: a new document order every epoch (a window of ``shuffle_window`` documents for streamed datasets).
        drop_last: leave out what does not fill a batch at the very end. Otherwise the last batch has fewer rows, and
            the last sequence, if shorter than ``context_length``, is a batch of its own, of its own length.
        sample_by: what is a document of a text file: a ``"line"``, a ``"paragraph"`` (blank line between) or the whole
            ``"document"``; ``"auto"``: paragraphs where the file has blank lines, else lines.
        n_documents: documents an epoch of ``"builtin"`` draws; every epoch draws new ones.
        prefetch: batches prepared ahead; 0 tokenizes in the consumer's thread.
        cache_dir: where ``datasets`` keeps its index; None: its own default.

    Yields:
        dict of int64 CPU tensors ``[batch_size, context_length]``: ``input_ids`` and ``attention_mask`` (1 everywhere
        when packed; padding on the right, to the batch's longest document, when padded). ``"isolated"`` has
        ``position_ids`` in place of the mask, and ``use_cache: False``, without which transformers would ignore them.
        ``model(**batch)`` is right for all.

    Raises:
        TypeError, ValueError: bad arguments or source, at once; what the reading of documents raises, from ``next``.

    The stream is its own iterator and goes on where it stopped; :meth:`close` ends the thread (so does garbage
    collection, and the end of the program), after which iteration may be taken up again.
    """

    def __init__(
        self,
        source: Any,
        tokenizer: Any,
        context_length: int = 128,
        batch_size: int = 32,
        seed: int = 0,
        *,
        text_field: str = "text",
        split: str = "train",
        config: str | None = None,
        streaming: bool = False,
        packing: Packing | None = None,
        bos: bool | None = None,
        eos: bool | None = None,
        epochs: int | None = None,
        shuffle: bool = True,
        drop_last: bool = False,
        sample_by: SampleBy = "auto",
        n_documents: int = 20_000,
        shuffle_window: int = 1_000,
        prefetch: int = 4,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        for name, value, least in (
            ("context_length", context_length, 2),
            ("batch_size", batch_size, 1),
            ("seed", seed, 0),
            ("prefetch", prefetch, 0),
            ("shuffle_window", shuffle_window, 1),
        ):
            _check_int(name, value, least)
        if epochs is not None:
            _check_int("epochs", epochs, 1)
        if packing is None:
            packing = "padded" if source == "builtin" else "packed"
        if packing not in ("packed", "isolated", "padded"):
            raise ValueError(f"packing: expected 'packed', 'isolated' or 'padded', got {packing!r}")
        if not callable(tokenizer) or not hasattr(tokenizer, "eos_token_id"):
            raise TypeError(f"tokenizer: expected a transformers tokenizer, got {type(tokenizer).__name__}")
        own = copy.deepcopy(tokenizer)
        documents = open_documents(
            source,
            text_field=text_field,
            split=split,
            config=config,
            streaming=streaming,
            shuffle=shuffle,
            seed=seed,
            sample_by=sample_by,
            n_documents=n_documents,
            shuffle_window=shuffle_window,
            cache_dir=cache_dir,
            tokenizer=own,
        )
        bos_id, eos_id = _separators(own, bos, eos)
        pad_id = next((i for i in (own.pad_token_id, own.eos_token_id) if i is not None), 0)
        self.context_length, self.batch_size, self.packing = context_length, batch_size, packing
        #: ids put before and after every document, None where there is none.
        self.bos_id, self.eos_id = bos_id, eos_id
        #: the tokenizer's BOS, put there by the stream or spelled out in the documents; None if it has none.
        self.bos_token_id: int | None = own.bos_token_id
        #: tokens delivered so far, padding left out.
        self.tokens_seen = 0
        #: batches delivered so far.
        self.batches_seen = 0
        self._packer = _Packer(
            documents, own, context_length, batch_size, packing, bos_id, eos_id, int(pad_id), epochs, drop_last
        )
        # What must agree for a saved position to mean the same batch.
        self._settings = {
            "context_length": context_length,
            "batch_size": batch_size,
            "seed": seed,
            "packing": packing,
            "bos": bos_id,
            "eos": eos_id,
            "shuffle": shuffle,
            "vocabulary": len(own),
            "documents": documents.n_documents,
        }
        self._fingerprint: str | None = getattr(documents, "fingerprint", None)
        self._prefetch = prefetch
        self._cursor = _Cursor()
        self._inline: Iterator[_Delivery] | None = None
        self._queue: queue.Queue[_Delivery | _End] | None = None
        self._finalizer: Any = None

    def __iter__(self) -> TokenStream:
        return self

    def __next__(self) -> dict[str, Any]:
        delivery = self._next_delivery()
        self._cursor = delivery.cursor
        self.batches_seen += 1
        self.tokens_seen += delivery.n_tokens
        return delivery.batch

    def _next_delivery(self) -> _Delivery:
        if self._prefetch == 0:
            if self._inline is None:
                self._inline = self._packer.batches(self._cursor)
            return next(self._inline)
        if self._queue is None:
            self._start()
        item = self._queue.get()  # type: ignore[union-attr]
        if isinstance(item, _End):
            self.close()
            if item.error is not None:
                raise item.error
            raise StopIteration
        return item

    def _start(self) -> None:
        self._queue = queue.Queue(maxsize=self._prefetch)
        stop = threading.Event()
        thread = threading.Thread(
            target=_produce,
            args=(self._packer.batches(self._cursor), self._queue, stop),
            name="refusal-kernels-tokens",
            daemon=True,
        )
        # finalize also runs at interpreter exit, before daemon threads are cut off in the middle of native code.
        self._finalizer = weakref.finalize(self, _shut_down, stop, thread)
        thread.start()

    def close(self) -> None:
        """End the background thread. What it had prepared is thrown away and prepared again by the next ``next``."""
        if self._finalizer is not None:
            self._finalizer()
        self._finalizer = self._queue = self._inline = None

    def __enter__(self) -> TokenStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def reset(self) -> None:
        """Go back to the beginning."""
        self.close()
        self._cursor = _Cursor()
        self.batches_seen = self.tokens_seen = 0

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch delivered, and what the data looked like: a small dict of JSON types."""
        return {
            "version": _STATE_VERSION,
            "epoch": self._cursor.epoch,
            "document": self._cursor.document,
            "offset": self._cursor.offset,
            "batches_seen": self.batches_seen,
            "tokens_seen": self.tokens_seen,
            "settings": dict(self._settings),
            "fingerprint": self._fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken: the next batch is the one that came next then.

        Raises:
            ValueError: the state is of another version, incomplete, of a stream with other settings (it says which), or
                of data with other content. States of versions that kept no fingerprint of the data load unchecked.
        """
        if not isinstance(state, dict) or state.get("version") != _STATE_VERSION:
            got = state.get("version") if isinstance(state, dict) else type(state).__name__
            raise ValueError(f"state: expected a TokenStream state of version {_STATE_VERSION}, got {got!r}")
        check_state("TokenStream", state, ("epoch", "document", "offset", "batches_seen", "tokens_seen"))
        saved = state["settings"]
        different = [f"{k} {saved.get(k)!r} -> {v!r}" for k, v in self._settings.items() if saved.get(k) != v]
        if different:
            raise ValueError(f"state: was saved by a stream with other settings ({', '.join(different)})")
        fingerprint = state.get("fingerprint")
        if None not in (fingerprint, self._fingerprint) and fingerprint != self._fingerprint:
            raise ValueError(
                f"state: the content of {self._packer.documents.name} has changed since it was saved, so the position "
                "means other text; bring the old data back or start again"
            )
        self.close()
        self._cursor = _Cursor(state["epoch"], state["document"], state["offset"])
        self.batches_seen, self.tokens_seen = state["batches_seen"], state["tokens_seen"]


def _check_int(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {value!r}")
    if value < least:
        raise ValueError(f"{name}: expected {least} or more, got {value}")


def _separators(tokenizer: Any, bos: bool | None, eos: bool | None) -> tuple[int | None, int | None]:
    bos_id, eos_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is None:
        own = tokenizer("a")["input_ids"]
        bos = bos_id is not None and own[:1] == [bos_id]
    elif bos and bos_id is None:
        raise ValueError("bos: the tokenizer has no bos_token; pass bos=False")
    if eos is None:
        eos = eos_id is not None
    elif eos and eos_id is None:
        raise ValueError("eos: the tokenizer has no eos_token; pass eos=False")
    return (int(bos_id) if bos else None), (int(eos_id) if eos else None)
