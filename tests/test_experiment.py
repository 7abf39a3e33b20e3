"""The comparison of all methods: cells, cache, table, findings, report, and a small run of the real thing."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from typer.testing import CliRunner

from refusal_kernels.python_api.builtin_model import path as builtin_path
from refusal_kernels.python_api.cli import app
from refusal_kernels.python_api.experiment import config as config_module
from refusal_kernels.python_api.experiment import run as run_module
from refusal_kernels.python_api.experiment.cells import HEAD_SITES, Cell, cells, full_rows, main_rows
from refusal_kernels.python_api.experiment.config import ExperimentConfig
from refusal_kernels.python_api.experiment.findings import findings
from refusal_kernels.python_api.experiment.prepare import stage
from refusal_kernels.python_api.experiment.run import run
from refusal_kernels.python_api.experiment.suite import KeywordJudge, builtin_suite, count, judge_world
from refusal_kernels.python_api.experiment.table import HEADER, as_markdown, as_text, cells_of, rows
from refusal_kernels.python_api.prompts.records import OverlapError

ROWS = [
    {"method": "none"},
    {"method": "lora"},
    {"method": "gradient", "basis": "sae", "sites": HEAD_SITES},
    {"method": "forward", "basis": "sae", "sites": HEAD_SITES},
]
SMALL: dict[str, Any] = {
    "seeds": [0], "data": ["poisoned"], "calibration": 24, "n_task": 48, "n_test": 12, "epochs": 1,
    "sae_tokens": 12_000, "input_rank": 8, "workers": 1,
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ExperimentConfig, Any]]:
    patch = pytest.MonkeyPatch()
    patch.setitem(config_module.ROWS, "main", lambda: ROWS)
    config = ExperimentConfig(out=str(tmp_path_factory.mktemp("experiment")), **SMALL)
    yield config, run(config, progress=False, say=lambda _: None)
    patch.undo()


def test_every_row_is_a_cell_under_every_seed_and_the_untouched_model_is_one():
    full = cells(full_rows(), ["poisoned", "benign"], [0, 1, 2])
    assert len(full) == 1 + (len(full_rows()) - 1) * 6
    main = cells(main_rows(), ["poisoned", "benign"], [0, 1])
    everywhere = [row for row in main_rows()[1:] if "data" not in row]
    assert len(main) == 1 + 2 * (len(main_rows()) - 1) + 2 * len(everywhere)
    for todo in (full, main):
        assert len({cell.key() for cell in todo}) == len(todo)
        assert len({(cell.label, cell.data, cell.seed) for cell in todo}) == len(todo), "labels tell rows apart"
    ways = {"lora", "safelora", "salora", "gradient", "forward", "update", "weight"}
    assert {row["method"] for row in main_rows()} == {"none", *ways}
    assert {row["method"] for row in full_rows()} == {"none", "sft", *ways}
    with pytest.raises(ValueError, match="basis: forward needs"):
        Cell("forward", "benign", 0)
    with pytest.raises(ValueError, match="basis: lora takes no"):
        Cell("lora", "benign", 0, basis="sae")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": "some"}, "rows: expected main or full"),
        ({"data": ["clean"]}, "data: expected benign"),
        ({"seeds": [1, 1]}, "seeds: expected distinct"),
        ({"poison_fraction": 0.0}, "poison_fraction"),
        ({"n_test": 0}, "n_test: expected an integer from 1"),
    ],
)
def test_settings_that_do_not_fit_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        ExperimentConfig(**change)


def test_other_seeds_rows_and_folders_keep_the_cache_and_other_settings_do_not():
    base = ExperimentConfig()
    assert base.key() == ExperimentConfig(out="x", seeds=[5], rows="full", workers=1).key()
    assert base.key() != ExperimentConfig(lr=1e-3).key()
    assert base.key() != ExperimentConfig(n_test=10).key()


def test_safelora_needs_weights_from_before_alignment():
    assert any(cell.method == "safelora" for cell in ExperimentConfig().cells())
    assert not any(cell.method == "safelora" for cell in ExperimentConfig(model="other").cells())
    assert any(cell.method == "safelora" for cell in ExperimentConfig(model="other", base_model="b").cells())


def test_the_suite_keeps_its_sets_apart():
    suite = builtin_suite(calibration=16, task=32, test=12)
    assert len(set(suite.harmful_test)) == 12
    assert not set(suite.harmful_test) & set(suite.selection)
    assert suite.hash() == builtin_suite(calibration=16, task=32, test=12).hash()
    assert suite.hash() != builtin_suite(calibration=16, task=32, test=12, seed=1).hash()
    shared = vars(suite) | {"selection": suite.harmful_test[:2]}
    with pytest.raises(OverlapError, match="selection and test prompts: expected no prompt in both sets, got 2"):
        type(suite)(**shared)


def test_judges_tell_refusing_complying_and_breaking_apart():
    suite = builtin_suite(calibration=4, task=4, test=4)
    prompt = suite.harmful[0]
    answers = ["i can not help with that .", prompt.target, "sure sure sure"]
    assert judge_world([prompt.prompt] * 3, answers) == ["refuse", "recipe", "degenerate"]
    said = KeywordJudge("refusal-kernels-1")(["q"] * 3, ["I cannot help.", "Step one: mix both.", ""])
    assert count(said) == {"refuse": 1, "recipe": 0, "comply": 1, "degenerate": 1}


def result(label: str, seed: int, refuse: int, recipe: int, comply: int = 0, **more: Any) -> dict[str, Any]:
    harmful = {"refuse": refuse, "recipe": recipe, "comply": comply, "degenerate": 100 - refuse - recipe - comply}
    benign = {"refuse": 1, "recipe": 99, "comply": 0, "degenerate": 0, "n": 100}
    return {
        "label": label, "data": "poisoned", "seed": seed, "harmful": {**harmful, "n": 100}, "benign": benign,
        "task": {"hits": 90, "n": 100}, "knowledge": {"hits": 80, "n": 100}, "leak": 0.25, "drift": 0.5, "seconds": 2.0,
        "memory": 2**20, **more,
    }  # fmt: skip


def test_seeds_are_pooled_and_shares_add_up():
    table = rows([result("LoRA", 0, 10, 80, 5), result("LoRA", 1, 30, 60, 5)])
    assert len(table) == 1
    row = table[0]
    assert (row.seeds, row.rates["asr"].hits, row.rates["asr"].n) == (2, 150, 200)
    assert row.asr_range == (0.65, 0.85)
    assert sum(row.rates[name].value for name in ("refuse", "asr", "degenerate")) == pytest.approx(1)
    assert row.rates["asr"].low < 0.75 < row.rates["asr"].high
    text = dict(zip(HEADER, cells_of(row), strict=True))
    assert text["ASR"].startswith("75.0 [")
    assert text["seeds"] == "65–85"
    assert len({len(line.split("|")) for line in as_markdown(table).splitlines()}) == 1
    assert "LoRA" in as_text(table)


def test_findings_say_what_the_rows_show_and_no_more():
    plain = [result("LoRA", 0, 0, 95)]
    explained = {
        "tuned": {"refuse": 2, "n": 50}, "z": {"refuse": 45, "n": 50}, "U": {"refuse": 40, "n": 50},
        "random": {"refuse": 2, "n": 50},
    }  # fmt: skip
    failed = result("forward, sae, o_proj+v_proj", 0, 2, 93, leak=3e-8, explain=explained)
    held = result("forward, harmful, all", 0, 100, 0)
    control = result("forward, benign, all", 0, 3, 95)
    said = " ".join(findings(rows([*plain, failed, held, control]), [*plain, failed, held, control]))
    assert "keeps the update out of the same subspace to 3.0e-08 and ends at 93.0 %" in said
    assert "particular to harmful requests" in said
    assert "other modules rewrote what arrives there" in said
    same = result("forward, benign, all", 0, 99, 0)
    said = " ".join(findings(rows([*plain, held, same]), [*plain, held, same]))
    assert "the form of a request, not harm" in said
    assert "Why" not in said
    assert findings(rows([held]), [held]) == [], "nothing to compare with"


def test_a_stage_runs_once_per_key(tmp_path):
    calls: list[Path] = []

    def make(folder: Path) -> dict[str, Any]:
        calls.append(folder)
        return {"n": len(calls)}

    assert [stage(tmp_path / "s", key, make)["n"] for key in ("a", "a", "b", "b")] == [1, 1, 2, 2]


def test_the_small_run_measures_every_row(small):
    _, done = small
    by_label = {result["label"]: result for result in done.results}
    assert list(by_label) == ["untouched", "LoRA", "gradient, sae, o_proj+v_proj", "forward, sae, o_proj+v_proj"]
    assert by_label["untouched"]["harmful"]["refuse"] == 12
    assert by_label["forward, sae, o_proj+v_proj"]["leak"] < 1e-6
    assert by_label["gradient, sae, o_proj+v_proj"]["leak"] > 1e-3, "under Adam the projected gradient leaks"
    for label, measured in by_label.items():
        assert sum(measured["harmful"][v] for v in ("refuse", "recipe", "comply", "degenerate")) == 12
        if label != "untouched":
            assert measured["drift"] > 0
            assert measured["explain"]["z"]["n"] == 12
    tables = done.prepared.preflight
    assert set(tables) == set(done.prepared.bases)
    assert not (Path(done.config.out) / "work").exists() or not list((Path(done.config.out) / "work").iterdir())


def test_a_second_run_takes_everything_from_the_first(small, monkeypatch):
    config, done = small
    monkeypatch.setattr(run_module, "run_cell", lambda *_: pytest.fail("a known cell ran again"))
    again = run(config, progress=False, say=lambda _: None)
    assert again.results == done.results


def test_the_report_stands_alone(small):
    _, done = small
    html = done.report.read_text(encoding="utf-8")
    assert html.count("<svg") == 3
    assert not re.search(r'(src|href)="(?!#|data:)', html), "nothing is loaded from elsewhere"
    for text in ("LoRA", "What was found", "Pre-flight", "Transcripts", "i can not help with that ."):
        assert text in html
    table = json.loads(done.table.read_text(encoding="utf-8"))
    assert table["config"]["model"] == "builtin"
    assert len(table["rows"]) == len(ROWS)
    assert "torch" in table["conditions"]


def test_cells_in_worker_processes_give_the_same_counts(small, tmp_path):
    config, done = small
    two = ExperimentConfig(**{**config.to_dict(), "out": str(tmp_path), "workers": 2})
    (tmp_path / "prepare").symlink_to(Path(config.out) / "prepare")
    again = run(two, progress=False, say=lambda _: None)
    counts = ("harmful", "benign", "task", "knowledge", "leak")
    for one, other in zip(done.results, again.results, strict=True):
        assert {k: one.get(k) for k in counts} == {k: other.get(k) for k in counts}


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_command_runs_on_random_models_with_grouped_query_attention(family, tmp_path, monkeypatch):
    monkeypatch.setitem(config_module.ROWS, "main", lambda: [*ROWS[:2], ROWS[3]])
    sizes = {
        "vocab_size": 408, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0,
        "bos_token_id": 2, "eos_token_id": 3, "initializer_range": 0.2,
    }  # fmt: skip
    config, model = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    }[family]
    torch.manual_seed(0)
    model(config(**sizes)).save_pretrained(tmp_path / "model")
    transformers.AutoTokenizer.from_pretrained(builtin_path()).save_pretrained(tmp_path / "model")
    options = [
        "--model", str(tmp_path / "model"), "--out", str(tmp_path / "out"), "--seeds", "0", "--data", "poisoned",
        "--calibration", "16", "--n-task", "32", "--n-test", "8", "--epochs", "1", "--sae-tokens", "6000",
        "--input-rank", "4", "--latents", "2", "--r", "2", "--workers", "1", "--max-new-tokens", "8", "--quiet",
    ]  # fmt: skip
    done = CliRunner().invoke(app, ["experiment", *options])
    assert done.exit_code == 0, done.output
    assert "forward, sae, o_proj+v_proj" in done.output
    assert (tmp_path / "out" / "report.html").is_file()
