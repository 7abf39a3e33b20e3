"""`python -m benches kernels`: every GPU kernel × shipped configuration, compiled without a GPU, as a table.

Triton kernels are compiled ahead of time (refusal_kernels.triton_kernels.aot), every configuration for every
architecture, CUDA C++ ones by nvcc where it is found. The table says what ptxas made of each: registers of a thread,
shared memory of a program, stack bytes if there are any, the matrix instructions; and for the kernels that do an
operator's work in the canonical training step, the time that benches/gpu/model.py predicts on an H200. It is committed
as benches/kernels.md.

A section has the fingerprint of what it was compiled from: the kernel's code with all that it calls, and its
configurations; or the CUDA source with its headers. What is current is kept, the rest compiled; tests ask that all is
current (tests/test_gpu_status.py), and that what they compile themselves comes out the same (tests/test_triton_aot.py).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from . import status
from .gpu import model
from .machine import ROOT
from .shapes import Shape

TABLE = ROOT / "benches" / "kernels.md"
TRITON, CUDA = (80, 90, 100), ("80", "90a", "100", "120")
CANONICAL = Shape(32768, 4096, 131072, 64)


def _product(s: Shape, at: model.Device) -> float:
    return at.compute(model.product_flops(s))


def _filter(s: Shape, at: model.Device) -> float:
    return at.buffered(model.filter_bytes(s), model.buffer_of(s)[1])


def _backward(s: Shape, at: model.Device) -> float:
    return model.latents_ms(s, at, model.WIDE)


def _step(s: Shape, at: model.Device) -> float:
    return model.latents_ms(s, at, model.ADAM_BYTES)


def _compact_step(s: Shape, at: model.Device) -> float:
    return model.latents_ms(s, at, model.COMPACT_ADAM_BYTES)


# Kernel -> (what it does in a step at CANONICAL, milliseconds at a device's rates): every kernel that the model has a
# term for. CUDA C++ ones stand for all their template arguments.
IN_A_STEP: dict[str, tuple[str, Callable[[Shape, model.Device], float]]] = {
    "encode.gemm[bf16]": ("product, where cuBLAS does not take it", _product),
    "encode.filter[k<=64]": ("filter of all pre-activations", _filter),
    "row_filter.cu: filter_rows": ("filter of all pre-activations", _filter),
    "int8.product": ("8-bit product, likewise", lambda s, at: _product(s, at) / model.INTEGER_RATE),
    "int8.screen[k<=64]": ("screen of all 8-bit products", _filter),
    "int8.settle[bf16,k<=64]": ("what the screen leaves", model.settle_ms),
    "decode[bf16,i64,256+bias+residual]": ("reconstruction and residual", model.decode_ms),
    "backward.latent[bf16,i32,4096,=]": ("gradients of both weights", _backward),
    "sae_backward.cu: latent_gradients": ("gradients of both weights", _backward),
    "sae_adam.step[bf16,fp32,i32,4096-parallel]": ("gradients and optimiser", _step),
    "sae_adam.step[bf16,fp32,i32,4096+copies-parallel]": ("gradients, optimiser and copies", _step),
    "sae_adam.cu: adam_latents": ("gradients, optimiser and copies", _step),
    "sae_adam.step[bf16,halves+bf16 moments,i32,4096-parallel]": ("the same on compact state", _compact_step),
}  # fmt: skip


def rates() -> tuple[model.Device, str]:
    """What the newest committed run measured of its device, and which run that is."""
    for result in status.kept():
        stage = result["stages"].get("limits") or {}
        if stage.get("status") == "ok" and (device := model.Device.of(stage["result"])) is not None:
            return device, f"{result['machine']['gpu']}, {result['date'][:10]}"
    raise FileNotFoundError(f"no run in {status.KEPT} has measured a device's limits")


def family(label: str) -> str:
    return label.partition("[")[0]


def fingerprints() -> dict[str, str]:
    """Of every section of the table: what it is compiled from."""
    from refusal_kernels.triton_kernels.launch import FP_FUSION
    from refusal_kernels.triton_kernels.registry import configurations

    found: dict[str, list[str]] = {}
    sources: dict[Any, str] = {}
    for c in configurations():
        if c.kernel not in sources:
            sources[c.kernel] = json.dumps(source_of(c.kernel), sort_keys=True)
            found.setdefault(family(c.label), []).append(sources[c.kernel])
        tiles = (dict(c.tiles.constexprs), c.tiles.num_warps, c.tiles.num_stages, FP_FUSION)
        found.setdefault(family(c.label), []).append(repr((c.label, dict(c.signature), tiles, c.divisible_by_16)))
    prints = {f"Triton: {name}": hashlib.sha256("\n".join(of).encode()).hexdigest()[:16] for name, of in found.items()}
    for path in sorted(status.CUDA.glob("*.cu")):
        prints[f"CUDA C++: {path.name}"] = status.fingerprint(status.with_headers(path))
    return prints


def source_of(kernel: Any) -> dict[str, str]:
    """The words of a Triton kernel and of all that it calls, and the constants that these name."""
    import triton.language as tl
    from triton.runtime.jit import JITFunction

    found: dict[str, str] = {}
    waiting = [kernel]
    while waiting:
        function = waiting.pop()
        place = f"{function.fn.__module__}.{function.fn.__name__}"
        if place in found:
            continue
        found[place] = status.words(function.src)
        for name in function.fn.__code__.co_names:
            value = function.fn.__globals__.get(name)
            if isinstance(value, JITFunction) and not value.fn.__module__.startswith("triton."):
                waiting.append(value)
            elif isinstance(value, tl.constexpr):
                found[f"{place}: {name}"] = repr(value.value)
    return found


def triton_kernels(workers: int, families: Iterable[str]) -> list[dict[str, Any]]:
    """What `refusal_kernels.triton_kernels.aot` prints for every configuration and architecture."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_DISABLE_LINE_INFO"] = "1"
    match = rf"^({'|'.join(map(re.escape, families))})(\[|$)"

    def part(number: int) -> list[dict[str, Any]]:
        command = [sys.executable, "-m", "refusal_kernels.triton_kernels.aot", "--part", f"{number}/{workers}"]
        command += ["--all", "--match", match, "--capability", *map(str, TRITON)]
        run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
        return [json.loads(line) for line in run.stdout.splitlines()]

    with ThreadPoolExecutor(workers) as pool:
        return [kernel for found in pool.map(part, range(workers)) for kernel in found]


