"""What stands behind every GPU kernel: compiled, checked without a GPU, run on one; the README's block `kernels`.

A run of `benches.gpu` keeps a fingerprint of every kernel's sources. A kernel has been run on a device where a
committed run with the kernel's present fingerprint either passed all value tests or measured a row that goes through
it; where only runs with other sources did, an earlier form of it has. The value tests of a run show every value
of every parameter (`--thin`), not every configuration.
"""

from __future__ import annotations

import ast
import hashlib
import io
import json
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .gpu.table import KEPT
from .machine import ROOT

TRITON, CUDA = ROOT / "triton_kernels", ROOT / "csrc" / "cuda"
COMPILED_TRITON = "compiled for sm_80/90/100, interpreter-checked"
COMPILED_CUDA = "compiled for sm_80/90a/100/120"
# CUDA sources whose algorithm tests run thread by thread on the CPU (tests/cuda), by the header that holds it.
EMULATED = "run thread by thread on the CPU"
# Row of a measurement -> kernels that it cannot be had without.
GOES_THROUGH = {
    "encode, ours": ("encode.pivot", "encode.fold_bias", "encode.filter"),
    "encode, cuda filter": ("filter_rows",),
    "encode, int8 screen": ("int8.round", "int8.screen", "int8.settle"),
    "encode, batch top-k": ("encode_csr.count", "encode_csr.write"),
    "encode, threshold": ("encode_csr.count", "encode_csr.write"),
    "decode + residual, ours": ("decode",),
    "decode, CSR": ("decode",),
    "decode, cuda": ("sum_of_rows",),
    "backward, ours": ("backward.latent", "backward.combine"),
    "backward, cuda": ("latent_gradients",),
    "step, ours": ("sae_adam.step",),
    "step, ours, copies": ("sae_adam.step",),
    "step, cuda": ("filter_rows", "latent_gradients"),  # of runs before 2026-11-29
    "step, cuda, Adam inside": ("filter_rows", "adam_latents"),
    "step, cuda compact, Adam inside": ("filter_rows", "adam_latents"),
    "encode, all heads, grouped": ("encode.group", "encode.settle"),
    "optimizer, ours": ("projected_adam.coefficients", "projected_adam.update"),
    "ours": ("lora_projection.coefficients", "lora_projection.update", "projection.table"),
    "ours, one launch": ("lora_projection.lagged",),
    "ours, cuda": ("project_cluster",),
}


def triton_sources() -> dict[str, tuple[int, tuple[Path, ...]]]:
    """Kernel -> (number of configurations, its file and those of the kernel folder that the file imports)."""
    from refusal_kernels.triton_kernels.registry import configurations

    found: dict[str, tuple[int, tuple[Path, ...]]] = {}
    for configuration in configurations():
        name = configuration.label.partition("[")[0]
        count, files = found.get(name, (0, ()))
        found[name] = (count + 1, files or tuple(_imported(configuration.kernel.fn.__module__.rpartition(".")[2])))
    return found


def _imported(module: str) -> Iterator[Path]:
    """Files of the kernel folder that `module` is made of, itself first."""
    seen, waiting = set[str](), [module]
    while waiting:
        name = waiting.pop(0)
        path = TRITON / f"{name}.py"
        if name in seen or not path.exists():
            continue
        seen.add(name)
        yield path
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
                waiting.append(node.module)


def cuda_sources() -> dict[str, tuple[Path, ...]]:
    """Kernel -> its .cu file and the headers of the folder that this includes."""
    found = {}
    for source in sorted(CUDA.glob("*.cu")):
        text = source.read_text(encoding="utf-8")
        for name in re.findall(r"__global__\s+void\s+(?:__\w+__\s*\([^;{]*?\)\s+)*(\w+)\s*\(", text):
            found[name] = with_headers(source)
    return found


def with_headers(source: Path) -> tuple[Path, ...]:
    """A .cu file and the headers of the folder that it includes, directly or by another."""
    found, waiting = [source], [source]
    while waiting:
        for name in re.findall(r'#include "([^"]+)"', waiting.pop(0).read_text(encoding="utf-8")):
            path = CUDA / Path(name).name
            if path.exists() and path not in found:
                found.append(path)
                waiting.append(path)
    return tuple(found)


