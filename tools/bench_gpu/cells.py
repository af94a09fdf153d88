"""What is measured: the rows of the tables, and a cell for each model, batch and row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

from samq.export.lower_tensorrt import Branch
from samq.tools.prove_parity import BACKBONES

DEMO = "demo"
MODELS = (*BACKBONES, DEMO)
DEFAULT_MODELS = ("tiny", "base-plus", "large", DEMO)
DEFAULT_BATCHES = (1, 8)

Engine = Literal["torch", "onnxruntime", "tensorrt"]

# How long cells of a model take, beside those of tiny.
SIZES = {"tiny": 1.0, "small": 1.2, "base-plus": 2.0, "large": 5.0, DEMO: 1.0}
GUESSED_SECONDS = {"torch": 30.0, "onnxruntime": 40.0, "tensorrt": 75.0}  # of tiny, before anything is known
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
        naive: transformers' own encoder as exported, without samq's rewrites.
        modelopt: with the Q/DQ that ModelOpt puts into it.
        low_rank: what becomes of low-rank branches on TensorRT.
        compiled: by `torch.compile`.
    """

    name: str
    title: str
    engine: Engine
    preset: str | None = None
    naive: bool = False
    modelopt: bool = False
    low_rank: Branch = "branch"
    compiled: bool = False


NAIVE_FP16, OUR_FP16 = "trt-naive-fp16", "trt-fp16"

ROWS: dict[str, Row] = {
    row.name: row
    for row in (
        Row("torch-eager", "PyTorch, FP16, eager", "torch"),
        Row("torch-compile", "PyTorch, FP16, `torch.compile`", "torch", compiled=True),
        Row("ort-fp16", "ONNX Runtime CUDA, FP16", "onnxruntime"),
        Row("ort-w4only", "ONNX Runtime CUDA, int4_w4only", "onnxruntime", "int4_w4only"),
        Row("ort-svdquant", "ONNX Runtime CUDA, int4_svdquant", "onnxruntime", "int4_svdquant"),
        Row(NAIVE_FP16, "TensorRT, FP16, naive", "tensorrt", naive=True),
        Row(OUR_FP16, "TensorRT, FP16, ours", "tensorrt"),
        Row("trt-naive-int8", "TensorRT, INT8, naive (ModelOpt)", "tensorrt", naive=True, modelopt=True),
        Row("trt-w8a8", "TensorRT, int8_w8a8", "tensorrt", "int8_w8a8"),
        Row("trt-w4a8", "TensorRT, int4_w4a8", "tensorrt", "int4_w4a8"),
        Row("trt-svdquant-branch", "TensorRT, int4_svdquant, branch", "tensorrt", "int4_svdquant"),
        Row("trt-svdquant-fold", "TensorRT, int4_svdquant, fold", "tensorrt", "int4_svdquant", low_rank="fold"),
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
        return self.model == DEMO and self.batch == 1 and self.row.engine == "tensorrt" and not self.row.naive


def plan(models: Sequence[str], batches: Sequence[int], rows: Sequence[str]) -> list[Cell]:
    """All cells, in the order in which they are measured."""
    return [Cell(model, batch, ROWS[row]) for model in models for batch in batches for row in rows]


def groups(cells: Sequence[Cell], jobs: int) -> Iterator[list[Cell]]:
    """Cells whose engines are built at once: up to `jobs` neighbours of one model on TensorRT, any other alone."""
    for (_, engine), neighbours in groupby(cells, lambda cell: (cell.model, cell.row.engine)):
        waiting = list(neighbours)
        size = jobs if engine == "tensorrt" else 1
        for start in range(0, len(waiting), size):
            yield waiting[start : start + size]


def expected_seconds(group: Sequence[Cell], known: Mapping[Cell, Mapping[str, Any]]) -> float:
    """How long a group will take: by the slowest of `known` with its engine, else by a guess; builds overlap."""
    slowest = max(_seconds(cell, known) for cell in group)
    return RESERVE * slowest * (1 + OVERLAP * (len(group) - 1))


def _seconds(cell: Cell, known: Mapping[Cell, Mapping[str, Any]]) -> float:
    seen = [
        float(figures["seconds"]) / SIZES[other.model]
        for other, figures in known.items()
        if other.row.engine == cell.row.engine and other.row.compiled == cell.row.compiled and "ms" in figures
    ]
    return SIZES[cell.model] * max(seen, default=GUESSED_SECONDS[cell.row.engine])
