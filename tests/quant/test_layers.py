"""The simulated layer against a plain float64 computation from its codes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from samq.quant.grids import Grid, round_to_grid
from samq.quant.inputs import InputGrid
from samq.quant.layers import LayerCodes, QuantizedLinear, replace_module
from samq.quant.low_rank import truncated_svd
from samq.quant.rotate import runtime_rotation
from samq.quant.scales import choose_scales

GRIDS = {
    "sint4": Grid(4, True),
    "uint4": Grid(4, False),
    "sint4 two-level": Grid(4, True, True),
    "sint8": Grid(8, True),
}
INPUTS = {
    "float": None,
    "static": InputGrid("sint8", "per_tensor", 0.03125),
    "uint8": InputGrid("uint8", "per_tensor", 0.03125, 120),
    "per_token": InputGrid("sint8", "per_token"),
}


def codes_of(grid: Grid, inputs: InputGrid | None, rank: int, with_bias: bool) -> LayerCodes:
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(24, 40, generator=generator), torch.randn(24, generator=generator)
    branch = truncated_svd(weight, rank) if rank else None
    residual = weight if branch is None else weight - branch.product()
    quantized = round_to_grid(residual, choose_scales(residual, grid, 16), grid)
    return LayerCodes(quantized, inputs, branch, bias if with_bias else None)


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("shape", [(5,), (2, 3)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_forward(name: str, inputs: str, rank: int, shape: tuple[int, ...], with_bias: bool) -> None:
    codes = codes_of(GRIDS[name], INPUTS[inputs], rank, with_bias)
    x = torch.randn(*shape, 40, generator=torch.Generator().manual_seed(1))
    rounded = x if codes.inputs is None else codes.inputs.fake_quantize(x)
    expected = rounded.double().numpy() @ codes.weight.dequantize().double().numpy().T
    if codes.branch is not None:
        down, up = codes.branch.down.double().numpy(), codes.branch.up.double().numpy()
        expected = expected + x.double().numpy() @ down.T @ up.T  # the branch sees the unquantized input
    if codes.bias is not None:
        expected = expected + codes.bias.double().numpy()
    np.testing.assert_allclose(QuantizedLinear(codes)(x).numpy(), expected, rtol=1e-5, atol=1e-4)


def test_effective_weight_is_what_a_float_input_meets() -> None:
    codes = codes_of(Grid(4, True), None, 3, False)
    x = torch.eye(40)
    torch.testing.assert_close(QuantizedLinear(codes)(x).T, codes.effective_weight(), rtol=1e-5, atol=1e-5)
    without = codes_of(Grid(4, True), None, 0, False)
    assert torch.equal(without.effective_weight(), without.weight.dequantize())


@pytest.mark.parametrize("inputs", ["float", "static"])
def test_a_multiplier_comes_before_anything_else(inputs: str) -> None:
    """Before the inputs are rounded, and before the branch."""
    plain = codes_of(Grid(8, True), INPUTS[inputs], 3, True)
    multiplied = replace(plain, multiplier=torch.linspace(0.1, 4, 40))
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(1))
    expected = QuantizedLinear(plain)(x * torch.linspace(0.1, 4, 40))
    assert torch.equal(QuantizedLinear(multiplied)(x), expected)
    if inputs == "float":
        answers = QuantizedLinear(replace(multiplied, bias=None))(torch.eye(40)).T
        torch.testing.assert_close(answers, multiplied.effective_weight(), rtol=1e-5, atol=1e-5)
    assert multiplied.stored_bytes() == plain.stored_bytes() + 4 * 40


@pytest.mark.parametrize("inputs", ["float", "static"])
@pytest.mark.parametrize("multiplied", [False, True])
def test_a_rotation_comes_behind_the_multiplier_and_before_the_rest(inputs: str, multiplied: bool) -> None:
    multiplier = torch.linspace(0.1, 4, 40) if multiplied else None
    plain = codes_of(Grid(8, True), INPUTS[inputs], 3, True)
    rotated = replace(plain, multiplier=multiplier, rotated=True)
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(1))
    turned = (x if multiplier is None else x * multiplier) @ runtime_rotation(40).T
    torch.testing.assert_close(QuantizedLinear(rotated)(x), QuantizedLinear(plain)(turned))
    assert not torch.allclose(QuantizedLinear(rotated)(x), QuantizedLinear(plain)(x), atol=1.0)
    if inputs == "float":
        answers = QuantizedLinear(replace(rotated, bias=None))(torch.eye(40)).T
        torch.testing.assert_close(answers, rotated.effective_weight(), rtol=1e-5, atol=1e-5)
    assert rotated.stored_bytes() == plain.stored_bytes() + (4 * 40 if multiplied else 0)


def test_bytes_are_those_of_weight_and_branch() -> None:
    # 24·40 codes of half a byte, 24·3 scales of 2 bytes, factors of rank 3 in FP16
    assert codes_of(Grid(4, True), None, 3, True).stored_bytes() == 480 + 144 + 2 * 3 * (24 + 40)
    # zero-points of half a byte
    assert codes_of(Grid(4, False), None, 0, True).stored_bytes() == 480 + 144 + 36
    # scales of 1 byte, channel scales of 2
    assert codes_of(Grid(4, True, True), None, 0, True).stored_bytes() == 480 + 72 + 48
    assert codes_of(Grid(8, True), None, 0, True).stored_bytes() == 960 + 144


def test_replace_module() -> None:
    model = nn.Sequential(nn.Linear(40, 24), nn.Sequential(nn.Linear(40, 24)))
    layer = QuantizedLinear(codes_of(Grid(4, True), None, 0, True))
    replace_module(model, "1.0", layer)
    assert model.get_submodule("1.0") is layer
    replace_module(model, "0", layer)
    assert model[0] is layer
