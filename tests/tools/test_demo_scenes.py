import numpy as np
import pytest
from scipy import ndimage

from samq.tools.demo.scenes import (
    HELD_OUT_SCENES,
    TRAIN_COMPOUND_SHARE,
    Scene,
    _Canvas,
    _cast_shadow,
    _within,
    draw_scene,
    held_out_scene,
    train_scene,
)
from samq.tools.demo.shapes import Patch


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [held_out_scene(index) for index in range(24)]


def test_a_seed_gives_one_scene() -> None:
    first, second = draw_scene(7), draw_scene(7)
    np.testing.assert_array_equal(first.image, second.image)
    np.testing.assert_array_equal(first.masks, second.masks)


def test_image_and_masks_agree_in_shape_and_type(scenes: list[Scene]) -> None:
    for scene in scenes:
        assert scene.image.shape == (256, 256, 3)
        assert scene.image.dtype == np.uint8
        assert scene.masks.shape[1:] == (256, 256)
        assert scene.masks.dtype == np.bool_


def test_masks_are_disjoint_and_visible(scenes: list[Scene]) -> None:
    for scene in scenes:
        assert 3 <= len(scene.masks) <= 12
        assert scene.masks.sum(axis=0).max() == 1
        assert scene.masks.sum(axis=(1, 2)).min() >= 32


def test_other_sizes_scale_the_scene() -> None:
    assert draw_scene(3, size=128).masks.shape[1:] == (128, 128)


def test_training_and_held_out_scenes_never_meet() -> None:
    compounds = draw_scene(HELD_OUT_SCENES, compound_share=TRAIN_COMPOUND_SHARE)
    np.testing.assert_array_equal(train_scene(0).image, compounds.image)
    np.testing.assert_array_equal(held_out_scene(5).image, draw_scene(5).image)
    with pytest.raises(ValueError, match="held-out scenes are numbered"):
        held_out_scene(HELD_OUT_SCENES)
    with pytest.raises(ValueError, match="from 0"):
        train_scene(-1)


def test_parts_belong_to_their_object() -> None:
    plain, compound = draw_scene(3), draw_scene(3, compound_share=1.0)
    assert not np.array_equal(plain.image, compound.image)
    for seed in range(8):
        masks = draw_scene(seed, compound_share=1.0).masks
        assert 3 <= len(masks) <= 12
        assert masks.sum(axis=0).max() == 1
        assert masks.sum(axis=(1, 2)).min() >= 32


def test_only_what_lies_on_the_body_is_left_of_a_marking() -> None:
    body = Patch(np.ones((4, 6), dtype=np.float32), top=10, left=20)
    marking = _within(Patch(np.full((4, 4), 0.5, dtype=np.float32), top=12, left=18), body)
    assert marking is not None
    assert (marking.top, marking.left, marking.coverage.shape) == (12, 20, (2, 2))
    np.testing.assert_array_equal(marking.coverage, 0.5)
    assert _within(Patch(np.ones((2, 2), dtype=np.float32), top=0, left=0), body) is None


def test_scenes_stay_varied(scenes: list[Scene]) -> None:
    masks = np.concatenate([scene.masks for scene in scenes])
    areas = masks.sum(axis=(1, 2))
    assert areas.min() < 100
    assert areas.max() > 5_000
    assert sum(_has_hole(mask) for mask in masks) >= 5
    assert sum(_some_objects_touch(scene) for scene in scenes) >= 5


def _has_hole(mask: np.ndarray) -> bool:
    return bool((ndimage.binary_fill_holes(mask) & ~mask).any())


def _some_objects_touch(scene: Scene) -> bool:
    grown = np.stack([ndimage.binary_dilation(mask) for mask in scene.masks])
    return bool(grown.sum(axis=0).max() > 1)


@pytest.mark.parametrize("light", [(1.0, 0.0), (0.0, 1.0), (-1.0, 0.0), (0.0, -1.0)])
@pytest.mark.parametrize("corner", [(0, 0), (0, 62), (62, 0), (62, 62)])
def test_a_shadow_may_fall_outside(light: tuple[float, float], corner: tuple[int, int]) -> None:
    canvas = _Canvas(np.full((64, 64, 3), 200.0, np.float32), np.zeros((64, 64), np.uint8), [], [], np.array(light))
    patch = Patch(np.ones((2, 2), np.float32), *corner)
    for seed in range(20):
        _cast_shadow(np.random.default_rng(seed), canvas, patch, diameter=60.0)
    assert canvas.rgb.min() > 0
    assert canvas.rgb.max() <= 200
