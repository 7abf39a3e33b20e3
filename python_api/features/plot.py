"""The attribution plot: every latent's a_ref against its a_hall, the refusal latents marked, one panel a layer."""

from __future__ import annotations

from pathlib import Path

import torch

from .attribution import FeatureReport


def plot_attribution(report: FeatureReport, folder: Path, title: str = "") -> list[Path]:
    """Draws `report` into `folder`/attribution.png and .svg; returns the two paths.

    Latents that fire on no pair are left out. Without hallucination pairs the height is the mean activation. Both axes
    are linear around zero and logarithmic beyond, because a few latents carry most of the attribution.
    """
    # A figure of its own on the Agg canvas: pyplot would pick a window system and touch global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    n = len(report.layers)
    figure = Figure(figsize=(1 + 5 * n, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (layer, found) in zip(figure.subplots(1, n, squeeze=False).flat, report.layers.items(), strict=True):
        height = found.mass if found.a_hall is None else found.a_hall
        marked = torch.zeros_like(found.fires)
        marked[found.refusal] = True
        groups = (
            ("other latents", found.fires & ~marked, "0.6", 8),
            (f"refusal latents R ({len(found.refusal)})", marked, "tab:red", 22),
        )
        for label, chosen, colour, size in groups:
            axes.scatter(found.a_ref[chosen].tolist(), height[chosen].tolist(), s=size, c=colour, label=label, lw=0)
        for name, values in (("x", found.a_ref), ("y", height)):
            largest = float(values[found.fires].abs().max()) if bool(found.fires.any()) else 0.0
            if largest > 0:
                getattr(axes, f"set_{name}scale")("symlog", linthresh=largest / 1000)
        axes.axvline(0, color="0.85", lw=0.8, zorder=0)
        axes.axhline(0, color="0.85", lw=0.8, zorder=0)
        axes.set_title(f"layer {layer}")
        axes.set_xlabel("a_ref: towards refusing (nats)")
        axes.set_ylabel("mean activation" if found.a_hall is None else "a_hall: towards the right answer (nats)")
        axes.tick_params(axis="x", rotation=45)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize="small")
    if title:
        figure.suptitle(title)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "attribution.png", folder / "attribution.svg"]
    for path in paths:
        figure.savefig(path, dpi=150)
    return paths
