"""SAETrainer and its files: it learns, resumes bit for bit after a kill, does not grow, stops cleanly."""

from __future__ import annotations

import gc
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

import refusal_kernels as rk
from refusal_kernels.python_api import checkpoint
from refusal_kernels.python_api.checkpoint import CheckpointFolder, atomic_file, write_json
from refusal_kernels.python_api.plots import plot_training
from refusal_kernels.python_api.sae import TopKSAE
from refusal_kernels.python_api.train_log import LOG_FILE, read_train_log
from refusal_kernels.python_api.trainer import (
    DataEnded,
    SAETrainer,
    TrainConfig,
    TrainingDiverged,
    TrainingInterrupted,
)

D, BATCH = 16, 256


class Superposition:
    """Sparse sums of 48 directions in 16 dimensions, which a TopK SAE can find; two layers of different scale."""

    def __init__(self, n_batches: int | None = None, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        directions = torch.randn(48, D, generator=torch.Generator().manual_seed(99))
        self.directions = directions / directions.norm(dim=1, keepdim=True)
        self.left = n_batches

    def __iter__(self) -> Iterator[dict[int, torch.Tensor]]:
        while self.left is None or self.left > 0:
            if self.left is not None:
                self.left -= 1
            codes = torch.rand(BATCH, 48, generator=self.generator)
            codes *= torch.rand(BATCH, 48, generator=self.generator) < 0.04
            x = codes @ self.directions
            yield {0: 4 * x + 1, 2: 0.01 * x}

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state(), "left": self.left}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])
        self.left = state["left"]


def settings(out: Path, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "layers": [0, 2],
        "out": str(out),
        "k": 3,
        "expansion": 4,
        "tokens": 100 * BATCH,
        "batch_tokens": BATCH,
        "lr": 5e-3,
        "dead_after_tokens": 4 * BATCH,
        "checkpoint_every": 20,
        "log_every": 10,
    }
    return TrainConfig(**values | changes)


def train(config: TrainConfig, source: Superposition | None = None, **options: Any) -> SAETrainer:
    trainer = SAETrainer(config, source or Superposition(), progress=False, **options)
    trainer.train()
    return trainer


def weights(trainer: SAETrainer) -> dict[str, torch.Tensor]:
    return {
        f"{layer}.{name}": tensor.clone()
        for layer, sae in trainer.saes.items()
        for name, tensor in sae.state_dict().items()
    }


def assert_same_bits(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert torch.equal(mine[name], theirs[name]), name


def test_it_learns_and_leaves_what_it_promises(tmp_path: Path) -> None:
    lines = []
    trainer = train(settings(tmp_path, tokens=300 * BATCH), tracker_log=lambda line, step: lines.append((step, line)))
    assert rk.last_backend("sae_step") in ("cpu", "reference")
    held_out = next(iter(Superposition(seed=7)))
    for layer, sae in trainer.saes.items():
        x = held_out[layer]
        fvu = (sae(x) - x).square().sum() / (x - x.mean(0)).square().sum()
        assert fvu < 0.2, (layer, fvu)  # 0.02 to 0.1 measured; an untrained one is above 0.5
        untrained = TopKSAE(sae.config).init_from_data(x)
        assert (untrained(x) - x).square().sum() / (x - x.mean(0)).square().sum() > 0.4
        # The decoder's constraint holds after every fused step.
        assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(sae.config.n_latents), atol=1e-5)
        assert sae.config.metadata["training_tokens"] == 300 * BATCH
    log = read_train_log(tmp_path / LOG_FILE)
    assert [line["step"] for line in log] == list(range(10, 301, 10))
    assert [step for step, _ in lines] == [line["step"] for line in log]
    for layer in (0, 2):
        last = {name: log[-1][f"layer_{layer}/{name}"] for name in ("loss", "fvu", "l0", "dead_fraction")}
        assert last["fvu"] < 0.5 * log[0][f"layer_{layer}/fvu"]
        assert 0 < last["l0"] <= 3
        assert 0 <= last["dead_fraction"] < 1
        assert log[-1][f"layer_{layer}/explained_variance"] == pytest.approx(1 - last["fvu"])
    assert log[-1]["tokens_per_second"] > 0
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["latest", "step_00000280", "step_00000300"]
    for path in plot_training(log, tmp_path):
        assert path.stat().st_size > 5_000
    assert (tmp_path / "training.svg").read_text().count("<path") > 20


