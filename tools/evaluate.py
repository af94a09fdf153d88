"""Accuracy of a quantized model against its baseline, and against ground truth where there is any.

Prompts come from the annotations: for each object its box (answered by the single mask) and a click on its deepest
point (answered by the multimask of highest predicted IoU). Without annotations: a grid of clicks, and the boxes of the
masks that the baseline finds with them; then only the agreement of the two models can be told.

An object's size is the share of the image that its mask covers. Small and large begin where COCO has them, at 32² and
96² pixels of an image of 640 × 480.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samq.calib.processor import SamProcessor
from samq.calib.prompts import Prompts, box_of, boxes, click_of, clicks, grid
from samq.calib.sources import Sample
from samq.engines.predictor import Predictions, Predictor
from samq.tools.metrics import iou, mask_of, mean

BOX, CLICK = "box", "click"
SMALL, MEDIUM, LARGE = "small", "medium", "large"
SMALL_BELOW, LARGE_FROM = 32**2 / (640 * 480), 96**2 / (640 * 480)  # shares of the image: 0.33 % and 3 %
PERCENTILES = (0, 5, 25, 50, 75, 95, 100)
GRID_PER_SIDE = 4
FROM_ANNOTATIONS = "annotations"
FROM_BASELINE = "a grid of clicks, and the boxes of the baseline's masks"


@dataclass(frozen=True)
class Record:
    """One prompt.

    Args:
        image: name of the image.
        kind: "box" or "click".
        prompt: coordinates (x, y, …) in pixels of the image.
        area: pixels of the true mask, None without ground truth.
        share: share of the image that the true mask covers, or without ground truth the baseline's.
        iou_baseline, iou_quantized: IoU with the true mask, None without ground truth.
        agreement: IoU of the two models' masks.
        score_baseline, score_quantized: the IoU that each model predicts for its mask.
    """

    image: str
    kind: str
    prompt: list[float]
    area: int | None
    share: float
    iou_baseline: float | None
    iou_quantized: float | None
    agreement: float
    score_baseline: float
    score_quantized: float

    @property
    def size(self) -> str:
        """Small, medium or large."""
        return SMALL if self.share < SMALL_BELOW else MEDIUM if self.share < LARGE_FROM else LARGE


@dataclass(frozen=True)
class Answer:
    """What both models answered to one prompt.

    Args:
        record: its figures.
        baseline, quantized: masks [H, W] of the image's size.
        truth: the true mask [H, W], None without ground truth.
    """

    record: Record
    baseline: NDArray[np.bool_]
    quantized: NDArray[np.bool_]
    truth: NDArray[np.bool_] | None


class Seen:
    """Fingerprint of the images that pass `watch`, with their true masks: two runs that agree saw the same."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def watch(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        """The same samples."""
        for sample in samples:
            masks = np.zeros(0, bool) if sample.masks is None else sample.masks
            for array in (sample.image, np.packbits(masks)):
                self._digest.update(f"{array.shape}".encode())
                self._digest.update(array.tobytes())
            yield sample

    def fingerprint(self) -> str:
        """Hex digest of what passed so far."""
        return self._digest.hexdigest()


def evaluate(
    baseline: Predictor,
    quantized: Predictor,
    samples: Iterable[Sample],
    processor: SamProcessor,
    tick: Callable[[], None] = lambda: None,
) -> list[Record]:
    """Prompt both models on every image; one record a prompt.

    Args:
        samples: images, read once.
        tick: called after each image.
    """
    records: list[Record] = []
    for sample in samples:
        records.extend(answer.record for answer in answers_to(baseline, quantized, sample, processor))
        tick()
    return records


def summarize(records: list[Record]) -> dict[str, Any]:
    """The report's `accuracy` section."""
    annotated = all(record.area is not None for record in records)
    agreements = [record.agreement for record in records]
    return {
        **_summary(records),
        "agreement_percentiles": {
            str(percent): float(np.percentile(agreements, percent)) if agreements else None for percent in PERCENTILES
        },
        "by_kind": {kind: _summary([r for r in records if r.kind == kind]) for kind in (BOX, CLICK)},
        "by_size": {size: _summary([r for r in records if r.size == size]) for size in (SMALL, MEDIUM, LARGE)},
        "size_limits": {"small_below": SMALL_BELOW, "large_from": LARGE_FROM},
        "prompts": {
            "count": len(records),
            "images": len({record.image for record in records}),
            "source": FROM_ANNOTATIONS if annotated else FROM_BASELINE,
        },
    }


