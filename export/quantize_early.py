"""Activations quantized in front of moves instead of behind them, exactly: bytes are moved, not floats.

Q(move(x)) = move(Q(x))                     for one scale a tensor; what Pad fills up with zeros, it fills up with
                                            the code of zero
"""

from __future__ import annotations

import onnx_ir as ir

from samq.export.fuse_attention import Rewrite
from samq.export.graph import PAD_VALUE, constant_of, pads_with_zeros, remove_unused

MOVES = ("Reshape", "Transpose", "Slice", "Pad")


def quantize_early(model: ir.Model) -> Rewrite:
    """Exchange, in place, every QuantizeLinear of one constant scale with the moves in front that it alone reads."""
    count = 0
    for node in [node for node in model.graph if node.op_type == "QuantizeLinear"]:
        scale = constant_of(node.inputs[1])
        if scale is None or scale.ndim or len(node.inputs) < 3:
            continue
        while (move := _move_in_front(node)) is not None:
            _exchange(model.graph, move, node)
            count += 1
    remove_unused(model)
    return Rewrite("quantize_early", count)


def _move_in_front(quantize: ir.Node) -> ir.Node | None:
    value = quantize.inputs[0]
    move = None if value is None else value.producer()
    if value is None or move is None or move.op_type not in MOVES or len(value.uses()) > 1 or value.is_graph_output():
        return None
    return move if move.op_type != "Pad" or pads_with_zeros(move) else None


def _exchange(graph: ir.Graph, move: ir.Node, quantize: ir.Node) -> None:
    """x → move → quantize becomes x → quantize → move; the codes keep their name behind both."""
    moved, codes = move.outputs[0], quantize.outputs[0]
    source = move.inputs[0]
    assert source is not None
    quantize.replace_input_with(0, source)
    ir.convenience.replace_all_uses_with(codes, moved)
    move.replace_input_with(0, codes)
    if move.op_type == "Pad":
        move.resize_inputs(max(PAD_VALUE + 1, len(move.inputs)))
        move.replace_input_with(PAD_VALUE, quantize.inputs[2])
    moved.type, codes.shape = codes.type, source.shape
    moved.name, codes.name = codes.name, f"{codes.name}/{move.outputs[0].name}"
    graph.remove(quantize)
    graph.insert_before(move, quantize)
