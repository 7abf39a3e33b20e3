"""The command line from end to end on a tiny Llama and a text file: files, tables, resuming, errors of one line."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.main import get_command

from refusal_kernels.python_api.capturing import capture
from refusal_kernels.python_api.checkpoint import CheckpointFolder
from refusal_kernels.python_api.cli import app
from refusal_kernels.python_api.cli_train import parse_count, parse_layers
from refusal_kernels.python_api.runs import SplitDocuments, is_held_out
from refusal_kernels.python_api.sae import TopKSAE

WORDS = [f"w{i}" for i in range(60)]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Bits depend on the number of threads; the subprocesses below get one too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("\n".join(" ".join(draw.choices(WORDS, k=draw.randint(5, 30))) for _ in range(1500)))
    return path


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            get_command(app).main([str(a) for a in arguments], prog_name="refusal-kernels")
        out, err = capfd.readouterr()
        return stop.value.code or 0, out, err

    return call


@pytest.fixture(scope="module")
def arguments(model_folder: Path, text_file: Path) -> list[str]:
    flags: dict[str, Any] = {
        "model": model_folder,
        "data": text_file,
        "layers": "0,2",
        "k": 4,
        "expansion": 4,
        "tokens": "40k",
        "batch-tokens": 256,
        "context-length": 32,
        "lr": 2e-3,
        "dead-after-tokens": "4k",
        "eval-tokens": "2k",
        "checkpoint-every": 10,
        "seed": 3,
    }
    return ["train-sae", "--quiet", *(part for name, value in flags.items() for part in (f"--{name}", str(value)))]


@pytest.fixture(scope="module")
def finished(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "finished"
    with pytest.raises(SystemExit) as stop:
        get_command(app).main([*arguments, "--out", str(out), "--tracker", "tensorboard"])
    assert not stop.value.code
    return out


def test_a_run_leaves_its_files(finished: Path, model_folder: Path, text_file: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert {"config.json", "metrics.json", "train_log.jsonl", "training.png", "training.svg", "checkpoints"} <= names
    metrics = json.loads((finished / "metrics.json").read_text())
    assert metrics["backend"] in ("cpu", "reference")
    assert metrics["evaluation"]["held_out"] is True
    assert metrics["training"]["tokens"] == 157 * 256
    assert metrics["peak_memory_bytes"] > 2**26
    assert list(finished.rglob("events.out.tfevents*"))
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    ids = torch.randint(4, 64, (8, 16), generator=torch.Generator().manual_seed(0))
    with capture(model, layers=[0, 2]) as cap:
        z = cap.run(ids)
    for layer in (0, 2):
        sae = TopKSAE.from_pretrained(finished / f"layer_{layer:02d}")
        assert (sae.config.d_in, sae.config.n_latents, sae.config.k, sae.config.layer) == (48, 192, 4, layer)
        assert sae.config.hook_name == f"model.layers.{layer}.self_attn.o_proj"
        figures = metrics["evaluation"]["layers"][str(layer)]
        assert sae.config.metadata["evaluation"] == figures
        assert figures["fvu"] < 0.75
        # The saved SAE does on fresh activations of that layer what the metrics say it does on held-out ones.
        x = z[layer]
        fvu = ((sae(x) - x).square().sum() / (x - x.mean(0)).square().sum()).item()
        assert fvu == pytest.approx(figures["fvu"], rel=0.35)
        assert (finished / "training.png").read_bytes()[:4] == b"\x89PNG"


def test_a_second_run_does_not_overwrite_the_first(run: Run, arguments: list[str], finished: Path) -> None:
    code, _, err = run(*arguments, "--out", finished)
    assert code == 2
    assert "already holds a run" in err
    code, _, err = run(*arguments, "--out", finished, "--overwrite", "--model", "/no/such/model")
    assert code == 2
    assert (finished / "metrics.json").is_file()  # a misspelt name has not cost the earlier run
    code, _, err = run(*arguments, "--out", finished)
    assert "--resume" in err
    assert err.count("\n") == 1
    assert (finished / "metrics.json").is_file()


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (["--k", "99999"], "k must be at most the number of latents = 192"),
        (["--backend", "triton"], "triton"),
        (["--tracker", "pigeon"], "pigeon is not installed or not known"),
        (["--tracker", "wandb"], "wandb is not installed or not known to accelerate; available here: tensorboard"),
        (["--data", "BLANK"], "holds no text"),
        (["--data", "BROKEN", "--streaming"], "source: cannot read .*broken.jsonl"),
    ],
)
def test_what_is_refused_costs_no_earlier_run(
    run: Run, arguments: list[str], finished: Path, tmp_path: Path, extra: list[str], expected: str
) -> None:
    if extra[1] == "triton" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    if extra[1] == "wandb" and importlib.util.find_spec("wandb") is not None:
        pytest.skip("wandb is installed")
    (tmp_path / "blank.txt").write_text("\n  \n" * 3)
    (tmp_path / "broken.jsonl").write_bytes(b'{"text": "w1 w2"}\n{"text": "\xff\xfe')
    names = {"BLANK": str(tmp_path / "blank.txt"), "BROKEN": str(tmp_path / "broken.jsonl")}
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    code, _, err = run(*arguments, "--out", finished, "--overwrite", *(names.get(e, e) for e in extra))
    assert code in (1, 2), err
    assert "Traceback" not in err
    assert re.search(f"^error: .*{expected}", err.strip().splitlines()[-1]), err
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()} == before


def test_resuming_on_other_text_is_refused(run: Run, arguments: list[str], text_file: Path, tmp_path: Path) -> None:
    """As many documents as before, other words: the position would silently mean other text."""
    data, out = tmp_path / "mine.txt", tmp_path / "out"
    lines = text_file.read_text().splitlines()
    data.write_text("\n".join(lines))
    assert run(*arguments, "--data", data, "--tokens", "2k", "--eval-tokens", 200, "--out", out)[0] == 0
    data.write_text("\n".join([*lines[:-1], "w1 " + lines[-1]]))
    code, _, err = run("train-sae", "--out", out, "--resume", "--quiet")
    assert code == 2
    assert re.search(r"error: cannot resume .*step_00000008: state: the content of .*mine.txt has changed", err), err


def test_resuming_a_finished_run_evaluates_it_again(run: Run, finished: Path) -> None:
    before = (finished / "layer_02" / "sae.safetensors").read_bytes()
    code, out, _ = run("train-sae", "--out", finished, "--resume", "--quiet")
    assert code == 0
    assert "resuming after step 157 of 157" in out
    assert "loss recovered" in out
    assert str(finished / "training.png") in out
    assert (finished / "layer_02" / "sae.safetensors").read_bytes() == before


def test_resuming_with_other_arguments_names_them(run: Run, finished: Path) -> None:
    code, _, err = run(
        "train-sae", "--out", finished, "--resume", "--quiet", "--k", 5, "--seed", 4, "--eval-tokens", "1k"
    )
    assert code == 2
    assert "k is 5 (the run has 4)" in err
    assert "seed is 4 (the run has 3)" in err
    assert "eval_tokens" not in err
    assert err.startswith("error: cannot resume")
    assert err.count("\n") == 1  # nothing was loaded before


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill-9"])
def test_an_interrupted_run_ends_in_the_same_bits(
    run: Run, arguments: list[str], finished: Path, tmp_path: Path, how: signal.Signals
) -> None:
    """Through model, token stream and activation buffer: another process, stopped in the middle, resumed here."""
    out = tmp_path / "stopped"
    command = [
        sys.executable,
        "-c",
        "from refusal_kernels.python_api.cli import app; app()",
        *arguments,
        "--out",
        str(out),
    ]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (out / "checkpoints" / "latest").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(how)
    _, err = process.communicate(timeout=60)
    latest = CheckpointFolder(out / "checkpoints").latest()
    assert latest is not None, err
    step = int(latest.name.removeprefix("step_"))
    assert step < 157
    if how == signal.SIGINT:
        assert process.returncode == 130, err
        last = err.strip().splitlines()[-1]
        assert last == (
            f"interrupted after step {step} of 157, checkpoint saved; "
            f"go on with: refusal-kernels train-sae --out {out} --resume"
        )
        assert "Traceback" not in err
    else:
        assert process.returncode == -signal.SIGKILL
        assert step % 10 == 0
    assert not (out / "metrics.json").exists()
    code, printed, _ = run("train-sae", "--out", out, "--resume", "--quiet")
    assert code == 0
    assert f"resuming after step {step} of 157" in printed
    for layer in ("layer_00", "layer_02"):
        name = Path(layer) / "sae.safetensors"
        assert (out / name).read_bytes() == (finished / name).read_bytes()
    mine, theirs = (json.loads((folder / "metrics.json").read_text())["evaluation"] for folder in (out, finished))
    assert mine == theirs


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extra", "code", "expected"),
    [
        (["--no-such-flag"], 2, "No such option.*see refusal-kernels train-sae --help"),
        (["--k", "many"], 2, "k"),
        (["--k", "0"], 2, "k"),
        (["--seed", "-1"], 2, "seed must be at least 0"),
        (["--device", "banana"], 2, "device must be auto, cpu, cuda or cuda:N; got 'banana'"),
        (["--device", "mps"], 2, "device 'mps' was asked for, and this PyTorch cannot use it"),
        (["--device", "meta"], 2, "device 'meta' holds no data"),
        (["--threads", "100000000"], 2, "--threads.*4096"),
        (["--latents", "1000000000000"], 1, "^error: out of memory: .*allocate memory"),
        (["--layers", ""], 2, "'' does not name layers"),
        (["--layers", "9" * 5000], 2, "names layers that no model has"),
        (["--layers", "0-99999999999"], 2, "'0-99999999999' names layers that no model has"),
        (["--out", "FILE/below"], 2, "out: cannot write to the folder .*below: Not a directory"),
        (["--k", "5000"], 2, "k must be at most the number of latents = 192; got 5000"),
        (["--tokens", "lots"], 2, "'lots' is not a whole number; write it like 250000, 250k, 10M or 1.5B"),
        (["--layers", "one"], 2, "'one' does not name layers; write them like 1,3 or 0-3"),
        (["--layers", "7"], 2, "layer.*7"),
        (["--lr", "-1"], 2, "lr must be positive"),
        (["--dtype", "int8"], 2, "dtype must be one of float32, bfloat16"),
        (["--backend", "magic"], 2, "magic"),
        (["--backend", "cuda"], 1, "cuda"),
        (["--device", "cuda"], 2, "no GPU; use --device cpu"),
        (["--model", "/no/such/model"], 2, "cannot load the model '/no/such/model'"),
        (["--data", "/no/such/file.txt"], 2, "no such file"),
        (["--data", "EMPTY"], 2, "empty"),
        (["--tracker", "carrier-pigeon"], 2, "carrier-pigeon is not installed or not known.*tensorboard"),
        (["--loss-after", "<nope>"], 2, "loss_after must be a token of the model's tokenizer"),
        (["--buffer-tokens", "300"], 2, "buffer_tokens must be at least 2 batches = 512"),
        (["--resume"], 2, "nothing to resume.*start the run without --resume"),
        (["--out", "FILE"], 2, "is a file; choose a folder"),
    ],
)
def test_every_user_error_is_one_line(
    run: Run, arguments: list[str], tmp_path: Path, extra: list[str], code: int, expected: str
) -> None:
    if extra[0] in ("--device", "--backend") and extra[1] == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    (tmp_path / "empty.txt").write_text("")
    extra = [e.replace("EMPTY", "FILE").replace("FILE", str(tmp_path / "empty.txt")) for e in extra]
    got, _, err = run(*arguments, "--out", tmp_path / "out", *extra)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert got == code, err
    assert len(lines) == 1, err
    assert err.rstrip().endswith(lines[0])
    assert re.search(expected, lines[0]), lines[0]
    assert "Traceback" not in err


def test_a_full_disk_is_one_line() -> None:
    """As safetensors says it, in an error of its own; the limit on a file's size stands in for the disk's."""
    script = """
