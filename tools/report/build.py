"""The report as one JSON object with every figure: the source of all its other forms.

A figure that could not be measured is null, and `lacks` says why.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import samq
from samq.calib.parts import PARTS
from samq.engines.base import Executed
from samq.engines.kernels import Launched
from samq.engines.tensorrt_layers import inside_region
from samq.export.lowered_layer import FLOAT_GEMM, LoweredLayer
from samq.quant.config import Recipe
from samq.tools.engine_start import file_bytes
from samq.tools.evaluate import Record, summarize
from samq.tools.job import Data, Job
from samq.tools.outdir import STAGES, OutputDir
from samq.tools.report.environment import environment
from samq.tools.report.reading import SCHEMA
from samq.tools.report.units import percent
from samq.tools.report.verdict import FLOAT
from samq.tools.targets import Target, requested_compute

NOT_READ = "not read"  # of convolutions, and of layers that the runtime does not name
MOST_WARNINGS = 20  # of one engine; the others are counted


@dataclass(frozen=True)
class Measured:
    """What `validate` measured.

    Args:
        records: one a prompt; None without evaluation images.
        images: fingerprint of the evaluation images, None without.
        examples: from `samq.tools.report.examples.draw_examples`.
        latency: from `samq.tools.latency.measure_latency`, with the engine's name.
        sqnr: layer → dB; empty without evaluation images.
        executed: layer → what the runtime made of it.
        kernels: part → kind → what the GPU launched; empty without a GPU, None where it could not be traced.
        not_traced: why it could not.
        half_precision: from `samq.tools.half_precision.compare_with_fp32`; None without evaluation images, or where the
            baseline is in FP32.
        engine_memory: "baseline_bytes" and "quantized_bytes" from `samq.tools.engine_start`, where it can measure.
    """

    records: list[Record] | None
    images: str | None
    examples: list[dict[str, Any]]
    latency: dict[str, Any]
    sqnr: dict[str, float | None]
    executed: dict[str, Executed]
    kernels: dict[str, dict[str, Launched]] | None
    not_traced: str
    half_precision: dict[str, Any] | None
    engine_memory: dict[str, int | None]


def build_report(
    out: OutputDir,
    job: Job,
    recipe: Recipe,
    data: Data,
    target: Target,
    measured: Measured,
    validation: Mapping[str, Any],
) -> dict[str, Any]:
    """Put together what the stages left in the output directory and what `validate` measured.

    Args:
        validation: what `validate` took so far, from `samq.tools.watch.Watch`.
    """
    accuracy = None if measured.records is None else summarize(measured.records)
    layers = _layers(out, recipe, target, measured)
    quantized = [layer for layer in layers if layer["requested"] != FLOAT]
    otherwise = [layer for layer in quantized if not layer["agrees"]]
    stages = {stage: out.stages[stage] for stage in STAGES[:-1] if stage in out.stages} | {STAGES[-1]: validation}
    return {
        "schema": SCHEMA,
        "samq": samq.__version__,
        "model": job.model,
        "checkpoint": out.stages["quantize"]["checkpoint"],
        "format": " and ".join(sorted({layer["requested"].partition(":")[0] for layer in quantized})),
        "method": _method(recipe),
        "engine": job.engine,
        "target": target.folder,
        "gates": [],
        "accuracy": accuracy or dict.fromkeys(summarize([])),
        "half_precision": measured.half_precision,
        "examples": measured.examples,
        "size": _sizes(out, target, quantized),
        "latency": measured.latency,
        "memory": {
            "stages": {stage: facts.get("peak_memory_bytes") for stage, facts in stages.items()},
            "engine": measured.engine_memory,
        },
        "layers": layers,
        "disagreements": [layer["name"] for layer in otherwise if not layer["placed"]],
        "placed": [layer["name"] for layer in otherwise if layer["placed"]],
        "folded": _folded(layers),
        "kernels": _kernels(measured),
        "engine_log": _engine_log(out, target),
        "evaluation_data": data.origin,
        "evaluation_fingerprint": measured.images,
        "evaluation_unreadable": [] if data.evaluation is None else data.evaluation.unreadable,
        "calibration": {key: out.stages["quantize"][key] for key in ("calibration", "unreadable")},
        "lacks": _lacks(data, accuracy, measured, stages),
        "seconds": {stage: facts.get("seconds") for stage, facts in stages.items()},
        "commands": _commands(stages),
        "log": {stage: facts.get("log", []) for stage, facts in stages.items()},
        "environment": environment(),
    }


def _method(recipe: Recipe) -> list[str]:
    """The algorithms of a recipe, in words."""
    if recipe.modelopt is not None:
        return [f"ModelOpt's {recipe.modelopt}"]
    weights = [own.wgts for own in recipe.variants()]
    ranks = sorted({own.low_rank.rank for own in weights if own.low_rank is not None}, key=str)
    rounding = ["round to nearest" if own.kernel_gptq is None else "GPTQ" for own in weights]
    return [
        *(f"low rank {rank}" for rank in ranks),
        *dict.fromkeys(rounding),
        *(["shift"] if recipe.shift.enabled else []),
        *(["SmoothQuant"] if recipe.smooth.enabled else []),
        *(["rotation"] if recipe.rotation.enabled else []),
    ]


def _lacks(
    data: Data, accuracy: dict[str, Any] | None, measured: Measured, stages: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """Which figures are missing, and why."""
    lacks = []
    if accuracy is None:
        lacks.append(f"accuracy and SQNR: no evaluation images ({data.origin})")
    elif accuracy["miou_baseline"] is None:
        lacks.append("mIoU against ground truth: the evaluation images have no annotations")
    elif accuracy["miou_relative"] is None:
        lacks.append("relative mIoU: the baseline's mIoU is 0")
    if None in measured.engine_memory.values():
        lacks.append("the engine's memory: it is measured for ONNX Runtime on the CPU, on Linux")
    if measured.kernels is None:
        lacks.append(f"the GPU's kernels: {measured.not_traced}")
    blind = [stage for stage, facts in stages.items() if facts.get("peak_memory_bytes") is None]
    if blind:
        lacks.append(f"peak memory of {', '.join(blind)}: not recorded (Linux tells it, other systems do not)")
    return lacks


def _commands(stages: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The commands that made the stages, each with its stages; stages that no command made are left out."""
    found: dict[str, list[str]] = {}
    for stage, facts in stages.items():
        if facts.get("command") is not None:
            found.setdefault(facts["command"], []).append(stage)
    return [{"command": command, "stages": made} for command, made in found.items()]


