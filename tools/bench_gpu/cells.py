"""What is measured: the rows of the tables, and a cell for each model, batch and row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

from samq.export.lower_onnxruntime_cuda import Weights
from samq.export.lower_tensorrt import Branch
from samq.tools.prove_parity import BACKBONES

DEMO = "demo"
MODELS = (*BACKBONES, DEMO)
DEFAULT_MODELS = ("tiny", "base-plus", "large", DEMO)
DEFAULT_BATCHES = (1, 8)

Engine = Literal["torch", "onnxruntime", "tensorrt"]
Peer = Literal["", "exported", "attention", "tools", "modelopt"]
Where = Literal["shipped", "everywhere", "mlp"]

# How long cells of a model take, beside those of tiny.
SIZES = {"tiny": 1.0, "small": 1.2, "base-plus": 2.0, "large": 5.0, DEMO: 1.0}
GUESSED_SECONDS = {"torch": 30.0, "onnxruntime": 40.0, "tensorrt": 75.0}  # of tiny, before anything is known
GUESSED_MEASURING = 10.0  # the same for a plan that is there
RESERVE = 1.25  # cells vary
OVERLAP = 0.25  # what each further cell of a group adds: its measurement, and slower builds


@dataclass(frozen=True)
class Row:
    """One way to run an encoder.

    Args:
        name: short and unique.
        title: in the tables.
        engine: what runs it.
        preset: of the quantized weights, None for FP16.
        peer: instead of samq's graph the one that transformers and PyTorch export: as it is, with attention as one
            operator (opset 23), through ONNX Runtime's tools, or with ModelOpt's Q/DQ.
        placement: on TensorRT, INT8 where the placement says so that samq ships for the GPU at hand, which is what a
            user gets, or everywhere, or in MLPs alone.
        low_rank: what becomes of low-rank branches on TensorRT.
        weights: how ONNX Runtime keeps quantized weights.
        compiled: by `torch.compile`.
    """

    name: str
    title: str
    engine: Engine
    preset: str | None = None
    peer: Peer = ""
    placement: Where = "shipped"
    low_rank: Branch = "branch"
    weights: Weights = "dequantized at load"
    compiled: bool = False


NAIVE_FP16, OUR_FP16 = "trt-naive-fp16", "trt-fp16"


def _torch(name: str, title: str, *, compiled: bool = False) -> Row:
    return Row(f"torch-{name}", f"PyTorch, FP16, {title}", "torch", compiled=compiled)


def _ort(name: str, title: str, preset: str | None = None, **options: Any) -> Row:
    return Row(f"ort-{name}", f"ONNX Runtime CUDA, {title}", "onnxruntime", preset, **options)


def _trt(name: str, title: str, preset: str | None = None, **options: Any) -> Row:
    return Row(f"trt-{name}", f"TensorRT, {title}", "tensorrt", preset, **options)


def _trt_quantized() -> Iterator[Row]:
    """samq's quantized rows: first as a user gets them, then with INT8 everywhere, then in MLPs alone."""
    for suffix, title, placement in (("", "placed", "shipped"), ("-everywhere", "INT8 everywhere", "everywhere")):
        for kind in ("w8a8", "w4a8"):
            preset = f"int{kind[1]}_{kind}"
            yield _trt(f"{kind}{suffix}", f"{preset}, {title}", preset, placement=placement)
        for branch in ("branch", "fold"):
            yield _trt(
                f"svdquant-{branch}{suffix}", f"int4_svdquant, {branch}, {title}", "int4_svdquant",
                placement=placement, low_rank=branch,
            )  # fmt: skip
    for kind in ("w8a8", "w4a8"):
        preset = f"int{kind[1]}_{kind}"
        yield _trt(f"{kind}-mlp", f"{preset}, INT8 in MLPs", preset, placement="mlp")


