"""The stages of a run on a GPU: what each calls, how long it may take, and what its output says."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..machine import ROOT

CANONICAL = (
    "32768,4096,131072,64",
    "4096,4096,131072,64",
    "65536,128,4096,32",
    "8192,4096,1048576,64",
)


@dataclass(frozen=True)
class Stage:
    """One process. `read` makes the stage's result of what it printed."""

    name: str
    command: Sequence[str]
    limit: float  # seconds
    read: Callable[[str], Any]
    environment: dict[str, str] = field(default_factory=dict)


def architecture() -> str:
    """The present device's compute capability as TORCH_CUDA_ARCH_LIST takes it; 9.0 has instructions of its own."""
    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}" + ("a" if (major, minor) == (9, 0) else "")


def last_json(text: str) -> Any:
    """The JSON object that a command printed."""
    return json.loads(text[text.index("{") : text.rindex("}") + 1])


def json_lines(text: str) -> list[dict[str, Any]]:
    """Every line that is a JSON object: a stage that was cut off has those it came to."""
    return [json.loads(line) for line in text.splitlines() if line.startswith("{") and line.endswith("}")]


def counts(text: str) -> dict[str, Any]:
    """Passed, failed, skipped and the names of what failed, of pytest's last lines."""
    found = dict.fromkeys(("passed", "failed", "skipped", "error"), 0)
    for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", text.rstrip().splitlines()[-1]):
        found[word] = int(number)
    return {**found, "names": re.findall(r"^(?:FAILED|ERROR) (\S+)", text, flags=re.MULTILINE)}


def nothing(text: str) -> dict[str, Any]:
    return {}


def python(*arguments: str) -> list[str]:
    return [sys.executable, "-u", *arguments]


def pytest(*arguments: str, parallel: bool = False) -> list[str]:
    workers = ["-n", str(min(12, os.cpu_count() or 1))] if parallel and importlib.util.find_spec("xdist") else []
    return python("-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", *workers, *arguments)


def stages(quick: bool) -> list[Stage]:
    """All of them, in the order in which they are worth their time."""
    build = {"RK_CUDA": "ON", "TORCH_CUDA_ARCH_LIST": architecture()}
    values = pytest("-m", "gpu", "tests/test_gpu.py", "tests/test_cuda_compile.py", parallel=True)
    found = [
        Stage("build", python("setup.py", "build_ext", "--inplace"), 240, nothing, build),
        Stage("check", python("-m", "refusal_kernels.info", "--check", "--json"), 120, last_json),
        Stage("values", values, 240, counts),
    ]
    shapes = CANONICAL[:1] if quick else CANONICAL
    for shape in shapes:
        columns = "parts ours sparse dense" + (" compile" if shape == CANONICAL[0] and not quick else "")
        command = python("-m", "benches.gpu.sae", "--shape", shape, "--columns", columns)
        found.append(Stage(f"sae {shape}", command, 90, json_lines))
    if not quick:
        found.append(Stage("heads", python("-m", "benches.gpu.heads"), 60, json_lines))
    found += [
        Stage("limits", python("-m", "benches.gpu.limits"), 60, json_lines),
        Stage("projection", python("-m", "benches.gpu.projection"), 60, json_lines),
    ]
    if (tool := shutil.which("compute-sanitizer")) is not None:
        tests = pytest("-m", "gpu and sanitizer", "tests/test_gpu.py")
        for check in ("memcheck", "racecheck"):
            command = [tool, "--tool", check, "--error-exitcode", "1", *tests]
            found.append(Stage(check, command, 150, counts, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}))
    return found


def run(stage: Stage, folder: Path, limit: float) -> dict[str, Any]:
    """{"seconds", "status", "result"}; status is "ok", "failed: exit 1" or "stopped after 60 s". The output goes to
    folder/<stage>.log as it comes."""
    log = folder / (re.sub(r"[^a-z0-9]+", "-", stage.name.lower()) + ".log")
    limit = min(limit, stage.limit)
    start = time.monotonic()
    with log.open("w") as sink:
        process = subprocess.Popen(
            stage.command, cwd=ROOT, env={**os.environ, **stage.environment}, stdout=sink, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(timeout=max(limit, 1))
            status = "ok" if code == 0 else f"failed: exit {code}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = f"stopped after {limit:.0f} s"
    try:
        result = stage.read(log.read_text(errors="replace"))
    except (ValueError, IndexError):
        result = None
    return {"seconds": round(time.monotonic() - start, 1), "status": status, "result": result}
