"""The experiment's figures as SVG texts, for the report and as files of their own."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from .table import Row


def _figure(width: float, height: float) -> Any:
    # A figure of its own on the SVG canvas: pyplot would pick a window system and touch global state.
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    return figure


def _svg(figure: Any) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def asr_and_task(table: Sequence[Row]) -> str:
    """ASR against task accuracy: one panel per kind of data, one point per row, Wilson 95 % intervals."""
    kinds = list(dict.fromkeys(row.data for row in table if row.data))
    figure = _figure(5.6 * max(1, len(kinds)), 4.6)
    for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        members = [row for row in table if row.data in (kind, "")]
        for i, row in enumerate(members):
            task, asr = row.rates["task"], row.rates["asr"]
            axes.errorbar(
                100 * task.value,
                100 * asr.value,
                xerr=[[100 * (task.value - task.low)], [100 * (task.high - task.value)]],
                yerr=[[100 * (asr.value - asr.low)], [100 * (asr.high - asr.value)]],
                fmt="os^Dv<>Pph*X"[i % 12],
                color=f"C{i % 10}",
                markersize=6,
                linewidth=1,
                label=row.label,
            )
        axes.set_title(f"{kind} data")
        axes.set_xlabel("task accuracy, %")
        axes.set_ylabel("attack success rate, %")
        axes.set_ylim(-4, 104)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=7, loc="center left")
    return _svg(figure)


def over_training(curves: Mapping[str, Sequence[Mapping[str, float]]], name: str, label: str) -> str:
    """One line per run: `name` over the optimiser's steps, logarithmic; zeros are drawn at the lower edge.

    Args:
        curves: row label -> log lines with "step" and `name`.
    """
    figure = _figure(7, 4)
    axes = figure.subplots()
    floor = 1e-9
    for i, (title, lines) in enumerate(curves.items()):
        points = [(line["step"], max(line[name], floor)) for line in lines if line.get(name) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=title, color=f"C{i % 10}", linewidth=1.5)
    axes.set_yscale("log")
    axes.set_xlabel("optimiser step")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:
        axes.legend(frameon=False, fontsize=8)
    return _svg(figure)
