"""`refusal-kernels tradeoff`: does raising truthfulness lower refusal in this model?"""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_options import Device, Dtype, Quiet, Threads, TrustRemoteCode

if TYPE_CHECKING:
    from .prompts.records import ContrastPair

_DATA, _SWEEP, _OUTPUT = "Model and data", "Sweeps", "Output"
BUILTIN_CALIBRATION, BUILTIN_REFUSAL, BUILTIN_TEST = 128, 64, 64


def split_pairs(pairs: list[ContrastPair], seed: int) -> tuple[list[ContrastPair], list[ContrastPair]]:
    """(calibration, test), half of the prompts each, every prompt on one side only. ValueError for fewer than 2."""
    prompts = sorted({pair.prompt for pair in pairs})
    if len(prompts) < 2:
        raise ValueError(f"hallucination: expected at least 2 different prompts to split, got {len(prompts)}")
    random.Random(seed).shuffle(prompts)
    first = set(prompts[: len(prompts) // 2])
    return [p for p in pairs if p.prompt in first], [p for p in pairs if p.prompt not in first]


def parse_strengths(text: str) -> tuple[float, ...]:
    """ "2,5,10" as numbers. BadParameter otherwise."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r} does not list numbers; write them like 0.5,1,2") from None


def tradeoff(
    model: str = typer.Option(
        "builtin",
        help="builtin, a folder, a hub name, or a PEFT adapter's folder (merged).",
        rich_help_panel=_DATA,
    ),
    hallucination: str = typer.Option(
        "builtin",
        help="Pairs (right, wrong answer): builtin, or a JSONL file of prompt, chosen, rejected, of which one half "
        "calibrates and the other tests.",
        rich_help_panel=_DATA,
    ),
    refusal: str = typer.Option(
        "builtin",
        help="Pairs (refusal, harmful completion) to find heads with: builtin, or a JSONL file.",
        rich_help_panel=_DATA,
    ),
    harmful: str = typer.Option(
        "builtin",
        help="Harmful requests to test with, none of them in --refusal: builtin, or a JSONL file of prompt.",
        rich_help_panel=_DATA,
    ),
    n: int = typer.Option(
        None, min=1, help="Test pairs and requests. (default: all of a file, 64 of builtin)", rich_help_panel=_DATA
    ),
    trust_remote_code: TrustRemoteCode = False,
    top: int = typer.Option(
        None, min=1, help="Heads that iti and scale act on. (default: 10 % of all)", rich_help_panel=_SWEEP
    ),
    alphas: str = typer.Option(
        "2,5,10,20", help="Strengths of iti, in standard deviations of z.", rich_help_panel=_SWEEP
    ),
    factors: str = typer.Option("0.75,0.5,0.25,0", help="Factors of scale.", rich_help_panel=_SWEEP),
    betas: str = typer.Option(
        "0.25,0.5,1,2", help="How often the LoRA's update is subtracted.", rich_help_panel=_SWEEP
    ),
    control_seeds: int = typer.Option(3, min=1, help="Draws of every random control.", rich_help_panel=_SWEEP),
    lora_steps: int = typer.Option(40, min=1, help="Steps of the LoRA on wrong answers.", rich_help_panel=_SWEEP),
    lora_lr: float = typer.Option(3e-3, help="Learning rate of the LoRA.", rich_help_panel=_SWEEP),
    max_new_tokens: int = typer.Option(
        None, min=1, help="Of every answer. (default: 20 for builtin data, else 48)", rich_help_panel=_SWEEP
    ),
    batch_size: int = typer.Option(64, min=1, help="Sequences per forward pass.", rich_help_panel=_SWEEP),
    dtype: Dtype = "float32",
    device: Device = "auto",
    seed: int = typer.Option(0, help="Of draws, splits, the LoRA and the controls.", rich_help_panel=_SWEEP),
    threads: Threads = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the results.", rich_help_panel=_OUTPUT)] = Path(
        "tradeoff"
    ),
    fresh: bool = typer.Option(
        False, "--fresh", help="Measure again what an earlier run in --out already has.", rich_help_panel=_OUTPUT
    ),
    quiet: Quiet = False,
) -> None:
    """Turn truthfulness by three dials beside random controls, and measure what refusal does.

    Writes tradeoff.json, tradeoff.txt and plots into --out. Ctrl-C loses at most the point under way; the same command
    goes on from there.
    """
    import torch

    from .checkpoint import write_json, write_text
    from .cli_train import _silence_libraries
    from .heads.adapter import LoraSettings
    from .heads.measuring import builtin_judge
    from .heads.tradeoff import TradeoffSettings
    from .heads.tradeoff import tradeoff as measure
    from .heads.tradeoff_plot import plot_tradeoff
    from .heads.tradeoff_report import describe, format_tradeoff
    from .models import load_model
    from .prompts.chat import Chat
    from .prompts.readers import read_harmful, read_pairs, refusal_pairs_of

    if threads is not None:
        torch.set_num_threads(threads)
    if quiet:
        _silence_libraries()
    settings = TradeoffSettings(
        alphas=parse_strengths(alphas),
        factors=parse_strengths(factors),
        betas=parse_strengths(betas),
        control_seeds=control_seeds,
        lora=LoraSettings(lora_steps, learning_rate=lora_lr),
        seed=seed,
    )
    if hallucination == "builtin":
        calibration = read_pairs("builtin", "hallucination", n=BUILTIN_CALIBRATION, seed=seed)
        test = read_pairs("builtin", "hallucination", n=BUILTIN_TEST if n is None else n, seed=seed, held_out=True)
    else:
        calibration, test = split_pairs(read_pairs(hallucination, "hallucination"), seed)
        test = test[:n]
    requests = read_harmful(
        harmful, n=BUILTIN_TEST if n is None and harmful == "builtin" else n, seed=seed, held_out=harmful == "builtin"
    )
    options: dict[str, Any] = {"judge": builtin_judge(len(requests), seed) if harmful == "builtin" else None}
    loaded, tokenizer = load_model(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    if callable(merge := getattr(loaded, "merge_and_unload", None)):
        loaded = merge()
    chat = Chat(tokenizer)
    refusal_pairs, beginnings = refusal_pairs_of(
        refusal, loaded, chat, n=BUILTIN_REFUSAL if refusal == "builtin" else None, seed=seed, batch_size=batch_size
    )
    try:
        result = measure(
            loaded,
            chat,
            calibration,
            refusal_pairs,
            test,
            requests,
            settings=settings,
            top=top,
            refusal_beginnings=beginnings,
            exact_answers=hallucination == "builtin",
            max_new_tokens=max_new_tokens or (20 if harmful == "builtin" else 48),
            batch_size=batch_size,
            out=out,
            resume=not fresh,
            progress=not quiet,
            model_name=model,
            **options,
        )
    except KeyboardInterrupt:
        typer.echo(f"interrupted; what is done is kept in {out}, and the same command goes on from there", err=True)
        raise typer.Exit(130) from None
    table, words = format_tradeoff(result), describe(result)
    write_json(out / "tradeoff.json", result.as_dict() | {"in_words": words})
    write_text(out / "tradeoff.txt", f"{table}\n\n{words}\n")
    figures = plot_tradeoff(result, out)
    typer.echo(f"{table}\n\n{words}\n")
    typer.echo(f"figures  {out / 'tradeoff.json'}\nplot     {', '.join(str(path) for path in figures)}")


def register(app: typer.Typer) -> None:
    app.command("tradeoff")(tradeoff)
