"""From a shell to the file that an engine is made of: filled with float or quantized weights, lowered, kept."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from samq.engines.lint import require_clean
from samq.errors import MachineLacks
from samq.export.fold import fold_constants
from samq.export.half import to_fp16
from samq.export.lower_onnxruntime_cuda import lower_for_onnxruntime_cuda
from samq.export.lower_tensorrt import Lowered, lower_for_tensorrt
from samq.export.opset17 import to_opset17
from samq.export.parts import float_part, quantized_part, save_part
from samq.export.tensorrt_operators import fit_operators
from samq.export.tensorrt_rewrites import REWRITES
from samq.export.tensorrt_targets import TensorRtTarget
from samq.files import write_json
from samq.tools.bench_gpu.cells import Cell, Row
from samq.tools.bench_gpu.record import code_digest
from samq.tools.bench_gpu.shells import DECODERS, NAIVE, OURS, fill, shell_of
from samq.tools.bench_gpu.subject import Subject

MODELOPT = "ModelOpt is not installed; run `pip install samq[modelopt]`"


@dataclass(frozen=True)
class Graph:
    """A lowered graph.

    Args:
        path: the ONNX file.
        float32: names of nodes that a weakly typed build must keep in float32.
        facts: what lowering told, for the record.
    """

    path: Path
    float32: tuple[str, ...]
    facts: dict[str, Any]


class Graphs:
    """Graphs of a model in the folder `work`; what is there already is used again.

    Args:
        target: called where a graph for TensorRT is asked for.
    """

    def __init__(self, subject: Subject, work: Path, target: Callable[[], TensorRtTarget]) -> None:
        self.subject, self.work, self._target = subject, work, target

    def encoder(self, cell: Cell) -> Graph:
        """The encoder's graph of a cell.

        Raises:
            MachineLacks: ModelOpt or TensorRT is not there.
            BadInput: a graph of ours breaks a rule of the target.
        """
        return self._kept(cell, "encoder", lambda path: self._write_encoder(cell, path))

    def decoders(self, cell: Cell) -> dict[int, Graph]:
        """The mask decoders that belong to a cell's encoder, for TensorRT, by points a prompt."""
        return {points: self._decoder(cell, form) for points, form in DECODERS.items()}

    def _decoder(self, cell: Cell, form: str) -> Graph:
        return self._kept(cell, form, lambda path: self._write(self._lowered(cell.row, form, cell.batch), path))

    def prepare(self, cell: Cell) -> None:
        """Trace what the cell needs, which takes no GPU."""
        if cell.row.engine != "torch":
            self._shell(NAIVE if cell.row.naive else OURS, cell.batch)
        if cell.with_masks:
            for form in DECODERS.values():
                self._shell(form, cell.batch)

    def _shell(self, form: str, batch: int) -> ir.Model:
        return shell_of(self.subject.model, self.subject.name, form, batch, self.work / "shells")

    def _kept(self, cell: Cell, part: str, write: Callable[[Path], dict[str, Any]]) -> Graph:
        kind = self._target().name if cell.row.engine == "tensorrt" else "cuda"
        path = self.work / "graphs" / f"{cell.key.replace('/', '-')}-{part}-{kind}-{code_digest(cell)}.onnx"
        notes = path.with_suffix(".json")
        if not (path.is_file() and notes.is_file()):
            write_json(notes, write(path))
        told = json.loads(notes.read_text(encoding="utf-8"))
        return Graph(path, tuple(told["float32"]), told["facts"])

    def _write_encoder(self, cell: Cell, path: Path) -> dict[str, Any]:
        row = cell.row
        if row.modelopt:
            return self._write_modelopt(cell, path)
        if row.naive:
            save_part(self._naive(cell.batch), path)
            return {"float32": [], "facts": {}}
        if row.engine == "tensorrt":
            return self._write(self._lowered(row, OURS, cell.batch), path)
        save_part(lower_for_onnxruntime_cuda(self._canonical(row, OURS, cell.batch)).model, path)
        return {"float32": [], "facts": {}}

    def _lowered(self, row: Row, form: str, batch: int) -> Lowered:
        lowered = lower_for_tensorrt(self._canonical(row, form, batch), self._target(), row.low_rank, rewrites=REWRITES)
        require_clean(lowered.model, self._target())
        return lowered

    def _write(self, lowered: Lowered, path: Path) -> dict[str, Any]:
        save_part(lowered.model, path)
        errors = [layer.fold_error for layer in lowered.layers.values() if layer.fold_error is not None]
        facts: dict[str, Any] = {"requested": dict(Counter(layer.compute for layer in lowered.layers.values()))}
        if errors:
            facts["largest_fold_error"] = max(errors)
        return {"float32": list(lowered.float32), "facts": facts}

    def _canonical(self, row: Row, form: str, batch: int) -> ir.Model:
        shell = fill(self._shell(form, batch), self.subject.model)
        if row.preset is None:
            return float_part(shell, self.subject.model, half=False)
        quantized = self.subject.quantized(row.preset)
        return quantized_part(shell, quantized.model, quantized.codes)

    def _naive(self, batch: int) -> ir.Model:
        """The exported encoder in the types and the opset of the target."""
        target = self._target()
        model = fold_constants(fill(self._shell(NAIVE, batch), self.subject.model))
        fit_operators(model.graph, target)
        return to_fp16(model) if target.strongly_typed else to_opset17(model)

    def _write_modelopt(self, cell: Cell, path: Path) -> dict[str, Any]:
        """ModelOpt's Q/DQ in the naive graph, calibrated on the cell's own images."""
        try:
            from modelopt.onnx.quantization import quantize
        except ImportError as error:
            raise MachineLacks(MODELOPT) from error
        exact = path.with_suffix(".float.onnx")
        save_part(self._naive(cell.batch), exact)
        quantized = path.with_suffix(".int8.onnx")
        quantize(
            str(exact),
            quantize_mode="int8",
            calibration_data={"pixel_values": self.subject.pixels(cell.batch)},
            calibration_method="max",
            high_precision_dtype="fp16" if self._target().strongly_typed else "fp32",
            output_path=str(quantized),
        )
        quantized.replace(path)
        exact.unlink()
        return {"float32": [], "facts": {}}
