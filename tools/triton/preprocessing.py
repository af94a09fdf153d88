"""A processor's work as a resize and a line per channel, measured on images, so that a server needs no transformers."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from samq.calib.processor import SamProcessor
from samq.errors import BadInput
from samq.tools.triton.served.images import Preprocessing

ROUNDING = 4e-6  # of float32 values up to 3, in another order of operations
WHITE = 255


def measured(processor: SamProcessor) -> Preprocessing:
    """The same preprocessing, whatever settings it comes from; tried on an image that shrinks and one that grows.

    Raises:
        BadInput: the processor does something else besides.
    """
    dark, bright = (_mean(processor, value) for value in (0, WHITE))
    scale, offset = (bright - dark) / WHITE, dark
    random = np.random.default_rng(0)
    shapes = ((2 * processor.image_size + 3, processor.image_size + 1), (5, 7))
    images: list[NDArray[np.uint8]] = [random.integers(0, WHITE + 1, (*shape, 3), np.uint8) for shape in shapes]
    for resample in Image.Resampling:
        found = Preprocessing(processor.image_size, int(resample), _three(scale), _three(offset))
        if all(np.allclose(found(image), processor(image).pixel_values, rtol=0, atol=ROUNDING) for image in images):
            return found
    raise BadInput(
        "the checkpoint's image processor does more than resize, scale and shift, which Triton would not do; "
        "restore the preprocessor_config.json of SAM2 and run again"
    )


def _mean(processor: SamProcessor, value: int) -> NDArray[np.float64]:
    """What becomes of an image of one value, by channel."""
    image = np.full((2, 2, 3), value, np.uint8)
    channels: NDArray[np.float64] = processor(image).pixel_values.astype(np.float64).mean(axis=(1, 2))
    return channels


def _three(values: NDArray[Any]) -> tuple[float, float, float]:
    red, green, blue = map(float, values)
    return red, green, blue
