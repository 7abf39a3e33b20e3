"""The README's block of GPU measurements, from the runs that benches/results/gpu keeps.

The newest run stands there. What it did not come to, because a stage was cut short or not run, is taken from the newest
run that has it, with a mark; a stage that ended well has said all there is.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from .. import status
from .model import ONE_HEAD, prediction_of
from .table import KEPT, device_of, shape_of, with_shape

# Stages whose rows are looked for in earlier runs. The variants of the stage "encode" are others in every version.
FALLS_BACK = ("sae ", "others ", "more ", "limits", "projection", "heads", "end to end", "profile")
MARKS = ("†", "‡", "§", "¶", "‖")

Row = dict[str, Any]


def rows_of(result: dict[str, Any], stage: str) -> list[Row]:
    """Of a stage that prints rows; none where it did not run."""
    found = (result["stages"].get(stage) or {}).get("result")
    return found if isinstance(found, list) else []


def _what(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(key) for key in ("name", "r", "column", "shape"))


def gathered(folder: Path = KEPT) -> dict[str, Any]:
    """The newest run with rows of earlier ones where it has none; they have a "mark", and "marks" says whose it is.
    FileNotFoundError where there is no run."""
    runs = status.kept(folder)
    if not runs:
        raise FileNotFoundError(f"no results in {folder}: run `python -m benches.gpu --out DIR` on a GPU first")
    result = {**runs[0], "stages": dict(runs[0]["stages"]), "marks": {}}
    whole = {name for name, stage in result["stages"].items() if stage["status"] == "ok"}
    for run in runs[1:]:
        label = f"{run['date'][:16].replace('T', ' ')}, commit {run['commit']}"
        symbol = [*MARKS, *(f"†{i}" for i in range(2, len(runs)))][len(result["marks"])]
        for name, stage in run["stages"].items():
            if name in whole or not name.startswith(FALLS_BACK):
                continue
            have = rows_of(result, name)
            seen = {_what(row) for row in have}
            lacking = [{**row, "mark": symbol} for row in rows_of(run, name) if "ms" in row and _what(row) not in seen]
            if not lacking or (name.startswith("profile") and have):  # a profile is of one run
                continue
            result["marks"][symbol] = label
            before = result["stages"].get(name) or {"status": "not run"}
            result["stages"][name] = {**before, "result": have + lacking}
            if stage["status"] == "ok":
                whole.add(name)
    return result


def shown(entry: Row, form: str = ".3g") -> str:
    """Milliseconds, with the mark of a row from another run."""
    return f"{entry['ms']:{form}}{entry.get('mark', '')}"


def block(result: dict[str, Any]) -> str:
    """All of it: conditions, the shapes of the training step, the model, single stages, the projection. What did not
    run is a dash."""
    lines = [conditions(result), ""]
    if marks := result.get("marks"):
        listed = "; ".join(f"{mark} {label}" for mark, label in marks.items())
        lines += [f"Rows that this run did not come to are of the newest that has them: {listed}.", ""]
    if ended := badly_ended(result):
        lines += [f"Stages of this run that did not end well: {ended}.", ""]
    lines += steps_and_encoders(result)
    lines += options(result)
    lines += against_roofline(result)
    lines += beside_the_shapes(result)
    lines += profiles(result)
    lines += plans(result)
    return "\n".join(lines)


def conditions(result: dict[str, Any]) -> str:
    machine, versions = result["machine"], result["versions"]
    device = machine["gpu"] + (f", driver {machine['driver']}" if machine.get("driver") else "")
    torch = f"torch {versions['torch']}" + (f", Triton {versions['triton']}" if "triton" in versions else "")
    return (
        f"{device}, {torch}, Python {versions['python']}; commit {result['commit']}, {result['date'][:10]}; "
        "`python -m benches.gpu`. Milliseconds, median; bf16 autocast, fp32 weights, moments."
    )


def badly_ended(result: dict[str, Any]) -> str:
    """Names and how, attempts before the last one too; not of what only compiles ahead."""
    said = []
    for name, stage in result["stages"].items():
        ends = [attempt["status"] for attempt in stage.get("attempts", [])] + [stage["status"]]
        if not name.startswith("compile ") and set(ends) - {"ok", "not run"}:
            said.append(f"{name} ({', then '.join(ends)})")
    return "; ".join(said)


def steps_and_encoders(result: dict[str, Any]) -> list[str]:
    """A row per shape; the columns that not every run has where this one has them."""
    rows: dict[str, dict[str, Row]] = {}
    for name in result["stages"]:
        kind, _, shape = name.partition(" ")
        if kind == "sae" or (kind == "more" and shape_of(name) is not None):
            rows.setdefault(shape, {}).update({entry["name"]: entry for entry in rows_of(result, name)})
    present = {name for found in rows.values() for name in found}
    steps = {
        "step, ours": "step, ours",
        "step, ours compact": "compact state",
        "step, ours, default options": "default options",
        "step, dense": "step, PyTorch",
        "step, compile": "compiled",
        "step, sparse": "sparse",
    }
    always = ("step, ours", "step, dense")
    steps = {name: title for name, title in steps.items() if name in always or name in present}
    encoders = {
        "encode, ours": "encode, ours",
        "encode, torch": "encode, PyTorch",
        "product alone": "its product alone",
    }
    memory = {"step, ours": "extra memory, ours", "step, ours compact": "compact state", "step, dense": "PyTorch"}
    memory = {name: title for name, title in memory.items() if name in steps}
    titles = ["N, d, F, k", *steps.values(), "ratio", *encoders.values(), *memory.values()]
    lines = ["| " + " | ".join(titles) + " |", "|---" + "|---:" * (len(titles) - 1) + "|"]

    def ms(found: dict[str, Row], name: str) -> str:
        entry = found.get(name, {})
        if "ms" in entry:
            return shown(entry)
        return "out of memory" if re.search("out of memory|needs at least", entry.get("error", "")) else "–"

    for shape, found in rows.items():
        measured = {name for name, entry in found.items() if "ms" in entry}
        ratio = "–"
        if {"step, ours", "step, dense"} <= measured:
            ours, dense = found["step, ours"], found["step, dense"]
            marks = "".join(dict.fromkeys(entry.get("mark", "") for entry in (ours, dense)))
            ratio = f"{dense['ms'] / ours['ms']:.2f}×{marks}"
        gigabytes = [
            f"{found[name]['extra_mb'] / 1e3:.1f} GB{found[name].get('mark', '')}" if name in measured else "–"
            for name in memory
        ]
        cells = [shape.replace(",", ", "), *(ms(found, name) for name in steps), ratio]
        lines.append("| " + " | ".join([*cells, *(ms(found, name) for name in encoders), *gigabytes]) + " |")
    return lines


def options(result: dict[str, Any]) -> list[str]:
    """With which of its options our step was timed."""
    timed = any("default options" in row.get("name", "") for name in result["stages"] for row in rows_of(result, name))
    there = "which has a column of its own" if timed else "which no run has timed yet"
    return [
        "",
        "Every step leaves the gradient along a decoder row in, as PyTorch's here do "
        f"(`remove_parallel_grad=False`); `SAEAdam` takes it out by default, {there}.",
    ]


def against_roofline(result: dict[str, Any]) -> list[str]:
    """A table of what the model of benches/gpu/model.py predicts, and what was measured; without a prediction what
    others' code takes for a part of a step."""
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
    for stage in result["stages"]:
        rows = [with_shape(stage, row) for row in rows_of(result, stage) if "ms" in row]
        path = next((row["path"] for row in rows if "path" in row), "chunked")
        for entry in rows:
            name, rank = entry["name"], entry.get("r")
            if stage == "encode" or (rank is not None and not _of_the_device(name)):
                continue
            ms = prediction_of(entry, device, path)
            if ms is None and (shape_of(stage) is None or not name.startswith(("decode", "encode, batch"))):
                continue
            what = _sizes(entry) if rank is None else f"448 LoRA, r = {rank}"
            cells = ["–", shown(entry), "–"]
            if ms is not None:
                cells = [f"{ms:.3g}", shown(entry), f"{100 * ms / entry['ms']:.0f} %"]
            lines.append(f"| {what} | {name.removesuffix(', ours')} | " + " | ".join(cells) + " |")
    return lines


