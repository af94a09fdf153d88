"""Measuring: speed in turns in one process, starts in fresh ones, masks on held-out scenes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from samq.calib.parts import IMAGE_ENCODER, MASK_DECODER
from samq.calib.prompts import clicks
from samq.engines.base import Arrays, Engine
from samq.engines.onnxruntime import OnnxRuntimeEngine
from samq.engines.predictor import Predictor, prompt_feeds
from samq.tools.alternation import spread, time_in_turns
from samq.tools.bench_embedded.rows import DECODERS, FP32, ROWS, Row
from samq.tools.bench_embedded.subject import Graphs
from samq.tools.engine_start import file_bytes, opener, start_engines
from samq.tools.evaluate import evaluate, summarize
from samq.tools.progress import Reporter

STARTS = 2
CLICKS_A_RUN = 4  # runs of a decoder for each of an encoder

Figures = dict[str, Any]


def speed(graphs: Graphs, rows: Sequence[Row], runs: int, threads: int, reporter: Reporter) -> dict[str, Figures]:
    """Latency of every row's encoder, and what it takes to start; where a row does not run, `reason` says why."""
    found: dict[str, Figures] = {}
    engines: dict[str, Engine] = {}
    paths: dict[str, Path] = {}
    for row in rows:
        with reporter.track(row.title, None):
            try:
                paths[row.key] = row.make(graphs)
                engines[row.key] = opener(row.engine, threads)(paths[row.key])
            except Exception as error:  # a peer's own, whatever it is: its message is the row
                if not row.peer:
                    raise
                found[row.key] = {"reason": _line(error)}
    image = graphs.subject.pixels(1)
    with reporter.track(f"{len(engines)} encoders in turns, {runs} runs each", None) as step:
        times = time_in_turns([(engine, {"pixel_values": image}) for engine in engines.values()], runs, step)
    for key, taken in zip(engines, times, strict=True):
        found[key] = {**spread(taken), "file_bytes": file_bytes(paths[key])}
    features = engines[FP32].run({"pixel_values": image})
    engines.clear()
    with reporter.track(f"starts, {STARTS} processes each", None):
        starts: dict[str, list[Figures]] = {key: [] for key in paths if "reason" not in found[key]}
        for _ in range(STARTS):
            for key, taken_by in starts.items():
                taken_by.append(start_engines(ROWS[key].engine, [paths[key]], threads))
    for key, several in starts.items():
        found[key]["start_ms"] = round(min(start["load_ms"] + start["first_ms"] for start in several), 3)
        found[key]["peak_bytes"] = several[0]["peak_bytes"]
    decoders = _decoders(graphs, features, CLICKS_A_RUN * runs, threads, reporter)
    return {IMAGE_ENCODER: found, MASK_DECODER: decoders}


def _decoders(graphs: Graphs, features: Arrays, runs: int, threads: int, reporter: Reporter) -> dict[str, Figures]:
    """Latency of one click on an encoded image."""
    side = graphs.subject.model.config.prompt_encoder_config.image_size  # type: ignore[union-attr]
    click = clicks(np.full((1, 2), side / 2, np.float32))
    feeds = {**features, **prompt_feeds(features, click.coords, click.labels)}
    engines = [(OnnxRuntimeEngine(ROWS[key].decoder(graphs), threads), feeds) for key in DECODERS]
    with reporter.track(f"{len(engines)} decoders in turns, {runs} runs each", None) as step:
        times = time_in_turns(engines, runs, step)
    return {key: spread(taken) for key, taken in zip(DECODERS, times, strict=True)}


def masks(graphs: Graphs, rows: Sequence[Row], scenes: int, threads: int, reporter: Reporter) -> dict[str, Figures]:
    """Masks of every row on held-out scenes, beside the truth and beside those of FP32."""
    exact = _predictor(graphs, ROWS[FP32], threads)
    held_out, processor = graphs.subject.scenes(scenes), graphs.subject.processor
    found: dict[str, Figures] = {}
    for row in rows:
        with reporter.track(f"masks: {row.title}", None):
            try:
                records = evaluate(exact, _predictor(graphs, row, threads), held_out, processor)
            except Exception as error:  # as in `speed`
                if not row.peer:
                    raise
                found[row.key] = {"reason": _line(error)}
                continue
        found[row.key] = {kind: _kept(told) for kind, told in summarize(records)["by_kind"].items()}
    return found


def _predictor(graphs: Graphs, row: Row, threads: int) -> Predictor:
    decoder = OnnxRuntimeEngine(row.decoder(graphs), threads)
    return Predictor(opener(row.engine, threads)(row.make(graphs)), decoder)


def _kept(told: Mapping[str, Any]) -> Figures:
    return {key: told[key] for key in ("miou_baseline", "miou_quantized", "miou_relative", "agreement_iou", "count")}


def _line(error: Exception) -> str:
    """An error's class and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
