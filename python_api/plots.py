"""The training plot: loss, FVU, L0 and dead latents over tokens, one colour per layer, as PNG and SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

_PANELS = (
    ("loss", "loss (scaled units)", "log"),
    ("fvu", "FVU", "log"),
    ("l0", "L0 (latents per token)", "linear"),
    ("dead_fraction", "dead latents", "percent"),
)


def plot_training(log: Sequence[Mapping[str, float]], folder: Path, title: str = "") -> list[Path]:
    """Draws the training log into `folder/training.png` and `folder/training.svg`; returns the two paths.

    Args:
        log: lines as `train_log.read_train_log` returns them, at least one.
        folder: created if missing.
        title: above the panels.
    """
    if not log:
        raise ValueError("plot_training: the training log is empty; nothing to draw")
    # A figure of its own on the Agg canvas: pyplot would pick a window system and touch global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, PercentFormatter

    layers = sorted({int(name.split("/")[0].removeprefix("layer_")) for name in log[0] if name.startswith("layer_")})
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    tokens = [line["tokens"] for line in log]
    for axes, (name, label, scale) in zip(figure.subplots(2, 2).flat, _PANELS, strict=True):
        for layer in layers:
            values = [line[f"layer_{layer}/{name}"] for line in log]
            axes.plot(tokens, values, label=f"layer {layer}", linewidth=1.5, marker="." if len(log) < 3 else "")
        axes.set_xlabel("tokens")
        axes.set_ylabel(label)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        if scale == "log":
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        if scale == "percent":
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False)
    if title:
        figure.suptitle(title)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "training.png", folder / "training.svg"]
    for path in paths:
        figure.savefig(path, dpi=150)
    return paths
