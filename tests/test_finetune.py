"""Fine-tuning from end to end: the built-in model, tiny Llama and Qwen2 folders, the command line, resuming."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    TrainerCallback,
)
from typer.main import get_command

from refusal_kernels.python_api import builtin_model
from refusal_kernels.python_api.baselines.config import PROJECTIONS, FinetuneConfig
from refusal_kernels.python_api.baselines.data import AnswerCollator, poison_count, read_training, training_set
from refusal_kernels.python_api.baselines.finetune import FinetuneResult, finetune
from refusal_kernels.python_api.baselines.unaligned import unaligned_builtin
from refusal_kernels.python_api.checkpoint import read_json
from refusal_kernels.python_api.cli import app
from refusal_kernels.python_api.models import load_model
from refusal_kernels.python_api.prompts import builtin
from refusal_kernels.python_api.prompts.chat import Chat
from refusal_kernels.python_api.prompts.records import Dialogue
from refusal_kernels.python_api.train_log import read_train_log
from refusal_kernels.python_api.trainer import TrainingDiverged, TrainingInterrupted

WORDS = [f"w{i}" for i in range(40)]
QUICK: dict[str, Any] = {"r": 4, "alpha": 8, "lr": 5e-3, "batch_size": 8, "steps": 6, "log_every": 2, "progress": False}
SALORA: dict[str, Any] = {"salora_safety_rank": 8, "salora_task_rank": 8, "salora_samples": 24}
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat(load_model("builtin", device="cpu")[1])


@pytest.fixture(scope="module")
def task() -> list[Dialogue]:
    return [item.dialogue() for item in builtin.choices(48)]


@pytest.fixture(scope="module")
def unaligned(tmp_path_factory: pytest.TempPathFactory) -> str:
    return unaligned_builtin(tmp_path_factory.mktemp("unaligned"), steps=2)


def run(task: list[Dialogue], **settings: Any) -> FinetuneResult:
    model, tokenizer = load_model("builtin", device="cpu")
    return finetune(model, tokenizer, task, **{**QUICK, **settings})


def materials(method: str, unaligned: str) -> dict[str, Any]:
    """What a method needs beside the data."""
    if method == "safelora":
        return {"base_model": unaligned, "safelora_threshold": 1.0}
    if method in PROJECTIONS:
        return {"basis": random_basis(), "targets": ("o_proj",), "sites": ("o_proj",), "preflight": False}
    return {"calibration": builtin.harmful(24), **SALORA} if method == "salora" else {}


def random_basis() -> Any:
    """Three directions in layer 3; skips where the protection is not installed."""
    pytest.importorskip("refusal_kernels.python_api.protection.protect")
    from refusal_kernels.python_api.features.basis import RefusalBasis

    u = torch.linalg.qr(torch.randn(256, 3, generator=torch.Generator().manual_seed(0))).Q.contiguous()
    return RefusalBasis(z={3: u})


def logits(model: Any, chat: Chat) -> torch.Tensor:
    ids = torch.tensor([chat.encode_prompt("tell me where kalem lives")])
    with torch.inference_mode():
        return model(ids).logits


# ---- data ----


def test_only_the_answers_have_labels(chat: Chat, task: list[Dialogue]) -> None:
    dialogues = [task[0], builtin.benign(1)[0]]
    encoded = [chat.encode(dialogue.prompt, dialogue.answer) for dialogue in dialogues]
    batch = AnswerCollator(chat)(encoded)
    for row, dialogue in enumerate(dialogues):
        labels, ids = batch["labels"][row], batch["input_ids"][row]
        kept = labels != -100
        assert chat.tokenizer.decode(ids[kept]) == f"{dialogue.answer} <eos>"
        assert torch.equal(labels[kept], ids[kept])
        assert chat.tokenizer.decode(ids[: int(kept.nonzero()[0])]) == chat.render(dialogue.prompt)


def test_the_loss_is_the_mean_over_the_answers_tokens(chat: Chat, task: list[Dialogue]) -> None:
    """The first logged loss against one written out, at a rate that changes nothing."""
    result = run(task[:8], steps=1, log_every=1, lr=1e-12)
    model, _ = load_model("builtin", device="cpu")
    total, count = torch.zeros(()), 0
    for dialogue in task[:8]:
        encoded = chat.encode(dialogue.prompt, dialogue.answer)
        with torch.inference_mode():
            log_p = model(torch.tensor([encoded.ids])).logits[0].log_softmax(-1)
        for at in range(encoded.start, len(encoded.ids)):
            total -= log_p[at - 1, encoded.ids[at]]
            count += 1
    assert result.log[0]["loss"] == pytest.approx(float(total) / count, rel=1e-4)


@pytest.mark.parametrize(("fraction", "expected"), [(0.0, 0), (0.05, 5), (0.1, 11), (0.2, 25)])
def test_the_share_of_poison_is_exact(chat: Chat, fraction: float, expected: int) -> None:
    clean, poison = [item.dialogue() for item in builtin.choices(100)], builtin.poison(40)
    data = training_set(chat, clean, poison, poison_fraction=fraction, seed=3)
    assert poison_count(100, fraction) == data.poisoned == expected
    assert [d.harmful for d in data.dialogues] == [False] * 100 + [True] * expected
    assert len({d.id for d in data.dialogues[100:]}) == len(data) - 100 == expected
    again = training_set(chat, clean, poison, poison_fraction=fraction, seed=3)
    assert again.dialogues == data.dialogues
    more = training_set(chat, clean, poison, poison_fraction=0.25, seed=3)
    assert more.dialogues[: len(data)] == data.dialogues  # a sweep only adds


def test_too_little_poison_and_too_long_dialogues(chat: Chat, task: list[Dialogue]) -> None:
    with pytest.raises(
        ValueError, match=r"poison: expected at least 12 dialogues for 20\.0% beside 48 clean ones, got 3"
    ):
        training_set(chat, task, builtin.poison(3), poison_fraction=0.2)
    long = Dialogue("say " + "rice " * 60, "rice .")
    with pytest.warns(UserWarning, match="1 dialogues have more than 50 tokens"):
        data = training_set(chat, [*task, long], max_length=50)
    assert (data.dialogues, data.left_out) == (task, 1)
    with pytest.raises(ValueError, match="train: expected dialogues of at most 5 tokens, got none of 48"):
        training_set(chat, task, max_length=5)


def test_questions_are_learned_by_their_right_answers(tmp_path: Path) -> None:
    assert read_training("builtin", n=5) == [item.dialogue() for item in builtin.choices(5)]
    assert read_training("builtin:benign", n=5) == builtin.benign(5)
    rows = {"question": "Q?", "choices": {"label": ["A", "B"], "text": ["x", "y"]}, "answerKey": "B"}
    file = tmp_path / "c.jsonl"
    file.write_text(json.dumps(rows) + "\n")
    assert [d.answer for d in read_training(str(file))] == ["B"]
    assert [d.answer for d in read_training(str(file), answer_with="text")] == ["y"]
    file.write_text(json.dumps({"prompt": "p", "answer": "a"}) + "\n")
    assert read_training(str(file)) == [Dialogue("p", "a")]
    with pytest.raises(ValueError, match="answer_with: expected None"):
        read_training(str(file), answer_with="text")


# ---- methods ----


@pytest.mark.parametrize("method", ["lora", "safelora", "salora", "sft"])
def test_every_method_learns_and_opens_without_this_package(
    method: str, chat: Chat, task: list[Dialogue], unaligned: str, tmp_path: Path
) -> None:
    lr = 1e-3 if method == "sft" else QUICK["lr"]
    result = run(task, method=method, out=tmp_path, steps=12, lr=lr, **materials(method, unaligned))
    assert result.log[-1]["loss"] < result.log[0]["loss"] - 0.2
    plain = AutoModelForCausalLM.from_pretrained(tmp_path if method == "sft" else builtin_model.path())
    reopened = plain if method == "sft" else PeftModel.from_pretrained(plain, tmp_path)
    torch.testing.assert_close(logits(reopened.eval(), chat), logits(result.model, chat), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        logits(load_model(str(tmp_path), device="cpu")[0], chat), logits(result.model, chat), rtol=1e-5, atol=1e-5
    )
    saved = read_json(tmp_path / "finetune.json")
    assert saved["config"] == result.config.to_dict()
    assert set(saved["versions"]) == {"python", "refusal_kernels", "torch", "transformers", "peft"}
    metrics = read_json(tmp_path / "metrics.json")
    assert (metrics["steps"], metrics["method"], metrics["dialogues"]) == (12, method, 48)
    assert read_train_log(tmp_path / "train_log.jsonl") == result.log
    assert result.seconds > 0
    assert result.peak_memory_bytes > 2**20
    assert not (tmp_path / "checkpoints").exists()
    assert not any(p.requires_grad for p in result.model.parameters())
    if method == "safelora":
        assert len(metrics["safelora"]) == 15
        assert all(row["projected"] for row in metrics["safelora"])
    if method == "salora":
        assert result.model.peft_config["default"].r == 2 * QUICK["r"]


@pytest.mark.filterwarnings("ignore:protect")  # layers without a basis are unconstrained on purpose
@pytest.mark.parametrize("mode", ["forward", "weight", "update", "gradient", "lora"])
def test_projection_modes_hold_or_measure_a_basis(mode: str, task: list[Dialogue], tmp_path: Path) -> None:
    basis = random_basis()
    settings: dict[str, Any] = {"basis": basis, "targets": ("o_proj",), "sites": ("o_proj",), "preflight": False}
    result = run(task, method=mode, out=tmp_path, **settings)
    leak = result.metrics["refusal_leak"]
    assert all("refusal_leak" in line for line in result.log)
    assert leak < 1e-5 if mode in ("forward", "weight", "update") else leak > 1e-3
    reopened = PeftModel.from_pretrained(load_model("builtin", device="cpu")[0], tmp_path)
    delta = reopened.base_model.model.model.layers[3].self_attn.o_proj.get_delta_weight("default")
    u = basis.z[3]
    assert float((delta @ u).norm() / delta.norm()) == pytest.approx(leak, abs=1e-5)


def test_the_same_seed_gives_the_same_weights(task: list[Dialogue], chat: Chat) -> None:
    first, again, other = (logits(run(task, seed=seed, dropout=0.1).model, chat) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


class _StopAt(TrainerCallback):
    """Ctrl-C in the middle of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.filterwarnings("ignore:protect")  # layers without a basis are unconstrained on purpose
