"""The report as Markdown, for terminals and code reviews."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from samq.calib.parts import PARTS
from samq.tools.report.units import counted, data_size, number, percent, seconds
from samq.tools.report.verdict import executes_as_told, folded_branches, kernel_rows, placed_layers, verdict


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
        _memory_section(report),
        _layer_section(report),
        _kernel_section(report),
        _engine_log_section(report),
        _environment_section(report),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _accuracy_section(report: dict[str, Any]) -> str:
    accuracy = report["accuracy"]
    if accuracy["count"] is None:
        return ""
    rows = [
        (
            kind,
            str(part["count"]),
            *(number(part[key]) for key in ("miou_baseline", "miou_quantized", "miou_relative")),
            number(part["agreement_iou"]),
            number(part["iou_score_drift"]),
        )
        for kind, part in (("all", accuracy), *accuracy["by_kind"].items(), *accuracy["by_size"].items())
    ]
    head = ("prompts", "count", "mIoU baseline", "mIoU quantized", "relative", "agreement IoU", "IoU-score drift")
    limits = accuracy["size_limits"]
    source = (
        f"Images: {report['evaluation_data']}. Prompts: {accuracy['prompts']['source']}. Small objects cover less than "
        f"{percent(limits['small_below'])} of the image, large ones {percent(limits['large_from'])} or more."
    )
    return f"## Accuracy\n\n{source}\n\n{_table(head, rows)}"


def _latency_section(report: dict[str, Any]) -> str:
    rows = [
        (name, f"{part['baseline_ms']:.2f}", f"{part['quantized_ms']:.2f}", f"{part['speedup']:.3f}")
        for name, part in (("together", report["latency"]), *((part, report["latency"][part]) for part in PARTS))
    ]
    return "## Latency, one image with one box, alternating\n\n" + _table(
        ("part", "baseline ms", "quantized ms", "speedup"), rows
    )


def _memory_section(report: dict[str, Any]) -> str:
    memory = report["memory"]
    rows = [(f"stage {stage}, whole process", data_size(peak)) for stage, peak in memory["stages"].items()]
    rows += [(f"engine, {key.removesuffix('_bytes')}", data_size(peak)) for key, peak in memory["engine"].items()]
    return "## Peak memory\n\n" + _table(("of", "resident"), rows)


def _layer_section(report: dict[str, Any]) -> str:
    ordered = sorted(report["layers"], key=executes_as_told)
    rows = [
        (
            layer["name"],
            layer["requested"],
            layer["executed"] + ("" if executes_as_told(layer) else " ⚠"),
            number(layer["sqnr_db"], 1),
            str(layer["group_size"] or ""),
            str(layer["rank"] or ""),
            "; ".join(filter(None, [layer["skipped_because"], *layer["notes"]])),
        )
        for layer in ordered
    ]
    head = ("layer", "requested", "executed", "SQNR dB", "group", "rank", "notes")
    return "\n\n".join(filter(None, ["## Layers", placed_layers(report), folded_branches(report), _table(head, rows)]))


def _kernel_section(report: dict[str, Any]) -> str:
    head = ("part", "kernels", "launches", "µs")
    rows = [(part, kind, str(count), f"{time:.1f}") for part, kind, count, time in kernel_rows(report)]
    return f"## Kernels of one image with one click\n\n{_table(head, rows)}" if rows else ""


def _engine_log_section(report: dict[str, Any]) -> str:
    lines = []
    for said in report["engine_log"]:
        count = len(said["warnings"]) + said["more_warnings"]
        lines.append(f"- {said['engine']}: {counted(count, 'warning')}; all that was said: {said['log']}")
        lines += [f"  - {warning}" for warning in said["warnings"]]
        lines += [f"  - and {said['more_warnings']} more"] if said["more_warnings"] else []
    return "## TensorRT's log\n\n" + "\n".join(lines) if lines else ""


def _environment_section(report: dict[str, Any]) -> str:
    facts = [f"{key} {value}" for key, value in report["environment"].items()]
    durations = [f"{stage} {seconds(value)}" for stage, value in report["seconds"].items()]
    calibration = report["calibration"]
    lines = [
        *(f"Command: `{entry['command']}` ({', '.join(entry['stages'])})." for entry in report["commands"]),
        f"Calibration: {calibration['calibration'] or 'none needed'}; unreadable: {len(calibration['unreadable'])}.",
        f"Unreadable evaluation images: {len(report['evaluation_unreadable'])}.",
        f"Stages: {', '.join(durations)}.",
        f"Made by samq {report['samq']} on {', '.join(facts)}.",
    ]
    return "## How it was made\n\n" + "\n".join(f"- {line}" for line in lines)


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    cleaned = [tuple(cell.replace("|", "\\|").replace("\n", " ") for cell in row) for row in rows]
    lines = [head, tuple("---" for _ in head), *cleaned]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
