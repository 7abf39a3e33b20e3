"""Running the experiment: every cell once, in worker processes, each result kept under the hash of what it depends on.

    run(ExperimentConfig(out="experiment"))     # prepare, cells, table.json, table.txt, report.html

A second run finds all cells and takes seconds. Ctrl-C loses the cells under way and no others.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..checkpoint import read_json, write_json
from ..models import load_model
from ..prompts.chat import Chat, device_of
from ..prompts.records import content_hash
from .cells import HEAD_SITES, PROTECTED, Cell
from .config import ExperimentConfig
from .prepare import Prepared, prepare, quiet_worker

if TYPE_CHECKING:
    from ..baselines.config import FinetuneConfig

# Raised when what a cell computes changes, so that results of an older version are not taken for this one's.
CELL_VERSION = 1


@dataclass
class Experiment:
    """What `run` returns: the results of all cells in order, and where the table and the report lie."""

    config: ExperimentConfig
    prepared: Prepared
    results: list[dict[str, Any]]
    table: Path
    report: Path


def cell_file(config: ExperimentConfig, prepared: Prepared, cell: Cell) -> Path:
    """Where a cell's result lies: its name is the hash of everything that the result depends on."""
    name = prepared.basis_name(cell)
    basis = "" if name is None else prepared.basis_hashes[name]
    key = content_hash(
        CELL_VERSION, config.key(), prepared.suite.hash(), prepared.basis_hashes["z/sae"], basis, cell.key()
    )
    return Path(config.out) / "cells" / f"{key}.json"


def run(config: ExperimentConfig, *, progress: bool = True, say: Callable[[str], None] = print) -> Experiment:
    """Prepares, runs the cells that are missing, writes the table and the report.

    Raises:
        ValueError: settings or data that do not fit, before anything long begins.
        RuntimeError: a cell failed; the others that had begun are finished and kept.
    """
    from .report import write_report

    torch.set_num_threads(config.threads)  # small models: more threads wait for each other and for the workers
    out = Path(config.out)
    prepared = prepare(config, progress=progress, say=say)
    todo = config.cells()
    missing = [cell for cell in todo if not cell_file(config, prepared, cell).is_file()]
    if not config.has_base_model:
        say("no row of SafeLoRA: it compares with the model from before alignment, which --base-model names")
    say(f"{len(todo)} runs, {len(todo) - len(missing)} of them known")
    for _ in _run_all(config, prepared, missing, progress):
        pass
    results = [read_json(cell_file(config, prepared, cell)) for cell in todo]
    table, report = write_report(config, prepared, results, out)
    return Experiment(config, prepared, results, table, report)


def _run_all(config: ExperimentConfig, prepared: Prepared, cells: Sequence[Cell], progress: bool) -> Iterator[Cell]:
    from tqdm.auto import tqdm

    from ..models import resolve_device

    workers = 1 if resolve_device(config.device).type == "cuda" else min(config.workers, len(cells))
    bar = tqdm(total=len(cells), desc="fine-tuning runs", unit="run", disable=not progress)
    try:
        if workers <= 1:
            for cell in cells:
                _run_and_keep(config, prepared, cell)
                bar.update()
                yield cell
            return
        with ProcessPoolExecutor(
            workers, mp_context=get_context("spawn"), initializer=quiet_worker, initargs=(config.threads,)
        ) as pool:
            futures: dict[Future[None], Cell] = {
                pool.submit(_run_and_keep, config, prepared, cell): cell for cell in cells
            }
            try:
                for future in as_completed(futures):
                    future.result()
                    bar.update()
                    yield futures[future]
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
    finally:
        bar.close()


def _run_and_keep(config: ExperimentConfig, prepared: Prepared, cell: Cell) -> None:
    torch.set_num_threads(config.threads)
    target = cell_file(config, prepared, cell)
    work = Path(config.out) / "work" / f"{target.stem}-{os.getpid()}"
    result = run_cell(config, prepared, cell, work)
    write_json(target, result)


def run_cell(config: ExperimentConfig, prepared: Prepared, cell: Cell, work: Path) -> dict[str, Any]:
    """Fine-tunes and measures one cell. `work` is a folder for the run's files; it is removed afterwards.

    Returns label, data, seed, cell, the counts of `measure`, leak and drift of the adapter (on the cell's own basis, or
    for unprotected ones on the SAE's), explain, seconds of training, memory in bytes, log lines (step, loss, leak).
    """
    from ..baselines.finetune import finetune
    from ..features.basis import RefusalBasis
    from ..protection.audit import audit
    from .explain import explain
    from .measure import PeakMemory, measure

    load = partial(
        load_model, config.model, dtype=config.dtype, device=config.device, trust_remote_code=config.trust_remote_code
    )
    net, tokenizer = load()
    chat, suite = Chat(tokenizer), prepared.suite
    out: dict[str, Any] = {"label": cell.label, "data": cell.data, "seed": cell.seed, "cell": cell.key()}
    if cell.method == "none":
        return out | measure(net, chat, suite)
    basis = prepared.basis(cell)
    untouched, _ = load()
    z_basis = RefusalBasis.load(prepared.bases["z/sae"])
    try:
        with PeakMemory(device_of(net)) as peak:
            result = finetune(
                net,
                tokenizer,
                suite.task,
                settings(config, cell),
                basis=z_basis if cell.method == "lora" else basis,  # plain LoRA's leak is logged, nothing is held
                poison=suite.poison if cell.data == "poisoned" else (),
                base_model=prepared.base_model if cell.method == "safelora" else None,
                calibration=suite.harmful if cell.method == "salora" else (),
                out=work,
                overwrite=True,
                preflight=False,  # made once for every basis, see prepare
                progress=False,
            )
        tuned = result.model.eval()
        out |= measure(tuned, chat, suite)
        out |= {"seconds": result.seconds, "memory": peak.bytes, "log": _curve(result.log)}
        out["explain"] = explain(tuned, untouched, chat, suite, z_basis, seed=cell.seed)
        # SaLoRA and a full fine-tune change the base weights as well: measured against the untouched model.
        reference = untouched if cell.method in ("sft", "salora") else None
        sites = cell.sites if cell.method in PROTECTED else HEAD_SITES
        out["leak"] = audit(tuned, basis or z_basis, sites=sites, reference=reference).leak
        drift = audit(
            tuned, z_basis, sites=("o_proj",), chat=chat, prompts=suite.harmful_test[:64], reference=untouched
        )
        out["drift"] = drift.drift
        return out
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _curve(log: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    """Step, loss and leak of a run's log lines."""
    names = {"step": "step", "loss": "loss", "refusal_leak": "leak"}
    return [{new: line[old] for old, new in names.items() if old in line} for line in log]


def settings(config: ExperimentConfig, cell: Cell) -> FinetuneConfig:
    """The fine-tuning run of a cell."""
    from ..baselines.config import FinetuneConfig

    sft = cell.method == "sft"
    targets = tuple(name.strip() for name in config.targets.split(","))
    return FinetuneConfig(
        method=cell.method,
        targets=None if sft else targets,
        r=config.r,
        alpha=config.alpha,
        lr=config.sft_lr if sft else config.lr,
        epochs=config.epochs,
        batch_size=config.batch_size,
        weight_decay=config.weight_decay,
        max_length=config.max_length,
        seed=cell.seed,
        sites=cell.sites or None,
        strength=cell.strength,
        poison_fraction=config.poison_fraction if cell.data == "poisoned" else 0.0,
        salora_safety_rank=config.input_rank,
        salora_task_rank=config.input_rank,
    )
