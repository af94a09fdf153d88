"""Prompts: their encoding as points with labels, those that a mask implies, and a grid for images that bring none.

Coordinates are SAM's: pixel indices, x before y; the model itself adds the half pixel to a pixel's centre.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage  # type: ignore[import-untyped]

FOREGROUND, TOP_LEFT, BOTTOM_RIGHT = 1, 2, 3


@dataclass(frozen=True)
class Prompts:
    """P prompts of N points each, for one image.

    Args:
        coords: [P, N, 2] float32 (x, y) in pixels of the model's input.
        labels: [P, N] int64, see `samq.calib.parts`.
    """

    coords: NDArray[np.float32]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.coords)


def clicks(points: NDArray[np.float32]) -> Prompts:
    """One foreground click each, from points [P, 2]."""
    return Prompts(points[:, None].astype(np.float32), np.full((len(points), 1), FOREGROUND, dtype=np.int64))


def boxes(corners: NDArray[np.float32]) -> Prompts:
    """One box each, from corners [P, 4] (x1, y1, x2, y2)."""
    labels = np.tile(np.array([TOP_LEFT, BOTTOM_RIGHT], dtype=np.int64), (len(corners), 1))
    return Prompts(corners.reshape(-1, 2, 2).astype(np.float32), labels)


def grid(image_size: int, per_side: int) -> NDArray[np.float32]:
    """Points [per_side², 2] in the middle of equal squares of an image_size × image_size image."""
    ticks = (np.arange(per_side, dtype=np.float32) + 0.5) * (image_size / per_side)
    x, y = np.meshgrid(ticks, ticks)
    return np.stack([x.ravel(), y.ravel()], axis=1)


def box_of(mask: NDArray[np.bool_]) -> NDArray[np.float32]:
    """The smallest box that holds every pixel of a mask.

    Args:
        mask: [H, W], bool.

    Returns:
        float32 [4], (x1, y1, x2, y2) in pixels; the last column and row are inclusive, as in SAM.

    Raises:
        ValueError: the mask is not two-dimensional, or has no pixel.
    """
    _require_pixels(mask)
    columns = np.flatnonzero(mask.any(axis=0))
    rows = np.flatnonzero(mask.any(axis=1))
    return np.array([columns[0], rows[0], columns[-1], rows[-1]], dtype=np.float32)


def click_of(mask: NDArray[np.bool_]) -> NDArray[np.float32]:
    """The pixel of a mask that is farthest from everything outside it, the image's border included.

    Ties go to the first such pixel in row-major order.

    Args:
        mask: [H, W], bool.

    Returns:
        float32 [2], (x, y) in pixels.

    Raises:
        ValueError: the mask is not two-dimensional, or has no pixel.
    """
    _require_pixels(mask)
    x1, y1, x2, y2 = box_of(mask).astype(int)
    # One ring of zeros around the box: pixels beyond it are no nearer than the ring, so the crop is exact.
    crop = np.pad(mask[y1 : y2 + 1, x1 : x2 + 1], 1)
    depth = ndimage.distance_transform_edt(crop)
    y, x = np.unravel_index(int(np.argmax(depth)), depth.shape)
    return np.array([x + x1 - 1, y + y1 - 1], dtype=np.float32)


def _require_pixels(mask: NDArray[np.bool_]) -> None:
    if mask.ndim != 2:
        raise ValueError(f"a mask is [H, W]; got shape {mask.shape}. Pass one instance at a time.")
    if not mask.any():
        raise ValueError("the mask has no pixel, so it implies no prompt; drop empty instances first.")