def _ort_quantized() -> Iterator[Row]:
    """samq's 4-bit rows: first as a user gets them, then with packed weights."""
    for kind in ("w4only", "svdquant"):
        preset = f"int4_{kind}"
        yield _ort(kind, f"{preset}, dequantized at load", preset)
        yield _ort(f"{kind}-packed", f"{preset}, packed", preset, weights="packed")


ROWS: dict[str, Row] = {
    row.name: row
    for row in (
        _torch("eager", "eager"),
        _torch("compile", "`torch.compile`", compiled=True),
        _ort("naive-fp16", "FP16, naive", peer="exported"),
        _ort("attention-fp16", "FP16, naive at opset 23 (Attention)", peer="attention"),
        _ort("tools-fp16", "FP16, by ONNX Runtime's tools", peer="tools"),
        _ort("fp16", "FP16, ours"),
        *_ort_quantized(),
        _trt("naive-fp16", "FP16, naive", peer="exported"),
        _trt("naive-int8", "INT8, naive (ModelOpt)", peer="modelopt"),
        _trt("fp16", "FP16, ours"),
        *_trt_quantized(),
    )
}


@dataclass(frozen=True)
class Cell:
    """A row for one model and one number of images."""

    model: str
    batch: int
    row: Row

    @property
    def key(self) -> str:
        """Its name in the record."""
        return f"{self.model}/{self.batch}/{self.row.name}"

    @property
    def with_masks(self) -> bool:
        """Masks are compared with the truth: the demo model's, through our TensorRT engines."""
        return self.model == DEMO and self.batch == 1 and self.row.engine == "tensorrt" and not self.row.peer


def plan(models: Sequence[str], batches: Sequence[int], rows: Sequence[str]) -> list[Cell]:
    """All cells, in the order in which they are measured."""
    return [Cell(model, batch, ROWS[row]) for model in models for batch in batches for row in rows]


def cell_of(key: str) -> Cell:
    """The cell of a name as it stands in the record.

    Raises:
        ValueError: there is no such model, batch or row.
    """
    model, _, rest = key.partition("/")
    batch, _, row = rest.partition("/")
    if model not in MODELS or not batch.isdecimal() or int(batch) < 1 or row not in ROWS:
        raise ValueError(f"{key} is no cell; one is model/batch/row, as {DEFAULT_MODELS[0]}/1/{OUR_FP16}")
    return Cell(model, int(batch), ROWS[row])


def groups(cells: Sequence[Cell], jobs: int) -> Iterator[list[Cell]]:
    """Cells whose engines are built at once: up to `jobs` neighbours on TensorRT, any other alone."""
    for engine, neighbours in groupby(cells, lambda cell: cell.row.engine):
        waiting = list(neighbours)
        size = jobs if engine == "tensorrt" else 1
        for start in range(0, len(waiting), size):
            yield waiting[start : start + size]


def expected_seconds(group: Sequence[Cell], known: Mapping[Cell, Mapping[str, Any]], *, built: bool) -> float:
    """How long a group will take: by the slowest of `known` with its engine, else by a guess; builds overlap.

    Args:
        built: there is nothing left to build, only to measure.
    """
    slowest = max(_seconds(cell, known, built) for cell in group)
    return RESERVE * slowest * (len(group) if built else 1 + OVERLAP * (len(group) - 1))


def _seconds(cell: Cell, known: Mapping[Cell, Mapping[str, Any]], built: bool) -> float:
    key, kind = "measuring_seconds" if built else "seconds", (cell.row.engine, cell.row.compiled)
    seen = [
        float(figures[key]) / SIZES[other.model]
        for other, figures in known.items()
        if (other.row.engine, other.row.compiled) == kind and "ms" in figures and key in figures
    ]
    guess = GUESSED_MEASURING if built and cell.row.engine == "tensorrt" else GUESSED_SECONDS[cell.row.engine]
    return SIZES[cell.model] * max(seen, default=guess)
