"""What the method rests on, on one model: the heads of refusal and hallucination, and what refusal latents do.

    refusal-kernels heads --mode both --refine 1 --out heads-run
    refusal-kernels features --sae demo-run/prepare/sae/run --out features-run
    python -m benches premises heads-run features-run

keeps the figures of the two runs below benches/results/premises; `python -m benches readme` shows them.
"""

from __future__ import annotations

import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from refusal_kernels.python_api.checkpoint import write_json
from refusal_kernels.python_api.heads.scores import SETS, HeadScores

from . import machine
from .results import RESULTS

KEPT = RESULTS / "premises"


def keep(heads: Path, features: Path, folder: Path = KEPT) -> Path:
    """Keeps the figures of a run of `heads` in both modes and one of `features`; ValueError where one is missing."""
    for path in (heads / "heads.json", features / "features.json"):
        if not path.is_file():
            raise ValueError(f"{path} is missing: run the two commands at the top of benches/premises.py first")
    scores = HeadScores.load(heads / "heads.json")
    found = json.loads((features / "features.json").read_text(encoding="utf-8"))
    if not (scores.exact and scores.screen):
        raise ValueError(f"{heads / 'heads.json'}: expected a run with --mode both, got {scores.mode!r}")
    if "causal_check" not in found:
        raise ValueError(f"{features / 'features.json'}: expected a run with --source sae and its causal check")
    known = machine.describe_machine("cpu")
    date = datetime.now(timezone.utc)
    path = folder / f"{machine.slug(known)}-{date:%Y-%m-%d}.json"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(
        path,
        {
            "date": date.isoformat(timespec="seconds"),
            "machine": known,
            "versions": machine.describe_versions(),
            "commit": machine.describe_commit(),
            "models": [scores.provenance.get("model"), found["provenance"].get("model")],
            "heads": {
                which: {
                    "top": [
                        {"head": list(at), "sum": float(scores.exact[which].sum[at]),
                         "se": float(scores.exact[which].sum_se[at])}
                        for at in scores.top(which)
                    ],
                    "spearman": scores.spearman(which),
                    "ranked": int((~scores.exact[which].sum.isnan()).sum()),
                }
                for which in SETS
            },
            "overlap": vars(scores.overlap()) | {"heads": [list(at) for at in scores.overlap().heads]},
            "causal_check": found["causal_check"],
        },
    )  # fmt: skip
    return path


def newest(folder: Path = KEPT) -> dict[str, Any]:
    """The committed result of the latest date; FileNotFoundError where there is none."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")]
    if not found:
        raise FileNotFoundError(f"no results in {folder}: run `python -m benches premises` first")
    return max(found, key=lambda result: result["date"])


def block(result: dict[str, Any]) -> str:
    """The README's block: the top heads of both kinds, their overlap, and the causal check of the refusal latents."""
    lines = [
        f"{result['machine']['cores']} cores of {result['machine']['cpu']}, torch {result['versions']['torch']}, "
        f"commit {result['commit']}, {result['date'][:10]}; the commands stand at the top of [benches/premises.py]"
        "(benches/premises.py).",
        "",
        "| heads | layer.head: influence by ablation, nats ± standard error | screen against ablation, Spearman |",
        "|---|---|---:|",
    ]
    for which in SETS:
        kind = result["heads"][which]
        top = ", ".join(f"{at['head'][0]}.{at['head'][1]}: {at['sum']:.2f} ± {at['se']:.2f}" for at in kind["top"])
        lines.append(f"| {which} | {top} | {kind['spearman']:.2f} over {kind['ranked']} heads |")
    overlap, check = result["overlap"], result["causal_check"]
    shared = ", ".join(f"{layer}.{head}" for layer, head in overlap["heads"]) or "none"
    lines += [
        "",
        f"On both lists: {shared}; lists drawn at random share {overlap['expected']:.2f} of {overlap['k']} on average.",
        "",
        f"| latents set to zero ({check['n']} held-out requests) | how many | refused, % | right answer preferred, % |",
        "|---|---:|---:|---:|",
    ]
    for row in check["rows"]:
        if row["mode"] == "error kept":
            name = "refusal latents R" if row["zeroed"] == "R" else row["zeroed"]
            right = "" if row["truthful"] is None else f"{row['truthful']:.1f}"
            lines.append(f"| {name} | {row['latents']} | {row['refused']:.1f} | {right} |")
    return "\n".join([*lines, "", check["verdict"]])
