"""Several finished runs side by side; what cannot be compared with the first run is marked, with the reason.

| rows     | can be compared when                                              |
|----------|-------------------------------------------------------------------|
| accuracy | the float model and the evaluation images are the same            |
| size     | the float model is the same                                       |
| speed    | the float model, the machine and the baseline's engine are the same |
| memory   | the float model and the machine are the same                      |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from samq.calib.images import printable
from samq.errors import BadInput, UsageError
from samq.tools.outdir import MANIFEST, OutputDir
from samq.tools.report import plots
from samq.tools.report.page import model_name
from samq.tools.report.pareto import Tried, front
from samq.tools.report.plots import Bar, Point
from samq.tools.report.reading import read_report
from samq.tools.report.rendering import render
from samq.tools.report.units import data_size, milliseconds, number
from samq.tools.report.verdict import PLAIN, UNKNOWN, WARNING, claims, headline

JOB, ACCURACY, SIZE, SPEED, MEMORY = "job", "accuracy", "size", "speed", "memory"
MACHINE = ("machine", "processor", "cores", "gpu")  # of the environment
MARK = "†"
IN_WORDS = {PLAIN: "no gate", WARNING: "layers differ", UNKNOWN: "accuracy unknown"}  # of the verdict's states

Report = dict[str, Any]


@dataclass(frozen=True)
class Figure:
    """One row of the table.

    Args:
        key: in the JSON answer.
        words: what it is, with its unit.
        group: decides what it can be compared with.
        value: reads it from a report.
        text: writes it.
    """

    key: str
    words: str
    group: str
    value: Callable[[Report], Any]
    text: Callable[[Any], str]


@dataclass(frozen=True)
class Run:
    """One finished run.

    Args:
        out: its output directory.
        report: its figures.
        differs: group of figures → why it cannot be compared with the first run.
    """

    out: Path
    report: Report
    differs: dict[str, str]


FIGURES = (
    Figure("model", "model", JOB, model_name, str),
    Figure("format", "format", JOB, lambda r: r["format"], str),
    Figure("method", "method", JOB, lambda r: ", ".join(r["method"]), str),
    Figure("target", "engine", JOB, lambda r: r["target"], str),
    Figure("verdict", "verdict", JOB, lambda r: headline(r)[0], lambda state: IN_WORDS.get(state, state)),
    Figure("executed", "layers as requested", JOB, lambda r: claims(r)[-1].achieved, str),
    Figure("miou_baseline", "mIoU, baseline", ACCURACY, lambda r: r["accuracy"]["miou_baseline"], number),
    Figure("miou_quantized", "mIoU, quantized", ACCURACY, lambda r: r["accuracy"]["miou_quantized"], number),
    Figure("miou_relative", "mIoU, relative", ACCURACY, lambda r: r["accuracy"]["miou_relative"], number),
    Figure("agreement_iou", "IoU with the baseline", ACCURACY, lambda r: r["accuracy"]["agreement_iou"], number),
    Figure("prompts", "prompts", ACCURACY, lambda r: r["accuracy"]["count"], lambda count: number(count, 0)),
    Figure(
        "quantized_layers_ratio",
        "quantized layers / FP16",
        SIZE,
        lambda r: r["size"]["quantized_layers_ratio"],
        lambda ratio: number(ratio, 3),
    ),
    Figure("onnx_bytes", "ONNX files", SIZE, lambda r: r["size"]["onnx_bytes"], data_size),
    Figure("engine_bytes", "engine files", SIZE, lambda r: r["size"]["engine_bytes"], data_size),
    Figure("baseline_ms", "latency, baseline", SPEED, lambda r: r["latency"]["baseline_ms"], milliseconds),
    Figure("quantized_ms", "latency, quantized", SPEED, lambda r: r["latency"]["quantized_ms"], milliseconds),
    Figure("speedup", "speedup", SPEED, lambda r: r["latency"]["speedup"], lambda ratio: f"{ratio:.2f}×"),
    Figure(
        "engine_memory_bytes",
        "engine's peak memory",
        MEMORY,
        lambda r: r["memory"]["engine"]["quantized_bytes"],
        data_size,
    ),
)


def read_runs(outs: Sequence[Path]) -> list[Run]:
    """The reports of output directories.

    Raises:
        UsageError: there is only one.
        BadInput: one has no report, one of another version of samq, or one of engines that are replaced by now.
    """
    if len(outs) < 2:
        raise UsageError("compare takes two or more output directories")
    reports = [read_report(out) for out in outs]
    for out in outs:
        if (out / MANIFEST).is_file() and "validate" not in OutputDir.open(out).stages:
            fix = f"run `samq-export validate --output-dir {out}`"
            raise BadInput(f"{out}: its report is of what was there before; {fix}")
    return [Run(out, report, _differences(reports[0], report)) for out, report in zip(outs, reports, strict=True)]


def _differences(first: Report, other: Report) -> dict[str, str]:
    """Group of figures → why they cannot be compared."""

    def differing(*aspects: tuple[str, Callable[[Report], Any]]) -> str:
        return ", ".join(words for words, read in aspects if read(first) != read(other))

    model = ("another model", lambda report: report["checkpoint"])
    images = ("other evaluation images", lambda report: report["evaluation_fingerprint"])
    machine = ("another machine", lambda report: [report["environment"].get(key) for key in MACHINE])
    baseline = ("another baseline", lambda report: report["latency"]["baseline"])
    found = {
        ACCURACY: differing(model, images),
        SIZE: differing(model),
        SPEED: differing(model, machine, baseline),
        MEMORY: differing(model, machine),
    }
    return {group: reason for group, reason in found.items() if reason}


def as_json(runs: Sequence[Run]) -> dict[str, Any]:
    """The table as JSON values."""
    return {
        "runs": [
            {
                "output_dir": str(run.out),
                **{figure.key: figure.value(run.report) for figure in FIGURES},
                "not_comparable": run.differs,
            }
            for run in runs
        ]
    }


def as_text(runs: Sequence[Run]) -> str:
    """The table for a terminal: a row a figure, a column a run."""
    rows = [("", *(str(place) for place in range(1, len(runs) + 1)))]
    rows += [(figure.words, *(_cell(figure, run) for run in runs)) for figure in FIGURES]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    names = [f"{place}  {printable(str(run.out))}" for place, run in enumerate(runs, start=1)]
    return "\n".join([*names, "", *table, *([""] if notes(runs) else []), *notes(runs)])


def notes(runs: Sequence[Run]) -> list[str]:
    """Why marked figures cannot be compared with those of the first run."""
    return [
        f"{MARK} {place}: {group} cannot be compared with 1: {reason}"
        for place, run in enumerate(runs, start=1)
        for group, reason in run.differs.items()
    ]


def compare_page(runs: Sequence[Run]) -> str:
    """The table and plots of what can be compared, as one page that needs nothing but itself."""
    return render(
        "compare.html.j2",
        runs=runs,
        headlines=[headline(run.report) for run in runs],
        figures=FIGURES,
        cell=_cell,
        notes=notes(runs),
        plots={"accuracy": _accuracy_plot(runs), "latency": _latency_plot(runs)},
    )


def _cell(figure: Figure, run: Run) -> str:
    value = figure.value(run.report)
    return figure.text(value) + (f" {MARK}" if figure.group in run.differs and value is not None else "")


def _accuracy_plot(runs: Sequence[Run]) -> Markup:
    """Size and accuracy of the runs that can be compared in both; nothing where fewer than two can."""
    tried = {
        place: Tried(
            config=f"{place}",
            bytes=run.report["size"]["quantized_layers_bytes"],
            miou_relative=run.report["accuracy"]["miou_relative"],
        )
        for place, run in enumerate(runs, start=1)
        if not run.differs.keys() & {ACCURACY, SIZE} and run.report["accuracy"]["miou_relative"] is not None
    }
    if len(tried) < 2:
        return Markup("")
    best = front(list(tried.values()))
    points = [Point(one.bytes / 1e6, one.miou_relative, one.config, one in best) for one in tried.values()]
    title = "Size and accuracy of the runs"
    return plots.scatter("runs", title, points, "quantized layers (MB)", "relative mIoU")


def _latency_plot(runs: Sequence[Run]) -> Markup:
    """Latency of the runs that can be compared; nothing where fewer than two can."""
    groups = {}
    for place, run in enumerate(runs, start=1):
        if SPEED not in run.differs:
            before, after = run.report["latency"]["baseline_ms"], run.report["latency"]["quantized_ms"]
            ratio = f"{milliseconds(after)} ({before / after:.2f}×)"
            groups[f"run {place}"] = [
                Bar(before, milliseconds(before), plots.BASELINE),
                Bar(after, ratio, plots.QUANTIZED),
            ]
    return plots.bars("runs-latency", "Latency of the runs", groups) if len(groups) > 1 else Markup("")
