"""The demo model's masks through engines and as PyTorch simulates them, on the same held-out scenes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from samq.calib.images import Sample
from samq.calib.processor import SamProcessor
from samq.engines.predictor import Predictor
from samq.tools.evaluate import BOX, CLICK, evaluate, summarize

KINDS = (BOX, CLICK)


def compare_masks(
    simulated: Predictor, engines: Predictor, scenes: Sequence[Sample], processor: SamProcessor
) -> dict[str, Any]:
    """mIoU of both with the truth and of one with the other, by prompt kind."""
    by_kind = summarize(evaluate(simulated, engines, scenes, processor))["by_kind"]
    found: dict[str, Any] = {"scenes": len(scenes)}
    for kind in KINDS:
        told = by_kind[kind]
        found[kind] = {
            "simulated": told["miou_baseline"],
            "engines": told["miou_quantized"],
            "agreement": told["agreement_iou"],
            "prompts": told["count"],
        }
    return found


def miou(predictor: Predictor, scenes: Sequence[Sample], processor: SamProcessor) -> dict[str, float]:
    """mIoU with the truth by prompt kind."""
    by_kind = summarize(evaluate(predictor, predictor, scenes, processor))["by_kind"]
    return {kind: by_kind[kind]["miou_baseline"] for kind in KINDS}
