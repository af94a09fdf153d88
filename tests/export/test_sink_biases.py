"""Biases that other operators take: the same answers from fewer sums, and biases that cannot go stay."""

from __future__ import annotations

import pytest
from exported import as_written, float_model, largest_error
from test_fuse_attention import HEADS, TAIL, VARIANTS, feeds_of, fused, graph

from samq.calib.parts import IMAGE_ENCODER, MASK_DECODER
from samq.export.fuse_attention import fuse_attention, fuse_skip_layer_norm
from samq.export.graph import constant_of, producer
from samq.export.lower_onnxruntime_cuda import separate_parts
from samq.export.parts import float_part
from samq.export.sink_biases import sink_biases
from samq.export.trace import StaticShape, trace

BIAS = """
    bias = Constant <value_floats = [5.0, 6.0, 7.0, 8.0]> ()
    biased = Add (x, bias)
"""
SIDES = "sides = Constant <value_ints = [-1, 4]> ()"
LAST = "axes = Constant <value_ints = [-1]> ()"
MIDDLE = "axes = Constant <value_ints = [1]> ()"
BOUNDS = """
    one = Constant <value_ints = [1]> ()
    two = Constant <value_ints = [2]> ()
"""
WEIGHT = "w = Constant <value = float[4, 2] {1, 2, 3, 4, 5, 6, 7, 8}> ()"
NORM = """
    gain = Constant <value_floats = [1.0, 2.0, 3.0, 4.0]> ()
    shift = Constant <value_floats = [0.1, 0.2, 0.3, 0.4]> ()
"""

# What reads `biased`, the result's shape, and the operator whose result gets the bias.
MOVES = {
    "a reshape": (f"{SIDES} y = Reshape (biased, sides)", "6, 4", "Reshape"),
    "a transpose": ("y = Transpose <perm = [1, 0, 2]> (biased)", "3, 2, 4", "Transpose"),
    "a slice": (f"{BOUNDS} y = Slice (biased, one, two, one, one)", "2, 1, 4", "Slice"),
    "a maximum": (f"{MIDDLE} y = ReduceMax <keepdims = 0> (biased, axes)", "2, 4", "ReduceMax"),
    "a sum": ("y = Add (z, biased)", "2, 3, 4", "Add"),
    "a layer": (f"{WEIGHT} y = MatMul (biased, w)", "2, 3, 2", "MatMul"),
}


@pytest.mark.parametrize("case", MOVES)
def test_a_bias_moves_behind(case: str) -> None:
    body, shape, operator = MOVES[case]
    inputs = "float[2, 3, 4] x" + (", float[2, 3, 4] z" if case == "a sum" else "")
    model = graph(BIAS + body, inputs, f"float[{shape}] y")
    done, _ = fused(model, sink_biases)
    assert done.count == 0
    last = producer(model.graph.outputs[0], "Add")
    assert last is not None
    assert constant_of(last.inputs[1]) is not None
    assert producer(last.inputs[0], operator) is not None


STAYS = {
    "a padding": ("p = Constant <value_ints = [0, 1, 0, 0, 1, 0]> () y = Pad (biased, p)", "2, 5, 4"),
    "another function": ("y = Gelu (biased)", "2, 3, 4"),
    "channels elsewhere": ("y = Transpose <perm = [0, 2, 1]> (biased)", "2, 4, 3"),
    "channels in another side": ("s = Constant <value_ints = [2, 12]> () y = Reshape (biased, s)", "2, 12"),
    "part of the channels": (f"{BOUNDS} {LAST} y = Slice (biased, one, two, axes, one)", "2, 3, 1"),
    "channels backwards": (
        f"""{LAST}
        from = Constant <value_ints = [3]> ()
        to = Constant <value_ints = [-9]> ()
        y = Slice (biased, from, to, axes, axes)
        """,
        "2, 3, 4",
    ),
    "a maximum over channels": (f"{LAST} y = ReduceMax <keepdims = 0> (biased, axes)", "2, 3"),
    "a product with itself": ("t = Transpose <perm = [0, 2, 1]> (biased) y = MatMul (biased, t)", "2, 3, 3"),
    "a right-hand side": ("w = Constant <value = float[1, 2] {1, 2}> () y = MatMul (w, only)", "1, 4"),
}


@pytest.mark.parametrize("case", STAYS)
def test_a_bias_stays_in_front_of(case: str) -> None:
    body, shape = STAYS[case]
    first = BIAS if case != "a right-hand side" else BIAS.replace("biased", "only")
    inputs = "float[2, 3, 4] x" if case != "a right-hand side" else "float[2, 4] x"
    model = graph(first + body, inputs, f"float[{shape}] y")
    before = [node.op_type for node in model.graph]
    done, _ = fused(model, sink_biases)
    assert (done.count, [node.op_type for node in model.graph]) == (0, before)


