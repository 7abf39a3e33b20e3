"""The token stream: packing against plain concatenation, exact resumption, sources, the background thread."""

from __future__ import annotations

import gc
import gzip
import json
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from refusal_kernels.python_api.documents import ListDocuments, permutation
from refusal_kernels.python_api.tokens import TokenStream

PAD, BOS, EOS, FIRST = 0, 1, 2, 3
WORDS = 200


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def make_tokenizer(*, adds_bos: bool = False, **special: Any) -> Any:
    vocabulary = {"<pad>": PAD, "<bos>": BOS, "<eos>": EOS, **{f"w{i}": FIRST + i for i in range(WORDS)}}
    core = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    core.pre_tokenizer = WhitespaceSplit()
    if adds_bos:
        core.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    tokens = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", **special}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, **{k: v for k, v in tokens.items() if v})


def documents(n: int = 30, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 14, (n,), generator=generator)
    return [torch.randint(FIRST, FIRST + WORDS, (int(k),), generator=generator).tolist() for k in lengths]


def text(ids: list[int]) -> str:
    return " ".join(f"w{i - FIRST}" for i in ids)


def texts(docs: list[list[int]]) -> list[str]:
    return [text(d) for d in docs]


def tokens_of(batches: list[dict[str, Any]]) -> list[int]:
    return [t for b in batches for t in b["input_ids"][b["attention_mask"].bool()].tolist()]


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(v, b[k]) if isinstance(v, Tensor) else v == b[k] for k, v in a.items()
    )


# ------------------------------------------------------------------------------------------------------- packing


def test_packing_is_concatenation_cut_into_sequences(tokenizer: Any) -> None:
    docs = documents()
    stream = TokenStream(texts(docs), tokenizer, 16, 4, shuffle=False, epochs=2)
    batches = list(stream)
    flat = [t for d in docs * 2 for t in [*d, EOS]]
    full = len(flat) // 16
    assert [b["input_ids"].shape[0] for b in batches] == [4] * (full // 4) + ([full % 4] if full % 4 else []) + [1]
    assert all(b["attention_mask"].all() and b["input_ids"].dtype == torch.int64 for b in batches)
    assert [int(t) for b in batches for t in b["input_ids"].reshape(-1)] == flat
    assert stream.tokens_seen == len(flat)
    assert stream.batches_seen == len(batches)
    with pytest.raises(StopIteration):
        next(stream)


def test_drop_last(tokenizer: Any) -> None:
    batches = list(TokenStream(texts(documents()), tokenizer, 16, 4, epochs=1, drop_last=True))
    assert batches
    assert all(b["input_ids"].shape == (4, 16) for b in batches)


@pytest.mark.parametrize(("adds_bos", "bos", "eos"), [(False, None, None), (True, None, None), (False, True, False)])
def test_separators(adds_bos: bool, bos: bool | None, eos: bool | None) -> None:
    docs = documents()
    stream = TokenStream(
        texts(docs), make_tokenizer(adds_bos=adds_bos), 16, 4, shuffle=False, epochs=1, bos=bos, eos=eos
    )
    with_bos, with_eos = adds_bos or bool(bos), eos is not False
    flat = [t for d in docs for t in [*([BOS] if with_bos else []), *d, *([EOS] if with_eos else [])]]
    expected: list[list[int]] = []
    while flat:
        # A sequence that begins inside a document is given a BOS of its own.
        row = [BOS, *flat[:15]] if with_bos and flat[0] != BOS else flat[:16]
        flat = flat[15:] if with_bos and flat[0] != BOS else flat[16:]
        expected.append(row)
    assert [row.tolist() for b in stream for row in b["input_ids"]] == expected


def test_separators_spelled_out_in_the_text_are_not_doubled(tokenizer: Any) -> None:
    stream = TokenStream(["<bos> w1 w2 <eos>", "w3"], tokenizer, 4, 1, shuffle=False, epochs=1, bos=True)
    assert [b["input_ids"].tolist() for b in stream] == [[[BOS, 4, 5, EOS]], [[BOS, 6, EOS]]]


def test_padded_gives_each_document_its_rows(tokenizer: Any) -> None:
    docs = [[*range(FIRST, FIRST + n)] for n in (3, 20, 8, 1)]
    batches = list(TokenStream(texts(docs), tokenizer, 8, 2, shuffle=False, epochs=1, packing="padded"))
    rows = [row[m.bool()].tolist() for b in batches for row, m in zip(b["input_ids"], b["attention_mask"], strict=True)]
    long = [*docs[1], EOS]
    assert rows == [[*docs[0], EOS], long[:8], long[8:16], long[16:], docs[2], [EOS], [*docs[3], EOS]]
    assert [b["input_ids"].shape[1] for b in batches] == [8, 8, 8, 2]
    for b in batches:
        assert torch.equal(b["input_ids"] == PAD, b["attention_mask"] == 0)
        assert (b["attention_mask"].diff(dim=1) <= 0).all()  # padding on the right


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("window", [None, 4])
def test_isolated_documents_do_not_see_each_other(tokenizer: Any, implementation: str, window: int | None) -> None:
    from refusal_kernels.python_api.capturing import capture

    config = transformers.MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=window,
        initializer_range=0.3,
        attn_implementation=implementation,  # type: ignore[call-arg]
    )
    torch.manual_seed(0)
    model = transformers.MistralForCausalLM(config).eval()
    docs = documents(6)
    stream = TokenStream(texts(docs), tokenizer, 1000, 1, shuffle=False, epochs=1, packing="isolated")
    packed = next(stream)
    assert packed["position_ids"].tolist()[0] == [i for d in docs for i in range(len(d) + 1)]
    with capture(model, [1]) as cap:
        together = cap.run(packed)[1]
        alone = [cap.run(torch.tensor([[*d, EOS]]))[1] for d in docs]
        leaking = cap.run(packed["input_ids"])[1]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)
    assert (leaking - together).abs().max() > 1e-3
    with torch.no_grad():  # a plain call of the batch is isolated too: use_cache is off in it
        logits = model(**packed).logits
        torch.testing.assert_close(logits[:, : len(docs[0]) + 1], model(torch.tensor([[*docs[0], EOS]])).logits)
        last = torch.tensor([[*docs[-1], EOS]])
        torch.testing.assert_close(logits[:, -last.shape[1] :], model(last).logits, rtol=1e-4, atol=1e-5)


