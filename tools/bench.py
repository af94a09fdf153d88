"""`samq-export bench`: speed, start and memory of a finished output directory's engines beside its baseline's."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median, median_low
from typing import Any

import numpy as np

from samq.calib.parts import IMAGE_ENCODER, MASK_DECODER
from samq.calib.prompts import clicks
from samq.engines.base import Arrays
from samq.engines.predictor import PADDING, Predictor, prompt_feeds
from samq.errors import UsageError
from samq.files import write_json
from samq.tools.alternation import beside, spread, time_in_turns
from samq.tools.engine_start import (
    ONNXRUNTIME,
    ONNXRUNTIME_CUDA,
    ONNXRUNTIME_ENGINE,
    TENSORRT,
    file_bytes,
    opener,
    start_engines,
)
from samq.tools.job import Job
from samq.tools.outdir import BENCH, OutputDir
from samq.tools.progress import Reporter
from samq.tools.report.environment import environment
from samq.tools.targets import BASELINE, ENGINES, OnnxRuntimeCpu, OnnxRuntimeCuda, Target, target_of

STARTS = 3
SIDES = ("baseline", "quantized")


@dataclass(frozen=True)
class _Engines:
    """Baseline and quantized engines of an output directory.

    Args:
        target: what they run on.
        files: side → encoder and decoder.
        threads: of ONNX Runtime on the CPU, 0 for its own choice.
    """

    target: Target
    files: Mapping[str, list[Path]]
    threads: int

    @staticmethod
    def of(out: OutputDir, threads: int) -> _Engines:
        """Those that `validate` measures.

        Raises:
            BadInput: they are not built, or were changed since.
            MachineLacks: they do not run here.
            UsageError: threads are chosen for a GPU.
        """
        out.require("build")
        target = target_of(Job.from_json(out.job))
        target.require()
        on_cpu = isinstance(target, OnnxRuntimeCpu)
        if threads and not on_cpu:
            raise UsageError(f"--threads is for ONNX Runtime on the CPU; {out.path} was built for {target.folder}")
        folder = out.path / ENGINES / target.folder
        baseline = out.path / "onnx" / "fp32" if on_cpu else folder / BASELINE
        return _Engines(target, {"baseline": target.files(baseline), "quantized": target.files(folder)}, threads)

    @property
    def on_cpu(self) -> bool:
        return isinstance(self.target, OnnxRuntimeCpu)

    def opener(self, side: str) -> str:
        """As `samq.tools.engine_start.opener` takes it."""
        if self.on_cpu:
            return ONNXRUNTIME_ENGINE if side == "quantized" else ONNXRUNTIME
        return ONNXRUNTIME_CUDA if isinstance(self.target, OnnxRuntimeCuda) else TENSORRT

    def open(self) -> list[Predictor]:
        """One predictor a side."""
        return [Predictor(*map(opener(self.opener(side), self.threads), self.files[side])) for side in SIDES]


def bench(out: OutputDir, reporter: Reporter, threads: int = 0, runs: int = 20) -> dict[str, Any]:
    """Measure the engines of a finished output directory, and write the figures to its `bench.json`.

    Encoder and decoder (one click on an encoded image) are run in turns with the baseline's, in one process; how they
    start, and the memory they take, is measured in fresh processes.

    Args:
        threads: of ONNX Runtime on the CPU, 0 for its own choice.
        runs: of each engine and part.

    Returns:
        what is written; `slower` is a line where the quantized engines are slower than the baseline, else None.

    Raises:
        BadInput: there are no finished engines.
        MachineLacks: they do not run here.
        UsageError: threads are chosen for a GPU.
    """
    engines = _Engines.of(out, threads)
    speed = _speed(engines.open(), runs, reporter)
    facts = {
        "engine": engines.target.folder,
        "baseline": engines.target.baseline,
        "threads": threads or None,
        "fingerprint": out.fingerprint,
        "command": shlex.join(reporter.command) if reporter.command else None,
        "environment": environment(),
    }
    sizes = {side: sum(map(file_bytes, engines.files[side])) for side in SIDES}
    found = {**facts, **speed, **_starts(engines, reporter), "file_bytes": sizes}
    found["slower"] = slower(found)
    write_json(out.path / BENCH, found)
    if found["slower"] is not None:
        reporter.warn(found["slower"])
    return found


def _speed(predictors: list[Predictor], runs: int, reporter: Reporter) -> dict[str, Any]:
    """Latency of both parts, and of one image with one click."""
    side = int(predictors[0].encoder.shapes["pixel_values"][-1])
    noise = np.random.default_rng(0).standard_normal((1, 3, side, side), dtype=np.float32)
    feeds: dict[str, list[Arrays]] = {IMAGE_ENCODER: [{"pixel_values": noise}] * len(SIDES), MASK_DECODER: []}
    for predictor in predictors:
        features = predictor.encode(noise[0])
        feeds[MASK_DECODER].append({**features, **_click(predictor, features, side)})
    parts: dict[str, Any] = {}
    for part, engines in (
        (IMAGE_ENCODER, [predictor.encoder for predictor in predictors]),
        (MASK_DECODER, [predictor.decoder for predictor in predictors]),
    ):
        with reporter.track(f"{part}, {runs} runs each", None) as step:
            times = time_in_turns(list(zip(engines, feeds[part], strict=True)), runs, step)
        parts[part] = {name: spread(taken) for name, taken in zip(SIDES, times, strict=True)}
        parts[part]["speedup"] = _ratio(*(parts[part][name]["median_ms"] for name in SIDES))
    before, after = (sum(parts[part][name]["median_ms"] for part in (IMAGE_ENCODER, MASK_DECODER)) for name in SIDES)
    return {"image_size": side, **parts, "image_and_click": beside(before, after)}


def _click(predictor: Predictor, features: Arrays, side: int) -> Arrays:
    """The decoder's inputs for one click; decoders of static shape get it filled up, as `Predictor` does."""
    click = clicks(np.full((1, 2), side / 2, np.float32))
    points = predictor.decoder.shapes["point_coords"][2]
    missing = points - 1 if isinstance(points, int) else 0
    coords = np.pad(click.coords, ((0, 0), (0, missing), (0, 0)))
    return prompt_feeds(features, coords, np.pad(click.labels, ((0, 0), (0, missing)), constant_values=PADDING))


