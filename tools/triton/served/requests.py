"""A request as clients send it, checked: whatever is wrong with it becomes one line that says what to send instead."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samq.errors import BadInput

BACKGROUND, FOREGROUND, TOP_LEFT, BOTTOM_RIGHT, FILLER = 0, 1, 2, 3, -10  # labels, as in samq.calib.parts
LARGEST_LOGIT = 1000.0  # of a mask input; a model's own stay below 100

Inputs = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Limits:
    """The most that one request may ask for.

    Args:
        image_pixels: H × W.
        prompts: P.
        points: N, the two corners of a box included.
        mask_pixels: H × W × all masks of the answer.
    """

    image_pixels: int
    prompts: int
    points: int
    mask_pixels: int


@dataclass(frozen=True)
class Prompts:
    """P prompts of N points each; a box is the first two.

    Args:
        coords: [P, N, 2] float32 (x, y) in pixels of the image.
        labels: [P, N] int64.
        masks: [P, h, w] logits of an earlier answer, or None.
        ambiguous: each prompt is a single click, which may mean several things.
    """

    coords: NDArray[np.float32]
    labels: NDArray[np.int64]
    masks: NDArray[np.float32] | None
    ambiguous: bool

    def __len__(self) -> int:
        return len(self.coords)


def image_of(inputs: Inputs, limits: Limits) -> NDArray[np.uint8]:
    """The image, uint8 [H, W, 3].

    Raises:
        BadInput: it is of another shape or type, empty, or larger than the limit.
    """
    image = inputs["image"]
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise BadInput(f"image is {_described(image)}; send RGB as uint8 [H, W, 3]")
    height, width = image.shape[:2]
    if not image.size:
        raise BadInput(f"image has {width} × {height} pixels; send one with at least one pixel")
    if height * width > limits.image_pixels:
        most = f"{limits.image_pixels} of max_image_pixels"
        raise BadInput(f"image has {width} × {height} pixels, more than the {most}; send a smaller one")
    return image


def prompts_of(inputs: Inputs, size: tuple[int, int], mask_side: tuple[int, int], limits: Limits) -> Prompts:
    """The prompts of a request; none where it has neither points nor boxes.

    Args:
        size: (H, W) of the image.
        mask_side: (h, w) of a mask input.

    Raises:
        BadInput: shapes do not fit together, coordinates are not finite or far from the image, a label is out of range,
            or there are more than the limits allow.
    """
    points, boxes = _points(inputs), _boxes(inputs)
    given = [part for part in (boxes, points) if part is not None]
    if not given:
        if "mask_input" in inputs:
            raise BadInput("mask_input comes with points or boxes; send them too")
        return Prompts(np.zeros((0, 1, 2), np.float32), np.zeros((0, 1), np.int64), None, ambiguous=False)
    if points is not None and boxes is not None and len(points[0]) != len(boxes[0]):
        raise BadInput(f"points for {len(points[0])} prompts and {len(boxes[0])} boxes; send as many")
    coords, labels = (np.concatenate(parts, axis=1) for parts in zip(*given, strict=True))
    prompts, count = labels.shape
    for name, number, most in (("prompts", prompts, limits.prompts), ("points a prompt", count, limits.points)):
        if not 1 <= number <= most:
            raise BadInput(f"{number} {name}; send 1 to {most}")
    _require_near(coords, size)
    masks = _masks(inputs, (prompts, *mask_side))
    return Prompts(coords, labels, masks, ambiguous=boxes is None and count == 1 and masks is None)


def flag(inputs: Inputs, name: str) -> bool:
    """A BOOL [1] input; False where it is absent."""
    return name in inputs and bool(inputs[name].all())


def _points(inputs: Inputs) -> tuple[NDArray[np.float32], NDArray[np.int64]] | None:
    if "points" not in inputs:
        if "labels" in inputs:
            raise BadInput("labels without points; send both")
        return None
    points = np.asarray(inputs["points"], np.float32)
    if points.ndim != 3 or points.shape[2] != 2:
        raise BadInput(f"points are {_described(points)}; send float32 [prompts, points, 2]")
    labels = np.asarray(inputs.get("labels", np.full(points.shape[:2], FOREGROUND)), np.int64)
    if labels.shape != points.shape[:2]:
        raise BadInput(f"labels are {list(labels.shape)}; send one for each point, {list(points.shape[:2])}")
    wrong = np.setdiff1d(labels, (BACKGROUND, FOREGROUND, FILLER))
    if wrong.size:
        raise BadInput(
            f"label {wrong[0]}; send {FOREGROUND} for foreground, {BACKGROUND} for background, {FILLER} for no point"
        )
    return points, labels


def _boxes(inputs: Inputs) -> tuple[NDArray[np.float32], NDArray[np.int64]] | None:
    if "boxes" not in inputs:
        return None
    boxes = np.asarray(inputs["boxes"], np.float32)
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise BadInput(f"boxes are {_described(boxes)}; send float32 [prompts, 4] as x1, y1, x2, y2")
    if (boxes[:, :2] > boxes[:, 2:]).any():
        raise BadInput("a box has its corners the wrong way round; send x1 ≤ x2 and y1 ≤ y2")
    return boxes.reshape(-1, 2, 2), np.tile(np.array([TOP_LEFT, BOTTOM_RIGHT], np.int64), (len(boxes), 1))


def _masks(inputs: Inputs, shape: tuple[int, int, int]) -> NDArray[np.float32] | None:
    if "mask_input" not in inputs:
        return None
    masks = np.asarray(inputs["mask_input"], np.float32)
    if masks.shape != shape:
        raise BadInput(f"mask_input is {list(masks.shape)}; send the logits of an earlier answer, {list(shape)}")
    if not (np.abs(masks) <= LARGEST_LOGIT).all():  # NaN compares false
        raise BadInput(f"mask_input has values that are not finite or beyond ±{LARGEST_LOGIT:g}; send logits")
    return masks


def _require_near(coords: NDArray[np.float32], size: tuple[int, int]) -> None:
    """A little outside is what detectors give; farther than the image is large cannot be meant."""
    if not np.isfinite(coords).all():
        raise BadInput("a coordinate is NaN or infinite; send pixels of the image")
    height, width = size
    far = (coords < (-width, -height)) | (coords > (2 * width, 2 * height))
    if far.any():
        x, y = coords[far.any(axis=-1)][0]
        raise BadInput(f"point ({x:g}, {y:g}) is far outside the image of {width} × {height}; send pixels of the image")


def _described(array: NDArray[Any]) -> str:
    return f"{array.dtype} {list(array.shape)}"
