"""Prompts for images that bring none, and their encoding as points with labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BACKGROUND, FOREGROUND, TOP_LEFT, BOTTOM_RIGHT = 0, 1, 2, 3


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