import resource, sys, torch
from safetensors.torch import save_file
from refusal_kernels.python_api.cli import _explain
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    save_file({"x": torch.zeros(10000)}, sys.argv[1])
except Exception as error:
    print(_explain(error))
"""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", script, str(Path(folder) / "x.safetensors")]
        said = subprocess.run(command, capture_output=True, text=True).stdout
    assert said.startswith("('error: cannot write to or read from a .safetensors file: "), said
    assert said.endswith(", 1)\n")


def test_tracebacks_on_request(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFUSAL_KERNELS_TRACEBACK", "1")
    with pytest.raises(ValueError, match="nothing to resume"):
        get_command(app).main(["train-sae", "--out", "no-such-run", "--resume"])


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    from refusal_kernels.python_api import runs

    def broken(*_: object, **__: object) -> None:
        raise AttributeError("a bug")

    monkeypatch.setattr(runs, "train_sae", broken)
    with pytest.raises(AttributeError, match="a bug"):
        get_command(app).main(["train-sae"])


# -- the rest ---------------------------------------------------------------------------------------------------------


def test_help_and_version(run: Run) -> None:
    code, out, _ = run()
    assert code == 0
    assert all(name in out for name in ("train-sae", "demo", "info"))
    assert run("--help")[0] == 0
    code, out, _ = run("train-sae", "--help")
    assert code == 0
    for flag in ("--model", "--data", "--layers", "--resume", "--trust-remote", "--tracker", "--backend"):
        assert flag in out
    assert re.match(r"refusal-kernels \d+\.\d+", run("--version")[1])
    code, _, err = run("trane-sae")
    assert code == 2
    assert err.startswith("error: No such command 'trane-sae'")
    assert err.count("\n") == 1


def test_info(run: Run) -> None:
    code, out, _ = run("info", "--json")
    assert code == 0
    assert "torch" in json.dumps(json.loads(out))


@pytest.mark.parametrize(
    ("text", "count"),
    [("250000", 250_000), ("250_000", 250_000), ("250k", 250_000), ("10M", 10**7), ("1.5B", 1_500_000_000)],
)
def test_counts(text: str, count: int) -> None:
    assert parse_count(text) == count


def test_layers() -> None:
    assert parse_layers("1,3") == [1, 3]
    assert parse_layers("0-2, 5") == [0, 1, 2, 5]
    assert parse_layers(None) == []
    for wrong in ("3-1", "1,,2", "a", "-1", "", " "):
        with pytest.raises(Exception, match="does not name layers"):
            parse_layers(wrong)


def test_held_out_documents_are_never_trained_on() -> None:
    texts = [f"document {i}" for i in range(2000)]

    class Source:
        name, n_documents = "list", len(texts)

        def epoch(self, epoch: int, start: int) -> Iterator[str]:
            yield from (texts[::-1] if epoch else texts)[start:]

    training, held_out = SplitDocuments(Source(), held_out=False), SplitDocuments(Source(), held_out=True)
    for epoch in (0, 1):
        seen = [set(filter(None, side.epoch(epoch, 0))) for side in (training, held_out)]
        assert seen[0].isdisjoint(seen[1])
        assert seen[0] | seen[1] == set(texts)
        assert 0.015 < len(seen[1]) / len(texts) < 0.06
        assert seen[1] == {text for text in texts if is_held_out(text)}
        # Numbers stay those of the source: starting later is the tail of starting at 0.
        assert list(training.epoch(epoch, 700)) == list(training.epoch(epoch, 0))[700:]


@pytest.mark.parametrize("held_out", [False, True])
def test_too_few_documents_to_hold_out(run: Run, arguments: list[str], tmp_path: Path, held_out: bool) -> None:
    """One document is trained on, whichever side its hash is on."""
    data = tmp_path / "one.txt"
    words = " ".join(random.Random(1).choices(WORDS, k=3000))
    while is_held_out(words) != held_out:
        words += " w1"
    data.write_text(words)
    code, out, _ = run(*arguments, "--data", data, "--tokens", "2k", "--out", tmp_path / "out")
    assert code == 0
    assert "evaluating on training text" in out
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["evaluation"]["held_out"] is False


def test_a_foreign_model_on_the_built_in_data_counts_its_loss_everywhere(
    run: Run, arguments: list[str], tmp_path: Path
) -> None:
    """Its tokenizer has no <asst>: as the unknown token it would stand for any word."""
    out = tmp_path / "out"
    code, printed, _ = run(*arguments, "--data", "builtin", "--tokens", "2k", "--eval-tokens", 200, "--out", out)
    assert code == 0
    assert "the model's tokenizer has no token <asst>: its loss is counted on whole documents" in printed
    assert json.loads((out / "metrics.json").read_text())["evaluation"]["loss_after"] is None


CUSTOM_CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({marker!r}).touch()
class CustomConfig(LlamaConfig):
    model_type = "custom-llama"
class CustomModel(LlamaForCausalLM):
    config_class = CustomConfig
"""


