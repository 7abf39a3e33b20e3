"""The activation buffer: nothing lost, nothing doubled, well mixed, resumed to the bit, and never growing."""

from __future__ import annotations

import contextlib
import gc
import json
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor

from refusal_kernels.python_api.buffer import ActivationBuffer, geometric_median, input_statistics
from refusal_kernels.python_api.capturing import capture
from refusal_kernels.python_api.tokens import TokenStream

EOS, BOS, PAD, FIRST, WORDS, N_DOCUMENTS = 0, 1, 2, 3, 60, 60
HEADS, HEAD_DIM = 4, 6


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    words = {"<eos>": EOS, "<bos>": BOS, "<pad>": PAD, **{f"w{i}": FIRST + i for i in range(WORDS)}}
    core = Tokenizer(WordLevel(words, unk_token="<pad>"))
    core.pre_tokenizer = WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<eos>", bos_token="<bos>", pad_token="<pad>"
    )


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=FIRST + WORDS,
        hidden_size=20,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        head_dim=HEAD_DIM,
        initializer_range=0.3,
    )
    return transformers.LlamaForCausalLM(config).eval()


def make_stream(tokenizer: Any, epochs: int | None = 1, **options: Any) -> TokenStream:
    generator = torch.Generator().manual_seed(0)
    lengths = [5 + i % 20 for i in range(N_DOCUMENTS)]
    words = [torch.randint(0, WORDS, (n,), generator=generator).tolist() for n in lengths]
    settings = {"context_length": 16, "batch_size": 3, "seed": 1, "prefetch": 0, "epochs": epochs, **options}
    return TokenStream([" ".join(f"w{i}" for i in w) for w in words], tokenizer, **settings)


def rows(x: Tensor) -> list[bytes]:
    return [row.tobytes() for row in x.float().numpy()]


def naive(model: Any, stream: TokenStream, layers: list[int]) -> tuple[dict[int, Tensor], Tensor]:
    """z of all wanted tokens in stream order, and their ids, by the definition: no first token, no BOS, no padding."""
    z: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    ids = []
    for batch in stream:
        positions = batch.get("position_ids")
        wanted = torch.ones_like(batch["input_ids"], dtype=torch.bool)
        if positions is None:
            wanted = batch["attention_mask"].bool()
            wanted[:, 0] = False
        else:
            wanted = positions > 0
        wanted &= batch["input_ids"] != BOS
        with capture(model, layers) as cap:
            for layer, value in cap.run(batch, positions=wanted).items():
                z[layer].append(value)
        ids.append(batch["input_ids"][wanted])
    return {layer: torch.cat(v) for layer, v in z.items()}, torch.cat(ids)


@pytest.mark.parametrize("packing", ["packed", "isolated", "padded"])
@pytest.mark.parametrize(("batch_tokens", "buffer_tokens"), [(16, 100), (7, 20), (40, 5000)])
def test_every_token_once_and_layers_stay_together(
    model: Any, tokenizer: Any, packing: str, batch_tokens: int, buffer_tokens: int
) -> None:
    options: dict[str, Any] = {"packing": packing, "bos": True}
    expected, _ = naive(model, make_stream(tokenizer, **options), [0, 2])
    buffer = ActivationBuffer(
        model, make_stream(tokenizer, **options), [0, 2], batch_tokens, buffer_tokens, drop_last=False
    )
    batches = list(buffer)
    assert {b[0].shape[0] for b in batches[:-1]} <= {batch_tokens}
    assert 0 < batches[-1][0].shape[0] <= batch_tokens
    got = {layer: torch.cat([b[layer] for b in batches]) for layer in (0, 2)}
    pairs = sorted(zip(rows(got[0]), rows(got[2]), strict=True))
    assert pairs == sorted(zip(rows(expected[0]), rows(expected[2]), strict=True))
    assert buffer.d_in == {0: HEADS * HEAD_DIM, 2: HEADS * HEAD_DIM}
    assert buffer.batches_seen == len(batches)
    assert list(buffer) == []


