"""Latency of two engines, measured alternately so that both see the same machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from samq.engines.base import Arrays, Engine

WARM_UPS = 2
LEAST_PAIRS, MOST_PAIRS = 3, 50


def alternate(baseline: Engine, quantized: Engine, feeds: tuple[Arrays, Arrays], seconds: float) -> dict[str, Any]:
    """Median latency of both, in ms, and their ratio (above 1: the quantized one is faster).

    Args:
        feeds: inputs of the baseline and of the quantized engine.
        seconds: time budget for the measurement.
    """
    runs: tuple[Callable[[], object], ...] = (lambda: baseline.run(feeds[0]), lambda: quantized.run(feeds[1]))
    for _ in range(WARM_UPS):
        for run in runs:
            run()
    times: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + seconds
    while len(times[0]) < LEAST_PAIRS or (time.perf_counter() < end and len(times[0]) < MOST_PAIRS):
        for run, taken in zip(runs, times, strict=True):
            started = time.perf_counter()
            run()
            taken.append(1000 * (time.perf_counter() - started))
    before, after = statistics.median(times[0]), statistics.median(times[1])
    return {
        "baseline_ms": round(before, 3),
        "quantized_ms": round(after, 3),
        "speedup": round(before / after, 4),
        "runs": len(times[0]),
    }
