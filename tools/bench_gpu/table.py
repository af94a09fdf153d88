"""The record as Markdown: a table for each model and batch, why cells are empty, and where the figures are from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from samq.tools.bench_gpu.cells import MODELS, NAIVE_FP16, OUR_FP16, ROWS, Cell
from samq.tools.bench_gpu.record import cells_of

Figures = Mapping[str, Any]

NONE = "—"
COLUMNS = ("encoder", "ms", "ms, CUDA graph", "naive FP16 / this", "engine MB", "build s", "error", "simulated")
MASK_COLUMNS = ("box: engines", "box: simulated", "click: engines", "click: simulated")
KINDS = ("box", "click")
LEGEND = (
    "ms: median of 100 runs after a warm-up, by CUDA events, inputs and outputs on the GPU; ONNX Runtime's by the "
    "host's clock around runs that wait for the GPU. naive FP16 / this: ratio of the times without CUDA graphs, above "
    "1 is faster. error: ‖x − FP32‖ / ‖FP32‖ of `image_embeddings` against PyTorch in FP32, TF32 off, same input; "
    "simulated: that of the quantized model in PyTorch."
)
MASK_LEGEND = (
    "box, click: relative mIoU (against FP32 in PyTorch) on the held-out scenes, through the TensorRT encoder and "
    "decoder, and as PyTorch simulates it."
)


def markdown(content: Mapping[str, Any]) -> str:
    """All tables of a record, see `samq.tools.bench_gpu.record`."""
    cells = cells_of(content)
    parts = [f"{LEGEND}\n"]
    for model in MODELS:
        own = {cell: figures for cell, figures in cells.items() if cell.model == model}
        for batch in sorted({cell.batch for cell in own}):
            rows = {cell.row.name: figures for cell, figures in own.items() if cell.batch == batch}
            parts.append(_section(model, batch, rows))
    parts.append("\n".join(_run(index, run) for index, run in enumerate(content["runs"])))
    return "\n".join(parts) + "\n"


def _section(model: str, batch: int, rows: Mapping[str, Figures]) -> str:
    ordered = [(name, rows[name]) for name in ROWS if name in rows]
    measured = [(name, figures) for name, figures in ordered if "ms" in figures]
    with_masks = any("masks" in figures for _, figures in measured)
    header = [*COLUMNS, *(MASK_COLUMNS if with_masks else ())]
    lines = [header, ["---"] * len(header)]
    for name, figures in measured:
        line = _line(name, figures, rows)
        lines.append([*line, *(_relative_masks(figures, rows.get(OUR_FP16)) if with_masks else ())])
    title = f"### {model}, batch {batch}\n"
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    notes = [f"- {ROWS[name].title}: {note}" for name, figures in ordered for note in _notes(figures)]
    runs = sorted({figures["run"] for _, figures in ordered})
    notes.append(f"- Measured in run {', '.join(str(run + 1) for run in runs)}.")
    return "\n".join([title, table, "", *((MASK_LEGEND, "") if with_masks else ()), *notes, ""])


def _line(name: str, figures: Figures, rows: Mapping[str, Figures]) -> list[str]:
    naive = rows.get(NAIVE_FP16, {}).get("ms")
    return [
        ROWS[name].title,
        f"{figures['ms']:.2f}",
        _shown(figures.get("graph_ms"), ".2f"),
        _shown(None if naive is None else naive / figures["ms"], ".2f"),
        _shown(figures.get("megabytes"), ".1f"),
        _shown(figures.get("build_seconds"), ".0f"),
        _shown(figures.get("relative_error"), ".1e"),
        _shown(figures.get("simulated_error"), ".1e"),
    ]


def _relative_masks(figures: Figures, exact: Figures | None) -> list[str]:
    """Relative mIoU by kind, through the engines and simulated; FP32's own is what the FP16 row simulates."""
    masks, reference = figures.get("masks"), (exact or {}).get("masks")
    if masks is None or reference is None or masks["scenes"] != reference["scenes"]:
        return [NONE] * len(MASK_COLUMNS)
    return [
        _shown(masks[kind][source] / reference[kind]["simulated"], ".4f")
        for kind in KINDS
        for source in ("engines", "simulated")
    ]


def _notes(figures: Figures) -> Sequence[str]:
    if "reason" in figures:
        return (f"none: {figures['reason']}",)
    return (figures["note"],) if figures.get("note") else ()


def _shown(value: float | None, form: str) -> str:
    return NONE if value is None else format(value, form)


def _run(index: int, run: Mapping[str, Any]) -> str:
    facts = ", ".join(f"{key} {value}" for key, value in run.items() if key not in ("command", "gpu"))
    return f"{index + 1}. `{run['command']}` on {run['gpu']}: {facts}"


def progress_line(cell: Cell, figures: Figures) -> str:
    """What is printed when a cell is done."""
    told = f"{figures['ms']:.3f} ms" if "ms" in figures else figures["reason"]
    return f"{cell.key:<32} {told} ({figures['seconds']:.0f} s)"
