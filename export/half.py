"""A graph with float32 arithmetic → the same graph with FP16 arithmetic, every type written in the graph.

Graph inputs and outputs stay float32, with a Cast behind and in front of them, so that callers see no difference.
What FP16 would spoil keeps its float32 arithmetic:

| part of the graph                                     | in FP16                                                      |
|-------------------------------------------------------|--------------------------------------------------------------|
| angles: all that Sin and Cos are computed from        | an image coordinate of 1000 is known to half a pixel         |
| counts: sums of truth values, integers cast to float, |                                                              |
| and all that is computed from them                    | 65,536 pixels of a mask are infinitely many                  |
| Q/DQ whose scale is computed, and that computation    | the scale of a small token, a range / 127, becomes 0         |
| operands that ONNX defines in float32 alone           | not valid (the scales of Resize, Range, …)                   |

LayerNormalization stays one node, whose sums `stash_type` keeps in float32. Q/DQ gets FP16 scales, which are exact, for
every stored scale is an FP16 number; it therefore reads and gives FP16. Weights stored in FP16 lose their Cast.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from samq.errors import BadInput
from samq.export.graph import add_initializer, constant_of, int_attribute, producer, remove_unused

FLOAT, FLOAT16 = ir.DataType.FLOAT, ir.DataType.FLOAT16
QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
FIRST_OPSET = 19  # whose Q/DQ takes FP16 scales


def to_fp16(model: ir.Model) -> ir.Model:
    """Give a float32 model FP16 arithmetic, in place.

    Args:
        model: opset 19 or later, without subgraphs; every float value knows its type. Nodes of other domains than
            ONNX's are taken to accept FP16 wherever they have float32.

    Raises:
        BadInput: a finite constant is too large for FP16; the message names it.
        ValueError: the opset is older than 19 (a bug of the caller).
    """
    if model.opset_imports[""] < FIRST_OPSET:
        raise ValueError(f"opset {model.opset_imports['']} has no Q/DQ with FP16 scales; to_fp16 needs {FIRST_OPSET}")
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    _Converter(model).convert()
    remove_unused(model)
    return model


class _Converter:
    """One conversion: which nodes keep float32, and each value in both types as it is asked for."""

    def __init__(self, model: ir.Model) -> None:
        self.graph, self.opset = model.graph, model.opset_imports[""]
        self.exact = needing_float32(self.graph)
        self.original = {value: value.dtype for node in self.graph for value in (*node.inputs, *node.outputs) if value}
        self.converted: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def convert(self) -> None:
        for node in list(self.graph):
            for index, value in enumerate(node.inputs):
                if value is not None and self.original[value] == FLOAT:
                    wanted = FLOAT if node in self.exact or self._is_float32_alone(node, index) else FLOAT16
                    node.replace_input_with(index, self._in_type(value, wanted, node))
            self._type_outputs(node)
        for index, output in enumerate(self.graph.outputs):
            if output.dtype == FLOAT16 and self.original.get(output) == FLOAT:
                self._float32_output(index, output)

    def _type_outputs(self, node: ir.Node) -> None:
        """FP16 for what was float32, unless the node keeps float32."""
        if node in self.exact or (node.op_type == "Cast" and int_attribute(node, "to", 0) != FLOAT):
            return
        if node.op_type == "Cast":
            node.attributes["to"] = ir.AttrInt64("to", FLOAT16)
        filling = node.attributes.get("value")
        if node.op_type == "ConstantOfShape" and (filling is None or filling.as_tensor().dtype == FLOAT):
            value = np.zeros(1, np.float16) if filling is None else filling.as_tensor().numpy().astype(np.float16)
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(value))
        for output in node.outputs:
            if output.dtype == FLOAT:
                output.type = ir.TensorType(FLOAT16)

    def _in_type(self, value: ir.Value, wanted: ir.DataType, before: ir.Node) -> ir.Value:
        """`value` itself, its constant rounded, what a Cast read, or a new Cast of it."""
        if value.dtype == wanted:
            return self._without_cast(value, wanted)
        key = (value, wanted)
        if key not in self.converted:
            constant = value.const_value
            if constant is not None and wanted == FLOAT16:
                self.converted[key] = add_initializer(
                    self.graph, f"{value.name}_as_fp16", _rounded(str(value.name), constant.numpy())
                )
            else:
                self.converted[key] = self._cast(value, wanted, before)
        return self.converted[key]

    def _without_cast(self, value: ir.Value, wanted: ir.DataType) -> ir.Value:
        """What a Cast read that has become one from a type to the same type."""
        cast = producer(value, "Cast")
        source = None if cast is None else cast.inputs[0]
        return source if source is not None and source.dtype == wanted else value

    def _cast(self, value: ir.Value, wanted: ir.DataType, before: ir.Node) -> ir.Value:
        suffix = "fp16" if wanted == FLOAT16 else "fp32"
        node = ir.node("Cast", [value], {"to": wanted}, name=f"{value.name}/to_{suffix}")
        output = node.outputs[0]
        output.name, output.type, output.shape = f"{value.name}_to_{suffix}", ir.TensorType(wanted), value.shape
        self.graph.insert_before(before, node)
        return output

    def _float32_output(self, index: int, value: ir.Value) -> None:
        """The graph's output is a Cast of `value`, under the name that callers know."""
        name, value.name = value.name, f"{value.name}_fp16"
        node = ir.node("Cast", [self._without_cast(value, FLOAT16)], {"to": FLOAT}, name=f"{name}/to_fp32")
        output = node.outputs[0]
        output.name, output.type, output.shape = name, ir.TensorType(FLOAT), value.shape
        self.graph.append(node)
        self.graph.outputs[index] = output

    def _is_float32_alone(self, node: ir.Node, index: int) -> bool:
        """Whether ONNX takes no FP16 for this input."""
        if node.domain:
            return False
        schema = onnx.defs.get_schema(node.op_type, self.opset)
        formal = schema.inputs[min(index, len(schema.inputs) - 1)]
        return "tensor(float16)" not in formal.types


