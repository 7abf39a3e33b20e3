"""Merging the turns of a run into results, and showing them: table, README, JSON.

A result file holds `machine`, `versions`, `commit`, `date`, and per malloc setting a list of cases, one per group and
shape, with every column's times. The time of a column is its best call over all turns, as interference only ever adds;
ratios are of these. `median` stands beside it in the file.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from . import model
from .machine import ROOT
from .shapes import COLUMNS, GROUPS, Shape

RESULTS = ROOT / "benches" / "results"
README = ROOT / "README.md"
BLOCK_NAMES = ("bench", "bench-more")

TITLES = {
    "dense": "dense eager",
    "compile": "torch.compile",
    "sparse": "sparse PyTorch",
    "best": "best sparse PyTorch",
    "ours": "ours",
    "floor": "floor",
}
GROUP_TITLES = {"encode": "encode", "decode": "decode", "backward": "backward", "step": "whole step with Adam"}


def merge(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Cases of one pytest-benchmark record (its `--benchmark-json`): all turns of a column become one entry."""
    cases: dict[tuple[str, Shape], dict[str, Any]] = {}
    for entry in record["benchmarks"]:
        info = entry["extra_info"]
        shape = Shape(*info["shape"])
        case = cases.setdefault((info["group"], shape), {"group": info["group"], "shape": list(shape), "columns": {}})
        column = case["columns"].setdefault(
            info["column"], {key: info[key] for key in ("form", "backend", "max_error", "peak_bytes")} | {"turns": []}
        )
        if info["forms"]:
            column["forms_seconds"] = info["forms"]
        column["turns"].append(entry["stats"]["data"])
    for case in cases.values():
        shape, group = Shape(*case["shape"]), case["group"]
        for name, column in case["columns"].items():
            calls = [seconds for turn in column["turns"] for seconds in turn]
            column["seconds"], column["median"] = min(calls), statistics.median(calls)
            if name != "floor" or group in ("encode", "step"):
                flops = (
                    model.encode_flops(shape)
                    if name == "floor"
                    else model.flops(group, shape, name in ("dense", "compile"))
                )
                column["gflops"] = flops / column["seconds"] / 1e9
            column["gbytes"] = model.bytes_moved(group, shape) / column["seconds"] / 1e9
        usual, best = case["columns"].get("sparse"), case["columns"].get("best")
        if usual and best and usual["seconds"] < best["seconds"]:
            # The form was chosen before the turns; where they say otherwise, the usual one is the fastest.
            case["columns"]["best"] = dict(usual)
        floor = case["columns"].get("floor")
        for column in case["columns"].values():
            column["roofline"] = None if floor is None else floor["seconds"] / column["seconds"]
    return list(cases.values())


def milliseconds(seconds: float) -> str:
    """Three significant digits, never an exponent."""
    ms = seconds * 1e3
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.1f}" if ms >= 10 else f"{ms:.2f}"


def megabytes(count: float | None) -> str:
    return "–" if count is None else f"{count / 1e6:.0f}"


def rows(cases: list[dict[str, Any]]) -> list[list[str]]:
    """The table's body: group, shape, milliseconds per column, ratios of ours, peak extra MB per column."""
    ordered = sorted(cases, key=lambda c: GROUPS[::-1].index(c["group"]))
    body = []
    for case in ordered:
        columns = case["columns"]

        def ratio(name: str, columns: dict[str, Any] = columns) -> str:
            if name not in columns or "ours" not in columns:
                return "–"
            return f"{columns[name]['seconds'] / columns['ours']['seconds']:.2f}×"

        def over_floor(columns: dict[str, Any] = columns) -> str:
            if "floor" not in columns or "ours" not in columns:
                return "–"
            return f"{columns['ours']['seconds'] / columns['floor']['seconds']:.2f}"

        times = [milliseconds(columns[n]["seconds"]) if n in columns else "–" for n in COLUMNS]
        peaks = [megabytes(columns[n]["peak_bytes"]) if n in columns else "–" for n in COLUMNS[:-1]]
        shape = ", ".join(str(size) for size in case["shape"])
        ratios = [*(ratio(name) for name in COLUMNS[:4]), over_floor()]
        body.append([GROUP_TITLES[case["group"]], shape, *times, *ratios, " / ".join(peaks)])
    return body


HEADER = [
    "group", "N, d, F, k", *(f"{TITLES[name]}, ms" for name in COLUMNS),
    "vs dense", "vs compile", "vs sparse", "vs best sparse", "ours / floor",
    "peak extra MB: dense / compile / sparse / best sparse / ours",
]  # fmt: skip


def text_table(cases: list[dict[str, Any]]) -> str:
    """The table for a terminal."""
    short = [
        *("group", "N, d, F, k", *COLUMNS, *(f"/{name}" for name in COLUMNS[:4]), "x floor"),
        "extra MB " + "/".join(COLUMNS[:-1]),
    ]
    lines = [short, *rows(cases)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(short))]
    out = []
    for number, line in enumerate(lines):
        out.append(
            "  ".join(
                cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
            )
        )
        if number == 0:
            out.append("  ".join("-" * w for w in widths))
    return "\n".join(out)


