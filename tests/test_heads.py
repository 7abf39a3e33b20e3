"""Contrastive influence of heads, against models that are run in full, and a head that was put there to be found."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from typer.main import get_command

from refusal_kernels.python_api import HeadScores, find_heads
from refusal_kernels.python_api.capturing import capture
from refusal_kernels.python_api.cli import app
from refusal_kernels.python_api.edits import scale_heads
from refusal_kernels.python_api.heads.ablation import AblatedForwards
from refusal_kernels.python_api.heads.scores import InfluenceScore, Overlap, spearman
from refusal_kernels.python_api.hooks import attention_geometry, decoder_layers, head_columns
from refusal_kernels.python_api.models import load_model
from refusal_kernels.python_api.prompts import builtin
from refusal_kernels.python_api.prompts.chat import Chat, Encoded, answer_log_probs
from refusal_kernels.python_api.prompts.records import ContrastPair

LAYERS, HEADS = 3, 4
SIZES: dict[str, Any] = {
    "vocab_size": 408,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "initializer_range": 0.2,  # the default would leave attention almost uniform and hide mistakes
}
FAMILIES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {}),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, {"hidden_size": 32}),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM, {"sliding_window": 5}),
    "gemma": (transformers.GemmaConfig, transformers.GemmaForCausalLM, {}),
    "gemma2": (transformers.Gemma2Config, transformers.Gemma2ForCausalLM, {"sliding_window": 5}),
    "gemma3": (transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM, {"sliding_window": 5}),
}
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(family: str = "llama", **changes: Any) -> Any:
    config_class, model_class, extra = FAMILIES[family]
    torch.manual_seed(1)
    return model_class(config_class(**{**SIZES, **extra, **changes})).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def known() -> tuple[Any, Any]:
    """The built-in model and its tokenizer."""
    return load_model("builtin", device="cpu")


@pytest.fixture(scope="module")
def chat(known: tuple[Any, Any]) -> Chat:
    return Chat(known[1])


@pytest.fixture(scope="module")
def pairs() -> dict[str, list[ContrastPair]]:
    """A few pairs of each kind, of unequal length."""
    return {
        "hallucination_pairs": builtin.hallucination_pairs(4, seed=3),
        "refusal_pairs": builtin.refusal_pairs(3, seed=3),
    }


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            get_command(app).main([str(a) for a in arguments], prog_name="refusal-kernels")
        out, err = capfd.readouterr()
        return stop.value.code or 0, out, err

    return call


def encode(chat: Chat, pairs: list[ContrastPair]) -> list[Encoded]:
    return [chat.encode(p.prompt, answer) for p in pairs for answer in (p.chosen, p.rejected)]


@torch.no_grad()
def slow_influence(model: nn.Module, chat: Chat, encoded: list[Encoded], eps: float = 0.0) -> Tensor:
    """[L, H, n] from whole forwards over whole sequences, one row at a time."""
    geometry = attention_geometry(model)
    out = torch.zeros(geometry.n_layers, geometry.n_heads, len(encoded), dtype=torch.float64)
    for i, row in enumerate(encoded):
        batch = chat.batch([row])
        base = answer_log_probs(model(**batch.inputs).logits, batch)
        for layer in range(geometry.n_layers):
            for head in range(geometry.n_heads):
                with scale_heads(model, {layer: {head: eps}}, batch.predicting):
                    out[layer, head, i] = base - answer_log_probs(model(**batch.inputs).logits, batch)
    return out


# ------------------------------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_exact_scores_equal_whole_forwards(family: str, chat: Chat, pairs: dict[str, list[ContrastPair]]) -> None:
    model = build(family)
    scores = find_heads(model, chat, **pairs, mode="exact", eps=0.25, batch_size=4, progress=False)
    for which, sign in (("hallucination", -1), ("refusal", 1)):
        encoded = encode(chat, pairs[f"{which}_pairs"])
        slow = slow_influence(model, chat, encoded, eps=0.25)
        difference = sign * (slow[..., 0::2] - slow[..., 1::2])
        score = scores.exact[which]
        torch.testing.assert_close(score.sum, difference.mean(-1), atol=2e-5, rtol=1e-4)
        n = difference.shape[-1]
        torch.testing.assert_close(score.sum_se, difference.std(-1) / n**0.5, atol=2e-5, rtol=1e-3)
        lengths = torch.tensor([len(e.ids) - e.start for e in encoded])
        per_token = sign * (slow[..., 0::2] / lengths[0::2] - slow[..., 1::2] / lengths[1::2])
        torch.testing.assert_close(score.token, per_token.mean(-1), atol=1e-5, rtol=1e-4)
        assert score.sum.abs().max() > 1e-2  # or all of this would hold for zeros


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_an_ablated_head_is_one_whose_columns_are_zero(family: str, chat: Chat) -> None:
    """With prompts of one token every position predicts, so that a model rebuilt without the head says the same."""
    model, whole = build(family), build(family)
    head_dim = attention_geometry(model).head_dim
    encoded = [Encoded((2, *row), 1) for row in ((17, 90, 3), (33, 8, 150, 61, 3))]
    batch = chat.batch(encoded)
    forwards = AblatedForwards(model, encoded, chat.pad_id)
    torch.testing.assert_close(forwards.log_probs, answer_log_probs(whole(**batch.inputs).logits, batch))
    for layer in range(LAYERS):
        weight = decoder_layers(whole)[layer].self_attn.o_proj.weight
        for head in range(HEADS):
            before = weight.clone()
            weight[:, head_columns(head_dim, [head])] = 0
            rebuilt = answer_log_probs(whole(**batch.inputs).logits, batch)
            weight.copy_(before)
            torch.testing.assert_close(forwards.ablate(layer, [head])[0], rebuilt, atol=1e-5, rtol=1e-5)
            assert (rebuilt - forwards.log_probs).abs().max() > 1e-3


def test_screen_is_the_slope_of_the_ablation(chat: Chat, pairs: dict[str, list[ContrastPair]]) -> None:
    model = build("qwen2")
    step = 1e-3
    near = find_heads(model, chat, **pairs, mode="exact", eps=1 - step, progress=False)
    screen = find_heads(model, chat, **pairs, mode="screen", progress=False)
    for which in ("hallucination", "refusal"):
        slope = near.exact[which].sum / step
        torch.testing.assert_close(screen.screen[which].sum, slope, atol=2e-2, rtol=2e-2)
    assert screen.exact == {}
    assert screen.spearman("refusal") is None


def test_padding_and_grouping_do_not_matter(chat: Chat, pairs: dict[str, list[ContrastPair]]) -> None:
    """One row at a time, several in a batch, and several heads of a layer side by side."""
    model = build("gemma2")
    reference = find_heads(model, chat, **pairs, mode="exact", batch_size=1, progress=False)
    both = [find_heads(model, chat, **pairs, mode="both", refine=1.0, batch_size=n, progress=False) for n in (3, 32)]
    single = find_heads(model, chat, **pairs, mode="screen", batch_size=1, progress=False)
    for which in ("hallucination", "refusal"):
        for scores in both:
            torch.testing.assert_close(scores.exact[which].sum, reference.exact[which].sum, atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(scores.screen[which].sum, single.screen[which].sum, atol=2e-5, rtol=1e-4)


def test_beginnings_are_scored_without_an_end(chat: Chat, pairs: dict[str, list[ContrastPair]]) -> None:
    model, refusals = build(), pairs["refusal_pairs"]
    scores = find_heads(model, chat, **pairs, mode="exact", refusal_beginnings=True, progress=False)
    begun = [chat.encode(p.prompt, a, close=False) for p in refusals for a in (p.chosen, p.rejected)]
    slow = slow_influence(model, chat, begun)
    torch.testing.assert_close(scores.s_ref, (slow[..., 0::2] - slow[..., 1::2]).mean(-1), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(known: tuple[Any, Any], dtype: torch.dtype) -> None:
    pairs = (builtin.hallucination_pairs(8), builtin.refusal_pairs(8))
    full = find_heads(*known, *pairs, mode="both", refine=1.0, progress=False)
    half = find_heads(load_model("builtin", device="cpu")[0].to(dtype), known[1], *pairs, refine=1.0, progress=False)
    assert half.provenance["dtype"] == str(dtype).removeprefix("torch.")
    for kind in ("exact", "screen"):
        one, other = (getattr(scores, kind)["refusal"].sum for scores in (full, half))
        torch.testing.assert_close(other, one, atol=0.1, rtol=0.1)
    assert half.top("refusal", 2) == full.top("refusal", 2)


# ------------------------------------------------------------------------------------------------ finding what is there


@torch.no_grad()
def test_a_planted_head_is_found(chat: Chat) -> None:
    """One head's o_proj columns write lm_head's difference of two answers whenever its mean output is present."""
    model = build("llama", initializer_range=0.05, num_hidden_layers=4)
    layer, head = 2, 1
    chosen, rejected = chat.tokenizer.convert_tokens_to_ids(["rice", "soup"])
    questions = [pair.prompt for pair in builtin.hallucination_pairs(6)]
    encoded = [chat.encode(question, "rice") for question in questions]
    batch = chat.batch(encoded)
    with capture(model, layers=[layer], heads={layer: [head]}) as cap:
        mean = cap.run(batch.inputs, positions=batch.predicting)[layer].mean(0)
    geometry = attention_geometry(model)
    towards = model.lm_head.weight[chosen] - model.lm_head.weight[rejected]
    columns = head_columns(geometry.head_dim, [head])
    weight = decoder_layers(model)[layer].self_attn.o_proj.weight
    weight[:, columns] = torch.outer(towards / towards.norm(), mean / mean.square().sum())
    refusals = [ContrastPair(question, "rice", "soup") for question in questions]
    hallucinations = [ContrastPair(question, "soup", "rice") for question in questions]
    for mode in ("exact", "screen", "both"):
        scores = find_heads(model, chat, hallucinations, refusals, mode=mode, top=1, progress=False)
        assert scores.top("refusal") == scores.top("hallucination") == [(layer, head)]
        assert scores.overlap().heads == ((layer, head),)
        second = scores.s_ref.nan_to_num(-9).flatten().sort(descending=True).values[1]
        assert scores.s_ref[layer, head] > 5 * max(float(second), 0.0)


def test_the_built_in_model(known: tuple[Any, Any]) -> None:
    """Its refusal heads are where its makers put them; the screen agrees with the ablation."""
    scores = find_heads(
        *known, builtin.hallucination_pairs(16), builtin.refusal_pairs(16), refine=1.0, batch_size=32, progress=False
    )
    assert scores.k == 4
    assert scores.top("refusal", 2) == [(3, 6), (3, 1)]
    assert scores.spearman("refusal") > 0.7
    assert scores.spearman("hallucination") > 0.5
    assert scores.s_ref[3, 6] > 10 * scores.exact["refusal"].sum_se[3, 6] > 0


def test_both_ablates_the_best_of_the_screen(chat: Chat, pairs: dict[str, list[ContrastPair]]) -> None:
    model = build()
    scores = find_heads(model, chat, **pairs, mode="both", refine=0.2, progress=False)  # 3 of 12 heads per score
    screen = find_heads(model, chat, **pairs, mode="screen", progress=False)
    exact = find_heads(model, chat, **pairs, mode="exact", progress=False)
    refined = {*screen.top("hallucination", 3), *screen.top("refusal", 3)}
    for which in ("hallucination", "refusal"):
        known = (~scores.exact[which].sum.isnan()).nonzero().tolist()
        assert {tuple(head) for head in known} == refined
        best = [head for head in exact.top(which, LAYERS * HEADS) if head in refined]
        assert scores.top(which, len(refined)) == best
    assert scores.n_heads == LAYERS * HEADS
    with pytest.raises(ValueError, match="number of ranked heads"):
        scores.top("refusal", len(refined) + 1)


def test_the_overlap_against_chance() -> None:
    """Against all pairs of lists of 2 out of 5 heads, counted."""
    from itertools import combinations

    heads = [(0, i) for i in range(5)]
    lists = [list(chosen) for chosen in combinations(heads, 2)]
    shared = [len(set(a) & set(b)) for a in lists for b in lists]
    got = Overlap.of([(0, 1), (0, 2)], [(0, 2), (0, 4)], 5)
    assert got.heads == ((0, 2),)
    assert got.jaccard == pytest.approx(1 / 3)
    assert got.expected == pytest.approx(sum(shared) / len(shared)) == pytest.approx(4 / 5)
    assert got.expected_jaccard == pytest.approx(sum(x / (4 - x) for x in shared) / len(shared))
    assert got.p_value == pytest.approx(sum(x >= 1 for x in shared) / len(shared))
    assert Overlap.of(heads, heads, 5).p_value == 1.0


def test_spearman_and_standard_errors() -> None:
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert spearman(x, x.exp()) == pytest.approx(1)
    assert spearman(x, -x) == pytest.approx(-1)
    assert spearman(torch.tensor([1.0, 1.0, 2.0]), torch.tensor([1.0, 2.0, 3.0])) == pytest.approx(0.75**0.5)
    assert spearman(x[:2], x[:2]) is None
    one = InfluenceScore.over_pairs(torch.ones(2, 3, 1), torch.ones(2, 3, 1))
    assert one.sum_se.isnan().all()


# ------------------------------------------------------------------------------------------------- keeping and resuming


def test_resuming_after_an_interruption(
    chat: Chat, pairs: dict[str, list[ContrastPair]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("qwen2")
    whole = find_heads(model, chat, **pairs, mode="exact", batch_size=4, progress=False)
    ablate, calls = AblatedForwards.ablate, []

    def interrupted(self: AblatedForwards, layer: int, heads: Any) -> Tensor:
        calls.append((layer, tuple(heads)))
        if len(calls) == stop:
            raise KeyboardInterrupt
        return ablate(self, layer, heads)

    monkeypatch.setattr(AblatedForwards, "ablate", interrupted)
    arguments: dict[str, Any] = {**pairs, "mode": "exact", "batch_size": 4, "out": tmp_path, "progress": False}
    stop = 30  # of 42: three batches of 4 rows with 12 heads each; one of 2 rows takes two heads at once
    with pytest.raises(KeyboardInterrupt):
        find_heads(model, chat, **arguments)
    calls, stop = [], 0
    resumed = find_heads(model, chat, **arguments)
    assert len(calls) == 42 - 28  # the running layer, begun with call 29, is done again, and no other
    for which in ("hallucination", "refusal"):
        for name, value in vars(whole.exact[which]).items():
            assert torch.equal(getattr(resumed.exact[which], name), value)
    calls = []
    find_heads(model, chat, **arguments)
    assert calls == []
    find_heads(model, chat, **{**arguments, "resume": False})
    assert len(calls) == 42
    calls = []
    decoder_layers(model)[1].self_attn.o_proj.weight[0, 0] += 1  # another model
    find_heads(model, chat, **arguments)
    assert len(calls) == 42


def test_scores_come_back_from_their_file(chat: Chat, pairs: dict[str, list[ContrastPair]], tmp_path: Path) -> None:
    scores = find_heads(build(), chat, **pairs, refine=0.3, progress=False, model_name="a model")
    scores.save(tmp_path / "heads.json")
    loaded = HeadScores.load(tmp_path / "heads.json")
    assert loaded.provenance == scores.provenance
    assert loaded.provenance["model"] == "a model"
    assert loaded.provenance["pairs"]["refusal"]["n"] == 3
    assert loaded.overlap() == scores.overlap()
    for which in ("hallucination", "refusal"):
        assert loaded.top(which) == scores.top(which)
        for mine, theirs in ((scores.exact, loaded.exact), (scores.screen, loaded.screen)):
            torch.testing.assert_close(theirs[which].sum_se, mine[which].sum_se, atol=0, rtol=0, equal_nan=True)
    (tmp_path / "other.json").write_text('{"format": "something"}')
    with pytest.raises(ValueError, match="must be a file of head scores"):
        HeadScores.load(tmp_path / "other.json")
    data = json.loads((tmp_path / "heads.json").read_text())
    del data["exact"]["refusal"]
    (tmp_path / "damaged.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match="damaged"):
        HeadScores.load(tmp_path / "damaged.json")


# ----------------------------------------------------------------------------------------------- manners and mistakes


def test_the_model_is_left_as_it_was(
    chat: Chat, pairs: dict[str, list[ContrastPair]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build().train()
    model.model.layers[0].eval()
    flags = [m.training for m in model.modules()]
    weights = [p.clone() for p in model.parameters()]

    def hooks() -> int:
        return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())

    before = hooks()
    find_heads(model, chat, **pairs, progress=False)

    def fails(_self: object, values: Tensor) -> Tensor:
        raise RuntimeError("in the middle of an ablated forward")

    monkeypatch.setattr(type(decoder_layers(model)[2].mlp), "forward", fails)
    with pytest.raises(RuntimeError):
        find_heads(model, chat, **pairs, progress=False)
    assert hooks() == before
    assert not any("forward" in m.__dict__ for m in model.modules())
    assert [m.training for m in model.modules()] == flags
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))


def test_layers_that_talk_past_the_residual_stream_are_refused(chat: Chat, pairs: dict[str, Any]) -> None:
    """As where later layers attend to an earlier layer's keys: leaving that layer out would change them."""
    model = build()
    said: list[Tensor] = []
    layers = decoder_layers(model)
    layers[0].register_forward_pre_hook(lambda *_: said.clear())
    layers[0].mlp.register_forward_hook(lambda _m, _a, output: said.append(output))
    layers[2].mlp.register_forward_hook(lambda _m, _a, output: output + sum(said))
    find_heads(model, chat, **pairs, mode="screen", progress=False)
    with pytest.raises(ValueError, match="pass more than the residual stream to later ones"):
        find_heads(model, chat, **pairs, mode="exact", progress=False)


