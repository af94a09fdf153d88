"""The two parts against `Sam2Model` itself."""

from __future__ import annotations

import copy

import pytest
import torch
from small_model import IMAGE_SIZE, pixels
from torch import Tensor
from transformers import Sam2Model

from samq.calib.parts import IMAGE_ENCODER, MASK_DECODER, ImageEncoder, MaskDecoder, part_of

SIDE = 32  # of mask inputs and mask outputs
EXACT = {"rtol": 1e-4, "atol": 1e-5}
STABILITY = [None, 0.0, 0.87, 1.1]  # no fallback, never, for some masks, always


def with_fallback(model: Sam2Model, threshold: float | None) -> Sam2Model:
    model = copy.deepcopy(model)
    model.mask_decoder.dynamic_multimask_via_stability = threshold is not None
    model.mask_decoder.dynamic_multimask_stability_thresh = threshold or 0.0
    return model


def random_points(images: int, prompts: int, points: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(images, prompts, points, 2, generator=generator) * IMAGE_SIZE


def random_boxes(images: int, prompts: int) -> Tensor:
    corners = random_points(images, prompts, 2, seed=7)
    return torch.cat([corners.amin(2), corners.amax(2)], dim=-1)


def decoded(
    model: Sam2Model, images: Tensor, coords: Tensor, labels: Tensor, masks: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    batch, prompts = coords.shape[:2]
    if masks is None:
        masks, has_mask = torch.full((batch, prompts, 1, SIDE, SIDE), 3.0), torch.zeros(batch, prompts)
    else:
        has_mask = torch.ones(batch, prompts)
    with torch.no_grad():
        return MaskDecoder(model)(*ImageEncoder(model)(images), coords, labels, masks, has_mask)  # type: ignore[no-any-return]


def compare(model: Sam2Model, images: Tensor, coords: Tensor, labels: Tensor, *masks: Tensor, **prompt: Tensor) -> None:
    """Both answers of `Sam2Model` for a prompt against the decoder's one for the same prompt as labelled points."""
    found = decoded(model, images, coords, labels, *masks)
    batch, prompts = coords.shape[:2]
    assert found[0].shape == (batch, prompts, 4, SIDE, SIDE)
    assert found[1].shape == (batch, prompts, 4)
    assert found[2].shape == (batch, prompts, 1)
    for multimask, answer in ((False, slice(0, 1)), (True, slice(1, 4))):
        with torch.no_grad():
            expected = model(pixel_values=images, multimask_output=multimask, **prompt)
        torch.testing.assert_close(found[0][:, :, answer], expected.pred_masks, **EXACT)
        torch.testing.assert_close(found[1][:, :, answer], expected.iou_scores, **EXACT)
        torch.testing.assert_close(found[2], expected.object_score_logits, **EXACT)


@pytest.mark.parametrize("images", [1, 3])
def test_encoder_equals_the_models_embeddings(small_model: Sam2Model, images: int) -> None:
    batch = pixels(images)
    with torch.no_grad():
        found = ImageEncoder(small_model)(batch)
    fine, middle, coarse = small_model.get_image_embeddings(batch)
    assert [tuple(x.shape[1:]) for x in found] == [(64, 8, 8), (8, 32, 32), (16, 16, 16)]
    for a, b in zip(found, (coarse, fine, middle), strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("threshold", STABILITY)
@pytest.mark.parametrize(("images", "prompts", "points"), [(1, 1, 1), (1, 3, 2), (2, 1, 4), (2, 3, 2)])
def test_points(small_model: Sam2Model, threshold: float | None, images: int, prompts: int, points: int) -> None:
    coords = random_points(images, prompts, points)
    labels = torch.arange(images * prompts * points).view(images, prompts, points) % 3 % 2
    compare(with_fallback(small_model, threshold), pixels(images), coords, labels,
            input_points=coords, input_labels=labels)  # fmt: skip


def test_the_fallback_takes_some_masks_and_leaves_others(small_model: Sam2Model) -> None:
    """Otherwise the thresholds above would not test both of its branches."""
    coords, labels = random_points(2, 3, 2), torch.ones(2, 3, 2, dtype=torch.int64)
    never, some, always = (
        decoded(with_fallback(small_model, threshold), pixels(2), coords, labels)[0][:, :, 0]
        for threshold in (0.0, 0.87, 1.1)
    )
    same_as_never = [torch.equal(a, b) for a, b in zip(some.flatten(0, 1), never.flatten(0, 1), strict=True)]
    assert set(same_as_never) == {True, False}
    assert not torch.equal(never, always)


def test_padding_points_count_for_nothing(small_model: Sam2Model) -> None:
    coords, labels = random_points(1, 2, 3), torch.tensor([[[1, -10, -10], [1, 0, -1]]])
    compare(small_model, pixels(1), coords, labels, input_points=coords, input_labels=labels)


@pytest.mark.parametrize("threshold", STABILITY)
@pytest.mark.parametrize(("images", "prompts"), [(1, 1), (1, 3), (2, 2)])
def test_boxes_are_two_points(small_model: Sam2Model, threshold: float | None, images: int, prompts: int) -> None:
    boxes = random_boxes(images, prompts)
    labels = torch.tensor([2, 3]).expand(images, prompts, 2)
    model = with_fallback(small_model, threshold)
    compare(model, pixels(images), boxes.unflatten(-1, (2, 2)), labels, input_boxes=boxes)


@pytest.mark.parametrize(("images", "prompts"), [(1, 1), (2, 2)])
def test_boxes_with_points(small_model: Sam2Model, images: int, prompts: int) -> None:
    boxes, points = random_boxes(images, prompts), random_points(images, prompts, 2)
    point_labels = torch.tensor([1, 0]).expand(images, prompts, 2)
    coords = torch.cat([points, boxes.unflatten(-1, (2, 2))], dim=2)
    labels = torch.cat([point_labels, torch.tensor([2, 3]).expand(images, prompts, 2)], dim=2)
    prompt = {"input_points": points, "input_labels": point_labels, "input_boxes": boxes}
    compare(small_model, pixels(images), coords, labels, **prompt)


@pytest.mark.parametrize("images", [1, 2])
def test_masks(small_model: Sam2Model, images: int) -> None:
    coords, labels = random_points(images, 1, 2), torch.tensor([1, 0]).expand(images, 1, 2)
    masks = 5 * torch.randn(images, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    prompt = {"input_points": coords, "input_labels": labels, "input_masks": masks}
    compare(small_model, pixels(images), coords, labels, masks[:, :, None], **prompt)


def test_every_prompt_brings_its_own_mask_or_none(small_model: Sam2Model) -> None:
    """A prompt's answer is the same alone and among others."""
    coords, labels = random_points(1, 3, 2), torch.ones(1, 3, 2, dtype=torch.int64)
    masks = 5 * torch.randn(1, 3, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    has_mask = torch.tensor([[1.0, 0.0, 1.0]])
    decoder = MaskDecoder(small_model)
    with torch.no_grad():
        features = ImageEncoder(small_model)(pixels(1))
        together = decoder(*features, coords, labels, masks, has_mask)
        other_masks = masks.clone()
        other_masks[:, 1] = 0
        assert all(
            torch.equal(a, b)
            for a, b in zip(together, decoder(*features, coords, labels, other_masks, has_mask), strict=True)
        ), "a mask that is not there was seen"
        for index in range(3):
            one = slice(index, index + 1)
            alone = decoder(*features, coords[:, one], labels[:, one], masks[:, one], has_mask[:, one])
            for a, b in zip(together, alone, strict=True):
                torch.testing.assert_close(a[:, one], b, **EXACT)
        without = decoder(*features, coords, labels, masks, torch.zeros(1, 3))
    assert not torch.allclose(without[0][:, 0], together[0][:, 0], **EXACT)
    torch.testing.assert_close(without[0][:, 1], together[0][:, 1], **EXACT)


def test_the_model_still_answers_as_before(small_model: Sam2Model) -> None:
    coords, labels = random_points(1, 1, 1), torch.ones(1, 1, 1, dtype=torch.int64)
    decoded(small_model, pixels(1), coords, labels)
    with torch.no_grad():
        answer = small_model(pixel_values=pixels(1), input_points=coords, multimask_output=False)
    assert answer.pred_masks.shape == (1, 1, 1, SIDE, SIDE)


def test_part_of_every_module_that_runs(small_model: Sam2Model) -> None:
    """Each leaf module runs in the part that `part_of` says, and in no other."""
    ran: dict[str, set[str]] = {}
    for name, module in small_model.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.setdefault(name, set()).add(running))
    running = IMAGE_ENCODER
    try:
        with torch.no_grad():
            features = ImageEncoder(small_model)(pixels(1))
            decoder = MaskDecoder(small_model)
            running = MASK_DECODER
            prompt = random_points(1, 1, 1), torch.ones(1, 1, 1, dtype=torch.int64)
            decoder(*features, *prompt, torch.zeros(1, 1, 1, SIDE, SIDE), torch.ones(1, 1))
    finally:
        for module in small_model.modules():
            module._forward_hooks.clear()
    linear = [name for name, module in small_model.named_modules() if hasattr(module, "in_features")]
    convolutions = [name for name, module in small_model.named_modules() if hasattr(module, "in_channels")]
    assert {name: ran[name] for name in linear + convolutions} == {
        name: {part_of(name)} for name in linear + convolutions
    }
