"""From a shell to the file that an engine is made of: filled with float or quantized weights, lowered, kept."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from samq.engines.lint import require_clean
from samq.export.fold import fold_constants
from samq.export.half import to_fp16
from samq.export.lower_onnxruntime_cuda import lower_for_onnxruntime_cuda
from samq.export.lower_tensorrt import Lowered, lower_for_tensorrt
from samq.export.opset17 import to_opset17
from samq.export.parts import float_part, quantized_part, save_part
from samq.export.placement import EVERYWHERE, Placement
from samq.export.tensorrt_operators import fit_operators
from samq.export.tensorrt_rewrites import REWRITES
from samq.export.tensorrt_targets import TensorRtTarget
from samq.files import write_json
from samq.tools.bench_gpu.cells import Cell, Row
from samq.tools.bench_gpu.peers import with_fp16, with_fusions, with_modelopt
from samq.tools.bench_gpu.record import code_digest
from samq.tools.bench_gpu.shells import ATTENTION, DECODERS, NAIVE, OURS, fill, shell_of
from samq.tools.bench_gpu.subject import Subject

MLPS = Placement(layers={"*": "mlp"})


@dataclass(frozen=True)
class AtHand:
    """What the TensorRT and the GPU of this machine want.

    Args:
        target: of the lowering.
        placement: that samq ships for them.
        machine: both by name; plans serve on one of them alone.
    """

    target: TensorRtTarget
    placement: Placement = EVERYWHERE
    machine: str = ""


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
        at_hand: called where a graph for TensorRT is asked for.
    """

    def __init__(self, subject: Subject, work: Path, at_hand: Callable[[], AtHand]) -> None:
        self.subject, self.work, self._at_hand = subject, work, at_hand

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
            self._shell(_form(cell.row), cell.batch)
        if cell.with_masks:
            for form in DECODERS.values():
                self._shell(form, cell.batch)

    def _shell(self, form: str, batch: int) -> ir.Model:
        return shell_of(self.subject.model, self.subject.name, form, batch, self.work / "shells")

    def _kept(self, cell: Cell, part: str, write: Callable[[Path], dict[str, Any]]) -> Graph:
        kind = self._kind() if cell.row.engine == "tensorrt" else "cuda"
        path = self.work / "graphs" / f"{cell.key.replace('/', '-')}-{part}-{kind}-{code_digest(cell)}.onnx"
        notes = path.with_suffix(".json")
        if not (path.is_file() and notes.is_file()):
            write_json(notes, write(path))
        told = json.loads(notes.read_text(encoding="utf-8"))
        return Graph(path, tuple(told["float32"]), told["facts"])

    def _kind(self) -> str:
        """What a graph for TensorRT depends on besides the code."""
        at_hand = self._at_hand()
        placed = hashlib.sha256(str(at_hand.placement.layers).encode()).hexdigest()[:8]
        return f"{at_hand.target.name}-{placed}"

    def _write_encoder(self, cell: Cell, path: Path) -> dict[str, Any]:
        row = cell.row
        if row.peer:
            return {"float32": [], "facts": self._write_peer(cell, path)}
        if row.engine == "tensorrt":
            return self._write(self._lowered(row, OURS, cell.batch), path)
        canonical = self._canonical(row, OURS, cell.batch)
        lowered = lower_for_onnxruntime_cuda(canonical, weights=row.weights)
        save_part(lowered.model, path)
        return {"float32": [], "facts": {"rewrites": {rewrite.name: rewrite.count for rewrite in lowered.rewrites}}}

    def _lowered(self, row: Row, form: str, batch: int) -> Lowered:
        at_hand = self._at_hand()
        lowered = lower_for_tensorrt(
            self._canonical(row, form, batch),
            at_hand.target,
            row.low_rank,
            placement={"shipped": at_hand.placement, "everywhere": EVERYWHERE, "mlp": MLPS}[row.placement],
            rewrites=REWRITES,
        )
        require_clean(lowered.model, at_hand.target)
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

    def _write_peer(self, cell: Cell, path: Path) -> dict[str, Any]:
        """A peer's graph, from the encoder as it is exported; returns what it told."""
        exported = fill(self._shell(_form(cell.row), cell.batch), self.subject.model)
        if cell.row.engine == "tensorrt" and cell.row.peer == "exported":
            save_part(self._fitted(exported), path)
            return {}
        exact = path.with_suffix(".float.onnx")
        try:
            if cell.row.peer == "modelopt":
                save_part(self._fitted(exported), exact)
                half = self._at_hand().target.strongly_typed
                return with_modelopt(exact, path, self.subject.pixels(cell.batch), half=half)
            save_part(exported, exact)
            return with_fusions(exact, path) if cell.row.peer == "tools" else with_fp16(exact, path)
        finally:
            exact.unlink(missing_ok=True)

    def _fitted(self, model: ir.Model) -> ir.Model:
        """The exported encoder in the types and the opset of the target."""
        target = self._at_hand().target
        fold_constants(model)
        fit_operators(model.graph, target)
        return to_fp16(model) if target.strongly_typed else to_opset17(model)


def _form(row: Row) -> str:
    """The shell of a row's encoder."""
    if row.peer:
        return ATTENTION if row.peer == "attention" else NAIVE
    return OURS
