"""The dials do what they say, the figures are the model's, and heads that carry refusal bring it back."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from typer.main import get_command

from refusal_kernels.python_api.capturing import capture
from refusal_kernels.python_api.cli import app
from refusal_kernels.python_api.edits import scale_heads
from refusal_kernels.python_api.heads.adapter import LoraSettings, attached, lora_dial, trained
from refusal_kernels.python_api.heads.dials import iti_dial, random_heads, scale_dial, truthful_directions
from refusal_kernels.python_api.heads.measuring import Measurement, Probe, Share, builtin_judge
from refusal_kernels.python_api.heads.patching import refusals_with_heads_restored
from refusal_kernels.python_api.heads.scores import HeadScores, InfluenceScore
from refusal_kernels.python_api.heads.tradeoff import Point, Restoration, TradeoffResult, TradeoffSettings, tradeoff
from refusal_kernels.python_api.heads.tradeoff_report import describe, format_tradeoff
from refusal_kernels.python_api.hooks import attention_geometry
from refusal_kernels.python_api.models import load_model
from refusal_kernels.python_api.prompts import builtin
from refusal_kernels.python_api.prompts.chat import Chat, generate, score_answers
from refusal_kernels.python_api.prompts.records import OverlapError

SIZES: dict[str, Any] = {
    "vocab_size": 408,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "initializer_range": 0.2,
}
REFUSAL_HEADS = [(3, 6), (3, 1)]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model("builtin", device="cpu")[0]


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat(load_model("builtin", device="cpu")[1])


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            get_command(app).main([str(a) for a in arguments], prog_name="refusal-kernels")
        out, err = capfd.readouterr()
        return stop.value.code or 0, out, err

    return call


def small(family: str = "Llama") -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES)
    return getattr(transformers, f"{family}ForCausalLM")(config).eval().requires_grad_(False)


def inputs(chat: Chat, n: int = 3) -> dict[str, torch.Tensor]:
    return chat.batch([chat.encode(p.prompt, p.chosen) for p in builtin.hallucination_pairs(n)]).inputs


# ------------------------------------------------------------------------------------------------------------ dials


@torch.no_grad()
def test_scaling_scales_its_heads(model: Any, chat: Chat) -> None:
    batch = inputs(chat)
    at = batch["attention_mask"].bool()
    at[:, :5] = False
    dial = scale_dial(model, [(0, 2), (0, 5), (3, 1)], [0.5])
    with dial.apply(0.25, at):
        mine = model(**batch).logits
    with scale_heads(model, {0: {2: 0.25, 5: 0.25}, 3: {1: 0.25}}, at):
        torch.testing.assert_close(mine, model(**batch).logits)
    assert not torch.allclose(mine, model(**batch).logits)


@torch.no_grad()
def test_intervention_adds_its_direction(model: Any, chat: Chat) -> None:
    pairs = builtin.hallucination_pairs(12)
    found = truthful_directions(model, chat, pairs, batch_size=5)
    # One head again, one answer at a time.
    layer, head = 1, 3
    z: dict[str, list[torch.Tensor]] = {"chosen": [], "rejected": []}
    for name, values in z.items():
        for pair in pairs:
            batch = chat.batch([chat.encode(pair.prompt, getattr(pair, name), close=False)]).inputs
            with capture(model, [layer], [head]) as cap:
                values.append(cap.run(batch)[layer][-1])
    difference = torch.stack(z["chosen"]).mean(0) - torch.stack(z["rejected"]).mean(0)
    direction = difference / difference.norm()
    torch.testing.assert_close(found.directions[layer, head], direction, atol=1e-4, rtol=1e-3)
    sigma = (torch.stack([*z["chosen"], *z["rejected"]]) @ direction).std()
    torch.testing.assert_close(found.sigma[layer, head], sigma, atol=1e-5, rtol=1e-3)
    assert 0 <= found.accuracy.min() < found.accuracy.max() <= 1
    assert found.accuracy[found.top(1)[0]] == found.accuracy.max()

    batch = inputs(chat)
    shifts = {}
    for random in (False, True):
        dial = iti_dial(model, found, [(layer, head)], [3.0], seed=4, random_directions=random)
        with capture(model, [layer], per_head=True) as cap:
            before = cap.run(batch)[layer]
        with dial.apply(3.0, None), capture(model, [layer], per_head=True) as cap:
            shift = cap.run(batch)[layer] - before
        shifts[random] = shift[:, head].mean(0)
        torch.testing.assert_close(shift[:, head].norm(dim=-1), (3 * sigma).expand(len(shift)), atol=1e-4, rtol=1e-3)
        assert not shift[:, :head].any()
        assert not shift[:, head + 1 :].any()
    torch.testing.assert_close(shifts[False], 3 * sigma * direction, atol=1e-4, rtol=1e-3)
    assert torch.cosine_similarity(shifts[False], shifts[True], dim=0) < 0.9


def test_a_probe_finds_where_the_answers_differ(chat: Chat) -> None:
    """Only two heads, those of one key/value head, read what was answered; all others are silent."""
    model = small()
    geometry = attention_geometry(model)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight.zero_()
        weight = model.model.layers[1].self_attn.v_proj.weight
        weight[geometry.head_dim :].normal_(generator=torch.Generator().manual_seed(0))  # kv head 1: heads 2 and 3
    found = truthful_directions(model, chat, builtin.refusal_pairs(24))
    assert set(found.top(2)) == {(1, 2), (1, 3)}
    assert found.accuracy[1, 2:].min() > 0.6
    assert found.accuracy[0].max() == found.accuracy[1, :2].max() == 0.5
    assert found.sigma[0].max() == 0
    with pytest.raises(ValueError, match="at least 4"):
        truthful_directions(model, chat, builtin.refusal_pairs(3))


def test_random_heads_are_others(model: Any) -> None:
    geometry = attention_geometry(model)
    drawn = [random_heads(geometry, 6, REFUSAL_HEADS, seed) for seed in range(20)]
    assert all(len(set(heads)) == 6 and not set(heads) & set(REFUSAL_HEADS) for heads in drawn)
    assert len({tuple(heads) for heads in drawn}) > 10
    assert len(random_heads(geometry, 100, REFUSAL_HEADS, 0)) == 38


# --------------------------------------------------------------------------------------------------------- the LoRA


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_subtracting_the_adapter(family: str, chat: Chat, tmp_path: Path) -> None:
    model, pairs = small(family), builtin.hallucination_pairs(8)
    model.lm_head.weight.requires_grad_(True)
    batch = inputs(chat)
    with torch.no_grad():
        base = model(**batch).logits
    with attached(model, seed=0) as lora:
        kept = tmp_path / "lora.safetensors"
        weights = trained(lora, chat, pairs, LoraSettings(steps=12, batch_size=4, learning_rate=1e-2), 0, kept, False)
        assert lora.losses[-1] < lora.losses[0] - 0.5
        dial = lora_dial(lora, weights, [1.0])
        with torch.no_grad():
            assert torch.equal(model(**batch).logits, base)
            with dial.apply(0.5, None):
                turned = model(**batch).logits
            assert torch.equal(model(**batch).logits, base)
        for (a, b), (other_a, other_b) in zip(weights, lora.random_like(weights, 3), strict=True):
            torch.testing.assert_close((other_b @ other_a).norm(), (b @ a).norm())
            assert torch.cosine_similarity((other_b @ other_a).flatten(), (b @ a).flatten(), dim=0).abs() < 0.9
        names = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    assert len(names) == len(weights) == 2 * 7
    # Left as it was: modules, flags, output.
    assert not any(hasattr(module, "lora_A") for module in model.modules())
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["lm_head.weight"]
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, base)
        for name, (a, b) in zip(names, weights, strict=True):
            model.get_submodule(name).weight -= 0.5 * b @ a
        torch.testing.assert_close(model(**batch).logits, turned, atol=1e-4, rtol=1e-4)
    # The file gives the same adapter without training.
    with attached(small(family), seed=5) as lora:
        again = trained(lora, chat, pairs, LoraSettings(), 0, kept, False)
        assert lora.losses == []
    assert all(
        torch.equal(x, y) for one, two in zip(weights, again, strict=True) for x, y in zip(one, two, strict=True)
    )


# -------------------------------------------------------------------------------------------------------- measuring


def test_figures_are_the_models(model: Any, chat: Chat) -> None:
    pairs, harmful = builtin.hallucination_pairs(10, held_out=True), builtin.harmful(9, seed=2, held_out=True)
    dial = scale_dial(model, REFUSAL_HEADS, [0.0])

    def change(positions: Any) -> Any:
        return dial.apply(0.5, positions)

    for judge in (None, builtin_judge(9, seed=2)):
        probe = Probe(chat, pairs, harmful, judge, exact_answers=True, max_new_tokens=16, batch_size=4)
        plain = probe.measure(model, lambda _: nullcontext())
        log_p, _ = score_answers(model, chat, [(p.prompt, a) for p in pairs for a in (p.chosen, p.rejected)])
        margins = log_p[0::2] - log_p[1::2]
        assert plain.margin == pytest.approx(float(margins.mean()), abs=1e-4)
        assert plain.margin_se == pytest.approx(float(margins.std() / 10**0.5), abs=1e-4)
        assert plain.truthful == Share(int((margins > 0).sum()), 10)
        said = generate(model, chat, [p.prompt for p in pairs], max_new_tokens=16)
        assert plain.exact == Share(sum(a == p.chosen for a, p in zip(said, pairs, strict=True)), 10)
        assert (plain.refused, plain.asr) == (Share(9, 9), Share(0, 9))
        changed = probe.measure(model, change)
        with dial.apply(0.5, (-1,)):
            said = generate(model, chat, [p.prompt for p in harmful], max_new_tokens=16)
        assert changed.refused == Share(sum("can not help" in answer for answer in said), 9)
        assert (plain.degenerate is None) == (changed.degenerate is None) == (judge is None)
        assert changed.refused.hits < 9
        assert Measurement.from_dict(json.loads(json.dumps(changed.as_dict()))) == changed
    with pytest.raises(ValueError, match="held-out requests of seed 2"):
        judge(builtin.harmful(9, seed=3, held_out=True), said)


def test_an_interval_is_wilsons() -> None:
    low, high = Share(0, 520).interval
    assert low == 0
    assert high == pytest.approx(0.73, abs=0.01)


# ---------------------------------------------------------------------------------------------------------- causation


def test_refusal_returns_with_its_heads(model: Any, chat: Chat) -> None:
    """Heads that carry refusal are silenced; put back, they bring it back, and others do not."""
    probe = Probe(chat, [], builtin.harmful(11, held_out=True), builtin_judge(11), max_new_tokens=16, batch_size=4)
    dial = scale_dial(model, REFUSAL_HEADS, [0.0])

    def change(positions: Any) -> Any:
        return dial.apply(0.0, positions)

    others = random_heads(attention_geometry(model), 2, REFUSAL_HEADS, seed=0)
    assert refusals_with_heads_restored(model, probe, change, others).hits == 0
    assert refusals_with_heads_restored(model, probe, change, REFUSAL_HEADS).hits == 11


# ------------------------------------------------------------------------------------------------------------ together


def arguments(n: int = 6) -> tuple[Any, ...]:
    return (
        builtin.hallucination_pairs(8),
        builtin.refusal_pairs(4),
        builtin.hallucination_pairs(n, held_out=True),
        builtin.harmful(n, held_out=True),
    )


def test_sweeps_resume_and_leave_the_model_alone(
    model: Any, chat: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = TradeoffSettings((5.0,), (0.5, 0.0), (1.0,), 1, LoraSettings(steps=3, batch_size=4))
    options: dict[str, Any] = {"settings": settings, "top": 2, "max_new_tokens": 16, "progress": False}
    before = [p.clone() for p in model.parameters()]
    whole = tradeoff(model, chat, *arguments(), **options)
    # iti with two controls, scale with one (two strengths each), the positive control, lora with one.
    assert len(whole.points) == 3 * 1 + 2 * 2 + 2 + 2
    measure, count = Probe.measure, [0]

    def counted(self: Probe, *given: Any) -> Measurement:
        count[0] += 1
        if count[0] == stop:
            raise KeyboardInterrupt
        return measure(self, *given)

    monkeypatch.setattr(Probe, "measure", counted)
    stop = 7
    with pytest.raises(KeyboardInterrupt):
        tradeoff(model, chat, *arguments(), out=tmp_path, **options)
    assert not any(hasattr(module, "lora_A") for module in model.modules())
    stop = 0
    resumed = tradeoff(model, chat, *arguments(), out=tmp_path, **options)
    assert count[0] == 12 + 1  # each of 11 points and the base once, the interrupted one twice
    assert [p.measured for p in resumed.points] == [p.measured for p in whole.points]
    assert resumed.restorations == whole.restorations
    tradeoff(model, chat, *arguments(), out=tmp_path, **options)
    assert count[0] == 13
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    # The positive control lost its refusals, and its own heads bring them back.
    (restored,) = [r for r in whole.restorations if r.dial == "refusal"]
    assert restored.restored.hits > restored.changed.hits
    data = json.loads(json.dumps(whole.as_dict()))
    assert len(data["points"]) == 11
    assert data["restorations"][0]["restored"]["n"] == 6


def test_calibration_and_test_share_nothing(model: Any, chat: Chat) -> None:
    pairs, refusals, test, harmful = arguments()
    with pytest.raises(OverlapError, match="expected no prompt in both sets"):
        tradeoff(model, chat, pairs, refusals, pairs[:1], harmful, progress=False)
    with pytest.raises(ValueError, match="test_pairs, harmful: expected some of each, got 6 and 0"):
        tradeoff(model, chat, pairs, refusals, test, [], progress=False)
    with pytest.raises(ValueError, match="alphas: expected distinct strengths"):
        TradeoffSettings(alphas=(1.0, 1.0))
    with pytest.raises(ValueError, match="control_seeds"):
        TradeoffSettings(control_seeds=0)


def result_of(
    truthful: int, margin: float, complied: int, control: int, back: int, degenerate: int = 0, exact: int = 80
) -> Any:
    """A sweep in which the LoRA moves 100 answers so and its control complies with `control`; the rest stays."""

    def measured(right: int, nats: float, asr: int, broken: int = 0, said: int = 80) -> Measurement:
        refused = Share(100 - asr - broken, 100)
        return Measurement(Share(right, 100), nats, 0.1, Share(said, 100), Share(asr, 100), refused, Share(broken, 100))

    base = measured(60, 1.0, 2)
    points = [Point(dial, "", 0, 1.0, base) for dial in ("iti", "scale", "refusal")]
    points.append(Point("lora", "", 0, 2.0, measured(truthful, margin, complied, degenerate, exact)))
    points.append(Point("lora", "random update", 1, 2.0, measured(60, 1.0, control)))
    shares = Share(100 - complied, 100), Share(back, 100), (Share(100 - complied, 100),)
    table = torch.arange(4.0).view(1, 4).double()
    score = InfluenceScore(table, table, table, table)
    scores = HeadScores("exact", 1, {"hallucination": score, "refusal": score})
    restorations = [Restoration("lora", 2.0, shares[0], ((0, 3),), "overlap", shares[1], shares[2])]
    acts_on = {f"{dial}//0": "something" for dial in ("iti", "scale", "lora", "refusal")}
    return TradeoffResult(base, points, restorations, acts_on, scores, {})


@pytest.mark.parametrize(
    ("figures", "traded", "back"),
    [
        ((90, 3.0, 70, 5, 95), True, True),
        ((90, 3.0, 70, 75, 95), False, True),  # a random update does as much
        ((60, 1.0, 70, 5, 30), False, False),  # no more truthful
        ((90, 3.0, 5, 5, 95), False, False),  # refuses as before
        ((90, 3.0, 70, 5, 95, 0, 10), False, True),  # ranks answers, and no longer gives them
        ((90, 3.0, 60, 5, 95, 40), False, True),  # broken
    ],
)
def test_the_words_follow_the_figures(figures: tuple[int, ...], traded: bool, back: bool) -> None:
    result = result_of(*figures)
    words = describe(result)
    assert ("the model working: lora" in words) == traded
    assert ("No dial made" in words) != traded
    assert ("brings refusal back" in words) == back
    assert "the overlap heads (0.3)" in words
    assert "prefers the right answer in 60 %" in words
    assert ("broke the model at every strength" in words) == (len(figures) == 6)
    table = format_tradeoff(result)
    assert f"{figures[2]:.1f} [" in table
    assert "random update, 1 draws" in table


# -------------------------------------------------------------------------------------------------------- command line

SHORT = ("--alphas", "5", "--factors", "0", "--betas", "1", "--control-seeds", 1, "--lora-steps", 3, "--device", "cpu")


def test_the_command_on_the_built_in_model(run: Run, tmp_path: Path) -> None:
    code, out, err = run("tradeoff", "--n", 6, "--out", tmp_path, "--quiet", *SHORT)
    assert code == 0, err
    assert "untouched model" in out
    assert "inference-time intervention" in out
    data = json.loads((tmp_path / "tradeoff.json").read_text())
    assert data["base"]["refused"]["hits"] == 6
    assert data["base"]["exact"]["n"] == data["base"]["degenerate"]["n"] == 6
    assert data["in_words"] in out
    assert data["in_words"] in (tmp_path / "tradeoff.txt").read_text()
    for kind, magic in (("png", b"\x89PNG"), ("svg", b"<?xml")):
        assert (tmp_path / f"tradeoff.{kind}").read_bytes().startswith(magic)


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_the_command_on_a_folder_and_files(family: str, run: Run, tmp_path: Path, chat: Chat) -> None:
    small(family).save_pretrained(tmp_path / "model")
    chat.tokenizer.save_pretrained(tmp_path / "model")
    for name, rows in (
        ("truth", [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in arguments()[0]]),
        ("refusal", [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in arguments()[1]]),
        ("harmful", [{"prompt": p.prompt} for p in arguments()[3]]),
    ):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    files = ("--hallucination", tmp_path / "truth.jsonl", "--refusal", tmp_path / "refusal.jsonl")
    files = (*files, "--harmful", tmp_path / "harmful.jsonl", "--max-new-tokens", 4)
    code, out, err = run("tradeoff", "--model", tmp_path / "model", *files, "-o", tmp_path / "out", "-q", *SHORT)
    assert code == 0, err
    assert "broken ones too: no judge was given" in out
    data = json.loads((tmp_path / "out" / "tradeoff.json").read_text())
    assert data["base"]["degenerate"] is None
    assert data["provenance"]["judge"] == "keywords"


def test_errors_of_the_command_are_one_line(run: Run, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"other": "a"}\n')
    (tmp_path / "one.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    for given, message in [
        (("--alphas", "2;5"), "write them like 0.5,1,2"),
        (("--betas", "1,1"), "betas: expected distinct strengths"),
        (("--harmful", tmp_path / "none.jsonl"), "expected a file"),
        (("--harmful", tmp_path / "bad.jsonl"), "expected harmful prompts in"),
        (("--hallucination", tmp_path / "one.jsonl"), "at least 2 different prompts"),
        (("--lora-lr", "0"), "learning_rate > 0"),
    ]:
        code, _, err = run("tradeoff", *given, "--out", tmp_path / "out", "--quiet", "--device", "cpu")
        assert code == 2
        assert message in err
        assert len(err.strip().splitlines()) == 1, err


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_a_model_with_an_adapter_is_refused(chat: Chat) -> None:
    from peft import LoraConfig, get_peft_model

    adapted: nn.Module = get_peft_model(small(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="without an adapter"), attached(adapted, 0):
        pass