def test_a_biased_value_that_the_caller_or_two_others_read_stays() -> None:
    for body, outputs in (
        (f"{BIAS} y = Neg (biased) z = Abs (biased)", "float[2, 3, 4] y, float[2, 3, 4] z"),
        (f"{BIAS} {SIDES} y = Reshape (biased, sides)", "float[6, 4] y, float[2, 3, 4] biased"),
    ):
        model = graph(body, "float[2, 3, 4] x", outputs)
        fused(model, sink_biases)
        (add,) = [node for node in model.graph if node.op_type == "Add"]
        assert add.inputs[0] is model.graph.inputs[0]


def test_biases_on_one_way_become_one() -> None:
    """Of two summands, of which one is spread, and of a constant behind them."""
    body = f"""
        {BIAS}
        other = Constant <value_floats = [1.0, 2.0, 3.0, 4.0]> ()
        shifted = Add (other, z)
        sides = Constant <value_ints = [2, 3, 1, 4]> ()
        cells = Reshape (biased, sides)
        total = Add (shifted, cells)
        y = Add (total, other)
    """
    done, operators = fused(graph(body, "float[2, 3, 4] x, float[2, 3, 5, 4] z", "float[2, 3, 5, 4] y"), sink_biases)
    assert (done.count, operators["Add"]) == (2, 2)


def test_a_bias_becomes_part_of_a_table() -> None:
    body = f"{BIAS} table = Constant <value = float[2, 4] {{1, 2, 3, 4, 5, 6, 7, 8}}> () y = Add (table, biased)"
    done, operators = fused(graph(body, "float[3, 2, 4] x", "float[3, 2, 4] y"), sink_biases)
    assert (done.count, operators["Add"]) == (1, 1)


def test_layers_and_their_branches_take_the_bias_of_what_they_read() -> None:
    body = f"""
        {BIAS} {WEIGHT}
        down = Constant <value = float[4, 1] {{1, 2, 3, 4}}> ()
        up = Constant <value = float[1, 2] {{1, 2}}> ()
        own = Constant <value_floats = [1.0, 2.0]> ()
        product = MatMul (biased, w)
        narrow = MatMul (biased, down)
        branch = MatMul (narrow, up)
        both = Add (product, branch)
        y = Add (both, own)
    """
    done, operators = fused(graph(body, "float[2, 3, 4] x", "float[2, 3, 2] y"), sink_biases)
    assert (done.count, operators["Add"]) == (1, 2)


@pytest.mark.parametrize("own", [True, False], ids=["with a bias", "without"])
def test_a_norm_takes_the_biases_of_both_summands(own: bool) -> None:
    first = "z" if not own else "shifted"
    body = f"""
        {BIAS} {NORM}
        shifted = Add (z, shift)
        sides = Constant <value_ints = [2, 3, 4]> ()
        cells = Reshape (biased, sides)
        total = Add (cells, {first})
        y = LayerNormalization <axis = -1> (total, gain, shift)
    """
    inputs = "float[3, 2, 4] x, float[2, 3, 4] z"
    model = graph(body, inputs, "float[2, 3, 4] y, float[2, 3, 4] total")
    fused(model, fuse_skip_layer_norm)
    done, operators = fused(model, sink_biases)
    assert (done.count, operators["Add"]) == (1, 0)


PROJECTED = """
    bq = Constant <value_floats = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]> ()
    q = Add (xq, bq)
    k = Add (xk, bq)
    v = Add (xv, bq)
"""


def test_attention_needs_the_bias_of_its_queries_alone() -> None:
    inputs = "float[b, 5, 16] xq, float[b, 7, 16] xk, float[b, 7, 16] xv"
    model = graph(PROJECTED + HEADS + VARIANTS["plain"] + TAIL, inputs, "float[b, 5, 16] y")
    fused(model, fuse_attention)
    done, operators = fused(model, sink_biases)
    assert (done.count, operators["Add"]) == (1, 2)
    (attention,) = [node for node in model.graph if node.op_type == "MultiHeadAttention"]
    assert [producer(value, "Add") is not None for value in attention.inputs] == [True, False, False]
    assert [user.op_type for user in attention.outputs[0].consumers()] == ["Add"]


def test_sums_that_are_left_in_an_encoder() -> None:
    """Queries, the first position, the residual that no norm follows at once or at all, the pyramid's."""
    model = float_part(trace(float_model(), IMAGE_ENCODER, StaticShape()), float_model(), half=False)
    for step in (fuse_attention, fuse_skip_layer_norm, separate_parts):
        step(model)
    before = sum(node.op_type == "Add" for node in model.graph)
    done, operators = fused(model, sink_biases)
    assert before - operators["Add"] == done.count > 10
    attentions = [node for node in model.graph if node.op_type == "MultiHeadAttention"]
    assert not [node for node in attentions for value in node.inputs[1:] if producer(value, "Add") is not None]


def test_the_decoder_loses_no_bias() -> None:
    model = float_part(trace(float_model(), MASK_DECODER, StaticShape(prompts=2, points=2)), float_model(), half=False)
    fuse_attention(model)
    feeds = feeds_of(model)
    before = as_written(model, feeds)
    assert sink_biases(model).count >= 7
    for found, expected in zip(as_written(model, feeds), before, strict=True):
        assert largest_error(found, expected) < 1e-4
