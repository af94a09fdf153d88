"""Codes that are moved instead of floats: the same codes."""

from __future__ import annotations

import pytest
from test_fuse_attention import fused, graph

from samq.export.quantize_early import quantize_early

SCALE = """
    scale = Constant <value_float = 0.05> ()
    zero = Constant <value = uint8 {128}> ()
"""
QUANTIZE = "codes = QuantizeLinear (moved, scale, zero)"
BACK = "y = DequantizeLinear (codes, scale, zero)"
INPUT = "float[2, 3, 4] x"
ZEROS = "fill = Constant <value_float = 0.0> ()"
BOUNDS = "one = Constant <value_ints = [1]> () three = Constant <value_ints = [3]> ()"
PADS = "pads = Constant <value_ints = [0, 1, 0, 0, 2, 0]> ()"

# Moves in front of the quantizer, and the sides of the result.
MOVES = {
    "a transpose": ("moved = Transpose <perm = [1, 0, 2]> (x)", "3, 2, 4"),
    "filling": (f"{PADS} moved = Pad (x, pads)", "2, 6, 4"),
    "filling with a given zero": (f"{PADS} {ZEROS} moved = Pad (x, pads, fill)", "2, 6, 4"),
    "a slice": (f"{BOUNDS} moved = Slice (x, one, three, one)", "2, 2, 4"),
}


@pytest.mark.parametrize("case", MOVES)
def test_a_move_works_on_codes(case: str) -> None:
    body, sides = MOVES[case]
    model = graph(f"{SCALE} {body} {QUANTIZE} {BACK}", INPUT, f"float[{sides}] y")
    done, _ = fused(model, quantize_early)
    assert done.count == 1
    (quantizer,) = (node for node in model.graph if node.op_type == "QuantizeLinear")
    assert quantizer.inputs[0] is model.graph.inputs[0]


def test_all_moves_in_a_row_work_on_codes() -> None:
    moves = f"{PADS} filled = Pad (x, pads) s = Constant <value_ints = [3, 4, 4]> () r = Reshape (filled, s)"
    body = f"{SCALE} {moves} moved = Transpose <perm = [1, 0, 2]> (r) {QUANTIZE} {BACK}"
    done, _ = fused(graph(body, INPUT, "float[4, 3, 4] y"), quantize_early)
    assert done.count == 3


STAYS = {
    "other filling": (f"{PADS} fill = Constant <value_float = 1.0> () moved = Pad (x, pads, fill)", "2, 6, 4"),
    "reflected filling": (f'{PADS} moved = Pad <mode = "edge"> (x, pads)', "2, 6, 4"),
    "arithmetic": ("moved = Neg (x)", "2, 3, 4"),
}


@pytest.mark.parametrize("case", STAYS)
def test_what_changes_values_stays_in_front(case: str) -> None:
    body, sides = STAYS[case]
    done, _ = fused(graph(f"{SCALE} {body} {QUANTIZE} {BACK}", INPUT, f"float[{sides}] y"), quantize_early)
    assert done.count == 0


def test_a_move_that_something_else_reads_stays() -> None:
    body = f"{SCALE} moved = Transpose <perm = [1, 0, 2]> (x) {QUANTIZE}"
    both = "real = DequantizeLinear (codes, scale, zero) y = Add (real, moved)"
    done, _ = fused(graph(f"{body} {both}", INPUT, "float[3, 2, 4] y"), quantize_early)
    assert done.count == 0


def test_a_scale_of_each_channel_stays_behind_the_move() -> None:
    scales = """
        scale = Constant <value_floats = [0.05, 0.1]> ()
        zero = Constant <value = uint8[2] {128, 128}> ()
    """
    body = f"{scales} moved = Transpose <perm = [1, 0, 2]> (x) codes = QuantizeLinear <axis = 1> (moved, scale, zero)"
    back = "y = DequantizeLinear <axis = 1> (codes, scale, zero)"
    done, _ = fused(graph(f"{body} {back}", INPUT, "float[3, 2, 4] y"), quantize_early)
    assert done.count == 0
