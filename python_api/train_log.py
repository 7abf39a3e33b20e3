"""The training log: one JSON line per `log_every` steps, each written at once."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from .checkpoint import write_text

LOG_FILE = "train_log.jsonl"


class TrainLog:
    """The metrics as JSON lines. A resumed run first drops the lines after its checkpoint: it will write them again."""

    def __init__(self, path: Path, keep_until: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [json.dumps(line) for line in read_train_log(path) if line["step"] <= keep_until] if keep_until else []
        write_text(path, "".join(line + "\n" for line in kept))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()

    def write(self, line: dict[str, float]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_train_log(path: Path) -> list[dict[str, float]]:
    """The lines of a training log; a last line cut short by a kill is left out."""
    lines: list[dict[str, float]] = []
    if path.is_file():
        for text in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                lines.append(json.loads(text))
    return lines
