"""Pictures of one prompt: the photo, what each model answered, and where the answers differ.

All have the photo's shape. The first shows the whole photo with the prompt and, where the others show a part of it
only, the frame of that part.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage  # type: ignore[import-untyped]

from samq.calib.prompts import box_of
from samq.tools.evaluate import BOX, Answer

PHOTO, BASELINE, QUANTIZED, DIFFERENCE = PANELS = ("photo", "baseline", "quantized", "difference")

SIDE = 480  # of a panel at most, in pixels
MARGIN = 0.35  # around what is shown, as a share of it
SMALLEST_CROP, LARGEST_CROP = 0.2, 0.75  # of the photo's sides; a larger crop is the whole photo
OPACITY = 0.6

Colour = tuple[int, int, int]
BLUE, ORANGE, YELLOW, WHITE, BLACK = (30, 120, 240), (245, 120, 20), (255, 225, 40), (255, 255, 255), (0, 0, 0)

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class View:
    """A part of a photo, drawn at a size.

    Args:
        region: (left, top, right, bottom) in pixels of the photo.
        size: (width, height) in pixels of the panel.
    """

    region: tuple[float, float, float, float]
    size: tuple[int, int]

    def photo(self, pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
        """The part of a photo [H, W, 3], as [h, w, 3]."""
        seen = Image.fromarray(pixels).resize(self.size, Image.Resampling.BICUBIC, self.region)
        return np.asarray(seen, np.float64)

    def mask(self, mask: Mask) -> Mask:
        """The part of a mask [H, W], as [h, w]; enlarged pixels stay squares."""
        seen = Image.fromarray(mask.astype(np.uint8) * 255).resize(self.size, Image.Resampling.BOX, self.region)
        return np.asarray(seen) > 127

    def point(self, x: float, y: float) -> tuple[float, float]:
        """Where the middle of a pixel of the photo is in the panel."""
        left, top, right, bottom = self.region
        scale = (self.size[0] / (right - left), self.size[1] / (bottom - top))
        return (x + 0.5 - left) * scale[0], (y + 0.5 - top) * scale[1]


def draw_panels(photo: NDArray[np.uint8], answer: Answer) -> dict[str, Image.Image]:
    """The four pictures of an answer.

    Args:
        photo: [H, W, 3].
        answer: with masks [H, W].
    """
    height, width = photo.shape[:2]
    size = _panel_size(width, height)
    whole = View((0, 0, width, height), size)
    close = View(_crop(answer, width, height), size)
    seen = close.photo(photo)
    before, after = close.mask(answer.baseline), close.mask(answer.quantized)
    outlined = [] if answer.truth is None else [(close.mask(answer.truth), WHITE)]
    grey = np.repeat(seen.mean(axis=2, keepdims=True), 3, axis=2) * 0.45 + 70
    return {
        PHOTO: _photo_panel(whole.photo(photo), whole, close, answer),
        BASELINE: _overlaid(seen, [(before, BLUE)], outlined),
        QUANTIZED: _overlaid(seen, [(after, ORANGE)], outlined),
        DIFFERENCE: _overlaid(grey, [(before & ~after, BLUE), (after & ~before, ORANGE)], [], opacity=0.9),
    }


def _panel_size(width: int, height: int) -> tuple[int, int]:
    scale = SIDE / max(width, height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _crop(answer: Answer, width: int, height: int) -> tuple[float, float, float, float]:
    """What is worth a closer look, in the photo's shape: prompt and masks with a margin."""
    shown = answer.baseline | answer.quantized
    if answer.truth is not None:
        shown = shown | answer.truth
    corners = np.array(answer.record.prompt).reshape(-1, 2)
    if shown.any():
        corners = np.concatenate([corners, box_of(shown).reshape(-1, 2)])
    low, high = corners.min(axis=0), corners.max(axis=0) + 1
    sides = np.array([width, height])
    share = float(((high - low) / sides).max()) * (1 + 2 * MARGIN)
    if share > LARGEST_CROP:
        return 0, 0, width, height
    half = sides * max(share, SMALLEST_CROP) / 2
    left, top = np.clip((low + high) / 2, half, sides - half) - half
    return float(left), float(top), float(left + 2 * half[0]), float(top + 2 * half[1])


def _photo_panel(pixels: NDArray[np.float64], whole: View, close: View, answer: Answer) -> Image.Image:
    image = Image.fromarray(pixels.astype(np.uint8))
    draw = ImageDraw.Draw(image)
    if close.region != whole.region:
        left, top, right, bottom = close.region
        _frame(draw, (*whole.point(left - 0.5, top - 0.5), *whole.point(right - 0.5, bottom - 0.5)), WHITE, 1)
    points = [whole.point(x, y) for x, y in np.array(answer.record.prompt).reshape(-1, 2).tolist()]
    if answer.record.kind == BOX:
        _frame(draw, (*points[0], *points[1]), YELLOW, 3)
    else:
        for radius, colour in ((9, BLACK), (7, YELLOW), (3, BLACK)):
            (x, y) = points[0]
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    return image


def _frame(draw: ImageDraw.ImageDraw, corners: tuple[float, float, float, float], colour: Colour, width: int) -> None:
    """A rectangle that is seen on light and on dark."""
    x1, y1, x2, y2 = corners
    draw.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline=BLACK, width=width + 2)
    draw.rectangle((x1, y1, x2, y2), outline=colour, width=width)


def _overlaid(
    pixels: NDArray[np.float64],
    masks: list[tuple[Mask, Colour]],
    outlined: list[tuple[Mask, Colour]],
    opacity: float = OPACITY,
) -> Image.Image:
    """Pixels with masks laid over them, and the outlines of others."""
    blended = pixels.copy()
    for mask, colour in masks:
        blended[mask] = (1 - opacity) * blended[mask] + opacity * np.array(colour)
    for mask, colour in outlined:
        line = mask & ~ndimage.binary_erosion(mask, iterations=2)
        blended[line] = colour
    return Image.fromarray(blended.clip(0, 255).astype(np.uint8))
