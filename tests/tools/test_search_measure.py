"""The accuracy that records tell."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from samq.tools.evaluate import Record
from samq.tools.search_measure import accuracy_of

RECORD = Record("a", "box", [0.0], 9, 0.1, 0.8, 0.8, 1.0, 0.9, 0.9)


def test_the_ratio_and_its_error_are_those_of_the_images() -> None:
    random = np.random.default_rng(0)
    before, changes = random.uniform(0.5, 1, 400), random.normal(0, 0.05, 100)
    found = before + np.repeat(changes, 4)  # prompts of one image move together
    records = [
        replace(RECORD, image=str(index // 4), iou_baseline=float(b), iou_quantized=float(f), agreement=0.9)
        for index, (b, f) in enumerate(zip(before, found, strict=True))
    ]
    accuracy = accuracy_of(records)
    assert accuracy.miou_relative == pytest.approx(found.sum() / before.sum())
    assert accuracy.agreement == pytest.approx(0.9)
    resampled = []
    for _ in range(2000):
        images = random.integers(100, size=100)
        chosen = (4 * images[:, None] + np.arange(4)).ravel()
        resampled.append(found[chosen].sum() / before[chosen].sum())
    assert accuracy.standard_error == pytest.approx(float(np.std(resampled)), rel=0.1)


def test_without_annotations_the_agreement_counts() -> None:
    records = [
        replace(RECORD, image=name, area=None, iou_baseline=None, iou_quantized=None, agreement=value)
        for name, value in (("a", 1.0), ("b", 0.9))
    ]
    accuracy = accuracy_of(records)
    assert accuracy.miou_relative == accuracy.agreement == pytest.approx(0.95)
    assert accuracy.standard_error == pytest.approx(0.05)


def test_one_image_tells_no_error() -> None:
    assert accuracy_of([RECORD, RECORD]).standard_error is None
