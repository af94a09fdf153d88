"""The report: one JSON object with every figure, and the same as Markdown for people.

A figure that could not be measured is null, and `lacks` says why.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime  # type: ignore[import-untyped]
import torch
import transformers

import samq
from samq.calib.parts import PARTS
from samq.engines.base import Executed
from samq.quant.config import Recipe
from samq.tools.job import Data, Job
from samq.tools.outdir import STAGES, OutputDir
from samq.tools.targets import Target, requested_compute

FLOAT = "float"


@dataclass(frozen=True)
class Measured:
    """What `validate` measured.

    Args:
        accuracy: from `samq.tools.evaluate.summarize`, None without evaluation images.
        latency: from `samq.tools.latency.measure_latency`, with the engine's name.
        sqnr: layer → dB; empty without evaluation images.
        executed: layer → what the runtime made of it.
    """

    accuracy: dict[str, Any] | None
    latency: dict[str, Any]
    sqnr: dict[str, float | None]
    executed: dict[str, Executed]


def build_report(
    out: OutputDir, job: Job, recipe: Recipe, data: Data, target: Target, measured: Measured
) -> dict[str, Any]:
    """Put together what the stages left in the output directory and what `validate` measured."""
    accuracy = measured.accuracy
    layers = _layers(out, requested_compute(recipe, target.float_arithmetic), measured)
    quantized = [layer for layer in layers if layer["requested"] != FLOAT]
    lacks = [] if accuracy is not None else [f"accuracy and SQNR: no evaluation images ({data.origin})"]
    if accuracy is not None and accuracy["miou_baseline"] is None:
        lacks.append("mIoU against ground truth: the evaluation images have no annotations")
    elif accuracy is not None and accuracy["miou_relative"] is None:
        lacks.append("relative mIoU: the baseline's mIoU is 0")
    return {
        "samq": samq.__version__,
        "model": job.model,
        "engine": job.engine,
        "target": target.folder,
        "gates": [],
        "accuracy": accuracy or dict.fromkeys(_ACCURACY_KEYS),
        "size": _sizes(out, target, quantized),
        "latency": measured.latency,
        "layers": layers,
        "disagreements": [layer["name"] for layer in quantized if not layer["agrees"]],
        "evaluation_data": data.origin,
        "evaluation_unreadable": [] if data.evaluation is None else data.evaluation.unreadable,
        "calibration": {key: out.stages["quantize"][key] for key in ("calibration", "unreadable")},
        "lacks": lacks,
        "seconds": {stage: out.stages[stage]["seconds"] for stage in STAGES if stage in out.stages},
        "environment": environment(),
    }


_ACCURACY_KEYS = (
    "miou_baseline",
    "miou_quantized",
    "miou_relative",
    "agreement_iou",
    "iou_score_drift",
    "count",
    "by_kind",
    "prompts",
)


def environment() -> dict[str, Any]:
    """Machine and versions, for every figure that depends on them."""
    return {
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "onnxruntime": onnxruntime.__version__,
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def _layers(out: OutputDir, compute: str, measured: Measured) -> list[dict[str, Any]]:
    table = json.loads((out.path / "weights" / "layers.json").read_text(encoding="utf-8"))
    layers = []
    for row in table:
        found, decibels = measured.executed.get(row["name"]), measured.sqnr.get(row["name"])
        floating = row["skip"] is not None
        executes = FLOAT if found is None else f"{found.compute} ({found.operator})"
        layers.append(
            {
                "name": row["name"],
                "part": row["part"],
                "requested": FLOAT if floating else f"{row['requested']}: {compute}",
                "executed": "unknown" if found is None and not floating else executes,
                "agrees": floating or (found is not None and found.compute == compute),
                "sqnr_db": None if decibels is None else round(decibels, 2),
                "group_size": None if floating else row["group_size"],
                "rank": None if floating else row["rank"],
                "skipped_because": row["skip"],
                "notes": [note for note in (row["grouping"], row["ranking"], *row.get("remarks", ())) if note],
                "output_error": row.get("output_error"),
                "damping": row.get("damping"),
                "fp16_bytes": row["fp16_bytes"],
                "stored_bytes": row.get("stored_bytes", row["fp16_bytes"]),
            }
        )
    return layers


def _sizes(out: OutputDir, target: Target, quantized: list[dict[str, Any]]) -> dict[str, Any]:
    folder = out.path / "onnx"
    files = {
        "onnx": [folder / f"{part}.onnx" for part in PARTS],
        "onnx_fp16": [folder / "fp16" / f"{part}.onnx" for part in PARTS],
        "onnx_fp32": [folder / "fp32" / f"{part}.onnx" for part in PARTS],
        "engine": target.files(out.path / "engines" / target.folder),
    }
    sizes: dict[str, Any] = {f"{kind}_bytes": sum(map(_size, paths)) for kind, paths in files.items()}
    before = sum(layer["fp16_bytes"] for layer in quantized)
    after = sum(layer["stored_bytes"] for layer in quantized)
    return sizes | {
        "quantized_layers": len(quantized),
        "quantized_layers_fp16_bytes": before,
        "quantized_layers_bytes": after,
        "quantized_layers_ratio": after / before,
        "file_ratio": sizes["onnx_bytes"] / sizes["onnx_fp16_bytes"],
    }


def _size(path: Path) -> int:
    """Bytes of an ONNX file with its external data."""
    data = path.with_name(f"{path.name}.data")
    return path.stat().st_size + (data.stat().st_size if data.is_file() else 0)


def to_markdown(report: dict[str, Any]) -> str:
    """The report for people, verdict first."""
    sections = [
        f"# samq report\n\n{verdict(report)}",
        _accuracy_section(report),
        _table(
            ("size", "bytes"),
            [(name, f"{value:,}") for name, value in report["size"].items() if name.endswith("bytes")],
        ),
        f"Quantized layers take {report['size']['quantized_layers_ratio']:.3f} of their FP16 bytes; the ONNX files "
        f"{report['size']['file_ratio']:.3f} of the FP16 ONNX files.",
        _latency_section(report),
        _layer_section(report),
        _environment_section(report),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def verdict(report: dict[str, Any]) -> str:
    """A few sentences: accuracy, size, speed, gates, misfits."""
    accuracy, size, latency = report["accuracy"], report["size"], report["latency"]
    lines = []
    if accuracy["miou_relative"] is not None:
        lines.append(
            f"Relative mIoU {accuracy['miou_relative']:.4f} ({accuracy['miou_baseline']:.4f} → "
            f"{accuracy['miou_quantized']:.4f}, {accuracy['count']} prompts)."
        )
    elif accuracy["agreement_iou"] is not None:
        lines.append(f"Masks agree with the baseline's at IoU {accuracy['agreement_iou']:.4f} (no ground truth).")
    lines += [f"Lacks {line}." for line in report["lacks"]]
    lines.append(
        f"{size['quantized_layers']} layers quantized, to {size['quantized_layers_ratio']:.3f} of their FP16 bytes; "
        f"ONNX files at {size['file_ratio']:.3f} of FP16."
    )
    faster = "faster" if latency["speedup"] >= 1 else "SLOWER"
    lines.append(
        f"{latency['engine']}: {latency['quantized_ms']:.1f} ms against {latency['baseline_ms']:.1f} ms "
        f"({latency['speedup']:.2f}× as fast as {latency['baseline']}: {faster})."
    )
    misfits = report["disagreements"]
    lines.append(
        f"{len(misfits)} layers do not execute what was requested: {', '.join(misfits)}."
        if misfits
        else "Every quantized layer executes what was requested."
    )
    for gate in report["gates"]:
        state = "passed" if gate["passed"] else "MISSED"
        reached = "unknown" if gate["reached"] is None else f"{gate['reached']:.4f}"
        lines.append(f"Gate {gate['gate']} ≥ {gate['asked']}: {state} ({reached}).")
    return "\n".join(f"- {line}" for line in lines)


def _accuracy_section(report: dict[str, Any]) -> str:
    accuracy = report["accuracy"]
    if accuracy["count"] is None:
        return ""
    rows = [
        (
            kind,
            str(part["count"]),
            *(_number(part[key]) for key in ("miou_baseline", "miou_quantized", "miou_relative")),
            _number(part["agreement_iou"]),
            _number(part["iou_score_drift"]),
        )
        for kind, part in (("all", accuracy), *accuracy["by_kind"].items())
    ]
    head = ("prompts", "count", "mIoU FP32", "mIoU quantized", "relative", "agreement IoU", "IoU-score drift")
    source = f"Images: {report['evaluation_data']}. Prompts: {accuracy['prompts']['source']}."
    return f"## Accuracy\n\n{source}\n\n{_table(head, rows)}"


def _latency_section(report: dict[str, Any]) -> str:
    rows = [
        (name, f"{part['baseline_ms']:.2f}", f"{part['quantized_ms']:.2f}", f"{part['speedup']:.3f}")
        for name, part in (("together", report["latency"]), *((part, report["latency"][part]) for part in PARTS))
    ]
    return "## Latency, one image with one box, alternating\n\n" + _table(
        ("part", "baseline ms", "quantized ms", "speedup"), rows
    )


def _layer_section(report: dict[str, Any]) -> str:
    ordered = sorted(report["layers"], key=lambda layer: layer["agrees"])
    rows = [
        (
            layer["name"],
            layer["requested"],
            layer["executed"] + ("" if layer["agrees"] else " ⚠"),
            _number(layer["sqnr_db"], 1),
            str(layer["group_size"] or ""),
            str(layer["rank"] or ""),
            "; ".join(filter(None, [layer["skipped_because"], *layer["notes"]])),
        )
        for layer in ordered
    ]
    head = ("layer", "requested", "executed", "SQNR dB", "group", "rank", "notes")
    return f"## Layers\n\n{_table(head, rows)}"


def _environment_section(report: dict[str, Any]) -> str:
    facts = [f"{key} {value}" for key, value in report["environment"].items()]
    seconds = [f"{stage} {value:.1f} s" for stage, value in report["seconds"].items()]
    calibration = report["calibration"]
    lines = [
        f"Calibration: {calibration['calibration'] or 'none needed'}; unreadable: {len(calibration['unreadable'])}.",
        f"Unreadable evaluation images: {len(report['evaluation_unreadable'])}.",
        f"Stages: {', '.join(seconds)}.",
        f"Made by samq {report['samq']} on {', '.join(facts)}.",
    ]
    return "## How it was made\n\n" + "\n".join(lines)


def _number(value: float | None, digits: int = 4) -> str:
    return "—" if value is None else f"{value:.{digits}f}"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    cleaned = [tuple(cell.replace("|", "\\|").replace("\n", " ") for cell in row) for row in rows]
    lines = [head, tuple("---" for _ in head), *cleaned]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
