"""Cutting an encoder's graph at the tokens behind each block, so that blocks can be built, timed and placed alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import onnx_ir as ir

TOKENS = "/tokens"  # behind a block's name: the value that leaves it, see `samq.export.linear.fill_sites`


def cut_blocks(model: ir.Model) -> Iterator[tuple[str, ir.Model]]:
    """Each block of the backbone as a graph of its own, by name, from the tokens before it to those behind it.

    The first one takes the pixels, for its tokens come straight from the patch embedding. What follows the last block
    (the feature pyramid) is not among them.

    Args:
        model: an image encoder, canonical, float or lowered; not changed.

    Raises:
        ValueError: no tokens are named in it (a bug of the caller).
    """
    named = [v.name for node in model.graph for v in node.outputs if v.name is not None and v.name.endswith(TOKENS)]
    if not named:
        raise ValueError(f"{model.graph.name}: no value is called <block>{TOKENS}")
    before = [str(value.name) for value in model.graph.inputs]
    for tokens in named:
        graph = ir.convenience.extract(model.graph, before, [tokens])
        graph.opset_imports.update(model.opset_imports)
        block = tokens.removesuffix(TOKENS)
        graph.name = block
        yield block, ir.Model(graph, ir_version=model.ir_version, producer_name=model.producer_name)
        before = [tokens]


def structure(model: ir.Model) -> str:
    """Digest of a graph without its weights and names: operators, attributes, wiring, types, shapes and whole numbers.

    Graphs of one structure take the same time, for kernels depend on no numbers but whole ones: shapes, axes, paddings.
    """
    numbers: dict[ir.Value | None, object] = {value: index for index, value in enumerate(model.graph.inputs)}
    digest = hashlib.sha256()
    for node in model.graph:
        attributes = sorted((name, repr(attribute.value)) for name, attribute in node.attributes.items())
        inputs = [(numbers.get(value), _signature(value)) for value in node.inputs]
        digest.update(repr((node.op_type, attributes, inputs, [_signature(value) for value in node.outputs])).encode())
        numbers.update({value: len(numbers) + index for index, value in enumerate(node.outputs)})
    return digest.hexdigest()


def _signature(value: ir.Value | None) -> object:
    """Type and shape; of a constant of whole numbers its content too."""
    if value is None:
        return None
    constant = value.const_value
    whole = constant is not None and constant.dtype == ir.DataType.INT64
    return str(value.dtype), str(value.shape), constant.numpy().tobytes() if constant is not None and whole else b""
