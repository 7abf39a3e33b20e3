"""One fine-tuning run, whatever the method: transformers' Trainer with loss on the answers only."""

from __future__ import annotations

import math
import os
import random
import shutil
import tempfile
import time
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint import write_json
from ..interrupt import Interruptible
from ..models import load_model
from ..prompts.chat import Chat
from ..prompts.readers import greedy_refusals
from ..prompts.records import Dialogue, HarmfulPrompt
from ..runs import peak_memory_bytes
from ..trainer import TrainingInterrupted
from .config import PROJECTIONS, FinetuneConfig
from .data import AnswerCollator, TrainingSet, training_set
from .run_folder import CHECKPOINTS, METRICS_FILE, STARTS_FILE, begin, check_folder, latest_checkpoint, run_record, save
from .safelora import apply_safelora, check_unaligned
from .salora import ModuleStart, SaLoRA, find_starts, load_starts


@dataclass
class FinetuneResult:
    """What a run leaves.

    Attributes:
        model: fine-tuned, in eval mode; a PeftModel with one ordinary adapter, or, of "sft", the model itself.
        folder: where it was saved, or None.
        log: one line per `log_every` steps: step, loss, learning_rate, grad_norm, epoch, and refusal_leak with a basis.
        metrics: what metrics.json holds.
        protection: with a basis, what `protection.protect` returned, removed from the model; else None.
    """

    model: Any
    tokenizer: Any
    config: FinetuneConfig
    folder: Path | None
    log: list[dict[str, float]]
    metrics: dict[str, Any]
    protection: Any = None

    @property
    def seconds(self) -> float:
        return float(self.metrics["seconds"])

    @property
    def peak_memory_bytes(self) -> int:
        return int(self.metrics["peak_memory_bytes"])


def finetune(
    model: nn.Module | str,
    tokenizer: Any,
    train: Sequence[Dialogue],
    config: FinetuneConfig | None = None,
    *,
    poison: Sequence[Dialogue] = (),
    basis: Any = None,
    base_model: nn.Module | str | None = None,
    calibration: Sequence[HarmfulPrompt] = (),
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    preflight: bool = True,
    progress: bool = True,
    callbacks: Sequence[Any] = (),
    **settings: Any,
) -> FinetuneResult:
    """Fine-tunes a chat model on dialogues.

    Args:
        model: of transformers, or a name for `load_model`. It is changed in place: load it again for another run.
        tokenizer: its tokenizer; None loads the one of a name.
        train: what is to be learned; the loss is the mean over the answers' tokens.
        config, settings: a FinetuneConfig, and fields of it that replace its values.
        poison: dialogues of which `poison_fraction` of the final data is drawn.
        basis: RefusalBasis that the modes "gradient", "update", "weight" and "forward" keep the adapter off; with
            "lora" its leak is measured and nothing is projected.
        base_model: the unaligned model of SafeLoRA, or its name.
        calibration: harmful prompts; SaLoRA takes the model's own refusals of them.
        out: folder to save to; None saves nothing.
        resume: continue from the latest checkpoint in `out`; on the same machine it ends in the same weights.
        overwrite: throw an earlier run in `out` away.
        preflight: with a basis, check first whether it can protect (`protection.protect`).
        callbacks: further TrainerCallbacks.

    Raises:
        ValueError: what the method needs is missing or what it does not use is given, targets that the model does not
            have, other settings or data on resuming, a folder that holds another run.
        TrainingInterrupted: Ctrl-C or SIGTERM; with `out`, after a checkpoint.
        TrainingDiverged: a loss that is no number.
    """
    from transformers import set_seed

    config = replace(config or FinetuneConfig(), **settings)
    if isinstance(base_model, str):
        base_model = load_model(base_model, device="cpu")[0]
    _check_materials(config, basis, base_model, calibration)
    model, tokenizer = _loaded(model, tokenizer)
    chat, folder = Chat(tokenizer), None if out is None else Path(out)
    data = training_set(
        chat, train, poison, poison_fraction=config.poison_fraction, max_length=config.max_length, seed=config.seed
    )
    record = run_record(config, model, data, basis, base_model, calibration)
    checkpoint = check_folder(folder, record, resume, overwrite)
    set_seed(config.seed)  # before the adapter is made: A's initial values are part of the run
    starts = (
        None if checkpoint is None or config.method != "salora" else load_starts(checkpoint.parents[1] / STARTS_FILE)
    )
    trained, salora, protection = _prepare(config, model, chat, data, basis, calibration, starts, preflight, progress)
    if base_model is not None:
        check_unaligned(trained, base_model)
    if folder is not None and checkpoint is None:
        begin(folder, record, None if salora is None else salora.starts)
    lines, metrics = _train(config, trained, chat, data, protection, folder, checkpoint, progress, callbacks)
    if salora is not None:
        trained = salora.deploy()
    if protection is not None:
        metrics["refusal_leak"] = protection.leak()
        protection.remove()
    if base_model is not None:
        metrics["safelora"] = _safelora(config, trained, base_model)
    trained.eval().requires_grad_(False)
    if folder is not None:
        save(trained, tokenizer, folder)
        write_json(folder / METRICS_FILE, metrics)
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    return FinetuneResult(trained, tokenizer, config, folder, lines, metrics, protection)


