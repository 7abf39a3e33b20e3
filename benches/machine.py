"""What a result was measured on: processor, memory, versions, commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

import refusal_kernels

DRIVER = Path("/proc/driver/nvidia/version")
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
        info |= describe_gpu(device)
    return info


def describe_gpu(device: str) -> dict[str, Any]:
    """Name, memory, second-level cache and kind of the GPU, and its driver: None where nothing tells, with
    "driver_unknown" saying why."""
    of = torch.cuda.get_device_properties(device)
    driver, unknown = _driver()
    info: dict[str, Any] = {
        "gpu": of.name,
        "capability": f"{of.major}.{of.minor}",
        "gpu_memory_gib": round(of.total_memory / 2**30, 1),
        "gpu_l2_mib": round(getattr(of, "L2_cache_size", 0) / 2**20, 1) or None,
        "multiprocessors": of.multi_processor_count,
        "driver": driver,
    }
    return info if driver else {**info, "driver_unknown": unknown}


def _driver() -> tuple[str | None, str]:
    """(version of NVIDIA's driver, why there is none): of nvidia-smi, else of the file that the kernel module has."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split()
        reason = "nvidia-smi names no driver"
    except FileNotFoundError:
        said, reason = [], "nvidia-smi is not in PATH"
    except (OSError, subprocess.SubprocessError) as error:
        said, reason = [], f"nvidia-smi: {type(error).__name__}"
    if said:
        return said[0], ""
    try:
        found = re.search(r"Kernel Module(?: for \S+)?\s+([\d.]+)", DRIVER.read_text())
    except OSError:
        return None, f"{reason}, and there is no {DRIVER}"
    return (found.group(1), "") if found else (None, f"{reason}, and {DRIVER} has no version")


def describe_versions() -> dict[str, str]:
    """Versions of what takes part, and of the compiled extension's own build; "cuda" is what torch was built with."""
    try:
        triton = importlib.metadata.version("triton")  # not imported: it may be broken
    except importlib.metadata.PackageNotFoundError:
        triton = "not installed"
    versions = {
        "refusal_kernels": refusal_kernels.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "triton": triton,
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
