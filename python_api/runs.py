"""A whole training run, from names to files: load the model, hold documents out, train, save, evaluate, plot.

    result = train_sae(TrainConfig(model="builtin", data="builtin", layers=[1, 3], out="my-run"))

Below `out` it leaves
    config.json                 the TrainConfig as it was run
    layer_<l>/                  the SAE of each layer: `TopKSAE.from_pretrained(out / "layer_01")`
    metrics.json                evaluation on held-out documents, last training figures, time, memory, versions
    train_log.jsonl             one line per `log_every` steps
    training.png, training.svg  the curves
    checkpoints/                what `resume` continues from
"""

from __future__ import annotations

import hashlib
import json
import platform
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import refusal_kernels as rk

from .buffer import ActivationBuffer
from .checkpoint import CheckpointFolder, write_json
from .documents import Document, Documents, open_documents
from .evaluate import evaluate
from .hooks import attention_geometry, o_proj_of, resolve_layers
from .models import load_model
from .plots import plot_training
from .resume import check_resumable, read_checkpoint_header
from .sae import TopKSAE
from .tokens import TokenStream
from .train_config import DTYPES, TrainConfig
from .train_log import LOG_FILE, read_train_log
from .trainer import SAETrainer

# One document in this many is held out, chosen by the hash of its text: the same in every epoch and every order.
HELD_OUT_ONE_IN = 32

# The built-in model learned to predict answers only; its loss on prompts says nothing.
BUILTIN_ANSWER = "<asst>"


@dataclass
class RunResult:
    """What a run produced: the SAEs, where they lie, the evaluation (see evaluate.py) and the last training figures."""

    config: TrainConfig
    out: Path
    saes: dict[int, TopKSAE]
    folders: dict[int, Path]
    metrics: dict[str, Any]
    plots: list[Path]


def is_held_out(document: Document) -> bool:
    """Whether a document belongs to the held-out share. Equal texts go to the same side, so copies cannot leak."""
    text = document if isinstance(document, str) else json.dumps(document, sort_keys=True)
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_ONE_IN == 0


class SplitDocuments:
    """One side of a source, the held-out documents or the others; the rest is passed on empty, which streams skip.

    Empty rather than left out, so that document numbers stay those of the source and a resumed stream can still jump.
    Where every text of the source would be held out (a file of one document, one time in 32), none is.
    """

    def __init__(self, documents: Documents, held_out: bool) -> None:
        self.name = documents.name + (" (held-out documents)" if held_out else "")
        self.n_documents = documents.n_documents
        self.fingerprint: str | None = getattr(documents, "fingerprint", None)
        self._documents, self._held_out = documents, held_out
        self._divided: bool | None = None  # unknown until the source is read

    def epoch(self, epoch: int, start: int) -> Iterator[Document]:
        if self._divided is None:  # reads on to the first document of the training side, mostly the very first
            self._divided = any(document and not is_held_out(document) for document in self._documents.epoch(0, 0))
        for document in self._documents.epoch(epoch, start):
            held_out = self._divided and is_held_out(document)
            yield document if document and held_out == self._held_out else ""


def token_stream(config: TrainConfig, tokenizer: Any, *, held_out: bool) -> TokenStream:
    """The training stream without end, or one pass over the held-out documents."""
    documents = open_documents(
        config.data,
        text_field=config.text_field,
        split=config.split,
        config=config.data_config,
        streaming=config.streaming,
        seed=config.seed,
    )
    return TokenStream(
        SplitDocuments(documents, held_out),
        tokenizer,
        config.context_length,
        config.sequences,
        config.seed,
        # The built-in documents are short and were learned one at a time.
        packing="padded" if config.data == "builtin" else "packed",
        epochs=1 if held_out else None,
    )


def held_out_batches(config: TrainConfig, tokenizer: Any) -> list[dict[str, Tensor]]:
    """Batches of held-out documents with at least `eval_tokens` tokens, fewer when there are no more; possibly none."""
    batches: list[dict[str, Tensor]] = []
    with token_stream(config, tokenizer, held_out=True) as stream:
        try:
            while stream.tokens_seen < config.eval_tokens:
                batches.append(next(stream))
        except StopIteration:
            pass
        except ValueError as error:
            if "holds no text" not in str(error):
                raise
    return batches


