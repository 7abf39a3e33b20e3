"""A run's result as text."""

from __future__ import annotations

from typing import Any


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
            lines += ["    " + row(entry) for entry in found]
    return "\n".join(lines)


def row(entry: dict[str, Any]) -> str:
    """One measurement: name, milliseconds, rate, memory, agreement, or the error."""
    name = entry.get("name", "") + (f", r = {entry['r']}" if "r" in entry else "")
    if "error" in entry and "ms" not in entry:
        return f"{name:44} {entry['error']}"
    text = f"{name:44} {entry['ms']:10.3f} ms {entry['extra_mb']:9.0f} MB"
    if "rate" in entry:
        text += f" {entry['rate']:8.1f} {entry['unit']}"
    for key in ("same_latents", "value_error", "first_loss"):
        if entry.get(key) is not None:
            text += f"  {key} {entry[key]:.6g}"
    return text