def test_code_of_a_model_runs_only_with_the_flag(
    run: Run, arguments: list[str], model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    marker, folder = tmp_path / "executed", shutil.copytree(model_folder, tmp_path / "custom")
    (folder / "custom.py").write_text(CUSTOM_CODE.format(marker=str(marker)))
    config = json.loads((folder / "config.json").read_text())
    own = {"AutoConfig": "custom.CustomConfig", "AutoModelForCausalLM": "custom.CustomModel"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "custom-llama", "auto_map": own}))
    flags = ["--model", folder, "--tokens", "2k", "--eval-tokens", 200, "--out", tmp_path / "out"]
    code, _, err = run(*arguments, *flags)
    assert code == 2
    assert re.search("^error: cannot load the model .*custom.*Python code .* only with .*--trust-remote-code", err), err
    assert err.count("\n") == 1
    assert not marker.exists()
    assert run(*arguments, *flags, "--trust-remote-code")[0] == 0
    assert marker.exists()


def test_training_from_another_folder_within_2_gib(tmp_path: Path) -> None:
    """The built-in model and corpus at the size of a real run's steps, another process, another working directory."""
    command = [sys.executable, "-c", "from refusal_kernels.python_api.cli import app; app()", "train-sae"]
    command += [
        "--layers",
        "1,3",
        "--sequences",
        "64",
        "--k",
        "16",
        "--expansion",
        "8",
        "--tokens",
        "20k",
        "--batch-tokens",
        "2048",
        "--lr",
        "1e-3",
    ]
    command += ["--dead-after-tokens", "100k", "--eval-tokens", "12k", "--threads", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "sae-run" / "metrics.json").read_text())
    assert metrics["peak_memory_bytes"] < 2 * 2**30
    for layer in (1, 3):
        folder = Path("sae-run") / f"layer_{layer:02d}"
        assert TopKSAE.from_pretrained(tmp_path / folder).config.model_name == "builtin"
        figures = metrics["evaluation"]["layers"][str(layer)]
        assert figures["fvu"] < 0.7
        assert figures["l0"] == pytest.approx(16, abs=1)
    # Zeroing what carries the model's refusals hurts, and the reconstruction brings much of it back.
    together = metrics["evaluation"]["all_layers"]
    assert together["ce_zero"] > together["ce_clean"] + 0.05
    assert together["loss_recovered"] > 0.5
