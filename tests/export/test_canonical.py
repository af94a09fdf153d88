"""Reading canonical graphs back: what every lowering starts from."""

from __future__ import annotations

import numpy as np
import pytest
from exported import canonical, quantized
from small_model import recipe_of
from test_linear import INT8_INPUTS, WEIGHTS_ONLY, codes, filled

from samq.calib.parts import PARTS, part_of
from samq.export.canonical import read_gemms
from samq.export.graph import constant_of
from samq.quant.config import preset_names
from samq.quant.inputs import InputGrid


@pytest.mark.parametrize(("bits", "signed", "group", "inputs"), [*((*w, None) for w in WEIGHTS_ONLY), *INT8_INPUTS])
def test_a_layer_is_read_back_as_it_was_written(bits: int, signed: bool, group: int, inputs: InputGrid | None) -> None:
    layer = codes(bits, signed, group, inputs, rank=4)
    (gemm,) = read_gemms(filled(layer))
    assert gemm.layer == "a.layer"
    np.testing.assert_array_equal(gemm.weight.codes.astype(np.int16), layer.weight.codes.T.numpy().astype(np.int16))
    np.testing.assert_array_equal(gemm.weight.dequantized(), layer.weight.dequantize().T.numpy())
    assert (gemm.inputs is None) == (inputs is None)
    if gemm.inputs is not None and inputs is not None:
        assert gemm.inputs.per_token == (inputs.granularity == "per_token")
        scale = constant_of(gemm.inputs.scale)
        assert (None if scale is None else float(scale)) == (inputs.scale and float(np.float32(inputs.scale)))
    if inputs is not None:
        int8 = gemm.weight.int8()
        assert int8 is not None
        np.testing.assert_array_equal(int8[0], layer.weight.as_int8().T.numpy())


@pytest.mark.parametrize(("bits", "signed", "group"), [(4, True, 16), (8, False, 0)])
def test_a_weight_that_is_no_int8_weight_says_so(bits: int, signed: bool, group: int) -> None:
    layer = codes(bits, signed, group)
    if not signed:
        layer.weight.codes[0, 0], layer.weight.scales.zero_point[0, 0] = 255, 0  # type: ignore[index]
    (gemm,) = read_gemms(filled(layer))
    assert gemm.weight.int8() is None


@pytest.mark.parametrize("preset", preset_names())
@pytest.mark.parametrize("part", PARTS)
def test_every_quantized_layer_is_found_once(preset: str, part: str) -> None:
    recipe = recipe_of(preset)
    found = [gemm.layer for gemm in read_gemms(canonical(recipe, part))]
    assert sorted(found) == sorted(name for name in quantized(recipe).codes if part_of(name) == part)
