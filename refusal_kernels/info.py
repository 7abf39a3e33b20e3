"""What is installed, what runs here, and why the rest does not: `python -m refusal_kernels.info [--json] [--check]`.

Written for the day something is broken: it comes through a damaged extension and a missing or damaged Triton, and says
so. `--check` runs every operator once, forward and gradients, on every back-end that is available here, and compares
with the fp64 reference; the exit code is 1 when one of them differs, raises, or the extension is there but cannot load.
Each check is a line on stderr as it ends: on a GPU they compile kernels for minutes, and what is cut off has said what
it came to.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import __version__, backends, native
from .backends.base import Request

PACKAGES = ("numpy", "transformers", "peft", "accelerate", "datasets", "safetensors", "typer", "tensorboard")


def collect(check: bool = False, ended: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
    """Everything this command reports, as plain values that json can write.

    Keys: versions, machine, gpus, extension, triton, environment, operators, and with `check` also checks. operators
    maps operator -> back-end -> {"devices": {device type: [reasons against it]}, "available": bool}, for fp32.
    `ended` is called with each check as it ends.
    """
    report: dict[str, Any] = {
        "versions": _versions(),
        "machine": _machine(),
        "gpus": _gpus(),
        "extension": _extension(),
        "triton": _triton(),
        "environment": {k: v for k, v in os.environ.items() if k.startswith(("REFUSAL_KERNELS_", "TRITON_"))},
    }
    if report["extension"]["error"] is not None:
        # It may have killed the process that tried to load it: nothing below may try again.
        sys.modules["refusal_kernels._C"] = None  # type: ignore[assignment]
    report["operators"] = _operators()
    if check:
        report["checks"] = []
        for result in _checks(report):
            report["checks"].append(result)
            if ended is not None:
                ended(result)
    return report


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"refusal_kernels": __version__, "python": platform.python_version()}
    versions["torch"] = torch.__version__
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def _machine() -> dict[str, Any]:
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _gpus() -> dict[str, Any]:
    """CUDA as torch sees it; `reason` says why there is no device."""
    report: dict[str, Any] = {"torch_cuda": torch.version.cuda, "driver": _driver(), "devices": [], "reason": None}
    if torch.version.cuda is None:
        report["reason"] = "this torch is built without CUDA"
    elif not torch.cuda.is_available():
        report["reason"] = "torch finds no CUDA device" + ("" if report["driver"] else "; no NVIDIA driver found")
    else:
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            report["devices"].append(
                {"name": p.name, "sm": f"{p.major}{p.minor}", "memory_gib": p.total_memory / 2**30}
            )
    return report


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return answer[0] if answer else None


def _extension() -> dict[str, Any]:
    """refusal_kernels._C: where it is, how it was built, or why it cannot be loaded."""
    spec = importlib.util.find_spec("refusal_kernels._C")
    report: dict[str, Any] = {"path": spec.origin if spec else None, "error": None, "build": None}
    # A truncated shared library kills the process that maps it (SIGBUS), so another process goes first.
    if spec is not None and "refusal_kernels._C" not in sys.modules:
        command = [sys.executable, "-c", "import torch, refusal_kernels._C"]
        probe = subprocess.run(command, capture_output=True, text=True, check=False)
        if probe.returncode < 0:
            report["error"] = f"loading it kills the process (signal {-probe.returncode}); build it again"
            return report
    report["error"] = native.load_error()
    module = native.module()
    if module is not None:
        report["build"] = dict(module.build_info())
        report["operators"] = {
            space: sorted(name for name in _operator_names(space))
            for space in ("refusal_kernels_cpu", "refusal_kernels_cuda")
        }
    return report


def _operator_names(namespace: str) -> set[str]:
    """Names of the torch operators of a namespace."""
    prefix = f"{namespace}::"
    names = torch._C._dispatch_get_all_op_names()
    return {name.removeprefix(prefix).split(".")[0] for name in names if name.startswith(prefix)}


def _triton() -> dict[str, Any]:
    report: dict[str, Any] = {"version": None, "error": None, "interpreter": os.environ.get("TRITON_INTERPRET") == "1"}
    if importlib.util.find_spec("triton") is None:
        report["error"] = "not installed"
        return report
    try:
        report["version"] = importlib.import_module("triton").__version__
    except Exception as error:  # whatever a damaged installation raises is the answer
        report["error"] = f"installed, but `import triton` fails: {type(error).__name__}: {error}"
    return report


def _operators() -> dict[str, dict[str, dict[str, Any]]]:
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for op, candidates in backends.registry().items():
        table[op] = {}
        for name, backend in candidates.items():
            reasons = {d: backend.not_supported_reasons(op, Request(d, torch.float32)) for d in devices}
            table[op][name] = {"devices": reasons, "available": any(not r for r in reasons.values())}
    return table


def _checks(report: dict[str, Any]) -> Any:
    """One result per operator, back-end and device that is available."""
    from . import selfcheck

    extension = report["extension"]
    if extension["path"] is not None:
        error = extension["error"]
        yield {"op": "import", "backend": "_C", "device": "cpu", "ok": error is None, "error": error, "seconds": 0.0}
    for op, row in report["operators"].items():
        for name, cell in row.items():
            for device in (d for d, reasons in cell["devices"].items() if not reasons):
                start = time.perf_counter()
                try:
                    error = selfcheck.check(op, name, device)
                except Exception as raised:  # the report is the place where it is told, the exit code follows
                    error = f"{type(raised).__name__}: {raised}"
                yield {
                    "op": op,
                    "backend": name,
                    "device": device,
                    "ok": error is None,
                    "error": error,
                    "seconds": time.perf_counter() - start,
                }


# -- for people --------------------------------------------------------------------------------------------------------


def render(report: dict[str, Any]) -> str:
    """The report as text: a header of facts, the table operator x back-end, the reasons, the results of the checks."""
    versions, machine, gpus = report["versions"], report["machine"], report["gpus"]
    others = ", ".join(f"{p} {versions[p] or 'missing'}" for p in PACKAGES)
    lines = [
        f"refusal_kernels  {versions['refusal_kernels']}",
        f"python           {versions['python']}, torch {versions['torch']}",
        f"packages         {others}",
        f"machine          {machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads",
        f"system           {machine['system']}",
        *_gpu_lines(gpus),
        *_extension_lines(report["extension"]),
        f"triton           {_triton_line(report['triton'])}",
    ]
    lines += [f"environment      {k}={v}" for k, v in sorted(report["environment"].items())]
    lines += ["", *_table(report)]
    failed = [c for c in report.get("checks", ()) if not c["ok"]]
    for result in failed:
        lines.append(f"FAILED  {result['op']} on {result['backend']} ({result['device']}): {result['error']}")
    if "checks" in report:
        lines.append(
            f"{len(report['checks']) - len(failed)} checks against the fp64 reference passed, {len(failed)} failed"
        )
    return "\n".join(lines)


def _gpu_lines(gpus: dict[str, Any]) -> list[str]:
    if gpus["reason"]:
        return [f"gpu              none: {gpus['reason']}"]
    return [
        f"gpu              {g['name']}, sm_{g['sm']}, {g['memory_gib']:.0f} GiB, "
        f"driver {gpus['driver'] or 'unknown'}, CUDA {gpus['torch_cuda']}"
        for g in gpus["devices"]
    ]


def _extension_lines(extension: dict[str, Any]) -> list[str]:
    lines = [f"_C               {extension['path'] or 'not built'}"]
    if extension["error"]:
        lines.append(f"                 {extension['error']}")
    build = extension["build"]
    if build:
        cuda = (
            f"CUDA {build['cuda_version']} for {', '.join(build['cuda_archs'])}"
            if build["cuda"]
            else f"without CUDA: {build['cuda_left_out']}"
        )
        lines.append(
            f"                 {build['compiler']} {build['flags']}, against torch {build['torch']} "
            f"(stable ABI of {build['torch_abi_target']}), commit {build['git_commit'] or 'unknown'}"
        )
        lines.append(f"                 {cuda}; CPU kernels use {build['isa']}")
    return lines


def _triton_line(triton: dict[str, Any]) -> str:
    if triton["error"]:
        return str(triton["error"])
    return f"{triton['version']}" + (", interpreter on (TRITON_INTERPRET=1)" if triton["interpreter"] else "")


def _table(report: dict[str, Any]) -> list[str]:
    """Cells name the devices an operator runs on; [n] points to the reason why it runs on none."""
    results = {(c["op"], c["backend"], c["device"]): c["ok"] for c in report.get("checks", ())}
    footnotes: list[str] = []
    rows = [["operator", *next(iter(report["operators"].values()))]]
    for op, row in report["operators"].items():
        cells = [op]
        for name, cell in row.items():
            runs_on = [
                device + {True: " ok", False: " FAILED", None: ""}[results.get((op, name, device))]
                for device, reasons in cell["devices"].items()
                if not reasons
            ]
            if not runs_on:
                # The last device is the GPU where there is one: the reasons that matter for a GPU back-end.
                reason = "; ".join(list(cell["devices"].values())[-1])
                if reason not in footnotes:
                    footnotes.append(reason)
                runs_on = [f"[{footnotes.index(reason) + 1}]"]
            cells.append(", ".join(runs_on))
        rows.append(cells)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [*lines, "", *(f"[{i}] {reason}" for i, reason in enumerate(footnotes, 1)), ""]


def _say(result: dict[str, Any]) -> None:
    """One line on stderr for a check that has ended."""
    error = " ".join(str(result["error"]).split())
    outcome = "ok" if result["ok"] else f"FAILED: {error}"
    where = f"{result['op']} on {result['backend']} ({result['device']})"
    print(f"check {where} {result['seconds']:.1f} s: {outcome}", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m refusal_kernels.info", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("--check", action="store_true", help="run each operator once against the reference")
    options = parser.parse_args(argv)
    report = collect(check=options.check, ended=_say)
    print(json.dumps(report, indent=2) if options.json else render(report))
    return int(any(not c["ok"] for c in report.get("checks", ())))


if __name__ == "__main__":
    sys.exit(main())