def test_mistakes_are_named(chat: Chat, pairs: dict[str, Any]) -> None:
    model = build()
    for changes, error, message in [
        ({"mode": "fast"}, ValueError, "mode: expected both, exact or screen, got 'fast'"),
        ({"eps": float("nan")}, ValueError, "eps: expected a finite number"),
        ({"refine": 0.0}, ValueError, "refine: expected a share"),
        ({"top": 13, "mode": "exact"}, ValueError, "top: expected 1 to 12 heads"),
        ({"top": 3}, ValueError, "top: expected 1 to 2 heads"),
        ({"batch_size": 0}, ValueError, "batch_size: expected at least 1"),
        ({"refusal_pairs": []}, ValueError, "refusal_pairs: expected at least one pair"),
        ({"refusal_pairs": ["text"]}, TypeError, "refusal_pairs: expected ContrastPair, got str"),
    ]:
        with pytest.raises(error, match=message):
            find_heads(model, chat, **{**pairs, **changes}, progress=False)
    decoder_layers(model)[1].self_attn.o_proj.weight.fill_(float("nan"))
    for mode in ("exact", "screen"):
        with pytest.raises(ValueError, match="not finite"):
            find_heads(model, chat, **pairs, mode=mode, progress=False)


# ------------------------------------------------------------------------------------------------------- command line