def _layers(out: OutputDir, recipe: Recipe, target: Target, measured: Measured) -> list[dict[str, Any]]:
    table = json.loads((out.path / "weights" / "layers.json").read_text(encoding="utf-8"))
    all_lowered = target.lowered(out.path / "engines" / target.folder)
    layers = []
    for row in table:
        found, decibels = measured.executed.get(row["name"]), measured.sqnr.get(row["name"])
        floating, lowered = row["skip"] is not None, all_lowered.get(row["name"])
        compute = requested_compute(recipe.of_layer(row["name"]), target.float_arithmetic)
        became = "" if floating or lowered is None else _became(lowered)
        executes = NOT_READ if found is None else f"{found.compute} ({found.operator})"
        layers.append(
            {
                "name": row["name"],
                "part": row["part"],
                "requested": FLOAT if floating else f"{row['requested']}: {compute}",
                "executed": executes,
                "agrees": _agrees(floating, compute, found),
                "placed": not floating and _placed(lowered, found),
                "sqnr_db": None if decibels is None else round(decibels, 2),
                "group_size": None if floating else row["group_size"],
                "rank": None if floating else row["rank"],
                "skipped_because": row["skip"],
                "lowered": None if lowered is None else asdict(lowered),
                "notes": [note for note in (row["grouping"], row["ranking"], *row.get("remarks", ()), became) if note],
                "output_error": row.get("output_error"),
                "damping": row.get("damping"),
                "fp16_bytes": row["fp16_bytes"],
                "stored_bytes": row.get("stored_bytes", row["fp16_bytes"]),
            }
        )
    return layers