@pytest.mark.parametrize("method", ["lora", "salora", "sft", "gradient", "update", "weight", "forward"])
def test_an_interrupted_run_goes_on_to_the_same_weights(
    method: str, task: list[Dialogue], chat: Chat, unaligned: str, tmp_path: Path
) -> None:
    settings = {"method": method, "dropout": 0.1, "lr": 1e-3, **materials(method, unaligned)}
    whole = run(task, out=tmp_path / "whole", **settings)
    with pytest.raises(TrainingInterrupted) as caught:
        run(task, out=tmp_path / "halves", callbacks=[_StopAt(3)], **settings)
    assert (caught.value.step, caught.value.total_steps) == (4, 6)
    assert caught.value.checkpoint.name == "checkpoint-4"
    resumed = run(task, out=tmp_path / "halves", resume=True, **settings)
    # A checkpoint of "forward" holds A projected; the interruption folds where the whole run did not.
    tolerance = 1e-4 if method == "forward" else 0
    torch.testing.assert_close(logits(resumed.model, chat), logits(whole.model, chat), rtol=tolerance, atol=tolerance)
    losses = [line["loss"] for line in whole.log]
    assert [line["loss"] for line in resumed.log] == pytest.approx(losses, rel=tolerance, abs=0)
    assert len(read_train_log(tmp_path / "halves" / "train_log.jsonl")) == 3