def nvcc() -> str | None:
    """Where the build looks for it, too."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")


def cuda_kernels(compiler: str, names: Iterable[str]) -> list[dict[str, Any]]:
    """ptxas's report of every kernel of these files of csrc/cuda and architecture."""
    found = []
    for name in sorted(names):
        source = status.CUDA / name
        with tempfile.TemporaryDirectory() as folder:
            flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in CUDA]
            command = [compiler, "-std=c++20", "--threads", "2", "-Xptxas", "-v", *flags, "-c", str(source)]
            run = subprocess.run([*command, "-o", f"{folder}/out.o"], capture_output=True, text=True, check=True)
        found += ptxas_report(source.name, run.stdout + run.stderr)
    sizes = dynamic_bytes(compiler)
    for kernel in found:
        kernel["dynamic"] = dynamic_of(kernel["label"], sizes)
    return found


# Prints what launchers ask for beyond what ptxas sees, from the functions that they call.
_SIZES = """
#include <cstdio>
#include "projection.h"
#include "sae_adam.h"
#include "sae_backward.h"
using namespace rk::cuda;
int main() {
  for (const auto& shape : kProjectionShapes) std::printf("project %d\\n", shape.shared_bytes());
  for (const auto& shape : kBackwardShapes) {
    std::printf("latent_gradients %d\\n", shape.teams() * backward_team_bytes(shape));
    std::printf("adam_latents %d\\n", shape.teams() * adam_team_bytes(shape));
  }
}
"""


