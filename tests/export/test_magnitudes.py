"""Largest magnitudes from both ends: the same, bit for bit."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from exported import as_written, canonical
from small_model import pixels, recipe_of
from test_fuse_attention import fused, graph

from samq.calib.parts import IMAGE_ENCODER
from samq.export import lower_onnxruntime
from samq.export.lower_onnxruntime import lower_for_onnxruntime
from samq.export.magnitudes import reduce_from_both_ends

TOKENS = "axes = Constant <value_ints = [-1]> () a = Abs (x) y = ReduceMax <keepdims = 1> (a, axes)"
ONE_SIDED = {"both signs": (-1.0, 1.0), "positive": (0.5, 1.0), "negative": (-1.0, -0.5), "nothing": (0.0, 0.0)}


@pytest.mark.parametrize("signs", ONE_SIDED)
@pytest.mark.parametrize(
    ("body", "result"),
    [(TOKENS, "b, 7, 1"), ("a = Abs (x) y = ReduceMax <keepdims = 0> (a)", "")],
    ids=["of each token", "of all"],
)
def test_magnitudes_are_the_same_bits(signs: str, body: str, result: str) -> None:
    model = graph(body, "float[b, 7, 40] x", f"float[{result}] y" if result else "float y")
    values = np.random.default_rng(0).uniform(*ONE_SIDED[signs], (2, 7, 40)).astype(np.float32)
    (before,) = as_written(model, {"x": values})
    assert reduce_from_both_ends(model).count == 1
    assert Counter(node.op_type for node in model.graph) == Counter(("ReduceMax", "ReduceMin", "Neg", "Max"))
    (after,) = as_written(model, {"x": values})
    np.testing.assert_array_equal(np.abs(after), np.abs(before))  # zero has two signs
    assert after.shape == before.shape


@pytest.mark.parametrize(
    ("body", "outputs"),
    [
        ("y = ReduceMax <keepdims = 1> (x)", "float[1, 1, 1] y"),
        ("a = Abs (x) y = ReduceMin <keepdims = 1> (a)", "float[1, 1, 1] y"),
        (f"{TOKENS} z = Neg (a)", "float[b, 7, 1] y, float[b, 7, 40] z"),
        (TOKENS, "float[b, 7, 1] y, float[b, 7, 40] a"),
    ],
    ids=["no magnitude", "the smallest", "read by others", "a result"],
)
def test_others_stay(body: str, outputs: str) -> None:
    assert fused(graph(body, "float[b, 7, 40] x", outputs), reduce_from_both_ends)[0].count == 0


@pytest.mark.parametrize("granularity", ["per_token", "per_tensor"])
def test_an_encoder_with_dynamic_scales_gives_the_same_bits(granularity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of("int8_w8a8", ipts={"mode": "dynamic", "granularity": granularity})
    image = {"pixel_values": pixels(1, seed=3).numpy()}
    lowered = lower_for_onnxruntime(canonical(recipe, IMAGE_ENCODER))
    operators = Counter(node.op_type for node in lowered.graph)
    assert operators["ReduceMin"] > 10
    assert not operators["Abs"]
    others = tuple(rewrite for rewrite in lower_onnxruntime.REWRITES if rewrite is not reduce_from_both_ends)
    monkeypatch.setattr(lower_onnxruntime, "REWRITES", others)
    plain = lower_for_onnxruntime(canonical(recipe, IMAGE_ENCODER))
    assert "Abs" in {node.op_type for node in plain.graph}
    for found, expected in zip(as_written(lowered, image), as_written(plain, image), strict=True):
        np.testing.assert_array_equal(found, expected)