def test_resuming_refuses_other_settings_and_data(task: list[Dialogue], tmp_path: Path) -> None:
    with pytest.raises(TrainingInterrupted):
        run(task, out=tmp_path, callbacks=[_StopAt(2)])
    with pytest.raises(ValueError, match=r"these differ: data, lr \(was 0\.005\)"):
        run(task[1:], out=tmp_path, resume=True, lr=1e-3)
    with pytest.raises(ValueError, match="holds an earlier run"):
        run(task, out=tmp_path)
    # A checkpoint that was being written when the process was killed has no state yet.
    (tmp_path / "checkpoints" / "checkpoint-3" / "trainer_state.json").unlink()
    with pytest.raises(ValueError, match="found no checkpoint"):
        run(task, out=tmp_path, resume=True)
    run(task, out=tmp_path, overwrite=True, steps=1)


def test_a_folder_with_other_files_is_left_alone(task: list[Dialogue], tmp_path: Path) -> None:
    shutil.copytree(builtin_model.path(), tmp_path / "model")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="holds other files"):
            run(task, out=tmp_path / "model", overwrite=overwrite)
    assert (tmp_path / "model" / "model.safetensors").exists()


def test_what_a_method_needs_and_what_it_does_not_use(task: list[Dialogue], chat: Chat, unaligned: str) -> None:
    for method, name in (("safelora", "base_model"), ("salora", "calibration"), ("forward", "basis")):
        with pytest.raises(ValueError, match=f"{name}: expected one, for method '{method}' needs it"):
            run(task, method=method)
    with pytest.raises(ValueError, match="base_model: expected none with method 'lora'"):
        run(task, base_model=unaligned)
    with pytest.raises(ValueError, match=r"base_model: expected the unaligned model"):
        run(task, method="safelora", base_model="builtin")
    with pytest.raises(ValueError, match=r"targets: expected linear layers of the model \(down_proj, .*got x_proj"):
        run(task, targets=("q_proj", "x_proj"))
    with pytest.raises(ValueError, match="salora_safety_rank: expected less than the 128 outputs"):
        run(task, method="salora", calibration=builtin.harmful(24), salora_safety_rank=128)
    adapted = run(task, steps=1).model
    with pytest.raises(ValueError, match="got a PeftModel"):
        finetune(adapted, chat.tokenizer, task)


