"""The record as Markdown: a table for each model, each peer's row with how far samq is ahead of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from samq.tools.bench_accuracy.bootstrap import Estimate, ratio
from samq.tools.bench_accuracy.method import FORMS, MODELS, OURS, Method
from samq.tools.bench_accuracy.record import FP32, PHOTOS
from samq.tools.bench_accuracy.scenes import MEASURES
from samq.tools.markdown_table import line

Figures = Mapping[str, Any]

NONE = "—"
PRINTED = "As `python -m samq.tools.bench_accuracy --json RECORD --table` prints it: not written by hand."
COLUMNS = ("method", "activations", "bits", *MEASURES, *(f"ahead by, {measure}" for measure in MEASURES))
LEGEND = (
    "box, click: mIoU / the float model's, with a 95 % bootstrap interval over scenes. agreement: mean IoU of all "
    "masks with the float model's. bits: what codes, scales, zero-points, channel scales and branches of the quantized "
    "layers take, per weight; layers that a config leaves float count as FP16. ahead by: samq's bold row of the same "
    "form, or the one that takes its activations alike, minus this row; paired by scenes. photos: agreement on images "
    "without annotations."
)


def markdown(content: Mapping[str, Any], methods: Sequence[Method]) -> str:
    """All tables of a record (`samq.tools.bench_accuracy.record`), with the rows of these methods, as a document."""
    parts = ["# Accuracy beside peers, by one record", "", PRINTED, "", LEGEND, ""]
    for model in MODELS:
        rows = {key.partition("/")[2]: row for key, row in content["rows"].items() if key.startswith(f"{model}/")}
        if FP32 in rows:
            parts += _section(model, rows, methods)
    return "\n".join([*parts, *_runs(content["runs"]), ""])


def _section(model: str, rows: Mapping[str, Figures], methods: Sequence[Method]) -> Iterator[str]:
    exact = rows[FP32]
    rows = {key: row for key, row in rows.items() if row["scenes"] == exact["scenes"]}
    with_photos = any(PHOTOS in row for row in rows.values())
    columns = (*COLUMNS, PHOTOS) if with_photos else COLUMNS
    yield f"### {model}, {exact['scenes']} scenes"
    yield ""
    for form in FORMS:
        shown = [method for method in methods if method.form == form and method.key in rows]
        if not shown:
            continue
        yield f"**{form}**"
        yield ""
        yield line(columns)
        yield line(["---"] * len(columns))
        for method in sorted(shown, key=lambda method: method.who != OURS):
            yield line(_cells(method, rows, exact, with_photos))
        yield ""


def _cells(method: Method, rows: Mapping[str, Figures], exact: Figures, with_photos: bool) -> list[str]:
    row, rival = rows[method.key], rows.get(method.rival)
    main = method.who == OURS and method.rival == method.key
    title = f"**{method.title}**" if main else method.title
    start = [f"{title} ({row['note']})" if row.get("note") else title, method.inputs]
    if "reason" in row:
        refusal = row["reason"].replace("|", "\\|")
        return [*start, NONE, f"refuses: {refusal}", *[NONE] * (2 * len(MEASURES) - 1 + with_photos)]
    cells = [*start, f"{row['bits']:.2f}", *(_shown(ratio(row[measure], exact[measure])) for measure in MEASURES)]
    for measure in MEASURES:
        if method.who == OURS or rival is None or measure not in rival:
            cells.append(NONE)
        else:
            gains = [ours - theirs for ours, theirs in zip(rival[measure], row[measure], strict=True)]
            cells.append(_shown(ratio(gains, exact[measure]), "+.4f"))
    return [*cells, f"{row[PHOTOS]:.4f}" if PHOTOS in row else NONE] if with_photos else cells


def _shown(estimate: Estimate, form: str = ".4f") -> str:
    return f"{estimate.value:{form}} [{estimate.low:{form}}, {estimate.high:{form}}]"


def _runs(runs: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for index, run in enumerate(runs):
        facts = ", ".join(f"{key} {value}" for key, value in run.items() if key != "command" and value is not None)
        yield f"{index + 1}. `{run['command']}`: {facts}"
