import numpy as np
import pytest
from scipy import ndimage

from samq.calib.prompts import box_of, click_of


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
