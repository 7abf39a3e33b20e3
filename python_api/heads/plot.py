"""Heat maps of the two scores, layers by heads, with the top lists and their overlap marked, as PNG and SVG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .scores import SETS, HeadScores

_TITLES = {
    "hallucination": "hallucination: I(wrong) - I(right)",
    "refusal": "refusal: I(refusal) - I(harmful)",
}


def plot_heads(scores: HeadScores, folder: str | Path) -> list[Path]:
    """Draws `scores` into `folder/heads.png` and `folder/heads.svg`; returns the two paths.

    Heads that were not ranked (mode "both") show their screened score under a hatch; layers without o_proj are grey.
    """
    import torch
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import MaxNLocator

    n_layers, n_heads = scores.s_ref.shape
    size = (min(16.0, 3.6 + 0.5 * n_heads), min(12.0, 2.2 + 0.3 * n_layers))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    overlap = scores.overlap()
    marks = {"black": f"top {scores.k}", "lime": f"overlap: {len(overlap.heads)}, by chance {overlap.expected:.2g}"}
    for axes, which in zip(figure.subplots(1, 2, sharey=True), SETS, strict=True):
        values = scores.ranked[which].sum
        unranked = values.isnan()
        if scores.screen:
            values = torch.where(unranked, scores.screen[which].sum, values)
        limit = float(values.nan_to_num().abs().max()) or 1.0
        image = axes.imshow(values.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
        axes.set_facecolor("lightgrey")
        for layer, head in (unranked & ~values.isnan()).nonzero().tolist():
            corner = (head - 0.5, layer - 0.5)
            axes.add_patch(Rectangle(corner, 1, 1, fill=False, hatch="////", edgecolor="grey", linewidth=0))
        for heads, colour, width in ((scores.top(which), "black", 1.5), (overlap.heads, "lime", 3.0)):
            for layer, head in heads:
                corner = (head - 0.5, layer - 0.5)
                axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=colour, linewidth=width))
        axes.set_title(_TITLES[which], fontsize=10)
        axes.set_xlabel("head")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        figure.colorbar(image, ax=axes, label="nats")
    figure.axes[0].set_ylabel("layer")
    square: dict[str, Any] = {"marker": "s", "markerfacecolor": "none", "linestyle": ""}
    handles: list[Any] = [Line2D([], [], color=colour, label=text, **square) for colour, text in marks.items()]
    if scores.mode == "both":
        handles.append(Rectangle((0, 0), 1, 1, fill=False, hatch="////", edgecolor="grey", label="screened only"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    paths = [Path(folder) / f"heads.{kind}" for kind in ("png", "svg")]
    Path(folder).mkdir(parents=True, exist_ok=True)
    for path in paths:
        figure.savefig(path, dpi=150)
    return paths
