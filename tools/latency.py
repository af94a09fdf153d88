"""Latency of the quantized engines against the baseline's, alternately, so that both see the same machine."""

from __future__ import annotations

from statistics import median
from typing import Any

import numpy as np

from samq.calib.parts import IMAGE_ENCODER, MASK_DECODER
from samq.calib.prompts import boxes
from samq.engines.base import Arrays, Engine
from samq.engines.predictor import Predictor, prompt_feeds
from samq.tools.alternation import beside, time_in_turns

SECONDS = {IMAGE_ENCODER: 10.0, MASK_DECODER: 2.5}
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
    return {**beside(before, after), IMAGE_ENCODER: encoder, MASK_DECODER: decoder}


def alternate(baseline: Engine, quantized: Engine, feeds: tuple[Arrays, Arrays], seconds: float) -> dict[str, Any]:
    """Median latency of both, in ms, and their ratio (above 1: the quantized one is faster).

    Args:
        feeds: inputs of the baseline and of the quantized engine.
        seconds: time budget for the measurement.
    """
    engines = list(zip((baseline, quantized), feeds, strict=True))
    times = time_in_turns(engines, MOST_PAIRS, least=LEAST_PAIRS, seconds=seconds, at_once=RUNS_AT_ONCE)
    return {**beside(*map(median, times)), "runs": len(times[0])}
