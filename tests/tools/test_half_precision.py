"""The FP16 baseline held against FP32: rounding passes, overflow does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from exported import float_predictor
from numpy.typing import NDArray
from small_model import IMAGE_SIZE

from samq.calib.processor import SamProcessor
from samq.calib.sources import Sample
from samq.engines.base import Arrays, Engine
from samq.engines.predictor import Predictor
from samq.errors import AccuracyGateMissed
from samq.tools.gates import missed_gate
from samq.tools.half_precision import AGREES, BROKEN, DIFFERS, compare_with_fp32, complaint
from samq.tools.report.verdict import MISSED, PLAIN, WARNING, agreement_with_fp32, headline

PROCESSOR = SamProcessor({"size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE}}, "a test")
FINE = {"gates": [], "disagreements": [], "accuracy": {"count": 1}}


class Rewritten:
    """An engine whose answers are changed."""

    def __init__(self, engine: Engine, change: Callable[[NDArray[Any]], NDArray[Any]]) -> None:
        self.inputs, self.outputs, self.shapes = engine.inputs, engine.outputs, engine.shapes
        self._engine, self._change = engine, change

    def run(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        return {name: self._change(answer) for name, answer in self._engine.run(feeds).items()}


def rounded(array: NDArray[Any]) -> NDArray[Any]:
    return array.astype(np.float16).astype(np.float32)


def overflowed(array: NDArray[Any]) -> NDArray[Any]:
    with np.errstate(over="ignore"):
        return (array * np.float32(1e6)).astype(np.float16).astype(np.float32)


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    return float_predictor(tmp_path_factory.mktemp("fp32"))


def samples(*, annotated: bool) -> list[Sample]:
    random = np.random.default_rng(0)
    masks = np.zeros((2, 60, 80), bool)
    masks[0, 5:30, 5:40] = masks[1, 20:50, 30:70] = True
    images = [random.integers(0, 255, (60, 80, 3), np.uint8) for _ in range(2)]
    return [Sample(str(i), image, masks if annotated else None) for i, image in enumerate(images)]


def compared(exact: Predictor, half: Predictor, *, annotated: bool = True) -> dict[str, Any]:
    return compare_with_fp32(half, exact, samples(annotated=annotated), PROCESSOR)


@pytest.mark.parametrize("annotated", [True, False])
def test_rounding_agrees(exact: Predictor, annotated: bool) -> None:
    half = Predictor(Rewritten(exact.encoder, rounded), exact.decoder)
    found = compared(exact, half, annotated=annotated)
    assert (found["images"], found["state"]) == (2, AGREES)
    assert found["prompts"] == 8 if annotated else found["prompts"] > 32
    assert 0 < found["relative_error"] < 1e-3
    assert 1 - 1e-6 < found["cosine"] < 1
    assert 0.9 < found["lowest_mask_iou"] <= found["mask_iou"] <= 1
    assert complaint(found) is None
    assert headline({**FINE, "half_precision": found})[0] == PLAIN


def test_an_overflow_is_no_baseline(exact: Predictor) -> None:
    found = compared(exact, Predictor(Rewritten(exact.encoder, overflowed), exact.decoder))
    assert (found["state"], found["relative_error"], found["cosine"]) == (BROKEN, None, None)
    assert "not finite" in str(complaint(found))
    assert "not finite" in agreement_with_fp32(found)


def test_other_masks_are_no_baseline(exact: Predictor) -> None:
    """All values are finite, and all signs wrong."""
    found = compared(exact, Predictor(exact.encoder, Rewritten(exact.decoder, np.negative)))
    assert found["state"] == BROKEN
    assert found["relative_error"] == 0
    report = {**FINE, "half_precision": found}
    assert headline(report)[0] == MISSED
    assert isinstance(missed_gate(report), AccuracyGateMissed)
    assert "--engine onnxruntime --device cpu" in str(missed_gate(report))


def test_a_doubtful_baseline_is_a_warning() -> None:
    found = {"images": 2, "prompts": 3, "relative_error": 0.1, "cosine": 0.99, "mask_iou": 0.95, "lowest_mask_iou": 0.9}
    report = {**FINE, "half_precision": found | {"state": DIFFERS}}
    assert headline(report)[0] == WARNING
    assert missed_gate(report) is None
    assert "0.9500, below 0.98" in str(complaint(report["half_precision"]))


def test_images_without_objects_are_judged_by_their_embeddings(exact: Predictor) -> None:
    empty = [Sample("empty", np.zeros((20, 20, 3), np.uint8), np.zeros((0, 20, 20), bool))]
    found = compare_with_fp32(exact, exact, empty, PROCESSOR)
    assert (found["prompts"], found["mask_iou"], found["state"]) == (0, None, AGREES)
    assert "no masks to compare" in agreement_with_fp32(found)