def _became(lowered: LoweredLayer) -> str:
    """What lowering made of a layer, and why, in words."""
    why = f" ({lowered.reason})" if lowered.reason else ""
    branch = f", low-rank branch {lowered.branch}" if lowered.branch else ""
    branch += f" to rank {lowered.kept_rank}, the rest folded" if lowered.kept_rank else ""
    error = "" if lowered.fold_error is None else f" with an error of {percent(lowered.fold_error)}"
    return f"lowered to {lowered.compute}{why}{branch}{error}"


def _kernels(measured: Measured) -> dict[str, dict[str, Any]] | None:
    """What the GPU launched, by part and kind."""
    if measured.kernels is None:
        return None
    return {part: {kind: asdict(own) for kind, own in kinds.items()} for part, kinds in measured.kernels.items()}


def _folded(layers: list[dict[str, Any]]) -> dict[str, Any] | None:
    """What folding low-rank branches into INT8 weights costs; None where none is."""
    errors = {layer["name"]: layer["lowered"]["fold_error"] for layer in layers if layer["lowered"] is not None}
    told = {name: error for name, error in errors.items() if error is not None}
    worst = max(told, key=told.__getitem__, default=None)
    return None if worst is None else {"layers": len(told), "largest_error": told[worst], "layer": worst}


def _engine_log(out: OutputDir, target: Target) -> list[dict[str, Any]]:
    """What was said while each engine was built; paths are those in the output directory."""
    return [
        {
            "engine": remarks.engine.relative_to(out.path).as_posix(),
            "warnings": list(remarks.warnings[:MOST_WARNINGS]),
            "more_warnings": len(remarks.warnings[MOST_WARNINGS:]),
            "log": remarks.log.relative_to(out.path).as_posix(),
        }
        for remarks in target.remarks(out.path / "engines" / target.folder)
    ]


def _agrees(floating: bool, compute: str, found: Executed | None) -> bool:
    """The layer executes what was requested; a float layer, whose kernels are not all told, at least no INT8."""
    if floating:
        return found is None or not found.compute.startswith("INT")
    return found is not None and found.compute == compute


def _placed(lowered: LoweredLayer | None, found: Executed | None) -> bool:
    """samq lowered the layer to something else than was requested, for a reason that it tells, and so it is executed.

    Of a layer in FP16 within a fused region, whose inside TensorRT does not tell, FP16 at the region's edges is enough:
    there is no Q/DQ at it.
    """
    if lowered is None or not lowered.reason or found is None:
        return False
    told = {lowered.compute, inside_region("FP16")} if lowered.compute == FLOAT_GEMM else {lowered.compute}
    return set(found.compute.split(" and ")) <= told  # several GEMMs of one layer, see `samq.engines.base.together`


def _sizes(out: OutputDir, target: Target, quantized: list[dict[str, Any]]) -> dict[str, Any]:
    folder = out.path / "onnx"
    files = {
        "onnx": [folder / f"{part}.onnx" for part in PARTS],
        "onnx_fp16": [folder / "fp16" / f"{part}.onnx" for part in PARTS],
        "onnx_fp32": [folder / "fp32" / f"{part}.onnx" for part in PARTS],
        "engine": target.files(out.path / "engines" / target.folder),
    }
    sizes: dict[str, Any] = {f"{kind}_bytes": sum(map(file_bytes, paths)) for kind, paths in files.items()}
    before = sum(layer["fp16_bytes"] for layer in quantized)
    after = sum(layer["stored_bytes"] for layer in quantized)
    return sizes | {
        "quantized_layers": len(quantized),
        "quantized_layers_fp16_bytes": before,
        "quantized_layers_bytes": after,
        "quantized_layers_ratio": after / before,
        "file_ratio": sizes["onnx_bytes"] / sizes["onnx_fp16_bytes"],
    }