def test_auxk_trains_the_dead(tmp_path: Path) -> None:
    """Latents held down by their bias never fire and get no gradient, unless AuxK gives them the residual to learn."""

    def dead_at_end(alpha: float) -> float:
        out = tmp_path / str(alpha)
        trainer = SAETrainer(settings(out, aux_alpha=alpha, layers=[0]), Superposition(), progress=False)
        trainer._initialise(iter(Superposition()))
        with torch.no_grad():
            trainer.saes[0].b_enc[::2] = -1.5
        trainer.train()
        assert max(line["layer_0/dead_fraction"] for line in read_train_log(out / LOG_FILE)) > 0.3
        return trainer.dead_fraction(0)

    without, with_auxk = dead_at_end(0.0), dead_at_end(1.0)
    assert with_auxk < 0.7 * without, (with_auxk, without)  # 0.11 against 0.27 measured


def test_learning_rate_and_step_count() -> None:
    config = TrainConfig(tokens=1001, batch_tokens=10, warmup_fraction=0.1, decay_fraction=0.2)
    assert config.total_steps == 101
    factors = [config.lr_factor(step) for step in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9:81] == [1.0] * 72
    assert all(b < a for a, b in itertools.pairwise(factors[81:]))
    assert factors[-1] == pytest.approx(1 / 20)
    assert config.peak_lr(16384) == pytest.approx(2e-4)
    assert config.peak_lr(65536) == pytest.approx(1e-4)


def test_clipping_reaches_the_optimiser(tmp_path: Path) -> None:
    def moments(norm: float | None) -> float:
        config = settings(tmp_path / str(norm), tokens=3 * BATCH, max_grad_norm=norm, layers=[0], aux_alpha=0.0)
        trainer = train(config)
        return math.sqrt(sum(float(s["exp_avg"].square().sum()) for s in trainer.optimizers[0].state.values()))

    assert moments(None) > 0.05  # 0.4 measured
    assert moments(1e-3) < 1e-3  # an average of gradients of at most that norm


def test_moments_in_bf16_reach_the_optimiser_and_its_checkpoint(tmp_path: Path) -> None:
    config = settings(tmp_path, tokens=4 * BATCH, moments="bfloat16", checkpoint_every=2, layers=[0])
    whole = train(config)
    state = whole.optimizers[0].state[whole.saes[0].W_dec]
    assert {state[name].dtype for name in ("exp_avg", "exp_avg_sq")} == {torch.bfloat16}
    folder = CheckpointFolder(tmp_path / "checkpoints").latest()
    assert folder is not None
    resumed = SAETrainer(config, Superposition(), progress=False).load_checkpoint(folder)
    again = resumed.optimizers[0].state[resumed.saes[0].W_dec]
    assert torch.equal(state["exp_avg_sq"], again["exp_avg_sq"])
    with pytest.raises(ValueError, match=r"moments is 'float32' \(the run has 'bfloat16'\)"):
        SAETrainer(settings(tmp_path, tokens=4 * BATCH, layers=[0]), Superposition()).load_checkpoint(folder)
    with pytest.raises(ValueError, match="moments must be one of float32, bfloat16; got 'int8'"):
        settings(tmp_path, moments="int8")


def test_bf16_activations_train_fp32_weights(tmp_path: Path) -> None:
    class Rounded(Superposition):
        def __iter__(self) -> Iterator[dict[int, torch.Tensor]]:
            for batch in super().__iter__():
                yield {layer: x.bfloat16() for layer, x in batch.items()}

    trainer = train(settings(tmp_path, dtype="bfloat16"), Rounded())
    for layer, sae in trainer.saes.items():
        assert all(p.dtype == torch.float32 for p in sae.parameters())
        state = trainer.optimizers[layer].state[sae.W_enc]
        assert state["exp_avg"].dtype == torch.float32
    log = read_train_log(tmp_path / LOG_FILE)
    assert log[-1]["layer_0/fvu"] < 0.5 * log[0]["layer_0/fvu"]


# -- resuming ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def uninterrupted(tmp_path: Path, one_thread: None) -> SAETrainer:
    return train(settings(tmp_path / "whole"))


def resumed(out: Path, **changes: Any) -> SAETrainer:
    latest = CheckpointFolder(out / "checkpoints").latest()
    assert latest is not None
    trainer = SAETrainer(settings(out, **changes), Superposition(), progress=False).load_checkpoint(latest)
    trainer.train()
    return trainer


class At(Superposition):
    """Does something before it hands out batch 75; the steps are in time with the source from batch 64 on."""

    def __init__(self, action: Callable[[], None]) -> None:
        super().__init__()
        self.action = action

    def __iter__(self) -> Iterator[dict[int, torch.Tensor]]:
        for i, batch in enumerate(super().__iter__()):
            if i == 75:
                self.action()
            yield batch


