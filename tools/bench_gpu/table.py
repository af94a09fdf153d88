"""The record as Markdown: a table for each model and batch, why cells are empty, and where the figures are from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from samq.tools.bench_gpu.cells import MODELS, NAIVE_FP16, ROWS, Cell
from samq.tools.bench_gpu.masks import KINDS
from samq.tools.bench_gpu.record import cells_of
from samq.tools.markdown_table import table

Figures = Mapping[str, Any]

NONE = "—"
PRINTED = "As `python -m samq.tools.bench_gpu --json RECORD --table` prints it: not written by hand."
COLUMNS = ("encoder", "ms", "ms, CUDA graph", "naive FP16 / this", "engine MB", "build s", "error", "simulated")
MASK_COLUMNS = ("encoder and decoder", "scenes", "box: engines", "box: simulated", "click: engines", "click: simulated")
LEGEND = (
    "ms: median of 100 runs after a warm-up, by CUDA events, inputs and outputs on the GPU; ONNX Runtime's by the "
    "host's clock around runs that wait for the GPU, and of fewer runs (10 at least) where one takes over 0.2 s. "
    "naive FP16 / this: the time of TensorRT's naive FP16 engine by this one's, each with or without a CUDA graph, "
    "whichever is shorter. error: ‖x − FP32‖ / ‖FP32‖ of `image_embeddings` against PyTorch in FP32, TF32 off, same "
    "input; simulated: that of the quantized model in PyTorch."
)
MASK_LEGEND = (
    "box, click: relative mIoU (against FP32 in PyTorch) on the held-out scenes, through the TensorRT encoder and "
    "decoder, and as PyTorch simulates it."
)


def markdown(content: Mapping[str, Any]) -> str:
    """All tables of a record, see `samq.tools.bench_gpu.record`, as a document."""
    cells = cells_of(content)
    parts = [f"# Image encoders on {content['gpu']}\n", f"{PRINTED}\n", f"{LEGEND}\n"]
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
    parts = [
        f"### {model}, batch {batch}\n",
        table(COLUMNS, [_line(name, figures, rows) for name, figures in measured]),
    ]
    compared = [(name, figures) for name, figures in measured if "masks" in figures]
    if compared:
        parts.append(table(MASK_COLUMNS, [_masks_line(name, figures["masks"]) for name, figures in compared]))
        parts.append(f"{MASK_LEGEND}\n")
    notes = [f"- {ROWS[name].title}: {note}" for name, figures in ordered for note in _notes(figures)]
    runs = sorted({figures["run"] for _, figures in ordered})
    notes.append(f"- Measured in run {', '.join(str(run + 1) for run in runs)}.\n")
    return "\n".join([*parts, *notes])


def _line(name: str, figures: Figures, rows: Mapping[str, Figures]) -> list[str]:
    naive = _shortest(rows.get(NAIVE_FP16, {}))
    shortest = _shortest(figures)
    return [
        ROWS[name].title,
        f"{figures['ms']:.2f}",
        _shown(figures.get("graph_ms"), ".2f"),
        _shown(None if naive is None or shortest is None else naive / shortest, ".2f"),
        _shown(figures.get("megabytes"), ".1f"),
        _shown(figures.get("build_seconds"), ".0f"),
        _shown(figures.get("relative_error"), ".1e"),
        _shown(figures.get("simulated_error"), ".1e"),
    ]


def _shortest(figures: Figures) -> float | None:
    """Milliseconds with or without a CUDA graph, whichever is less."""
    return min((figures[key] for key in ("ms", "graph_ms") if figures.get(key) is not None), default=None)


def _masks_line(name: str, masks: Figures) -> list[str]:
    """Relative mIoU by kind, through the engines and simulated."""
    relative = [masks[kind][source] / masks["float"][kind] for kind in KINDS for source in ("engines", "simulated")]
    return [ROWS[name].title, str(masks["scenes"]), *(f"{value:.4f}" for value in relative)]


def _notes(figures: Figures) -> Sequence[str]:
    if "reason" in figures:
        return (f"none: {figures['reason']}",)
    notes = [figures["note"]] if figures.get("note") else []
    asked = [f"asks for {_counted(figures['requested'])}"] if figures.get("requested") else []
    executed = [f"executes {_counted(figures['executed'])}"] if figures.get("executed") else []
    if asked or executed:
        notes.append(", ".join(asked + executed))
    if figures.get("launched"):
        kinds = (
            f"{own['launches']} × {kind} ({own['microseconds']:.0f} µs)" for kind, own in figures["launched"].items()
        )
        notes.append(f"launches {', '.join(kinds)}")
    elif figures.get("not_traced"):
        notes.append(f"launches: not known; {figures['not_traced']}")
    if figures.get("on_cpu"):
        operators = Counter(node.rpartition(" (")[2].rstrip(")") for node in figures["on_cpu"])
        notes.append(f"on the CPU {_counted(operators)}")
    return notes


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} × {what}" for what, count in sorted(counts.items()))


def _shown(value: float | None, form: str) -> str:
    return NONE if value is None else format(value, form)


def _run(index: int, run: Mapping[str, Any]) -> str:
    facts = ", ".join(f"{key} {value}" for key, value in run.items() if key not in ("command", "gpu"))
    return f"{index + 1}. `{run['command']}` on {run['gpu']}: {facts}"


def progress_line(cell: Cell, figures: Figures) -> str:
    """What is printed when a cell is done."""
    told = f"{figures['ms']:.3f} ms" if "ms" in figures else figures["reason"]
    return f"{cell.key:<32} {told} ({figures['seconds']:.0f} s)"