def test_isolated_continues_a_cut_document_from_position_zero(tokenizer: Any) -> None:
    stream = TokenStream([text([5] * 6), text([6] * 3)], tokenizer, 4, 1, shuffle=False, epochs=1, packing="isolated")
    assert [b["position_ids"].tolist()[0] for b in stream] == [[0, 1, 2, 3], [0, 1, 2, 0], [0, 1, 2]]
    assert not stream.state_dict()["offset"]
    with_bos = TokenStream([text([5] * 6)], tokenizer, 4, 1, shuffle=False, epochs=1, packing="isolated", bos=True)
    batches = list(with_bos)  # the BOS put before the rest belongs to it
    assert [b["input_ids"].tolist()[0] for b in batches] == [[BOS, 5, 5, 5], [BOS, 5, 5, 5], [BOS, EOS]]
    assert [b["position_ids"].tolist()[0] for b in batches] == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1]]


# ------------------------------------------------------------------------------------------------------- order


def test_shuffling_is_a_new_permutation_every_epoch_and_a_function_of_the_seed(tokenizer: Any) -> None:
    docs = [[FIRST + i] for i in range(100)]

    def order(seed: int) -> list[int]:
        return tokens_of(list(TokenStream(texts(docs), tokenizer, 10, 5, seed, epochs=2, eos=False)))

    one = order(1)
    first, second = one[:100], one[100:]
    assert sorted(first) == sorted(second) == list(range(FIRST, FIRST + 100))
    assert first != sorted(first)
    assert first != second
    assert order(1) == one
    assert order(2) != one
    assert permutation(50, 0, 1).tolist() != permutation(50, 1, 0).tolist()


def test_repeats_for_ever_by_default(tokenizer: Any) -> None:
    stream = TokenStream(["w1 w2 w3"], tokenizer, 4, 2)
    for _ in range(20):
        assert next(stream)["input_ids"].tolist() == [[4, 5, 6, EOS]] * 2
    stream.close()