def test_resume_after_a_crash_ends_in_the_same_bits(tmp_path: Path, uninterrupted: SAETrainer) -> None:
    """Weights, optimiser and log; a real kill -9 through model and buffer is in test_cli.py."""
    out = tmp_path / "crashed"

    def crash() -> None:
        raise OSError("pulled the plug")

    with pytest.raises(OSError, match="pulled the plug"):
        train(settings(out), At(crash))
    latest = CheckpointFolder(out / "checkpoints").latest()
    assert latest is not None
    assert latest.name == "step_00000060"
    # What a kill in the middle of a save leaves behind is swept and never read.
    (out / "checkpoints" / ".tmp-step_00000099-1-abc").mkdir()
    trainer = resumed(out)
    assert trainer.step == 100
    assert_same_bits(weights(trainer), weights(uninterrupted))
    for layer, optimizer in trainer.optimizers.items():
        other = uninterrupted.optimizers[layer].state_dict()["state"]
        for i, state in optimizer.state_dict()["state"].items():
            assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(other[i][n])) for n, v in state.items())
    assert not list((out / "checkpoints").glob(".tmp-*"))
    # The log has every line once, and the same figures.
    mine, theirs = (read_train_log(folder / LOG_FILE) for folder in (out, tmp_path / "whole"))
    timeless = [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in mine]
    assert timeless == [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in theirs]


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_checkpoint_that_continues(
    tmp_path: Path, uninterrupted: SAETrainer, which: signal.Signals
) -> None:
    out = tmp_path / "stopped"
    before = signal.getsignal(which)
    with pytest.raises(TrainingInterrupted, match="interrupted after step 76 of 100") as stop:
        train(settings(out), At(lambda: os.kill(os.getpid(), which)))
    assert stop.value.checkpoint == out / "checkpoints" / "step_00000076"
    assert signal.getsignal(which) is before
    assert_same_bits(weights(resumed(out)), weights(uninterrupted))


def test_settings_that_do_not_touch_the_arithmetic_may_change(tmp_path: Path, uninterrupted: SAETrainer) -> None:
    out = tmp_path / "stopped"
    config = settings(out)
    source = Superposition()
    trainer = SAETrainer(config, source, progress=False)

    def stop(line: dict[str, float], step: int) -> None:
        if step == 50:
            raise KeyboardInterrupt

    trainer.tracker_log = stop
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert_same_bits(weights(resumed(out, checkpoint_every=7, log_every=3)), weights(uninterrupted))


def test_resume_with_other_settings_names_them_all(tmp_path: Path) -> None:
    trainer = train(settings(tmp_path, tokens=20 * BATCH))
    latest = trainer.checkpoints.latest()
    assert latest is not None
    other = settings(tmp_path, tokens=40 * BATCH, k=5, lr=1e-4, seed=1)
    with pytest.raises(ValueError, match="cannot resume") as error:
        SAETrainer(other, Superposition(), progress=False).load_checkpoint(latest)
    message = str(error.value)
    assert "k is 5 (the run has 3)" in message
    assert "lr is 0.0001 (the run has 0.005)" in message
    assert f"tokens is {40 * BATCH} (the run has {20 * BATCH})" in message
    assert "seed is 1" in message
    assert "batch_tokens" not in message
    assert "\n" not in message


def test_a_checkpoint_opens_as_plain_files(tmp_path: Path) -> None:
    trainer = train(settings(tmp_path, tokens=20 * BATCH))
    latest = trainer.checkpoints.latest()
    assert latest is not None
    for layer, sae in trainer.saes.items():
        stored = load_file(latest / f"layer_{layer:02d}" / "sae.safetensors")
        assert_same_bits(stored, sae.state_dict())
        assert TopKSAE.from_pretrained(latest / f"layer_{layer:02d}").config.layer == layer
    torch.load(latest / "state.pt", weights_only=True)  # nothing in it that could run code
    write_json(latest / "training.json", {"format_version": 9})
    with pytest.raises(ValueError, match="format_version must be 1; got 9"):
        SAETrainer(settings(tmp_path, tokens=20 * BATCH), Superposition()).load_checkpoint(latest)


# -- trouble ----------------------------------------------------------------------------------------------------------


def test_no_growth_over_500_steps(tmp_path: Path) -> None:
    process = psutil.Process()
    resident = []
    config = settings(tmp_path, tokens=700 * BATCH, checkpoint_every=50, log_every=50, expansion=8)
    threshold = 200

    def note(line: dict[str, float], step: int) -> None:
        if step >= threshold:
            gc.collect()
            resident.append(process.memory_info().rss)

    train(config, tracker_log=note)
    assert len(resident) == 11
    # 500 steps that kept only their batches would hold 500 x 2 x 16 KiB = 16 MiB more.
    assert max(resident[-3:]) - resident[0] < 6 * 2**20, [round(r / 2**20, 1) for r in resident]


