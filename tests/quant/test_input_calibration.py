"""Calibrators of static inputs through the whole quantization: of which inputs they see, and that presets need none."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from small_model import pixels, recipe_of
from torch import Tensor
from transformers import Sam2Model

import samq.quant.passes as passes
import samq.quant.quantize as runner
from samq.calib.histogram import Histogram
from samq.calib.parts import ImageEncoder
from samq.calib.statistics import InputStatistics
from samq.quant.config import InputsConfig, load_recipe, preset_names
from samq.quant.inputs import InputGrid, calibrated_range, grid_of_range, input_grid
from samq.quant.quantize import Quantized, quantize

STATIC = [name for name in preset_names() if load_recipe(name).ipts is not None]
CALIBRATORS = ("max", "percentile", "mse", "entropy")
ENCODER = {"skip_decoder": True}
LAYERS = [
    "vision_encoder.backbone.blocks.0.attn.qkv",
    "vision_encoder.backbone.blocks.1.attn.proj",
    "vision_encoder.backbone.blocks.3.mlp.proj_out",
]


def images() -> Iterator[Tensor]:
    return (pixels(2, seed) for seed in range(2))


def inputs_of(model: Sam2Model, layer: str) -> Tensor:
    """All that one layer reads, flat."""
    seen: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten()))
    with torch.no_grad():
        for batch in images():
            ImageEncoder(model)(batch)
    handle.remove()
    return torch.cat(seen)


def expected_grid(asked: InputsConfig, x: Tensor) -> InputGrid:
    return grid_of_range(asked.dtype, *calibrated_range(asked, Histogram.of(x)))


def is_near(found: InputGrid | None, expected: InputGrid) -> bool:
    assert found is not None
    return found.scale == pytest.approx(expected.scale, rel=2e-3) and abs(found.zero_point - expected.zero_point) <= 1


@pytest.mark.parametrize("preset", STATIC)
def test_presets_have_the_grid_with_the_least_output_error(
    small_model: Sam2Model, preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, against NumPy: of 15 clippings, the one with the least error behind the weights' columns."""
    calls: list[tuple[Tensor, InputStatistics, InputGrid | None]] = []

    def recorded(asked: InputsConfig, weight: Tensor, statistics: InputStatistics) -> InputGrid | None:
        calls.append((weight, statistics, input_grid(asked, weight, statistics)))
        return calls[-1][2]

    monkeypatch.setattr(passes, "input_grid", recorded)
    monkeypatch.setattr(Histogram, "add", lambda *_: pytest.fail("no preset counts values"))
    result = quantize(small_model, load_recipe(preset), images())
    assert len(calls) == len(result.codes)
    for weight, statistics, found in calls:
        x, importance = statistics.sample.double().numpy(), weight.double().square().sum(0).numpy()
        farthest = max(-float(statistics.low.min()), float(statistics.high.max()), 0.0)
        scales = [float(np.float16(np.float32(farthest * (1 - 0.05 * i) / 127))) for i in range(15)]
        errors = [(((np.clip(np.rint(x / scale), -128, 127) * scale - x) ** 2) * importance).sum() for scale in scales]
        assert found == InputGrid("sint8", "per_tensor", scales[int(np.argmin(errors))], 0)


PLAIN: dict[str, Any] = {"shift": {"enabled": False}, "smooth": {"enabled": False}}
SEARCHED = {"smooth": {"enabled": True, "alpha": "auto"}}
ROTATED = {"rotation": {"enabled": True}}


@pytest.mark.parametrize(
    ("calibrator", "dtype", "others"),
    [
        ("percentile", "sint8", PLAIN),
        ("max", "uint8", {}),
        ("percentile", "uint8", {}),
        ("mse", "sint8", {}),
        ("mse", "uint8", SEARCHED),
        ("entropy", "sint8", {}),
        ("entropy", "uint8", ROTATED),
        ("max", "sint8", ROTATED),
    ],
)
def test_they_see_all_inputs_as_they_are_after_the_folds(
    small_model: Sam2Model, calibrator: str, dtype: str, others: dict[str, Any]
) -> None:
    recipe = recipe_of("int8_w8a8", ipts={"dtype": dtype, "calibrator": calibrator}, wgts=ENCODER, **others)
    ticks: list[str] = []
    result = quantize(small_model, recipe, images(), tick=ticks.append)
    assert ticks == ["calibrate"] * 2 + list(result.codes)
    twin = copy.deepcopy(small_model)
    result.folds.apply(twin)
    assert recipe.ipts is not None
    for layer in LAYERS:
        assert is_near(result.codes[layer].inputs, expected_grid(recipe.ipts, inputs_of(twin, layer))), layer


@pytest.mark.parametrize("calibrator", CALIBRATORS)
def test_in_sequence_they_see_the_quantized_blocks_before(
    small_model: Sam2Model, calibrator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "passes_for", lambda recipe: passes.passes_for(recipe)[:-1])
    monkeypatch.setattr(runner, "histograms", lambda *_: pytest.fail("the walk counts already"))
    recipe = recipe_of("int8_w8a8", ipts={"calibrator": calibrator}, wgts=ENCODER, calib={"mode": "sequential"})
    result = quantize(small_model, recipe, images())
    assert recipe.ipts is not None
    layer = "vision_encoder.backbone.blocks.4.attn.qkv"
    assert result.codes[layer].inputs == expected_grid(recipe.ipts, inputs_of(result.model, layer))


@pytest.mark.parametrize(
    ("preset", "calibrator", "rotate", "again"),
    [
        ("int8_w8a8", "entropy", False, 1),
        ("int8_w8a8", "max", False, 0),
        ("int8_w8a8", "max", True, 1),
        ("int4_w4a8_rtn", "entropy", False, 0),
        ("int4_w4a8_rtn", "mse", True, 0),
    ],
)
def test_images_run_again_only_where_folds_made_histograms_invalid(
    small_model: Sam2Model, preset: str, calibrator: str, rotate: bool, again: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[int] = []
    counting = runner.histograms
    monkeypatch.setattr(runner, "histograms", lambda *args: runs.append(1) or counting(*args))
    recipe = recipe_of(preset, ipts={"calibrator": calibrator}, wgts=ENCODER, rotation={"enabled": rotate})
    quantize(small_model, recipe, images())
    assert len(runs) == again


def with_decoder(model: Sam2Model) -> Quantized:
    recipe = recipe_of("int8_w8a8", ipts={"calibrator": "percentile"}, wgts={"skip_decoder": False})
    return quantize(model, recipe, images())


def test_the_decoders_layers_are_calibrated_too(small_model: Sam2Model) -> None:
    result = with_decoder(small_model)
    plain = quantize(small_model, recipe_of("int8_w8a8", wgts={"skip_decoder": False}), images())
    changed = [
        name for name, codes in result.codes.items() if codes.inputs != plain.codes[name].inputs and "decoder" in name
    ]
    assert len(changed) > 20
    for name, codes in result.codes.items():
        assert torch.equal(codes.weight.codes, plain.codes[name].weight.codes), "weights are as they were"
