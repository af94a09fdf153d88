"""The stages of the main job. Each goes on from what the ones before it left in the output directory."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor
from transformers import Sam2Model

from samq.calib.checkpoint import Checkpoint, load_checkpoint
from samq.calib.parts import IMAGE_ENCODER, MASK_DECODER, PARTS
from samq.calib.processor import SamProcessor
from samq.calib.prompting import boxes
from samq.calib.sources import take
from samq.engines.onnxruntime import OnnxRuntimeEngine, executed_layers
from samq.engines.predictor import Predictor, prompt_feeds
from samq.errors import AccuracyGateMissed, BadInput, SpeedGateMissed, UsageError
from samq.export.lower_onnxruntime import lower_for_onnxruntime
from samq.export.parts import float_part, quantized_part, save_part
from samq.export.trace import StaticShape, trace
from samq.files import write_json, write_text
from samq.quant.config import Recipe, load_recipe
from samq.quant.folds import Folds
from samq.quant.plan import describe_request, make_plan
from samq.quant.quantize import Quantized, quantize
from samq.quant.storage import load_quantized, save_quantized
from samq.tools.evaluate import as_json, evaluate, summarize
from samq.tools.job import Data, Job, fingerprint, open_data
from samq.tools.latency import alternate
from samq.tools.outdir import OutputDir
from samq.tools.progress import Reporter
from samq.tools.report import build_report, to_markdown
from samq.tools.sqnr import layer_sqnr

LATENCY_SECONDS = 10.0
SQNR_IMAGES = 4


def recipe_of(config: str, num_samples: int | None) -> Recipe:
    """The recipe of a preset or file, with the command line's number of images."""
    recipe = load_recipe(config)
    if num_samples is None:
        return recipe
    values = recipe.model_dump()
    values["calib"]["num_samples"] = num_samples
    return Recipe.model_validate(values)


def claim(path: Path, job: Job, recipe: Recipe, checkpoint: Checkpoint, data: Data, force: bool) -> OutputDir:
    """The output directory of this job, new or found again."""
    return OutputDir.claim(path, job.as_json(), fingerprint(job, recipe, checkpoint.fingerprint, data), force)


def run_stages(
    out: OutputDir,
    job: Job,
    recipe: Recipe,
    stages: Sequence[str],
    gates: tuple[float | None, float | None],
    reporter: Reporter,
    checkpoint: Checkpoint | None = None,
    data: Data | None = None,
) -> dict[str, Any]:
    """Run stages in order, leaving out those whose results are there already; `validate` always runs.

    Args:
        gates: least relative mIoU and least speedup, or None.
        checkpoint, data: for "quantize".

    Returns:
        the report when the last stage is `validate`, else {"stages": those run or found}.
    """
    out.job = job.as_json()
    report: dict[str, Any] = {}
    for stage in stages:
        if stage == "validate":
            report = run_validate(out, job, reporter, *gates)
        elif out.done(stage) and out.stages[stage].get("options") == _options_of(stage, job):
            reporter.say(f"{stage}: done before, nothing changed")
        elif stage == "quantize":
            assert checkpoint is not None
            assert data is not None
            run_quantize(out, job, recipe, checkpoint, data, reporter)
        elif stage == "export":
            run_export(out, job, reporter)
        else:
            run_build(out, job, reporter)
    return report or {"output_dir": str(out.path), "stages": list(stages)}


def _options_of(stage: str, job: Job) -> dict[str, Any]:
    """What besides the fingerprint decides a stage's result."""
    options: dict[str, dict[str, Any]] = {
        "quantize": {},
        "export": {"static_shapes": job.static_shapes},
        "build": {"engine": job.engine},
    }
    return options[stage]


def load(job: Job) -> Checkpoint:
    """The job's float model."""
    return load_checkpoint(job.model, image_size=job.image_size, device=job.device, allow_pickle=job.allow_pickle)