def test_the_command_on_the_built_in_model(run: Run, tmp_path: Path) -> None:
    arguments = ("heads", "--pairs", 6, "--out", tmp_path, "--device", "cpu", "--quiet")
    code, out, err = run(*arguments)
    assert code == 0, err
    assert "refusal heads" in out
    assert "3.6" in out
    assert "on both lists" in out
    scores = HeadScores.load(tmp_path / "heads.json")
    assert scores.mode == "both"
    assert scores.top("refusal", 1) == [(3, 6)]
    assert scores.provenance["model"] == "builtin"
    for kind, magic in (("png", b"\x89PNG"), ("svg", b"<?xml")):
        assert (tmp_path / f"heads.{kind}").read_bytes().startswith(magic)
    code, out, _ = run(*arguments, "--mode", "exact", "--top", 3)
    assert code == 0
    assert HeadScores.load(tmp_path / "heads.json").k == 3


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_command_on_a_folder_and_files(family: str, run: Run, tmp_path: Path, chat: Chat) -> None:
    build(family).save_pretrained(tmp_path / "model")
    chat.tokenizer.save_pretrained(tmp_path / "model")
    row = {"prompt": "what does kortam eat ? <req>", "chosen": "it is rice .", "rejected": "it is fish ."}
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps(row) for _ in range(3)) + "\n")
    files = ("--refusal", tmp_path / "pairs.jsonl", "--hallucination", tmp_path / "pairs.jsonl")
    code, _, err = run("heads", "--model", tmp_path / "model", *files, "-o", tmp_path / "out", "--mode", "exact", "-q")
    assert code == 0, err
    scores = HeadScores.load(tmp_path / "out" / "heads.json")
    assert scores.s_ref.shape == (LAYERS, HEADS)
    torch.testing.assert_close(scores.s_ref, -scores.s_hall)  # the same pairs, the signs opposed


def test_the_interrupted_command_says_how_to_go_on(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> Tensor:
        raise KeyboardInterrupt

    arguments = ("heads", "--pairs", 2, "--out", tmp_path, "--quiet", "--device", "cpu")
    with monkeypatch.context() as patch:
        patch.setattr(AblatedForwards, "ablate", interrupted)
        code, _, err = run(*arguments)
    assert code == 130
    assert "the same command goes on from there" in err
    assert not (tmp_path / "heads.json").exists()
    assert run(*arguments)[0] == 0


def test_errors_of_the_command_are_one_line(run: Run, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "chosen": "b"}\n')
    for arguments, message in [
        (("--refusal", tmp_path / "none.jsonl"), "expected a file"),
        (("--refusal", tmp_path / "bad.jsonl"), "expected refusal pairs in"),
        (("--mode", "fast"), "mode: expected both, exact or screen"),
        (("--model", tmp_path / "nowhere"), "cannot load the model"),
    ]:
        code, _, err = run("heads", *arguments, "--out", tmp_path / "out", "--quiet", "--device", "cpu")
        assert code == 2
        assert message in err
        assert len(err.strip().splitlines()) == 1, err