def test_drop_last_leaves_only_full_batches(model: Any, tokenizer: Any) -> None:
    expected, _ = naive(model, make_stream(tokenizer), [1])
    batches = list(ActivationBuffer(model, make_stream(tokenizer), [1], 16, 100))
    assert {b[1].shape[0] for b in batches} == {16}
    assert len(batches) == expected[1].shape[0] // 16


def test_exclusions(model: Any, tokenizer: Any) -> None:
    with_first = ActivationBuffer(
        model, make_stream(tokenizer, bos=True), [0], 8, 64, exclude_first=False, drop_last=False
    )
    without = ActivationBuffer(model, make_stream(tokenizer, bos=True), [0], 8, 64, drop_last=False)
    n = [sum(b[0].shape[0] for b in buffer) for buffer in (with_first, without)]
    batches = list(make_stream(tokenizer, bos=True))
    ids = torch.cat([b["input_ids"].reshape(-1) for b in batches])
    assert n == [ids.numel(), int((ids != BOS).sum())]  # with bos=True every sequence begins with one


def test_a_batch_holds_many_documents_of_two_chunks(model: Any, tokenizer: Any) -> None:
    expected, ids = naive(model, make_stream(tokenizer, shuffle=False), [2])
    document = (ids == EOS).cumsum(0)
    number = {row: i for i, row in enumerate(rows(expected[2]))}
    assert len(number) == len(ids)  # a token is known by its z
    buffer = ActivationBuffer(model, make_stream(tokenizer, shuffle=False), [2], batch_tokens=40, buffer_tokens=360)
    assert buffer.chunk_tokens == 240
    assert buffer.buffer_tokens == 360
    kept = buffer.buffer_tokens - buffer.chunk_tokens
    where = [torch.tensor([number[row] for row in rows(b[2])]) for b in islice(buffer, 12)]  # two blocks
    for numbers in where:
        assert len(document[numbers].unique()) >= 12  # 40 consecutive tokens hold 2 to 7
    for begin, block in ((kept, where[:6]), (kept + 240, where[6:])):
        # Half of a block is new (its own chunk begins at token `begin`), in every batch and not just in sum.
        assert sum(int((numbers < begin).sum()) for numbers in block) == kept
        assert all(8 <= int((numbers < begin).sum()) <= 32 for numbers in block)
        # The new half is drawn from the whole chunk, so that neighbours end up in different blocks.
        assert 40 <= sum(int((numbers >= begin + 120).sum()) for numbers in block) <= 80
        assert max(int(numbers.max()) for numbers in block) > begin + 200


def test_the_seed_decides_the_order(model: Any, tokenizer: Any) -> None:
    def run(seed: int) -> list[bytes]:
        return [r for b in ActivationBuffer(model, make_stream(tokenizer), [1], 16, 100, seed) for r in rows(b[1])]

    assert run(1) == run(1)
    assert run(1) != run(2)
    assert len(run(1)) == len(run(2))


@pytest.mark.parametrize(("packing", "prefetch"), [("packed", 0), ("packed", 2), ("padded", 0)])
def test_resuming_is_bit_exact(model: Any, tokenizer: Any, packing: str, prefetch: int) -> None:
    def build() -> ActivationBuffer:
        stream = make_stream(tokenizer, epochs=2, packing=packing, prefetch=prefetch)
        return ActivationBuffer(model, stream, [0, 2], 16, 160, seed=4, drop_last=False)

    reference, whole, states = build(), [], []
    while True:
        states.append(json.dumps(reference.state_dict()))
        batch = next(reference, None)
        if batch is None:
            break
        whole.append(batch)
    n = len(whole)
    assert n > 60
    assert max(map(len, states)) < 3000
    assert json.loads(states[-1])["generation"] >= 8
    for at in (0, 1, 6, 7, 8, 13, 14, 40, n - 9, n - 1, n):  # around the ends of the first blocks, of 7 batches each
        again = build()
        again.load_state_dict(json.loads(states[at]))
        rest = list(again) if at in (1, n - 9, n - 1, n) else list(islice(again, 8))
        assert len(rest) == (n - at if at in (1, n - 9, n - 1, n) else 8)
        for got, expected in zip(rest, whole[at:], strict=False):
            assert all(torch.equal(got[layer], expected[layer]) for layer in (0, 2))
        assert again.batches_seen == at + len(rest)


