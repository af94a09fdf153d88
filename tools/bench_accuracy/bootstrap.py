"""Confidence intervals of ratios of sums over scenes, by the bootstrap (Efron, Ann. Statist. 7, 1979).

The prompts of a scene share an image, so scenes are the independent observations: they are drawn with replacement, as
many as there are, and the interval holds the middle 95 % of the ratios that such draws have. The draws are the same
for all rows of a table, which makes differences between rows paired.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
RESAMPLES = 10_000
SEED = 0


@dataclass(frozen=True)
class Estimate:
    """A ratio with its confidence interval.

    Args:
        value: of all scenes.
        low, high: ends of the interval, equal to `value` for a single scene.
    """

    value: float
    low: float
    high: float


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Estimate:
    """Σ numerators / Σ denominators, one of each a scene.

    Args:
        numerators: e.g. the sum of a model's IoU over the prompts of a scene, or the difference of two models' sums.
        denominators: likewise of the float model, ≥ 0.

    Raises:
        ValueError: the lengths differ, or the denominators add up to nothing.
    """
    above, below = (np.asarray(values, np.float64) for values in (numerators, denominators))
    if above.shape != below.shape or below.sum() <= 0:
        raise ValueError(f"{above.shape} numerators, {below.shape} denominators that add up to {below.sum()}")
    draws = _draws(len(below))
    sums = draws @ below
    drawn = sums > 0  # a draw of nothing but scenes without prompts says nothing
    low, high = np.quantile((draws @ above)[drawn] / sums[drawn], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(above.sum() / below.sum()), float(low), float(high))


@cache
def _draws(scenes: int) -> NDArray[np.float64]:
    """[RESAMPLES, scenes] how often each scene is drawn."""
    random = np.random.RandomState(SEED)  # NumPy keeps its stream the same in all versions
    return random.multinomial(scenes, np.full(scenes, 1 / scenes), RESAMPLES).astype(np.float64)
