"""Moves that follow each other: one of them is left, and the same comes out."""

from __future__ import annotations

import pytest
from exported import float_model
from test_fuse_attention import fused, graph

from samq.calib.parts import IMAGE_ENCODER
from samq.export.merge_moves import merge_moves
from samq.export.parts import float_part
from samq.export.trace import StaticShape, trace

SIDES = "sides = Constant <value_ints = [6, 4]> ()"
CUT = """
    zero = Constant <value_ints = [0]> ()
    one = Constant <value_ints = [1]> ()
    two = Constant <value_ints = [2]> ()
    three = Constant <value_ints = [3]> ()
    minus = Constant <value_ints = [-1]> ()
"""

# Body, input, outputs, and the moves that are left of it.
CASES = {
    "reshapes": (
        f"{SIDES} t = Constant <value_ints = [-1, 2]> () z = Reshape (x, sides) y = Reshape (z, t)",
        "float[2, 3, 4] x",
        "float[12, 2] y",
        {"Reshape": 1},
    ),
    "a squeeze and a reshape": (
        f"{SIDES} one = Constant <value_ints = [1]> () z = Squeeze (x, one) y = Reshape (z, sides)",
        "float[2, 1, 12] x",
        "float[6, 4] y",
        {"Reshape": 1},
    ),
    "a reshape that copies a side": (
        f"{SIDES} t = Constant <value_ints = [0, 2, 2]> () z = Reshape (x, sides) y = Reshape (z, t)",
        "float[2, 3, 4] x",
        "float[6, 2, 2] y",
        {"Reshape": 2},
    ),
    "a reshape that changes nothing": (
        "s = Constant <value_ints = [2, -1]> () z = Reshape (x, s) y = Neg (z)",
        "float[2, 3] x",
        "float[2, 3] y",
        {"Neg": 1},
    ),
    "a reshape that only renames the caller's": (
        "s = Constant <value_ints = [2, 3]> () y = Reshape (x, s)",
        "float[2, 3] x",
        "float[2, 3] y",
        {"Reshape": 1},
    ),
    "a reshape of a side that is not known": (
        "s = Constant <value_ints = [2, 3]> () z = Reshape (x, s) y = Neg (z)",
        "float[n, 3] x",
        "float[2, 3] y",
        {"Reshape": 1, "Neg": 1},
    ),
    "slices of two axes": (
        f"{CUT} z = Slice (x, one, three, two, one) y = Slice (z, zero, three, minus, two)",
        "float[2, 3, 4, 5] x",
        "float[2, 3, 2, 2] y",
        {"Slice": 1},
    ),
    "slices of one axis": (
        f"{CUT} z = Slice (x, one, three, one, one) y = Slice (z, zero, one, minus, one)",
        "float[2, 4] x",
        "float[2, 1] y",
        {"Slice": 2},
    ),
    "a slice that is read twice": (
        f"{CUT} z = Slice (x, one, three, one, one) y = Slice (z, zero, one, zero, one) w = Neg (z)",
        "float[2, 4] x",
        "float[1, 2] y, float[2, 2] w",
        {"Slice": 2, "Neg": 1},
    ),
    "a slice to a computed end": (
        f"{CUT} z = Slice (x, one, three, one, one) y = Slice (z, zero, to, zero, one)",
        "float[2, 4] x, int64[1] to",
        "float[n, 2] y",
        {"Slice": 2},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_moves(case: str) -> None:
    body, inputs, outputs, left = CASES[case]
    model = graph(body, inputs, outputs)
    before = len(list(model.graph))
    done, operators = fused(model, merge_moves)
    assert operators == left
    assert done.count == before - len(list(model.graph))


def test_padding_is_cut_off_by_one_slice() -> None:
    model = float_part(trace(float_model(), IMAGE_ENCODER, StaticShape()), float_model(), half=False)
    slices = sum(node.op_type == "Slice" for node in model.graph)
    done, operators = fused(model, merge_moves)
    assert (slices, operators["Slice"], done.count) == (2, 1, 1)
