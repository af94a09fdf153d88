"""Every fusion computes what the graph did before, says how often it fused, and why it did not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from exported import as_written, canonical, float_model, largest_error, skeleton
from numpy.typing import NDArray
from small_model import recipe_of

from samq.calib.parts import IMAGE_ENCODER, MASK_DECODER
from samq.export.fuse_attention import (
    Rewrite,
    add_bias_last,
    fuse_attention,
    fuse_skip_layer_norm,
    pair_maxima,
)
from samq.export.parts import float_part
from samq.export.trace import ANY_SHAPE, StaticShape, trace

Feeds = dict[str, NDArray[np.generic]]
SIDES = {"batch": 2, "prompts": 3, "points": 2}


def graph(body: str, inputs: str, outputs: str = "float[b, s, w] y") -> ir.Model:
    """A model of ONNX' text form, with the shapes that are inferred."""
    text = f'<ir_version: 10, opset_import: ["": 21]> g ({inputs}) => ({outputs}) {{ {body} }}'
    model = ir.from_proto(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text), data_prop=True))
    ir.passes.common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    return model


def feeds_of(model: ir.Model) -> Feeds:
    """Random inputs; dynamic sides are those of `SIDES`, 2 where they have another name."""
    generator = np.random.default_rng(0)
    feeds: Feeds = {}
    for value in model.graph.inputs:
        sides = [side if isinstance(side, int) else SIDES.get(str(side.value), 2) for side in value.shape or ()]
        feeds[str(value.name)] = (
            generator.integers(0, 2, sides)
            if value.dtype == ir.DataType.INT64
            else generator.standard_normal(sides).astype(np.float32)
        )
    return feeds


def fused(model: ir.Model, rewrite: Callable[[ir.Model], Rewrite]) -> tuple[Rewrite, Counter[str]]:
    """Rewrite a model, check that it is valid and computes what it did; what was done, and the operators left."""
    feeds = feeds_of(model)
    before = as_written(model, feeds)
    done = rewrite(model)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    for found, expected in zip(as_written(model, feeds), before, strict=True):
        assert largest_error(found, expected) < 1e-5
    return done, Counter(node.op_type for node in model.graph)


PART = {IMAGE_ENCODER: 5, MASK_DECODER: 7}


@pytest.mark.parametrize("part", PART)
@pytest.mark.parametrize("static", [ANY_SHAPE, StaticShape()], ids=["dynamic", "static"])
def test_all_attention_of_a_part_is_fused(part: str, static: StaticShape) -> None:
    traced = skeleton(part) if static is None else trace(float_model(), part, static)
    model = float_part(traced, float_model(), half=False)
    done, operators = fused(model, fuse_attention)
    assert done == Rewrite("fuse_attention", PART[part])
    assert (operators["MultiHeadAttention"], operators["Softmax"]) == (PART[part], 0)
    assert part == MASK_DECODER or not operators["Mul"]  # the scale is the operator's


def test_norms_of_the_encoder_are_fused() -> None:
    model = float_part(trace(float_model(), IMAGE_ENCODER, StaticShape()), float_model(), half=False)
    before = sum(node.op_type == "Add" for node in model.graph)
    norms, operators = fused(model, fuse_skip_layer_norm)
    assert (norms.count, operators["SkipLayerNormalization"], operators["LayerNormalization"]) == (9, 9, 1)
    assert before - operators["Add"] > 9  # biases in front of the sums go too


def test_biases_of_layers_with_a_branch_move_behind_it() -> None:
    low_rank = {"rank": 8, "max_overhead": None}
    model = canonical(recipe_of("int4_svdquant", ipts=None, wgts={"low_rank": low_rank}), IMAGE_ENCODER)
    branches = sum(node.name is not None and node.name.endswith("/low_rank/Add") for node in model.graph)
    done, _ = fused(model, add_bias_last)
    assert done.count == branches > 10


