"""The stages of the main job. Each goes on from what the ones before it left in the output directory."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Sam2Model

from samq.calib.checkpoint import Checkpoint, load_checkpoint
from samq.calib.parts import PARTS
from samq.calib.processor import SamProcessor
from samq.calib.sources import ImageSource, take
from samq.engines.kernels import Launched, by_kind
from samq.engines.predictor import Predictor
from samq.errors import BadInput, MachineLacks, SamqError, UsageError
from samq.export.parts import float_part, quantized_part, save_part
from samq.export.trace import trace
from samq.files import sha256_of, write_json, write_text
from samq.quant.config import AUTO, Recipe, load_recipe
from samq.quant.folds import Folds
from samq.quant.plan import describe_request, make_plan
from samq.quant.quantize import Quantized, quantize
from samq.quant.storage import load_quantized, save_quantized
from samq.tools.ahead import Ahead
from samq.tools.engine_start import ONNXRUNTIME, ONNXRUNTIME_ENGINE, measure_engine_memory
from samq.tools.evaluate import Record, Seen, evaluate
from samq.tools.gates import Gates, branches_needed, check_gates_can_be_told, judge, slower_than_baseline
from samq.tools.half_precision import IMAGES, compare_with_fp32, complaint
from samq.tools.job import DYNAMIC, NO_PLACEMENT, SHAPES, SHIPPED, STATIC, Data, Job, fingerprint
from samq.tools.latency import measure_latency
from samq.tools.outdir import STAGES, OutputDir
from samq.tools.progress import Reporter
from samq.tools.report.build import Measured, build_report
from samq.tools.report.examples import draw_examples
from samq.tools.report.pareto import read_search
from samq.tools.report.writing import write_report
from samq.tools.sqnr import layer_sqnr
from samq.tools.targets import OnnxRuntimeCpu, Target, TensorRt, target_of, tensorrt_target
from samq.tools.watch import Watch

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
    gates: Gates,
    reporter: Reporter,
    data: Data | None = None,
    checkpoint: Checkpoint | None = None,
) -> dict[str, Any]:
    """Run stages in order, leaving out those whose results are there already; `validate` always runs.

    Args:
        data: for "quantize" and "validate".
        checkpoint: for "quantize".

    Returns:
        the report when the last stage is `validate`, else {"stages": those run or found}.

    Raises:
        MachineLacks: out of memory.
    """
    if tuple(stages) != ("validate",):  # whose evaluation images are its own affair
        out.job = job.as_json()
    report: dict[str, Any] = {}
    for stage in stages:
        if stage != "quantize":
            out.require(STAGES[STAGES.index(stage) - 1])
        before = dict(out.stages)
        if stage == "build" and job.engine != "tensorrt":  # where that is not at hand, what is done stays done
            _check_shapes(out, job)
        with _memory_errors_told(job):
            if stage == "validate":
                assert data is not None
                report = run_validate(out, job, recipe, data, gates, reporter)
                needed = branches_needed(report, gates)
                if job.low_rank == AUTO and report["low_rank"] == "fold" and needed is not None:
                    run_build(out, job, reporter, branches_because=needed)
                    report = run_validate(out, job, recipe, data, gates, reporter)
            elif _is_done(stage, out, job, reporter):
                reporter.say(f"{stage}: done before, nothing changed")
            elif stage == "quantize":
                assert checkpoint is not None
                assert data is not None
                run_quantize(out, job, recipe, checkpoint, data, reporter)
            elif stage == "export":
                run_export(out, job, reporter)
            else:
                run_build(out, job, reporter)
        if void := [name for name in before if name not in out.stages and name not in stages]:
            again = " and ".join(_command_of(name, before[name]) for name in void)
            reporter.warn(f"what came behind `{stage}` is of before; run {again} again, with the same options")
    return report or {"output_dir": str(out.path), "stages": list(stages)}


def _command_of(stage: str, noted: Mapping[str, Any]) -> str:
    """What makes a stage's result again."""
    engine = noted.get("options", {}).get("engine")
    return f"`samq-export {stage}`" if engine is None else f"`samq-export {stage} --engine {engine}`"