def as_json(records: list[Record]) -> list[dict[str, Any]]:
    """Records as JSON objects."""
    return [asdict(record) for record in records]


def _summary(records: list[Record]) -> dict[str, Any]:
    before = mean(record.iou_baseline for record in records if record.iou_baseline is not None)
    after = mean(record.iou_quantized for record in records if record.iou_quantized is not None)
    return {
        "miou_baseline": before,
        "miou_quantized": after,
        "miou_relative": None if before is None or after is None or before == 0 else after / before,
        "agreement_iou": mean(record.agreement for record in records),
        "iou_score_drift": mean(abs(record.score_quantized - record.score_baseline) for record in records),
        "count": len(records),
    }


def answers_to(baseline: Predictor, quantized: Predictor, sample: Sample, processor: SamProcessor) -> Iterator[Answer]:
    """Both models' answers to every prompt on one image; a prompt's masks are made when it is asked for."""
    processed = processor(sample.image)
    size = processed.original_size
    features = [predictor.encode(processed.pixel_values) for predictor in (baseline, quantized)]

    def answers(prompts: Prompts) -> list[Predictions]:
        models = zip((baseline, quantized), features, strict=True)
        return [model.decode(seen, prompts.coords, prompts.labels) for model, seen in models]

    def compared(kind: str, marks: NDArray[np.float32], truths: NDArray[np.bool_] | None) -> Iterator[Answer]:
        if len(marks) == 0:
            return
        placed = processor.points_to_model(marks.reshape(len(marks), -1, 2), size)
        prompts = boxes(placed.reshape(-1, 4)) if kind == BOX else clicks(placed[:, 0])
        before, after = answers(prompts)
        for index, mark in enumerate(marks):
            truth = None if truths is None else truths[index]
            yield _answer(sample.name, kind, mark, (before, after), index, size, truth)

    if sample.masks is not None:
        truths = sample.masks[sample.masks.any((1, 2))]
        corners = np.array([box_of(mask) for mask in truths], np.float32).reshape(-1, 4)
        points = np.array([click_of(mask) for mask in truths], np.float32).reshape(-1, 2)
        yield from compared(BOX, corners, truths)
        yield from compared(CLICK, points, truths)
        return
    points = grid(processor.image_size, GRID_PER_SIDE)
    found = baseline.decode(features[0], *_arrays(clicks(points)))
    masks = [mask_of(found.best(index, ambiguous=True)[0], size) for index in range(len(points))]
    corners = np.unique(np.array([box_of(m) for m in masks if m.any()], np.float32).reshape(-1, 4), axis=0)
    scale = np.array([size[1], size[0]], np.float32) / np.float32(processor.image_size)
    yield from compared(CLICK, points * scale, None)
    yield from compared(BOX, corners, None)


def _arrays(prompts: Prompts) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    return prompts.coords, prompts.labels


def _answer(
    image: str,
    kind: str,
    mark: NDArray[np.float32],
    answers: tuple[Predictions, Predictions],
    index: int,
    size: tuple[int, int],
    truth: NDArray[np.bool_] | None,
) -> Answer:
    (before, score_before), (after, score_after) = (a.best(index, ambiguous=kind == CLICK) for a in answers)
    mask_before, mask_after = mask_of(before, size), mask_of(after, size)
    record = Record(
        image=image,
        kind=kind,
        prompt=[round(float(value), 2) for value in mark],
        area=None if truth is None else int(truth.sum()),
        share=float((mask_before if truth is None else truth).mean()),
        iou_baseline=None if truth is None else iou(mask_before, truth),
        iou_quantized=None if truth is None else iou(mask_after, truth),
        agreement=iou(mask_before, mask_after),
        score_baseline=score_before,
        score_quantized=score_after,
    )
    return Answer(record, mask_before, mask_after, truth)
