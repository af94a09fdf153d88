"""The verdict: what was asked, what was achieved, and in which state that leaves the job."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from samq.engines.kernels import GEMM
from samq.tools.gates import ACCURACY_GATE, SPEED_GATE, is_as_fast
from samq.tools.half_precision import BROKEN, DIFFERS
from samq.tools.report.units import counted, data_size, joined, milliseconds, number, percent

FLOAT = "float"
NAMED = 3  # layers, of those that execute something else
PASSED, MISSED, WARNING, UNKNOWN, PLAIN = "passed", "missed", "warning", "unknown", "plain"


@dataclass(frozen=True)
class Claim:
    """One line of the verdict.

    Args:
        what: what it is about.
        asked: in words.
        achieved: the figure, short.
        of: what the figure is, with its unit.
        detail: the figures behind it.
        state: passed or missed (of gates and of what was requested), warning, unknown, or plain (nothing was asked).
    """

    what: str
    asked: str
    achieved: str
    of: str
    detail: str
    state: str


def claims(report: dict[str, Any]) -> list[Claim]:
    """Accuracy, size, speed, and what was executed."""
    return [_accuracy(report), _size(report), _speed(report), _executed(report)]


def headline(report: dict[str, Any]) -> tuple[str, str]:
    """The job's state, and a sentence on it."""
    gates, misfits, placed = report["gates"], len(report["disagreements"]), _placed(report)
    missed = [gate for gate in gates if not gate["passed"]]
    half = report.get("half_precision")
    differ = f"{counted(misfits, 'layer')} {'does' if misfits == 1 else 'do'} not execute what was requested"
    if half is not None and half["state"] == BROKEN:
        return MISSED, f"The FP16 baseline is none: {agreement_with_fp32(half)}"
    if missed:
        told = (f"{gate['gate']} {number(gate['reached'])}, asked for {gate['asked']:g}" for gate in missed)
        return MISSED, f"Missed: {joined(told)}"
    if half is not None and half["state"] == DIFFERS:
        return (
            WARNING,
            f"{'Every gate passed, but the' if gates else 'The'} FP16 baseline differs: {agreement_with_fp32(half)}",
        )
    if misfits:
        return WARNING, f"{'Every gate passed, but ' if gates else ''}{differ}"
    if gates:
        return PASSED, f"Passed: every gate; {placed}" if placed else "Passed: everything that was asked for"
    if not report["accuracy"]["count"]:
        return UNKNOWN, "Built; accuracy was not measured"
    return PLAIN, f"Built{f'; {placed}' if placed else ' as requested'}; no gate was set"


def verdict(report: dict[str, Any]) -> str:
    """A few sentences as a Markdown list: accuracy, size, speed, misfits, gates."""
    accuracy, size, latency, placed = report["accuracy"], report["size"], report["latency"], _placed(report)
    lines = []
    if accuracy["miou_relative"] is not None:
        lines.append(
            f"Relative mIoU {accuracy['miou_relative']:.4f} ({accuracy['miou_baseline']:.4f} → "
            f"{accuracy['miou_quantized']:.4f}, {accuracy['count']} prompts)."
        )
    elif accuracy["agreement_iou"] is not None:
        lines.append(f"Masks agree with the baseline's at IoU {accuracy['agreement_iou']:.4f} (no ground truth).")
    half = report.get("half_precision")
    if half is not None:
        lines.append(f"FP16 baseline ({half['state']}): {agreement_with_fp32(half)}.")
    lines += [f"Lacks {line}." for line in report["lacks"]]
    lines.append(
        f"{size['quantized_layers']} layers quantized, to {size['quantized_layers_ratio']:.3f} of their FP16 bytes; "
        f"ONNX files at {size['file_ratio']:.3f} of FP16."
    )
    lines.append(speeds(latency))
    if report["disagreements"]:
        lines.append(_misfits(report))
    elif not placed:
        lines.append("Every quantized layer executes what was requested.")
    if placed:
        lines.append(f"{placed[0].upper()}{placed[1:]}.")
    for gate in report["gates"]:
        state = "passed" if gate["passed"] else "MISSED"
        reached = "unknown" if gate["reached"] is None else f"{gate['reached']:.4f}"
        lines.append(f"Gate {gate['gate']} ≥ {gate['asked']}: {state} ({reached}).")
    return "\n".join(f"- {line}" for line in lines)