def test_a_state_taken_after_resuming_resumes_as_well(model: Any, tokenizer: Any) -> None:
    def build() -> ActivationBuffer:
        return ActivationBuffer(model, make_stream(tokenizer, epochs=None), [1], 16, 128)

    reference = [b[1] for b in islice(build(), 40)]
    position, buffer = 0, build()
    for step in (3, 1, 9, 7, 12, 2):
        got = [b[1] for b in islice(buffer, step)]
        assert all(torch.equal(a, b) for a, b in zip(got, reference[position : position + step], strict=True))
        position += step
        state = json.loads(json.dumps(buffer.state_dict()))
        buffer = build()
        buffer.load_state_dict(state)


@pytest.mark.parametrize("call", [1, 2, 9, 16])
def test_an_interruption_loses_nothing(model: Any, tokenizer: Any, call: int) -> None:
    """Ctrl-C in the middle of a model pass: the state then, and the buffer itself, go on as if nothing had been."""

    def build() -> ActivationBuffer:
        return ActivationBuffer(model, make_stream(tokenizer, epochs=None, prefetch=2), [1], 16, 128)

    reference = [b[1] for b in islice(build(), 60)]
    calls = 0

    def interrupt(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt

    handle = model.model.layers[0].register_forward_hook(interrupt)
    buffer = build()
    got: list[Tensor] = []
    try:
        with pytest.raises(KeyboardInterrupt):
            got.extend(batch[1] for batch in buffer)
    finally:
        handle.remove()
    state = json.loads(json.dumps(buffer.state_dict()))
    fresh = build()
    calls = call - 1  # and again in the first pass of the resumption
    handle = model.model.layers[0].register_forward_hook(interrupt)
    with contextlib.suppress(KeyboardInterrupt):
        fresh.load_state_dict(state)
        next(fresh)
    handle.remove()
    assert calls == call  # it was interrupted there
    assert fresh.state_dict() == state
    assert len(got) < 50
    for successor in (buffer, fresh):
        rest = [b[1] for b in islice(successor, 60 - len(got))]
        assert all(torch.equal(a, b) for a, b in zip([*got, *rest], reference, strict=True))


def test_states_of_other_buffers_are_refused(model: Any, tokenizer: Any) -> None:
    buffer = ActivationBuffer(model, make_stream(tokenizer, epochs=None), [1], 16, 128)
    next(buffer)
    state = buffer.state_dict()
    with pytest.raises(ValueError, match=r"other settings \(layers \[1\] -> \[0\], batch_tokens 16 -> 8"):
        ActivationBuffer(model, make_stream(tokenizer), [0], 8, 128).load_state_dict(state)
    with pytest.raises(ValueError, match="version 1, got None"):
        buffer.load_state_dict({})
    for change, message in (
        ({"cursor": None}, "expected cursor of the ActivationBuffer to be an int from 0 on, got None"),
        ({"generation": -2}, "expected generation to be an int from -1 on, got -2"),
        ({"origin": None}, "expected origin to be a stream's state and tokens to skip, got None"),
        ({"origin": {"skip": 0}}, "expected a TokenStream state of version 1, got None"),
        ({"settings": None}, "expected the settings of the ActivationBuffer as a dict, got None"),
    ):
        with pytest.raises(ValueError, match=message):
            ActivationBuffer(model, make_stream(tokenizer), [1], 16, 128).load_state_dict(state | change)
    short = make_stream(tokenizer, epochs=1)
    for _ in range(30):
        next(buffer)
    shorter = ActivationBuffer(model, short, [1], 16, 128)
    for _ in range(60):
        next(buffer)
    with pytest.raises(ValueError, match="the stream ends before the saved position"):
        shorter.load_state_dict(buffer.state_dict())


def test_heads_and_dtypes(model: Any, tokenizer: Any) -> None:
    whole = next(ActivationBuffer(model, make_stream(tokenizer), [0, 1], 16, 128))
    some = ActivationBuffer(model, make_stream(tokenizer), [0, 1], 16, 128, heads={1: [3, 0]}, dtype=torch.bfloat16)
    part = next(some)
    assert some.d_in == {0: HEADS * HEAD_DIM, 1: 2 * HEAD_DIM}
    assert part[0].dtype == torch.bfloat16
    columns = whole[1].unflatten(1, (HEADS, HEAD_DIM))[:, [3, 0]].flatten(1)
    assert torch.equal(part[0], whole[0].bfloat16())
    assert torch.equal(part[1], columns.bfloat16())
    half = transformers.LlamaForCausalLM(model.config).to(torch.bfloat16)  # type: ignore[arg-type]
    assert next(ActivationBuffer(half, make_stream(tokenizer), [0], 16, 128))[0].dtype == torch.bfloat16


def test_memory_is_allocated_once(model: Any, tokenizer: Any) -> None:
    def held() -> int:
        gc.collect()
        tensors = (o for o in gc.get_objects() if issubclass(type(o), Tensor))
        return sum(o.nbytes for o in tensors if o.layout == torch.strided)

    buffer = ActivationBuffer(model, make_stream(tokenizer, epochs=None), [0, 1], 16, 128)
    for _ in range(9):
        next(buffer)
    storage = {layer: x.data_ptr() for layer, x in buffer._storage.items()}
    assert sum(x.nbytes for x in buffer._storage.values()) == buffer.buffer_tokens * 2 * HEADS * HEAD_DIM * 4
    before = held()
    for _ in range(100):
        next(buffer)
    assert {layer: x.data_ptr() for layer, x in buffer._storage.items()} == storage
    assert held() <= before + 8192  # the staged remainder of a model batch varies by some tokens


def test_batches_are_the_caller_s_to_change(model: Any, tokenizer: Any) -> None:
    one, two = (ActivationBuffer(model, make_stream(tokenizer), [1], 16, 128) for _ in range(2))
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a[1], b[1])
        a[1].zero_()


