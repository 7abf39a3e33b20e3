"""Checkpoints that must not be written, and checkpoints that must not be read: the trainer's files from both sides."""

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

from refusal_kernels.python_api.checkpoint import CheckpointFolder
from refusal_kernels.python_api.sae import TopKSAE
from refusal_kernels.python_api.trainer import SAETrainer, TrainConfig, TrainingDiverged

D, BATCH, LAYERS = 8, 256, (0, 2)


class Noise:
    """Batches of two layers; `at` may spoil one before it is handed out."""

    def __init__(self, at: Callable[[int, dict[int, torch.Tensor]], None] = lambda i, batch: None) -> None:
        self.at = at
        self.i = 0

    def __iter__(self) -> Iterator[dict[int, torch.Tensor]]:
        while True:
            generator = torch.Generator().manual_seed(self.i)
            batch = {layer: torch.randn(BATCH, D, generator=generator) for layer in LAYERS}
            self.at(self.i, batch)
            self.i += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        return {"i": self.i}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.i = state["i"]


def settings(out: Path, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "layers": list(LAYERS),
        "out": str(out),
        "k": 2,
        "expansion": 2,
        "tokens": 100 * BATCH,
        "batch_tokens": BATCH,
        "dead_after_tokens": 4 * BATCH,
        "checkpoint_every": 20,
        "log_every": 120,
    }
    return TrainConfig(**values | changes)


# -- writing ----------------------------------------------------------------------------------------------------------


def poison(i: int, batch: dict[int, torch.Tensor]) -> None:
    if i == 86:
        batch[2][0, 0] = float("nan")


def poison_and_interrupt(i: int, batch: dict[int, torch.Tensor]) -> None:
    poison(i, batch)
    if i == 86:
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(("at", "step"), [(poison, 100), (poison_and_interrupt, 87)], ids=["due", "ctrl-c"])
def test_a_diverged_run_keeps_its_last_good_checkpoints(tmp_path: Path, at: Callable[..., None], step: int) -> None:
    """The weights are NaN from step 87 on and the first log line is at 120: the checkpoint before it must notice."""
    with pytest.raises(TrainingDiverged, match=f"layer 2 is .* at step {step}; the last good checkpoint is") as error:
        SAETrainer(settings(tmp_path, tokens=120 * BATCH), Noise(at), progress=False).train()
    folder = CheckpointFolder(tmp_path / "checkpoints")
    assert folder.steps() == [60, 80]
    assert str(folder.path(80)) in str(error.value)
    assert "\n" not in str(error.value)
    assert sorted(p.name for p in folder.root.iterdir()) == ["latest", "step_00000060", "step_00000080"]
    (folder.root / "latest").write_bytes(b"\xff\xfe")  # damaged: as if it were not there
    assert folder.latest() == folder.path(80)
    trainer = SAETrainer(settings(tmp_path, tokens=120 * BATCH), Noise(), progress=False)
    trainer.load_checkpoint(folder.path(80)).train()
    assert all(torch.isfinite(p).all() for sae in trainer.saes.values() for p in sae.parameters())


@pytest.mark.parametrize("what", ["weight", "moment"])
def test_nothing_that_is_not_finite_is_written(tmp_path: Path, what: str) -> None:
    trainer = SAETrainer(settings(tmp_path, tokens=4 * BATCH, checkpoint_every=0), Noise(), progress=False)
    trainer.train()
    sae = trainer.saes[2]
    spoilt = sae.b_enc if what == "weight" else trainer.optimizers[2].state[sae.W_dec]["exp_avg_sq"]
    with torch.no_grad():
        spoilt.view(-1)[1] = float("inf")
    name = "b_enc" if what == "weight" else "Adam's exp_avg_sq of W_dec"
    before = (tmp_path / "checkpoints" / "step_00000004" / "state.pt").read_bytes()
    with pytest.raises(TrainingDiverged, match=f"{name} of layer 2 is not finite at step 4; the last good"):
        trainer.save_checkpoint()
    assert (tmp_path / "checkpoints" / "step_00000004" / "state.pt").read_bytes() == before
    empty = SAETrainer(settings(tmp_path / "new", tokens=4 * BATCH), Noise(), progress=False)
    empty.saes, empty.optimizers, empty._sums = trainer.saes, trainer.optimizers, trainer._sums
    with pytest.raises(TrainingDiverged, match="no checkpoint was written before"):
        empty.save_checkpoint()


def test_a_run_that_cannot_start_has_written_nothing(tmp_path: Path) -> None:
    for changes, at, message in (
        ({"k": 17}, lambda i, batch: None, "k must be at most the number of latents = 16"),
        ({}, lambda i, batch: batch[0].fill_(float("nan")), "finite"),
        ({"backend": "magic"}, lambda i, batch: None, "magic"),
    ):
        with pytest.raises(ValueError, match=message):
            SAETrainer(settings(tmp_path / "out", **changes), Noise(at), progress=False).prepare()
    assert not (tmp_path / "out").exists()


# -- reading ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    SAETrainer(settings(out, tokens=10 * BATCH), Noise(), progress=False).train()
    return out


