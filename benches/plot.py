"""The results as an SVG: one panel per group, every column's time relative to ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .results import GROUP_TITLES, TITLES, milliseconds
from .shapes import COLUMNS, GROUPS

COLOURS = {
    "dense": "#9aa5b1",
    "compile": "#6b7c93",
    "sparse": "#e0a458",
    "best": "#c8553d",
    "ours": "#2a7f62",
    "floor": "#d9dde2",
}


def draw(result: dict[str, Any], path: Path) -> None:
    """Writes the plot of a result's first malloc setting; bars are times over ours, on a logarithmic axis."""
    import matplotlib
    import matplotlib.ticker

    matplotlib.use("svg")
    matplotlib.rcParams.update({"font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "refusal-kernels"})
    from matplotlib import pyplot as plt

    cases = result["settings"][0]["cases"]
    groups = [g for g in GROUPS if any(c["group"] == g for c in cases)]
    fig, panels = plt.subplots(1, len(groups), figsize=(3.6 * len(groups), 5.2), squeeze=False, layout="constrained")
    for panel, group in zip(panels[0], groups, strict=True):
        chosen = [c for c in cases if c["group"] == group]
        height = 0.8 / len(COLUMNS)
        for row, case in enumerate(chosen):
            ours = case["columns"]["ours"]["seconds"]
            for slot, name in enumerate(COLUMNS):
                if name not in case["columns"]:
                    continue
                seconds = case["columns"][name]["seconds"]
                y = row + (slot - (len(COLUMNS) - 1) / 2) * height
                label = TITLES[name] if row == 0 else None
                panel.barh(y, seconds / ours, height * 0.92, left=0, color=COLOURS[name], label=label)
                panel.annotate(
                    f"{milliseconds(seconds)} ms",
                    (seconds / ours, y),
                    (2, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=6.5,
                )
        panel.set_yticks(range(len(chosen)), [", ".join(str(s) for s in c["shape"]) for c in chosen])
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
        panel.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
        panel.axvline(1, color=COLOURS["ours"], linewidth=0.8)
        panel.margins(x=0.25)
        panel.invert_yaxis()
        panel.set_title(GROUP_TITLES[group])
        panel.set_xlabel("time / ours")
        panel.spines[["top", "right"]].set_visible(False)
    machine = result["machine"]
    fig.suptitle(
        f"TopK SAE, N, d, F, k; fp32, {machine.get('gpu') or str(machine['cores']) + ' cores, ' + machine['cpu']}, "
        f"torch {result['versions']['torch']}, {result['date'][:10]}"
    )
    fig.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(COLUMNS), frameon=False)
    fig.savefig(path, format="svg", metadata={"Date": None})
    plt.close(fig)