def _check_materials(config: FinetuneConfig, basis: Any, base_model: Any, calibration: Sequence[HarmfulPrompt]) -> None:
    """What only some methods use is there exactly when the method uses it."""
    for name, given, needed, welcome in (
        ("basis", basis is not None, PROJECTIONS, (*PROJECTIONS, "lora")),
        ("base_model", base_model is not None, ("safelora",), ("safelora",)),
        ("calibration", bool(calibration), ("salora",), ("salora",)),
    ):
        if given and config.method not in welcome:
            raise ValueError(f"{name}: expected none with method {config.method!r}; it serves {', '.join(welcome)}")
        if not given and config.method in needed:
            raise ValueError(f"{name}: expected one, for method {config.method!r} needs it; got none")
    if config.sites is not None and basis is None:
        raise ValueError(f"sites: expected None without a basis, got {config.sites}")


def _loaded(model: nn.Module | str, tokenizer: Any) -> tuple[Any, Any]:
    from peft import PeftModel

    if isinstance(model, str):
        model, own = load_model(model)
        tokenizer = own if tokenizer is None else tokenizer
    if tokenizer is None:
        raise ValueError("tokenizer: expected that of the model, got None")
    if isinstance(model, PeftModel):
        raise ValueError("model: expected one without adapters, got a PeftModel; merge its adapter first")
    return model, tokenizer


def _prepare(
    config: FinetuneConfig,
    model: Any,
    chat: Chat,
    data: TrainingSet,
    basis: Any,
    calibration: Sequence[HarmfulPrompt],
    starts: dict[str, ModuleStart] | None,
    preflight: bool,
    progress: bool,
) -> tuple[Any, SaLoRA | None, Any]:
    """(the model with what is to be trained, SaLoRA, the protection)."""
    if not config.uses_adapter:
        return model.requires_grad_(True), None, None
    adapted = add_lora(model, config)
    if config.method == "salora":
        starts = starts or _salora_starts(config, adapted, chat, data, calibration, progress)
        return adapted, SaLoRA(adapted, starts), None
    return adapted, None, None if basis is None else _protect(config, adapted, chat, basis, preflight)


def _protect(config: FinetuneConfig, adapted: Any, chat: Chat, basis: Any, preflight: bool) -> Any:
    from ..protection.protect import ProtectionWarning, protect

    mode: Any = config.method
    sites: dict[str, Any] = {} if config.sites is None else {"sites": config.sites}
    if config.method not in PROJECTIONS:
        # Strength 0 holds nothing and measures what a protection would hold; its warnings are about protecting.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ProtectionWarning)
            return protect(adapted, basis, mode="update", strength=0.0, project_start=False, preflight=False, **sites)
    return protect(
        adapted,
        basis,
        mode=mode,
        strength=config.strength,
        preflight=preflight,
        tokenizer=chat.tokenizer,
        **sites,
    )


