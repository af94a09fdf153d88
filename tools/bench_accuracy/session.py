"""Measuring rows: both models and their scenes once, then row after row."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import torch

from samq.calib.checkpoint import Checkpoint, load_checkpoint
from samq.calib.sources import Sample, open_source, take
from samq.engines.predictor import Predictor
from samq.errors import MachineLacks
from samq.tools.bench_accuracy.method import DEMO, HOSTILE, OURS, Made, Method, Subject
from samq.tools.bench_accuracy.record import FP32, PHOTOS, Record
from samq.tools.bench_accuracy.rows import code_digest, version_of
from samq.tools.bench_accuracy.scenes import MEASURES, Masks, PackedMasks, Scene, masks_of, read_scenes, score
from samq.tools.demo.dataset import CHECKPOINT, HELD_OUT, IMAGES
from samq.tools.demo.hostile import make_hostile
from samq.tools.evaluate import evaluate, summarize
from samq.tools.quiet import quiet
from samq.tools.simulation import torch_predictor

LONGEST_REASON = 200  # characters of a peer's message


@dataclass(frozen=True)
class Settings:
    """What is measured, how.

    Args:
        scenes: held-out scenes.
        calibration: images.
        photos: a folder of images, on which agreement with the float model is measured, or None.
        redo: measure again what is measured.
    """

    scenes: int
    calibration: int
    photos: Path | None
    redo: bool


class Session:
    """Measures what a record lacks; models and scenes are read when they are needed."""

    def __init__(self, record: Record, settings: Settings) -> None:
        self._record, self._settings = record, settings
        self._baselines: dict[str, PackedMasks] = {}

    def measure(self, models: Sequence[str], methods: Sequence[Method]) -> None:
        """Measure methods, each for all models, before the next.

        Raises:
            SamqError: the record cannot be written, or a method of ours fails.
        """
        for model in models:
            code = self._with_settings(code_digest(None, None))
            if self._is_due(model, FP32, code):
                self._put(model, FP32, code, time.monotonic(), self._scored(self._subjects[model], None))
        for method, model in product(methods, models):
            self._row(model, method)

    def _row(self, model: str, method: Method) -> None:
        started = time.monotonic()
        try:
            peer = None if method.who == OURS else version_of(method.who)
        except MachineLacks as error:
            code = self._with_settings(code_digest(method, None))
            self._put(model, method.key, code, started, {"reason": str(error), "lacks": True})
            return
        code = self._with_settings(code_digest(method, peer))
        if not self._is_due(model, method.key, code):
            return
        subject = self._subjects[model]
        figures = self._scored(subject, method.make(subject)) if peer is None else self._of_peer(subject, method)
        self._put(model, method.key, code, started, {"version": peer, **figures})

    def _of_peer(self, subject: Subject, method: Method) -> dict[str, Any]:
        """Figures of a peer's row, or why there are none: whatever a peer raises is its entry."""
        try:
            with quiet():
                return self._scored(subject, method.make(subject))
        except Exception as error:
            return {"reason": reason_of(error)}

    def _scored(self, subject: Subject, made: Made | None) -> dict[str, Any]:
        """Figures of a quantized model, or of the float one."""
        baseline, figures = self._baseline(subject.name), dict[str, Any]()
        if made is None:
            answers: Iterable[Masks] = baseline
        else:
            predictor = torch_predictor(made.model)
            answers = (masks_of(predictor, scene) for scene in self._scenes)
            figures = {"bits": round(made.bits, 4), "note": made.note} | self._on_photos(subject, predictor)
        sums = score(answers, baseline, self._scenes)
        return figures | {measure: [round(value, 6) for value in values] for measure, values in sums.items()}

    def _on_photos(self, subject: Subject, predictor: Predictor) -> dict[str, float]:
        if not self._photos:
            return {}
        records = evaluate(torch_predictor(subject.model), predictor, self._photos, self._checkpoint.processor)
        return {PHOTOS: round(summarize(records)["agreement_iou"], 6)}

    def _baseline(self, model: str) -> PackedMasks:
        """The float model's answers."""
        if model not in self._baselines:
            predictor = torch_predictor(self._subjects[model].model)
            self._baselines[model] = PackedMasks(masks_of(predictor, scene) for scene in self._scenes)
        return self._baselines[model]

    def _is_due(self, model: str, method: str, code: str) -> bool:
        if self._settings.redo or self._record.is_due(model, method, code, self._settings.scenes):
            return True
        figures = self._record.figures(model, method) or {}
        return self._settings.photos is not None and method != FP32 and not {PHOTOS, "reason"} & figures.keys()

    def _put(self, model: str, method: str, code: str, started: float, figures: dict[str, Any]) -> None:
        seconds = round(time.monotonic() - started, 1)
        kept = {"code": code, "scenes": self._settings.scenes, "seconds": seconds, **figures}
        self._record.put(model, method, kept)
        told = figures.get("reason") or ", ".join(f"{what} {sum(figures[what]):.3f}" for what in MEASURES)
        print(f"{model + '/' + method:<40} {told} ({seconds:.0f} s)", flush=True)

    def _with_settings(self, code: str) -> str:
        return f"{code}-{self._settings.calibration}"

    @cached_property
    def _checkpoint(self) -> Checkpoint:
        return load_checkpoint(str(CHECKPOINT))

    @cached_property
    def _subjects(self) -> dict[str, Subject]:
        images = take(open_source(IMAGES), self._settings.calibration)
        processor = self._checkpoint.processor
        pixels = [torch.from_numpy(processor(sample.image).pixel_values)[None] for sample in images]
        models = {DEMO: self._checkpoint.model, HOSTILE: make_hostile(self._checkpoint.model)}
        return {name: Subject(name, model, pixels) for name, model in models.items()}

    @cached_property
    def _scenes(self) -> list[Scene]:
        return read_scenes(open_source(HELD_OUT), self._checkpoint.processor, self._settings.scenes)

    @cached_property
    def _photos(self) -> list[Sample]:
        folder = self._settings.photos
        return [] if folder is None else list(take(open_source(folder), None))


def reason_of(error: Exception) -> str:
    """What a peer says, as one line."""
    words = " ".join(str(error).split())
    text = f"{type(error).__name__}: {words}" if words else type(error).__name__
    return text if len(text) <= LONGEST_REASON else f"{text[: LONGEST_REASON - 1]}…"
