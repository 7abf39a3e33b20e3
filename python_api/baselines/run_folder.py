"""The folder of a fine-tuning run: what is in it, whether it fits a wish to start or resume, and how it is filled.

Layout of a run's folder:

    adapter_config.json, adapter_model.safetensors     opens with PEFT alone (full fine-tuning: config.json and
                                                       model.safetensors, which transformers opens)
    tokenizer files
    finetune.json            settings, hashes of the data, versions
    metrics.json             loss, time, memory, leak, what SafeLoRA projected
    train_log.jsonl          one line per `log_every` steps
    salora.safetensors       SaLoRA's projectors and starting values, for resuming
    checkpoints/             Trainer's, which `resume` continues from
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import refusal_kernels as rk

from ..checkpoint import read_json, write_json
from ..prompts.records import HarmfulPrompt, set_hash
from ..train_log import LOG_FILE
from .config import FREE_ON_RESUME, FinetuneConfig
from .data import TrainingSet
from .salora import ModuleStart, save_starts

RUN_FILE, METRICS_FILE, STARTS_FILE = "finetune.json", "metrics.json", "salora.safetensors"
CHECKPOINTS = "checkpoints"


def run_record(
    config: FinetuneConfig,
    model: Any,
    data: TrainingSet,
    basis: Any,
    base_model: Any,
    calibration: Sequence[HarmfulPrompt],
) -> dict[str, Any]:
    """finetune.json: what the run is made of."""
    return {
        "config": config.to_dict(),
        "model": getattr(model, "name_or_path", ""),
        "data": {
            "hash": set_hash(data.dialogues),
            "dialogues": len(data),
            "poisoned": data.poisoned,
            "left_out": data.left_out,
            "calibration": set_hash(calibration) if calibration else None,
            "basis": None if basis is None else _basis_hash(basis),
            "base_model": None if base_model is None else getattr(base_model, "name_or_path", ""),
        },
        "basis": None if basis is None else basis.provenance,
        "versions": {"python": platform.python_version(), "refusal_kernels": rk.__version__}
        | {name: version(name) for name in ("torch", "transformers", "peft")},
    }


def _basis_hash(basis: Any) -> str:
    digest = hashlib.blake2b(digest_size=6)
    for name, u in sorted({**basis.z, **basis.inputs}.items(), key=lambda item: str(item[0])):
        digest.update(f"{name}{tuple(u.shape)}".encode())
        digest.update(u.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def check_folder(folder: Path | None, record: dict[str, Any], resume: bool, overwrite: bool) -> Path | None:
    """The checkpoint to continue from, or None for a fresh run; ValueError where the folder does not fit the wish."""
    if not resume:
        if folder is not None and folder.is_dir() and any(folder.iterdir()):
            if not (folder / RUN_FILE).exists():  # it may be a model's own folder: nothing in it is ours to delete
                raise ValueError(f"out: expected a new or empty folder or an earlier run, {folder} holds other files")
            if not overwrite:
                raise ValueError(f"out: {folder} holds an earlier run; resume it, name another folder, or overwrite it")
            if record["model"] and Path(record["model"]).resolve() == folder.resolve():
                raise ValueError(
                    f"out: expected another folder than that of the model that is fine-tuned, got {folder}"
                )
        return None
    checkpoint = None if folder is None else latest_checkpoint(folder)
    if folder is None or checkpoint is None:
        raise ValueError(f"resume: expected a folder with an interrupted run, found no checkpoint in {folder}")
    before = read_json(folder / RUN_FILE)
    differing = [name for name in ("model", "data") if before.get(name) != record[name]]
    saved = before.get("config")
    if not isinstance(saved, dict):
        raise ValueError(f"{folder / RUN_FILE}: expected the settings of a run, got {saved!r}")
    differing += [
        f"{name} (was {saved.get(name)!r})"
        for name, value in record["config"].items()
        if name not in FREE_ON_RESUME and saved.get(name) != value
    ]
    if differing:
        raise ValueError(f"resume: expected the settings and data of {folder}; these differ: {', '.join(differing)}")
    return checkpoint


def latest_checkpoint(folder: Path) -> Path | None:
    """Trainer's newest complete checkpoint of a run. It writes the state last: without it, it was killed writing."""
    found = [path for path in (folder / CHECKPOINTS).glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def begin(folder: Path, record: dict[str, Any], starts: dict[str, ModuleStart] | None) -> None:
    """Clears the files of an earlier run, now that nothing is left that could be refused."""
    for pattern in (METRICS_FILE, LOG_FILE, STARTS_FILE, "adapter_*", "model*.safetensors*"):
        for path in folder.glob(pattern):
            path.unlink()
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    write_json(folder / RUN_FILE, record)
    if starts is not None:
        save_starts(folder / STARTS_FILE, starts)


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Written aside and moved, the configuration last: a folder that can be opened is complete."""
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        for path in sorted(Path(temporary).iterdir(), key=lambda path: path.name.endswith("config.json")):
            os.replace(path, folder / path.name)
