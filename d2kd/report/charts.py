"""Charts as SVG that takes its colors for text and lines from the page, so that it fits light and dark."""

import io
import re
from typing import Any, Dict, Mapping, Sequence, Tuple

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from .runs import Points

#: Readable on white and on black; neighbors also differ for the color-blind.
COLORS = ("#3b82f6", "#f97316", "#10b981", "#d946ef", "#eab308", "#06b6d4", "#ef4444", "#8b5cf6")
# What the style sheet knows as currentColor and --line; matplotlib needs numbers.
INK, LINE = "#010203", "#040506"
SIZE = (4.3, 3.0)  # inches; on a phone it is about as wide as the screen
# Ratio of the ends of a vertical axis below which it stays linear.
NARROW = 5.0
STYLE: Dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": LINE,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": LINE,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.5,
    "lines.markersize": 3.5,
}


def line_chart(
    series: Sequence[Tuple[str, Points]], x: str, y: str, log: bool = False, markers: bool = False
) -> Markup:
    """Lines over a common axis.

    Args:
        series: label and points of each line; lines with the same label get the same color.
        x: what is on the horizontal axis, with its unit.
        y: what is on the vertical axis.
        log: whether the vertical axis is logarithmic.
        markers: whether to mark the points.

    Returns:
        An ``<svg>`` element; empty if there is no point.
    """
    series = [(label, points) for label, points in series if points]
    if not series:
        return Markup("")
    with matplotlib.rc_context(STYLE):
        figure, axis = _figure(SIZE)
        colors = dict(zip(dict.fromkeys(label for label, _ in series), COLORS * len(series)))
        handles = {}
        for label, points in series:
            (handles[label],) = axis.plot(*zip(*points), "o-" if markers else "-", color=colors[label], alpha=0.9)
        axis.set(xlabel=x, ylabel=y, xlim=(0, None))
        _scale(axis, log)
        _legend(figure, handles)
        return _svg(figure, f"{y} over {x}: {', '.join(handles)}")


def bar_chart(groups: Mapping[str, Mapping[str, float]], x: str) -> Markup:
    """Horizontal bars.

    Args:
        groups: the values of each label, by name of the group of bars.
        x: what the bars show.

    Returns:
        An ``<svg>`` element; empty if there is no bar.
    """
    labels = list(dict.fromkeys(label for values in groups.values() for label in values))
    if not labels:
        return Markup("")
    with matplotlib.rc_context(STYLE):
        figure, axis = _figure((SIZE[0], 1.2 + 0.3 * len(groups) + 0.13 * len(groups) * len(labels)))
        height = 0.8 / len(labels)
        handles = {}
        for i, (label, color) in enumerate(zip(labels, COLORS * len(labels))):
            bars = [(row - 0.4 + (i + 0.5) * height, groups[name].get(label)) for row, name in enumerate(groups)]
            drawn = [(place, value) for place, value in bars if value is not None]
            handles[label] = axis.barh([p for p, _ in drawn], [v for _, v in drawn], height * 0.9, color=color)
            for place, value in drawn:
                axis.text(value, place, f" {value:.1f}", va="center", fontsize=6.5)
        axis.set_yticks(range(len(groups)), list(groups))
        axis.invert_yaxis()
        axis.grid(axis="y", visible=False)
        axis.set(xlabel=x, xlim=(0, None))
        axis.margins(x=0.12)
        _legend(figure, handles)
        return _svg(figure, f"{x}: {', '.join(labels)}")


def _figure(size: Tuple[float, float]) -> Tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")  # not pyplot, which keeps global state
    return figure, figure.subplots()


def _scale(axis: Axes, log: bool) -> None:
    if not log:
        axis.set_ylim(0, None)
        return
    low, high = axis.get_ylim()
    if low > 0 and high < NARROW * low:  # a logarithmic axis would have a single number
        return
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))  # not powers, which need mathtext
    axis.yaxis.set_minor_formatter(NullFormatter())


def _legend(figure: Figure, handles: Dict[str, Any]) -> None:
    columns = 2 if max(map(len, handles)) > 12 else 3
    figure.legend(list(handles.values()), list(handles), loc="outside upper left", ncols=columns)


def _svg(figure: Figure, description: str) -> Markup:
    written = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": description}):  # ids that are the same every time
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = written.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor").replace(LINE, "var(--line)")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    attributes = Markup('<svg role="img" aria-label="{}" ').format(description)
    return attributes + Markup(text[len("<svg ") :])
