"""Activation grids against NumPy, which rounds half to even as ONNX QuantizeLinear does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from samq.quant.inputs import CLIP_RATIOS, SMALLEST_RANGE, InputGrid, static_grid

SHAPES = [(7, 5), (2, 3, 16), (1, 4, 6, 8)]
LIMITS = {"sint8": (-128, 127), "uint8": (0, 255)}


def activations(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 0.5


def quantized(x: Tensor, scale: np.ndarray, zero_point: int, dtype: str) -> np.ndarray:
    codes = np.clip(np.rint(x.numpy() / scale) + zero_point, *LIMITS[dtype])
    return ((codes - zero_point) * scale).astype(np.float32)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "zero_point"), [("sint8", 0), ("uint8", 0), ("uint8", 101), ("uint8", 255)])
@pytest.mark.parametrize("scale", [0.0625, 0.01, 0.1])
def test_static(shape: tuple[int, ...], dtype: str, zero_point: int, scale: float) -> None:
    grid = InputGrid(dtype, "per_tensor", scale, zero_point)
    x = activations(shape)
    expected = quantized(x, np.float32(scale), zero_point, dtype)
    np.testing.assert_array_equal(grid.fake_quantize(x).numpy(), expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("granularity", ["per_tensor", "per_token"])
def test_dynamic(shape: tuple[int, ...], granularity: str) -> None:
    x = activations(shape)
    axis = -1 if granularity == "per_token" else None
    scale = np.abs(x.numpy()).max(axis=axis, keepdims=True) / np.float32(127)
    grid = InputGrid("sint8", granularity)
    np.testing.assert_array_equal(grid.dynamic_scale(x).numpy(), scale)
    np.testing.assert_array_equal(grid.fake_quantize(x).numpy(), quantized(x, scale, 0, "sint8"))
    assert ((grid.fake_quantize(x) - x).abs().numpy() <= 0.5001 * scale).all()


def test_tokens_do_not_see_each_other() -> None:
    x, grid = activations((4, 16)), InputGrid("sint8", "per_token")
    louder = x.clone()
    louder[0] *= 1000
    assert torch.equal(grid.fake_quantize(louder)[1:], grid.fake_quantize(x)[1:])
    assert not torch.equal(
        InputGrid("sint8", "per_tensor").fake_quantize(louder)[1:],
        InputGrid("sint8", "per_tensor").fake_quantize(x)[1:],
    )


@pytest.mark.parametrize("granularity", ["per_tensor", "per_token"])
def test_an_all_zero_input_stays_zero(granularity: str) -> None:
    grid, zeros = InputGrid("sint8", granularity), torch.zeros(3, 8)
    assert not grid.fake_quantize(zeros).any()
    assert grid.dynamic_scale(zeros).flatten()[0].item() == pytest.approx(SMALLEST_RANGE / 127)


def test_ties_and_clipping() -> None:
    x = torch.tensor([0.5, 1.5, -0.5, -2.5, 126.5, 500.0, -500.0])
    assert InputGrid("sint8", "per_tensor", 1.0).fake_quantize(x).tolist() == [0, 2, 0, -2, 126, 127, -128]
    assert InputGrid("uint8", "per_tensor", 1.0, 3).fake_quantize(x).tolist() == [0, 2, 0, -2, 126, 252, -3]


def relu_like(rows: int) -> Tensor:
    return activations((rows, 8)).clamp(min=0) ** 2


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("make", [lambda: activations((256, 8)) ** 3, lambda: relu_like(256)], ids=["heavy", "relu"])
def test_static_grid_is_the_best_of_all_ratios(dtype: str, make: object) -> None:
    assert callable(make)
    sample: Tensor = make()
    importance = torch.logspace(-2, 0, 8)
    grid = static_grid(dtype, sample.amin(0), sample.amax(0), sample, importance)
    assert grid.scale is not None
    assert float(np.float16(grid.scale)) == grid.scale
    x, weights = sample.double().numpy(), importance.double().numpy()

    def error_of(scale: float, zero_point: int) -> float:
        codes = np.clip(np.rint(x / scale) + zero_point, *LIMITS[dtype])
        return float((((codes - zero_point) * scale - x) ** 2 * weights).sum())

    errors = []
    low, high = min(x.min(), 0.0), max(x.max(), 0.0)
    for ratio in CLIP_RATIOS:
        span = max(-low, high) / 127 if dtype == "sint8" else (high - low) / 255
        scale = float(np.float16(span * ratio))
        errors.append(error_of(scale, 0 if dtype == "sint8" else int(np.clip(round(-low * ratio / scale), 0, 255))))
    assert error_of(grid.scale, grid.zero_point) == pytest.approx(min(errors), rel=1e-4)
    assert min(errors) <= errors[0]


@pytest.mark.parametrize("dtype", LIMITS)
def test_zero_is_exact_in_every_static_grid(dtype: str) -> None:
    for low, high in [(-1.0, 3.0), (0.5, 3.0), (-3.0, -0.5), (0.0, 0.0)]:
        sample = torch.linspace(low, high, 64)[:, None]
        grid = static_grid(dtype, sample.amin(0), sample.amax(0), sample, torch.ones(1))
        assert grid.fake_quantize(torch.zeros(1)).item() == 0
        assert grid.qmin <= grid.zero_point <= grid.qmax


def test_uint8_halves_the_step_of_one_sided_inputs() -> None:
    sample = relu_like(256)
    ones = torch.ones(8)
    signed, unsigned = (
        static_grid(dtype, sample.amin(0), sample.amax(0), sample, ones) for dtype in ("sint8", "uint8")
    )
    errors = [float((grid.fake_quantize(sample) - sample).square().sum()) for grid in (signed, unsigned)]
    assert errors[1] < 0.5 * errors[0]