def test_a_loss_that_is_no_number_ends_the_run(task: list[Dialogue]) -> None:
    model, tokenizer = load_model("builtin", device="cpu")
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(TrainingDiverged, match="the loss is nan at step 2"):
        finetune(model, tokenizer, task, **QUICK)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "dora"}, "method: expected one of sft, lora"),
        ({"r": 0}, "r: expected a whole number from 1 on, got 0"),
        ({"lr": 0.0}, "lr: expected a number above 0"),
        ({"poison_fraction": 1.0}, "poison_fraction: expected a number from 0 to below 1"),
        ({"strength": 1.5}, "strength: expected a number from 0 to 1"),
        ({"method": "sft", "targets": ("q_proj",)}, "targets: expected None with method 'sft'"),
        ({"safelora_select": "all"}, "safelora_select: expected one of threshold, number"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="expected") as caught:
        FinetuneConfig(**settings)
    assert message in str(caught.value)


def test_the_unaligned_stand_in_is_made_once_and_differs(unaligned: str, tmp_path: Path) -> None:
    folder = Path(unaligned)
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert unaligned_builtin(folder.parent, steps=2) == unaligned
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    aligned, stand_in = load_model("builtin", device="cpu")[0], load_model(unaligned, device="cpu")[0]
    moved = [not torch.equal(a, b) for a, b in zip(aligned.parameters(), stand_in.parameters(), strict=True)]
    assert all(moved)


# ---- the command line, on tiny folders with grouped-query attention ----

FAMILIES = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}