def test_the_model_is_untouched_between_batches(model: Any, tokenizer: Any) -> None:
    model.train()
    try:
        buffer = ActivationBuffer(model, make_stream(tokenizer), [1], 16, 128)
        next(buffer)
        assert model.training
        assert not any(m._forward_pre_hooks for m in model.modules())
    finally:
        model.eval()


# ----------------------------------------------------------------------------------------------------- statistics


def test_statistics_describe_the_contents_and_use_up_nothing(model: Any, tokenizer: Any) -> None:
    buffer = ActivationBuffer(model, make_stream(tokenizer, epochs=None), [0, 2], 16, 128)
    statistics = buffer.statistics()
    expected, _ = naive(model, make_stream(tokenizer), [0, 2])
    for layer in (0, 2):
        x = expected[layer][: buffer.buffer_tokens].double()  # the stream's first tokens, whatever their order
        got = statistics[layer]
        assert got.n_tokens == buffer.buffer_tokens
        assert got.mean_square_norm == pytest.approx(float(x.square().sum(1).mean()), rel=1e-6)
        assert float((x * got.scale).square().sum(1).mean()) == pytest.approx(x.shape[1], rel=1e-6)
        assert got.total_variance == pytest.approx(float((x - x.mean(0)).square().sum(1).mean()), rel=1e-6)
        torch.testing.assert_close(got.mean.double(), x.mean(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got.geometric_median, geometric_median(x), rtol=1e-4, atol=1e-5)
    fresh = ActivationBuffer(model, make_stream(tokenizer, epochs=None), [0, 2], 16, 128)
    for a, b in islice(zip(buffer, fresh, strict=True), 20):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[2], b[2])


