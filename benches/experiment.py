"""The committed comparison of the fine-tuning methods: kept below benches/results/experiment, shown in the README.

`make experiment` runs it and keeps table.json, table.txt and report.html; `python -m benches readme` shows the table.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from refusal_kernels.python_api.checkpoint import write_json
from refusal_kernels.python_api.experiment.table import Row, as_markdown

from . import machine
from .results import RESULTS

KEPT = RESULTS / "experiment"
FILES = ("table.json", "table.txt", "report.html")


def keep(run: Path, folder: Path = KEPT) -> list[Path]:
    """Copies what a finished run leaves; ValueError where a file is missing."""
    missing = [name for name in FILES if not (run / name).is_file()]
    if missing:
        raise ValueError(f"{run}: expected a finished experiment, {', '.join(missing)} is missing")
    made_by = {"machine": machine.describe_machine("cpu"), "commit": machine.describe_commit()}
    folder.mkdir(parents=True, exist_ok=True)
    copies = [Path(shutil.copyfile(run / name, folder / name)) for name in FILES]
    write_json(folder / "table.json", committed(folder) | made_by)
    return copies


def block(table: dict[str, Any]) -> str:
    """The README's block: conditions, table, findings. Cells are cached by content: a run may be of an older commit."""
    said = [f"* {line}" for line in table["findings"]]
    where = f"{table['machine']['cores']} cores of {table['machine']['cpu']}, kept at commit {table['commit']}"
    return "\n".join(
        [f"{table['conditions']}; {where}.", "", as_markdown([Row.from_dict(r) for r in table["rows"]]), "", *said]
    )


def committed(folder: Path = KEPT) -> dict[str, Any]:
    """The committed table.json. FileNotFoundError where there is none."""
    return json.loads((folder / "table.json").read_text(encoding="utf-8"))