def agreement_with_fp32(half: dict[str, Any]) -> str:
    """How a baseline in FP16 agrees with FP32, from the report's `half_precision`."""
    if half["relative_error"] is None:
        return "its image embeddings are not finite"
    masks = "no masks to compare"
    if half["mask_iou"] is not None:
        mean, lowest = number(half["mask_iou"]), number(half["lowest_mask_iou"])
        masks = f"its masks agree with FP32's at IoU {mean}, the worst at {lowest}"
    seen = f"{counted(half['prompts'], 'prompt')}, {counted(half['images'], 'image')}"
    return (
        f"{masks} ({seen}); embeddings differ by {percent(half['relative_error'])}, cosine {number(half['cosine'], 6)}"
    )


def folded_branches(report: dict[str, Any]) -> str:
    """What folding low-rank branches costs, from the report's `folded`; empty where none is folded."""
    folded = report.get("folded")
    if folded is None:
        return ""
    layers, error = counted(folded["layers"], "layer"), percent(folded["largest_error"])
    return (
        f"Low-rank branches are folded, whole or in part, into the INT8 weights of {layers}; the largest error of that "
        f"is {error} of the weight, in {folded['layer']}."
    )


def executes_as_told(layer: dict[str, Any]) -> bool:
    """A layer of the report executes what was requested, or what samq made of that and said so."""
    return bool(layer["agrees"] or layer.get("placed"))


def placed_layers(report: dict[str, Any]) -> str:
    """What samq executes otherwise than requested, and why; empty where nothing is."""
    names = set(report.get("placed", []))
    lowered = Counter(
        (layer["lowered"]["compute"], layer["lowered"]["reason"].partition("; FP16 rounds")[0])
        for layer in report["layers"]
        if layer["name"] in names
    )
    return " ".join(
        f"{counted(count, 'layer')} lowered to {compute}: {why}." for (compute, why), count in lowered.items()
    )


def kernel_rows(report: dict[str, Any]) -> list[tuple[str, str, int, float]]:
    """(part, kind, launches, microseconds) of the kernels that a GPU launched; empty where none were traced."""
    return [
        (part, kind, own["launches"], own["microseconds"])
        for part, kinds in (report.get("kernels") or {}).items()
        for kind, own in kinds.items()
    ]


def products(report: dict[str, Any]) -> str:
    """The GEMM kernels that a GPU launched, by their numbers; empty where none were traced."""
    totals: Counter[str] = Counter()
    for _, kind, launches, _ in kernel_rows(report):
        if kind.endswith(GEMM):
            totals[kind] += launches
    if not totals:
        return ""
    told = joined([f"{count} × {kind}" for kind, count in totals.most_common()])
    return f"by the names of its kernels the GPU runs {told}"


def _gate(report: dict[str, Any], option: str, otherwise: str) -> tuple[str, str]:
    """What a gate asked for, and its state; without a gate, the state `otherwise`."""
    for gate in report["gates"]:
        if gate["option"] == option:
            return f"≥ {gate['asked']:g}", PASSED if gate["passed"] else MISSED
    return "no gate", otherwise


def _accuracy(report: dict[str, Any]) -> Claim:
    accuracy = report["accuracy"]
    asked, state = _gate(report, ACCURACY_GATE, PLAIN)
    if not accuracy["count"]:
        reason = "no evaluation images" if accuracy["count"] is None else "no object in the evaluation images"
        return Claim("Accuracy", asked, "unknown", "", reason, UNKNOWN)
    seen = f"{counted(accuracy['prompts']['count'], 'prompt')}, {counted(accuracy['prompts']['images'], 'image')}"
    if accuracy["miou_baseline"] is None:
        reached = number(accuracy["agreement_iou"])
        return Claim("Accuracy", asked, reached, "mask IoU with the baseline", f"{seen}, no ground truth", state)
    figures = f"mIoU {number(accuracy['miou_baseline'])} → {number(accuracy['miou_quantized'])}"
    if accuracy["miou_relative"] is None:
        return Claim("Accuracy", asked, "unknown", "", f"{figures}; {seen}", state if state == MISSED else UNKNOWN)
    reached = number(accuracy["miou_relative"])
    return Claim("Accuracy", asked, reached, "of the baseline's mIoU", f"{figures}; {seen}", state)


