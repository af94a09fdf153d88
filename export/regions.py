"""Cutting an encoder's graph at the tokens behind each block, so that blocks can be built, timed and placed alone."""

from __future__ import annotations

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


def structure(model: ir.Model) -> tuple[object, ...]:
    """Equal for graphs that differ in nothing but weights and names: operators, attributes, types and shapes."""
    return tuple(
        (
            node.op_type,
            tuple(sorted((name, repr(attribute.value)) for name, attribute in node.attributes.items())),
            tuple(None if v is None else (str(v.dtype), str(v.shape)) for v in node.inputs),
        )
        for node in model.graph
    )
