"""Prompts as points with labels."""

from __future__ import annotations

import numpy as np
import pytest

from samq.calib.prompting import boxes, clicks, grid


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
