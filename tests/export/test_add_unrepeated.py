"""Features of images added without a copy of them for each prompt."""

from __future__ import annotations

import pytest
from exported import float_model, skeleton
from test_fuse_attention import fused, graph

from samq.calib.parts import MASK_DECODER
from samq.export.add_unrepeated import add_unrepeated
from samq.export.parts import float_part

REPEAT = """
    one = Constant <value_ints = [1]> ()
    times = Shape <start = 1, end = 2> (prompted)
    apart = Unsqueeze (image, one)
    sides = Concat <axis = 0> (one, times, one, one)
    repeated = Expand (apart, sides)
    flat_sides = Constant <value_ints = [-1, 3, 4]> ()
    flat = Reshape (repeated, flat_sides)
    z = Reshape (prompted, flat_sides)
"""
INPUTS = "float[batch, 3, 4] image, float[batch, prompts, 3, 4] prompted"


@pytest.mark.parametrize("summands", ["flat, z", "z, flat"])
def test_a_sum_reads_the_image_once(summands: str) -> None:
    model = graph(f"{REPEAT} y = Add ({summands})", INPUTS, "float[n, 3, 4] y")
    model.graph.outputs[0].shape = next(v.shape for n in model.graph for v in n.outputs if v.name == "z")
    done, operators = fused(model, add_unrepeated)
    assert done.count == 1
    assert operators["Expand"] == 0


def test_a_product_with_the_repeated_image_stays() -> None:
    done, operators = fused(graph(f"{REPEAT} y = Mul (flat, z)", INPUTS, "float[n, 3, 4] y"), add_unrepeated)
    assert done.count == 0
    assert operators["Expand"] == 1


def test_the_decoder_repeats_no_features() -> None:
    model = float_part(skeleton(MASK_DECODER), float_model(), half=False)
    done, _ = fused(model, add_unrepeated)
    assert done.count == 3