# Queries, keys and values [b, s, heads·d]; what gives the product's operands, and the scores, differ.
HEADS = """
    four = Constant <value_ints = [0, 0, 2, 8]> ()
    half = Constant <value_float = 0.5> ()
    qr = Reshape (q, four)
    kr = Reshape (k, four)
    vr = Reshape (v, four)
    qt = Transpose <perm = [0, 2, 1, 3]> (qr)
    vt = Transpose <perm = [0, 2, 1, 3]> (vr)
"""
KEYS_AT_ONCE = "kt = Transpose <perm = [0, 2, 3, 1]> (kr)"
KEYS_IN_TWO_STEPS = """
    kh = Transpose <perm = [0, 2, 1, 3]> (kr)
    kt = Transpose <perm = [0, 1, 3, 2]> (kh)
"""
TAIL = """
    probabilities = Softmax <axis = -1> (scores)
    weighted = MatMul (probabilities, vt)
    back = Transpose <perm = [0, 2, 1, 3]> (weighted)
    whole = Constant <value_ints = [0, 0, 16]> ()
    y = Reshape (back, whole)
"""
INPUTS = "float[b, 5, 16] q, float[b, 7, 16] k, float[b, 7, 16] v"
VARIANTS = {
    "plain": f"{KEYS_AT_ONCE} scores = MatMul (qt, kt)",
    "in two steps": f"{KEYS_IN_TWO_STEPS} scores = MatMul (qt, kt)",
    "scaled queries": f"{KEYS_AT_ONCE} qs = Mul (qt, half) scores = MatMul (qs, kt)",
    "scaled keys": f"{KEYS_IN_TWO_STEPS} ks = Mul (half, kt) scores = MatMul (qt, ks)",
    "both scaled": f"{KEYS_AT_ONCE} qs = Mul (qt, half) ks = Mul (kt, half) scores = MatMul (qs, ks)",
    "scaled scores": f"{KEYS_AT_ONCE} raw = MatMul (qt, kt) scores = Mul (raw, half)",
    "divided scores": f"{KEYS_AT_ONCE} raw = MatMul (qt, kt) scores = Div (raw, half)",
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_attention_of_any_form_is_one_operator(variant: str) -> None:
    done, operators = fused(graph(HEADS + VARIANTS[variant] + TAIL, INPUTS, "float[b, 5, 16] y"), fuse_attention)
    assert done == Rewrite("fuse_attention", 1)
    assert operators["MultiHeadAttention"] == 1
    assert not operators.keys() & {"MatMul", "Mul", "Div", "Transpose", "Softmax"}


@pytest.mark.parametrize("scale", [0.5, -0.5])
def test_a_scale_in_front_of_a_maximum_is_drawn_in_where_it_is_positive(scale: float) -> None:
    pooled = f"""
        s = Constant <value_float = {scale}> ()
        axes = Constant <value_ints = [2]> ()
        cells = Constant <value_ints = [0, 5, 2, 16]> ()
        scaled = Mul (x, s)
        pairs = Reshape (scaled, cells)
        q = ReduceMax <keepdims = 0> (pairs, axes)
    """
    inputs = "float[b, 10, 16] x, float[b, 7, 16] k, float[b, 7, 16] v"
    body = pooled + HEADS + VARIANTS["plain"] + TAIL
    done, operators = fused(graph(body, inputs, "float[b, 5, 16] y"), fuse_attention)
    assert done.count == 1
    assert operators["Mul"] == (scale < 0)


def test_a_scale_that_something_else_reads_stays() -> None:
    body = "s = Constant <value_float = 0.5> () q = Mul (x, s)" + HEADS + VARIANTS["plain"] + TAIL
    outputs = "float[b, 5, 16] y, float[b, 5, 16] q"
    inputs = "float[b, 5, 16] x, float[b, 7, 16] k, float[b, 7, 16] v"
    done, operators = fused(graph(body, inputs, outputs), fuse_attention)
    assert (done.count, operators["Mul"]) == (1, 1)


def test_a_result_that_is_not_merged_keeps_its_heads() -> None:
    tail = TAIL.replace("y = Reshape (back, whole)", "y = Neg (back)")
    done, operators = fused(graph(HEADS + VARIANTS["plain"] + tail, INPUTS, "float[b, 5, 2, 8] y"), fuse_attention)
    assert (done.count, operators["Transpose"]) == (1, 0)


REFUSED = {
    "a mask": (f"{KEYS_AT_ONCE} raw = MatMul (qt, kt) scores = Add (raw, mask)", TAIL, "a mask may be added"),
    "keys as they are": (
        "kh = Transpose <perm = [0, 2, 1, 3]> (kr) kt = Identity (kh) scores = MatMul (qt, kt)",
        TAIL,
        "keys are not transposed",
    ),
    "another axis": (VARIANTS["plain"], TAIL.replace("axis = -1", "axis = 2"), "not over the last axis"),
    "no transpose back": (
        VARIANTS["plain"],
        TAIL.replace("back = Transpose <perm = [0, 2, 1, 3]> (weighted)", "back = Identity (weighted)").replace(
            "[0, 0, 16]", "[-1, 5, 16]"
        ),
        "not transposed to",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_plain_attention_is_refused_with_the_reason(case: str) -> None:
    scores, tail, reason = REFUSED[case]
    inputs = INPUTS.replace("[b, 7", "[b, 8" if case == "keys as they are" else "[b, 7")
    inputs = inputs if case != "a mask" else f"{inputs}, float[5, 7] mask"
    model = graph(HEADS + scores + tail, inputs, "float[b, 5, 16] y")
    before = [node.op_type for node in model.graph]
    if case == "keys as they are":  # 8 tokens of width 8: only the shapes fit
        done = fuse_attention(model)
    else:
        done, _ = fused(model, fuse_attention)
    assert done.count == 0
    assert len(done.refused) == 1
    assert reason in done.refused[0]
    assert [node.op_type for node in model.graph] == before


SUM_AND_NORM = """
    gain = Constant <value_floats = [1.0, 2.0, 3.0, 4.0]> ()
    shift = Constant <value_floats = [0.1, 0.2, 0.3, 0.4]> ()
    bias = Constant <value_floats = [5.0, 6.0, 7.0, 8.0]> ()
"""
RESIDUAL = "float[b, s, 4] x, float[b, s, 4] z"
LONE = "float[b, s, 4] y"
WITH_SUM = "float[b, s, 4] y, float[b, s, 4] total"
NORM = "y = LayerNormalization <axis = -1, epsilon = 0.01> (total, gain, shift)"
NORMS = {
    "a sum": (f"total = Add (x, z) {NORM}", LONE),
    "a sum that goes on": (f"total = Add (x, z) {NORM}", WITH_SUM),
    "a bias": (f"biased = Add (z, bias) total = Add (x, biased) {NORM}", WITH_SUM),
    "no shift": ("total = Add (x, z) y = LayerNormalization <axis = 2> (total, gain)", LONE),
}


@pytest.mark.parametrize("case", NORMS)
def test_a_residual_sum_and_its_norm_are_one_operator(case: str) -> None:
    body, outputs = NORMS[case]
    done, operators = fused(graph(SUM_AND_NORM + body, RESIDUAL, outputs), fuse_skip_layer_norm)
    assert done == Rewrite("fuse_skip_layer_norm", 1)
    assert not operators.keys() & {"Add", "LayerNormalization"}


NORMS_REFUSED = {
    "another rank": (NORM, "float[b, s, 4, 4] x, float[b, s, 4, 4] z", "float[b, s, 4, 4] y", "normalizes 4 axes"),
    "two axes": (
        "y = LayerNormalization <axis = 1> (total, wide, wide)",
        "float[b, 4, 4] x, float[b, 4, 4] z, float[4, 4] wide",
        "float[b, 4, 4] y",
        "not over the last axis",
    ),
    "broadcasting": (NORM, "float[b, s, 4] x, float[1, s, 4] z", LONE, "differ in shape"),
    "a computed gain": (
        "y = LayerNormalization <axis = -1> (total, z0, shift)",
        f"{RESIDUAL}, float[4] z0",
        LONE,
        "computed",
    ),
}


@pytest.mark.parametrize("case", NORMS_REFUSED)
def test_other_norms_are_refused_with_the_reason(case: str) -> None:
    norm, inputs, outputs, reason = NORMS_REFUSED[case]
    model = graph(f"{SUM_AND_NORM} total = Add (x, z) {norm}", inputs, outputs)
    done, operators = fused(model, fuse_skip_layer_norm)
    assert done.count == 0
    assert reason in done.refused[0]
    assert operators["LayerNormalization"] == 1


def test_a_bias_goes_behind_a_branch() -> None:
    body = f"{SUM_AND_NORM} p = MatMul (x, w) biased = Add (p, bias) r = MatMul (x, v) y = Add (biased, r)"
    inputs = "float[b, s, 4] x, float[4, 4] w, float[4, 4] v"
    model = graph(body, inputs, LONE)
    done, operators = fused(model, add_bias_last)
    assert (done.count, operators["Add"]) == (1, 2)
    last = model.graph.outputs[0].producer()
    assert last is not None
    assert last.inputs[1] is not None
    assert last.inputs[1].name == "bias"


def test_query_pooling_takes_maxima_of_pairs() -> None:
    model = float_part(skeleton(IMAGE_ENCODER), float_model(), half=False)
    done, operators = fused(model, pair_maxima)
    assert done == Rewrite("pair_maxima", 6)
    assert (operators["ReduceMax"], operators["Max"]) == (0, 12)


@pytest.mark.parametrize(
    ("side", "keep", "reason"), [(3, 0, "not of side 2"), (2, 1, "kept")], ids=["three at once", "axes that stay"]
)
def test_other_maxima_are_refused_with_the_reason(side: int, keep: int, reason: str) -> None:
    body = f"axes = Constant <value_ints = [1]> () y = ReduceMax <keepdims = {keep}> (x, axes)"
    model = graph(body, f"float[b, {side}, 4] x", f"float[b, {'1, ' * keep}4] y")
    done, operators = fused(model, pair_maxima)
    assert (done.count, operators["ReduceMax"]) == (0, 1)
    assert reason in done.refused[0]
