"""Latency of the quantized engines against the baseline's, alternately, so that both see the same machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from samq.calib.parts import IMAGE_ENCODER, MASK_DECODER
from samq.calib.prompts import boxes
from samq.engines.base import Arrays, Engine, TimedEngine
from samq.engines.predictor import Predictor, prompt_feeds

SECONDS = {IMAGE_ENCODER: 10.0, MASK_DECODER: 2.5}
WARM_UPS = 2
LEAST_PAIRS, MOST_PAIRS = 3, 50
RUNS_AT_ONCE = 10  # of an engine with a clock of its own


def measure_latency(baseline: Predictor, quantized: Predictor, image_size: int) -> dict[str, Any]:
    """Encoder and decoder (one box) apart, and together as one image with one prompt.

    Args:
        image_size: side of the encoder's input, in pixels.
    """
    noise = np.random.default_rng(0).standard_normal((1, 3, image_size, image_size), dtype=np.float32)
    pixels = {"pixel_values": noise}
    features = [predictor.encode(noise[0]) for predictor in (baseline, quantized)]
    prompt = boxes(np.array([[0.25, 0.25, 0.75, 0.75]], np.float32) * image_size)
    prompted = [{**seen, **prompt_feeds(seen, prompt.coords, prompt.labels)} for seen in features]
    encoder = alternate(baseline.encoder, quantized.encoder, (pixels, pixels), SECONDS[IMAGE_ENCODER])
    decoder = alternate(baseline.decoder, quantized.decoder, (prompted[0], prompted[1]), SECONDS[MASK_DECODER])
    before, after = (encoder[key] + decoder[key] for key in ("baseline_ms", "quantized_ms"))
    return {
        "baseline_ms": round(before, 3),
        "quantized_ms": round(after, 3),
        "speedup": round(before / after, 4),
        IMAGE_ENCODER: encoder,
        MASK_DECODER: decoder,
    }


def alternate(baseline: Engine, quantized: Engine, feeds: tuple[Arrays, Arrays], seconds: float) -> dict[str, Any]:
    """Median latency of both, in ms, and their ratio (above 1: the quantized one is faster).

    Args:
        feeds: inputs of the baseline and of the quantized engine.
        seconds: time budget for the measurement.
    """
    timers = [_timer(engine, fed) for engine, fed in zip((baseline, quantized), feeds, strict=True)]
    for _ in range(WARM_UPS):
        for timer in timers:
            timer()
    times: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + seconds
    while len(times[0]) < LEAST_PAIRS or (time.perf_counter() < end and len(times[0]) < MOST_PAIRS):
        for timer, taken in zip(timers, times, strict=True):
            taken += timer()
    before, after = statistics.median(times[0]), statistics.median(times[1])
    return {
        "baseline_ms": round(before, 3),
        "quantized_ms": round(after, 3),
        "speedup": round(before / after, 4),
        "runs": len(times[0]),
    }


def _timer(engine: Engine, feeds: Arrays) -> Callable[[], list[float]]:
    """Milliseconds of a few runs on the engine's own clock, where it has one, else of one run on the host's."""
    if isinstance(engine, TimedEngine):
        return partial(engine.time, feeds, RUNS_AT_ONCE)

    def by_the_host() -> list[float]:
        started = time.perf_counter()
        engine.run(feeds)
        return [1000 * (time.perf_counter() - started)]

    return by_the_host
