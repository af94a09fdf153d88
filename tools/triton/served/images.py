"""From an image to the encoder's pixels and from logits back to masks, as in `samq.calib.processor` and
`samq.tools.metrics`, with numpy and Pillow alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

ROWS_AT_ONCE = 256  # of an enlarged mask, so that its float values never take much memory


@dataclass(frozen=True)
class Preprocessing:
    """pixel_values = resize(image, size × size) · scale + offset, channel by channel.

    Args:
        size: side S of the encoder's input in pixels.
        resample: Pillow's number of the filter.
        scale, offset: of red, green and blue.
    """

    size: int
    resample: int
    scale: tuple[float, float, float]
    offset: tuple[float, float, float]

    def __call__(self, image: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 [H, W, 3] RGB → float32 [3, S, S]."""
        resized = Image.fromarray(image).resize((self.size, self.size), Image.Resampling(self.resample))
        values = np.asarray(resized, np.float32) * np.array(self.scale, np.float32) + np.array(self.offset, np.float32)
        return np.ascontiguousarray(values.transpose(2, 0, 1))


def mask_at(logits: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.bool_]:
    """Logits [h, w] → mask of `size` (H, W): bilinear between the centres of pixels, then > 0."""
    left, right, to_right = _neighbours(logits.shape[1], size[1])
    above, below, to_below = _neighbours(logits.shape[0], size[0])
    wide = (1 - to_right) * logits[:, left] + to_right * logits[:, right]  # [h, W]
    mask = np.empty(size, np.bool_)
    for start in range(0, size[0], ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        weight = to_below[rows, None]
        mask[rows] = (1 - weight) * wide[above[rows]] + weight * wide[below[rows]] > 0
    return mask


def _neighbours(source: int, target: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """For each of `target` pixels: its two neighbours among `source` ones, and how near it is to the second."""
    place = (np.arange(target, dtype=np.float32) + np.float32(0.5)) * np.float32(source / target) - np.float32(0.5)
    place = place.clip(0)
    first = np.minimum(place.astype(np.int64), source - 1)
    return first, np.minimum(first + 1, source - 1), place - first.astype(np.float32)