def needing_float32(graph: ir.Graph) -> set[ir.Node]:
    """The nodes that keep float32 arithmetic (the table above, but for single operands).

    A runtime that chooses the types of a float32 graph itself has to be told of them.
    """
    found: set[ir.Node] = set()
    for node in graph:
        if node.op_type in ("Sin", "Cos"):
            found |= {node, *_behind(node.inputs, set())}
        elif _counts(node):
            found |= {node, *_computed_from(node)}
        elif node.op_type in QUANTIZERS and constant_of(node.inputs[1]) is None:
            found.add(node)
            if node.op_type == "QuantizeLinear":
                found |= _behind(node.inputs[1:2], set(node.inputs[:1]))
        elif node.op_type == "Range" and node.outputs[0].dtype == FLOAT:
            found.add(node)
    return found


def _counts(node: ir.Node) -> bool:
    """A Cast of integers to float32, or a float32 sum of truth values."""
    if node.op_type == "ReduceSum":
        truth = producer(node.inputs[0], "Cast")
        return truth is not None and node.outputs[0].dtype == FLOAT and _source_type(truth) == ir.DataType.BOOL
    integers = (ir.DataType.INT64, ir.DataType.INT32)
    return node.op_type == "Cast" and int_attribute(node, "to", 0) == FLOAT and _source_type(node) in integers


def _source_type(cast: ir.Node) -> ir.DataType | None:
    source = cast.inputs[0]
    return None if source is None else source.dtype


def _behind(values: Iterable[ir.Value | None], end: set[ir.Value | None]) -> set[ir.Node]:
    """Nodes that compute these values, back to the inputs of the graph or to `end`."""
    found: set[ir.Node] = set()
    waiting = list(values)
    while waiting:
        value = waiting.pop()
        node = None if value is None or value in end else value.producer()
        if node is not None and node not in found:
            found.add(node)
            waiting += node.inputs
    return found


def _computed_from(node: ir.Node) -> set[ir.Node]:
    """Nodes that read a float result of this one, and so on."""
    found: set[ir.Node] = set()
    waiting = [node]
    while waiting:
        for output in waiting.pop().outputs:
            new = [user for user in output.consumers() if output.dtype == FLOAT and user not in found]
            found.update(new)
            waiting += new
    return found


def _rounded(name: str, array: NDArray[np.float32]) -> NDArray[np.float16]:
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    if np.isinf(half).any() and not np.array_equal(np.isinf(half), np.isinf(array)):
        largest = float(np.abs(array[np.isfinite(array)]).max())
        raise BadInput(f"{name}: it holds {largest:g}, and FP16 ends at 65504; keep this model in float32")
    return half
