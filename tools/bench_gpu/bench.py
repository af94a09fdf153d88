"""One model on the GPU: a cell's engine is built first, beside others, and measured then, alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samq.engines.onnxruntime_cuda import CudaOptions
from samq.engines.tensorrt_plan import BuildOptions
from samq.tools.bench_gpu import runtimes
from samq.tools.bench_gpu.cells import Cell
from samq.tools.bench_gpu.graphs import AtHand, Graph, Graphs
from samq.tools.bench_gpu.masks import compare_masks, miou
from samq.tools.bench_gpu.subject import Pixels, Subject
from samq.tools.metrics import likeness
from samq.tools.simulation import torch_predictor


@dataclass(frozen=True)
class Lowered:
    """Graphs of a cell.

    Args:
        encoder: None for PyTorch.
        decoders: by points a prompt, where masks are compared.
        seconds: that it took.
    """

    encoder: Graph | None
    decoders: dict[int, Graph]
    seconds: float

    @property
    def graphs(self) -> list[Graph]:
        """All of them."""
        return [*([] if self.encoder is None else [self.encoder]), *self.decoders.values()]


@dataclass(frozen=True)
class Built:
    """What a cell is measured with.

    Args:
        encoder: an ONNX file or a plan, None for PyTorch.
        decoders: plans by points a prompt, where masks are compared.
        facts: for the record.
        seconds: that it took, lowering included.
    """

    encoder: Path | None
    decoders: dict[int, Path]
    facts: dict[str, Any]
    seconds: float


class Bench:
    """Builds and measures the cells of one model.

    Args:
        subject: the model.
        work: folder of graphs and plans.
        at_hand: called where a graph for TensorRT is asked for.
        level: TensorRT's optimization level.
        scenes: held-out scenes on which masks are compared.
    """

    def __init__(self, subject: Subject, work: Path, at_hand: Callable[[], AtHand], level: int, scenes: int) -> None:
        self.subject, self.scenes = subject, scenes
        self.graphs = Graphs(subject, work, at_hand)
        self._at_hand = at_hand
        self._plans = work / "plans"
        self._options = BuildOptions(optimization_level=level, timing_cache=str(work / "timing"))
        self._images: dict[int, tuple[Pixels, NDArray[np.float32]]] = {}

    def lower(self, cell: Cell) -> Lowered:
        """Make a cell's graphs, one cell at a time: PyTorch's exporter shares its state.

        Raises:
            SamqError: as the lowerings do.
        """
        started = time.monotonic()
        encoder = None if cell.row.engine == "torch" else self.graphs.encoder(cell)
        decoders = self.graphs.decoders(cell) if cell.with_masks else {}
        runtimes.give_memory_back()
        return Lowered(encoder, decoders, time.monotonic() - started)

    def build(self, cell: Cell, lowered: Lowered) -> Built:
        """Make a cell's engines; may run beside other builds.

        Raises:
            SamqError: as the builder does.
        """
        started = time.monotonic()
        if lowered.encoder is None:
            return Built(None, {}, {}, lowered.seconds)
        path = self.engine(cell, lowered.encoder)
        plans = {points: self.engine(cell, graph) for points, graph in lowered.decoders.items()}
        return Built(path, plans, lowered.encoder.facts, lowered.seconds + time.monotonic() - started)

    def engine(self, cell: Cell, graph: Graph) -> Path:
        """The plan of one of a cell's graphs, built where it is not there yet; the graph itself off TensorRT.

        Raises:
            SamqError: as the builder does.
        """
        if cell.row.engine != "tensorrt":
            return graph.path
        return runtimes.build_plan(*self._asked(graph))

    def is_built(self, cell: Cell, lowered: Lowered) -> bool:
        """Whether nothing of a cell is left to build."""
        return cell.row.engine != "tensorrt" or all(
            runtimes.is_whole(runtimes.plan_of(*self._asked(graph))) for graph in lowered.graphs
        )

    def _asked(self, graph: Graph) -> tuple[Path, Path, BuildOptions, str]:
        """What decides a graph's plan, and where it is kept."""
        return graph.path, self._plans, replace(self._options, float32=graph.float32), self._at_hand().machine

    def figures(self, cell: Cell, built: Built) -> dict[str, Any]:
        """The figures of a cell, taken with the GPU to itself.

        Raises:
            SamqError: as the engines do.
        """
        pixels, expected = self._images_of(cell.batch)
        runtimes.give_memory_back()
        measured, preset = self._measured(cell, built, pixels).figures(expected), cell.row.preset
        figures = measured | built.facts
        if preset is not None:
            figures["simulated_error"] = self._simulated_error(preset, pixels, expected)
        of_model = None if preset is None or self.subject.is_demo else self.subject.note(preset)
        if notes := [note for note in (of_model, built.facts.get("note"), measured.get("note")) if note]:
            figures["note"] = "; ".join(notes)
        return figures

    def _measured(self, cell: Cell, built: Built, pixels: Pixels) -> runtimes.Measured:
        if built.encoder is None:
            return runtimes.measure_torch(self.subject.model, pixels, compiled=cell.row.compiled)
        if cell.row.engine == "tensorrt":
            return runtimes.measure_tensorrt(built.encoder, pixels)
        options = CudaOptions(gemm_bias=bool(cell.row.peer))  # a peer runs as ONNX Runtime does unasked
        return runtimes.measure_onnxruntime(built.encoder, pixels, options)

    def _simulated_error(self, preset: str, pixels: Pixels, expected: NDArray[np.float32]) -> float | None:
        simulated = runtimes.exact_embeddings(self.subject.quantized(preset).model, pixels)
        return likeness(simulated, expected)["relative_error"]

    def _images_of(self, batch: int) -> tuple[Pixels, NDArray[np.float32]]:
        """Images, and what the float32 model answers."""
        if batch not in self._images:
            pixels = self.subject.pixels(batch)
            self._images[batch] = pixels, runtimes.exact_embeddings(self.subject.on_device, pixels)
        return self._images[batch]

    def masks(self, cell: Cell, built: Built) -> dict[str, Any]:
        """The masks of a cell that has some, beside their simulation; the GPU may have other work too.

        Raises:
            SamqError: as the engines do.
        """
        assert built.encoder is not None
        preset = cell.row.preset
        model = self.subject.on_device if preset is None else self.subject.quantized(preset).model
        scenes = self.subject.scenes(self.scenes)
        with runtimes.tensorrt_predictor(built.encoder, built.decoders) as engines:
            found = compare_masks(torch_predictor(model), engines, scenes, self.subject.processor)
        return found | {"float": self._float_miou}

    @cached_property
    def _float_miou(self) -> dict[str, float]:
        return miou(torch_predictor(self.subject.on_device), self.subject.scenes(self.scenes), self.subject.processor)
