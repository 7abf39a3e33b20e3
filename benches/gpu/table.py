"""A run's result as text, as `python -m benches.gpu` prints it last; block.py makes the README's tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..results import RESULTS
from ..shapes import Shape
from .model import Device, prediction_of

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
        lines += [f"{name}: before, {attempt['status']}, {attempt['date']}" for attempt in stage.get("attempts", [])]
        if isinstance(found, dict) and "checks" in found:
            bad = [check for check in found["checks"] if not check["ok"]]
            lines.append(f"{name}: {len(found['checks']) - len(bad)} checks passed, {len(bad)} failed")
            lines += [f"    {c['op']} on {c['backend']} ({c['device']}): {c['error']}" for c in bad]
        if isinstance(found, dict) and "passed" in found:
            lines.append(f"{name}: " + ", ".join(f"{found[w]} {w}" for w in ("passed", "failed", "skipped", "error")))
            lines += [f"    {test}" for test in found["names"]]
        if isinstance(found, list) and found:
            lines.append(name)
            lines += ["    " + row(entry) + expectation(result, name, entry) for entry in found]
    return "\n".join(lines)


def device_of(result: dict[str, Any]) -> Device | None:
    """What the run measured the device to do."""
    limits = (result["stages"].get("limits") or {}).get("result") or []
    return Device.of(limits, result.get("machine", {}).get("gpu_l2_mib"))


def shape_of(stage: str) -> Shape | None:
    """Of a stage that measures one shape's step or parts."""
    kind, _, shape = stage.partition(" ")
    try:
        return Shape.parse(shape) if kind in ("sae", "others", "more") else None
    except ValueError:
        return None


def with_shape(stage: str, entry: dict[str, Any]) -> dict[str, Any]:
    """A row with the shape that its stage's name has, where it has none itself."""
    shape = shape_of(stage)
    return entry if shape is None or "shape" in entry else {**entry, "shape": str(shape)}


def expectation(result: dict[str, Any], stage: str, entry: dict[str, Any]) -> str:
    """ "  predicted 46.2 ms, 70 %" beside a measurement that has a model."""
    device = device_of(result)
    if device is None or "ms" not in entry:
        return ""
    path = next((row["path"] for row in result["stages"][stage]["result"] if "path" in row), "chunked")
    ms = prediction_of(with_shape(stage, entry), device, path)
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
    return text + (f"  FAULT: {entry['fault']}" if "fault" in entry else "")


def newest(folder: Path = KEPT) -> dict[str, Any]:
    """The committed result of the latest date; FileNotFoundError where there is none."""
    found = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    if not found:
        raise FileNotFoundError(f"no results in {folder}: run `python -m benches.gpu --out DIR` on a GPU first")
    return max(found, key=lambda result: result["date"])
