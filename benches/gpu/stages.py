"""The stages of a run on a GPU: what each calls, how long it may take, and what its output says."""

from __future__ import annotations

import contextlib
import itertools
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

# Nothing here imports Triton: where it is broken, the stages without it still run and the others say what is wrong.
GROUPED_PATHS = ("grouped", "grouped, 3 keys")  # of triton_kernels/encode.py: those with kernels of their own


@dataclass(frozen=True)
class Stage:
    """One process. `read` makes the stage's result of what it printed."""

    name: str
    command: Sequence[str]
    limit: float  # seconds it may take at most
    share: float  # seconds that the stages before it leave it
    read: Callable[[str], Any]
    environment: dict[str, str] = field(default_factory=dict)
    slot: str = ""  # runs at the same time as its neighbours of the same slot: it measures no time
    helps: bool = False  # saves later stages time by what it leaves; how it ends does not make a run fail
    spare: bool = False  # runs in the time that the others leave, if any: that it was cut short does not make one fail


def architecture() -> str:
    """The present device's compute capability as TORCH_CUDA_ARCH_LIST takes it; 9.0 has instructions of its own."""
    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}" + ("a" if (major, minor) == (9, 0) else "")


CHECK = re.compile(r"^check (\S+) on (\S+) \((\S+)\) ([\d.]+) s: (.*)$", flags=re.MULTILINE)


def report(text: str) -> dict[str, Any]:
    """The JSON object that `info --check` printed; of one that was cut off the checks that had ended."""
    rest = CHECK.sub("", text)
    if "{" in rest and "}" in rest:
        with contextlib.suppress(ValueError):
            return dict(json.loads(rest[rest.index("{") : rest.rindex("}") + 1]))
    names = ("op", "backend", "device")
    return {
        "checks": [
            {**dict(zip(names, words[:3], strict=True)), "ok": words[4] == "ok", "seconds": float(words[3]),
             "error": None if words[4] == "ok" else words[4].removeprefix("FAILED: ")}
            for words in CHECK.findall(text)
        ]
    }  # fmt: skip


def json_lines(text: str) -> list[dict[str, Any]]:
    """Every line that is a JSON object: a stage that was cut off has those it came to."""
    return [json.loads(line) for line in text.splitlines() if line.startswith("{") and line.endswith("}")]


def counts(text: str) -> dict[str, Any]:
    """Passed, failed, skipped and the names of what failed: of pytest's last line, or of single tests where it was cut
    off; and which Triton kernels ran."""
    found = dict.fromkeys(("passed", "failed", "skipped", "error"), 0)
    for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", text.rstrip().splitlines()[-1]):
        found[word] = int(number)
    single = re.findall(r"^(\S+::\S+) (PASSED|FAILED|SKIPPED|ERROR)", text, flags=re.MULTILINE)
    if not any(found.values()):
        for _, word in single:
            found[word.lower()] += 1
    names = re.findall(r"^(?:FAILED|ERROR) (\S+)", text, flags=re.MULTILINE)
    launched = sorted(set(re.findall(r"^launched (\S+)$", text, flags=re.MULTILINE)))
    return {
        **found,
        "launched": launched,
        "names": sorted({*names, *(name for name, word in single if word in ("FAILED", "ERROR"))}),
    }


def nothing(text: str) -> dict[str, Any]:
    return {}


def python(*arguments: str) -> list[str]:
    return [sys.executable, "-u", *arguments]