def run_quantize(
    out: OutputDir, job: Job, recipe: Recipe, checkpoint: Checkpoint, data: Data, reporter: Reporter
) -> None:
    """Checkpoint and images → `weights/` and `config.yaml`."""
    started = time.perf_counter()
    torch.manual_seed(job.seed)
    unreadable: list[str] = []
    quantized = _quantize(job, recipe, checkpoint, data, reporter, unreadable)
    weights = out.path / "weights"
    paths = [save_quantized(weights, quantized.model, quantized.codes), weights / "config.json"]
    paths.append(quantized.folds.save(weights))
    layers = weights / "layers.json"
    write_json(layers, _layer_table(quantized, recipe))
    write_text(out.path / "config.yaml", recipe.to_yaml())
    _copy_processor(checkpoint.directory, weights, paths)
    calibrated_on = None if data.calibration is None else data.calibration.description
    out.record(
        "quantize",
        [*paths, layers, out.path / "config.yaml"],
        time.perf_counter() - started,
        options=_options_of("quantize", job),
        calibration=calibrated_on,
        unreadable=unreadable,
        checkpoint=checkpoint.fingerprint,
    )


def _quantize(
    job: Job, recipe: Recipe, checkpoint: Checkpoint, data: Data, reporter: Reporter, unreadable: list[str]
) -> Quantized:
    layers = sum(plan.skip is None for plan in make_plan(checkpoint.model, recipe, job.parts))
    if data.calibration is None:
        with reporter.track(f"quantize {layers} layers", layers) as step:
            return quantize(checkpoint.model, recipe, None, job.parts, lambda _: step())
    count = min(recipe.calib.num_samples, len(data.calibration))
    expected = -(-count // recipe.calib.batch_size)
    batches = _batches(data, checkpoint.processor, count, recipe.calib.batch_size, job.seed)
    with reporter.track(f"quantize {layers} layers on {count} images", expected + layers) as step:
        result = quantize(checkpoint.model, recipe, batches, job.parts, lambda _: step())
    unreadable.extend(data.calibration.unreadable)
    for line in unreadable:
        reporter.warn(f"skipped an unreadable image: {line}")
    return result


def _batches(data: Data, processor: SamProcessor, count: int, size: int, seed: int) -> Iterator[Tensor]:
    assert data.calibration is not None
    held: list[Tensor] = []
    for sample in take(data.calibration, count, seed):
        held.append(torch.from_numpy(processor(sample.image).pixel_values))
        if len(held) == size:
            yield torch.stack(held)
            held = []
    if held:
        yield torch.stack(held)


def _layer_table(quantized: Quantized, recipe: Recipe) -> list[dict[str, Any]]:
    rows = []
    for plan in quantized.plans:
        row = asdict(plan) | {"requested": "float" if plan.skip else describe_request(recipe)}
        notes = quantized.notes.get(plan.name)
        if notes is not None:
            row |= asdict(notes)
        if plan.name in quantized.codes:
            row["stored_bytes"] = quantized.codes[plan.name].stored_bytes()
        rows.append(row)
    return rows


def _copy_processor(source: Path, target: Path, paths: list[Path]) -> None:
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (source / name).is_file():
            write_text(target / name, (source / name).read_text(encoding="utf-8"))
            paths.append(target / name)


def run_export(out: OutputDir, job: Job, reporter: Reporter) -> None:
    """`weights/` and the checkpoint → `onnx/`: canonical Q/DQ parts, and the baseline in FP32 and FP16."""
    out.require("quantize")
    started = time.perf_counter()
    baseline = _baseline(out, job)
    model, codes = load_quantized(out.path / "weights")
    folder = out.path / "onnx"
    paths: list[Path] = []
    with reporter.track("export", 3 * len(PARTS)) as step:
        for part in PARTS:
            skeleton = trace(baseline, part, StaticShape() if job.static_shapes else None)
            for name, fill in (
                (f"fp32/{part}.onnx", partial(float_part, skeleton, baseline, half=False)),
                (f"fp16/{part}.onnx", partial(float_part, skeleton, baseline, half=True)),
                (f"{part}.onnx", partial(quantized_part, skeleton, model, codes)),
            ):
                paths += save_part(fill(), folder / name)
                step()
    out.record("export", paths, time.perf_counter() - started, options=_options_of("export", job))


def _baseline(out: OutputDir, job: Job) -> Sam2Model:
    """The float model that the weights were made from, on the CPU.

    Raises:
        BadInput: the checkpoint is another one by now.
    """
    checkpoint = load(replace(job, device="cpu"))
    if checkpoint.fingerprint != out.stages["quantize"]["checkpoint"]:
        raise BadInput(f"{job.model} was changed since `quantize`; put it back, or run again with --force")
    return checkpoint.model


def run_build(out: OutputDir, job: Job, reporter: Reporter) -> None:
    """`onnx/` → `engines/<engine>/`: the parts lowered for the engine, loaded once to see that they run."""
    out.require("export")
    started = time.perf_counter()
    folder = out.path / "engines" / job.engine
    paths: list[Path] = []
    executed: dict[str, Any] = {}
    with reporter.track("build", len(PARTS)) as step:
        for part in PARTS:
            lowered = lower_for_onnxruntime(ir.load(out.path / "onnx" / f"{part}.onnx"))
            written = save_part(lowered, folder / f"{part}.onnx")
            paths += written
            executed |= {name: asdict(found) for name, found in executed_layers(written[0]).items()}
            step()
    table = folder / "executed.json"
    write_json(table, executed)
    out.record("build", [*paths, table], time.perf_counter() - started, options=_options_of("build", job))


def run_validate(
    out: OutputDir, job: Job, reporter: Reporter, min_relative_miou: float | None, min_speedup: float | None
) -> dict[str, Any]:
    """Engines and evaluation images → `report/`; returns the report, whose `gates` say which of them were missed.

    Raises:
        UsageError: an accuracy gate without evaluation data.
    """
    out.require("build")
    started = time.perf_counter()
    recipe = load_recipe(str(out.path / "config.yaml"))
    data = open_data(job, recipe)
    check_gates_can_be_told(data, min_relative_miou)
    folder = out.path / "engines" / job.engine
    baseline = _predictor(out.path / "onnx" / "fp32")
    quantized = _predictor(folder)
    processor = SamProcessor.from_checkpoint(out.path / "weights", _image_size(baseline))
    records, accuracy, sqnr = [], None, {}
    if data.evaluation is not None:
        count = min(job.num_eval_samples, len(data.evaluation))
        with reporter.track(f"evaluate, {count} images", count) as step:
            samples = take(data.evaluation, count, job.seed)
            records = evaluate(baseline, quantized, samples, processor, step)
        accuracy = summarize(records)
        sqnr = _sqnr(out, job, data, processor, reporter)
    with reporter.track("latency", None):
        latency = {"engine": job.engine, **_latency(baseline, quantized)}
    report = build_report(out, job, data, accuracy, latency, sqnr)
    write_json(out.path / "report" / "prompts.json", as_json(records))
    report["gates"] = _gates(report, min_relative_miou, min_speedup)
    write_json(out.path / "report" / "report.json", report)
    write_text(out.path / "report" / "report.md", to_markdown(report))
    names = ("prompts.json", "report.json", "report.md")
    out.record("validate", [out.path / "report" / name for name in names], time.perf_counter() - started)
    return report


def check_gates_can_be_told(data: Data, min_relative_miou: float | None) -> None:
    """Refuse an accuracy gate without evaluation images.

    Raises:
        UsageError: there are none.
    """
    if min_relative_miou is not None and data.evaluation is None:
        raise UsageError(f"--min-relative-miou cannot be checked without images: evaluation data is {data.origin}")


def _predictor(folder: Path) -> Predictor:
    encoder, decoder = (OnnxRuntimeEngine(folder / f"{part}.onnx") for part in (IMAGE_ENCODER, MASK_DECODER))
    return Predictor(encoder, decoder)


def _image_size(predictor: Predictor) -> int:
    return int(predictor.encoder.shapes["pixel_values"][-1])


def _sqnr(out: OutputDir, job: Job, data: Data, processor: SamProcessor, reporter: Reporter) -> dict[str, float | None]:
    assert data.evaluation is not None
    baseline = _baseline(out, job)
    Folds.load(out.path / "weights").apply(baseline)
    model, codes = load_quantized(out.path / "weights")
    with reporter.track("SQNR", SQNR_IMAGES) as step:
        samples = take(data.evaluation, min(SQNR_IMAGES, len(data.evaluation)), job.seed)

        def batches() -> Iterator[Tensor]:
            for sample in samples:
                yield torch.from_numpy(processor(sample.image).pixel_values)[None]
                step()

        return layer_sqnr(baseline, model, list(codes), batches())


def _latency(baseline: Predictor, quantized: Predictor) -> dict[str, Any]:
    """Encoder and decoder (one box) apart, and together as one image with one prompt."""
    size = _image_size(baseline)
    noise = np.random.default_rng(0).standard_normal((1, 3, size, size), dtype=np.float32)
    pixels = {"pixel_values": noise}
    features = [predictor.encode(noise[0]) for predictor in (baseline, quantized)]
    prompt = boxes(np.array([[0.25, 0.25, 0.75, 0.75]], np.float32) * size)
    prompted = [{**seen, **prompt_feeds(seen, prompt.coords, prompt.labels)} for seen in features]
    encoder = alternate(baseline.encoder, quantized.encoder, (pixels, pixels), LATENCY_SECONDS)
    decoder = alternate(baseline.decoder, quantized.decoder, (prompted[0], prompted[1]), LATENCY_SECONDS / 4)
    before, after = (encoder[key] + decoder[key] for key in ("baseline_ms", "quantized_ms"))
    return {
        "baseline_ms": round(before, 3),
        "quantized_ms": round(after, 3),
        "speedup": round(before / after, 4),
        "baseline": "FP32, the same runtime",
        IMAGE_ENCODER: encoder,
        MASK_DECODER: decoder,
    }


ACCURACY_GATE, SPEED_GATE = "--min-relative-miou", "--min-speedup"


def _gates(report: dict[str, Any], min_relative_miou: float | None, min_speedup: float | None) -> list[dict[str, Any]]:
    """What was asked for and what was reached, accuracy first."""
    gates = []
    if min_relative_miou is not None:
        accuracy = report["accuracy"]
        truth = accuracy["miou_baseline"] is not None
        measure = "relative mIoU" if truth else "agreement with the baseline (no ground truth)"
        reached = accuracy["miou_relative" if truth else "agreement_iou"]
        gates.append((ACCURACY_GATE, measure, min_relative_miou, reached))
    if min_speedup is not None:
        gates.append((SPEED_GATE, "speedup", min_speedup, report["latency"]["speedup"]))
    return [
        {
            "option": option,
            "gate": measure,
            "asked": asked,
            "reached": reached,
            "passed": reached is not None and reached >= asked,
        }
        for option, measure, asked, reached in gates
    ]


def missed_gate(report: dict[str, Any]) -> AccuracyGateMissed | SpeedGateMissed | None:
    """The error to end with when a gate is missed, accuracy before speed."""
    for gate in report.get("gates", ()):
        if not gate["passed"]:
            shown = "unknown" if gate["reached"] is None else f"{gate['reached']:.4f}"
            message = f"{gate['gate']} is {shown}, below {gate['option']} {gate['asked']}"
            return AccuracyGateMissed(message) if gate["option"] == ACCURACY_GATE else SpeedGateMissed(message)
    return None