def _is_done(stage: str, out: OutputDir, job: Job, reporter: Reporter) -> bool:
    """Whether a stage's result is there, for these options, and serves on this machine."""
    if out.stages.get(stage, {}).get("options") != _options_of(stage, job) or not out.done(stage):
        return False
    if stage != "build" or job.engine != "tensorrt":
        return True
    try:
        target = tensorrt_target(job)
        folder = Path("engines", target.folder)
        if not any(Path(name).is_relative_to(folder) for name in out.stages[stage]["artifacts"]):
            return False  # they are of another TensorRT
        misfit = target.misfit(out.path / folder, out.stages[stage].get("placement"))
    except MachineLacks:  # TensorRT is not at hand: what is done stays done
        return True
    if misfit is not None:
        reporter.say(f"build again: {misfit.partition(';')[0]}")
    return misfit is None


@contextmanager
def _memory_errors_told(job: Job) -> Iterator[None]:
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        remedy = "a smaller calib.batch_size or --image-size" + (", or --device cpu" if job.device == "cuda" else "")
        raise MachineLacks(f"out of memory; use {remedy}") from error


def _options_of(stage: str, job: Job) -> dict[str, Any]:
    """What besides the fingerprint decides a stage's result."""
    options: dict[str, dict[str, Any]] = {
        "quantize": {},
        "export": {"shapes": job.shapes, "target": job.target, "low_rank": job.low_rank, **_placed(job)},
        "build": {key: getattr(job, key) for key in ("engine", "target", "low_rank", "build_options")}
        | _placed(job)
        | {"device": job.device if job.engine == "onnxruntime" else None},
    }
    return options[stage]


def _placed(job: Job) -> dict[str, Any]:
    """The job's placement, by content; None for the one that samq ships."""
    named = None if job.placement == SHIPPED else job.placement
    path = None if named in (None, NO_PLACEMENT) else Path(str(named))
    return {"placement": sha256_of(path) if path is not None and path.is_file() else named}


def load(job: Job) -> Checkpoint:
    """The job's float model."""
    return load_checkpoint(job.model, image_size=job.image_size, device=job.device, allow_pickle=job.allow_pickle)


def run_quantize(
    out: OutputDir, job: Job, recipe: Recipe, checkpoint: Checkpoint, data: Data, reporter: Reporter
) -> None:
    """Checkpoint and images → `weights/` and `config.yaml`."""
    watch = Watch(reporter)
    torch.manual_seed(job.seed)
    seen: list[str] = []
    quantized, seconds = _quantize(job, recipe, checkpoint, data, reporter, seen)
    out.make_room()
    weights = out.path / "weights"
    paths = [save_quantized(weights, quantized.model, quantized.codes), weights / "config.json"]
    paths.append(quantized.folds.save(weights))
    layers = weights / "layers.json"
    write_json(layers, _layer_table(quantized, recipe))
    write_text(out.path / "config.yaml", recipe.to_yaml())
    _copy_processor(checkpoint.directory, weights, paths)
    source = data.calibration
    out.record(
        "quantize",
        [*paths, layers, out.path / "config.yaml"],
        **watch.taken(),
        options=_options_of("quantize", job),
        checkpoint=checkpoint.fingerprint,
        calibration=None if source is None else f"{len(seen)} images of {source.description}",
        calibration_fingerprint=data.calibration_fingerprint,
        **seconds,
        unreadable=[] if source is None else source.unreadable,
    )


