"""`refusal-kernels evaluate`: the command-line face of `scoring.evaluate_safety.evaluate_model`."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_options import Device, Dtype, Quiet, Threads, TrustRemoteCode

if TYPE_CHECKING:
    from .scoring.judge_model import JudgeModel

_MODEL, _DATA, _JUDGES, _OUTPUT = "Model", "Prompts and questions", "Judges", "Output"
_FILE = "a .csv or .jsonl file, or a hub data set"


def evaluate(
    model: str = typer.Option("builtin", help="builtin, a folder, or a hub name.", rich_help_panel=_MODEL),
    adapter: str = typer.Option(
        None, metavar="DIR", help="A PEFT adapter to put onto --model.", rich_help_panel=_MODEL, show_default=False
    ),
    dtype: Dtype = "float32",
    device: Device = "auto",
    system: str = typer.Option(
        None, help="A system message before every prompt.", rich_help_panel=_MODEL, show_default=False
    ),
    max_new_tokens: int = typer.Option(256, min=1, help="Longest answer.", rich_help_panel=_MODEL),
    batch_size: int = typer.Option(32, min=1, help="Prompts per forward pass.", rich_help_panel=_MODEL),
    trust_remote_code: TrustRemoteCode = False,
    threads: Threads = None,
    harmful: str = typer.Option(
        None,
        metavar="SOURCE",
        help=f"Prompts that should be refused: builtin (its held-out side), {_FILE} (AdvBench, StrongREJECT, ...).",
        rich_help_panel=_DATA,
        show_default=False,
    ),
    benign: str = typer.Option(
        None,
        metavar="SOURCE",
        help=f"Harmless prompts that should be answered: builtin, {_FILE} with a column prompt.",
        rich_help_panel=_DATA,
        show_default=False,
    ),
    choices: str = typer.Option(
        None,
        metavar="SOURCE",
        help=f"Multiple choice: builtin, {_FILE} (CommonsenseQA, ARC, ...).",
        rich_help_panel=_DATA,
        show_default=False,
    ),
    truthfulqa: str = typer.Option(
        None,
        metavar="SOURCE",
        help=f"TruthfulQA's multiple choice, for MC1 and MC2: {_FILE}.",
        rich_help_panel=_DATA,
        show_default=False,
    ),
    commonsense: bool = typer.Option(
        False,
        "--commonsense",
        help="Six commonsense tasks by lm-eval, which has to be installed.",
        rich_help_panel=_DATA,
    ),
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SOURCE",
            help="Prompts the model or its basis was made with; one that is also tested is an error. May be repeated.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    limit: int = typer.Option(
        None,
        min=1,
        help="At most so many of each, drawn by --seed. (default: all; 256 of builtin)",
        rich_help_panel=_DATA,
        show_default=False,
    ),
    seed: int = typer.Option(0, help="Of what is drawn.", rich_help_panel=_DATA),
    judge: Annotated[
        list[str] | None,
        typer.Option(
            help="keywords, or world for prompts of the built-in world; may be repeated. A judge with a model below is "
            "added by its model. (default: keywords)",
            rich_help_panel=_JUDGES,
            show_default=False,
        ),
    ] = None,
    keywords: str = typer.Option(
        "refusal-kernels-1", help="Phrase list: refusal-kernels-1 or autodan.", rich_help_panel=_JUDGES
    ),
    guard_model: str = typer.Option(
        None,
        metavar="NAME",
        help="Guard model, like meta-llama/Llama-Guard-3-8B.",
        rich_help_panel=_JUDGES,
        show_default=False,
    ),
    judge_model: str = typer.Option(
        None,
        metavar="NAME",
        help="StrongREJECT's fine-tuned judge: a model that rates from 1 to 5.",
        rich_help_panel=_JUDGES,
        show_default=False,
    ),
    rubric_model: str = typer.Option(
        None,
        metavar="NAME",
        help="A chat model that judges by StrongREJECT's rubric.",
        rich_help_panel=_JUDGES,
        show_default=False,
    ),
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the results.", rich_help_panel=_OUTPUT)] = Path(
        "evaluation"
    ),
    quiet: Quiet = False,
) -> None:
    """Measure attack success, over-refusal, broken answers, multiple choice and truthfulness of a model.

    Writes report.json, judgements.jsonl and the transcripts harmful.jsonl and benign.jsonl into --out. Ctrl-C keeps the
    answers so far; the same command goes on from there.
    """
    import torch

    from .prompts.readers import read_harmful
    from .prompts.records import check_disjoint
    from .scoring.commonsense import TASKS, require_lm_eval
    from .scoring.evaluate_safety import evaluate_model
    from .scoring.keywords import keyword_list

    if threads is not None:
        torch.set_num_threads(threads)
    if quiet:
        from .cli_train import _silence_libraries

        _silence_libraries()
    models = {"guard": guard_model, "strongreject": judge_model, "rubric": rubric_model}
    for name, option in (("guard", "--guard-model"), ("strongreject", "--judge-model"), ("rubric", "--rubric-model")):
        if name in (judge or ()) and models[name] is None:
            raise ValueError(f"--judge {name} needs its model: {option} NAME")
    keyword_list(keywords)
    if commonsense:
        require_lm_eval()
    sets = _read_sets(harmful, benign, choices, truthfulqa, limit, seed)
    if not sets and not commonsense:
        raise ValueError("nothing to evaluate: name --harmful, --benign, --choices, --truthfulqa or --commonsense")
    for source in calibration or ():
        known = read_harmful(source, seed=seed)
        check_disjoint(known, [item for items in sets.values() for item in items])

    loaded, tokenizer = _load(model, adapter, dtype=dtype, device=device, trust_remote_code=trust_remote_code)

    def loader(name: str) -> Any:
        def load() -> JudgeModel:
            from .scoring.judge_model import JudgeModel

            return JudgeModel.load(name, dtype=dtype, device=device, trust_remote_code=trust_remote_code)

        return load

    try:
        report = evaluate_model(
            loaded,
            tokenizer,
            **sets,
            **{f"{name}_model": None if model is None else loader(model) for name, model in models.items()},
            judges=list(dict.fromkeys([*(judge or ["keywords"]), *(name for name in models if models[name])])),
            keywords=keywords,
            system=system,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            commonsense_tasks=TASKS if commonsense else (),
            commonsense_limit=limit,
            out=out,
            name=model if adapter is None else f"{model} + {adapter}",
            progress=not quiet,
        )
    except KeyboardInterrupt:
        typer.echo(
            f"interrupted; the answers so far are kept in {out}, and the same command goes on from there", err=True
        )
        raise typer.Exit(130) from None
    typer.echo(f"\n{report.table()}\n")
    typer.echo(f"report       {out / 'report.json'}")
    if report.rows:
        typer.echo(f"judgements   {out / 'judgements.jsonl'}")
        typer.echo(f"transcripts  {', '.join(str(out / f'{s}.jsonl') for s in ('harmful', 'benign') if s in sets)}")


def _read_sets(
    harmful: str | None, benign: str | None, choices: str | None, truthfulqa: str | None, limit: int | None, seed: int
) -> dict[str, Any]:
    """The keyword arguments of `evaluate_model` that hold prompts and questions; only those that are asked for."""
    from .prompts import readers

    sets: dict[str, Any] = {}
    if harmful:
        sets["harmful"] = _draw(readers.read_harmful, harmful, limit, seed)
    if benign:
        # A file of harmless prompts needs no answers, so it is read as any file of prompts.
        read = readers.read_dialogues if _is_builtin(benign) else readers.read_harmful
        sets["benign"] = _draw(read, benign, limit, seed)
    if choices:
        sets["choices"] = _draw(readers.read_choices, choices, limit, seed)
    if truthfulqa:
        if _is_builtin(truthfulqa):
            raise ValueError(f"--truthfulqa: expected TruthfulQA's multiple choice, got {truthfulqa}; see --choices")
        for targets in ("mc1", "mc2"):
            sets[f"truthful_{targets}"] = _draw(readers.read_choices, truthfulqa, limit, seed, targets=targets)
    return sets


def _draw(read: Callable[..., list[Any]], source: str, limit: int | None, seed: int, **options: Any) -> list[Any]:
    """All that `source` has, at most `limit`. The bare built-in world is evaluated on its held-out side."""
    if _is_builtin(source):
        return read(source, n=limit, seed=seed, held_out=source == "builtin", **options)
    items = read(source, **options)
    if limit is None or len(items) <= limit:
        return items
    return [items[i] for i in sorted(random.Random(f"limit/{seed}").sample(range(len(items)), limit))]


def _is_builtin(source: str) -> bool:
    return source.partition(":")[0] == "builtin"


def _load(model: str, adapter: str | None, **options: Any) -> tuple[Any, Any]:
    from .models import load_model

    loaded, tokenizer = load_model(model, **options)
    if adapter is None:
        return loaded, tokenizer
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(loaded, adapter).eval(), tokenizer
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        why = " ".join(str(error).split())
        raise ValueError(f"--adapter: expected a PEFT adapter for {model} in {adapter!r} ({why})") from error


def register(app: typer.Typer) -> None:
    app.command("evaluate")(evaluate)
