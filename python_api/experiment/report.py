"""The table as JSON and text, and one self-contained HTML report: table, head map, leak, reasons, transcripts."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import refusal_kernels as rk

from ..checkpoint import write_json, write_text
from . import figures
from .cells import PROTECTED
from .findings import findings
from .table import HEADER, as_text, cells_of, rows

if TYPE_CHECKING:
    from .config import ExperimentConfig
    from .prepare import Prepared

EXPLAIN_HEADER = ("method", "data", "seed", "as fine-tuned", "z pasted", "U of z pasted", "random U pasted")


def write_report(
    config: ExperimentConfig, prepared: Prepared, results: Sequence[dict[str, Any]], out: Path
) -> tuple[Path, Path]:
    """Writes table.json, table.txt, report.html and the figures below `out`; returns the paths of table and report."""
    table = rows(results)
    said = findings(table, results)
    conditions = conditions_of(config, results)
    write_json(
        out / "table.json",
        {
            "conditions": conditions,
            "config": config.to_dict(),
            "suite": {"name": prepared.suite.name, "hash": prepared.suite.hash(), "sizes": prepared.suite.sizes()},
            "judged_by": prepared.suite.judged_by,
            "heads": {name: prepared.heads[name] for name in ("refusal", "hallucination", "overlap")},
            "preflight": prepared.preflight,
            "findings": said,
            "rows": [row.to_dict() for row in table],
            "cells": [{k: v for k, v in result.items() if k not in ("transcripts", "log")} for result in results],
        },
    )
    write_text(out / "table.txt", as_text(table) + "\n\n" + "\n".join(f"* {line}" for line in said) + "\n")
    drawn = {
        "asr_and_task": figures.asr_and_task(table),
        "leak": figures.over_training(_curves(results), "leak", "leak"),
        "heads": Path(prepared.heads["svg"]).read_text(encoding="utf-8"),
    }
    for name, svg in drawn.items():
        write_text(out / f"{name}.svg", svg)
    drawn["heads"] = drawn["heads"][drawn["heads"].index("<svg") :]
    report = out / "report.html"
    write_text(
        report,
        _render(
            title="Fine-tuning without losing refusals: the comparison",
            conditions=conditions,
            findings=said,
            header=HEADER,
            table=[cells_of(row) for row in table],
            figures=drawn,
            heads=prepared.heads["text"],
            features=prepared.features,
            preflight=prepared.preflight,
            explain_note="Percent of harmful prompts refused when, at the last prompt token, the fine-tuned model's z "
            "in the layers of the SAE's basis is replaced by the untouched model's.",
            explain_header=EXPLAIN_HEADER,
            explain=[_explained(result) for result in results if "explain" in result],
            transcripts=_transcripts(results),
            settings=json.dumps(config.to_dict(), indent=1),
        ),
    )
    return out / "table.json", report


def conditions_of(config: ExperimentConfig, results: Sequence[dict[str, Any]]) -> str:
    """Model, seeds, sizes, machine and versions in one sentence."""
    import peft
    import torch
    import transformers

    n = results[0]["harmful"]["n"]
    return (
        f"Model {config.model}; seeds {', '.join(map(str, config.seeds))}; {config.n_task} task samples, "
        f"{config.poison_fraction:.1%} of the poisoned data is poison; LoRA r = {config.r} on {config.targets}, AdamW "
        f"lr {config.lr:g}, {config.epochs} epochs, batch {config.batch_size}; {n} held-out harmful prompts per run; "
        f"refusal_kernels {rk.__version__}, torch {torch.__version__}, transformers {transformers.__version__}, peft "
        f"{peft.__version__}, Python {platform.python_version()}, {platform.machine()}, {config.threads} thread(s)"
    )


def _curves(results: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, float]]]:
    chosen = [r for r in results if r.get("log") and r["data"] == "poisoned"] or [r for r in results if r.get("log")]
    first = min((r["seed"] for r in chosen), default=0)
    return {
        r["label"]: r["log"]
        for r in chosen
        if r["seed"] == first and json.loads(r["cell"])["method"] in (*PROTECTED, "lora")
    }


def _explained(result: dict[str, Any]) -> tuple[str, ...]:
    told = result["explain"]

    def refused(name: str) -> str:
        return f"{100 * told[name]['refuse'] / told[name]['n']:.0f}"

    return (
        result["label"], result["data"], str(result["seed"]), *(refused(n) for n in ("tuned", "z", "U", "random")),
    )  # fmt: skip


def _transcripts(results: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, str]]]:
    before = {t["prompt"]: t["answer"] for r in results if r["label"] == "untouched" for t in r["transcripts"]}
    out: dict[str, list[dict[str, str]]] = {}
    for result in results:
        name = f"{result['label']} ({result['data']} data)"
        if result["label"] != "untouched" and name not in out:
            out[name] = [
                {"prompt": t["prompt"], "before": before.get(t["prompt"], ""), "after": t["answer"]}
                for t in result["transcripts"]
            ]
    return out


def _render(**values: Any) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template("report.html.jinja").render(**values)
