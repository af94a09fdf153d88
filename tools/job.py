"""A job: what was asked for, and the fingerprint by which its results are known again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

import samq
from samq.calib.parts import PARTS
from samq.calib.sources import ImageSource, absolute, open_source, split
from samq.errors import BadInput, UsageError
from samq.export.lower_tensorrt import Branch
from samq.export.trace import ANY_PROMPTS, ANY_SHAPE, StaticShape
from samq.quant.config import Recipe
from samq.tools.demo.dataset import CHECKPOINT, HELD_OUT

NO_PLACEMENT, SHIPPED = "none", "shipped"
REFIT = "refit"
STATIC, ONE_IMAGE, DYNAMIC = "static shapes", "one image and any prompts", "dynamic shapes"
SHAPES: Mapping[str, StaticShape] = {STATIC: StaticShape(), ONE_IMAGE: ANY_PROMPTS, DYNAMIC: ANY_SHAPE}
CODE = ("calib", "quant", "export")  # packages whose code decides the weights and the ONNX files
# Calibration images kept back for evaluation. Constants, so that a later `validate` finds the same split.
MOST_SET_ASIDE = 32
LARGEST_SHARE_SET_ASIDE = 0.2


@dataclass(frozen=True)
class Job:
    """Everything that the command line says about the model and its data.

    Args:
        model: local directory or hub id.
        calib_data: source of calibration images (see `samq.calib.sources`), or None.
        eval_data: source of evaluation images, or None for the default.
        num_eval_samples: images to evaluate on.
        engine: name of the engine.
        target: a TensorRT target, or None for the version at hand.
        low_rank: what becomes of low-rank branches in a TensorRT engine, "branch", "fold", or "auto" for the faster one
            that is accurate enough.
        placement: file that says which layers run in INT8 on TensorRT, "none" for all of them, or "shipped" or None for
            the one that samq ships for the GPU at hand.
        build_options: what differs from the defaults of `samq.engines.tensorrt_plan.BuildOptions`; or "refit", the
            output directory of another job, whose TensorRT plans get this job's weights.
        device: "cpu" or "cuda", for calibration, quantization and ONNX Runtime.
        seed: of every random choice.
        parts: parts to quantize.
        image_size: side of the model's input in pixels, None for the checkpoint's.
        static_shapes: export with one image, one prompt and two points (True), with dynamic numbers (False), or as it
            suits the engine (None).
        allow_pickle: accept a pickled checkpoint.
    """

    model: str
    calib_data: str | None = None
    eval_data: str | None = None
    num_eval_samples: int = 32
    engine: str = "onnxruntime"
    target: str | None = None
    low_rank: Branch | Literal["auto"] = "branch"
    placement: str | None = None
    build_options: dict[str, Any] = field(default_factory=dict)
    device: str = "cpu"
    seed: int = 0
    parts: tuple[str, ...] = PARTS
    image_size: int | None = None
    static_shapes: bool | None = None
    allow_pickle: bool = False

    @staticmethod
    def of(recipe: Recipe, **fields: Any) -> Job:
        """A job with its paths in full, for later stages may be run from elsewhere. Fields that are None are defaults.

        Args:
            recipe: its `calib.path` serves where no `calib_data` is given.
        """
        given = {name: value for name, value in fields.items() if value is not None}
        given.setdefault("calib_data", recipe.calib.path)
        for name in ("calib_data", "eval_data"):
            if given.get(name) is not None:
                given[name] = absolute(given[name])
        model = Path(given["model"]).expanduser()
        return Job(**(given | ({"model": str(model.resolve())} if model.exists() else {})))

    def as_json(self) -> dict[str, Any]:
        """The job as JSON values; `from_json` reads it back."""
        return asdict(self)

    @staticmethod
    def from_json(values: dict[str, Any]) -> Job:
        """Inverse of `as_json`.

        Raises:
            BadInput: another version of samq wrote them.
        """
        wrong = ", ".join(sorted(values.keys() ^ set(FIELDS)))
        try:
            if not wrong:
                return TypeAdapter(Job).validate_python(values)
        except ValidationError as error:
            wrong = f"{'.'.join(map(str, error.errors()[0]['loc']))}: {error.errors()[0]['msg']}"
        raise BadInput(
            f"the manifest's job is of another version of samq, or damaged ({wrong}); run again with --force"
        )

    @property
    def shapes(self) -> str:
        """Name of what is exported, of `SHAPES`.

        TensorRT optimizes an image encoder of static shape best, and on a GPU that of ONNX Runtime too is recorded as a
        CUDA graph. A mask decoder that takes any prompts costs little, and one of static shape changes the answers to
        clicks, which it gets filled up (`samq.engines.predictor`). ONNX Runtime on the CPU does not care.
        """
        if self.static_shapes is None:
            on_gpu = self.engine == "tensorrt" or self.target is not None or self.device == "cuda"
            return ONE_IMAGE if on_gpu else DYNAMIC
        return STATIC if self.static_shapes else DYNAMIC

    @property
    def is_demo(self) -> bool:
        """The job is about the shipped demo model."""
        return Path(self.model).resolve() == CHECKPOINT.resolve()


FIELDS = tuple(entry.name for entry in fields(Job))


@dataclass(frozen=True)
class Data:
    """Images to calibrate on and to evaluate on; None where there are none.

    Args:
        origin: where the evaluation images come from, for the report.
    """

    calibration: ImageSource | None
    evaluation: ImageSource | None
    origin: str

    @cached_property
    def calibration_fingerprint(self) -> str | None:
        """Fingerprint of the calibration images; it reads some of every file, so once is enough."""
        return None if self.calibration is None else self.calibration.fingerprint()


def open_data(job: Job, recipe: Recipe) -> Data:
    """Decide which images serve for what.

    Some of the calibration images are set aside; without `eval_data`, a model is evaluated on them. The demo model has
    held-out scenes instead.

    Raises:
        UsageError: the recipe needs calibration images and none are given.
        BadInput: a source cannot be opened.
    """
    if recipe.needs_calibration and job.calib_data is None:
        raise UsageError("this config needs calibration images; give a folder of photos as --calib-data")
    calibration, aside, origin = None, None, "none: give --eval-data"
    if job.calib_data is not None:
        calibration, aside, origin = _divided(open_source(job.calib_data), recipe, job)
    separate = _separate_evaluation(job)
    return Data(calibration, aside, origin) if separate is None else replace(separate, calibration=calibration)


def open_evaluation(job: Job, recipe: Recipe, calibrated_on: str | None) -> Data:
    """The evaluation images of a job that was quantized before.

    Args:
        calibrated_on: fingerprint of the calibration images, from the manifest.

    Raises:
        BadInput: a source cannot be opened, or images were added or removed, so that no one can tell any more which of
            them were calibrated on.
    """
    separate = _separate_evaluation(job)
    if separate is not None:
        return separate
    data = open_data(job, recipe)
    if data.calibration_fingerprint not in (None, calibrated_on):
        raise BadInput(f"{job.calib_data} was changed since `quantize`; give --eval-data, or run again with --force")
    return data


def _separate_evaluation(job: Job) -> Data | None:
    """Evaluation images that have nothing to do with the calibration images, where there are such."""
    if job.eval_data is not None:
        evaluation = open_source(job.eval_data)
        same = ", which were calibrated on as well" if job.eval_data == job.calib_data else ""
        return Data(None, evaluation, f"--eval-data: {evaluation.description}{same}")
    if job.is_demo:
        return Data(None, open_source(HELD_OUT), "held-out scenes of the demo model")
    return None


def _divided(source: ImageSource, recipe: Recipe, job: Job) -> tuple[ImageSource | None, ImageSource | None, str]:
    """Images of one source to calibrate on, others to evaluate on, and where the latter come from.

    The same whatever is evaluated on, so that `quantize` alone and `run` calibrate alike.
    """
    if not recipe.needs_calibration:
        return None, source, f"--calib-data, which this config did not calibrate on: {source.description}"
    aside = min(MOST_SET_ASIDE, int(len(source) * LARGEST_SHARE_SET_ASIDE))
    if job.is_demo or aside == 0:
        return source, None, f"none: {source.description} is too small to set images aside; give --eval-data"
    kept, evaluation = split(source, aside, job.seed)
    return kept, evaluation, f"{aside} images set aside from {source.description}, not calibrated on"


def fingerprint(job: Job, recipe: Recipe, checkpoint_fingerprint: str, data: Data) -> str:
    """Hex digest of what decides the weights; the manifest keeps each stage's own options beside the stage."""
    decisive = {
        "recipe": recipe.to_yaml(),
        "checkpoint": checkpoint_fingerprint,
        "calibration": data.calibration_fingerprint,
        "seed": job.seed,
        "parts": job.parts,
        "image_size": job.image_size,
        "version": samq.__version__,
        "code": _code_digest(),
    }
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def _code_digest() -> str:
    digest = hashlib.sha256()
    root = Path(samq.__file__).parent
    for package in CODE:
        for path in sorted((root / package).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()
