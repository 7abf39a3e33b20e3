"""A run's result as text."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ..results import RESULTS
from ..shapes import Shape
from .model import Device, predicted

KEPT = RESULTS / "gpu"


def table(result: dict[str, Any]) -> str:
    """Stages that did not end well, tests, and milliseconds of everything that was timed."""
    lines = [
        f"{result['machine'].get('gpu', 'no GPU')}, torch {result['versions']['torch']}, commit {result['commit']}"
    ]
    for name, stage in result["stages"].items():
        found = stage["result"]
        if stage["status"] != "ok":
            lines.append(f"{name}: {stage['status']}")
        if isinstance(found, dict) and "passed" in found:
            lines.append(f"{name}: " + ", ".join(f"{found[w]} {w}" for w in ("passed", "failed", "skipped", "error")))
            lines += [f"    {test}" for test in found["names"]]
        if isinstance(found, list) and found:
            lines.append(name)
            lines += ["    " + row(entry) + expectation(result, name, entry) for entry in found]
    return "\n".join(lines)


def device_of(result: dict[str, Any]) -> Device | None:
    """What the run measured the device to do."""
    return Device.of((result["stages"].get("limits") or {}).get("result") or [])


def shape_of(stage: str) -> Shape | None:
    """Of a stage that measures one shape's step or parts."""
    kind, _, shape = stage.partition(" ")
    return Shape.parse(shape) if kind in ("sae", "others") else None


def expectation(result: dict[str, Any], stage: str, entry: dict[str, Any]) -> str:
    """ "  predicted 46.2 ms, 70 %" beside a measurement that has a model."""
    device, shape = device_of(result), shape_of(stage)
    if device is None or "ms" not in entry or shape is None:
        return ""
    ms = predicted(entry["name"], shape, device)
    return "" if ms is None else f"  predicted {ms:.3g} ms, {100 * ms / entry['ms']:.0f} %"


def row(entry: dict[str, Any]) -> str:
    """One measurement: name, milliseconds, rate, memory, agreement, or the error."""
    name = entry.get("name", "") + (f", r = {entry['r']}" if "r" in entry else "")
    name = f"{entry['column']}: {name}" if "column" in entry else name
    if "error" in entry and "ms" not in entry:
        return f"{name:44} {entry['error']}"
    text = f"{name:44}"
    if "ms" in entry:
        text += f" {entry['ms']:10.3f} ms"
    if "extra_mb" in entry:
        text += f" {entry['extra_mb']:9.0f} MB"
    if "rate" in entry:
        text += f" {entry['rate']:8.1f} {entry['unit']}"
    if "launches" in entry:
        text += f" {entry['launches']:8.0f} launches {entry['percent']:5.1f} %"
    if "busy_ms" in entry:
        text += f" {entry['busy_ms']:10.3f} ms in kernels"
    for key in ("same_latents", "value_error", "first_loss", "percent_of_step"):
        if entry.get(key) is not None:
            text += f"  {key} {entry[key]:.6g}"
    return text


def newest(folder: Path = KEPT) -> dict[str, Any]:
    """The committed result of the latest date; FileNotFoundError where there is none."""
    found = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    if not found:
        raise FileNotFoundError(f"no results in {folder}: run `python -m benches.gpu --out DIR` on a GPU first")
    return max(found, key=lambda result: result["date"])


def block(result: dict[str, Any]) -> str:
    """The README's block: conditions, the shapes of the training step, the projection. What did not run is a dash."""
    versions = result["versions"]
    lines = [
        f"{result['machine']['gpu']}, torch {versions['torch']}, Python {versions['python']}; "
        f"commit {result['commit']}, {result['date'][:10]}; `python -m benches.gpu`. "
        "Milliseconds, median; bf16 autocast, fp32 weights, moments.",
        "",
    ]
    lines += steps_and_encoders(result)
    lines += against_roofline(result)
    lines += beside_the_shapes(result)
    lines += profiles(result)
    rows = (result["stages"].get("projection") or {}).get("result") or []
    titles = {"loop": "loop", "addmm": "`addmm_` loop", "ours": "ours", "ours, graph": "ours, CUDA graph"}
    added = {  # older runs have none
        "ours, one launch": "one launch", "ours, one launch, graph": "one launch, CUDA graph",
        "ours, cuda": "CUDA C++", "ours, cuda, graph": "CUDA C++, CUDA graph",
    }  # fmt: skip
    titles |= {name: title for name, title in added.items() if any(row["name"] == name for row in rows)}
    titles["floor"] = "copy of the bytes"
    if rows:
        lines += [
            "",
            "| basis of 448 LoRA matrices | " + " | ".join(titles.values()) + " |",
            "|---:" * (len(titles) + 1) + "|",
        ]
    for rank in sorted({row["r"] for row in rows}):
        ms = {row["name"]: row["ms"] for row in rows if row["r"] == rank and "ms" in row}
        lines.append(f"| {rank} | " + " | ".join(f"{ms[n]:.2f}" if n in ms else "–" for n in titles) + " |")
    return "\n".join(lines)