def _sizes(entry: Row) -> str:
    """ "32 × 65536, 128, 4096, 32" of a row's shape, of one head without their number."""
    heads, _, shape = entry["shape"].rpartition(" x ")
    several = f"{heads} × " if heads and not entry["name"].startswith(ONE_HEAD) else ""
    return several + ", ".join(re.split("[x,]", shape))


def _of_the_device(name: str) -> bool:
    """Whether a row of the projection is the device's time, and not the host's."""
    return name == "floor" or name.endswith(("graph", "queue full"))


def beside_the_shapes(result: dict[str, Any]) -> list[str]:
    """Tables of the stages whose rows stand for themselves: the batched heads, and the kernels in a language model."""
    lines: list[str] = []
    device = device_of(result)
    stages = (
        (("encode",), "the chunked encoder by its row filter and the shape of its chunks"),
        (("heads", "more heads"), "one autoencoder per head"),
        (("end to end",), "in a Llama of 8B's widths"),
    )
    for names, what in stages:
        rows = [row for name in names for row in rows_of(result, name) if "ms" in row]
        if not rows:
            continue
        shape = f", {rows[0]['shape']}" if "shape" in rows[0] else ""
        lines += ["", f"| {what}{shape} | ms | |", "|---|---:|---:|"]
        for entry in rows:
            rate = f"{entry['rate']:,.0f} {entry['unit']}" if "rate" in entry else ""
            if device is not None and names == ("encode",) and (ms := prediction_of(entry, device)) is not None:
                rate = f"predicted {ms:.3g}"
            if entry.get("percent_of_step") is not None:
                rate = f"{entry['percent_of_step']:.2f} % of the step"
            lines.append(f"| {entry['name']} | {shown(entry)} | {rate} |")
    return lines


