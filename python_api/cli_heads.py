"""`refusal-kernels heads`: which attention heads carry hallucination and refusal, and whether they are the same."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .cli_options import Device, Dtype, Quiet, Threads, TrustRemoteCode

if TYPE_CHECKING:
    pass

_DATA, _SEARCH, _OUTPUT = "Model and data", "Search", "Output"
DEFAULT_PAIRS = 64


def _number(source: str, n: int | None) -> int | None:
    """The built-in world has no size of its own; of files None takes all."""
    return DEFAULT_PAIRS if n is None and source.startswith("builtin") else n


def heads(
    model: str = typer.Option(
        "builtin", help="builtin, a folder, a hub name, or a PEFT adapter's folder.", rich_help_panel=_DATA
    ),
    refusal: str = typer.Option(
        "builtin",
        help="Pairs (refusal, harmful completion): builtin, or a JSONL file of prompt, chosen, rejected.",
        rich_help_panel=_DATA,
    ),
    hallucination: str = typer.Option(
        "builtin",
        help="Pairs (right, wrong answer): builtin, or a JSONL file of prompt, chosen, rejected.",
        rich_help_panel=_DATA,
    ),
    pairs: int = typer.Option(
        None, min=1, help="Pairs of each kind. (default: all of a file, 64 of builtin)", rich_help_panel=_DATA
    ),
    refusal_beginnings: bool = typer.Option(
        False,
        "--refusal-beginnings",
        help="Refusals and harmful completions are beginnings (AdvBench's targets): score no end of turn after them.",
        rich_help_panel=_DATA,
    ),
    trust_remote_code: TrustRemoteCode = False,
    mode: str = typer.Option(
        "both",
        help="screen: first order, one backward per batch. exact: ablate every head. both: screen all, ablate the "
        "best, rank those.",
        rich_help_panel=_SEARCH,
    ),
    refine: float = typer.Option(
        0.15, help="Share of the heads that mode both ablates, per score.", rich_help_panel=_SEARCH
    ),
    eps: float = typer.Option(0.0, help="Factor of an ablated head's output.", rich_help_panel=_SEARCH),
    top: int = typer.Option(
        None, min=1, help="Length of the top lists. (default: 10 % of the heads)", rich_help_panel=_SEARCH
    ),
    batch_size: int = typer.Option(32, min=1, help="Sequences per forward pass.", rich_help_panel=_SEARCH),
    dtype: Dtype = "float32",
    device: Device = "auto",
    seed: int = typer.Option(0, help="Of the draw of builtin pairs.", rich_help_panel=_SEARCH),
    threads: Threads = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the results.", rich_help_panel=_OUTPUT)] = Path(
        "heads"
    ),
    fresh: bool = typer.Option(
        False, "--fresh", help="Compute again what an earlier run in --out already has.", rich_help_panel=_OUTPUT
    ),
    quiet: Quiet = False,
) -> None:
    """Find the heads that carry hallucination and those that carry refusal, by contrastive influence.

    Writes heads.json and heat maps (heads.png, heads.svg) into --out. Ctrl-C loses at most the layer under way; the
    same command goes on from there.
    """
    import torch

    from .cli_train import _silence_libraries
    from .heads.influence import find_heads
    from .heads.plot import plot_heads
    from .heads.report import format_heads
    from .models import load_model
    from .prompts.chat import Chat
    from .prompts.readers import read_pairs, refusal_pairs_of

    if threads is not None:
        torch.set_num_threads(threads)
    if quiet:
        _silence_libraries()
    hallucination_pairs = read_pairs(hallucination, "hallucination", n=_number(hallucination, pairs), seed=seed)
    loaded, tokenizer = load_model(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    chat = Chat(tokenizer)
    progress = None if quiet else "the model's own refusals"
    refusal_pairs, beginnings = refusal_pairs_of(
        refusal, loaded, chat, n=_number(refusal, pairs), seed=seed, batch_size=batch_size, progress=progress
    )
    try:
        scores = find_heads(
            loaded,
            chat,
            hallucination_pairs,
            refusal_pairs,
            mode=mode,  # type: ignore[arg-type]
            eps=eps,
            top=top,
            refine=refine,
            refusal_beginnings=refusal_beginnings or beginnings,
            batch_size=batch_size,
            out=out,
            resume=not fresh,
            progress=not quiet,
            model_name=model,
        )
    except KeyboardInterrupt:
        typer.echo(f"interrupted; what is done is kept in {out}, and the same command goes on from there", err=True)
        raise typer.Exit(130) from None
    scores.provenance["sources"] = {"hallucination": hallucination, "refusal": refusal}
    scores.save(out / "heads.json")
    figures = plot_heads(scores, out)
    typer.echo(format_heads(scores))
    typer.echo(
        f"\n{len(hallucination_pairs)} + {len(refusal_pairs)} pairs, {scores.provenance['seconds']:.1f} s\n"
        f"scores   {out / 'heads.json'}\nplot     {', '.join(str(path) for path in figures)}"
    )


def register(app: typer.Typer) -> None:
    app.command("heads")(heads)
