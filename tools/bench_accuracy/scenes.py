"""Images with their prompts and true masks, and what a model's answers are worth on each of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from samq.calib.processor import SamProcessor
from samq.calib.prompts import Prompts, box_of, boxes, click_of, clicks
from samq.calib.sources import ImageSource
from samq.engines.predictor import Predictor
from samq.tools.evaluate import BOX, CLICK
from samq.tools.metrics import iou, mask_of

AGREEMENT = "agreement"
MEASURES = (BOX, CLICK, AGREEMENT)
Scores = dict[str, list[float]]
"""Measure → for each scene the sum of IoU over its prompts, with the true masks (by kind) or with the float model's."""

Masks = dict[str, NDArray[np.bool_]]
"""Kind of prompt → a mask for each of P objects, [P, H, W]."""


@dataclass(frozen=True)
class Scene:
    """An image, ready to be asked about; prompts are as in `samq.tools.evaluate`.

    Args:
        pixel_values: [3, S, S].
        prompts: kind → a prompt for each of P objects.
        truths: [P, H, W] bool, their masks.
    """

    pixel_values: NDArray[np.float32]
    prompts: Mapping[str, Prompts]
    truths: NDArray[np.bool_]


def read_scenes(source: ImageSource, processor: SamProcessor, count: int) -> list[Scene]:
    """The first `count` images of a source with true masks."""
    return [_scene(source, processor, index) for index in range(count)]


def _scene(source: ImageSource, processor: SamProcessor, index: int) -> Scene:
    sample = source[index]
    assert sample.masks is not None
    truths = sample.masks[sample.masks.any((1, 2))]
    processed = processor(sample.image)
    corners = np.array([box_of(mask) for mask in truths], np.float32).reshape(-1, 2, 2)
    points = np.array([click_of(mask) for mask in truths], np.float32).reshape(-1, 1, 2)
    corners, points = (processor.points_to_model(marks, processed.original_size) for marks in (corners, points))
    prompts = {BOX: boxes(corners.reshape(-1, 4)), CLICK: clicks(points[:, 0])}
    return Scene(processed.pixel_values, prompts, truths)


def masks_of(predictor: Predictor, scene: Scene) -> Masks:
    """What a model answers to every prompt of a scene."""
    features = predictor.encode(scene.pixel_values)
    found = {}
    for kind, prompts in scene.prompts.items():
        masks = np.zeros_like(scene.truths)
        if len(masks):
            answers = predictor.decode(features, prompts.coords, prompts.labels)
            for index in range(len(masks)):
                logits, _ = answers.best(index, ambiguous=kind == CLICK)
                masks[index] = mask_of(logits, (masks.shape[1], masks.shape[2]))
        found[kind] = masks
    return found


def score(answers: Iterable[Masks], baseline: Iterable[Masks], scenes: Sequence[Scene]) -> Scores:
    """What answers are worth.

    Args:
        answers: of a model, for each scene.
        baseline: of the float model, likewise.
    """
    found: Scores = {measure: [] for measure in MEASURES}
    for scene, own, expected in zip(scenes, answers, baseline, strict=True):
        for kind in scene.prompts:
            found[kind].append(_total(own[kind], scene.truths))
        found[AGREEMENT].append(sum(_total(own[kind], expected[kind]) for kind in scene.prompts))
    return found


def _total(found: NDArray[np.bool_], expected: NDArray[np.bool_]) -> float:
    return sum(iou(one, other) for one, other in zip(found, expected, strict=True))


class PackedMasks:
    """Masks of many scenes in a bit a pixel."""

    def __init__(self, masks: Iterable[Masks]) -> None:
        self._packed = [{kind: (np.packbits(of), of.shape) for kind, of in scene.items()} for scene in masks]

    def __iter__(self) -> Iterator[Masks]:
        for scene in self._packed:
            yield {
                kind: np.unpackbits(bits, count=math.prod(shape)).astype(bool).reshape(shape)
                for kind, (bits, shape) in scene.items()
            }