def fingerprint(files: tuple[Path, ...]) -> str:
    """Of the code in these files: comments, docstrings and layout do not count."""
    digest = hashlib.sha256()
    for path in files:
        text = path.read_text(encoding="utf-8")
        digest.update(path.name.encode())
        digest.update((words(text) if path.suffix == ".py" else _c(text)).encode())
    return digest.hexdigest()[:16]


def words(text: str) -> str:
    """Words of the source, not its syntax tree: that has other nodes in another version of Python."""
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node) is not None:
            said = node.body[0]
            for number in range(said.lineno - 1, said.end_lineno or said.lineno):
                lines[number] = ""
    without = "\n".join(lines) + "\n"
    lines = without.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(without).readline):
        if token.type == tokenize.COMMENT:
            lines[token.start[0] - 1] = lines[token.start[0] - 1][: token.start[1]]
    return " ".join(" ".join(lines).split())


def _c(text: str) -> str:
    return " ".join(re.sub(r"//[^\n]*|/\*.*?\*/", " ", text, flags=re.DOTALL).split())


def fingerprints() -> dict[str, str]:
    """Of every kernel, for a run to keep."""
    triton = {name: fingerprint(files) for name, (_, files) in triton_sources().items()}
    return {**triton, **{name: fingerprint(files) for name, files in cuda_sources().items()}}


def ran(kernel: str, result: dict[str, Any]) -> bool:
    """Whether a run of `benches.gpu` shows that the kernel ran and was right, or was measured."""
    if kernel not in result.get("kernels", {kernel: ""}):  # there was no such kernel yet
        return False
    values = result["stages"].get("values") or {}
    # What the tests launch of CUDA C++ is not told.
    if values.get("status") == "ok" and (kernel in values["result"]["launched"] or kernel in cuda_sources()):
        return True
    for stage in result["stages"].values():
        for row in stage["result"] if isinstance(stage["result"], list) else []:
            # Narrow rows are encoded without chunks, hence without the filter.
            grouped = row.get("path", "chunked") != "chunked"
            name = "encode, all heads, grouped" if grouped else row.get("name", "")
            if "ms" in row and "fault" not in row and kernel in GOES_THROUGH.get(name, ()):
                return True
    return False


def on_a_gpu(kernel: str, own: str, results: list[dict[str, Any]]) -> str:
    """The part of a status that says where the kernel has run; `results` from the newest to the oldest."""
    earlier = ""
    for result in results:
        if not ran(kernel, result):
            continue
        where = f"{result['machine']['gpu']}, {result['date'][:10]}"
        if result.get("kernels", {}).get(kernel) == own:
            return f"run on {where}"
        earlier = earlier or f"not yet run on a GPU in this form; an earlier one on {where}"
    return earlier or "not yet run on a GPU"


def kept(folder: Path = KEPT) -> list[dict[str, Any]]:
    """The committed runs, the newest first."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")]
    return sorted(found, key=lambda result: result["date"], reverse=True)


def block(results: list[dict[str, Any]] | None = None) -> str:
    """The README's block: a row per kernel."""
    results = kept() if results is None else results
    lines = ["| kernel | file | configurations | status |", "|---|---|---:|---|"]
    for name, (count, files) in triton_sources().items():
        where = on_a_gpu(name, fingerprint(files), results)
        lines.append(f"| {name} | {_link(files[0])} | {count} | {COMPILED_TRITON}, {where} |")
    for name, files in cuda_sources().items():
        checked = f", {EMULATED}" if any(path.stem.endswith(("_warp", "_team", "_block")) for path in files) else ""
        where = on_a_gpu(name, fingerprint(files), results)
        lines.append(f"| {name} | {_link(files[0])} | | {COMPILED_CUDA}{checked}, {where} |")
    return "\n".join(lines)


def _link(path: Path) -> str:
    return f"[{path.name}]({path.relative_to(ROOT)})"
