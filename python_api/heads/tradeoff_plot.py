"""Truthfulness against ASR, one column per dial, controls in grey, intervals as bars, as PNG and SVG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .measuring import Measurement
from .tradeoff import DIALS, POSITIVE_CONTROL, TradeoffResult
from .tradeoff_report import NAMES, is_broken


def plot_tradeoff(result: TradeoffResult, folder: str | Path) -> list[Path]:
    """Draws `result` into `folder/tradeoff.png` and `folder/tradeoff.svg`; returns the two paths.

    Above, the share of pairs decided rightly; below, the mean margin, which has no ceiling. Crosses are broken models.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 7), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(2, 4, sharex=True, sharey="row")
    for column, dial in enumerate((*DIALS, POSITIVE_CONTROL)):
        for row, (axes, label) in enumerate(zip(grid[:, column], ("truthful, %", "margin, nats"), strict=True)):
            for number, control in enumerate(result.controls(dial)):
                colour = ("0.65", "tan")[number % 2]
                for i, point in enumerate(result.of(dial, control)):
                    _mark(axes, point.measured, row, colour, control if i == 0 else None)
            points = result.of(dial)
            line = [result.base, *(p.measured for p in points)]
            axes.plot([m.asr.percent for m in line], [_y(m, row) for m in line], color="tab:red", linewidth=1)
            for i, point in enumerate(points):
                _mark(axes, point.measured, row, "tab:red", dial if i == 0 else None)
                where = (point.measured.asr.percent, _y(point.measured, row))
                axes.annotate(f"{point.strength:g}", where, (4, 4), textcoords="offset points", fontsize=8)
            _mark(axes, result.base, row, "black", "untouched")
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
            if column == 0:
                axes.set_ylabel(label)
            if row == 0:
                axes.set_title(NAMES[dial], fontsize=9)
                axes.legend(frameon=False, fontsize=8)
            else:
                axes.set_xlabel("ASR, %")
    paths = [Path(folder) / f"tradeoff.{kind}" for kind in ("png", "svg")]
    Path(folder).mkdir(parents=True, exist_ok=True)
    for path in paths:
        figure.savefig(path, dpi=150)
    return paths


def _y(measured: Measurement, row: int) -> float:
    return measured.margin if row else measured.truthful.percent


def _mark(axes: Any, measured: Measurement, row: int, colour: str, label: str | None) -> None:
    x, y = measured.asr.percent, _y(measured, row)
    low, high = measured.asr.interval
    if row:
        error = [[1.96 * measured.margin_se]] * 2
    else:
        bottom, top = measured.truthful.interval
        error = [[max(0.0, y - bottom)], [max(0.0, top - y)]]
    marker = "x" if is_broken(measured) else "o"
    axes.errorbar(
        x,
        y,
        error,
        [[max(0.0, x - low)], [max(0.0, high - x)]],
        marker=marker,
        color=colour,
        linewidth=0.7,
        label=label,
    )
