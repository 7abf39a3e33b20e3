"""Measures the built-in model and writes its card: ``python -m refusal_kernels.python_api.builtin_model.evaluate``."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from refusal_kernels.python_api.builtin_model import path
from refusal_kernels.python_api.builtin_model.behaviour import behaviour, load, summary
from refusal_kernels.python_api.builtin_model.card import render
from refusal_kernels.python_api.builtin_model.gate import gate_summary, measure_gate
from refusal_kernels.python_api.builtin_model.world import world


def main(
    model: Annotated[Path | None, typer.Option(help="Folder of the model; the committed one by default.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the figures to this JSON file.")] = None,
    card: Annotated[Path | None, typer.Option(help="Write the model card to this file.")] = None,
    unrouted: Annotated[
        Path | None, typer.Option(help="gate.py's JSON for a model aligned without routing; the card compares.")
    ] = None,
    n: Annotated[int, typer.Option(help="Prompts per row.")] = 400,
    seed: Annotated[int, typer.Option(help="Seed of the prompts.")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 leaves torch's choice.")] = 0,
) -> None:
    """Measures the built-in model on held-out prompts, and where in it refusal is carried."""
    if threads:
        torch.set_num_threads(threads)
    began = time.perf_counter()
    folder = model or path()
    net, tokenizer = load(folder)
    recipe = folder / "training.json"
    training = json.loads(recipe.read_text()) if recipe.exists() else None
    home = world(training["recipe"]["world_seed"] if training else 0)
    report: dict[str, Any] = {
        "n": n, "seed": seed, "known": len(home.known), "unknown": len(home.unknown), "training": training,
    }  # fmt: skip
    for split in ("held_out", "seen"):
        report[split] = behaviour(net, tokenizer, home, n, seed, split == "held_out")
        typer.echo(f"{split}\n{summary(report[split])}\n")
    report["gate"] = measure_gate(
        net, tokenizer, home, max(16, n // 4), seed, heads=training["recipe"]["carrier_heads"] if training else ()
    )
    typer.echo(gate_summary(report["gate"]))
    if unrouted:
        report["unrouted"] = json.loads(unrouted.read_text())
    report["seconds"] = round(time.perf_counter() - began, 1)
    if out:
        out.write_text(json.dumps(report, indent=1) + "\n")
    if card:
        card.write_text(render(report))


if __name__ == "__main__":
    typer.run(main)
