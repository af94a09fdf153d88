"""Engines timed in turns in one process, so that all of them see the same machine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import numpy as np

from samq.engines.base import Arrays, Engine, TimedEngine

WARM_UPS = 2


def time_in_turns(
    engines: Sequence[tuple[Engine, Arrays]],
    runs: int,
    step: Callable[[], None] = lambda: None,
    *,
    least: int = 1,
    seconds: float = math.inf,
    at_once: int = 1,
) -> list[list[float]]:
    """Milliseconds of each engine's runs: a run of each, then the next one of each, after `WARM_UPS` such turns.

    Args:
        engines: each with what it is fed.
        runs: of each engine, warm-ups not counted.
        step: called after each turn.
        least: runs of each engine, however long they take.
        seconds: after which no further turn begins, warm-ups not counted.
        at_once: runs in a turn of an engine that has a clock of its own.
    """
    for _ in range(WARM_UPS):
        _turn(engines, at_once)
        step()
    times: list[list[float]] = [[] for _ in engines]
    done, end = 0, time.perf_counter() + seconds
    while done < runs and (done < least or time.perf_counter() < end):
        for taken, milliseconds in zip(times, _turn(engines, at_once), strict=True):
            taken += milliseconds
        done = min(map(len, times), default=runs)
        step()
    return times


def spread(times: Sequence[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile and minimum of some milliseconds, and how many they are."""
    figures = {"median_ms": np.median(times), "p10_ms": np.quantile(times, 0.1), "p90_ms": np.quantile(times, 0.9)}
    figures["min_ms"] = np.min(times)
    return {name: round(float(value), 3) for name, value in figures.items()} | {"runs": len(times)}


def beside(baseline_ms: float, quantized_ms: float) -> dict[str, float]:
    """Two latencies and their ratio (above 1: the quantized engine is faster)."""
    return {
        "baseline_ms": round(baseline_ms, 3),
        "quantized_ms": round(quantized_ms, 3),
        "speedup": round(baseline_ms / quantized_ms, 4),
    }


def _turn(engines: Sequence[tuple[Engine, Arrays]], at_once: int) -> list[list[float]]:
    return [_milliseconds(engine, feeds, at_once) for engine, feeds in engines]


def _milliseconds(engine: Engine, feeds: Arrays, at_once: int) -> list[float]:
    """Of a few runs on the engine's own clock, where it has one, else of one run on the host's."""
    if isinstance(engine, TimedEngine):
        return engine.time(feeds, at_once)
    started = time.perf_counter()
    engine.run(feeds)
    return [1000 * (time.perf_counter() - started)]
