"""The report's figures: numbers of metrics.json to SVG pictures, embedded as data addresses."""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from training.evaluation.results import IntervalFigures

# Okabe and Ito's colours, which stay apart for colour-blind readers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LEGEND_COLUMNS = 3
SIZE = (4.8, 3.2)  # inches; wider ones have letters too small for a phone

Point = tuple[float, float]


def data_address(figure: Figure) -> str:
    """The figure as `data:image/svg+xml;base64,…`; closes it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    pyplot.close(figure)
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def gap_figure(gaps: Mapping[str, Sequence[tuple[str, IntervalFigures]]]) -> str:
    """Sighted minus each blind control, in points, with intervals: {run: [(control, interval)]}."""
    labels = list(dict.fromkeys(control for entries in gaps.values() for control, _ in entries))
    figure, axes = pyplot.subplots(
        figsize=(SIZE[0], 1.1 + len(labels) * (0.25 + 0.22 * len(gaps))), layout="constrained"
    )
    for number, (run, entries) in enumerate(gaps.items()):
        offset = (number - (len(gaps) - 1) / 2) * 0.6 / len(gaps)
        for control, interval in entries:
            place = labels.index(control) + offset
            middle = interval["estimate"]
            ends = [100 * (middle if end is None else end) for end in (interval["low"], interval["high"])]
            colour = COLOURS[number % len(COLOURS)]
            axes.plot(ends, [place, place], color=colour, linewidth=2.2, alpha=0.55)
            label = run if control == entries[0][0] else None
            axes.plot([100 * middle], [place], MARKERS[number % len(MARKERS)], color=colour, markersize=6, label=label)
    axes.axvline(0, color="#777777", linewidth=1)
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set_xlabel("points of accuracy, sighted minus control")
    _finish(axes)
    return data_address(figure)


def lines_figure(
    lines: Mapping[str, Sequence[Point]],
    xlabel: str,
    ylabel: str,
    *,
    log_x: bool = False,
    percent: bool = False,
    diagonal: bool = False,
    markers: bool = True,
) -> str:
    """Lines {name: (x, y) points}; `log_x` to the base of 2, `percent`: y from 0 to 1, `diagonal`: with y = x."""
    legend_rows = -(-len(lines) // LEGEND_COLUMNS)
    figure, axes = pyplot.subplots(figsize=(SIZE[0], SIZE[1] + 0.18 * legend_rows), layout="constrained")
    if diagonal:
        axes.plot([0, 1], [0, 1], color="#777777", linewidth=1, linestyle="--")
    for number, (name, points) in enumerate(lines.items()):
        x, y = zip(*points, strict=True)
        marker = MARKERS[number % len(MARKERS)] if markers else None
        style: dict[str, Any] = {"color": COLOURS[number % len(COLOURS)]}
        style["linestyle"] = "-" if number < len(COLOURS) else "--"
        axes.plot(x, y, marker=marker, linewidth=1.8, markersize=5, label=name, **style)
    if log_x:
        axes.set_xscale("log", base=2)
        ticks = sorted({point[0] for points in lines.values() for point in points})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], rotation=45 if len(ticks) > 8 else 0)
        axes.minorticks_off()
    if percent:
        axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0, decimals=0))
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    _finish(axes)
    return data_address(figure)


def _finish(axes: Axes) -> None:
    axes.grid(True, color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        columns = 1 if max(map(len, labels)) > 24 else min(len(labels), LEGEND_COLUMNS)
        axes.figure.legend(handles, labels, fontsize=8, frameon=False, loc="outside lower center", ncols=columns)
