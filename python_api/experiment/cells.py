"""The cells of the table: which method, on which data, with which basis at which sites, under which seed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Data = Literal["benign", "poisoned"]
PROTECTED = ("gradient", "forward", "update", "weight")
METHODS = ("none", "sft", "lora", "safelora", "salora", *PROTECTED)


@dataclass(frozen=True)
class Cell:
    """One fine-tuning run and its evaluation.

    Attributes:
        method: "none" evaluates the model as it is.
        data: "benign" or "poisoned" training data.
        seed: of data order, initialisation and dropout.
        basis: the source of the protected directions ("sae", "mean-difference", "activation-svd", "random"; for the
            site "all" also "harmful", "benign", "random"), only for the methods of `PROTECTED`.
        sites: where it is protected.
        rank: of the basis, None for all of it.
        strength: 1 protects fully.
    """

    method: str
    data: Data
    seed: int
    basis: str | None = None
    sites: tuple[str, ...] = ()
    rank: int | None = None
    strength: float = 1.0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method: expected one of {', '.join(METHODS)}; got {self.method!r}")
        if (self.method in PROTECTED) != (self.basis is not None):
            raise ValueError(f"basis: {self.method} {'needs' if self.method in PROTECTED else 'takes no'} basis")

    @property
    def label(self) -> str:
        """The row's name: everything but data and seed."""
        if self.basis is None:
            return {"none": "untouched", "lora": "LoRA", "sft": "full fine-tune"}.get(self.method, self.method)
        extra = "" if self.rank is None else f", rank {self.rank}"
        extra += "" if self.strength == 1 else f", strength {self.strength:g}"
        return f"{self.method}, {self.basis}, {'+'.join(self.sites)}{extra}"

    def key(self) -> str:
        """JSON with sorted keys: equal cells have equal keys."""
        return json.dumps(asdict(self), sort_keys=True)


HEAD_SITES = ("o_proj", "v_proj")


def main_rows() -> list[dict[str, Any]]:
    """The demo's rows: the untouched model, the baselines, the paper's recipe, ours, and the controls that decide.

    A row's `data` says on which kind of data it runs, without it on all.
    """
    poisoned = {"data": ("poisoned",)}
    return [
        {"method": "none"},
        {"method": "lora"},
        {"method": "safelora", **poisoned},
        {"method": "salora", **poisoned},
        {"method": "gradient", "basis": "sae", "sites": HEAD_SITES, **poisoned},
        {"method": "update", "basis": "sae", "sites": HEAD_SITES, **poisoned},
        {"method": "weight", "basis": "sae", "sites": HEAD_SITES, **poisoned},
        {"method": "forward", "basis": "sae", "sites": HEAD_SITES, **poisoned},
        {"method": "forward", "basis": "harmful", "sites": ("all",)},
        {"method": "forward", "basis": "benign", "sites": ("all",), **poisoned},
    ]


def full_rows() -> list[dict[str, Any]]:
    """The main rows on all data, a full fine-tune, every source of the basis, the wider site, and ablations of site,
    rank and strength."""
    sae = {"method": "forward", "basis": "sae", "sites": HEAD_SITES}
    return [
        *({name: value for name, value in row.items() if name != "data"} for row in main_rows()),
        {"method": "forward", "basis": "random", "sites": HEAD_SITES},
        {"method": "sft"},
        {"method": "forward", "basis": "mean-difference", "sites": HEAD_SITES},
        {"method": "forward", "basis": "activation-svd", "sites": HEAD_SITES},
        {"method": "forward", "basis": "sae", "sites": ("residual",)},
        {"method": "forward", "basis": "random", "sites": ("residual",)},
        {"method": "forward", "basis": "random", "sites": ("all",)},
        {**sae, "sites": ("o_proj",)},
        {**sae, "sites": ("v_proj",)},
        {**sae, "rank": 1},
        {**sae, "rank": 4},
        {**sae, "strength": 0.5},
        {"method": "forward", "basis": "harmful", "sites": ("all",), "rank": 8},
        {"method": "gradient", "basis": "harmful", "sites": ("all",)},
    ]


def cells(rows: Sequence[dict[str, Any]], data: Sequence[Data], seeds: Sequence[int]) -> list[Cell]:
    """Every row on its data under all seeds, seed by seed, so that an interrupted run has whole seeds. The untouched
    model is one cell: it has neither data nor seed."""
    out: list[Cell] = []
    for seed in seeds:
        for kind in data:
            for row in rows:
                if row["method"] == "none":
                    untouched = Cell("none", data[0], seeds[0])
                    out += [] if untouched in out else [untouched]
                elif kind in row.get("data", (kind,)):
                    out.append(Cell(**{**row, "data": kind, "seed": seed}))
    return out