# Many processes share the host's cores: a team of PyTorch's threads in each would wait for itself at every barrier.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def sanitizers() -> list[Stage]:
    """The smallest tests under two tools of compute-sanitizer, after the value tests, which compile the same kernels:
    memcheck took 25 s for 13 of them with a warm cache of Triton's, 150 s for 12 without. Every operator of the
    back-ends triton, cuda and triton-int8 is among them, with heads and with codes in CSR form; so are all CUDA
    sources. racecheck, which slows a kernel down far more, has bf16 only. Of a test's back-ends each has a process; so
    have heads and the 8-bit screen, which compile longest. Where the tool is not found the stages fail and say so."""
    tool = shutil.which("compute-sanitizer", path=os.environ.get("PATH", "") + ":/usr/local/cuda/bin")
    tests = python("-m", "pytest", "-v", "-p", "no:cacheprovider", "--tb=short", "--color=no")
    tests += ["-m", "gpu and sanitizer", "tests/test_gpu.py"]
    missing = python("-c", "raise SystemExit('compute-sanitizer is not in PATH')")
    options = ["--error-exitcode", "1", "--target-processes", "application-only"]
    kinds = {
        "": "not cuda and not heads and not 8_bit",
        " heads, 8 bit": "not cuda and (heads or 8_bit)",
        " cuda": "cuda",
    }
    return [
        Stage(
            f"{check}{kind}",
            missing if tool is None else [tool, "--tool", check, *options, *tests, "-k", f"({chosen}){bf16}"],
            150,
            50,
            counts,
            {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", **ONE_THREAD},
            slot="checks",
        )
        for check, bf16 in (("memcheck", ""), ("racecheck", " and not dtype0 and not dtype2"))
        for kind, chosen in kinds.items()
    ]


# Columns of benches.gpu.sae at each shape, and the seconds that are theirs. At F = 2^20 the fp32 state of a step alone
# takes 120 GB and PyTorch's 155 or more: a device that has them runs it, another says that it has not.
COLUMNS = {
    "32768,4096,131072,64": ("parts ours dense compact default dead sparse compile", 53),
    "4096,4096,131072,64": ("parts ours dense compact sparse csr", 20),
    "65536,128,4096,32": ("parts ours dense compact default sparse", 18),
    "8192,4096,1048576,64": ("parts compact ours dense sparse compile", 24),
}
# What compiles a minute or tells little more: in the time that is left.
MORE_COLUMNS = {"4096,4096,131072,64": "compile", "65536,128,4096,32": "compile"}


def compilers() -> list[Stage]:
    """The benchmarks of Triton's kernels with few rows, beside the build: of the 15 to 59 s that each took on an H200,
    1 to 12 were measurements and most others the compilation of kernels, one after the other, on one core of 16. Their
    rows are no results. What counts is Triton's cache, where the benchmarks find the kernels: tiles follow from d, F
    and k, not from the number of rows while it is a multiple of 16. Columns of the back-end cuda wait for the build."""
    by_name = {
        "sae": ("sae", "--shape", "1024,4096,131072,64", "--columns", "parts ours compact dead copies"),
        "others": ("sae", "--shape", "1024,4096,131072,64", "--columns", "others"),
        "default options, CSR": ("sae", "--shape", "1024,4096,131072,64", "--columns", "default csr"),
        "sae of heads' size": ("sae", "--shape", "1024,128,4096,32", "--columns", "parts ours compact default"),
        **{
            f"heads {path}": ("heads", "--shape", "1024,128,4096,32", "--heads", "2", "--paths", path)
            for path in GROUPED_PATHS
        },
    }
    commands = {
        name: python("-m", f"benches.gpu.{module}", *options, "--rounds", "1")
        for name, (module, *options) in by_name.items()
    } | {"projection": python("-m", "benches.gpu.projection")}
    return [
        Stage(f"compile {name}", command, 120, 52, nothing, ONE_THREAD, slot="build", helps=True)
        for name, command in commands.items()
    ]


def stages(quick: bool) -> list[Stage]:
    """All of them, in the order in which they are worth their time. A share is 1.1 to 1.3 times what the stage took in
    the kept runs, less what `compilers` take off it; together they leave 15 s of the 8 minutes. The last stages have
    none: they run in what the others did not use."""
    build = {"RK_CUDA": "ON", "TORCH_CUDA_ARCH_LIST": architecture()}
    sae = [
        Stage(
            f"sae {shape}",
            python("-m", "benches.gpu.sae", "--shape", shape, "--columns", columns),
            110,
            share,
            json_lines,
        )
        for shape, (columns, share) in COLUMNS.items()
    ]
    first, *_ = COLUMNS
    others = python("-m", "benches.gpu.sae", "--shape", first, "--columns", "others copies cuda cuda-compact")
    check = python("-m", "refusal_kernels.info", "--check", "--json")
    found = [
        Stage("build", python("setup.py", "build_ext", "--inplace"), 240, 52, nothing, build, slot="build"),
        *compilers()[: 2 if quick else None],
        Stage("values", python("-m", "benches.gpu.values"), 240, 90, counts),
        # Of its 39 kernels the value tests compile 28 too; it has one core.
        Stage("check", check, 150, 50, report, ONE_THREAD, slot="checks"),
        *sanitizers(),
        sae[0],
        Stage("limits", python("-m", "benches.gpu.limits"), 60, 7, json_lines),
        Stage(f"others {first}", others, 75, 27, json_lines),
    ]
    if quick:
        return found
    profiled, heads = python("-m", "benches.gpu.profile"), python("-m", "benches.gpu.heads")
    of_heads = ["--shape", "65536,128,4096,32", "--heads", "32", "--columns", "ours compact"]
    more = ["--paths", "", "--columns", "default sparse compile"]
    return [
        *found,
        *sae[1:3],
        Stage("projection", python("-m", "benches.gpu.projection"), 90, 28, json_lines),
        Stage("heads", heads, 60, 24, json_lines),
        Stage("end to end", python("-m", "benches.gpu.end_to_end"), 60, 27, json_lines),
        sae[3],
        Stage(f"profile {first}", [*profiled, "--shape", first], 60, 20, json_lines),
        Stage("profile heads", [*profiled, *of_heads], 60, 14, json_lines),
        Stage("encode", python("-m", "benches.gpu.encode"), 40, 11, json_lines),
        Stage("profile projection", [*profiled, "--rank", "64"], 40, 0, json_lines, spare=True),
        Stage("more heads", [*heads, *more], 60, 0, json_lines, spare=True),
        *(
            Stage(
                f"more {shape}",
                python("-m", "benches.gpu.sae", "--shape", shape, "--columns", columns),
                60,
                0,
                json_lines,
                spare=True,
            )
            for shape, columns in MORE_COLUMNS.items()
        ),
    ]


def groups(found: Sequence[Stage]) -> list[list[Stage]]:
    """The stages in their order, neighbours that run at the same time in one list."""
    return [list(part) for _, part in itertools.groupby(found, key=lambda stage: stage.slot or stage.name)]


def allowed(stage: Stage, later: Sequence[Sequence[Stage]], left: float) -> float:
    """Seconds for a stage where `left` are left for it and the groups after it: none takes what belongs to another."""
    reserved = sum(max(other.share for other in group) for group in later)
    return min(stage.limit, max(left - reserved, min(stage.share, left)))


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
