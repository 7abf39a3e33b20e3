"""`refusal-kernels train-sae` and `refusal-kernels demo`: the command-line face of `runs.train_sae`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_options import Device, Quiet, TrustRemoteCode
from .train_config import TrainConfig

if TYPE_CHECKING:
    from .runs import RunResult

_DEFAULT = TrainConfig()
_DATA, _SAE, _TRAINING, _OUTPUT = "Model and data", "Sparse autoencoder", "Optimisation", "Output"


def parse_count(text: str) -> int:
    """ "250000", "250_000", "250k", "10M" or "1.5B" as an integer. ValueError otherwise."""
    units = {"k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}
    plain = str(text).strip().lower().replace("_", "").replace(",", "")
    factor = units.get(plain[-1:], 1)
    try:
        value = float(plain[:-1] if factor > 1 else plain) * factor
        if value != int(value):
            raise ValueError
    except (ValueError, OverflowError):
        raise typer.BadParameter(f"{text!r} is not a whole number; write it like 250000, 250k, 10M or 1.5B") from None
    return int(value)


def parse_layers(text: str | None) -> list[int]:
    """ "1,3" or "0-3" or "0,2-4" as layer numbers; None means the default. BadParameter otherwise."""
    if text is None:
        return []
    layers: list[int] = []
    for part in text.replace(" ", "").split(","):
        first, dash, last = part.partition("-")
        last = last if dash else first
        if first.isdecimal() and last.isdecimal() and max(len(first), len(last)) > 4:
            raise typer.BadParameter(f"{text!r} names layers that no model has")
        if not first.isdecimal() or not last.isdecimal() or int(last) < int(first):
            raise typer.BadParameter(f"{text!r} does not name layers; write them like 1,3 or 0-3")
        layers += range(int(first), int(last) + 1)
    return layers


def train_sae(
    context: typer.Context,
    model: str = typer.Option(
        _DEFAULT.model, help="builtin, a folder, or a hub name (transformers causal LM).", rich_help_panel=_DATA
    ),
    data: str = typer.Option(
        _DEFAULT.data,
        help="builtin, a .txt/.jsonl/.parquet/.csv file, a folder of such files, or a hub data set.",
        rich_help_panel=_DATA,
    ),
    layers: str = typer.Option(
        None,
        help="Layers, like 1,3 or 0-3: one SAE each, one model pass. (default: the middle layer)",
        rich_help_panel=_DATA,
        show_default=False,
    ),
    text_field: str = typer.Option(_DEFAULT.text_field, help="Column that holds the text.", rich_help_panel=_DATA),
    split: str = typer.Option(_DEFAULT.split, help="Split of a data set.", rich_help_panel=_DATA),
    data_config: str = typer.Option(None, help="Configuration of a hub data set.", rich_help_panel=_DATA),
    streaming: bool = typer.Option(
        _DEFAULT.streaming, "--streaming", help="Read the data set as a stream.", rich_help_panel=_DATA
    ),
    context_length: int = typer.Option(
        _DEFAULT.context_length, help="Tokens per sequence.", min=2, rich_help_panel=_DATA
    ),
    sequences: int = typer.Option(
        _DEFAULT.sequences, help="Sequences per forward pass of the model.", min=1, rich_help_panel=_DATA
    ),
    buffer_tokens: str = typer.Option(
        None,
        metavar="COUNT",
        help="Tokens in the shuffle buffer (each takes d_in x layers x 4 bytes, 2 in bf16). (default: 8 batches)",
        rich_help_panel=_DATA,
        show_default=False,
    ),
    trust_remote_code: TrustRemoteCode = False,
    k: int = typer.Option(_DEFAULT.k, help="Active latents per token.", min=1, rich_help_panel=_SAE),
    expansion: int = typer.Option(_DEFAULT.expansion, help="Latents per input dimension.", min=1, rich_help_panel=_SAE),
    latents: str = typer.Option(
        None, metavar="COUNT", help="Number of latents; overrides --expansion.", rich_help_panel=_SAE
    ),
    tokens: str = typer.Option(
        f"{_DEFAULT.tokens // 10**6}M",
        metavar="COUNT",
        help="Training tokens: 250k, 10M, 1B.",
        rich_help_panel=_TRAINING,
    ),
    batch_tokens: str = typer.Option(
        str(_DEFAULT.batch_tokens), metavar="COUNT", help="Tokens per step.", rich_help_panel=_TRAINING
    ),
    lr: float = typer.Option(
        None,
        help="Peak learning rate. (default: 2e-4 x (latents / 16384)^-0.5)",
        rich_help_panel=_TRAINING,
        show_default=False,
    ),
    warmup_fraction: float = typer.Option(
        _DEFAULT.warmup_fraction, help="Share of the steps with a rising rate.", rich_help_panel=_TRAINING
    ),
    decay_fraction: float = typer.Option(
        _DEFAULT.decay_fraction, help="Share of the steps, at the end, with a falling rate.", rich_help_panel=_TRAINING
    ),
    aux_alpha: float = typer.Option(
        _DEFAULT.aux_alpha, help="Weight of AuxK, which revives dead latents; 0: off.", rich_help_panel=_TRAINING
    ),
    k_aux: int = typer.Option(
        None, help="Dead latents per token in AuxK. (default: d_in / 2)", rich_help_panel=_TRAINING, show_default=False
    ),
    dead_after_tokens: str = typer.Option(
        f"{_DEFAULT.dead_after_tokens // 10**6}M",
        metavar="COUNT",
        help="Tokens without firing that make a latent dead.",
        rich_help_panel=_TRAINING,
    ),
    max_grad_norm: float = typer.Option(
        None,
        help="Clip each SAE's gradient to this norm. (default: off)",
        rich_help_panel=_TRAINING,
        show_default=False,
    ),
    dtype: str = typer.Option(
        _DEFAULT.dtype,
        help="float32 or bfloat16, of the model and its activations; the SAE's weights are fp32 always.",
        rich_help_panel=_TRAINING,
    ),
    moments: str = typer.Option(
        _DEFAULT.moments,
        help="float32 or bfloat16 (half the memory), of Adam's moments of the SAE's matrices.",
        rich_help_panel=_TRAINING,
    ),
    device: Device = _DEFAULT.device,
    backend: str = typer.Option(
        None,
        help="Kernels: reference, cpu, triton, cuda, triton-int8. (default: the best that runs)",
        rich_help_panel=_TRAINING,
        show_default=False,
    ),
    seed: int = typer.Option(
        _DEFAULT.seed, help="Of initialisation, data order, shuffling.", rich_help_panel=_TRAINING
    ),
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the run.", rich_help_panel=_OUTPUT)] = Path(
        _DEFAULT.out
    ),
    resume: bool = typer.Option(
        False,
        "--resume",
        help="Go on from the latest checkpoint in --out, with its settings; no other option is needed. "
        "With --streaming the documents already used are read again first.",
        rich_help_panel=_OUTPUT,
    ),
    overwrite: bool = typer.Option(
        False, "--overwrite", help="Throw an earlier run in --out away.", rich_help_panel=_OUTPUT
    ),
    checkpoint_every: int = typer.Option(
        _DEFAULT.checkpoint_every, help="Steps between checkpoints; 0: only the last.", min=0, rich_help_panel=_OUTPUT
    ),
    keep_checkpoints: int = typer.Option(
        _DEFAULT.keep_checkpoints, help="How many stay.", min=1, rich_help_panel=_OUTPUT
    ),
    log_every: int = typer.Option(_DEFAULT.log_every, help="Steps between log lines.", min=1, rich_help_panel=_OUTPUT),
    eval_tokens: str = typer.Option(
        f"{_DEFAULT.eval_tokens}",
        metavar="COUNT",
        help="Held-out tokens for the evaluation at the end.",
        rich_help_panel=_OUTPUT,
    ),
    loss_after: str = typer.Option(
        None,
        metavar="TOKEN",
        help="Count the model's loss only after this token (it opens answers). (default: everywhere; with the "
        "built-in data after <asst>, if the tokenizer has it)",
        rich_help_panel=_OUTPUT,
        show_default=False,
    ),
    trackers: Annotated[
        list[str] | None,
        typer.Option(
            "--tracker", help="tensorboard, wandb, ... (accelerate's); may be repeated.", rich_help_panel=_OUTPUT
        ),
    ] = None,
    threads: int = typer.Option(
        None,
        min=1,
        max=4096,
        help="CPU threads; a resumed run needs the same number to end in the same bits. (default: PyTorch's)",
        rich_help_panel=_TRAINING,
        show_default=False,
    ),
    quiet: Quiet = False,
) -> None:
    """Train TopK sparse autoencoders on the o_proj inputs of a language model.

    Ends with an evaluation on held-out text, metrics.json and a plot. Ctrl-C leaves a checkpoint; --resume goes on from
    it, bit for bit on a CPU.
    """
    given = dict(context.params)
    values: dict[str, Any] = {name: given[name] for name in _DEFAULT.to_dict() if name in given}
    values["layers"] = parse_layers(layers)
    values["out"] = str(out)
    values["trackers"] = trackers or []
    for name in ("latents", "tokens", "batch_tokens", "buffer_tokens", "dead_after_tokens", "eval_tokens"):
        values[name] = None if given[name] is None else parse_count(given[name])
    if resume:
        from .runs import saved_config

        explicit = {name for name in values if _is_explicit(context, name)}
        values = saved_config(out).to_dict() | {name: values[name] for name in explicit} | {"out": str(out)}
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    _run(TrainConfig(**values), resume=resume, overwrite=overwrite, progress=not quiet)


def _is_explicit(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name in ("COMMANDLINE", "ENVIRONMENT")


def _run(config: TrainConfig, *, resume: bool, overwrite: bool, progress: bool) -> RunResult:
    """Runs, prints the table and the places; an interruption becomes one line and exit code 130."""
    from . import runs
    from .cli import CommandFailed
    from .evaluate import format_table
    from .trainer import DataEnded, TrainingDiverged, TrainingInterrupted

    go_on = shlex.join(["refusal-kernels", "train-sae", "--out", config.out, "--resume"])
    if not progress:
        _silence_libraries()
    try:
        result = runs.train_sae(config, resume=resume, overwrite=overwrite, progress=progress, say=typer.echo)
    except TrainingInterrupted as interrupted:
        typer.echo(
            f"interrupted after step {interrupted.step} of {interrupted.total_steps}, checkpoint saved; "
            f"go on with: {go_on}",
            err=True,
        )
        raise typer.Exit(130) from None
    except KeyboardInterrupt:  # before the first step, or in the evaluation after the last
        saved = (Path(config.out) / "checkpoints" / "latest").is_file()
        typer.echo(f"interrupted; go on with: {go_on}" if saved else "interrupted before anything was saved", err=True)
        raise typer.Exit(130) from None
    except (TrainingDiverged, DataEnded) as error:
        raise CommandFailed(str(error)) from error
    evaluation: dict[str, Any] = result.metrics["evaluation"]
    where = "held-out" if evaluation["held_out"] else "training"
    typer.echo(f"\n{format_table(evaluation)}\n")
    typer.echo(
        f"on {evaluation['tokens']:,} {where} tokens; {result.metrics['seconds']:.0f} s, kernels: "
        f"{result.metrics['backend']}, peak memory {result.metrics['peak_memory_bytes'] / 2**20:,.0f} MiB"
    )
    for folder in result.folders.values():
        typer.echo(f"SAE      {folder}")
    typer.echo(f"metrics  {result.out / 'metrics.json'}")
    typer.echo(f"plot     {', '.join(str(path) for path in result.plots)}")
    return result


def _silence_libraries() -> None:
    """--quiet means theirs as well: the bars of loading weights and of reading data sets."""
    import datasets
    from transformers.utils import logging

    logging.disable_progress_bar()
    datasets.disable_progress_bars()


def register(app: typer.Typer) -> None:
    app.command("train-sae")(train_sae)
