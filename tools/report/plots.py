"""The report's plots, as SVG for a page: no numbers of their own, all from the report.

Each plot is drawn twice, for wide windows and for phones; the page shows one of them. Colours are names of the page's
style sheet (`var(--blue)`), so that a plot follows light and dark, and text is text, in the page's font.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

FULL, HALF, PHONE = 1040, 504, 350  # widths in CSS pixels
POINTS_PER_INCH = 72  # an SVG of matplotlib has this many units an inch

# What matplotlib is told, and what the page reads instead.
COLOURS = {
    "#010101": "var(--ink)",
    "#020202": "var(--quiet)",
    "#030303": "var(--line)",
    "#040404": "var(--blue)",
    "#050505": "var(--orange)",
    "#060606": "var(--red)",
    "#070707": "var(--teal)",
    "#080808": "var(--violet)",
}
INK, QUIET, LINE, BLUE, ORANGE, RED, TEAL, VIOLET = COLOURS
BASELINE, QUANTIZED, OTHER = BLUE, ORANGE, QUIET

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": LINE,
    "axes.labelcolor": QUIET,
    "axes.labelsize": 12,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": QUIET,
    "ytick.labelcolor": QUIET,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "legend.handlelength": 1.0,
    "lines.linewidth": 1.6,
}


@dataclass(frozen=True)
class Bar:
    """One bar of a bar chart: its length, the value with its unit, and one of this module's colours."""

    value: float
    text: str
    colour: str


@dataclass(frozen=True)
class Point:
    """One point of a scatter plot with its label, which may be empty; those on the `front` are joined."""

    x: float
    y: float
    label: str
    front: bool


def histogram(values: Mapping[str, Sequence[float]], xlabel: str, ylabel: str) -> Markup:
    """Values of some series, stacked, in bins of equal width up to 1.

    Args:
        values: two series → numbers from 0 to 1.
    """
    lowest = min((min(series) for series in values.values() if len(series)), default=0.0)
    edges = np.linspace(min(0.95, np.floor(lowest * 20) / 20), 1, 26).tolist()

    def draw(axes: Axes) -> None:
        axes.hist(list(values.values()), edges, stacked=True, color=[TEAL, VIOLET], label=list(values))
        axes.set(xlabel=xlabel, ylabel=ylabel, xlim=(edges[0], edges[-1]))
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.grid(axis="y")
        axes.legend(loc="upper left")

    return _svg(draw, "histogram", f"Histogram: {ylabel} by {xlabel}", HALF, 260)


def bars(name: str, title: str, groups: Mapping[str, Sequence[Bar]]) -> Markup:
    """Horizontal bars with their values written behind them.

    Args:
        name: of the plot, one of its kind on a page.
        title: what it shows, for readers who do not see it.
        groups: label → bars that share it.
    """
    gap = 0.45
    lengths = [len(group) for group in groups.values()]
    tops = [sum(lengths[:index]) + gap * index for index in range(len(lengths))]
    end = sum(lengths) + gap * (len(lengths) - 1)
    longest = max((bar.value for group in groups.values() for bar in group), default=0) or 1

    def draw(axes: Axes) -> None:
        for top, group in zip(tops, groups.values(), strict=True):
            for row, bar in enumerate(group, start=1):
                axes.barh(top + row - 0.5, bar.value, height=0.8, color=bar.colour)
                axes.text(bar.value + longest * 0.015, top + row - 0.5, bar.text, va="center", color=INK)
        middles = [top + length / 2 for top, length in zip(tops, lengths, strict=True)]
        axes.set_yticks(middles, list(groups), color=INK)
        axes.set(xlim=(0, longest * 1.28), ylim=(end, 0))
        axes.xaxis.set_visible(False)
        axes.spines["bottom"].set_visible(False)
        axes.tick_params(length=0)

    return _svg(draw, name, title, HALF, 12 + 25 * end)


def along_network(decibels: Sequence[tuple[str, float, bool]]) -> Markup:
    """SQNR of each layer, in the network's order.

    Args:
        decibels: series, dB and whether the layer executes as requested.
    """
    series = list(dict.fromkeys(name for name, _, _ in decibels))

    def draw(axes: Axes) -> None:
        for name, colour in zip(series, (TEAL, VIOLET), strict=False):
            chosen = [(index, value) for index, (own, value, _) in enumerate(decibels, start=1) if own == name]
            places, values = zip(*chosen, strict=True)
            axes.plot(places, values, color=colour, linewidth=0.9, alpha=0.5)
            axes.scatter(places, values, s=13, color=colour, label=name, zorder=3)
        misfits = [(index, value) for index, (_, value, agrees) in enumerate(decibels, start=1) if not agrees]
        if misfits:
            places, values = zip(*misfits, strict=True)
            axes.scatter(places, values, s=55, facecolors="none", edgecolors=RED, label="not as requested")
        axes.set(xlabel="layer, in the order of the network", ylabel="SQNR (dB)", xlim=(0, len(decibels) + 1))
        axes.set_ylim(bottom=min(0, *(value for _, value, _ in decibels)))
        axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
        axes.grid(axis="y")
        axes.legend(loc="lower left", ncols=3, columnspacing=1.2, handletextpad=0.4)

    return _svg(draw, "sqnr", "SQNR of each quantized layer along the network", FULL, 280)


def scatter(name: str, title: str, points: Sequence[Point], xlabel: str, ylabel: str) -> Markup:
    """Points, those joined that no other is below in x and above in y."""

    def draw(axes: Axes) -> None:
        others = [point for point in points if not point.front]
        axes.scatter([point.x for point in others], [point.y for point in others], s=22, color=OTHER)
        front = sorted((point for point in points if point.front), key=lambda point: point.x)
        places, values = [point.x for point in front], [point.y for point in front]
        axes.plot(places, values, color=QUANTIZED, linewidth=1)
        axes.scatter(places, values, s=30, color=QUANTIZED, zorder=3)
        for point in points:
            axes.annotate(point.label, (point.x, point.y), (5, -13), textcoords="offset points", color=INK, fontsize=10)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.margins(0.16)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
        axes.grid()

    return _svg(draw, name, title, HALF, 280)


def _svg(draw: Callable[[Axes], None], name: str, title: str, width: int, height: float) -> Markup:
    """A figure with the plot for wide windows and the one for phones."""
    drawn = [
        Markup('<div class="{}">{}</div>').format(shown, _drawn(draw, f"{name}-{shown}", title, size, height))
        for shown, size in (("on-wide", width), ("on-phone", PHONE))
    ]
    return Markup("").join(drawn)


def _drawn(draw: Callable[[Axes], None], salt: str, title: str, width: int, height: float) -> Markup:
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": salt}):
        figure = Figure((width / POINTS_PER_INCH, height / POINTS_PER_INCH), layout="constrained")
        draw(figure.add_subplot())
        file = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    return Markup(_for_pages(file.getvalue(), title))


def _for_pages(svg: str, title: str) -> str:
    """An SVG file of matplotlib as an element of a page."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", body, flags=re.DOTALL)
    body = re.sub(r'<g id="[^"]*"', "<g", body)  # the same in every figure, and nothing refers to them
    body = re.sub(r"font-family: [^;\"]*;? ?", "", body)
    body = body.replace(" \n", " ").replace("xlink:href", "href")
    for told, read in COLOURS.items():
        body = body.replace(told, read)
    view = re.search(r'viewBox="[^"]*"', body)
    assert view is not None
    label = Markup("{}").format(title)
    head = f'<svg {view[0]} role="img" aria-label="{label}">'
    return re.sub(r"<svg[^>]*>", lambda _: head, body, count=1)
