"""Files that are either complete or absent: atomic writes, a checkpoint folder with a latest pointer, and safe reading.

Everything is written under a temporary name in the same folder, flushed to the disk, and renamed; a rename within one
file system is atomic on POSIX, so a process killed at any instant leaves the old state or the new one. Temporary names
start with ".tmp-"; a killed process may leave some behind, and `CheckpointFolder` sweeps them at the next save.

Layout written by the trainer below `<out>/checkpoints`:

    step_00000500/          one complete checkpoint (see trainer.py for its files)
    step_00001000/
    latest                  a text file holding the name of the newest complete checkpoint
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_TEMPORARY = ".tmp-"
_STEP = re.compile(r"step_(\d{8,})")


def _fsync_directory(path: Path) -> None:
    # A rename is durable only once the directory entry is; not every platform can open a directory.
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _fsync_tree(path: Path) -> None:
    for file in path.rglob("*"):
        if file.is_file():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
    _fsync_directory(path)


def _temporary(path: Path) -> Path:
    return path.parent / f"{_TEMPORARY}{path.name}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside `path` that replaces `path` on success and is removed on an exception."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(target)
    try:
        yield temporary
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, target)
        _fsync_directory(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Replaces the file's content by `text`, atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Replaces the file's content by `value` as indented JSON, atomically; NaN and infinity become null."""
    write_text(path, json.dumps(_finite(value), indent=2, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    # JSON has no NaN; Python's would write one that other readers reject.
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON object in a file. FileNotFoundError or ValueError, naming the file, when there is none."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist") from None
    except ValueError as error:  # no JSON, no UTF-8, or a number of thousands of digits
        raise ValueError(f"{path} is not a JSON file: {error}") from None
    except RecursionError:
        raise ValueError(f"{path} is not a JSON file of ours: it nests too deep to be read") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object; got {type(value).__name__}")
    return value


def check_state(owner: str, state: dict[str, Any], counts: tuple[str, ...]) -> None:
    """ValueError unless ``state`` has every one of ``counts``, integers from 0 on, and the dict ``settings``."""
    for name in counts:
        value = state.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"state: expected {name} of the {owner} to be an int from 0 on, got {value!r}")
    if not isinstance(state.get("settings"), dict):
        raise ValueError(f"state: expected the settings of the {owner} as a dict, got {state.get('settings')!r}")


class CheckpointFolder:
    """Numbered checkpoints in one folder: written atomically, found by a pointer, the oldest removed.

    Args:
        root: the folder; created by the first save.
        keep: how many checkpoints to keep, at least 1.
    """

    def __init__(self, root: str | os.PathLike[str], keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1; got {keep}")
        self.root = Path(root)
        self.keep = keep

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, ascending."""
        if not self.root.is_dir():
            return []
        found = (_STEP.fullmatch(entry.name) for entry in self.root.iterdir() if entry.is_dir())
        return sorted(int(match.group(1)) for match in found if match)

    def path(self, step: int) -> Path:
        return self.root / f"step_{step:08d}"

    def latest(self) -> Path | None:
        """The checkpoint that `latest` names; without that pointer the highest complete one; None if there is none."""
        pointer = self.root / "latest"
        if pointer.is_file():
            name = pointer.read_text(encoding="utf-8", errors="replace").strip()
            if _STEP.fullmatch(name) and (self.root / name).is_dir():
                return self.root / name
        steps = self.steps()
        return self.path(steps[-1]) if steps else None

    def save(self, step: int, write: Callable[[Path], None]) -> Path:
        """Calls `write(folder)` on a temporary folder, renames it to step_<step>, moves `latest`, drops the oldest."""
        self.root.mkdir(parents=True, exist_ok=True)
        self._sweep()
        target = self.path(step)
        temporary = _temporary(target)
        temporary.mkdir()
        try:
            write(temporary)
            _fsync_tree(temporary)
            if target.exists():  # the same step saved twice: the new one wins
                self._discard(target)
            os.rename(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _fsync_directory(self.root)
        write_text(self.root / "latest", target.name + "\n")
        for old in self.steps()[: -self.keep]:
            self._discard(self.path(old))
        return target

    def _discard(self, path: Path) -> None:
        # Renamed before it is emptied: a kill in the middle must not leave a step_ folder with half its files.
        trash = _temporary(path)
        os.rename(path, trash)
        shutil.rmtree(trash, ignore_errors=True)

    def _sweep(self) -> None:
        for entry in self.root.iterdir():
            if entry.name.startswith(_TEMPORARY):
                if entry.is_dir():
                    shutil.rmtree(entry, ignore_errors=True)
                else:
                    entry.unlink(missing_ok=True)
