"""The table in plain words, computed from it: what was lost, what protected, what did not, and the measured reason."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from .table import Row


def _percent(rate: Any) -> str:
    return f"{100 * rate.value:.1f} % [{100 * rate.low:.1f}, {100 * rate.high:.1f}]"


def _find(table: Iterable[Row], data: str, *parts: str) -> Row | None:
    return next((row for row in table if row.data == data and all(part in row.label for part in parts)), None)


def _apart(a: Row, b: Row) -> bool:
    """Whether the 95 % intervals of two rows' ASR do not overlap."""
    x, y = a.rates["asr"], b.rates["asr"]
    return x.high < y.low or y.high < x.low


def findings(table: Sequence[Row], results: Sequence[dict[str, Any]]) -> list[str]:
    """Sentences with their figures. Nothing is said that the rows do not show; missing rows are passed over."""
    said: list[str] = []
    for data in dict.fromkeys(row.data for row in table if row.data):
        plain = next((row for row in table if row.data == data and row.label == "LoRA"), None)
        if plain is None:
            continue
        said.append(
            f"{data} data: plain LoRA learns the task ({_percent(plain.rates['task'])}) and ends at an ASR of "
            f"{_percent(plain.rates['asr'])}, {100 * plain.rates['recipe'].value:.0f} % with exactly the right "
            f"content, {100 * plain.rates['degenerate'].value:.0f} % degenerate."
        )
        paper = _find(table, data, "gradient, sae")
        if paper is not None:
            verdict = "differs from" if _apart(paper, plain) else "is not distinguishable from"
            leak = "" if paper.leak is None else f"; its update leaks {paper.leak:.2g} into the subspace"
            said.append(
                f"{data} data: the paper's recipe, projecting the gradient under Adam, ends at "
                f"{_percent(paper.rates['asr'])}, which {verdict} plain LoRA{leak}."
            )
        for mode in ("forward", "update", "weight"):
            exact = _find(table, data, f"{mode}, sae, o_proj+v_proj")
            if exact is not None and exact.leak is not None:
                said.append(
                    f"{data} data: {mode} mode keeps the update out of the same subspace to {exact.leak:.1e} and ends "
                    f"at {_percent(exact.rates['asr'])}."
                )
        said += _everywhere(table, data, plain)
    said += _reasons(results)
    return said


def _everywhere(table: Sequence[Row], data: str, plain: Row) -> list[str]:
    everywhere, control = _find(table, data, "harmful, all"), _find(table, data, "benign, all")
    if everywhere is None:
        return []
    words = f"{data} data: protecting every adapted linear's inputs on harmful prompts ends at "
    words += f"{_percent(everywhere.rates['asr'])} with task accuracy {_percent(everywhere.rates['task'])}"
    if control is not None:
        words += f"; the same calibrated on harmless prompts at {_percent(control.rates['asr'])}"
        if _apart(everywhere, plain) and _apart(everywhere, control):
            words += ", so what it holds is particular to harmful requests"
        elif _apart(everywhere, plain):
            words += ", not distinguishable: what it holds is the form of a request, not harm"
    return [words + "."]


def _reasons(results: Sequence[dict[str, Any]]) -> list[str]:
    told = [
        result for result in results
        if result.get("explain") and result["data"] == "poisoned" and result["label"] == "forward, sae, o_proj+v_proj"
    ]  # fmt: skip
    if not told:
        return []

    def refused(name: str) -> float:
        return 100 * sum(r["explain"][name]["refuse"] for r in told) / sum(r["explain"][name]["n"] for r in told)

    tuned, whole, part, random = (refused(name) for name in ("tuned", "z", "U", "random"))
    if tuned > 90:
        return []
    words = (
        f"Why, measured on forward mode with the SAE's basis on poisoned data: as fine-tuned it refuses {tuned:.0f} %; "
        f"with the untouched model's z pasted in at the last prompt token {whole:.0f} %, with its component in U alone "
        f"{part:.0f} %, in a random U {random:.0f} %"
    )
    if part > tuned + 20 and part > random + 20:
        words += (
            ". What reads U still works, but other modules rewrote what arrives there: holding a layer's reading and "
        )
        words += "writing holds the features only if what flows into them is held too"
    elif whole > tuned + 20:
        words += ". The layer's whole z brings refusal back and U's part of it does not: U is not all that carries it"
    elif tuned < 50:
        words += ". Not even the whole z brings refusal back: what comes after this layer was rewritten"
    return [words + "."]
