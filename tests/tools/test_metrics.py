"""Distances between arrays."""

from __future__ import annotations

import numpy as np
import pytest

from samq.tools.metrics import likeness


def test_likeness_is_that_of_the_definition() -> None:
    expected = np.array([[3.0, 4.0]], np.float32)
    assert likeness(expected, expected) == {"relative_error": 0.0, "cosine": pytest.approx(1.0)}
    turned = likeness(np.array([[-4.0, 3.0]], np.float16), expected)
    assert turned == {"relative_error": pytest.approx(2**0.5), "cosine": pytest.approx(0.0)}
    nothing = likeness(np.zeros((1, 2)), expected)
    assert nothing == {"relative_error": 1.0, "cosine": 0.0}
    assert likeness(np.array([[np.inf, 0.0]]), expected) == {"relative_error": None, "cosine": None}
