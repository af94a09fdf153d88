"""Constants enlarged by products: the same numbers as ONNX Runtime's Resize."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch
from exported import canonical
from small_model import recipe_of
from test_fuse_attention import fused, graph
from torch.nn.functional import interpolate

from samq.calib.parts import IMAGE_ENCODER
from samq.export.cubic_resize import SHARPNESS, cubic_weights, multiply_to_resize
from samq.export.graph import add_initializer
from samq.export.lower_onnxruntime import lower_for_onnxruntime

TORCH = 'mode = "cubic", coordinate_transformation_mode = "half_pixel", cubic_coeff_a = -0.75'


def resizing(sides: tuple[int, int], to: tuple[int, ...], options: str) -> ir.Model:
    """y = x + a constant [1, 3, *sides], resized to `to`."""
    numbers = ", ".join(map(str, to))
    model = graph(
        f"small = ConstantOfShape <value = float[1] {{0.0}}> (x_sides) y_sides = Constant <value_ints = [{numbers}]> ()"
        f" large = Resize <{options}> (small, , , y_sides) y = Add (x, large)",
        "float[1] x, int64[4] x_sides",
        f"float[{numbers}] y",
    )
    values = np.random.default_rng(0).standard_normal((1, 3, *sides)).astype(np.float32)
    small = next(node for node in model.graph if node.op_type == "ConstantOfShape").outputs[0]
    ir.convenience.replace_all_uses_with(small, add_initializer(model.graph, "stored", values))
    return model


@pytest.mark.parametrize("sides", [(7, 7), (14, 5), (1, 3)])
@pytest.mark.parametrize("to", [(32, 32), (64, 20), (6, 9)])
@pytest.mark.parametrize("options", [TORCH, TORCH.replace("0.75", "0.5"), 'mode = "cubic"'])
def test_products_are_the_resize(sides: tuple[int, int], to: tuple[int, int], options: str) -> None:
    done, operators = fused(resizing(sides, (1, 3, *to), options), multiply_to_resize)
    assert done.count == 1
    assert (operators["MatMul"], operators["Resize"]) == (2, 0)


def test_the_weights_are_those_of_torch() -> None:
    values = torch.randn(1, 1, 7, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = interpolate(values, (16, 12), mode="bicubic")[0, 0].numpy()
    down, across = cubic_weights(7, 16, SHARPNESS), cubic_weights(7, 12, SHARPNESS)
    np.testing.assert_allclose(down @ values[0, 0].numpy() @ across.T, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("to", "options"),
    [
        ((1, 3, 32, 32), 'mode = "linear"'),
        ((1, 3, 32, 32), 'mode = "nearest"'),
        ((1, 3, 32, 32), f"{TORCH}, antialias = 1"),
        ((1, 3, 32, 32), f"{TORCH}, exclude_outside = 1"),
        ((1, 3, 32, 32), TORCH.replace("half_pixel", "align_corners")),
        ((1, 6, 32, 32), TORCH),
    ],
    ids=["linear", "nearest", "antialiased", "without what is outside", "aligned corners", "channels too"],
)
def test_other_resizes_stay(to: tuple[int, ...], options: str) -> None:
    model = resizing((7, 7), to, options)
    assert multiply_to_resize(model).count == 0
    assert "Resize" in {node.op_type for node in model.graph}


def test_what_is_computed_stays() -> None:
    body = f"sides = Constant <value_ints = [1, 3, 32, 32]> () y = Resize <{TORCH}> (x, , , sides)"
    done, operators = fused(graph(body, "float[1, 3, 7, 7] x", "float[1, 3, 32, 32] y"), multiply_to_resize)
    assert (done.count, operators["Resize"]) == (0, 1)


def test_a_lowered_encoder_resizes_nothing() -> None:
    model = canonical(recipe_of("int8_w8a8"), IMAGE_ENCODER)
    assert [node.op_type for node in model.graph].count("Resize") == 1
    lower_for_onnxruntime(model)
    assert "Resize" not in {node.op_type for node in model.graph}