def dynamic_bytes(compiler: str) -> dict[str, list[int]]:
    """Kernels that take dynamic shared memory -> bytes of a block by number of the shape."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "sizes.cpp"
        source.write_text(_SIZES, encoding="utf-8")
        program = f"{folder}/sizes"
        command = [compiler, "-std=c++20", f"-I{status.CUDA}", str(source), "-o", program]
        subprocess.run(command, capture_output=True, text=True, check=True)
        lines = subprocess.run([program], capture_output=True, text=True, check=True).stdout.splitlines()
    found: dict[str, list[int]] = {}
    for name, size in map(str.split, lines):
        found.setdefault(name, []).append(int(size))
    return found


def dynamic_of(label: str, sizes: Mapping[str, Sequence[int]]) -> int:
    """Bytes of a block of a kernel whose template arguments have the number of its shape, else 0."""
    name = label.partition(": ")[2]
    for prefix, of_shapes in sizes.items():
        if name.startswith(prefix) and (number := re.search(r"[<, ](\d+)\b", name)):
            return of_shapes[int(number[1])]
    return 0


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
        cells = [cell(found.get(str(at))) for at in architectures]
        lines.append(f"| `{label}` | " + " | ".join(cells) + " |")
    return lines


def cell(kernel: Mapping[str, Any] | None) -> str:
    """What the table says of one kernel on one architecture."""
    if kernel is None:
        return "–"
    text = f"{kernel['registers']} / {kernel['shared'] / 1024:.3g}"
    text += f" + {kernel['dynamic'] / 1024:.3g}" if kernel.get("dynamic") else ""
    text += f" {kernel['matrix_instruction']}" if kernel["matrix_instruction"] else ""
    return text + (f" **stack {kernel['stack']}**" if kernel["stack"] else "")


def sections(text: str) -> dict[str, tuple[str, list[str]]]:
    """Name of a section -> its fingerprint and its rows, of a table as `text_of` writes it."""
    pattern = r"^## (.+)\n\nFingerprint `(\w+)`\.\n\n\|.*\n\|.*\n((?:\|.*\n)*)"
    return {name: (own, rows.splitlines()) for name, own, rows in re.findall(pattern, text, flags=re.MULTILINE)}


def cells(text: str) -> dict[str, list[str]]:
    """Label -> its cells, one for each architecture."""
    found = {}
    for _, rows in sections(text).values():
        for row in rows:
            label, *rest = row.strip("| ").split(" | ")
            found[label.strip("`")] = rest
    return found


def stale(text: str) -> list[str]:
    """Sections that a table lacks, and those whose kernels or configurations are others by now."""
    known = sections(text)
    return [name for name, own in fingerprints().items() if name not in known or known[name][0] != own]


def text_of(found: Mapping[str, tuple[str, Sequence[str]]], versions: str) -> str:
    """The whole file from its sections."""
    device, where = rates()
    lines = [
        "# GPU kernels as compiled",
        "",
        f"Written by `python -m benches kernels`; {versions}. Registers of a thread / KiB of shared memory of a "
        "program, for CUDA C++ static + dynamic, and the matrix instructions where there are any; none has a stack "
        "frame unless it is named. Every configuration is compiled for every architecture.",
        "",
        "Predicted for the canonical step, N 32768, d 4096, F 131072, k 64, bf16, at "
        f"{device.tflops:.0f} TFLOP/s and {device.gbps / 1e3:.2f} TB/s ({where}; [model](gpu/model.py)); the model has "
        "no term for other kernels:",
        "",
        "| kernel | what it does there | predicted, ms |",
        "|---|---|---:|",
        *(f"| `{label}` | {what} | {ms(CANONICAL, device):.2f} |" for label, (what, ms) in IN_A_STEP.items()),
    ]
    for name in sorted(found, key=lambda name: (name.startswith("CUDA"), name)):
        own, rows = found[name]
        names = [f"sm_{at}" for at in (CUDA if name.startswith("CUDA") else TRITON)]
        lines += ["", f"## {name}", "", f"Fingerprint `{own}`.", ""]
        lines += [f"| kernel | {' | '.join(names)} |", "|---|" + "---|" * len(names), *rows]
    return "\n".join(lines) + "\n"


def write(path: Path = TABLE) -> Path:
    """Compiles what is not current, all of it in half an hour of two cores, and writes the table."""
    import triton

    compiler = nvcc()
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    version = f"Triton {triton.__version__}"
    release = compiler and re.search(r"release ([\d.]+)", subprocess.check_output([compiler, "--version"], text=True))
    by_nvcc = f"nvcc {release[1]}" if release else re.search(r"nvcc [\d.]+", before)
    by_nvcc = by_nvcc if isinstance(by_nvcc, str) or by_nvcc is None else by_nvcc[0]
    prints = fingerprints()
    kept = {
        name: old
        for name, old in sections(before).items()
        if prints.get(name) == old[0]
        and (f" {version}," in before if name.startswith("Triton") else f"{by_nvcc}. " in before)
    }
    wanted = [name.partition(": ")[::2] for name in prints if name not in kept]
    if families := [name for kind, name in wanted if kind == "Triton"]:
        kept |= _sections_of(triton_kernels(max(2, os.cpu_count() or 2), families), TRITON, prints, "Triton: ")
    if compiler is not None and (files := [name for kind, name in wanted if kind == "CUDA C++"]):
        kept |= _sections_of(cuda_kernels(compiler, files), CUDA, prints, "CUDA C++: ")
    versions = f"{version}, {by_nvcc}" if by_nvcc else version
    path.write_text(text_of(kept, versions), encoding="utf-8")
    return path


def _sections_of(
    kernels: Sequence[dict[str, Any]], architectures: Sequence[int | str], prints: Mapping[str, str], kind: str
) -> dict[str, tuple[str, list[str]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for kernel in kernels:
        name = kernel["label"].partition(": ")[0] if kind.startswith("CUDA") else family(kernel["label"])
        found.setdefault(kind + name, []).append(kernel)
    for of in found.values():
        of.sort(key=lambda kernel: kernel["label"])
    return {name: (prints[name], rows_of(of, architectures)) for name, of in found.items()}
