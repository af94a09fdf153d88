"""ONNX Runtime on the CPU: the engine that runs everywhere."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort  # type: ignore[import-untyped]
from numpy.typing import NDArray

from samq.engines.base import Arrays, Executed, together
from samq.engines.onnxruntime_options import CpuOptions, load_info
from samq.errors import BadInput, MachineLacks, SamqError

_INT8 = "INT8 GEMM"
_EXECUTED = {
    "MatMulIntegerToFloat": _INT8,
    "MatMulInteger": _INT8,
    "QLinearMatMul": _INT8,
    "DynamicQuantizeMatMul": _INT8,
    "QGemm": _INT8,
    "MatMul": "FP32 GEMM",
    "Gemm": "FP32 GEMM",
    "FusedMatMul": "FP32 GEMM",
    "FusedGemm": "FP32 GEMM",
}
INT8_ACCURACY = 4  # accuracy_level of MatMulNBits that quantizes the activations
USUAL = CpuOptions()
VERSION: str = ort.__version__


class OnnxRuntimeEngine:
    """One part of the model as an ONNX Runtime session on the CPU.

    Args:
        path: an ONNX file.
        threads: intra-op threads, 0 for the runtime's choice.
        options: of the session; `open_engine` takes those that an engine was built with.

    Raises:
        BadInput: the file is missing, corrupt or not runnable; the runtime's first line says why.
    """

    def __init__(self, path: Path, threads: int = 0, options: CpuOptions = USUAL) -> None:
        self.path = path
        _require_file(path)
        self._session = _session(path, _session_options(options, threads))
        self.inputs: Sequence[str] = [value.name for value in self._session.get_inputs()]
        self.shapes: Mapping[str, Sequence[int | str]] = {v.name: v.shape for v in self._session.get_inputs()}
        self.outputs: Sequence[str] = [value.name for value in self._session.get_outputs()]

    def run(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        """Outputs by name; `feeds` may hold more than the inputs."""
        try:
            answers = self._session.run(None, {name: feeds[name] for name in self.inputs})
        except Exception as error:
            raise told(self.path, error) from error
        return dict(zip(self.outputs, answers, strict=True))


def open_engine(path: Path, threads: int = 0) -> OnnxRuntimeEngine:
    """An engine as its sidecar says (`samq.engines.onnxruntime_options`).

    Args:
        path, threads: as for `OnnxRuntimeEngine`.

    Raises:
        BadInput: as `OnnxRuntimeEngine`, or the sidecar is missing or corrupt.
        MachineLacks: the engine is meant for a later ONNX Runtime.
    """
    _require_file(path)
    info = load_info(path)
    info.require(path, VERSION)
    return OnnxRuntimeEngine(path, threads, info.options)


def executed_layers(path: Path, options: CpuOptions = USUAL) -> dict[str, Executed]:
    """What ONNX Runtime executes for each layer, read from the graph that its own optimizers leave.

    Args:
        path: a graph whose GEMM nodes are called `<layer>/MatMul`.
        options: of the session.

    Raises:
        BadInput: ONNX Runtime does not take the graph.
    """
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        session_options = _session_options(options, threads=0)
        session_options.optimized_model_filepath = str(optimized)
        _session(path, session_options)
        graph = onnx.load(optimized, load_external_data=False).graph
    gemms: defaultdict[str, list[Executed]] = defaultdict(list)
    for node in _nodes(graph):
        layer, _, role = node.name.partition("/")
        if role.startswith("MatMul") or (role.startswith("Add") and node.op_type in _EXECUTED):
            gemms[layer].append(Executed(_compute(node), node.op_type))
    return {layer: together(found) for layer, found in gemms.items()}


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """All nodes, those in the bodies of others too."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _nodes(attribute.g)


def told(path: Path, error: Exception) -> SamqError:
    """What a run's exception of the runtime means to the user."""
    if "Failed to allocate" in str(error) or "bad_alloc" in str(error):
        return MachineLacks(f"{path.name}: out of memory; use a smaller batch or --image-size")
    return BadInput(f"{path.name}: {first_line(error)}")


def _compute(node: onnx.NodeProto) -> str:
    if node.op_type != "MatMulNBits":
        return _EXECUTED.get(node.op_type, f"unknown ({node.op_type})")
    attributes = {attribute.name: attribute.i for attribute in node.attribute}
    arithmetic = "INT8" if attributes.get("accuracy_level", 0) == INT8_ACCURACY else "FP32"
    return f"INT{attributes['bits']} weights, {arithmetic} arithmetic"


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise BadInput(f"{path} is missing; run `samq-export build` first")


def _session_options(options: CpuOptions, threads: int) -> ort.SessionOptions:
    made = ort.SessionOptions()
    made.intra_op_num_threads = threads
    made.log_severity_level = 3
    for name, value in options.entries(exact=multiplies_exactly()).items():
        made.add_session_config_entry(name, value)
    return made


@cache
def multiplies_exactly() -> bool:
    """Whether this machine's u8 × s8 kernels are exact by themselves: they are asked for the largest sums."""
    rows, inner, columns = 8, 64, 16
    weight = onnx.numpy_helper.from_array(np.full((inner, columns), 127, np.int8), "weight")
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMulInteger", ["codes", "weight"], ["sums"])],
        "probe",
        [onnx.helper.make_tensor_value_info("codes", onnx.TensorProto.UINT8, [rows, inner])],
        [onnx.helper.make_tensor_value_info("sums", onnx.TensorProto.INT32, [rows, columns])],
        [weight],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (sums,) = session.run(None, {"codes": np.full((rows, inner), 255, np.uint8)})
    return bool((sums == 255 * 127 * inner).all())


def _session(path: Path, options: ort.SessionOptions) -> ort.InferenceSession:
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the binding raises classes of its own, all of them directly below Exception
        raise BadInput(f"{path}: ONNX Runtime does not take it ({first_line(error)}); build it again") from error


def first_line(error: Exception) -> str:
    """The first line of an exception's message, or its class where there is none."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