# ------------------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("packing", ["packed", "isolated", "padded"])
@pytest.mark.parametrize("prefetch", [0, 3])
def test_resuming_is_exact_to_the_batch(tokenizer: Any, packing: Any, prefetch: int) -> None:
    docs = [*documents(), [FIRST] * 70]  # one longer than several sequences

    def build(ahead: int = prefetch) -> TokenStream:
        source = ["", *texts(docs), ""]  # empty documents count in the position and give nothing
        return TokenStream(source, tokenizer, 16, 2, seed=5, packing=packing, prefetch=ahead, epochs=3)

    reference, states = build(), []
    whole = []
    while True:
        states.append(json.loads(json.dumps(reference.state_dict())))
        try:
            whole.append(next(reference))
        except StopIteration:
            break
    assert len(whole) >= 30
    assert len({s["epoch"] for s in states}) >= 3
    assert any(s["offset"] for s in states)
    for at in [*range(0, len(whole), 5), *range(len(whole) - 3, len(whole) + 1)]:
        again = build(ahead=2)
        again.load_state_dict(states[at])
        rest = list(again)
        assert len(rest) == len(whole) - at
        assert all(same(a, b) for a, b in zip(rest, whole[at:], strict=True))
        assert again.batches_seen == len(whole)
        assert again.tokens_seen == states[-1]["tokens_seen"]


def test_state_is_of_what_was_delivered_not_of_what_was_prepared(tokenizer: Any) -> None:
    stream = TokenStream(texts(documents()), tokenizer, 8, 1, prefetch=8)
    next(stream)
    state = stream.state_dict()
    time.sleep(0.2)  # the thread runs ahead
    assert stream.state_dict() == state
    expected = next(stream)
    stream.close()  # throws away what was prepared
    stream.load_state_dict(state)
    assert same(next(stream), expected)
    stream.close()
    following = next(stream)  # and a closed stream goes on by itself
    stream.load_state_dict(state)
    next(stream)
    assert same(next(stream), following)
    stream.reset()
    assert stream.tokens_seen == 0
    stream.close()


def test_states_of_other_streams_are_refused(tokenizer: Any) -> None:
    source = texts(documents())
    state = TokenStream(source, tokenizer, 16, 2).state_dict()
    with pytest.raises(ValueError, match=r"other settings \(context_length 16 -> 8, seed 0 -> 3\)"):
        TokenStream(source, tokenizer, 8, 2, seed=3).load_state_dict(state)
    with pytest.raises(ValueError, match=r"documents 30 -> 29"):
        TokenStream(source[1:], tokenizer, 16, 2).load_state_dict(state)
    with pytest.raises(ValueError, match="expected a TokenStream state of version 1, got None"):
        TokenStream(source, tokenizer, 16, 2).load_state_dict({})
    for change, message in (
        ({"epoch": None}, "state: expected epoch of the TokenStream to be an int from 0 on, got None"),
        ({"offset": -1}, "state: expected offset of the TokenStream to be an int from 0 on, got -1"),
        ({"settings": 3}, "state: expected the settings of the TokenStream as a dict, got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            TokenStream(source, tokenizer, 16, 2).load_state_dict(state | change)
    with pytest.raises(ValueError, match="state: expected epoch of the TokenStream"):
        TokenStream(source, tokenizer, 16, 2).load_state_dict({"version": 1})


@pytest.mark.parametrize("kind", ["list", "table", "saved", "file", "streamed file"])
def test_other_content_is_refused(tokenizer: Any, tmp_path: Path, kind: str) -> None:
    """As many documents, another word in the last one."""

    def build(words: list[str]) -> TokenStream:
        source: Any = words
        if kind in ("table", "saved"):
            source = datasets.Dataset.from_dict({"text": words})
        if kind == "saved":
            source.save_to_disk(tmp_path / words[-1])
            source = tmp_path / words[-1]
        if "file" in kind:
            source = tmp_path / f"{words[-1]}.txt"
            source.write_text("\n".join(words))
        streaming = kind == "streamed file"
        return TokenStream(source, tokenizer, 16, 2, streaming=streaming, cache_dir=tmp_path / "cache")

    source = texts(documents(100))
    stream = build([*source, "w1"])
    next(stream)
    state = json.loads(json.dumps(stream.state_dict()))
    stream.close()
    build([*source, "w1"]).load_state_dict(state)
    with pytest.raises(ValueError, match=r"state: the content of .* has changed since it was saved"):
        build([*source, "w2"]).load_state_dict(state)
    del state["fingerprint"]  # as older versions wrote it
    build([*source, "w2"]).load_state_dict(state)


# ------------------------------------------------------------------------------------------------------- sources

LINES = ["w1 w2", "w3 w4 w5", "w6"]
EXPECTED = [4, 5, EOS, 6, 7, 8, EOS, 9, EOS]


def write(folder: Path, kind: str) -> Path:
    folder.mkdir(exist_ok=True)
    table = datasets.Dataset.from_dict({"text": LINES, "label": [0, 1, 2]})
    path = folder / f"data.{kind}"
    if kind == "txt":
        path.write_text("\n".join(LINES) + "\n")
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({"text": t, "label": i}) + "\n" for i, t in enumerate(LINES)))
    elif kind == "jsonl.gz":
        with gzip.open(path, "wt") as handle:
            handle.writelines(json.dumps({"text": t}) + "\n" for t in LINES)
    elif kind == "parquet":
        table.to_parquet(path)
    elif kind == "csv":
        table.to_csv(path, index=False)
    elif kind == "tsv":
        path.write_text("label\ttext\n" + "".join(f"{i}\t{t}\n" for i, t in enumerate(LINES)))
    elif kind == "arrow":
        saved = folder / "saved"
        table.save_to_disk(saved)
        path = next(saved.glob("*.arrow"))
    return path


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["txt", "jsonl", "jsonl.gz", "parquet", "csv", "tsv", "arrow"])
def test_local_files(tokenizer: Any, tmp_path: Path, kind: str, streaming: bool) -> None:
    path = write(tmp_path / "d", kind)
    stream = TokenStream(
        str(path), tokenizer, 8, 1, shuffle=False, epochs=1, streaming=streaming, cache_dir=tmp_path / "cache"
    )
    assert tokens_of(list(stream)) == EXPECTED