def _size(report: dict[str, Any]) -> Claim:
    figures = report["size"]
    before, after = (data_size(figures[key]) for key in ("quantized_layers_fp16_bytes", "quantized_layers_bytes"))
    return Claim(
        "Size",
        f"{report['format']} in {counted(figures['quantized_layers'], 'layer')}",
        number(figures["quantized_layers_ratio"], 3),
        "of these layers' FP16 bytes",
        f"{before} → {after}; ONNX files {number(figures['file_ratio'], 3)} of FP16",
        PLAIN,
    )


def speeds(latency: dict[str, Any]) -> str:
    """Both latencies and the faster one in a sentence; what two digits hide is no difference."""
    times = f"{milliseconds(latency['quantized_ms'])} against {milliseconds(latency['baseline_ms'])}"
    speedup = f"{latency['speedup']:.2f}"
    faster = "no difference" if speedup == "1.00" else "faster" if latency["speedup"] > 1 else "SLOWER"
    return f"{latency['engine']}: {times} ({speedup}× as fast as {latency['baseline']}: {faster})."


def _speed(report: dict[str, Any]) -> Claim:
    latency = report["latency"]
    asked, state = _gate(report, SPEED_GATE, PLAIN if is_as_fast(latency["speedup"]) else WARNING)
    figures = f"{milliseconds(latency['baseline_ms'])} → {milliseconds(latency['quantized_ms'])} an image and box"
    of = "as fast as the baseline" + ("" if is_as_fast(latency["speedup"]) else ": slower")
    return Claim("Speed", asked, f"{latency['speedup']:.2f}×", of, f"{figures}; baseline {latency['baseline']}", state)


def _executed(report: dict[str, Any]) -> Claim:
    quantized = [layer for layer in report["layers"] if layer["requested"] != FLOAT]
    misfits, placed = len(report["disagreements"]), len(report.get("placed", []))
    asked = joined(sorted({layer["requested"].partition(": ")[2] for layer in quantized})) if quantized else "nothing"
    detail = "read from the runtime's own graph" if not misfits else f"{counted(misfits, 'layer')} differ, listed below"
    chosen = f"{counted(placed, 'layer')} otherwise, as lowered" if placed else ""
    detail = "; ".join(filter(None, (detail, chosen, products(report))))
    reached = f"{len(quantized) - misfits - placed} of {len(quantized)}"
    state = WARNING if misfits else PLAIN if placed else PASSED
    return Claim("Executed", asked, reached, "layers as requested", detail, state)


def _placed(report: dict[str, Any]) -> str:
    """What is executed otherwise by samq's own choice, as a clause; empty where nothing is."""
    names = report.get("placed", [])
    if not names:
        return ""
    kinds = Counter(layer["lowered"]["compute"] for layer in report["layers"] if layer["name"] in names)
    told = joined([f"{counted(count, 'layer')} as {compute}" for compute, count in kinds.items()])
    return f"samq runs {told}, which report and lowering.json explain"


def _misfits(report: dict[str, Any]) -> str:
    """What layers execute instead of what was requested, and the names of a few."""
    names = report["disagreements"]
    kinds = Counter((layer["executed"], layer["requested"]) for layer in report["layers"] if layer["name"] in names)
    told = "; ".join(f"{count} × {executed} instead of {requested}" for (executed, requested), count in kinds.items())
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{len(names)} layers do not execute what was requested: {told} ({', '.join(names[:NAMED])}{more})."
