"""Gates: what a user asks of the result, and the error that ends a job which misses it."""

from __future__ import annotations

from typing import Any

from samq.errors import AccuracyGateMissed, SpeedGateMissed, UsageError
from samq.tools.half_precision import BROKEN, complaint
from samq.tools.job import Data

ACCURACY_GATE, SPEED_GATE = "--min-relative-miou", "--min-speedup"

LEAST_WITH_FOLDED_BRANCHES = 0.995
"""What `--low-rank auto` asks of folded branches where there is no accuracy gate."""

Gates = tuple[float | None, float | None]
"""Least relative mIoU and least speedup, or None."""


def check_gates_can_be_told(data: Data, gates: Gates) -> None:
    """Refuse an accuracy gate without evaluation images.

    Raises:
        UsageError: there are none.
    """
    if gates[0] is not None and data.evaluation is None:
        raise UsageError(f"{ACCURACY_GATE} cannot be checked without images: evaluation data is {data.origin}")


def judge(report: dict[str, Any], gates: Gates) -> list[dict[str, Any]]:
    """What was asked for and what was reached, accuracy first."""
    least_accuracy, least_speedup = gates
    asked: list[tuple[str, float, str, float | None, bool]] = []
    if least_accuracy is not None:
        measure, reached = _accuracy(report)
        asked.append(
            (ACCURACY_GATE, least_accuracy, measure, reached, reached is not None and reached >= least_accuracy)
        )
    if least_speedup is not None:
        speedup = report["latency"]["speedup"]
        asked.append((SPEED_GATE, least_speedup, "speedup", speedup, is_as_fast(speedup, least_speedup)))
    return [
        {
            "option": option,
            "gate": measure,
            "asked": least,
            "reached": reached,
            "passed": passed,
        }
        for option, least, measure, reached, passed in asked
    ]


def _accuracy(report: dict[str, Any]) -> tuple[str, float | None]:
    """What accuracy is measured by, and what was reached."""
    accuracy = report["accuracy"]
    if accuracy["miou_baseline"] is None:
        return "agreement with the baseline (no ground truth)", accuracy["agreement_iou"]
    return "relative mIoU", accuracy["miou_relative"]


def branches_needed(report: dict[str, Any], gates: Gates) -> str | None:
    """Why low-rank branches must not be folded, or None where the engine without them is accurate enough."""
    least = LEAST_WITH_FOLDED_BRANCHES if gates[0] is None else gates[0]
    measure, reached = _accuracy(report)
    if reached is not None and reached >= least:
        return None
    return f"{measure} is {_shown(reached)} with low-rank branches folded, below {least:g}"


def is_as_fast(speedup: float, least: float = 1.0) -> bool:
    """Whether a speedup reaches what is asked for, as it is or to the two digits that are shown."""
    return max(speedup, round(speedup, 2)) >= least


def slower_than_baseline(latency: dict[str, Any], gates: Gates) -> str | None:
    """A warning, or None where the speed gate is missed, which says it; a difference that two digits hide is none."""
    speedup = latency["speedup"]
    if is_as_fast(speedup) or (gates[1] is not None and not is_as_fast(speedup, gates[1])):
        return None
    return (
        f"the engine is slower than its baseline: {latency['quantized_ms']:g} ms against {latency['baseline_ms']:g} ms "
        f"({latency['speedup']:.2f}×, baseline {latency['baseline']}); {SPEED_GATE} 1 makes that an error"
    )


def _shown(reached: float | None) -> str:
    return "unknown" if reached is None else f"{reached:.4f}"


def missed_gate(report: dict[str, Any]) -> AccuracyGateMissed | SpeedGateMissed | None:
    """The error to end with when a gate is missed or the baseline is none, accuracy before speed."""
    half = report.get("half_precision")
    if half is not None and half["state"] == BROKEN:
        return AccuracyGateMissed(str(complaint(half)))
    for gate in report.get("gates", ()):
        if not gate["passed"]:
            message = f"{gate['gate']} is {_shown(gate['reached'])}, below {gate['option']} {gate['asked']}"
            return AccuracyGateMissed(message) if gate["option"] == ACCURACY_GATE else SpeedGateMissed(message)
    return None
