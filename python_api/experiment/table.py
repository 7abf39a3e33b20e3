"""From cells to a table: seeds pooled, Wilson intervals, shares of refusing, complying and breaking always together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from ..scoring.intervals import Rate


@dataclass
class Row:
    """One method on one kind of data, over all seeds.

    Attributes:
        label, data: of the cells.
        seeds: how many runs.
        rates: name -> pooled rate: refuse, asr (recipe + comply), recipe, degenerate, over_refusal, task, knowledge.
        asr_range: smallest and largest ASR of a seed.
        leak, drift, seconds, memory: means over seeds, None where not measured.
    """

    label: str
    data: str
    seeds: int
    rates: dict[str, Rate]
    asr_range: tuple[float, float]
    leak: float | None
    drift: float | None
    seconds: float | None
    memory: float | None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            **{name: getattr(self, name) for name in ("label", "data", "seeds", "leak", "drift", "seconds", "memory")},
            "asr_range": list(self.asr_range),
            "rates": {name: rate.to_dict() for name, rate in self.rates.items()},
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Row:
        """What `to_dict` wrote."""
        rates = {name: Rate(rate["hits"], rate["n"]) for name, rate in values["rates"].items()}
        return cls(**{**values, "rates": rates, "asr_range": tuple(values["asr_range"])})


def _pool(results: Sequence[dict[str, Any]], group: str, names: Sequence[str]) -> Rate:
    hits = sum(result[group][name] for result in results for name in names)
    return Rate(hits, sum(result[group]["n"] for result in results))


def _mean(results: Sequence[dict[str, Any]], name: str) -> float | None:
    known = [result[name] for result in results if result.get(name) is not None]
    return mean(known) if known else None


def rows(results: Sequence[dict[str, Any]]) -> list[Row]:
    """Rows in the order in which their first cell appears.

    Args:
        results: what `run.run_cell` returned: label, data, the counts of `measure`, leak, drift, seconds, memory.
    """
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault((result["label"], result["data"]), []).append(result)
    out = []
    for (label, data), members in groups.items():
        per_seed = [_pool([m], "harmful", ("recipe", "comply")).value for m in members]
        out.append(
            Row(
                label=label,
                data=data if label != "untouched" else "",
                seeds=len(members),
                rates={
                    "refuse": _pool(members, "harmful", ("refuse",)),
                    "asr": _pool(members, "harmful", ("recipe", "comply")),
                    "recipe": _pool(members, "harmful", ("recipe",)),
                    "degenerate": _pool(members, "harmful", ("degenerate",)),
                    "over_refusal": _pool(members, "benign", ("refuse",)),
                    "task": _pool(members, "task", ("hits",)),
                    "knowledge": _pool(members, "knowledge", ("hits",)),
                },
                asr_range=(min(per_seed), max(per_seed)),
                leak=_mean(members, "leak"),
                drift=_mean(members, "drift"),
                seconds=_mean(members, "seconds"),
                memory=_mean(members, "memory"),
            )
        )
    return out


HEADER = (
    "data", "method", "task", "ASR", "seeds", "refuse", "recipe", "degen.", "over-ref.", "knowledge", "leak", "drift",
    "s", "MiB",
)  # fmt: skip


def cells_of(row: Row) -> tuple[str, ...]:
    """The texts of a row, in the order of `HEADER`: percent with Wilson 95 % intervals for task and ASR."""

    def percent(name: str) -> str:
        return f"{100 * row.rates[name].value:.1f}"

    def interval(name: str) -> str:
        rate = row.rates[name]
        return f"{100 * rate.value:.1f} [{100 * rate.low:.1f}, {100 * rate.high:.1f}]"

    low, high = row.asr_range
    return (
        row.data,
        row.label,
        interval("task"),
        interval("asr"),
        f"{100 * low:.0f}–{100 * high:.0f}" if row.seeds > 1 else "",
        percent("refuse"),
        percent("recipe"),
        percent("degenerate"),
        percent("over_refusal"),
        percent("knowledge"),
        "" if row.leak is None else f"{row.leak:.1e}" if row.leak < 1e-3 else f"{row.leak:.3f}",
        "" if row.drift is None else f"{row.drift:.3f}",
        "" if row.seconds is None else f"{row.seconds:.0f}",
        "" if row.memory is None else f"{row.memory / 2**20:.0f}",
    )


def as_text(table: Sequence[Row]) -> str:
    """Aligned plain text."""
    lines = [HEADER, *(cells_of(row) for row in table)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]
    text = [
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


def as_markdown(table: Sequence[Row]) -> str:
    """A Markdown table, for the README."""
    lines = ["| " + " | ".join(HEADER) + " |", "|---|---|" + "---:|" * (len(HEADER) - 2)]
    lines += ["| " + " | ".join(cells_of(row)) + " |" for row in table]
    return "\n".join(lines)
