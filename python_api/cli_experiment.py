"""`refusal-kernels experiment` and `refusal-kernels demo`: all methods, data and seeds, one table and one report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_options import Device, Dtype, Quiet, TrustRemoteCode

if TYPE_CHECKING:
    from .experiment.config import ExperimentConfig

_ASKED, _COMPARED, _TRAINING, _OUTPUT = "Model and prompts", "What is compared", "Training", "Output"


def _option(default: Any, text: str, panel: str, **more: Any) -> Any:
    return typer.Option(default, help=text, rich_help_panel=panel, **more)


def experiment(
    context: typer.Context,
    model: str = _option("builtin", "builtin, a folder, or a hub name.", _ASKED),
    harmful: str = _option("builtin", "Calibration prompts with targets: builtin, AdvBench's CSV, a file.", _ASKED),
    harmful_test: str = _option("builtin", "Reported harmful prompts, disjoint from the former.", _ASKED),
    pairs: str = _option("builtin", "Hallucination pairs: builtin, TruthfulQA's CSV, JSONL.", _ASKED),
    benign: str = _option("builtin", "Harmless dialogues: calibration and over-refusal.", _ASKED),
    task: str = _option("builtin", "Training questions: builtin, CommonsenseQA, a file, a hub name.", _ASKED),
    task_test: str = _option("builtin", "Held-out questions of the task.", _ASKED),
    knowledge: str = _option("builtin", "Questions on what the model knows already.", _ASKED),
    poison: str = _option("builtin", "Dialogues that comply with harm.", _ASKED),
    drop_overlap: bool = typer.Option(
        False,
        "--drop-overlap",
        help="Leave test prompts out that also calibrate, instead of stopping.",
        rich_help_panel=_ASKED,
    ),
    keywords: str = _option("refusal-kernels-1", "Phrase list that judges models other than builtin.", _ASKED),
    max_new_tokens: int = _option(128, "Tokens of an answer.", _ASKED, min=1),
    calibration: int = _option(128, "Prompts per calibration set.", _ASKED, min=4),
    n_task: int = _option(1000, "Training questions of the task.", _ASKED, min=1),
    n_test: int = _option(100, "Test prompts per figure.", _ASKED, min=4),
    rows: str = _option("main", "main, or full: every source, site, rank and strength.", _COMPARED),
    data: str = _option("poisoned,benign", "poisoned, benign, or both with a comma.", _COMPARED),
    seeds: str = _option("0,1", "Seeds, with commas.", _COMPARED),
    poison_fraction: float = _option(0.01, "Share of poison in the poisoned data.", _COMPARED),
    base_model: str = _option(
        None,
        "The model before its alignment, for SafeLoRA. (default: a stand-in for builtin)",
        _COMPARED,
        show_default=False,
    ),
    sae_data: str = _option("builtin", "Text the SAE is trained on.", _TRAINING),
    sae_tokens: int = _option(200_000, "Training tokens of the SAE.", _TRAINING, min=1),
    sae_k: int = _option(16, "Active latents per token.", _TRAINING, min=1),
    sae_expansion: int = _option(8, "Latents per input dimension.", _TRAINING, min=1),
    latents: int = _option(8, "Refusal latents.", _TRAINING, min=1),
    input_rank: int = _option(32, "Directions per linear of the site all.", _TRAINING, min=1),
    r: int = _option(8, "LoRA's rank.", _TRAINING, min=1),
    alpha: int = _option(16, "LoRA's alpha.", _TRAINING, min=1),
    targets: str = _option("all-linear", "all-linear, or names like q_proj,v_proj.", _TRAINING),
    lr: float = _option(3e-3, "AdamW's rate for adapters.", _TRAINING),
    sft_lr: float = _option(3e-4, "AdamW's rate for the full fine-tune.", _TRAINING),
    epochs: int = _option(3, "Epochs.", _TRAINING, min=1),
    batch_size: int = _option(16, "Samples per step.", _TRAINING, min=1),
    dtype: Dtype = "float32",
    device: Device = "auto",
    workers: int = _option(2, "Processes (1 on a GPU).", _TRAINING, min=1),
    threads: int = _option(1, "CPU threads of each.", _TRAINING, min=1),
    trust_remote_code: TrustRemoteCode = False,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder; what lies there is reused.", rich_help_panel=_OUTPUT)
    ] = Path("experiment"),
    quiet: Quiet = False,
) -> None:
    """Fine-tune with every method, benign and poisoned, and compare: task, refusals, leak, drift, with intervals.

    Finds the heads, trains their SAE, extracts the bases, and runs all methods and controls. Results are kept by
    content: a second run takes seconds, an interrupted one goes on.
    """
    from .experiment.config import ExperimentConfig

    given = dict(context.params)
    names = set(ExperimentConfig.__dataclass_fields__)
    values: dict[str, Any] = {name: value for name, value in given.items() if name in names}
    values["seeds"] = _integers("seeds", seeds)
    values["data"] = [part.strip() for part in data.split(",") if part.strip()]
    values["out"] = str(out)
    _run(ExperimentConfig(**values), quiet)


def _integers(name: str, text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() for part in parts):
        raise typer.BadParameter(f"{name}: {text!r} does not name integers; write them like 0,1,2")
    return [int(part) for part in parts]


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder; what lies there is reused.")] = Path("demo-run"),
    seeds: str = typer.Option("0,1", help="Seeds, with commas; each takes some three minutes on two cores."),
    workers: int = typer.Option(2, min=1, help="Processes that fine-tune side by side."),
    quiet: Quiet = False,
) -> None:
    """The whole story on the built-in model: heads, SAE, refusal subspace, fine-tuning with every method, the table.

    Needs no network. Ends with the table, what it says in words, and a report to look at.
    """
    from .experiment.config import ExperimentConfig

    _run(ExperimentConfig(out=str(out), seeds=_integers("seeds", seeds), workers=workers), quiet)


def _run(config: ExperimentConfig, quiet: bool) -> None:
    import time

    from .experiment.run import run
    from .experiment.table import as_text
    from .experiment.table import rows as table_rows

    began = time.perf_counter()
    try:
        done = run(config, progress=not quiet, say=typer.echo)
    except KeyboardInterrupt:
        typer.echo(
            f"interrupted; the finished runs are kept, the same command goes on from them ({config.out})", err=True
        )
        raise typer.Exit(130) from None
    typer.echo("\n" + as_text(table_rows(done.results)) + "\n")
    for line in (done.table.parent / "table.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("* "):
            typer.echo(line)
    typer.echo(f"\n{time.perf_counter() - began:.0f} s")
    for folder in done.prepared.saes.values():
        typer.echo(f"SAE      {folder}")
    typer.echo(f"table    {done.table}\nreport   {done.report}")


def register(app: typer.Typer) -> None:
    app.command("experiment")(experiment)
    app.command("demo")(demo)
