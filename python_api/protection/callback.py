"""The Trainer's side of a protection: hooks the optimizer, folds before saves, logs leak and drift."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .audit import audit

if TYPE_CHECKING:
    from ..prompts.chat import Chat
    from .protect import Protection


class ProtectionCallback(TrainerCallback):
    """See :meth:`Protection.callback`.

    The values are added to the Trainer's log history and to what its progress bar prints. The integrations
    (TensorBoard, wandb, ...) run before callbacks that a user passes; put first by
    `trainer.callback_handler.callbacks.insert(0, callback)`, instead of `callbacks=[callback]`, it reaches them too.
    """

    def __init__(self, protection: Protection, chat: Chat | None, prompts: Sequence[str] | None) -> None:
        if (chat is None) != (prompts is None):
            raise ValueError("callback: chat and prompts belong together; got one of them")
        self.protection, self._chat, self._prompts = protection, chat, prompts

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any = None, **_: Any
    ) -> None:
        self.protection.attach(optimizer)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # On every rank, before the save: an uninterrupted run then goes on from what a resumed one loads. An evaluation
        # may turn out the best so far and be saved without another call.
        if control.should_save or control.should_evaluate:
            self._fold()

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if control.should_save or control.should_evaluate:
            self._fold()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._fold()
        self.protection.detach()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if logs is None or "loss" not in logs or not state.is_world_process_zero:
            return
        values = audit(self.protection, chat=self._chat, prompts=self._prompts).logs()
        logs.update(values)
        state.log_history[-1].update(values)

    def _fold(self) -> None:
        if self.protection.mode == "forward" and self.protection.strength == 1:
            self.protection.fold_()