def add_lora(model: Any, config: FinetuneConfig) -> Any:
    """The model with a fresh adapter. ValueError where no module ends in one of the targets."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=config.lora_targets,
        bias="none",
        task_type="CAUSAL_LM",
    )
    if config.lora_targets != "all-linear":
        ends = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        if missing := sorted(set(config.lora_targets) - ends):
            raise ValueError(
                f"targets: expected linear layers of the model ({', '.join(sorted(ends))}), got {', '.join(missing)}"
            )
    return get_peft_model(model, lora)


def _salora_starts(
    config: FinetuneConfig,
    adapted: Any,
    chat: Chat,
    data: TrainingSet,
    calibration: Sequence[HarmfulPrompt],
    progress: bool,
) -> dict[str, ModuleStart]:
    harmful = calibration[: config.salora_samples]
    refused = greedy_refusals(adapted, chat, harmful, progress="the model's own refusals" if progress else None)
    tasks = random.Random(f"salora/{config.seed}").sample(
        data.dialogues, min(config.salora_samples, len(data.dialogues))
    )
    return find_starts(
        adapted,
        chat,
        [(prompt.prompt, text) for prompt, text in refused],
        [(dialogue.prompt, dialogue.answer) for dialogue in tasks],
        r=config.r,
        safety_rank=config.salora_safety_rank,
        task_rank=config.salora_task_rank,
    )


def _train(
    config: FinetuneConfig,
    model: Any,
    chat: Chat,
    data: TrainingSet,
    protection: Any,
    folder: Path | None,
    checkpoint: Path | None,
    progress: bool,
    callbacks: Sequence[Any],
) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """Trains; (log lines, metrics). The checkpoints of a run without a folder go where nobody finds them again."""
    from transformers import PrinterCallback, Trainer

    from .callbacks import Log, Progress, StopOnSignal

    device = next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with ExitStack() as stack:
        place = folder / CHECKPOINTS if folder else Path(stack.enter_context(tempfile.TemporaryDirectory()))
        signals = stack.enter_context(Interruptible())
        bar, log = Progress(config.method, progress), Log(folder)
        stack.callback(bar.close)
        stack.callback(log.close)
        # The protection first: it adds its leak to the line that the others keep and show.
        own = [] if protection is None else [protection.callback()]
        own += [log, bar, StopOnSignal(signals, save=folder is not None)]
        trainer = Trainer(
            model=model,
            args=_arguments(config, len(data), place, device),
            train_dataset=data,
            data_collator=AnswerCollator(chat),
            callbacks=[*own, *callbacks],
        )
        trainer.remove_callback(PrinterCallback)
        began = time.perf_counter()
        trained = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        seconds = time.perf_counter() - began
        state = trainer.state
        if state.global_step < state.max_steps:
            saved = None if folder is None else latest_checkpoint(folder)
            if saved is None:
                raise KeyboardInterrupt
            raise TrainingInterrupted(state.global_step, state.max_steps, saved)
    on_gpu = device.type == "cuda"
    return log.lines, {
        "method": config.method,
        "steps": state.global_step,
        "loss": trained.training_loss,
        "seconds": round(seconds, 3),
        "peak_memory_bytes": torch.cuda.max_memory_allocated(device) if on_gpu else peak_memory_bytes(),
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "dialogues": len(data),
        "poisoned": data.poisoned,
    }


def _arguments(config: FinetuneConfig, dialogues: int, place: Path, device: torch.device) -> Any:
    from transformers import TrainingArguments

    steps = config.steps or math.ceil(
        config.epochs * math.ceil(math.ceil(dialogues / config.batch_size) / config.accumulate)
    )
    checkpointing: dict[str, Any] = {}
    if config.gradient_checkpointing:
        known = {field.name for field in fields(TrainingArguments)}  # renamed within transformers 5
        name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
        checkpointing = {name: True, f"{name}_kwargs": {"use_reentrant": False}}
    return TrainingArguments(
        output_dir=str(place),
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulate,
        max_steps=steps,
        learning_rate=config.lr,
        weight_decay=config.weight_decay,
        optim={"adamw": "adamw_torch", "sgd": "sgd"}[config.optimizer],
        lr_scheduler_type="linear",
        warmup_steps=round(config.warmup * steps),
        max_grad_norm=config.max_grad_norm,
        bf16=config.bf16,
        logging_steps=config.log_every,
        save_strategy="steps" if config.checkpoint_every else "no",
        save_steps=config.checkpoint_every or 1,
        save_total_limit=config.keep_checkpoints,
        seed=config.seed,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type == "cuda",
        remove_unused_columns=False,  # the data set yields token ids that only the collator makes columns of
        label_names=["labels"],
        report_to="none",
        logging_nan_inf_filter=False,  # it would report a loss that is no number as the mean of those that were
        disable_tqdm=True,
        **checkpointing,
    )


def _safelora(config: FinetuneConfig, trained: Any, base_model: Any) -> list[dict[str, Any]]:
    rows = apply_safelora(
        trained,
        base_model,
        select=config.safelora_select,
        threshold=config.safelora_threshold,
        number=config.safelora_number,
        exact=config.safelora_exact,
    )
    return [row.to_dict() for row in rows]
