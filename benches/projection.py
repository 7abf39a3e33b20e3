"""`python -m benches.projection`: the gradients of a whole LoRA, projected in place, against PyTorch.

448 matrices: A [16, in] and B [out, 16] of the 7 linear layers of each of Llama-3-8B's 32 layers, fp32, 42 M numbers. A
loses its component along the input side (dim 1), B along the output side (dim 0). q, k, v share the basis of their
common input, gate and up theirs; every other matrix has its own.

    loop       w.sub_(u @ (u.T @ w)), or w.sub_((w @ u) @ u.T): what one writes first
    addmm      the same by addmm_, without a temporary of w's size: the best loop we know
    foreach    torch._foreach_mm and torch._foreach_sub_ on lists, where this torch has them
    ours       rk.ProjectionPlan.apply_, the plan built before
    floor      a copy that moves the bytes no implementation can avoid: matrices read and written, bases read

Columns take turns; before each call caches are filled with something else; times are the best call. The plan is
compared with fp64 before anything is timed.

Roofline, written down before measuring (2 cores of an AMD EPYC with AVX-512, fp32 copy 50 GB/s and 200 GFLOP/s both
cores): r = 8: 407 MB and 1.3 GFLOP, 8 ms of bytes and 7 ms of arithmetic, 10 ms where they overlap imperfectly; r = 64:
906 MB and 10.7 GFLOP, 54 ms of arithmetic over 18 ms of bytes; r = 128: 1.48 GB and 21.5 GFLOP, 107 ms of arithmetic.
A loop makes 1344 small calls of 2 threads each and is bound by them at r = 8; at r = 64 and 128 its products are
BLAS's and 16 wide, so that less than a factor of two is left.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

import refusal_kernels as rk

from . import machine
from .results import RESULTS

HIDDEN, KEYS, MLP = 4096, 1024, 14336
# (inputs, outputs, which basis of the layer's inputs): Llama-3-8B.
LINEARS = {
    "q_proj": (HIDDEN, HIDDEN, "attention"),
    "k_proj": (HIDDEN, KEYS, "attention"),
    "v_proj": (HIDDEN, KEYS, "attention"),
    "o_proj": (HIDDEN, HIDDEN, "heads"),
    "gate_proj": (HIDDEN, MLP, "mlp"),
    "up_proj": (HIDDEN, MLP, "mlp"),
    "down_proj": (MLP, HIDDEN, "neurons"),
}
LORA_RANK = 16
TOLERANCE = 1e-5  # of the largest number, against fp64

Entry = tuple[Tensor, Tensor, int]


def problem(layers: int, r: int, device: str) -> list[Entry]:
    """(matrix, basis [n, r], dim) of all LoRA matrices; bases of one size are copies of one, in memory of their own."""
    generator = torch.Generator().manual_seed(0)
    made: dict[int, Tensor] = {}

    def basis(n: int) -> Tensor:
        if n not in made:
            made[n] = rk.orthonormal_basis(torch.randn(n, r, generator=generator))
        return made[n].to(device, copy=True)

    entries = []
    for _ in range(layers):
        shared: dict[str, Tensor] = {}
        for inputs, outputs, name in LINEARS.values():
            if name not in shared:
                shared[name] = basis(inputs)
            entries.append((torch.randn(LORA_RANK, inputs, generator=generator).to(device), shared[name], 1))
            entries.append((torch.randn(outputs, LORA_RANK, generator=generator).to(device), basis(outputs), 0))
    return entries


def least_bytes(entries: list[Entry]) -> int:
    """Every matrix read and written, every distinct basis read, once."""
    bases = {u.data_ptr(): u.numel() * u.element_size() for _, u, _ in entries}
    return sum(2 * w.numel() * w.element_size() for w, _, _ in entries) + sum(bases.values())


def flops(entries: list[Entry]) -> int:
    """Two products of 2 n r per fibre."""
    return sum(4 * w.numel() * u.shape[1] for w, u, _ in entries)


def columns(entries: list[Entry], backend: str | None) -> dict[str, Callable[[], Any]]:
    """name -> one pass over all matrices. Projecting what was projected costs the same, so nothing is restored."""
    plan = rk.ProjectionPlan(entries, backend=backend)
    numbers = least_bytes(entries) // 8
    source, target = (torch.ones(numbers, device=entries[0][0].device) for _ in range(2))

    def loop() -> None:
        for w, u, dim in entries:
            w.sub_(u @ (u.T @ w) if dim == 0 else (w @ u) @ u.T)

    def addmm() -> None:
        for w, u, dim in entries:
            if dim == 0:
                w.addmm_(u, u.T @ w, alpha=-1)
            else:
                w.addmm_(w @ u, u.T, alpha=-1)

    def foreach() -> None:
        matrices = [w for w, _, _ in entries]
        left = [u.T if dim == 0 else w for w, u, dim in entries]
        right = [w if dim == 0 else u for w, u, dim in entries]
        inner = torch._foreach_mm(left, right)
        left = [u if dim == 0 else c for c, (_, u, dim) in zip(inner, entries, strict=True)]
        right = [c if dim == 0 else u.T for c, (_, u, dim) in zip(inner, entries, strict=True)]
        torch._foreach_sub_(matrices, torch._foreach_mm(left, right))

    found: dict[str, Callable[[], Any]] = {"loop": loop, "addmm": addmm}
    if hasattr(torch, "_foreach_mm"):
        found["foreach"] = foreach
    return {**found, "ours": plan.apply_, "floor": lambda: target.copy_(source)}


def check(entries: list[Entry], names: dict[str, Callable[[], Any]]) -> float:
    """Runs every column on fresh numbers, compares the first layer's matrices with fp64; the largest error of ours."""
    error = 0.0
    some = entries[: 2 * len(LINEARS)]
    for name, run in names.items():
        if name == "floor":
            continue
        for w, _, _ in entries:
            w.normal_()
        before = [w.double() for w, _, _ in some]
        run()
        for (w, u, dim), old in zip(some, before, strict=True):
            d = u.double()
            exact = old - (d @ (d.T @ old) if dim == 0 else (old @ d) @ d.T)
            off = ((w.double() - exact).abs().max() / exact.abs().max()).item()
            if not off <= TOLERANCE:
                raise AssertionError(
                    f"{name} is off by {off:.2g} of the largest number for {tuple(w.shape)}, dim {dim}"
                )
            error = max(error, off) if name == "ours" else error
    return error


