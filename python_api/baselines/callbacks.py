"""What `finetune` hangs into transformers' Trainer: a progress bar, the log file, stopping on Ctrl-C, divergence."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback

from ..interrupt import Interruptible
from ..train_log import LOG_FILE, TrainLog
from ..trainer import TrainingDiverged


class Progress(TrainerCallback):
    """One bar for the run, with what was logged last."""

    def __init__(self, title: str, enabled: bool) -> None:
        self.title, self.enabled = title, enabled
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar = tqdm(
            total=state.max_steps, initial=state.global_step, desc=self.title, unit="step", disable=not self.enabled
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.update(1)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if self.bar is not None and logs and "loss" in logs:
            shown = ("loss", "refusal_leak")
            self.bar.set_postfix({name: f"{value:.3g}" for name, value in logs.items() if name in shown})

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.close()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


class Log(TrainerCallback):
    """Keeps every log line and writes it at once; a loss that is no number ends the run."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.lines: list[dict[str, float]] = []
        self._file: TrainLog | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.lines = [line for line in state.log_history if "loss" in line]
        if self.folder is not None:
            self._file = TrainLog(self.folder / LOG_FILE, state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if not logs or "loss" not in logs:
            return
        line = {"step": state.global_step, **logs}
        self.lines.append(line)
        if self._file is not None:
            self._file.write(line)
        if not math.isfinite(logs["loss"]):
            raise TrainingDiverged(f"the loss is {logs['loss']} at step {state.global_step}; try a smaller lr")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class StopOnSignal(TrainerCallback):
    """Ctrl-C and SIGTERM: the step is finished, a checkpoint written, and training stops."""

    def __init__(self, signals: Interruptible, save: bool) -> None:
        self.signals, self.save = signals, save

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.signals.requested:
            control.should_save = self.save
            control.should_training_stop = True
