"""What a result was measured on: processor, memory, versions, commit."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

import refusal_kernels

ROOT = Path(__file__).resolve().parent.parent
# Instruction sets that decide which kernels run; the full list of flags says nothing more.
FLAGS = (
    "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx512_bf16",
    "amx_tile", "amx_bf16", "asimd", "sve", "bf16",
)  # fmt: skip


def _cpuinfo(field: str) -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
    found = re.search(rf"^{field}\s*:\s*(.*)$", text, flags=re.MULTILINE)
    return found.group(1).strip() if found else ""


def _caches() -> dict[str, str]:
    """{"L1d": "48K", ...} of the first core."""
    sizes = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        kind, level = (index / "type").read_text().strip(), (index / "level").read_text().strip()
        if kind != "Instruction":
            sizes[f"L{level}" + ("d" if kind == "Data" else "")] = (index / "size").read_text().strip()
    return sizes


def describe_machine(device: str) -> dict[str, Any]:
    """Processor, cores, caches, memory, instruction sets; the GPU as well when the run is on one."""
    flags = set((_cpuinfo("flags") or _cpuinfo("Features")).split())
    info: dict[str, Any] = {
        "cpu": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "flags": [flag for flag in FLAGS if flag in flags],
        "caches": _caches(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "libc": " ".join(platform.libc_ver()),
    }
    if device != "cpu":
        info["gpu"] = torch.cuda.get_device_name(device)
    return info


def describe_versions() -> dict[str, str]:
    """Versions of what takes part, and of the compiled extension's own build."""
    versions = {
        "refusal_kernels": refusal_kernels.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "blas": next(
            (line.strip(" -") for line in torch.__config__.show().splitlines() if "Math Kernel" in line), "unknown"
        ),
    }
    try:
        from refusal_kernels import _C

        build = _C.build_info()
        versions |= {"compiler": build["compiler"], "isa": build["isa"]}
    except ImportError as error:
        versions["extension"] = f"not loaded: {error.msg.split(' (')[0]}"  # without the path of this machine
    return versions


def describe_commit() -> str:
    """The checked-out commit, "-dirty" appended when files differ from it; "unknown" outside a git checkout."""
    try:
        run = {"cwd": ROOT, "capture_output": True, "text": True, "check": True}
        commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], **run).stdout.strip()  # type: ignore[call-overload]
        status = subprocess.run(["git", "status", "--porcelain", "--untracked-files=no"], **run)  # type: ignore[call-overload]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("-dirty" if status.stdout.strip() else "")


def slug(machine: dict[str, Any]) -> str:
    """A short file name for a machine: what computes, and how many of it."""
    if "gpu" in machine:
        return re.sub(r"[^a-z0-9]+", "-", machine["gpu"].lower()).strip("-")
    name = re.sub(r"\((r|tm)\)|processor|cpu|@", " ", machine["cpu"].lower())
    return re.sub(r"[^a-z0-9.]+", "-", name).strip("-") + f"-{machine['cores']}cores"
