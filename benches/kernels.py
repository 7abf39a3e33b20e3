"""`python -m benches kernels`: every GPU kernel × shipped configuration, compiled without a GPU, as a table.

Triton kernels are compiled ahead of time (refusal_kernels.triton_kernels.aot), CUDA C++ ones by nvcc where it is found.
The table says what ptxas made of each: registers of a thread, shared memory of a program, stack bytes if there are any,
the matrix instruction; and for the kernel that does an operator's work in the canonical training step, the time that
benches/gpu/model.py predicts on an H200. It is committed as benches/kernels.md.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .gpu import model
from .machine import ROOT
from .shapes import Shape

TABLE = ROOT / "benches" / "kernels.md"
TRITON, CUDA = (80, 90, 100), ("80", "90a", "100", "120")
CANONICAL = Shape(32768, 4096, 131072, 64)
# What the H200 of benches/results/gpu did, rounded: TFLOP/s of a bf16 product, GB/s of a copy.
H200 = model.Device(756, 4220)
# Label of a kernel -> (what it does in a step at CANONICAL, milliseconds).
IN_A_STEP = {
    "encode.filter[k<=64]": (
        "filter of all pre-activations",
        H200.buffered(model.filter_bytes(CANONICAL), model.buffer_of(CANONICAL)[1]),
    ),
    "decode[bf16,i64,256+bias+residual]": ("reconstruction and residual", model.decode_ms(CANONICAL, H200)),
    "backward.latent[bf16,i32,4096,=]": (
        "gradients of both weights", model.latents_ms(CANONICAL, H200, model.WIDE),
    ),
    "sae_adam.step[bf16,fp32,i32,4096]": (
        "gradients and optimiser", model.latents_ms(CANONICAL, H200, model.ADAM_BYTES),
    ),
}  # fmt: skip


def triton_kernels(workers: int) -> list[dict[str, Any]]:
    """What `refusal_kernels.triton_kernels.aot` prints for every configuration and architecture."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_DISABLE_LINE_INFO"] = "1"

    def part(number: int) -> list[dict[str, Any]]:
        command = [sys.executable, "-m", "refusal_kernels.triton_kernels.aot", "--part", f"{number}/{workers}"]
        command += ["--capability", *map(str, TRITON)]
        run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
        return [json.loads(line) for line in run.stdout.splitlines()]

    with ThreadPoolExecutor(workers) as pool:
        return [kernel for found in pool.map(part, range(workers)) for kernel in found]


def nvcc() -> str | None:
    """Where the build looks for it, too."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")


def cuda_kernels(compiler: str) -> list[dict[str, Any]]:
    """ptxas's report of every kernel of csrc/cuda and architecture."""
    found = []
    for source in sorted((ROOT / "csrc/cuda").glob("*.cu")):
        with tempfile.TemporaryDirectory() as folder:
            flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in CUDA]
            command = [compiler, "-std=c++20", "--threads", "2", "-Xptxas", "-v", *flags, "-c", str(source)]
            run = subprocess.run([*command, "-o", f"{folder}/out.o"], capture_output=True, text=True, check=True)
        found += ptxas_report(source.name, run.stdout + run.stderr)
    return found


def ptxas_report(source: str, text: str) -> list[dict[str, Any]]:
    """Kernels of nvcc's -Xptxas -v output; mangled names are undone where c++filt is found."""
    names = re.findall(r"Compiling entry function '(\w+)' for 'sm_(\w+)'", text)
    frames = re.findall(r"(\d+) bytes stack frame", text)
    used = re.findall(r"Used (\d+) registers(?:[^\n]*?(\d+) bytes smem)?", text)
    plain = [name for name, _ in names]
    if plain and (tool := shutil.which("c++filt")) is not None:
        plain = subprocess.run([tool, *plain], capture_output=True, text=True, check=True).stdout.splitlines()
    return [
        {
            "label": f"{source}: {short(name)}", "capability": capability, "registers": int(registers),
            "shared": int(shared or 0), "stack": int(stack), "matrix_instruction": "",
        }
        for name, (_, capability), stack, (registers, shared) in zip(plain, names, frames, used, strict=True)
    ]  # fmt: skip


