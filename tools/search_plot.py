"""The plot of a search as an SVG file of its own."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from samq.tools.report.pareto import Tried, front


def front_as_svg(points: Sequence[Mapping[str, Any]], best: str | None) -> str:
    """Bytes against relative mIoU of all that was measured, with standard errors; the front is joined.

    Args:
        points: each with config, bytes, miou_relative and standard_error (or None).
        best: the winner's config, None without one.
    """
    tried = [Tried(**{key: point[key] for key in ("config", "bytes", "miou_relative")}) for point in points]
    joined = sorted(front(tried), key=lambda point: point.bytes)
    with matplotlib.rc_context({"svg.hashsalt": "search", "svg.fonttype": "none", "font.size": 10}):
        figure = Figure((7.0, 4.2), layout="constrained")
        axes = figure.add_subplot()
        axes.plot([p.bytes / 1e6 for p in joined], [p.miou_relative for p in joined], color="#c65d07", linewidth=1)
        for point in points:
            axes.errorbar(
                point["bytes"] / 1e6,
                point["miou_relative"],
                yerr=point["standard_error"],
                fmt="*" if point["config"] == best else "o",
                markersize=11 if point["config"] == best else 5,
                color="#c65d07" if point["config"].startswith("mix") else "#3569a8",
                elinewidth=0.7,
            )
            place = (point["bytes"] / 1e6, point["miou_relative"])
            axes.annotate(point["config"], place, (5, -11), textcoords="offset points", fontsize=8)
        axes.set(xlabel="bytes of all weights (MB)", ylabel="mIoU relative to the float model's")
        axes.grid(linewidth=0.4)
        axes.margins(0.12)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return file.getvalue()