def steps_and_encoders(result: dict[str, Any]) -> list[str]:
    """A row per shape; the columns of compact state where some run has them."""
    rows: dict[str, dict[str, Any]] = {
        name.removeprefix("sae "): {entry["name"]: entry for entry in stage["result"] or []}
        for name, stage in result["stages"].items()
        if name.startswith("sae ")
    }
    compact = any("step, ours compact" in found for found in rows.values())
    steps = {"step, ours": "step, ours", **({"step, ours compact": "compact state"} if compact else {})}
    steps["step, dense"] = "step, PyTorch"
    encoders = {
        "encode, ours": "encode, ours",
        "encode, torch": "encode, PyTorch",
        "product alone": "its product alone",
    }
    memory = ["extra memory, ours", *(["compact state"] if compact else []), "PyTorch"]
    titles = ["N, d, F, k", *steps.values(), "ratio", *encoders.values(), *memory]
    lines = ["| " + " | ".join(titles) + " |", "|---" + "|---:" * (len(titles) - 1) + "|"]

    def ms(found: dict[str, Any], name: str) -> str:
        entry = found.get(name, {})
        if "ms" in entry:
            return f"{entry['ms']:.3g}"
        return "out of memory" if re.search("out of memory|needs at least", entry.get("error", "")) else "–"

    for shape, found in rows.items():
        measured = {name for name, entry in found.items() if "ms" in entry}
        ratio = "–"
        if {"step, ours", "step, dense"} <= measured:
            ratio = f"{found['step, dense']['ms'] / found['step, ours']['ms']:.2f}×"
        gigabytes = [f"{found[name]['extra_mb'] / 1e3:.1f} GB" if name in measured else "–" for name in steps]
        cells = [shape.replace(",", ", "), *(ms(found, name) for name in steps), ratio]
        lines.append("| " + " | ".join([*cells, *(ms(found, name) for name in encoders), *gigabytes]) + " |")
    return lines


def beside_the_shapes(result: dict[str, Any]) -> list[str]:
    """Tables of the stages whose rows stand for themselves: the batched heads, and the kernels in a language model."""
    lines: list[str] = []
    stages = (
        ("encode", "the chunked encoder by its row filter and the shape of its chunks"),
        ("heads", "one autoencoder per head"),
        ("end to end", "in a Llama of 8B's widths"),
    )
    for stage, what in stages:
        rows = [r for r in (result["stages"].get(stage) or {}).get("result") or [] if "ms" in r]
        if not rows:
            continue
        shape = f", {rows[0]['shape']}" if "shape" in rows[0] else ""
        lines += ["", f"| {what}{shape} | ms | |", "|---|---:|---:|"]
        for entry in rows:
            rate = f"{entry['rate']:,.0f} {entry['unit']}" if "rate" in entry else ""
            if entry.get("percent_of_step") is not None:
                rate = f"{entry['percent_of_step']:.2f} % of the step"
            lines.append(f"| {entry['name']} | {entry['ms']:.3g} | {rate} |")
    return lines


def profiles(result: dict[str, Any]) -> list[str]:
    """Of every profile a table, a row per kernel: milliseconds and launches per step in each column."""
    lines: list[str] = []
    for stage, found in result["stages"].items():
        rows = [row for row in found["result"] or [] if "ms" in row] if stage.startswith("profile") else []
        if not rows:
            continue
        columns = list(dict.fromkeys(row["column"] for row in rows))
        cells = {(row["name"], row["column"]): row for row in rows}
        kernels = [row for row in rows if row["name"] not in ("step", "rest")]
        names = list(dict.fromkeys(row["name"] for row in sorted(kernels, key=lambda row: -row["ms"])))

        def cell(name: str, column: str, cells: dict[tuple[str, str], dict[str, Any]] = cells) -> str:
            row = cells.get((name, column))
            return "–" if row is None else f"{row['ms']:.3g} / {row['launches']:.0f}"

        def total(key: str, cells: dict[tuple[str, str], dict[str, Any]] = cells, columns: Any = columns) -> str:
            return " | ".join(f"{cells['step', c][key]:.3g}" if ("step", c) in cells else "–" for c in columns)

        where = f"a step's kernels, {rows[0]['shape']}: ms / launches"
        lines += ["", f"| {where} | {' | '.join(columns)} |", "|---" + "|---:" * len(columns) + "|"]
        lines += [f"| `{name}` | " + " | ".join(cell(name, c) for c in columns) + " |" for name in names]
        lines.append("| each below 1 % | " + " | ".join(cell("rest", c) for c in columns) + " |")
        lines += [f"| all kernels, ms | {total('busy_ms')} |", f"| the step, ms | {total('ms')} |"]
    return lines


def against_roofline(result: dict[str, Any]) -> list[str]:
    """A table of what the model of benches/gpu/model.py predicts for each part of a step, and what was measured."""
    device = device_of(result)
    if device is None:
        return []
    lines = [
        "",
        f"Against the roofline, from {device.tflops:.0f} TFLOP/s and {device.gbps / 1e3:.2f} TB/s measured in the same "
        "run ([model](benches/gpu/model.py)):",
        "",
        "| N, d, F, k | part | predicted, ms | measured, ms | of the roofline |",
        "|---|---|---:|---:|---:|",
    ]
    for name, stage in result["stages"].items():
        if (shape := shape_of(name)) is None:
            continue
        for entry in stage["result"] or []:
            if "ms" in entry and (ms := predicted(entry["name"], shape, device)) is not None:
                lines.append(
                    f"| {', '.join(map(str, shape))} | {entry['name'].removesuffix(', ours')} | {ms:.3g} | "
                    f"{entry['ms']:.3g} | {100 * ms / entry['ms']:.0f} % |"
                )
    return lines
