"""Measuring one configuration for a search: it is really quantized, and its simulation's masks are compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samq.tools.evaluate import Record, summarize


@dataclass(frozen=True)
class Accuracy:
    """How near a configuration's masks come to what they should be.

    Args:
        miou_relative: mIoU / the float model's mIoU; without annotations, the agreement.
        standard_error: of `miou_relative`, images being the independent observations; None of one image.
        agreement: mean IoU of its masks with the float model's.
    """

    miou_relative: float
    standard_error: float | None
    agreement: float


def accuracy_of(records: list[Record]) -> Accuracy:
    """The accuracy that one record a prompt tells; there is one at least."""
    summary = summarize(records)
    if summary["miou_relative"] is None:
        found, expected = np.array([record.agreement for record in records]), np.ones(len(records))
    else:
        annotated = [record for record in records if record.iou_baseline is not None]
        records = annotated
        found = np.array([record.iou_quantized for record in annotated])
        expected = np.array([record.iou_baseline for record in annotated])
    ratio = float(found.sum() / expected.sum())
    error = _error_of_ratio(found, expected, [record.image for record in records])
    return Accuracy(ratio, error, float(summary["agreement_iou"]))


def _error_of_ratio(found: NDArray[Any], expected: NDArray[Any], images: Sequence[str]) -> float | None:
    """Standard error of Σ found / Σ expected, linearized, with prompts of one image as one observation."""
    residuals = found - found.sum() / expected.sum() * expected
    _, index = np.unique(np.array(images), return_inverse=True)
    of_images = np.bincount(index, residuals)
    count = len(of_images)
    if count < 2:
        return None
    return float(np.sqrt(count / (count - 1) * np.square(of_images).sum()) / expected.sum())
