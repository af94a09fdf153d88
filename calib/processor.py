"""transformers' own preprocessing of SAM2 images, on its PIL backend.

transformers' `Sam2ImageProcessor` needs torchvision. Here its settings run on the PIL backend, which
transformers has for machines without it, on all machines, so that the pixels are the same on each:

    pixel_values = (resize(image, S × S, bilinear) / 255 - mean) / std

The aspect ratio is not kept and nothing is padded, so a point scales by S / W and S / H.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import ChannelDimension, PILImageResampling
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from samq.calib.images import reason
from samq.errors import BadInput, UsageError


@dataclass(frozen=True)
class Processed:
    """What the model gets for one image.

    Attributes:
        pixel_values: float32 [3, S, S], normalized.
        original_size: (H, W) of the image before, in pixels.
    """

    pixel_values: NDArray[np.float32]
    original_size: tuple[int, int]


class _Sam2PilBackend(PilBackend):
    """The defaults of transformers' `Sam2ImageProcessor`."""

    resample = PILImageResampling.BILINEAR
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    size = {"height": 1024, "width": 1024}  # noqa: RUF012 - how transformers declares defaults
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True


class SamProcessor:
    """Images and points as SAM2 takes them.

    Attributes:
        image_size: Side S of the square that images are resized to, in pixels.
    """

    image_size: int

    def __init__(self, settings: dict[str, Any], origin: str) -> None:
        """Set up from the keys of a `preprocessor_config.json`, tried once on a small image.

        Args:
            settings: Keys that are absent or null have SAM2's defaults.
            origin: Where they are from, for errors.

        Raises:
            BadInput: they are invalid, or do not make S × S pixels.
        """
        try:
            self._backend = _Sam2PilBackend(**settings)
            size = dict(self._backend.size)
            if size.keys() != {"height", "width"} or size["height"] != size["width"]:
                raise ValueError(f"size {size} is not a square of height and width, which SAM2 needs")
            self.image_size = size["height"]
            tried = self(np.zeros((2, 2, 3), dtype=np.uint8)).pixel_values
            if tried.shape != (3, self.image_size, self.image_size) or not np.isfinite(tried).all():
                raise ValueError(f"makes an image {tried.shape} or values that are not finite")
        except Exception as error:  # transformers checks settings in many places, each with its own type
            raise BadInput(f"{origin}: invalid settings ({reason(error)}); restore the original file") from error

    @classmethod
    def from_checkpoint(cls, directory: Path | None, image_size: int | None) -> SamProcessor:
        """Read the settings of a checkpoint; those of SAM2 where `directory` is None or has none.

        As in transformers, the `image_processor` part of `processor_config.json` comes before
        `preprocessor_config.json`.

        Args:
            directory: Folder of the checkpoint.
            image_size: Side of the square in pixels, instead of the checkpoint's.

        Raises:
            BadInput: a settings file is unreadable or invalid.
            UsageError: `image_size` is below 1.
        """
        if image_size is not None and image_size < 1:
            raise UsageError(f"image size {image_size}; give a positive number of pixels")
        settings, origin = _settings(directory) if directory is not None else ({}, "SAM2's defaults")
        if image_size is not None:
            settings = {**settings, "size": {"height": image_size, "width": image_size}}
        return cls(settings, origin)

    def __call__(self, image: NDArray[np.uint8]) -> Processed:
        """Resize and normalize one uint8 [H, W, 3] RGB image."""
        features = self._backend(image, input_data_format=ChannelDimension.LAST, return_tensors="np")
        pixel_values = np.ascontiguousarray(features["pixel_values"][0], dtype=np.float32)
        return Processed(pixel_values, (image.shape[0], image.shape[1]))

    def points_to_model(self, points: NDArray[np.float32], original_size: tuple[int, int]) -> NDArray[np.float32]:
        """Scale (x, y) from pixels of the image to pixels of the model, like `Sam2Processor`.

        Args:
            points: float32 [..., 2]; a box is its two corners, [..., 2, 2].
            original_size: (H, W) of the image.
        """
        height, width = original_size
        scale = np.array([self.image_size / width, self.image_size / height], dtype=np.float32)
        return np.asarray(points, dtype=np.float32) * scale


def _settings(directory: Path) -> tuple[dict[str, Any], str]:
    """The image processor's settings in a checkpoint, and the name of their file."""
    nested = _read(directory / "processor_config.json").get("image_processor")
    if nested is not None:
        origin, settings = directory / "processor_config.json", nested
    else:
        origin = directory / "preprocessor_config.json"
        settings = _read(origin)
    if not isinstance(settings, dict):
        raise BadInput(f"{origin}: its image_processor is not a mapping; restore the original file")
    return settings, str(origin)


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; empty when there is no such file."""
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: cannot be read ({reason(error)}); restore the original file") from error
    if not isinstance(content, dict):
        raise BadInput(f"{path}: not a JSON object; restore the original file")
    return content
