"""Windows of few tokens attend several at a time, with a mask between them, for kernels work on tiles of 64 tokens:

    softmax(diag(S₁, …, Sₘ) + M) diag-wise v = (softmax(S₁) v₁, …, softmax(Sₘ) vₘ)

where M is 0 within a window and so low elsewhere that the exponential is 0. The products between windows are computed
and thrown away, which costs less than tiles that are empty for the most part.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from samq.export.attention import Attention, reshape_to, sides_of
from samq.export.graph import Writer

TILE = 64  # tokens
FORBIDDEN = -30000.0  # within FP16's range beside any score; exp(score + FORBIDDEN) is 0 in float32, too
FLOAT = ir.DataType.FLOAT


def merge_windows(model: ir.Model) -> int:
    """Merge in place what fits a tile twice or more; how many attentions were changed.

    Args:
        model: float32; attentions of unknown sides stay.
    """
    count = 0
    for softmax in [node for node in model.graph if node.op_type == "Softmax"]:
        attention = Attention.of(softmax)
        if attention is not None and (windows := _at_a_time(attention)) > 1:
            _merge(model.graph, attention, windows)
            count += 1
    return count


def _at_a_time(attention: Attention) -> int:
    """How many windows fit a tile of keys."""
    return int(np.gcd(attention.batch, TILE // attention.keys)) if attention.keys <= TILE else 1


def _merge(graph: ir.Graph, attention: Attention, windows: int) -> None:
    queries, keys = attention.queries, attention.keys
    for split in attention.splits:
        batch, tokens, heads, width = sides_of(split.outputs[0])
        reshape_to(graph, split, (batch // windows, tokens * windows, heads, width))
        split.outputs[0].shape = ir.Shape([batch // windows, tokens * windows, heads, width])
        _move_sides(split.outputs[0])
    batch, heads = attention.batch, sides_of(attention.splits[0].outputs[0])[2]
    shape = ir.Shape([batch, heads, queries * windows, keys * windows])
    for value in (attention.scores.outputs[0], attention.softmax.outputs[0]):
        value.shape = shape
    product = attention.product.outputs[0]
    product.shape = ir.Shape([batch, heads, queries * windows, sides_of(product)[3]])
    _move_sides(product)
    writer = Writer(graph, attention.softmax, str(attention.softmax.name))
    mask = np.kron(1 - np.eye(windows), np.full((queries, keys), FORBIDDEN)).astype(np.float32)
    masked = writer.node(
        "Add",
        [attention.scores.outputs[0], writer.constant(mask, "between_windows")],
        "masked",
        dtype=FLOAT,
        shape=shape,
    )
    attention.softmax.replace_input_with(0, masked)


def _move_sides(value: ir.Value) -> None:
    """The sides of what is transposed from a value."""
    for node in value.consumers():
        if node.op_type == "Transpose":
            assert value.shape is not None
            node.outputs[0].shape = ir.Shape([value.shape[axis] for axis in node.attributes["perm"].as_ints()])