def short(name: str) -> str:
    """`kernel<template arguments>` of a demangled name, without namespaces and parameters."""
    name = re.sub(r"\(anonymous namespace\)::|\brk::|\bcuda::|^void ", "", name)
    depth = 0
    for at, letter in enumerate(name):
        depth += {"<": 1, ">": -1}.get(letter, 0)
        if letter == "(" and depth == 0 and not name[at:].startswith("(int)") and not name[at:].startswith("(bool)"):
            return name[:at]
    return name


def rows_of(kernels: Sequence[dict[str, Any]], architectures: Sequence[int | str]) -> list[str]:
    """A markdown row per label: registers and shared KB per architecture, a dash where it is not compiled."""
    by_label: dict[str, dict[str, dict[str, Any]]] = {}
    for kernel in kernels:
        by_label.setdefault(kernel["label"], {})[str(kernel["capability"])] = kernel
    lines = []
    for label, found in by_label.items():
        cells = [_cell(found.get(str(at))) for at in architectures]
        lines.append(f"| `{label}` | " + " | ".join(cells) + " |")
    return lines


def _cell(kernel: dict[str, Any] | None) -> str:
    if kernel is None:
        return "–"
    cell = f"{kernel['registers']} / {kernel['shared'] / 1024:.3g}"
    cell += f" {kernel['matrix_instruction']}" if kernel["matrix_instruction"] else ""
    return cell + (f" **stack {kernel['stack']}**" if kernel["stack"] else "")


def text(triton: Sequence[dict[str, Any]], cuda: Sequence[dict[str, Any]], versions: str) -> str:
    """The whole file."""

    def head(architectures: Sequence[int | str]) -> list[str]:
        names = " | ".join(f"sm_{at}" for at in architectures)
        return [f"| kernel | {names} |", "|---|" + "---|" * len(architectures)]

    lines = [
        "# GPU kernels as compiled",
        "",
        f"Written by `python -m benches kernels`; {versions}. Registers of a thread / KiB of shared memory of a "
        "program, and the matrix instruction where there is one; none has a stack frame unless it is named. "
        "Configurations that differ from another in a dtype, an index type or a flag only are compiled for sm_90.",
        "",
        "Predicted for the canonical step, N 32768, d 4096, F 131072, k 64, bf16, on an H200 of "
        f"{H200.tflops:.0f} TFLOP/s and {H200.gbps / 1e3:.2f} TB/s ([model](gpu/model.py)):",
        "",
        "| kernel | what it does there | predicted, ms |",
        "|---|---|---:|",
        *(f"| `{label}` | {what} | {ms:.2f} |" for label, (what, ms) in IN_A_STEP.items()),
    ]
    families: dict[str, list[dict[str, Any]]] = {}
    for kernel in triton:
        families.setdefault(kernel["label"].split("[")[0], []).append(kernel)
    for family in sorted(families):
        members = sorted(families[family], key=lambda kernel: kernel["label"])
        lines += ["", f"## Triton: {family}", "", *head(TRITON), *rows_of(members, TRITON)]
    if cuda:
        lines += ["", "## CUDA C++", "", *head(CUDA), *rows_of(cuda, CUDA)]
    return "\n".join(lines) + "\n"


def write(path: Path = TABLE) -> Path:
    """Compiles everything, some minutes on two cores, and writes the table."""
    import triton

    compiler = nvcc()
    versions = f"Triton {triton.__version__}"
    cuda: list[dict[str, Any]] = []
    if compiler is not None:
        cuda = cuda_kernels(compiler)
        release = re.search(r"release ([\d.]+)", subprocess.check_output([compiler, "--version"], text=True))
        versions += f", nvcc {release[1]}" if release else ""
    path.write_text(text(triton_kernels(max(2, os.cpu_count() or 2)), cuda, versions), encoding="utf-8")
    return path