@pytest.fixture
def checkpoint(written: Path, tmp_path: Path) -> Path:
    """A checkpoint of ten steps, to be spoilt."""
    latest = CheckpointFolder(shutil.copytree(written, tmp_path / "run") / "checkpoints").latest()
    assert latest is not None
    return latest


def load(folder: Path) -> SAETrainer:
    return SAETrainer(settings(folder, tokens=10 * BATCH), Noise(), progress=False).load_checkpoint(folder)


def refused(folder: Path, file: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load(folder)
    assert file in str(error.value)
    assert "\n" not in str(error.value)


def test_a_damaged_state_file_is_one_clear_error(checkpoint: Path) -> None:
    assert load(checkpoint).step == 10  # as it was written it loads
    path = checkpoint / "state.pt"
    whole = path.read_bytes()
    for content in (whole[:-100], whole[: len(whole) // 2], b"", b"not a checkpoint"):
        path.write_bytes(content)
        refused(checkpoint, str(path), "damaged or no trainer's state")
        with pytest.raises(ValueError) as error:
            load(checkpoint)
        assert "weights_only" not in str(error.value)  # no advice to run what may be in the file
    torch.save([1, 2], path)
    refused(checkpoint, str(path), "must hold a dict; got list")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"state\.pt does not exist"):
        load(checkpoint)


State = dict[str, Any]


def put(*keys: Any) -> Callable[[State], None]:
    """Sets state[keys[0]]...[keys[-2]] to keys[-1]."""

    def spoil(state: State) -> None:
        *inner, last, value = keys
        for key in inner:
            state = state[key]
        state[last] = value

    return spoil


ADAM = ("optimizers", 2, "state", 0)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (put(*ADAM, "exp_avg", torch.zeros(3)), r"optimizers\[2\] of W_enc: exp_avg must be .*\[16, 8\]; got .*\[3\]"),
        (put(*ADAM, "exp_avg", torch.zeros(16, 8).double()), r"exp_avg must be torch.float32 .* got torch.float64"),
        (put(*ADAM, "exp_avg", torch.full((16, 8), float("nan"))), "exp_avg holds values that are not finite"),
        (put(*ADAM, "exp_avg", torch.zeros(1).expand(16, 8)), "exp_avg must be a dense contiguous tensor"),
        (put(*ADAM, "exp_avg_sq", torch.full((16, 8), -1.0)), "exp_avg_sq must be at least 0; got -1"),
        (put(*ADAM, "step", 7), "step must be a tensor; got 7"),
        (put("optimizers", 2, "state", {}), r"optimizers\[2\] must hold Adam's state of W_enc, b_enc, W_dec, b_dec"),
        (put("optimizers", {}), r"optimizers must hold one entry for each of the layers \[0, 2\]; got a dict of noth"),
        (put("dead", 0, "tokens_since_fired", torch.zeros(4).long()), r"tokens_since_fired must be torch.int64 \[16\]"),
        (put("dead", 0, "rows", torch.tensor([3, 99])), r"dead\[0\]: rows must be ascending latents below 16"),
        (put("dead", 0, "updates", "x"), "updates must be an integer of at least 0; got 'x'"),
        (put("sums", 0, torch.zeros(2).double()), r"sums\[0\] must be torch.float64 \[5\]"),
        (put("summed_steps", -1), "summed_steps must be an integer of at least 0; got -1"),
        (put("first", [{0: torch.zeros(4, 3), 2: torch.zeros(4, D)}]), r"first: layer 0 must be .*\[4, 8\]; got"),
        (put("first", [{0: torch.zeros(4, D)}]), "first: layer 2 must be floating-point rows"),
        (put("torch_rng", torch.zeros(3)), "torch_rng must be torch.uint8"),
        (lambda state: state.pop("batches"), "batches is missing"),
    ],
)
def test_what_does_not_fit_in_a_state_file_is_named(checkpoint: Path, spoil: Any, message: str) -> None:
    path = checkpoint / "state.pt"
    state = torch.load(path, weights_only=True)
    spoil(state)
    torch.save(state, path)
    refused(checkpoint, str(path), message)


def test_a_position_that_the_data_refuses_names_the_checkpoint(checkpoint: Path) -> None:
    path = checkpoint / "state.pt"
    torch.save(torch.load(path, weights_only=True) | {"batches": {}}, path)
    refused(checkpoint, str(checkpoint), "cannot resume .*: 'i'")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": None}, "config must hold the settings of the run; got None"),
        ({"config": {"k": "many"}}, "k must be of type int; got 'many'"),
        ({"step": "ten"}, "step must be an integer of at least 0; got 'ten'"),
        ({"layers": 2}, "layers must be a list of layer numbers; got 2"),
        ({"layers": []}, r"layers must be a list of layer numbers; got \[\]"),
    ],
)
def test_a_damaged_header_is_one_clear_error(checkpoint: Path, change: dict[str, Any], message: str) -> None:
    path = checkpoint / "training.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    refused(checkpoint, str(path), message)
    path.write_text('{"format_version": 1}')
    refused(checkpoint, str(path), "step must be an integer")


def test_an_sae_of_another_run_is_refused(checkpoint: Path) -> None:
    folder = checkpoint / "layer_02"
    TopKSAE.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    refused(checkpoint, str(folder), "must be .*float32.* in this run; got .*bfloat16")