def _starts(engines: _Engines, reporter: Reporter) -> dict[str, Any]:
    """What fresh processes take to load both parts and to answer the first click, in turns; the medians.

    Returns:
        `start`, milliseconds; `peak_bytes`, resident memory at its peak, None on a GPU and where it cannot be told.
    """
    taken: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    with reporter.track(f"start, {STARTS} processes each", STARTS * len(SIDES)) as step:
        for _ in range(STARTS):
            for side in SIDES:
                taken[side].append(start_engines(engines.opener(side), engines.files[side], engines.threads))
                step()
    found: dict[str, Any] = {
        side: {key: median(start[key] for start in starts) for key in ("load_ms", "first_ms")}
        for side, starts in taken.items()
    }
    found["speedup"] = _ratio(*(sum(found[side].values()) for side in SIDES))
    peaks = {side: [start["peak_bytes"] for start in starts] for side, starts in taken.items()}
    told = engines.on_cpu and not any(None in of for of in peaks.values())
    return {"start": found, "peak_bytes": {side: median_low(of) if told else None for side, of in peaks.items()}}


def slower(found: Mapping[str, Any]) -> str | None:
    """The line for engines that are slower than their baseline; a difference that two digits do not show is none."""
    together = found["image_and_click"]
    if round(together["speedup"], 2) >= 1:
        return None
    return (
        f"slower than the baseline on this machine: {together['quantized_ms']:g} ms for an image and a click against "
        f"{together['baseline_ms']:g} ms ({together['speedup']:.2f}×, baseline {found['baseline']})"
    )


def as_text(found: Mapping[str, Any]) -> str:
    """The figures as a table for a terminal."""
    rows: list[tuple[str, ...]] = [("", *SIDES, "ratio")]
    for title, part in (("encoder", IMAGE_ENCODER), ("click", MASK_DECODER)):
        figures = found[part]
        spreads = [f"{s['median_ms']:.1f} ({s['p10_ms']:.1f}–{s['p90_ms']:.1f}) ms" for s in map(figures.get, SIDES)]
        rows.append((title, *spreads, f"{figures['speedup']:.2f}×"))
    start = found["start"]
    starts = [f"{start[side]['load_ms']:.0f} + {start[side]['first_ms']:.0f} ms" for side in SIDES]
    rows.append(("load + first click", *starts, f"{start['speedup']:.2f}×"))
    for title, key in (("peak memory", "peak_bytes"), ("files", "file_bytes")):
        sizes = [found[key][side] for side in SIDES]
        if None not in sizes:
            rows.append((title, *(f"{size / 1e6:.1f} MB" for size in sizes), f"{sizes[1] / sizes[0]:.2f}"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    threads = f"{found['threads']} threads" if found["threads"] else "threads as the runtime chooses"
    lines.append(
        f"median (10–90 %) of {found[IMAGE_ENCODER]['baseline']['runs']} runs each, in turns; {found['engine']}, "
        f"{threads}; baseline: {found['baseline']}"
    )
    return "\n".join(lines)


def _ratio(before: float, after: float) -> float:
    return round(before / after, 4)
