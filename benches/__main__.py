"""`python -m benches` runs the benchmarks, prints and writes results; `readme`, `show`, `plot` use results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import typer

from . import experiment, machine, premises, projection, results, status
from .gpu import block as gpu_block
from .plot import draw
from .shapes import COLUMNS, GROUPS, SHAPES, Shape

# glibc gives big freed blocks back to the system and takes page faults for every [N, F] temporary; raised beyond all
# sizes here, freed blocks stay. It is the setting under which PyTorch's columns look best.
MALLOC = {
    "default": {},
    "tuned": {
        "MALLOC_TOP_PAD_": str(256 << 20),
        "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
        "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
    },
}

app = typer.Typer(add_completion=False, help="Benchmarks of refusal_kernels.")


@app.callback(invoke_without_command=True)
def run(
    context: typer.Context,
    shapes: Annotated[str, typer.Option(help="N,d,F,k; several separated by spaces.")] = " ".join(map(str, SHAPES)),
    groups: Annotated[
        str, typer.Option(help="Of encode, decode, backward, step, crossover; separated by spaces.")
    ] = " ".join((*GROUPS, "crossover")),
    out: Annotated[
        Path | None, typer.Option(help="Result file; default benches/results/[quick/]<machine>-<date>.json.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of every column.")] = 4,
    quick: Annotated[bool, typer.Option("--quick", help="The first shape only, fewer turns, default malloc.")] = False,
    columns: Annotated[str, typer.Option(help="Columns to run; separated by spaces.")] = " ".join(
        (*COLUMNS, "autograd")
    ),
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    backend: Annotated[str | None, typer.Option(help="Back-end of our column; default: what auto takes.")] = None,
) -> None:
    """Runs all groups with and without malloc tuning, prints tables, writes JSON and SVG."""
    if context.invoked_subcommand is not None:
        return
    try:
        chosen = [Shape.parse(text) for text in shapes.split()]
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--shapes") from None
    wanted = groups.split()
    if unknown := [g for g in wanted if g not in (*GROUPS, "crossover")]:
        raise typer.BadParameter(f"unknown group {unknown[0]!r}", param_hint="--groups")
    if quick:
        chosen, rounds = chosen[:1], min(rounds, 2)
        wanted = [g for g in wanted if g != "crossover"]
    # malloc settings are glibc's, for the CPU.
    mallocs = ["default"] if quick or device != "cpu" else list(MALLOC)
    result: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine.describe_machine(device),
        "versions": machine.describe_versions(),
        "commit": machine.describe_commit(),
        "settings": [],
        "crossover": [],
    }
    if (load := result["machine"]["load"]) is not None and load > 0.5:
        print(f"Other work is running on this machine (load {load}): times will be disturbed.", file=sys.stderr)
    options = ["--device", device, *(["--backend", backend] if backend else [])]
    main_groups = [g for g in wanted if g in GROUPS]
    for malloc in mallocs if main_groups else []:
        arguments = ["--shapes", " ".join(map(str, chosen)), "--groups", " ".join(main_groups), "--rounds", str(rounds)]
        arguments += ["--columns", columns]
        cases = measure([*arguments, *options, *([] if malloc == "default" else ["--no-memory"])], malloc)
        result["settings"].append({"malloc": malloc, "environment": MALLOC[malloc], "rounds": rounds, "cases": cases})
    if "crossover" in wanted:
        result["crossover"] = measure(["--groups", "crossover", "--rounds", str(min(rounds, 3)), *options], "default")
    show(result)
    if out is None:
        name = f"{machine.slug(result['machine'])}-{result['date'][:10]}"
        # Not beside the full results, of which the README shows the newest.
        out = results.RESULTS / "quick" / f"{name}.json" if quick else results.RESULTS / f"{name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\nwritten: {out}")
    if result["settings"]:
        draw(result, out.with_suffix(".svg"))
        print(f"written: {out.with_suffix('.svg')}")


def measure(arguments: list[str], malloc: str) -> list[dict[str, Any]]:
    """Runs pytest in a process of its own, as malloc reads its settings at the start; returns the merged cases."""
    file = "bench_crossover.py" if "crossover" in arguments else "bench_groups.py"
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record.json"
        command = [
            *(
                sys.executable,
                "-m",
                "pytest",
                str(machine.ROOT / "benches" / file),
                "-q",
                "--no-header",
                "--tb=line",
            ),
            *(
                "-p",
                "no:cacheprovider",
                "-p",
                "no:hypothesispytest",
                "--benchmark-only",
                "--benchmark-quiet",
                f"--benchmark-json={record}",
            ),
            *arguments,
        ]
        print(f"--- {malloc} malloc settings: {' '.join(arguments)}", flush=True)
        finished = subprocess.run(command, cwd=machine.ROOT, env=os.environ | MALLOC[malloc])
        if finished.returncode != 0:
            raise typer.Exit(finished.returncode)
        return results.merge(json.loads(record.read_text()))


def show(result: dict[str, Any]) -> None:
    """Prints a result: machine, tables, details, crossover."""
    info, versions = result["machine"], result["versions"]
    print(f"\n{info.get('gpu') or info['cpu']}, {info['cores']} cores, {' '.join(info['flags'])}")
    print(", ".join(f"{name} {version}" for name, version in versions.items()) + f", commit {result['commit']}")
    for setting in result["settings"]:
        environment = " ".join(f"{k}={v}" for k, v in setting["environment"].items())
        print(f"\nmalloc: {setting['malloc']} {environment}\nmilliseconds, best of {setting['rounds']} turns\n")
        print(results.text_table(setting["cases"]))
    for setting in result["settings"][:1]:
        print(f"\nBehind the times ({setting['malloc']} malloc):\n{results.details(setting['cases'])}")
    for group in ("decode", "step") if result["crossover"] else ():
        n, d = result["crossover"][0]["shape"][:2]
        print(f"\nCrossover, {group}, N = {n}, d = {d}: dense time / our time")
        print(results.crossover_table(result["crossover"], group))


@app.command()
def readme() -> None:
    """Rewrites the README's tables from the newest result file and the committed experiment."""
    try:
        results.update_readme()
        results.update_readme(shown={"projection": projection.block(projection.newest())})
        results.update_readme(shown={"experiment": experiment.block(experiment.committed())})
        results.update_readme(shown={"gpu": gpu_block.block(gpu_block.gathered())})
        results.update_readme(shown={"premises": premises.block(premises.newest())})
        results.update_readme(shown={"kernels": status.block()})
    except (FileNotFoundError, ValueError) as error:
        print(error, file=sys.stderr)
        raise typer.Exit(1) from None


@app.command()
def keep(run: Path) -> None:
    """Keeps a finished `refusal-kernels experiment` as the committed one."""
    try:
        for path in experiment.keep(run):
            print(f"kept: {path}")
    except ValueError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(1) from None


@app.command("premises")
def keep_premises(heads: Path, features: Path) -> None:
    """Keeps the figures of a run of `refusal-kernels heads` and one of `refusal-kernels features`."""
    try:
        print(f"kept: {premises.keep(heads, features)}")
    except ValueError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(1) from None


@app.command("kernels")
def kernel_table() -> None:
    """Compiles every GPU kernel ahead of time and writes benches/kernels.md: registers, shared memory, instructions."""
    from . import kernels

    print(f"written: {kernels.write()}")


@app.command()
def plot(result: Path, svg: Path) -> None:
    """Draws a result file."""
    draw(json.loads(result.read_text()), svg)


@app.command("show")
def show_file(result: Path) -> None:
    """Prints the tables of a result file."""
    show(json.loads(result.read_text()))


if __name__ == "__main__":
    app(prog_name="python -m benches")
