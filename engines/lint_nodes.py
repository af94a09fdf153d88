"""What a TensorRT target asks of nodes, types and shapes; `samq.engines.lint` has the table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from samq.engines.lint_operators import INTEGERS, OPERATORS, TRUTH_VALUES
from samq.export.graph import PRECISION_KEY, producer
from samq.export.tensorrt_targets import TensorRtTarget

Findings = Iterator[tuple[str, str]]  # the node (or value), and what is wrong with it

QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
WEAK_TYPES = (ir.DataType.FLOAT, ir.DataType.INT8, ir.DataType.INT32, ir.DataType.INT64, ir.DataType.BOOL)
STRONG_TYPES = (*WEAK_TYPES, ir.DataType.FLOAT16, ir.DataType.INT4)
RESIZE = {
    "mode": ("nearest", "linear"),
    "coordinate_transformation_mode":
        ("half_pixel", "pytorch_half_pixel", "tf_half_pixel_for_nn", "asymmetric", "align_corners"),
    "nearest_mode": ("floor", "ceil", "round_prefer_floor", "round_prefer_ceil"),
    "keep_aspect_ratio_policy": ("stretch",),
    "antialias": (0,),
}  # fmt: skip
CONSTANT_INPUTS = {"Slice": 3, "Squeeze": 1, "Unsqueeze": 1, "CumSum": 1, "Pad": 3}  # operator → index of its axes


def opset(model: ir.Model, target: TensorRtTarget) -> Findings:
    version = model.opset_imports.get("", 0)
    if version > target.opset:
        yield str(model.graph.name), f"opset {version} is newer than {target.opset}"


def flat(model: ir.Model, target: TensorRtTarget) -> Findings:
    for node in model.graph:
        if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()):
            yield str(node.name), f"{node.op_type} has a subgraph, which is not checked"
    for name in model.functions:
        yield str(name), "is a function, which is not checked"


def names(model: ir.Model, target: TensorRtTarget) -> Findings:
    for name, count in Counter(node.name or "" for node in model.graph).items():
        if not name:
            yield str(model.graph.name), f"{count} nodes have no name"
        elif count > 1:
            yield name, f"{count} nodes are called so"


def operator(model: ir.Model, target: TensorRtTarget) -> Findings:
    for node in model.graph:
        if node.domain or node.op_type not in OPERATORS[target.name]:
            yield str(node.name), f"TensorRT {target.version} imports no {node.domain or 'ONNX'} {node.op_type}"


def operator_types(model: ir.Model, target: TensorRtTarget) -> Findings:
    for node in model.graph:
        index = 1 if node.op_type == "Where" else 0
        value = node.inputs[index] if len(node.inputs) > index else None
        dtype = None if value is None else value.dtype
        table = {ir.DataType.BOOL: TRUTH_VALUES, ir.DataType.INT32: INTEGERS, ir.DataType.INT64: INTEGERS}
        if dtype in table and node.op_type not in table[dtype][target.name]:
            yield str(node.name), f"{node.op_type} takes no {dtype}"


def tensor_types(model: ir.Model, target: TensorRtTarget) -> Findings:
    allowed = STRONG_TYPES if target.strongly_typed else WEAK_TYPES
    values = [*model.graph.inputs, *model.graph.initializers.values(), *(v for n in model.graph for v in n.outputs)]
    for value in values:
        if value.dtype is not None and value.dtype not in allowed:
            yield str(value.name), f"it is {value.dtype}"


def known_shapes(model: ir.Model, target: TensorRtTarget) -> Findings:
    for value in model.graph.inputs:
        if value.shape is None:
            yield str(value.name), "its rank is not known"
        elif any(side.value is None if isinstance(side, ir.SymbolicDim) else side < 1 for side in value.shape):
            yield str(value.name), f"a side of {value.shape} is neither a size nor a name"


def folded(model: ir.Model, target: TensorRtTarget) -> Findings:
    for node in model.graph:
        values = [value for value in node.inputs if value is not None]
        if values and node.op_type not in QUANTIZERS and all(value.const_value is not None for value in values):
            yield str(node.name), f"{node.op_type} reads constants alone"


def axes_constant(model: ir.Model, target: TensorRtTarget) -> Findings:
    for node in model.graph:
        index = 1 if node.op_type.startswith("Reduce") else CONSTANT_INPUTS.get(node.op_type)
        if index is not None and len(node.inputs) > index:
            axes = node.inputs[index]
            if axes is not None and axes.const_value is None:
                yield str(node.name), f"the axes of {node.op_type} are computed"


def int64_range(model: ir.Model, target: TensorRtTarget) -> Findings:
    limits = np.iinfo(np.int32)
    for name, value in model.graph.initializers.items():
        if value.dtype == ir.DataType.INT64 and value.const_value is not None and value.const_value.size:
            array = value.const_value.numpy()
            if array.min() < limits.min or array.max() > limits.max:
                yield name, "it holds integers beyond 32 bits, which are clamped"


def whole_shape(model: ir.Model, target: TensorRtTarget) -> Findings:
    for node in model.graph:
        if node.op_type == "Shape" and {"start", "end"} & set(node.attributes):
            yield str(node.name), "Shape of some sides, of which all are given"


def resize(model: ir.Model, target: TensorRtTarget) -> Findings:
    for node in model.graph:
        if node.op_type == "Resize":
            for name, allowed in RESIZE.items():
                value = node.attributes[name].value if name in node.attributes else allowed[0]
                if value not in allowed:
                    yield str(node.name), f"{name} is {value}, not one of {', '.join(map(str, allowed))}"


def layer_normalization(model: ir.Model, target: TensorRtTarget) -> Findings:
    for node in model.graph:
        mean = producer(node.inputs[1], "ReduceMean") if node.op_type == "Sub" else None
        kept = node.metadata_props.get(PRECISION_KEY) == "float32"
        if mean is not None and mean.inputs[0] is node.inputs[0] and not kept:
            yield str(node.name), "x − mean(x) of a LayerNormalization in pieces, which overflows in FP16"