def profiles(result: dict[str, Any]) -> list[str]:
    """Of every profile a table, a row per kernel: milliseconds and launches per step in each column."""
    lines: list[str] = []
    for stage in result["stages"]:
        rows = [row for row in rows_of(result, stage) if "ms" in row] if stage.startswith("profile") else []
        if not rows:
            continue
        columns = list(dict.fromkeys(row["column"] for row in rows))
        cells = {(row["name"], row["column"]): row for row in rows}
        kernels = [row for row in rows if row["name"] not in ("step", "rest")]
        names = list(dict.fromkeys(row["name"] for row in sorted(kernels, key=lambda row: -row["ms"])))

        def cell(name: str, column: str, cells: dict[tuple[str, str], Row] = cells) -> str:
            row = cells.get((name, column))
            return "–" if row is None else f"{row['ms']:.3g} / {row['launches']:.0f}"

        def total(key: str, cells: dict[tuple[str, str], Row] = cells, columns: Any = columns) -> str:
            return " | ".join(f"{cells['step', c][key]:.3g}" if ("step", c) in cells else "–" for c in columns)

        where = f"a step's kernels, {rows[0]['shape']}{rows[0].get('mark', '')}: ms / launches"
        lines += ["", f"| {where} | {' | '.join(columns)} |", "|---" + "|---:" * len(columns) + "|"]
        lines += [f"| `{name}` | " + " | ".join(cell(name, c) for c in columns) + " |" for name in names]
        lines.append("| each below 1 % | " + " | ".join(cell("rest", c) for c in columns) + " |")
        lines += [f"| all kernels, ms | {total('busy_ms')} |", f"| the step, ms | {total('ms')} |"]
    return lines


# Column of benches.gpu.projection -> its title; those with None are in a table only where a run has them.
PLAN = {
    "loop": "loop", "addmm": "`addmm_` loop", "ours": "ours", "ours, graph": "ours, CUDA graph",
    "ours, queue full": "ours, queue full", "ours, one launch": "one launch",
    "ours, one launch, graph": "one launch, CUDA graph", "ours, one launch, queue full": "one launch, queue full",
    "ours, cuda": "CUDA C++", "ours, cuda, graph": "CUDA C++, CUDA graph",
    "ours, cuda, queue full": "CUDA C++, queue full", "floor": "copy of the bytes",
}  # fmt: skip


def plans(result: dict[str, Any]) -> list[str]:
    """Of the projection and of the optimizers a table each, a row per width of the bases; columns that a run has."""
    rows = rows_of(result, "projection")
    names = list(dict.fromkeys(row["name"] for row in rows))
    optimizers = [name for name in names if name.startswith("optimizer, ")]
    others = [name for name in names if name not in PLAN and name not in optimizers]
    of_plans = [name for name in PLAN if name in names and name != "floor"]
    floor = [name for name in names if name == "floor"]
    lines: list[str] = []
    for what, columns in (
        ("basis of 448 LoRA matrices", [*of_plans, *others, *floor]),
        ("AdamW on them, by the basis", optimizers),
    ):
        if not columns:
            continue
        titles = [PLAN.get(name, name.removeprefix("optimizer, ")) for name in columns]
        lines += ["", f"| {what} | " + " | ".join(titles) + " |", "|---:" * (len(titles) + 1) + "|"]
        for rank in sorted({row["r"] for row in rows if row["name"] in columns}):
            found = {row["name"]: row for row in rows if row["r"] == rank and "ms" in row}
            cells = [shown(found[name], ".2f") if name in found else "–" for name in columns]
            lines.append(f"| {rank} | " + " | ".join(cells) + " |")
    if lines and any(name.endswith("queue full") for name in names):
        how = "Queue full: enqueued behind other work, so that the time is the device's. Others begin on an idle device"
        lines += ["", f"{how}: where the host takes longer, the time is the host's."]
    elif lines:
        lines += [
            "",
            "But for CUDA graphs, calls begin on an idle device: where the host takes longer, the time is its.",
        ]
    return lines
