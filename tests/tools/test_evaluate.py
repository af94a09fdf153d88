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
from samq.tools.evaluate import BOX, CLICK, FROM_ANNOTATIONS, FROM_BASELINE, evaluate, summarize
from samq.tools.metrics import iou, mask_of, sqnr_db

SIZE = 64


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


def _summary(masks: NDArray[np.bool_] | None) -> dict[str, Any]:
    # box: single mask; click: best-scored multimask
    before = Squares((32, 10, 32, 20), (0.9, 0.1, 0.8, 0.3))
    after = Squares((16, 32, 10, 8), (0.7, 0.1, 0.2, 0.5))
    pair = [Predictor(engine, engine) for engine in (before, after)]
    sample = Sample("one", np.zeros((SIZE, SIZE, 3), np.uint8), masks)
    processor = SamProcessor({"size": {"height": SIZE, "width": SIZE}}, "a test")
    return summarize(evaluate(*pair, [sample], processor))


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
