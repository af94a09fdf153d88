"""Attention between a few tokens and a whole image without projecting the image, exactly but for the order of sums.

SAM2's mask decoder lets some ten tokens attend to the 4096 of the image and back. Each such attention projects the
image twice, to 128 numbers a token; but the projections of the few tokens can take its weights upon themselves.
With heads h, scale s, image x (keys) and z (values), tokens y and the weights Q, K, V of a head, O of its part of the
projection behind:

    tokens attend    s (y Q + q)(x K + k)ᵀ = s ((y Q + q) Kᵀ) xᵀ + const     what is added to a whole row, softmax drops
                     P (z V + v)           = (P z) V + v                     the rows of P sum up to 1
    the image does   s (x Q + q)(y K + k)ᵀ = s x (Q kʸᵀ) + s q kʸᵀ           with kʸ = y K + k
                     Σ P (y V + v) O       = P · stacked((y V + v) O)

so that the image meets matrices of (heads · tokens) columns, 72 for one click, and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from samq.export.fuse_attention import CONTRIB, Rewrite
from samq.export.graph import Writer, constant_of, int_attribute, producer, remove_unused, replace_value

MANY = 512  # tokens: an image, and no prompt
FLOAT = ir.DataType.FLOAT


@dataclass(frozen=True)
class _Projection:
    """value = reshape(source W + bias).

    Args:
        product: the MatMul.
        source: [B, 1, n, C] or [B, n, C].
        weight: [C, heads · d].
        bias: [heads · d].
        sides: C and heads · d.
        shape: of the value, [B, n, heads · d].
    """

    product: ir.Node
    source: ir.Value
    weight: ir.Value
    bias: ir.Value
    sides: tuple[int, int]
    shape: ir.Shape

    @staticmethod
    def of(value: ir.Value | None) -> _Projection | None:
        """What a value [B, n, heads · d] is projected from; None where it is not, or read by others."""
        if value is None or value.shape is None or len(value.uses()) > 1:
            return None
        reshape = producer(value, "Reshape")
        inner = value if reshape is None else reshape.inputs[0]
        add = producer(inner, "Add")
        product = None if add is None else producer(add.inputs[0], "MatMul")
        if add is None or product is None or len(add.outputs[0].uses()) > 1 or len(product.outputs[0].uses()) > 1:
            return None
        source, weight, bias = product.inputs[0], product.inputs[1], add.inputs[1]
        found, added = constant_of(weight), constant_of(bias)
        if source is None or weight is None or bias is None or found is None or added is None or added.ndim != 1:
            return None
        if found.ndim != 2:
            return None
        return _Projection(product, source, weight, bias, (found.shape[0], found.shape[1]), value.shape)

    @property
    def tokens(self) -> int:
        """How many; 0 for a number that is not known, which is that of points."""
        side = self.shape[1]
        return side if isinstance(side, int) else 0


def absorb_projections(model: ir.Model, many: int = MANY) -> Rewrite:
    """Rewrite, in place, every MultiHeadAttention between an image and fewer tokens.

    Args:
        model: float32, its attentions fused by `samq.export.fuse_attention`.
        many: least number of tokens that makes an image.
    """
    count = 0
    for node in [node for node in model.graph if node.op_type == "MultiHeadAttention"]:
        query, key, value = (_Projection.of(operand) for operand in node.inputs[:3])
        if query is None or key is None or value is None or len(node.inputs) > 3 or "scale" not in node.attributes:
            continue
        attention = _Attention(model.graph, node)
        if key.tokens >= many > query.tokens:
            count += attention.of_tokens(key, value)
        elif query.tokens >= many > key.tokens:
            count += attention.of_image(query)
    remove_unused(model)
    return Rewrite("absorb_projections", count)


class _Attention:
    """Writes one attention anew, in front of its MultiHeadAttention."""

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        self.graph, self.node, self.writer = graph, node, Writer(graph, node, str(node.name))
        self.heads, self.scale = int_attribute(node, "num_heads", 1), node.attributes["scale"].as_float()

    def of_tokens(self, key: _Projection, value: _Projection) -> bool:
        """Few tokens attend to an image."""
        channels, width = key.sides[0], value.sides[1]
        asked = self._matmul(self._by_head(0), self._weight(key, (1, 2, 0), "key_weight"), "asked", of=key.product)
        asked = self._reshape(asked, (0, -1, channels), "asked_rows")  # [B, heads · T, C]
        scores = self._matmul(asked, self._image(key, "keys"), "scores", transB=1, alpha=self.scale)
        seen = self._matmul(self._softmax(scores), self._image(value, "values"), "seen")  # [B, heads · T, C]
        seen = self._reshape(seen, (0, self.heads, -1, value.sides[0]), "seen_by_head")
        weight = self._weight(value, (1, 0, 2), "value_weight")
        attended = self._matmul(seen, weight, "attended", of=value.product)
        attended = self._transpose(attended, (0, 2, 1, 3), "attended_by_token")
        result = self.node.outputs[0]
        merged = self._reshape(attended, (0, -1, width), "merged")
        replace_value(self.graph, result, self._write("Add", [merged, value.bias], "biased", shape=result.shape))
        return True

    def of_image(self, query: _Projection) -> bool:
        """An image attends to few tokens and what it sees is projected; False, and nothing written, where it is not."""
        projection = _projection_of(self.node.outputs[0])
        outer = None if projection is None else projection.inputs[1]
        if projection is None or outer is None:
            return False
        (channels, width), tokens = query.sides, query.tokens
        keys = self._transpose(self._by_head(1), (0, 1, 3, 2), "keys_turned")  # [B, heads, d, T]
        weight = self._weight(query, (1, 0, 2), "query_weight")
        asked = self._matmul(weight, keys, "asked", of=query.product, alpha=self.scale)
        asked = self._transpose(asked, (0, 2, 1, 3), "asked_of_channel")
        asked = self._reshape(asked, (0, channels, -1), "asked_columns")  # [B, C, heads · T]
        bias = self._reshape(query.bias, (1, self.heads, 1, width // self.heads), "query_bias")
        offset = self._reshape(self._matmul(bias, keys, "offset", alpha=self.scale), (0, 1, -1), "offset_row")
        scores = self._write(
            "Add", [self._matmul(self._image(query, "image"), asked, "scores"), offset], "scores_offset"
        )
        weights = self._softmax(self._reshape(scores, (0, tokens, self.heads, -1), "scores_by_head"))
        weights = self._reshape(weights, (0, tokens, -1), "weights_joined")
        seen = self._reshape(outer, (self.heads, width // self.heads, -1), "outer_weight")
        seen = self._matmul(self._by_head(2), seen, "seen", of=projection)  # [B, heads, T, C']
        result = projection.outputs[0]
        assert result.shape is not None
        columns = result.shape[-1]
        assert isinstance(columns, int)
        attended = self._matmul(weights, self._reshape(seen, (0, -1, columns), "seen_rows"), "attended")
        sides = (0, *(side for side in result.shape[1:] if isinstance(side, int)))
        replace_value(self.graph, result, self._reshape(attended, sides, "projected", result.shape))
        return True

    def _by_head(self, index: int) -> ir.Value:
        """An input [B, T, heads · d] as [B, heads, T, d]."""
        value = self.node.inputs[index]
        assert value is not None
        split = self._reshape(value, (0, 0, self.heads, -1), f"input{index}")
        return self._transpose(split, (0, 2, 1, 3), f"input{index}_by_head")

    def _weight(self, projection: _Projection, order: tuple[int, int, int], name: str) -> ir.Value:
        """A weight [C, heads · d], its axes C, heads and d in another order."""
        channels, width = projection.sides
        split = self._reshape(projection.weight, (channels, self.heads, width // self.heads), f"{name}/split")
        return self._transpose(split, order, name)

    def _image(self, projection: _Projection, name: str) -> ir.Value:
        """What is projected: [B, n, C]."""
        return self._reshape(projection.source, (-1, projection.tokens, projection.sides[0]), name)

    def _matmul(
        self, left: ir.Value, right: ir.Value, name: str, of: ir.Node | None = None, **attributes: Any
    ) -> ir.Value:
        """A product; `of`: the projection that it does, whose name it takes on."""
        result = self._write("FusedMatMul" if attributes else "MatMul", [left, right], name, **attributes)
        node = result.producer()
        if of is not None and node is not None:
            node.name = of.name
            node.metadata_props.update(of.metadata_props)
        return result

    def _softmax(self, scores: ir.Value) -> ir.Value:
        return self._write("Softmax", [scores], "weights", axis=-1)

    def _transpose(self, value: ir.Value, order: tuple[int, ...], name: str) -> ir.Value:
        return self._write("Transpose", [value], name, perm=order)

    def _reshape(self, value: ir.Value, sides: tuple[int, ...], name: str, shape: ir.Shape | None = None) -> ir.Value:
        return self._write(
            "Reshape", [value, self.writer.constant(np.array(sides), f"{name}/sides")], name, shape=shape
        )

    def _write(
        self, op: str, inputs: list[ir.Value], name: str, shape: ir.Shape | None = None, **attributes: Any
    ) -> ir.Value:
        domain = CONTRIB if op == "FusedMatMul" else ""
        return self.writer.node(op, inputs, name, domain=domain, dtype=FLOAT, shape=shape, **attributes)


def _projection_of(value: ir.Value) -> ir.Node | None:
    """The MatMul with a weight that alone reads a value, past Reshapes."""
    users = value.consumers()
    if len(users) != 1 or value.is_graph_output():
        return None
    if users[0].op_type == "Reshape":
        return _projection_of(users[0].outputs[0])
    weight = constant_of(users[0].inputs[1]) if users[0].op_type == "MatMul" else None
    return users[0] if weight is not None and weight.ndim == 2 else None
