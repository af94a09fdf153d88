"""Prompts as points with labels, and the prompts that a mask implies."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from samq.calib.prompts import box_of, boxes, click_of, clicks, grid


@pytest.mark.parametrize(("size", "per_side"), [(128, 1), (128, 4), (1024, 32)])
def test_grid_is_the_middle_of_equal_squares(size: int, per_side: int) -> None:
    points = grid(size, per_side)
    assert points.dtype == np.float32
    assert points.shape == (per_side**2, 2)
    square = size / per_side
    cells = {(int(x // square), int(y // square)) for x, y in points}
    assert cells == {(i, j) for i in range(per_side) for j in range(per_side)}
    np.testing.assert_allclose(points % square, square / 2)
    np.testing.assert_array_equal(points[: min(2, per_side), 1], points[0, 1])  # x runs first


def test_clicks_are_one_foreground_point_each() -> None:
    points = np.array([[1, 2], [3, 4], [5, 6]], dtype=np.float32)
    prompts = clicks(points)
    assert len(prompts) == 3
    np.testing.assert_array_equal(prompts.coords, points[:, None])
    np.testing.assert_array_equal(prompts.labels, np.ones((3, 1)))
    assert (prompts.coords.dtype, prompts.labels.dtype) == (np.float32, np.int64)


def test_boxes_are_two_labelled_corners() -> None:
    prompts = boxes(np.array([[1, 2, 3, 4], [5, 6, 7, 8]], dtype=np.float32))
    assert len(prompts) == 2
    np.testing.assert_array_equal(prompts.coords, [[[1, 2], [3, 4]], [[5, 6], [7, 8]]])
    np.testing.assert_array_equal(prompts.labels, [[2, 3], [2, 3]])
    assert (prompts.coords.dtype, prompts.labels.dtype) == (np.float32, np.int64)


def test_box_holds_first_and_last_pixel() -> None:
    mask = np.zeros((20, 30), dtype=bool)
    mask[3:8, 10:25] = True
    np.testing.assert_array_equal(box_of(mask), [10, 3, 24, 7])
    assert box_of(mask).dtype == np.float32


def test_click_is_the_deepest_pixel() -> None:
    mask = np.zeros((20, 30), dtype=bool)
    mask[4:9, 10:15] = True
    mask[6, 15:28] = True  # a thin tail draws the centroid away, not the click
    np.testing.assert_array_equal(click_of(mask), [12, 6])


def test_click_counts_the_image_border_as_outside() -> None:
    np.testing.assert_array_equal(click_of(np.ones((9, 9), dtype=bool)), [4, 4])


def test_click_on_a_ring_lies_on_the_ring() -> None:
    y, x = np.mgrid[:41, :41]
    radius = np.hypot(x - 20, y - 20)
    mask = (radius < 18) & (radius > 8)
    x_click, y_click = click_of(mask).astype(int)
    assert mask[y_click, x_click]


def test_click_equals_the_transform_of_the_whole_image() -> None:
    mask = ndimage.gaussian_filter(np.random.default_rng(0).standard_normal((64, 64)), 4) > 0
    depth = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    x, y = click_of(mask).astype(int)
    assert depth[y, x] == depth.max()


@pytest.mark.parametrize("prompt", [box_of, click_of])
@pytest.mark.parametrize("mask", [np.zeros((4, 4), dtype=bool), np.ones((1, 4, 4), dtype=bool)])
def test_masks_that_imply_no_prompt_are_refused(prompt, mask) -> None:
    with pytest.raises(ValueError, match="mask"):
        prompt(mask)