def details(cases: list[dict[str, Any]]) -> str:
    """Rates, form and back-end behind every time: what the model counts, over what was measured."""
    lines = []
    for case in cases:
        shape = Shape(*case["shape"])
        moved = model.bytes_moved(case["group"], shape) / 1e6
        lines.append(f"{case['group']} {shape}: at least {moved:.1f} MB to move")
        for name, c in case["columns"].items():
            rate = f"{c['gflops']:7.1f} GFLOP/s" if "gflops" in c else " " * 15
            roofline = "" if c["roofline"] is None else f"  {100 * c['roofline']:5.1f} % of the floor's rate"
            what = c["backend"] or c["form"]
            lines.append(
                f"  {name:9}{milliseconds(c['seconds']):>8} ms  median {milliseconds(c['median']):>8}  {rate}  "
                f"{c['gbytes']:6.2f} GB/s{roofline}  error {c['max_error']:.0e}  {what}".rstrip()
            )
    return "\n".join(lines)


def crossover_table(cases: list[dict[str, Any]], group: str) -> str:
    """dense time / our time for every F (rows) and k (columns); above 1 the sparse kernels win."""
    ratios = {
        (c["shape"][2], c["shape"][3]): c["columns"]["dense"]["seconds"] / c["columns"]["ours"]["seconds"]
        for c in cases
        if c["group"] == group
    }
    latents, ks = sorted({f for f, _ in ratios}), sorted({k for _, k in ratios})
    lines = ["F \\ k".rjust(8) + "".join(f"{k:>8}" for k in ks)]
    lines += [
        f"{f:>8}" + "".join(f"{ratios[f, k]:>8.2f}" if (f, k) in ratios else " " * 8 for k in ks) for f in latents
    ]
    return "\n".join(lines)


def newest() -> Path:
    """The result file with the latest date; FileNotFoundError when there is none."""
    files = sorted(RESULTS.glob("*.json"), key=lambda path: json.loads(path.read_text())["date"])
    if not files:
        raise FileNotFoundError(f"no results in {RESULTS}: run `python -m benches` first")
    return files[-1]


def _table(cases: list[dict[str, Any]]) -> list[str]:
    """Lines of a markdown table of cases."""
    return [
        "| " + " | ".join(HEADER) + " |",
        "|" + "|".join("---" if i < 2 else "---:" for i in range(len(HEADER))) + "|",
        *("| " + " | ".join(row) + " |" for row in rows(cases)),
    ]


def blocks(result: dict[str, Any]) -> dict[str, str]:
    """The README's blocks by name: `bench`, the conditions and the first shape; `bench-more`, everything else."""
    machine, versions = result["machine"], result["versions"]
    setting = result["settings"][0]
    first = setting["cases"][0]["shape"]
    what = machine.get("gpu") or f"{machine['cores']} cores of {machine['cpu']}"
    isa = "" if "gpu" in machine else f" ({versions.get('isa', 'default')})"
    head = [
        f"fp32 on {what}{isa}, torch {versions['torch']}, Python {versions['python']}, {machine['libc']}, "
        f"{setting['malloc']} malloc settings; best of {setting['rounds']} turns in one run, columns taking turns; "
        f"commit {result['commit']}, {result['date'][:10]}; `make bench`.",
        "",
        *_table([case for case in setting["cases"] if case["shape"] == first]),
    ]
    more = ["The same run at the other shapes:", "", *_table([c for c in setting["cases"] if c["shape"] != first])]
    for other in result["settings"][1:]:
        more += ["", f"With {other['malloc']} malloc settings (no page faults for freed blocks), all shapes:", ""]
        more += _table(other["cases"])
    if result["crossover"]:
        n, d = result["crossover"][0]["shape"][:2]
        more += [
            "",
            f"Dense time / our time of the whole step at N = {n}, d = {d}; below 1 dense is the better choice:",
        ]
        more += ["", "```", crossover_table(result["crossover"], "step"), "```"]
    return {"bench": "\n".join(head), "bench-more": "\n".join(more)}


def _split(text: str, name: str) -> tuple[str, str, str]:
    """What stands before, between and after a block's markers; ValueError when a marker is missing."""
    begin, end = f"<!-- {name}:begin -->\n", f"\n<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"README.md must have the lines {begin.strip()} and {end.strip()} once each, in this order")
    before, rest = text.split(begin)
    inside, after = rest.split(end)
    return before + begin, inside, end + after


def readme_block(text: str, name: str) -> str:
    """What stands between the markers of a block; ValueError when one is missing."""
    return _split(text, name)[1]


def update_readme(path: Path = README, shown: dict[str, str] | None = None) -> None:
    """Rewrites the README's blocks: `shown`, by default those of the newest result file."""
    shown = blocks(json.loads(newest().read_text())) if shown is None else shown
    text = path.read_text()
    for name in shown:
        readme_block(text, name)
    for name, block in shown.items():
        before, _, after = _split(text, name)
        text = before + block + after
    path.write_text(text)
