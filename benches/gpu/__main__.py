"""`python -m benches.gpu --out DIR`: everything that only a GPU can prove, in one command.

Builds for the present device, checks every operator against the reference, runs the value tests (fp32, bf16, fp16;
determinism; CUDA graphs), measures, and puts a part of the tests through compute-sanitizer. Each stage is a process of
its own and survives the failure of another; what it printed is in DIR, what it found in DIR/gpu.json, written anew
after every stage. Exit status 0 when every stage ended well that tests or measures: no error in a row, and nothing
outside its bound where results are compared (benches/gpu/rows.py).
"""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from .. import machine, status
from .stages import Stage, allowed, groups, run, stages
from .table import KEPT, table

NOT_RUN = "no time left"


def keep_result(result: dict[str, Any], folder: Path = KEPT) -> Path:
    """Writes the result below `folder`: into the newest file there if that is of the same device, commit and kernels,
    so that a run in two calls (`--only`) is one result; else into a new one. A stage that ran in both stands there as
    it ended last, with the earlier ones under "attempts", the first first: what failed once stays on record."""
    folder.mkdir(parents=True, exist_ok=True)
    dated = {name: {"date": result["date"], **found} for name, found in result["stages"].items()}
    result = {**result, "stages": dated}
    of = f"{machine.slug(result['machine'])}-{result['date'][:10]}"
    earlier = max(folder.glob(f"{of}*.json"), key=lambda path: json.loads(path.read_text())["date"], default=None)
    if earlier is not None:
        before = json.loads(earlier.read_text())
        if all(before.get(key) == result[key] for key in ("commit", "kernels")):
            stages = dict(before["stages"])
            for name, found in dated.items():
                stages[name] = again(stages.get(name), found)
            earlier.write_text(json.dumps({**result, "stages": stages}, indent=1) + "\n")
            return earlier
    path = folder / f"{of}-{result['date'][11:16].replace(':', '')}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def again(before: dict[str, Any] | None, found: dict[str, Any]) -> dict[str, Any]:
    """A stage as it stands after it ended as `found`; one that had no time left has not run again."""
    if before is None or before["status"] == NOT_RUN:
        return found
    if found["status"] == NOT_RUN:
        return before
    last = {key: value for key, value in before.items() if key != "attempts"}
    return {**found, "attempts": [*before.get("attempts", []), last]}


def kernels() -> dict[str, str]:
    """Fingerprint of every kernel; of the CUDA ones alone where Triton is broken, which is for the stages to say."""
    try:
        return status.fingerprints()
    except Exception as error:
        print(f"no fingerprints of Triton's kernels: {type(error).__name__}: {error}")
        return {name: status.fingerprint(files) for name, files in status.cuda_sources().items()}


def fails(stage: Stage, status: str) -> bool:
    """Whether a run fails by a stage that ended so."""
    if stage.helps or status == "ok":
        return False
    return not stage.spare or status.startswith("failed")


def main(
    out: Annotated[Path, typer.Option(help="Folder of the result and the logs.")],
    minutes: Annotated[float, typer.Option(min=1, help="All stages end by then.")] = 8.0,
    only: Annotated[str, typer.Option(help="Stages to run, by the beginning of their names, comma-separated.")] = "",
    quick: Annotated[bool, typer.Option("--quick", help="The first shape only.")] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the result below benches/results/gpu.")] = False,
    commit: Annotated[str, typer.Option(help="Of these files, where they are no git checkout.")] = "",
) -> None:
    if not torch.cuda.is_available():
        raise SystemExit("benches.gpu: there is no CUDA device (torch.cuda.is_available() is false)")
    deadline = time.monotonic() + 60 * minutes
    out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine.describe_machine("cuda"),
        "versions": machine.describe_versions(),
        "commit": commit or machine.describe_commit(),
        "kernels": kernels(),
        "stages": {},
    }
    asked = [part.strip() for part in only.split(",")] if only else [""]
    chosen = [stage for stage in stages(quick) if stage.name.startswith(tuple(asked))]
    waiting = groups(chosen)
    while waiting:
        together = waiting.pop(0)
        left = deadline - time.monotonic()
        if left < 5:
            late = {"seconds": 0, "status": NOT_RUN, "result": None}
            result["stages"] |= {stage.name: late for stage in together}
            continue
        with ThreadPoolExecutor(len(together)) as pool:
            ended = list(pool.map(lambda stage, left=left: run(stage, out, allowed(stage, waiting, left)), together))
        for stage, found in zip(together, ended, strict=True):
            result["stages"][stage.name] = found
            result["versions"] = machine.describe_versions() if stage.name == "build" else result["versions"]
            print(f"{stage.name:30} {found['status']:24} {found['seconds']:6.1f} s", flush=True)
        (out / "gpu.json").write_text(json.dumps(result, indent=1) + "\n")
    if keep:
        print(f"kept: {keep_result(result)}")
    print("\n" + table(result))
    if failures := [stage.name for stage in chosen if fails(stage, result["stages"][stage.name]["status"])]:
        print(f"\nnot ended well: {', '.join(failures)}")
        raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)