def test_geometric_median_is_where_the_unit_vectors_cancel() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 7, generator=generator) * torch.arange(1, 8) + 5
    x[:20] += 1000  # outliers pull the mean, and hardly the median
    median = geometric_median(x, rtol=1e-9, max_iterations=500)
    difference = x.double() - median.double()
    assert (difference / difference.norm(dim=1, keepdim=True)).mean(0).norm() < 1e-6
    assert (median - 5).norm() < 3 < 100 < (x.mean(0) - 5).norm()


@pytest.mark.parametrize("copies", [1, 3])
def test_geometric_median_at_a_data_point(copies: int) -> None:
    """Weiszfeld's plain iteration divides by zero here. The centre of a symmetric star is its median."""
    star = torch.tensor([[0.0, 0.0]] * copies + [[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, -2.0]])
    assert geometric_median(star).abs().max() < 1e-6
    assert torch.equal(geometric_median(torch.ones(4, 3)), torch.ones(3))
    # A point with more than half of the weight is the median, wherever the iteration begins.
    heavy = torch.tensor([[2.0, 1.0]] * 5 + [[9.0, 9.0], [-7.0, 3.0], [5.0, 0.0]])
    torch.testing.assert_close(geometric_median(heavy, 2000, 1e-12), torch.tensor([2.0, 1.0]), rtol=0, atol=1e-3)


@pytest.mark.parametrize("bad", [torch.zeros(4, 3), torch.full((4, 3), torch.nan), torch.zeros(0, 3), torch.zeros(3)])
def test_statistics_refuse_dead_or_broken_activations(bad: Tensor) -> None:
    with pytest.raises(ValueError, match="x: expected"):
        input_statistics(bad)


# --------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [5]}, "layer: expected 0 <= layer < 3"),
        ({"batch_tokens": 0}, "batch_tokens: expected 1 or more, got 0"),
        ({"batch_tokens": 64, "buffer_tokens": 100}, r"at least 2 \* batch_tokens = 128, got 100"),
        ({"seed": -1}, "seed: expected 0 or more"),
        ({"dtype": torch.int8}, "dtype: expected a floating dtype"),
        ({"heads": [4]}, "0 <= head < 4"),
    ],
)
def test_bad_arguments(model: Any, tokenizer: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ActivationBuffer(model, make_stream(tokenizer), **options)


def test_a_foreign_tokenizer_is_recognised(model: Any, tokenizer: Any) -> None:
    import copy

    larger = copy.deepcopy(tokenizer)
    larger.add_tokens(["extra"])
    stream = TokenStream(["w1 extra"], larger, 4, 1, prefetch=0)
    with pytest.raises(ValueError, match="token id 63, but the model has 63 embeddings; is the tokenizer the model's"):
        next(ActivationBuffer(model, stream, [0], 4, 16))


def test_sequences_beyond_the_model_s_positions_are_warned_about(model: Any, tokenizer: Any) -> None:
    with pytest.warns(UserWarning, match="context_length 4096 exceeds the model's 2048 positions"):
        ActivationBuffer(model, make_stream(tokenizer, context_length=4096), [0])


def test_streams_with_nothing_to_keep(model: Any, tokenizer: Any) -> None:
    def buffer(texts: list[str], epochs: int | None) -> ActivationBuffer:
        stream = TokenStream(texts, tokenizer, 4, 1, epochs=epochs, eos=False, packing="padded", prefetch=0)
        return ActivationBuffer(model, stream, [0], 4, 16)

    with pytest.raises(ValueError, match="100 batches in a row without a token to keep"):
        next(buffer(["w1", "w2"], None))
    assert list(buffer(["w1", "w2"], 1)) == []
    with pytest.raises(ValueError, match="ended before its first token"):
        buffer(["w1"], 1).statistics()
