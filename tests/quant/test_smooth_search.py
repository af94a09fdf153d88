"""The search of alpha against a plain one in float64 NumPy, written from the papers' equations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from small_model import recipe_of
from torch import Tensor, nn

from samq.calib.statistics import InputStatistics
from samq.quant.config import Recipe
from samq.quant.smooth import magnitudes, smoothing_factors
from samq.quant.smooth_search import ALPHAS, best_alpha, rounding_error

W8A8 = recipe_of("int8_w8a8", ipts={"mode": "dynamic"})
W8A16 = recipe_of("int8_w8a8", ipts=None)
WIDTH = 32
PLAIN: dict[str, Any] = {"scales": {"method": "max", "weighted": False}, "kernel_gptq": None}
FORMS = {
    "W8A8": recipe_of("int8_w8a8", ipts={"mode": "dynamic"}, wgts=PLAIN),
    "W8A16": recipe_of("int8_w8a8", ipts=None, wgts=PLAIN),
    "W4A16": recipe_of("int4_w4only", wgts=PLAIN | {"dtype": "sint4", "group_shapes": [[1, -1]]}),
}


def layer_and_inputs(seed: int, outlier: float = 1.0) -> tuple[nn.Linear, InputStatistics]:
    """A few input channels are larger by `outlier`."""
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(WIDTH, 24)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(24, WIDTH, generator=generator) ** 3)
    x = torch.randn(300, WIDTH, generator=generator) * 10 ** torch.rand(WIDTH, generator=generator)
    x[:, :3] *= outlier
    entry = InputStatistics.empty(WIDTH, False, x.device)
    entry.add(x)
    return layer, entry


def rounded(values: NDArray[np.float64], axis: int | None, highest: int = 127) -> NDArray[np.float64]:
    """Symmetric rounding with the largest magnitude along an axis, or of all, on the highest code."""
    step = np.abs(values).max(axis=axis, keepdims=True) / highest
    step = step if axis is None else np.float16(step).astype(np.float64)  # scales of weights are FP16 numbers
    return np.clip(np.rint(values / step), -highest - 1, highest) * step


def plain_errors(weight: Tensor, x: Tensor, highest: int, quantized_inputs: bool) -> dict[float, float]:
    """α → ‖Q(x/s) Q(W s)ᵀ − x Wᵀ‖² / ‖x Wᵀ‖² (AWQ, eq. 4), s of SmoothQuant's eq. 4; of averages for float inputs."""
    w, rows = (tensor.detach().double().numpy() for tensor in (weight, x))
    if quantized_inputs:
        inputs, columns = np.abs(rows).max(0), np.abs(w).max(0)
    else:
        inputs, columns = np.abs(rows).mean(0), np.sqrt((w**2).mean(0))
    exact, errors = rows @ w.T, {}
    for alpha in ALPHAS:
        s = inputs**alpha / columns ** (1 - alpha)
        read = rounded(rows / s, None) if quantized_inputs else rows / s
        errors[alpha] = float(((read @ rounded(w * s, 1, highest).T - exact) ** 2).sum() / (exact**2).sum())
    return errors


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", range(3))
def test_the_search_equals_the_papers(form: str, seed: int) -> None:
    """Every candidate's error, and the best of them all."""
    (layer, entry), recipe = layer_and_inputs(seed, outlier=5), FORMS[form]
    errors = plain_errors(layer.weight, entry.sample, 2 ** (recipe.wgts.bits - 1) - 1, not recipe.weight_only)
    compared = magnitudes([layer], [entry], recipe.weight_only)
    for alpha, expected in errors.items():
        found = rounding_error(layer.weight, WIDTH, entry, smoothing_factors(*compared, alpha), recipe)
        assert found == pytest.approx(expected, rel=1e-3), alpha  # a value next to a tie may round the other way
    assert errors[best_alpha([layer], [WIDTH], [entry], [recipe])] <= 1.001 * min(errors.values())


@pytest.mark.parametrize("recipe", [W8A8, W8A16], ids=["w8a8", "w8a16"])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_clipping_lowers_the_error(recipe: Recipe, alpha: float) -> None:
    layer, entry = layer_and_inputs(0)
    factors = smoothing_factors(*magnitudes([layer], [entry], recipe.weight_only), alpha)
    found = rounding_error(layer.weight, WIDTH, entry, factors, recipe)
    plain = plain_errors(layer.weight, entry.sample, 127, not recipe.weight_only)[alpha]
    assert 0.8 * plain < found <= 1.001 * plain


@pytest.mark.parametrize("recipe", [W8A8, W8A16, recipe_of("int4_w4a8"), recipe_of("int4_w4only")])
@pytest.mark.parametrize("seed", range(3))
def test_the_best_of_all_alphas_is_found(recipe: Recipe, seed: int) -> None:
    layer, entry = layer_and_inputs(seed)
    found = best_alpha([layer], [WIDTH], [entry], [recipe])
    compared = magnitudes([layer], [entry], recipe.weight_only)
    errors = {
        alpha: rounding_error(layer.weight, WIDTH, entry, smoothing_factors(*compared, alpha), recipe)
        for alpha in ALPHAS
    }
    assert errors[found] == min(errors.values())
    assert errors[found] < 0.9 * max(errors.values())


def test_weights_of_4_bits_take_less_of_the_range_than_weights_of_8() -> None:
    layer, entry = layer_and_inputs(0, outlier=10)
    alphas = [best_alpha([layer], [WIDTH], [entry], [recipe_of(name)]) for name in ("int4_w4a8", "int8_w8a8")]
    assert alphas[0] < alphas[1]


def test_readers_of_the_same_inputs_are_weighed_alike() -> None:
    """A layer with outputs a thousand times as large does not decide alone."""
    (first, entry), (second, _) = layer_and_inputs(0), layer_and_inputs(1)
    expected = best_alpha([first, second], [WIDTH] * 2, [entry] * 2, [W8A8] * 2)
    compared = magnitudes([first, second], [entry] * 2, weights_only=False)

    def error_of(alpha: float) -> float:
        factors = smoothing_factors(*compared, alpha)
        return sum(rounding_error(layer.weight, WIDTH, entry, factors, W8A8) for layer in (first, second))

    assert error_of(expected) == min(map(error_of, ALPHAS))
    factors = smoothing_factors(*compared, 0.5)
    small = rounding_error(first.weight, WIDTH, entry, factors, W8A8)
    assert rounding_error(first.weight * 1024, WIDTH, entry, factors, W8A8) == pytest.approx(small, rel=1e-4)


def test_a_layer_that_puts_out_nothing_has_no_error() -> None:
    layer, entry = layer_and_inputs(0)
    with torch.no_grad():
        layer.weight.zero_()
    assert rounding_error(layer.weight, WIDTH, entry, torch.ones(WIDTH), W8A8) == 0
    assert best_alpha([layer], [WIDTH], [entry], [W8A8]) in ALPHAS