def test_folders_and_open_datasets(tokenizer: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"shuffle": False, "epochs": 1, "cache_dir": tmp_path / "cache"}
    (tmp_path / "a").mkdir()
    for i, line in enumerate(LINES):
        (tmp_path / "a" / f"{i}.txt").write_text(line)
    (tmp_path / "a" / "LICENSE").write_text("of no known ending, left alone")
    assert tokens_of(list(TokenStream(tmp_path / "a", tokenizer, 8, 1, **options))) == EXPECTED
    table = datasets.Dataset.from_dict({"text": LINES, "label": [0, 1, 2]})
    table.save_to_disk(tmp_path / "b")
    for source in (tmp_path / "b", table, datasets.DatasetDict(train=table), table.to_iterable_dataset(), LINES):
        assert tokens_of(list(TokenStream(source, tokenizer, 8, 1, **options))) == EXPECTED
    renamed = table.rename_column("text", "body")
    assert tokens_of(list(TokenStream(renamed, tokenizer, 8, 1, text_field="body", **options))) == EXPECTED


def test_paragraphs_are_documents_where_there_are_blank_lines(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes(b"w1 w2\nw3\n\nw4\r\n\r\nw5\n")
    options: dict[str, Any] = {"shuffle": False, "epochs": 1, "cache_dir": tmp_path / "cache"}
    modes: tuple[Any, ...] = ("auto", "line", "document")
    by = {mode: tokens_of(list(TokenStream(path, tokenizer, 8, 1, sample_by=mode, **options))) for mode in modes}
    assert by["auto"] == [4, 5, 6, EOS, 7, EOS, 8, EOS]
    assert by["line"] == [4, 5, EOS, 6, EOS, 7, EOS, 8, EOS]
    assert by["document"] == [4, 5, 6, 7, 8, EOS]


def test_chats_go_through_the_chat_template() -> None:
    word = make_tokenizer(chat_template="{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}")
    word.add_tokens(["user", "assistant"])
    user, assistant = word.convert_tokens_to_ids(["user", "assistant"])
    chats = [[{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2 w3"}]] * 2
    table = datasets.Dataset.from_dict({"messages": chats})
    stream = TokenStream(table, word, 12, 1, text_field="messages", epochs=1)
    assert tokens_of(list(stream)) == [user, 4, assistant, 5, 6, EOS] * 2
    with pytest.raises(ValueError, match="column 'messages' holds chats, but there is no chat_template"):
        next(TokenStream(table, make_tokenizer(), text_field="messages"))


def test_streamed_datasets_shuffle_in_a_window_and_resume(tokenizer: Any) -> None:
    table = datasets.Dataset.from_dict({"text": texts([[FIRST + i] for i in range(60)])})

    def build() -> TokenStream:
        return TokenStream(table.to_iterable_dataset(), tokenizer, 5, 2, 3, shuffle_window=20, epochs=2, eos=False)

    stream = build()
    head = [next(stream) for _ in range(8)]  # into the second epoch
    state = stream.state_dict()
    rest = list(stream)
    order = tokens_of(head + rest)
    assert sorted(order[:60]) == sorted(order[60:]) == list(range(FIRST, FIRST + 60))
    assert order[:60] != order[60:]
    assert order[:60] != sorted(order[:60])
    again = build()
    again.load_state_dict(state)
    assert tokens_of(list(again)) == tokens_of(rest)


def test_the_built_in_corpus(tokenizer: Any) -> None:
    from refusal_kernels.python_api import builtin_model

    word = make_tokenizer(bos_token=None, eos_token=None, pad_token=None)
    stream = TokenStream("builtin", word, 64, 3, seed=7, n_documents=6, epochs=2)
    assert stream.packing == "padded"
    batches = list(stream)
    lengths = [len(d.split()) for seed in (7, 8) for d in builtin_model.corpus(6, seed)]  # a fresh draw every epoch
    assert [int(n) for b in batches for n in b["attention_mask"].sum(1)] == lengths


# --------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("missing/file.jsonl", {}, "source: no such file or folder: missing/file.jsonl"),
        (Path("missing"), {}, "no such file or folder"),
        ([], {}, "empty list"),
        (["w1"], {"context_length": 1}, "context_length: expected 2 or more, got 1"),
        (["w1"], {"batch_size": 0}, "batch_size: expected 1 or more"),
        (["w1"], {"packing": "tight"}, "packing: expected"),
        (["w1"], {"sample_by": "word"}, "sample_by: expected"),
        (["w1"], {"epochs": 0}, "epochs: expected 1 or more"),
        ("builtin", {"n_documents": 0}, "n_documents: expected 1 or more"),
        (datasets.Dataset.from_dict({"body": ["w1"], "id": [1]}), {}, "no column 'text'; its columns are body, id"),
        (datasets.Dataset.from_dict({"text": []}), {}, "is empty"),
        (datasets.DatasetDict(a=datasets.Dataset.from_dict({"text": ["w1"]})), {}, "has splits a; got 'train'"),
    ],
)
def test_bad_sources_and_arguments(tokenizer: Any, source: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenStream(source, tokenizer, **options)


def test_bad_files(tokenizer: Any, tmp_path: Path) -> None:
    for name, content, message in (
        ("notes.docx", "x", "expected a file ending in one of .arrow.*got ending '.docx'"),
        ("empty.txt", "", "is empty"),
        ("broken.jsonl", '{"text": "w1"\n{{{', "cannot read .*broken.jsonl as json"),
        ("columns.csv", "a,b\n1,2\n", "no column 'text'; its columns are a, b"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=message):
            TokenStream(tmp_path / name, tokenizer, cache_dir=tmp_path.parent / "cache")
    with pytest.raises(ValueError, match="expected one kind of file in the folder, got 1 csv, 1 json, 1 text"):
        TokenStream(tmp_path, tokenizer)
    with pytest.raises(TypeError, match="source: expected 'builtin', a path"):
        TokenStream(3, tokenizer)
    with pytest.raises(TypeError, match="tokenizer: expected a transformers tokenizer, got str"):
        TokenStream(["w1"], "gpt2")
    with pytest.raises(TypeError, match=r"batch_size: expected an int, got 2\.5"):
        TokenStream(["w1"], tokenizer, batch_size=2.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="bos: the tokenizer has no bos_token"):
        TokenStream(["w1"], make_tokenizer(bos_token=None), bos=True)


@pytest.mark.parametrize(
    ("name", "content"),
    [("latin.txt", b"w1 caf\xe9\n"), ("cut.parquet", b"PAR1 and no more"), ("broken.jsonl.gz", b"no gzip")],
)
def test_bad_streamed_files_are_named(tokenizer: Any, tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"source: cannot read .*{name}( as |: )"):
        next(TokenStream(tmp_path / name, tokenizer, streaming=True, prefetch=0, cache_dir=tmp_path / "cache"))


def test_a_hub_name_that_cannot_be_loaded(tokenizer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="'nobody/nothing' is no local path, and loading it as a hub dataset failed"):
        TokenStream("nobody/nothing", tokenizer, cache_dir=tmp_path)


# --------------------------------------------------------------------------------------------------------- thread


def threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "refusal-kernels-tokens"]


def gone(before: int, seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while len(threads()) > before and time.monotonic() < end:
        time.sleep(0.01)
    return len(threads()) <= before


class Watched(Sequence[str]):
    """A source that notes in which thread it is read and fails at one place."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.readers: set[str] = set()
        self.fail_at = fail_at
        self.data = texts(documents(400))

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: Any) -> Any:
        self.readers.add(threading.current_thread().name)
        if i == self.fail_at:
            raise OSError("disk on fire")
        return self.data[i]


@pytest.mark.parametrize("end", ["close", "with", "collect", "exhaust"])
def test_the_thread_ends(tokenizer: Any, end: str) -> None:
    before = len(threads())
    stream: TokenStream | None = TokenStream(
        texts(documents(400)), tokenizer, 8, 1, epochs=1 if end == "exhaust" else None
    )
    assert stream is not None
    assert len(threads()) == before  # none until it is needed
    next(stream)
    assert len(threads()) == before + 1 or end == "exhaust"
    if end == "close":
        stream.close()
    elif end == "with":
        with stream:
            next(stream)
    elif end == "exhaust":
        assert len(list(stream)) > 100
    else:
        stream = None
        gc.collect()
    assert gone(before)


def test_tokenization_runs_ahead_in_its_own_thread(tokenizer: Any) -> None:
    source = Watched()
    stream = TokenStream(ListDocuments(source, "slow", False, 0), tokenizer, 8, 1, prefetch=2)
    with stream:
        next(stream)
    assert source.readers == {"refusal-kernels-tokens"}


@pytest.mark.parametrize("prefetch", [0, 2])
def test_errors_of_the_thread_surface_in_the_consumer(tokenizer: Any, prefetch: int) -> None:
    before = len(threads())
    source = Watched(fail_at=200)
    stream = TokenStream(ListDocuments(source, "slow", False, 0), tokenizer, 8, 1, prefetch=prefetch)
    with pytest.raises(OSError, match="disk on fire"):
        list(stream)
    assert stream.batches_seen > 10
    assert gone(before)


def test_bad_rows_are_named(tokenizer: Any) -> None:
    table = datasets.Dataset.from_dict({"text": [1, 2]})
    with pytest.raises(
        ValueError, match=r"text_field: expected strings or chats .* in column 'text', got int in row 0"
    ):
        next(TokenStream(table, tokenizer, shuffle=False))
    with pytest.raises(ValueError, match=r"list of 2 holds no text \(2 documents, no token\)"):
        next(TokenStream(["", " "], tokenizer))


def test_the_caller_s_tokenizer_is_not_shared_with_the_thread() -> None:
    """Fast tokenizers raise 'Already borrowed' when two threads set truncation or padding; ours works on a copy."""
    mine = make_tokenizer()
    stream = TokenStream(["new w1"] * 400, mine, 3, 1, prefetch=2)
    mine.add_tokens(["new"])
    assert mine("new")["input_ids"] == [FIRST + WORDS]
    with stream:
        for i in range(300):
            assert next(stream)["input_ids"].tolist() == [[PAD, 4, EOS]]  # unknown to the stream's own
            mine(["w1 w2 w3"] * 4, truncation=True, max_length=1 + i % 3, padding="max_length")
