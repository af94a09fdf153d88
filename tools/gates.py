"""Gates: what a user asks of the result, and the error that ends a job which misses it."""

from __future__ import annotations

from typing import Any

from samq.errors import AccuracyGateMissed, SpeedGateMissed, UsageError
from samq.tools.job import Data

ACCURACY_GATE, SPEED_GATE = "--min-relative-miou", "--min-speedup"

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
    asked = []
    if least_accuracy is not None:
        accuracy = report["accuracy"]
        truth = accuracy["miou_baseline"] is not None
        measure = "relative mIoU" if truth else "agreement with the baseline (no ground truth)"
        asked.append((ACCURACY_GATE, measure, least_accuracy, accuracy["miou_relative" if truth else "agreement_iou"]))
    if least_speedup is not None:
        asked.append((SPEED_GATE, "speedup", least_speedup, report["latency"]["speedup"]))
    return [
        {
            "option": option,
            "gate": measure,
            "asked": least,
            "reached": reached,
            "passed": reached is not None and reached >= least,
        }
        for option, measure, least, reached in asked
    ]


def missed_gate(report: dict[str, Any]) -> AccuracyGateMissed | SpeedGateMissed | None:
    """The error to end with when a gate is missed, accuracy before speed."""
    for gate in report.get("gates", ()):
        if not gate["passed"]:
            shown = "unknown" if gate["reached"] is None else f"{gate['reached']:.4f}"
            message = f"{gate['gate']} is {shown}, below {gate['option']} {gate['asked']}"
            return AccuracyGateMissed(message) if gate["option"] == ACCURACY_GATE else SpeedGateMissed(message)
    return None