def measure(names: dict[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every call, columns in turn, caches overwritten before each."""
    flush = torch.empty(64 << 20 >> 2, device=device)
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name, run in names.items():
            flush.fill_(1.0)
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    return times


def table(cases: list[dict[str, Any]]) -> str:
    """Milliseconds per column, and what ours makes of the machine."""
    names = list(cases[0]["columns"])
    lines = [["r", *names, "loop/ours", "addmm/ours", "GFLOP/s", "GB/s"]]
    for case in cases:
        best = {name: column["seconds"] for name, column in case["columns"].items()}
        lines.append([
            str(case["r"]),
            *(f"{best[name] * 1e3:.1f}" for name in names),
            *(f"{best[name] / best['ours']:.2f}" for name in ("loop", "addmm")),
            f"{case['flops'] / best['ours'] / 1e9:.0f}",
            f"{case['bytes'] / best['ours'] / 1e9:.1f}",
        ])  # fmt: skip
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in lines)


def newest(folder: Path = RESULTS / "projection") -> list[dict[str, Any]]:
    """The committed result of the latest date of every machine, latest first; FileNotFoundError where there is none."""
    found = sorted((json.loads(path.read_text()) for path in folder.glob("*.json")), key=lambda result: result["date"])
    if not found:
        raise FileNotFoundError(f"no results in {folder}: run `python -m benches.projection` first")
    return list({machine.slug(result["machine"]): result for result in found}.values())[::-1]


def block(found: list[dict[str, Any]]) -> str:
    """The README's block: conditions and table of every machine."""
    return "\n\n".join(map(_section, found))


def _section(result: dict[str, Any]) -> str:
    where, versions = result["machine"], result["versions"]
    lines = [
        f"{result['cases'][0]['matrices']} matrices, fp32, milliseconds on {where['cores']} cores of {where['cpu']} "
        f"({versions.get('isa', 'default')}), torch {versions['torch']}; commit {result['commit']}, "
        f"{result['date'][:10]}; `python -m benches.projection`.",
        "",
        "| basis | PyTorch loop | `addmm_` loop | `torch._foreach_mm` | ours | floor (copy of the bytes) | vs loop "
        "| floor vs loop | vs addmm |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for case in result["cases"]:
        ms = {name: 1000 * column["seconds"] for name, column in case["columns"].items()}
        shown = [f"{ms[name]:.1f}" if name in ms else "" for name in ("loop", "addmm", "foreach", "ours", "floor")]
        shown += [f"{ms['loop'] / ms[name]:.1f}×" for name in ("ours", "floor")]
        lines.append(f"| {case['r']} | " + " | ".join([*shown, f"{ms['addmm'] / ms['ours']:.1f}×"]) + " |")
    return "\n".join(lines)


def main(
    ranks: Annotated[str, typer.Option(help="Columns of the bases, separated by spaces.")] = "8 64 128",
    layers: Annotated[int, typer.Option(min=1, help="Layers of the model.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of every column.")] = 8,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    backend: Annotated[str | None, typer.Option(help="Back-end of our column; default: what auto takes.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of every column; default: torch's own.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Result file; default benches/results/projection/<machine>-<date>.json.")
    ] = None,
) -> None:
    """Times the projection of all LoRA gradients of Llama-3-8B; prints a table and writes JSON."""
    if not all(rank.isdecimal() and 0 < int(rank) <= KEYS for rank in ranks.split()):
        raise typer.BadParameter(f"ranks are integers from 1 to {KEYS}; got {ranks!r}", param_hint="--ranks")
    if threads is not None:
        torch.set_num_threads(threads)
    result: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine.describe_machine(device),
        "versions": machine.describe_versions(),
        "commit": machine.describe_commit(),
        "layers": layers,
        "lora_rank": LORA_RANK,
        "cases": [],
    }
    for rank in map(int, ranks.split()):
        with torch.no_grad():
            entries = problem(layers, rank, device)
            names = columns(entries, backend)
            error = check(entries, names)
            times = measure(names, rounds, entries[0][0].device)
        result["cases"].append({
            "r": rank,
            "matrices": len(entries),
            "bytes": least_bytes(entries),
            "flops": flops(entries),
            "backend": rk.last_backend("project_out"),
            "max_error": error,
            "columns": {
                name: {"seconds": min(calls), "median": statistics.median(calls), "calls": calls}
                for name, calls in times.items()
            },
        })  # fmt: skip
        print(f"r = {rank}: {len(entries)} matrices, error {error:.1e}, {result['cases'][-1]['backend']}", flush=True)
        del entries, names
    print(f"\nmilliseconds, best of {rounds} turns, {torch.get_num_threads()} threads\n\n{table(result['cases'])}")
    if out is None:
        out = RESULTS / "projection" / f"{machine.slug(result['machine'])}-{result['date'][:10]}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\nwritten: {out}")


if __name__ == "__main__":
    typer.run(main)
