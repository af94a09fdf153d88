"""Effects of single layers on the masks: the distance's algebra, and the shortcut against running everything."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from small_model import IMAGE_SIZE, outputs, pixels, recipe_of
from torch import Tensor
from transformers import Sam2Model

from samq.calib.calibrate import decode
from samq.calib.parts import ImageEncoder, MaskDecoder
from samq.calib.prompts import box_of, boxes, clicks, grid
from samq.quant.layers import replace_module
from samq.quant.quantize import Quantized, quantize
from samq.quant.sensitivity import CLICKS_PER_SIDE, layer_effects, mask_disagreement, soft_mask_distance

SURE = 50.0  # a logit whose sigmoid is 0 or 1
LAYERS = (
    "vision_encoder.backbone.blocks.0.attn.qkv",
    "vision_encoder.backbone.blocks.3.mlp.proj_out",
    "mask_decoder.transformer.layers.0.self_attn.q_proj",
)


def logits(rows: int, seed: int) -> Tensor:
    return torch.randn(rows, 8, 9, generator=torch.Generator().manual_seed(seed))


def test_for_masks_of_zeros_and_ones_the_distance_is_one_minus_iou() -> None:
    one, other = (torch.where(logits(5, seed) > 0, SURE, -SURE) for seed in (0, 1))
    union = ((one > 0) | (other > 0)).sum((-2, -1))
    expected = mask_disagreement(one, other) * union / (union + 1)  # but for the one pixel
    torch.testing.assert_close(soft_mask_distance(one, other), expected.double())
    torch.testing.assert_close(soft_mask_distance(other, one), expected.double())


def test_empty_masks_agree_and_equal_ones_have_no_distance() -> None:
    empty, full = torch.full((1, 4, 4), -SURE), torch.full((1, 4, 4), SURE)
    assert mask_disagreement(empty, empty).tolist() == [0]
    assert mask_disagreement(empty, full).tolist() == [1]
    assert soft_mask_distance(full, full).tolist() == [0]
    assert float(soft_mask_distance(empty, -empty / SURE - 9)) < 1e-2  # two ways to say nothing is there


def test_small_independent_errors_add_up() -> None:
    exact, first, second = logits(200, 0), 1e-3 * logits(200, 1), 1e-3 * logits(200, 2)
    alone = [float(soft_mask_distance(exact + error, exact).mean()) for error in (first, second)]
    together = float(soft_mask_distance(exact + first + second, exact).mean())
    assert together == pytest.approx(sum(alone), rel=0.05)
    assert float(soft_mask_distance(exact + 2 * first, exact).mean()) == pytest.approx(4 * alone[0], rel=0.01)


@pytest.fixture(scope="module")
def made(small_model: Sam2Model) -> Quantized:
    return quantize(
        small_model, recipe_of("int4_w4a8_rtn", shift={"enabled": True}, smooth={"enabled": True}), [pixels(1)]
    )


@torch.no_grad()
def test_the_shortcut_gives_what_running_everything_does(small_model: Sam2Model, made: Quantized) -> None:
    image = pixels(1, seed=4)
    points = clicks(grid(IMAGE_SIZE, CLICKS_PER_SIDE))

    def masks(model: Sam2Model, corners: NDArray[np.float32]) -> list[Tensor]:
        features, decoder = ImageEncoder(model)(image), MaskDecoder(model)
        multi = decode(decoder, features, points)[0, :, 1:]
        return [multi, decode(decoder, features, boxes(corners))[0, :, :1]]

    twin = copy.deepcopy(small_model)
    made.folds.apply(twin)
    first = decode(MaskDecoder(twin), ImageEncoder(twin)(image), points)[0, :, 1].numpy() > 0
    found = {tuple(4 * box_of(mask)) for mask in first if mask.any()}  # a pixel of the logits is four of the image
    corners = np.array(sorted(found), np.float32)
    assert len(corners) > 0
    exact = masks(twin, corners)
    effects = layer_effects(small_model, made, LAYERS, [image])
    for layer in LAYERS:
        changed = copy.deepcopy(twin)
        replace_module(changed, layer, made.model.get_submodule(layer))
        pairs = list(zip(masks(changed, corners), exact, strict=True))
        for measure, effect in (
            (soft_mask_distance, effects[layer].loss),
            (mask_disagreement, effects[layer].disagreement),
        ):
            expected = float(torch.cat([measure(one, other).double().mean(-1) for one, other in pairs]).mean())
            assert effect == pytest.approx(expected, rel=1e-3)
            assert effect > 0


def test_the_mean_over_images_is_that_of_each(small_model: Sam2Model, made: Quantized) -> None:
    images = [pixels(1, seed=5), pixels(1, seed=6)]
    ticks: list[int] = []
    both = layer_effects(small_model, made, LAYERS[1:], images, lambda: ticks.append(1))
    each = [layer_effects(small_model, made, LAYERS[1:], [image]) for image in images]
    for layer in LAYERS[1:]:
        assert both[layer].loss == pytest.approx(sum(effects[layer].loss for effects in each) / 2)
        assert both[layer].disagreement == pytest.approx(sum(effects[layer].disagreement for effects in each) / 2)
    assert len(ticks) == 4


def test_more_bits_have_less_effect(small_model: Sam2Model) -> None:
    presets = ("int8_w8a8", "int4_w4a8_rtn")
    plain = {"enabled": False}
    recipes = [recipe_of(name, shift=plain, smooth=plain) for name in presets]
    effects = [layer_effects(small_model, quantize(small_model, r, [pixels(1)]), LAYERS, [pixels(1)]) for r in recipes]
    for layer in LAYERS:
        assert effects[0][layer].loss < effects[1][layer].loss


def test_models_stay_as_they_were(small_model: Sam2Model, made: Quantized) -> None:
    before = [outputs(model) for model in (small_model, made.model)]
    layer_effects(small_model, made, LAYERS, [pixels(1)])
    for model, expected in zip((small_model, made.model), before, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(outputs(model), expected, strict=True))


def test_without_images_there_is_no_effect(small_model: Sam2Model, made: Quantized) -> None:
    with pytest.raises(ValueError, match="no image"):
        layer_effects(small_model, made, LAYERS, [])