def train_sae(
    config: TrainConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> RunResult:
    """Runs everything; the files are listed at the top of this module.

    Args:
        config: the settings.
        resume: go on from the latest checkpoint below `config.out`.
        overwrite: throw an earlier run below `config.out` away. Without it and without `resume` that is an error.
        progress: progress bars on stderr.
        say: called with lines for people.

    Raises ValueError or OSError with one line that says what to change; `trainer.TrainingInterrupted` after Ctrl-C,
    with a checkpoint left behind.
    """
    started = time.perf_counter()
    out = Path(config.out)
    # What can be refused at once is refused before the minutes that loading a large model takes.
    checkpoint = _check_folder(out, resume, overwrite)
    config.resolved_device()
    rk.backends.requested_backend(config.backend)
    _check_trackers(config)
    if checkpoint is not None:
        config = replace(config, layers=config.layers or saved_config(out).layers)
        check_resumable(config, checkpoint)
    model, tokenizer = load_model(
        config.model, dtype=config.dtype, device=config.device, trust_remote_code=config.trust_remote_code
    )
    geometry = attention_geometry(model)
    if config.loss_after is not None and config.loss_after not in tokenizer.get_vocab():
        raise ValueError(f"loss_after must be a token of the model's tokenizer; got {config.loss_after!r}")
    config = replace(config, layers=resolve_layers(model, config.layers or [geometry.n_layers // 2]))
    buffer = ActivationBuffer(
        model,
        token_stream(config, tokenizer, held_out=False),
        config.layers,
        config.batch_tokens,
        config.buffer_tokens or 8 * config.batch_tokens,
        config.seed,
    )
    for line in describe_run(config, model, buffer.d_in):
        say(line)
    names = {id(module): name for name, module in model.named_modules()}
    provenance = {
        layer: {"hook_name": names[id(o_proj_of(model, layer))], "model_name": config.model} for layer in config.layers
    }
    trainer = SAETrainer(config, buffer, provenance=provenance, progress=progress)
    tracker = None
    try:
        with buffer.stream:
            if checkpoint is not None:
                trainer.load_checkpoint(checkpoint)
                say(f"resuming after step {trainer.step} of {config.total_steps}")
            trainer.prepare()
            tracker = _trackers(config)
            trainer.tracker_log = None if tracker is None else tracker.log
            if checkpoint is None:
                _clear(out)  # only now, when nothing is left that could be refused: it may cost an earlier run
            write_json(out / "config.json", config.to_dict())
            saes = trainer.train()
        folders = {layer: sae.save_pretrained(out / f"layer_{layer:02d}") for layer, sae in saes.items()}
        evaluation = _evaluate(config, model, tokenizer, saes, progress, say)
        for layer, sae in saes.items():
            sae.config.metadata["evaluation"] = evaluation["layers"].get(str(layer))
            sae.save_pretrained(folders[layer])
        log = read_train_log(out / LOG_FILE)
        metrics = {
            "evaluation": evaluation,
            "training": log[-1],
            "seconds": time.perf_counter() - started,
            "peak_memory_bytes": peak_memory_bytes(),
            "backend": rk.last_backend("sae_step"),
            "config": config.to_dict(),
            "versions": _versions(),
        }
        write_json(out / "metrics.json", metrics)
        if tracker is not None:
            flat = {f"eval/layer_{layer}/{k}": v for layer, f in evaluation["layers"].items() for k, v in f.items()}
            tracker.log({name: value for name, value in flat.items() if value is not None}, trainer.step)
        plots = plot_training(log, out, f"TopK SAE on {config.model}, o_proj input, k = {config.k}")
        return RunResult(config, out, saes, folders, metrics, plots)
    finally:
        if tracker is not None:
            tracker.end_training()


def saved_config(out: Path) -> TrainConfig:
    """The settings of the run below `out`, from its latest checkpoint. ValueError when there is nothing to resume."""
    latest = CheckpointFolder(out / "checkpoints").latest()
    if latest is None:
        raise ValueError(f"nothing to resume: {out} holds no checkpoint; start the run without --resume")
    return TrainConfig.from_dict(read_checkpoint_header(latest)["config"], str(latest))


def describe_run(config: TrainConfig, model: nn.Module, d_in: dict[int, int]) -> list[str]:
    """What is about to happen, and what it will take in memory."""
    kind = type(model).__name__
    layers = ", ".join(str(layer) for layer in config.layers)
    widths = sorted({(d, config.n_latents(d)) for d in d_in.values()})
    itemsize = DTYPES[config.dtype].itemsize
    buffer = (config.buffer_tokens or 8 * config.batch_tokens) * sum(d_in.values()) * itemsize
    matrix = 4 + 2 * DTYPES[config.moments].itemsize + (0 if config.max_grad_norm is None else 4)  # bytes a weight
    weights = sum(2 * matrix * config.n_latents(d) * d for d in d_in.values())
    return [
        f"model {config.model} ({kind}, {config.dtype}), z of layer {layers}: "
        + "; ".join(f"d_in {d}, {f:,} latents, k {config.k}, lr {config.peak_lr(f):.2g}" for d, f in widths),
        f"data {config.data}: {config.tokens:,} tokens in {config.total_steps:,} steps of {config.batch_tokens:,}",
        f"memory on {config.resolved_device()}: SAEs with optimiser {_bytes(weights)}, buffer {_bytes(buffer)}",
    ]


def peak_memory_bytes() -> int:
    """The largest resident size of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _check_folder(out: Path, resume: bool, overwrite: bool) -> Path | None:
    """The checkpoint to go on from, or None for a fresh run; ValueError where the folder does not fit the wish."""
    latest = CheckpointFolder(out / "checkpoints").latest()
    if resume:
        if latest is None:
            raise ValueError(f"nothing to resume: {out} holds no checkpoint; start the run without --resume")
        return latest
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: {out} is a file; choose a folder")
    try:  # to write is the one sure way to know
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise ValueError(f"out: cannot write to the folder {out}: {error.strerror or error}") from None
    if not overwrite and any((out / name).exists() for name in ("checkpoints", "config.json", "metrics.json")):
        raise ValueError(
            f"{out} already holds a run; continue it with --resume, throw it away with --overwrite, or choose "
            "another --out"
        )
    return None


def _clear(out: Path) -> None:
    """Takes away what an earlier run left in the folder, by name; other files stay."""
    for folder in (out / "checkpoints", *out.glob("layer_[0-9][0-9]*")):
        shutil.rmtree(folder, ignore_errors=True)
    for name in ("config.json", "metrics.json", LOG_FILE, "training.png", "training.svg"):
        (out / name).unlink(missing_ok=True)


def _evaluate(
    config: TrainConfig,
    model: nn.Module,
    tokenizer: Any,
    saes: dict[int, TopKSAE],
    progress: bool,
    say: Callable[[str], None],
) -> dict[str, Any]:
    batches = held_out_batches(config, tokenizer)
    held_out = bool(batches)
    if not held_out:
        say("no document could be held out (too few documents); evaluating on training text")
        with token_stream(config, tokenizer, held_out=False) as stream:
            batches = [next(stream)]
            while stream.tokens_seen < config.eval_tokens:
                batches.append(next(stream))
    loss_after = config.loss_after
    if loss_after is None and config.data == "builtin":
        if BUILTIN_ANSWER in tokenizer.get_vocab():
            loss_after = BUILTIN_ANSWER
        else:
            say(f"the model's tokenizer has no token {BUILTIN_ANSWER}: its loss is counted on whole documents")
    report = evaluate(
        model,
        saes,
        batches,
        bos_token_id=tokenizer.bos_token_id,
        loss_after=None if loss_after is None else tokenizer.convert_tokens_to_ids(loss_after),
        backend=config.backend,
        progress=progress,
    )
    return {"held_out": held_out, "loss_after": loss_after, **report}


def _check_trackers(config: TrainConfig) -> None:
    """ValueError for trackers that accelerate does not know or that are not installed."""
    if not config.trackers:
        return
    from accelerate.tracking import get_available_trackers

    available = [str(tracker) for tracker in get_available_trackers()]
    if missing := [name for name in config.trackers if name not in available]:
        raise ValueError(
            f"tracker {', '.join(missing)} is not installed or not known to accelerate; "
            f"available here: {', '.join(available) or 'none'}"
        )


def _trackers(config: TrainConfig) -> Any:
    """An Accelerator that logs to `config.trackers`, or None without any."""
    if not config.trackers:
        return None
    from accelerate import Accelerator

    cpu = config.resolved_device().type == "cpu"
    accelerator = Accelerator(log_with=config.trackers, project_dir=config.out, cpu=cpu)
    flat = {
        name: value if isinstance(value, (int, float, str, bool)) else str(value)
        for name, value in config.to_dict().items()
    }
    accelerator.init_trackers("refusal-kernels", config=flat)
    return accelerator


def _versions() -> dict[str, str]:
    import transformers

    return {
        "refusal_kernels": rk.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def _bytes(n: float) -> str:
    return f"{n / 2**20:,.0f} MiB" if n < 2**30 else f"{n / 2**30:,.1f} GiB"
