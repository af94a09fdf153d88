"""Rewrites for TensorRT's fusing compiler, each exact, each a choice of its own so that its gain can be measured.

| name            | graph                              | becomes                                                      |
|-----------------|------------------------------------|--------------------------------------------------------------|
| `split_qkv`     | Split of one GEMM's columns        | a GEMM for each part (`samq.export.split_projections`)       |
| `wide_heads`    | heads of an odd width, many keys   | heads filled to a multiple of 16 (`samq.export.pad_heads`)   |
| `merge_windows` | attention in windows of few tokens | several windows at a time (`samq.export.merge_windows`)      |
| `pair_max`      | ReduceMax over axes of side 2      | Max of the two halves, elementwise: max{a, b} = Max(a, b)    |
| `concat_pad`    | Pad with zeros behind the last one | Concat with zeros, which does not part the regions around it |

`docs/tensorrt.md` has what each gained.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import numpy as np
import onnx_ir as ir

from samq.export.graph import Writer, constant_of, int_attribute, pads_with_zeros, remove_unused, replace_value
from samq.export.merge_windows import merge_windows
from samq.export.pad_heads import pad_heads
from samq.export.split_projections import split_projections

FLOAT = ir.DataType.FLOAT
MANY_KEYS = 1024  # from which on attention costs more than the wider GEMMs around it
HEAD_MULTIPLE = 16  # tensor cores take the inner dimension in steps of 16


def rewrite(model: ir.Model, names: Collection[str]) -> dict[str, int]:
    """Apply rewrites in place, in the order of the table; how many places each of them changed.

    Args:
        model: float32, after `fold_constants` and the lowering of its GEMMs.
        names: of `REWRITES`.

    Raises:
        KeyError: there is no such rewrite (a bug of the caller).
    """
    unknown = set(names) - set(REWRITES)
    if unknown:
        raise KeyError(f"no rewrite is called {sorted(unknown)}")
    return {name: apply(model) for name, apply in REWRITES.items() if name in names}


def pair_max(model: ir.Model) -> int:
    """See the table; reductions over other axes, or of unknown sides, stay."""
    return _each(model, "ReduceMax", _as_pairs)


def concat_pad(model: ir.Model) -> int:
    """See the table; other paddings, and those of unknown sides, stay."""
    return _each(model, "Pad", _as_concat)


def _split_qkv(model: ir.Model) -> int:
    return len(split_projections(model))


def _wide_heads(model: ir.Model) -> int:
    return len(pad_heads(model, head_width))


def head_width(width: int, keys: int) -> int:
    """The width that heads get: the next multiple of 16 where there are many keys, else their own."""
    return -(-width // HEAD_MULTIPLE) * HEAD_MULTIPLE if keys >= MANY_KEYS else width


REWRITES: Mapping[str, Callable[[ir.Model], int]] = {
    "split_qkv": _split_qkv,
    "wide_heads": _wide_heads,
    "merge_windows": merge_windows,
    "pair_max": pair_max,
    "concat_pad": concat_pad,
}


def _each(model: ir.Model, op: str, change: Callable[[Writer, ir.Node], ir.Value | None]) -> int:
    """Let what a function writes stand for the output of every node of a type; how many it wrote."""
    count = 0
    for node in [node for node in model.graph if node.op_type == op and not node.domain]:
        new = change(Writer(model.graph, node, str(node.name)), node)
        if new is not None:
            replace_value(model.graph, node.outputs[0], new)
            count += 1
    remove_unused(model)
    return count


def _as_pairs(writer: Writer, node: ir.Node) -> ir.Value | None:
    value, axes = node.inputs[0], _axes(node)
    if value is None or value.shape is None or axes is None or int_attribute(node, "keepdims", 1):
        return None
    sides = list(value.shape)
    ordered = sorted((axis % len(sides) for axis in axes), reverse=True)
    if any(sides[axis] != 2 for axis in ordered):
        return None
    for axis in ordered:
        del sides[axis]
        halves = [
            writer.node(
                "Gather",
                [value, writer.constant(np.array(half), f"index_{axis}_{half}")],
                f"half_{axis}_{half}",
                dtype=value.dtype,
                shape=ir.Shape(sides),
                axis=axis,
            )
            for half in (0, 1)
        ]
        value = writer.node("Max", halves, f"max_{axis}", dtype=value.dtype, shape=ir.Shape(sides))
    return value


def _axes(reduce: ir.Node) -> list[int] | None:
    """Axes as an input (opset 18 and later) or as an attribute."""
    if "axes" in reduce.attributes:
        return list(reduce.attributes["axes"].as_ints())
    axes = constant_of(reduce.inputs[1]) if len(reduce.inputs) > 1 else None
    return None if axes is None else [int(axis) for axis in axes]


def _as_concat(writer: Writer, node: ir.Node) -> ir.Value | None:
    value, padding = node.inputs[0], constant_of(node.inputs[1])
    if value is None or value.shape is None or padding is None or len(node.inputs) > 3 or not pads_with_zeros(node):
        return None
    sides = [side for side in value.shape if isinstance(side, int)]
    before, behind = np.split(padding, 2)
    if before.any() or behind.min() < 0 or not behind.any() or len(sides) != len(value.shape) or value.dtype != FLOAT:
        return None
    for axis in reversed(np.flatnonzero(behind).tolist()):
        filling = sides.copy()
        filling[axis] = int(behind[axis])
        sides[axis] += filling[axis]
        zeros = writer.constant(np.zeros(filling, np.float32), f"zeros_{axis}")
        value = writer.node("Concat", [value, zeros], f"filled_{axis}", dtype=FLOAT, shape=ir.Shape(sides), axis=axis)
    return value
