"""Engines timed in turns in one process, so that all of them see the same machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from samq.engines.base import Arrays, Engine, TimedEngine

WARM_UPS = 2


def time_in_turns(
    engines: Sequence[tuple[Engine, Arrays]], runs: int, step: Callable[[], None] = lambda: None
) -> list[list[float]]:
    """Milliseconds of `runs` runs of each engine: one run of each, then the next one of each, after `WARM_UPS`.

    Args:
        engines: each with what it is fed.
        runs: of each engine, warm-ups not counted.
        step: called after each turn.
    """
    times: list[list[float]] = [[] for _ in engines]
    for turn in range(WARM_UPS + runs):
        for (engine, feeds), taken in zip(engines, times, strict=True):
            milliseconds = _milliseconds(engine, feeds)
            if turn >= WARM_UPS:
                taken.append(milliseconds)
        step()
    return times


def spread(times: Sequence[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile and minimum of some milliseconds, and how many they are."""
    figures = {"median_ms": np.median(times), "p10_ms": np.quantile(times, 0.1), "p90_ms": np.quantile(times, 0.9)}
    figures["min_ms"] = np.min(times)
    return {name: round(float(value), 3) for name, value in figures.items()} | {"runs": len(times)}


def _milliseconds(engine: Engine, feeds: Arrays) -> float:
    """Of one run, on the engine's own clock where it has one, else on the host's."""
    if isinstance(engine, TimedEngine):
        return engine.time(feeds, 1)[0]
    started = time.perf_counter()
    engine.run(feeds)
    return 1000 * (time.perf_counter() - started)