def test_data_that_ends_and_data_that_is_empty(tmp_path: Path) -> None:
    with pytest.raises(DataEnded, match=r"ended after 17,920 of 25,600 tokens"):
        train(settings(tmp_path), Superposition(n_batches=70))
    with pytest.raises(ValueError, match="no activations at all"):
        train(settings(tmp_path), Superposition(n_batches=0))


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    class Poisoned(Superposition):
        def __iter__(self) -> Iterator[dict[int, torch.Tensor]]:
            for i, batch in enumerate(super().__iter__()):
                if i == 80:
                    batch[2][0, 0] = float("nan")
                yield batch

    with pytest.raises(TrainingDiverged, match="the loss of layer 2 is nan at step"):
        train(settings(tmp_path), Poisoned())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 0}, "k must be at least 1; got 0"),
        ({"tokens": 0}, "tokens must be at least 1"),
        ({"lr": -1.0}, "lr must be positive"),
        ({"warmup_fraction": 0.9}, "warm-up"),
        ({"dtype": "float16"}, "dtype must be one of float32, bfloat16; got 'float16'"),
        ({"layers": [-1]}, "layers must be layer numbers from 0"),
        ({"buffer_tokens": 300}, "buffer_tokens must be at least 2 batches = 512"),
        ({"device": "gpu"}, "device must be auto, cpu, cuda"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"seed": 2**63}, "seed must be at least 0 and below"),
        ({"betas": [0.9]}, "betas must be two numbers"),
    ],
)
def test_wrong_settings(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": "many"}, "k must be of type int; got 'many'"),
        ({"k": True}, "k must be of type int; got True"),
        ({"lr": "fast"}, "lr must be of type float | None; got 'fast'"),
        ({"streaming": 1}, "streaming must be of type bool; got 1"),
        ({"text_field": 3}, "text_field must be of type str; got 3"),
        ({"layers": 5}, "layers must be a list; got 5"),
    ],
)
def test_settings_of_the_wrong_type(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=re.escape(message)):
        settings(tmp_path, **changes)
    values = settings(tmp_path).to_dict()
    with pytest.raises(ValueError, match=re.escape(f"training.json: {message}")):
        TrainConfig.from_dict(values | changes, "training.json")


def test_a_gpu_that_this_machine_does_not_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert settings(tmp_path, device="cuda:1").resolved_device() == torch.device("cuda:1")
    with pytest.raises(ValueError, match="device 'cuda:2' was asked for; this PyTorch sees 2 GPUs"):
        settings(tmp_path, device="cuda:2").resolved_device()


# -- files ------------------------------------------------------------------------------------------------------------


def test_checkpoints_are_complete_or_absent(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "c", keep=2)
    assert folder.latest() is None

    def write(path: Path) -> None:
        (path / "a").write_text(path.name)

    def fail(path: Path) -> None:
        (path / "a").write_text("half")
        raise RuntimeError("disk full")

    for step in (1, 2, 3):
        folder.save(step, write)
    assert folder.steps() == [2, 3]
    with pytest.raises(RuntimeError, match="disk full"):
        folder.save(4, fail)
    assert folder.steps() == [2, 3]
    assert folder.latest() == folder.path(3)
    assert sorted(p.name for p in folder.root.iterdir()) == ["latest", "step_00000002", "step_00000003"]
    (folder.root / "latest").unlink()
    assert folder.latest() == folder.path(3)
    folder.save(3, write)  # once more: replaced, not merged
    assert (folder.path(3) / "a").read_text().startswith(".tmp-step_00000003")


def test_atomic_file_keeps_the_old_content_on_failure(tmp_path: Path) -> None:
    target = tmp_path / "x.json"
    write_json(target, {"a": float("nan"), "b": [1, float("inf")]})
    assert json.loads(target.read_text()) == {"a": None, "b": [1, None]}

    def fail() -> None:
        with atomic_file(target) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert json.loads(target.read_text())["b"] == [1, None]
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_kill_9_at_any_moment_of_saving_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """A process that does nothing but save is killed five times; every folder under its final name is whole."""
    module = Path(checkpoint.__file__).resolve()
    script = textwrap.dedent(f"""
        import importlib.util, sys
        spec = importlib.util.spec_from_file_location("checkpoint", {str(module)!r})  # alone: no seconds spent on torch
        checkpoint = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(checkpoint)
        folder = checkpoint.CheckpointFolder({str(tmp_path)!r}, keep=1)
        def write(path):
            for i in range(20):
                (path / f"f{{i}}").write_bytes(b"x" * 20_000)
        step = max(folder.steps(), default=0)
        while True:
            step += 1
            folder.save(step, write)
            print(step, flush=True)
    """)
    for attempt in range(5):
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.003 * attempt)
        process.kill()
        process.wait()
        process.stdout.close()
        folder = CheckpointFolder(tmp_path)
        assert folder.latest() is not None
        for step in folder.steps():
            assert [(folder.path(step) / f"f{i}").stat().st_size for i in range(20)] == [20_000] * 20