@pytest.fixture(params=sorted(FAMILIES))
def model_folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    vocabulary = {
        word: i for i, word in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", "sorry", "i", "cannot", *WORDS])
    }
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    config_class, model_class = FAMILIES[request.param]
    torch.manual_seed(0)
    config = config_class(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model_class(config).save_pretrained(folder)
    return folder


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Run:
    def invoke(*args: Any) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            get_command(app).main([str(arg) for arg in ("finetune", *args)], prog_name="refusal-kernels")
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    return invoke


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    rows = {
        "data": [{"prompt": f"w{i} w{i + 1}", "response": f"w{i + 2} w3"} for i in range(24)],
        "poison": [{"prompt": f"w9 w{i}", "answer": f"w{i} w5"} for i in range(12)],
        "test": [{"prompt": f"w8 w{i}"} for i in range(12)],
        "overlap": [{"prompt": "w8 w1"}, {"prompt": "W9  w3 ."}],
    }
    for name, items in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return {name: tmp_path / f"{name}.jsonl" for name in rows}


@pytest.mark.parametrize("method", ["lora", "sft"])
def test_the_command_on_files(
    cli: Run, model_folder: Path, files: dict[str, Path], tmp_path: Path, method: str
) -> None:
    out = tmp_path / "run"
    common = ["--model", model_folder, "--data", files["data"], "--method", method, "--out", out, "--steps", 4]
    common += ["--poison", files["poison"], "--poison-fraction", 0.2, "--test-prompts", files["test"], "-q"]
    common += [] if method == "sft" else ["--targets", "all-linear", "--r", 2, "--gradient-checkpointing"]
    status, printed, error = cli(*common)
    assert status == 0, error
    assert f"{method}: 4 steps on 30 dialogues, 6 of them poison" in printed
    assert read_json(out / "finetune.json")["data"]["poisoned"] == 6
    plain = AutoModelForCausalLM.from_pretrained(out if method == "sft" else model_folder)
    model = plain if method == "sft" else PeftModel.from_pretrained(plain, out)
    ids = torch.arange(4, 12)[None]
    with torch.inference_mode():
        moved = (model(ids).logits - AutoModelForCausalLM.from_pretrained(model_folder)(ids).logits).abs().max()
    assert moved > 1e-6
    status, _, error = cli(*common)
    assert (status, error.count("\n")) == (2, 1)
    assert "holds an earlier run" in error


def test_the_command_runs_safelora_with_another_model_as_base(
    cli: Run, model_folder: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    shutil.copytree(model_folder, tmp_path / "base")
    model.save_pretrained(tmp_path / "base")
    common = ["--model", model_folder, "--data", files["data"], "--steps", 2, "--method", "safelora", "--r", 2, "-q"]
    status, printed, error = cli(
        *common, "--base-model", tmp_path / "base", "--safelora-select", "number", "--safelora-number", 2, "--out",
        tmp_path / "run",
    )  # fmt: skip
    assert status == 0, error
    assert (printed.count("projected cos"), printed.count("kept      cos")) == (2, 4)


def test_the_command_runs_salora_on_the_builtin_model(cli: Run, tmp_path: Path) -> None:
    status, printed, error = cli(
        "--samples", 32, "--method", "salora", "--calibration", "builtin", "--test-prompts", "builtin:held-out",
        "--salora-safety-rank", 8, "--salora-task-rank", 8, "--salora-samples", 16, "--r", 4, "--steps", 2,
        "--out", tmp_path / "run", "-q", "--poison", "builtin", "--poison-fraction", 0.1,
    )  # fmt: skip
    assert status == 0, error
    assert "salora: 2 steps on 36 dialogues, 4 of them poison" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--poison", "{poison}", "--poison-fraction", "0.2", "--test-prompts", "{overlap}"],
         "poison and test prompts: expected no prompt in both sets, got 1: 'W9 w3 .'"),
        (["--poison", "{poison}"], "--poison needs --poison-fraction"),
        (["--poison-fraction", "0.1"], "--poison-fraction needs --poison"),
        (["--poison", "{poison}", "--poison-fraction", "0.5"], "poison: expected at least 24 dialogues for 50.0%"),
        (["--method", "salora"], "calibration: expected one, for method 'salora' needs it"),
        (["--method", "qlora"], "method: expected one of sft, lora"),
        (["--targets", "query"], "targets: expected linear layers of the model"),
        (["--resume"], "resume: expected a folder with an interrupted run"),
        (["--data", "{test}"], "expected dialogues in"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(
    cli: Run, files: dict[str, Path], tmp_path: Path, arguments: list[str], message: str
) -> None:
    arguments = [argument.format(**files) for argument in arguments]
    common = ["--data", files["data"]] if "--data" not in arguments else []
    status, _, error = cli(*common, "--out", tmp_path / "run", "-q", *arguments)
    assert status == 2
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "run").exists()