def _quantize(
    job: Job, recipe: Recipe, checkpoint: Checkpoint, data: Data, reporter: Reporter, seen: list[str]
) -> tuple[Quantized, dict[str, float]]:
    """The quantized model, and what took how long; the names of the images that it saw go to `seen`.

    Waiting for images is in neither of the other times. What a GPU still computes when the last image has passed is not
    calibration's.
    """
    started = calibrated = time.perf_counter()
    layers = sum(plan.skip is None for plan in make_plan(checkpoint.model, recipe, job.parts))
    if data.calibration is None:
        with reporter.track(f"quantize {layers} layers", layers) as step:
            result = quantize(checkpoint.model, recipe, None, job.parts, lambda _: step())
        return result, {"quantization_s": round(time.perf_counter() - started, 1)}
    asked = recipe.calib.num_samples
    count = min(asked, len(data.calibration))
    batches = Ahead(
        pixel_batches(data.calibration, checkpoint.processor, count, recipe.calib.batch_size, job.seed, seen)
    )
    steps = -(-count // recipe.calib.batch_size) + layers
    with reporter.track(f"quantize {layers} layers on {count} images", steps) as step:

        def tick(what: str) -> None:
            nonlocal calibrated
            step()
            calibrated = time.perf_counter() if what == "calibrate" else calibrated

        result = quantize(checkpoint.model, recipe, batches, job.parts, tick)
    ended = time.perf_counter()
    warn_of_unreadable(data.calibration, reporter)
    if len(seen) < asked:
        reporter.warn(f"calibrated on {len(seen)} images; {asked} were asked for")
    seconds = {
        "quantization_s": ended - started - batches.waited,
        "calibration_s": calibrated - started - batches.waited,
        "waited_for_images_s": batches.waited,
    }
    return result, {name: round(value, 1) for name, value in seconds.items()}


def pixel_batches(
    source: ImageSource, processor: SamProcessor, count: int, size: int, seed: int, seen: list[str]
) -> Iterator[Tensor]:
    """Pixel values [≤ size, 3, S, S] of `count` images of a source; the images' names go to `seen`."""
    held: list[Tensor] = []
    for sample in take(source, count, seed):
        seen.append(sample.name)
        held.append(torch.from_numpy(processor(sample.image).pixel_values))
        if len(held) == size:
            yield torch.stack(held)
            held = []
    if held:
        yield torch.stack(held)


def warn_of_unreadable(source: ImageSource, reporter: Reporter) -> None:
    """Name every image that could not be read."""
    for line in source.unreadable:
        reporter.warn(f"skipped an unreadable image: {line}")


def _layer_table(quantized: Quantized, recipe: Recipe) -> list[dict[str, Any]]:
    rows = []
    for plan in quantized.plans:
        row = asdict(plan) | {"requested": "float" if plan.skip else describe_request(recipe.of_layer(plan.name))}
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
    """`weights/` and the checkpoint → `onnx/`: canonical Q/DQ parts, and the baseline in FP32 and FP16.

    With a target named, the graphs are lowered for it too, so that only the engines are left to build elsewhere. Parts
    that were exported for the same shapes are lowered as they are, beside what they were lowered to for other targets.
    """
    out.require("quantize")
    watch = Watch(reporter)
    target = None if job.target is None else tensorrt_target(job)  # refuses what is wrong before anything is traced
    paths = _exported_before(out, job) or _canonical(out, job, reporter)
    if target is not None:
        folder = out.path / "engines" / target.folder
        with reporter.track(f"lower for {target.folder}", target.graphs) as step:
            lowered = target.lower(out.path / "onnx", folder, step)
        for line in target.told(folder):
            reporter.say(line)
        paths = [path for path in paths if not path.is_relative_to(folder)] + lowered
    before = out.stages.get("export", {}).get("options", {}).get("shapes", job.shapes)
    if before != job.shapes:
        reporter.say(f"onnx/ is for {job.shapes} now, and was for {before}")
    out.record("export", paths, **watch.taken(), options=_options_of("export", job))


def _exported_before(out: OutputDir, job: Job) -> list[Path]:
    """The files of an export for the same shapes; empty where there was none, or one was changed since."""
    earlier = out.stages.get("export", {})
    if earlier.get("options", {}).get("shapes") != job.shapes or not out.done("export"):
        return []
    return [out.path / name for name in earlier["artifacts"]]


def _canonical(out: OutputDir, job: Job, reporter: Reporter) -> list[Path]:
    """Trace the parts and write them to `onnx/`; returns the files."""
    baseline = _baseline(out, job)
    model, codes = load_quantized(out.path / "weights")
    paths: list[Path] = []
    with reporter.track("export", 3 * len(PARTS)) as step:
        for part in PARTS:
            skeleton = trace(baseline, part, SHAPES[job.shapes])
            for name, fill in (
                (f"fp32/{part}.onnx", partial(float_part, skeleton, baseline, half=False)),
                (f"fp16/{part}.onnx", partial(float_part, skeleton, baseline, half=True)),
                (f"{part}.onnx", partial(quantized_part, skeleton, model, codes)),
            ):
                paths += save_part(fill(), out.path / "onnx" / name)
                step()
    return paths


def _baseline(out: OutputDir, job: Job) -> Sam2Model:
    """The float model that the weights were made from, on the CPU.

    Raises:
        BadInput: the checkpoint is another one by now.
    """
    checkpoint = load(replace(job, device="cpu"))
    if checkpoint.fingerprint != out.detail("quantize", "checkpoint"):
        raise BadInput(f"{job.model} was changed since `quantize`; put it back, or run again with --force")
    return checkpoint.model


def _check_shapes(out: OutputDir, job: Job) -> None:
    """Insist that the graphs were exported with the shapes that the engine is to have.

    Raises:
        UsageError: they were not.
    """
    exported: str = out.detail("export", "options")["shapes"]
    if exported == job.shapes or (job.engine != "tensorrt" and job.static_shapes is None):
        return
    options = {STATIC: "--static-shapes", DYNAMIC: "--dynamic-shapes"}
    wanted = [f"--target {target_of(job).folder}"] if job.engine == "tensorrt" else []
    wanted += [options[job.shapes]] if job.static_shapes is not None else []
    instead = f", or choose {options[exported]}" if exported in options else ""
    raise UsageError(
        f"{out.path} was exported for {exported}, this engine is to take {job.shapes}; "
        f"run `samq-export export {' '.join(wanted)}` first{instead}"
    )


def run_build(out: OutputDir, job: Job, reporter: Reporter, branches_because: str | None = None) -> None:
    """`onnx/` → `engines/<target>/`: the parts lowered for the target, and its engines.

    Args:
        branches_because: why low-rank branches are kept, whatever the job says.
    """
    out.require("export")
    watch = Watch(reporter)
    if branches_because is not None:
        reporter.say(f"{branches_because}: built again with branches")
    target = target_of(job if branches_because is None else replace(job, low_rank="branch"))
    target.require()
    _check_shapes(out, job)
    exported = out.detail("export", "options")["shapes"]
    if exported == DYNAMIC != job.shapes:  # only ONNX Runtime on a GPU takes them all the same
        fix = "`samq-export export --device cuda` exports it for one image"
        reporter.say(f"exported for {exported}: the encoder may not be recorded as a CUDA graph; {fix}")
    folder = out.path / "engines" / target.folder
    with reporter.track(f"build for {target.folder}", 2 * target.graphs) as step:
        paths = target.lower(out.path / "onnx", folder, step)
        for line in target.told(folder):
            reporter.say(line)
        paths += target.build(folder, step, reporter)
    made: dict[str, Any] = {"low_rank": None}
    if isinstance(target, TensorRt):
        made = {"low_rank": target.branches(folder), "placement": target.placement.layers}
    out.record("build", paths, **watch.taken(), options=_options_of("build", job), **made)


def run_validate(
    out: OutputDir, job: Job, recipe: Recipe, data: Data, gates: Gates, reporter: Reporter
) -> dict[str, Any]:
    """Engines and evaluation images → `report/`; returns the report, whose `gates` say which of them were missed.

    Raises:
        UsageError: an accuracy gate without evaluation data.
        BadInput: the result of a search is beside the report, and unreadable.
    """
    out.require("build")
    watch = Watch(reporter)
    check_gates_can_be_told(data, gates)
    report_folder = out.path / "report"
    read_search(report_folder)
    float_model = None if data.evaluation is None else _baseline(out, job)  # before minutes are spent on anything
    target = target_of(job)
    folder = out.path / "engines" / target.folder
    baseline, quantized = target.open(out.path / "onnx", folder)
    image_size = int(baseline.encoder.shapes["pixel_values"][-1])
    processor = SamProcessor.from_checkpoint(out.path / "weights", image_size)
    records: list[Record] | None = None
    images, half, examples, sqnr = None, None, [], {}
    if data.evaluation is not None:
        half = _half_precision(out, job, target, baseline, data.evaluation, processor, reporter)
        count, seen = min(job.num_eval_samples, len(data.evaluation)), Seen()
        with reporter.track(f"evaluate, {count} images", count) as step:
            samples = seen.watch(take(data.evaluation, count, job.seed))
            records = evaluate(baseline, quantized, samples, processor, step)
        warn_of_unreadable(data.evaluation, reporter)
        if not records:
            raise BadInput(
                f"none of the {count} evaluation images has an object ({data.origin}); give others as --eval-data, "
                "or photos without annotations"
            )
        images = seen.fingerprint()
        with reporter.track("pictures", None):
            samples = take(data.evaluation, count, job.seed)
            examples = draw_examples(baseline, quantized, samples, processor, records, report_folder)
        assert float_model is not None
        sqnr = _sqnr(out, job, float_model, data.evaluation, processor, reporter)
    with reporter.track("latency", None):
        latency = {
            "engine": job.engine,
            "baseline": target.baseline,
            **measure_latency(baseline, quantized, image_size),
        }
    slower = slower_than_baseline(latency, gates)
    if slower is not None:
        reporter.warn(slower)
    memory = _engine_memory(out, target, reporter)
    kernels, not_traced = _kernels(target, folder, reporter)
    executed = target.executed(folder)
    measured = Measured(records, images, examples, latency, sqnr, executed, kernels, not_traced, half, memory)
    report = build_report(out, job, recipe, data, target, measured, watch.taken())
    report["gates"] = judge(report, gates)
    report["low_rank"] = out.stages["build"].get("low_rank")
    paths = write_report(out.path, report, records or [])
    out.record("validate", paths, **watch.taken())
    return report


def _half_precision(
    out: OutputDir,
    job: Job,
    target: Target,
    baseline: Predictor,
    source: ImageSource,
    processor: SamProcessor,
    reporter: Reporter,
) -> dict[str, Any] | None:
    """How a GPU's FP16 baseline agrees with FP32 on the CPU; None where the baseline is in FP32."""
    if isinstance(target, OnnxRuntimeCpu):
        return None
    count = min(IMAGES, len(source))
    exact = OnnxRuntimeCpu().baseline_of(out.path / "onnx")
    with reporter.track("FP16 against FP32", count) as step:
        compared = compare_with_fp32(baseline, exact, take(source, count, job.seed), processor, step)
    complained = complaint(compared)
    if complained is not None:
        reporter.warn(complained)
    return compared


def _kernels(target: Target, folder: Path, reporter: Reporter) -> tuple[dict[str, dict[str, Launched]] | None, str]:
    """The kernels of each part by kind, None and the reason where they cannot be traced."""
    try:
        return {part: by_kind(kernels) for part, kernels in target.kernels(folder, reporter).items()}, ""
    except SamqError as error:  # whatever it is, the report is worth more
        return None, str(error)


def _engine_memory(out: OutputDir, target: Target, reporter: Reporter) -> dict[str, int | None]:
    """Peak bytes of the baseline's engines and of the quantized ones, where they can be measured."""
    places = {
        "baseline_bytes": (ONNXRUNTIME, out.path / "onnx" / "fp32"),
        "quantized_bytes": (ONNXRUNTIME_ENGINE, out.path / "engines" / target.folder),
    }
    if not isinstance(target, OnnxRuntimeCpu):
        return dict.fromkeys(places)
    with reporter.track("memory", len(places)) as step:
        peaks: dict[str, int | None] = {}
        for key, (opener, place) in places.items():
            peaks[key] = measure_engine_memory(opener, target.files(place))
            step()
        return peaks


def _sqnr(
    out: OutputDir, job: Job, baseline: Sam2Model, source: ImageSource, processor: SamProcessor, reporter: Reporter
) -> dict[str, float | None]:
    """SQNR of each quantized layer; the quantization's exact folds are applied to `baseline`, in place."""
    Folds.load(out.path / "weights").apply(baseline)
    model, codes = load_quantized(out.path / "weights")
    with reporter.track("SQNR", SQNR_IMAGES) as step:
        samples = take(source, min(SQNR_IMAGES, len(source)), job.seed)

        def batches() -> Iterator[Tensor]:
            for sample in samples:
                yield torch.from_numpy(processor(sample.image).pixel_values)[None]
                step()

        return layer_sqnr(baseline, model, list(codes), batches())
