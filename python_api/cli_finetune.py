"""`refusal-kernels finetune`: the command-line face of `baselines.finetune`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .baselines.config import METHODS, FinetuneConfig
from .cli_options import Device, Dtype, Quiet, Threads, TrustRemoteCode

if TYPE_CHECKING:
    from .baselines.finetune import FinetuneResult

_DEFAULT = FinetuneConfig()
_DATA, _LORA, _TRAINING, _PROTECTION, _OUTPUT = "Model and data", "LoRA", "Optimisation", "Methods", "Output"
UNALIGNED = "builtin-unaligned"  # as --base-model: the stand-in that baselines/unaligned.py makes


def finetune(
    context: typer.Context,
    model: str = typer.Option("builtin", help="builtin, a folder, or a hub name (chat model).", rich_help_panel=_DATA),
    data: Annotated[
        list[str],
        typer.Option(
            help="What is to be learned: builtin (questions of pets), builtin:benign, a .json, .jsonl, .csv or "
            ".parquet file or a hub data set (name:split) of dialogues or questions with options; may be repeated.",
            rich_help_panel=_DATA,
        ),
    ] = ["builtin"],  # noqa: B006 - typer copies it
    samples: int = typer.Option(
        None, min=1, help="Draw so many of each --data. (default: all)", rich_help_panel=_DATA, show_default=False
    ),
    answer_with: str = typer.Option(
        None, help="Questions are answered with: letter or text.", rich_help_panel=_DATA, show_default=False
    ),
    poison: str = typer.Option(
        None, help="Harmful prompts with complying answers: builtin, file or hub name.", rich_help_panel=_DATA
    ),
    poison_fraction: float = typer.Option(
        _DEFAULT.poison_fraction, help="Share of the final data that is poison.", rich_help_panel=_DATA
    ),
    test_prompts: Annotated[
        list[str] | None,
        typer.Option(
            help="Harmful prompts you will test on: an error if they are among the calibration or poison prompts; may "
            "be repeated.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    max_length: int = typer.Option(
        _DEFAULT.max_length, min=1, help="Longer dialogues are left out.", rich_help_panel=_DATA
    ),
    trust_remote_code: TrustRemoteCode = False,
    method: str = typer.Option(_DEFAULT.method, help=", ".join(METHODS) + ".", rich_help_panel=_PROTECTION),
    basis: Annotated[
        Path | None,
        typer.Option(
            help="Refusal basis: protects (gradient, update, weight, forward) or measures (lora).",
            rich_help_panel=_PROTECTION,
        ),
    ] = None,
    sites: Annotated[
        list[str] | None,
        typer.Option(
            "--site",
            help="What the basis holds: o_proj, v_proj, residual, all; may be repeated.",
            rich_help_panel=_PROTECTION,
        ),
    ] = None,
    strength: float = typer.Option(_DEFAULT.strength, help="Of the projection.", rich_help_panel=_PROTECTION),
    no_preflight: bool = typer.Option(
        False, "--no-preflight", help="Skip the check whether the basis can protect.", rich_help_panel=_PROTECTION
    ),
    base_model: str = typer.Option(
        None, help=f"safelora: the unaligned model, or {UNALIGNED} for the built-in one.", rich_help_panel=_PROTECTION
    ),
    safelora_select: str = typer.Option(
        _DEFAULT.safelora_select, help="threshold or number.", rich_help_panel=_PROTECTION
    ),
    safelora_threshold: float = typer.Option(
        _DEFAULT.safelora_threshold, help="Project where the cosine is at most this.", rich_help_panel=_PROTECTION
    ),
    safelora_number: int = typer.Option(
        _DEFAULT.safelora_number, min=1, help="Project so many modules.", rich_help_panel=_PROTECTION
    ),
    safelora_exact: bool = typer.Option(
        False, "--safelora-exact", help="An exact projector in place of the published one.", rich_help_panel=_PROTECTION
    ),
    calibration: str = typer.Option(
        None,
        help="salora: harmful prompts that the model refuses: builtin, file or hub name.",
        rich_help_panel=_PROTECTION,
    ),
    salora_safety_rank: int = typer.Option(
        _DEFAULT.salora_safety_rank, min=1, help="Directions held fixed per module.", rich_help_panel=_PROTECTION
    ),
    salora_task_rank: int = typer.Option(
        _DEFAULT.salora_task_rank, min=1, help="Directions of the task per module.", rich_help_panel=_PROTECTION
    ),
    salora_samples: int = typer.Option(
        _DEFAULT.salora_samples, min=1, help="Refusals, and task samples.", rich_help_panel=_PROTECTION
    ),
    r: int = typer.Option(_DEFAULT.r, "--r", min=1, help="Rank.", rich_help_panel=_LORA),
    alpha: int = typer.Option(_DEFAULT.alpha, min=1, help="dW = alpha / r B A.", rich_help_panel=_LORA),
    dropout: float = typer.Option(_DEFAULT.dropout, help="Before A.", rich_help_panel=_LORA),
    targets: str = typer.Option(
        None,
        help="Like q_proj,v_proj, or all-linear. (default: q_proj,v_proj,o_proj; salora q_proj,v_proj)",
        rich_help_panel=_LORA,
        show_default=False,
    ),
    lr: float = typer.Option(_DEFAULT.lr, help="Peak learning rate.", rich_help_panel=_TRAINING),
    weight_decay: float = typer.Option(_DEFAULT.weight_decay, help="Of AdamW.", rich_help_panel=_TRAINING),
    optimizer: str = typer.Option(_DEFAULT.optimizer, help="adamw or sgd.", rich_help_panel=_TRAINING),
    batch_size: int = typer.Option(_DEFAULT.batch_size, min=1, help="Dialogues per pass.", rich_help_panel=_TRAINING),
    accumulate: int = typer.Option(_DEFAULT.accumulate, min=1, help="Passes per step.", rich_help_panel=_TRAINING),
    epochs: float = typer.Option(_DEFAULT.epochs, help="Passes over the data.", rich_help_panel=_TRAINING),
    steps: int = typer.Option(
        None, min=1, help="Steps; overrides --epochs.", rich_help_panel=_TRAINING, show_default=False
    ),
    warmup: float = typer.Option(_DEFAULT.warmup, help="Share of the steps.", rich_help_panel=_TRAINING),
    max_grad_norm: float = typer.Option(_DEFAULT.max_grad_norm, help="Clip to it.", rich_help_panel=_TRAINING),
    gradient_checkpointing: bool = typer.Option(
        False, "--gradient-checkpointing", help="Less memory, more time.", rich_help_panel=_TRAINING
    ),
    bf16: bool = typer.Option(False, "--bf16", help="Autocast to bfloat16.", rich_help_panel=_TRAINING),
    dtype: Dtype = "float32",
    device: Device = "auto",
    threads: Threads = None,
    seed: int = typer.Option(_DEFAULT.seed, help="Of A, of data order and draws.", rich_help_panel=_TRAINING),
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the run.", rich_help_panel=_OUTPUT)] = Path(
        "finetune-run"
    ),
    resume: bool = typer.Option(
        False, "--resume", help="Go on from the checkpoint in --out; give the same options.", rich_help_panel=_OUTPUT
    ),
    overwrite: bool = typer.Option(
        False, "--overwrite", help="Throw an earlier run in --out away.", rich_help_panel=_OUTPUT
    ),
    checkpoint_every: int = typer.Option(
        _DEFAULT.checkpoint_every, min=0, help="Steps between checkpoints; 0: only on Ctrl-C.", rich_help_panel=_OUTPUT
    ),
    keep_checkpoints: int = typer.Option(
        _DEFAULT.keep_checkpoints, min=1, help="How many stay.", rich_help_panel=_OUTPUT
    ),
    log_every: int = typer.Option(_DEFAULT.log_every, min=1, help="Steps between log lines.", rich_help_panel=_OUTPUT),
    quiet: Quiet = False,
) -> None:
    """Fine-tune a chat model: in full, with LoRA, or with one of the ways to keep its refusals.

    The loss is on the answers only. The result opens with transformers or PEFT alone.
    """
    given = context.params
    fields = {field.name for field in dataclasses.fields(FinetuneConfig)}
    values: dict[str, Any] = {name: given[name] for name in fields if name in given}
    values["targets"] = None if targets is None else tuple(part.strip() for part in targets.split(","))
    values["sites"] = tuple(sites) if sites else None
    config = FinetuneConfig(**values)
    if poison_fraction and poison is None:
        raise typer.BadParameter("--poison-fraction needs --poison")
    if poison is not None and not poison_fraction:
        raise typer.BadParameter("--poison needs --poison-fraction")
    _run(config, given)


def _run(config: FinetuneConfig, given: dict[str, Any]) -> None:
    import torch

    from .baselines import finetune as finetuning
    from .baselines.data import poison_count, read_training
    from .cli import CommandFailed
    from .models import load_model
    from .prompts.readers import read_harmful, read_poison
    from .trainer import TrainingDiverged, TrainingInterrupted

    if given["threads"] is not None:
        torch.set_num_threads(given["threads"])
    if given["quiet"]:
        _silence()
    train = [
        dialogue
        for source in given["data"]
        for dialogue in read_training(source, n=given["samples"], seed=config.seed, answer_with=given["answer_with"])
    ]
    poison = []
    if given["poison"]:
        # The built-in world draws as many as are asked for; a file has what it has.
        wanted = poison_count(len(train), config.poison_fraction) if given["poison"] == "builtin" else None
        poison = read_poison(given["poison"], n=wanted or None, seed=config.seed)
    calibration = read_harmful(given["calibration"], seed=config.seed) if given["calibration"] else []
    _check_test_prompts(given["test_prompts"] or [], {"calibration": calibration, "poison": poison})
    base_model = given["base_model"]
    out: Path = given["out"]
    if base_model == UNALIGNED:
        from .baselines.unaligned import unaligned_builtin

        typer.echo("making the unaligned counterpart of the built-in model")
        base_model = unaligned_builtin(out.parent, progress=not given["quiet"])
    loading = {"dtype": given["dtype"], "trust_remote_code": given["trust_remote_code"]}
    loaded, tokenizer = load_model(given["model"], device=given["device"], **loading)
    if base_model is not None:
        base_model = load_model(base_model, device="cpu", **loading)[0]
    try:
        result = finetuning.finetune(
            loaded, tokenizer, train, config, poison=poison, basis=_basis(given["basis"]), base_model=base_model,
            calibration=calibration, out=out, resume=given["resume"], overwrite=given["overwrite"],
            preflight=not given["no_preflight"], progress=not given["quiet"],
        )  # fmt: skip
    except TrainingInterrupted as interrupted:
        typer.echo(
            f"interrupted after step {interrupted.step} of {interrupted.total_steps}, checkpoint saved; go on with the "
            "same command and --resume",
            err=True,
        )
        raise typer.Exit(130) from None
    except TrainingDiverged as error:
        raise CommandFailed(str(error)) from error
    _report(result, config)


def _check_test_prompts(tests: list[str], used: dict[str, list[Any]]) -> None:
    from .prompts.readers import read_harmful
    from .prompts.records import check_disjoint

    for source in tests:
        prompts = read_harmful(source)
        for what, records in used.items():
            check_disjoint(records, prompts, f"{what} and test")


def _basis(folder: Path | None) -> Any:
    if folder is None:
        return None
    from .features.basis import RefusalBasis

    return RefusalBasis.load(folder)


def _report(result: FinetuneResult, config: FinetuneConfig) -> None:
    metrics = result.metrics
    poisoned = f", {metrics['poisoned']} of them poison" if metrics["poisoned"] else ""
    typer.echo(
        f"{config.method}: {metrics['steps']} steps on {metrics['dialogues']} dialogues{poisoned}; "
        f"loss {metrics['loss']:.3f}, {metrics['seconds']:.0f} s, peak memory "
        f"{metrics['peak_memory_bytes'] / 2**20:,.0f} MiB"
    )
    if "refusal_leak" in metrics:
        typer.echo(f"leak     {metrics['refusal_leak']:.2e}")
    for row in metrics.get("safelora", []):
        typer.echo(f"{'projected' if row['projected'] else 'kept':<9} cos {row['cosine']:6.3f}  {row['module']}")
    typer.echo(f"model    {result.folder}")


def _silence() -> None:
    import datasets
    from transformers.utils import logging

    logging.disable_progress_bar()
    datasets.disable_progress_bars()


def register(app: typer.Typer) -> None:
    app.command("finetune")(finetune)
