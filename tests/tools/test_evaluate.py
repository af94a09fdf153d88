"""Accuracy figures on masks that are known beforehand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from samq.calib.processor import SamProcessor
from samq.calib.sources import Sample
from samq.engines.predictor import Predictor
from samq.tools.evaluate import (
    BOX,
    CLICK,
    FROM_ANNOTATIONS,
    FROM_BASELINE,
    LARGE,
    MEDIUM,
    SMALL,
    Record,
    Seen,
    answers_to,
    evaluate,
    summarize,
)
from samq.tools.metrics import iou, mask_of, sqnr_db

SIZE = 64
PROCESSOR = SamProcessor({"size": {"height": SIZE, "width": SIZE}}, "a test")


class Squares:
    """An engine for both parts that answers every prompt with the same masks: three squares and nothing."""

    inputs: Sequence[str] = ()
    outputs: Sequence[str] = ()
    shapes: Mapping[str, Sequence[int | str]] = {"point_coords": ["batch", "prompts", "points", 2]}

    def __init__(self, sides: tuple[int, int, int, int], scores: tuple[float, float, float, float]) -> None:
        self.sides, self.scores = sides, scores

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Features, or one answer a prompt."""
        if "pixel_values" in feeds:
            return {"high_res_features_0": np.zeros((1, 1, SIZE, SIZE), np.float32)}
        prompts = feeds["point_coords"].shape[1]
        masks = np.full((1, prompts, 4, SIZE, SIZE), -5, np.float32)
        for index, side in enumerate(self.sides):
            masks[:, :, index, :side, :side] = 5
        scores = np.tile(np.array(self.scores, np.float32), (1, prompts, 1))
        return {"masks": masks, "iou_scores": scores, "object_score_logits": np.ones((1, prompts, 1), np.float32)}


def _square(side: int) -> NDArray[np.bool_]:
    mask = np.zeros((1, SIZE, SIZE), bool)
    mask[0, :side, :side] = True
    return mask


def _pair() -> tuple[Predictor, Predictor]:
    """Box: single mask; click: best-scored multimask."""
    before = Squares((32, 10, 32, 20), (0.9, 0.1, 0.8, 0.3))
    after = Squares((16, 32, 10, 8), (0.7, 0.1, 0.2, 0.5))
    return Predictor(before, before), Predictor(after, after)


def _sample(masks: NDArray[np.bool_] | None) -> Sample:
    return Sample("one", np.zeros((SIZE, SIZE, 3), np.uint8), masks)


def _summary(masks: NDArray[np.bool_] | None) -> dict[str, Any]:
    return summarize(evaluate(*_pair(), [_sample(masks)], PROCESSOR))


def test_figures_against_annotations_are_the_known_ones() -> None:
    found = _summary(_square(32))
    box, click = found["by_kind"][BOX], found["by_kind"][CLICK]
    assert (box["miou_baseline"], box["miou_quantized"]) == (1.0, 0.25)
    assert (click["miou_baseline"], click["miou_quantized"]) == (1.0, 0.0625)
    assert found["miou_quantized"] == pytest.approx((0.25 + 0.0625) / 2)
    assert found["miou_relative"] == found["miou_quantized"]
    assert found["agreement_iou"] == found["miou_quantized"]  # the baseline is the truth here
    assert box["iou_score_drift"] == pytest.approx(0.2)
    assert click["iou_score_drift"] == pytest.approx(0.3)
    assert found["prompts"] == {"count": 2, "images": 1, "source": FROM_ANNOTATIONS}


def test_without_annotations_only_the_agreement_is_told() -> None:
    found = _summary(None)
    assert found["miou_baseline"] is None
    assert found["miou_quantized"] is None
    assert found["miou_relative"] is None
    assert found["by_kind"][CLICK]["agreement_iou"] == 0.0625
    assert found["by_kind"][BOX] | {"iou_score_drift": None} == {
        "miou_baseline": None,
        "miou_quantized": None,
        "miou_relative": None,
        "agreement_iou": 0.25,
        "iou_score_drift": None,
        "count": 1,  # all clicks find one mask
    }
    assert found["prompts"]["source"] == FROM_BASELINE


def test_an_image_without_objects_gives_no_prompt() -> None:
    found = _summary(np.zeros((0, SIZE, SIZE), bool))
    assert found["count"] == 0
    assert found["agreement_iou"] is None
    assert found["prompts"]["source"] == FROM_ANNOTATIONS


def test_an_answer_has_the_masks_of_its_figures() -> None:
    for answer in answers_to(*_pair(), _sample(_square(32)), PROCESSOR):
        assert answer.truth is not None
        assert iou(answer.baseline, answer.truth) == answer.record.iou_baseline
        assert iou(answer.quantized, answer.truth) == answer.record.iou_quantized
        assert iou(answer.baseline, answer.quantized) == answer.record.agreement
        assert answer.record.share == 0.25
    (share,) = {answer.record.share for answer in answers_to(*_pair(), _sample(None), PROCESSOR)}
    assert share == 0.25  # the baseline's mask


def _record(share: float, agreement: float) -> Record:
    return Record("one", BOX, [0, 0, 1, 1], None, share, None, None, agreement, 1.0, 1.0)


def test_objects_are_sorted_by_the_share_of_the_image_that_they_cover() -> None:
    coco = 640 * 480
    edges = {32**2 - 1: SMALL, 32**2: MEDIUM, 96**2 - 1: MEDIUM, 96**2: LARGE}
    assert {area: _record(area / coco, 1.0).size for area in edges} == edges
    summary = summarize([_record(0.001, 0.5), _record(0.01, 0.6), _record(0.01, 0.8), _record(0.5, 1.0)])
    found = {size: (figures["count"], figures["agreement_iou"]) for size, figures in summary["by_size"].items()}
    assert found == {SMALL: (1, 0.5), MEDIUM: (2, pytest.approx(0.7)), LARGE: (1, 1.0)}


def test_the_distribution_is_told_in_percentiles() -> None:
    told = summarize([_record(0.1, value / 100) for value in range(101)])["agreement_percentiles"]
    assert told == pytest.approx({str(percent): percent / 100 for percent in (0, 5, 25, 50, 75, 95, 100)})
    assert set(summarize([])["agreement_percentiles"].values()) == {None}


def test_a_fingerprint_tells_images_and_masks_apart() -> None:
    def fingerprint(*samples: Sample) -> str:
        seen = Seen()
        assert list(seen.watch(samples)) == list(samples)
        return seen.fingerprint()

    plain, masked, other = _sample(None), _sample(_square(32)), _sample(_square(16))
    assert fingerprint(plain, masked) == fingerprint(plain, masked)
    assert len({fingerprint(*s) for s in ([plain], [masked], [other], [plain, plain], [])}) == 5


def test_iou_counts_pixels() -> None:
    one, other = _square(32)[0], _square(16)[0]
    assert iou(one, other) == 0.25
    assert iou(one, one) == 1.0
    assert iou(one, ~one) == 0.0
    assert iou(one & ~one, one & ~one) == 1.0


def test_masks_are_enlarged_to_the_image() -> None:
    logits = np.full((4, 4), -1, np.float32)
    logits[:, 2:] = 1
    mask = mask_of(logits, (6, 80))
    assert mask.shape == (6, 80)
    assert not mask[:, :40].any()
    assert mask[:, 40:].all()


def test_sqnr_is_in_decibels() -> None:
    assert sqnr_db(100.0, 1.0) == pytest.approx(20)
    assert sqnr_db(1.0, 0.0) is None
    assert sqnr_db(0.0, 1.0) is None
