"""Gates, and the words of the report."""

from __future__ import annotations

from typing import Any

import pytest

from samq.errors import AccuracyGateMissed, SpeedGateMissed
from samq.quant.config import load_recipe
from samq.tools.gates import branches_needed, judge, missed_gate, slower_than_baseline
from samq.tools.targets import requested_compute


def _report(
    relative: float | None, agreement: float | None, speedup: float, truth: float | None = 0.8
) -> dict[str, Any]:
    accuracy = {"miou_baseline": truth, "miou_relative": relative, "agreement_iou": agreement}
    return {"accuracy": accuracy, "latency": {"speedup": speedup}}


@pytest.mark.parametrize(
    ("report", "asked", "expected", "words"),
    [
        (_report(0.97, 0.99, 1.1), (0.97, 1.1), None, ""),
        (_report(0.97, 0.99, 1.1), (0.98, None), AccuracyGateMissed, "relative mIoU is 0.9700"),
        (_report(0.97, 0.99, 1.1), (None, 1.2), SpeedGateMissed, "speedup is 1.1000"),
        (_report(0.97, 0.99, 1.1), (0.98, 1.2), AccuracyGateMissed, "--min-relative-miou 0.98"),
        (_report(None, 0.95, 1.1, truth=None), (0.96, None), AccuracyGateMissed, "agreement"),
        (_report(None, 0.99, 1.1, truth=0.0), (0.5, None), AccuracyGateMissed, "unknown"),
        (_report(float("nan"), 0.99, 1.1), (0.5, None), AccuracyGateMissed, "relative mIoU"),
    ],
)
def test_gates(report: dict[str, Any], asked: tuple[Any, Any], expected: type[Exception] | None, words: str) -> None:
    report["gates"] = judge(report, asked)
    missed = missed_gate(report)
    assert missed is None if expected is None else type(missed) is expected
    assert words in str(missed)
    assert len(report["gates"]) == sum(value is not None for value in asked)


@pytest.mark.parametrize(
    ("report", "least", "words"),
    [
        (_report(0.9951, 0.9, 1.0), None, None),
        (_report(0.9949, 0.999, 1.0), None, "relative mIoU is 0.9949 with low-rank branches folded, below 0.995"),
        (_report(0.96, 0.9, 1.0), 0.95, None),
        (_report(None, 0.97, 1.0, truth=None), 0.98, "agreement with the baseline (no ground truth) is 0.9700"),
        (_report(None, None, 1.0, truth=None), 0.0, "is unknown"),
        (_report(float("nan"), 0.9, 1.0), 0.5, "is nan"),
    ],
)
def test_branches_stay_folded_where_that_is_accurate_enough(
    report: dict[str, Any], least: float | None, words: str | None
) -> None:
    needed = branches_needed(report, (least, None))
    assert needed is None if words is None else words in str(needed)


@pytest.mark.parametrize(
    ("speedup", "least", "warned"),
    [(0.90, None, True), (0.996, None, False), (1.2, None, False), (0.90, 0.8, True), (0.90, 1.0, False)],
)
def test_a_slower_engine_is_warned_of_unless_a_missed_gate_says_it(
    speedup: float, least: float | None, warned: bool
) -> None:
    latency = {"baseline_ms": 9.0, "quantized_ms": 10.0, "speedup": speedup, "baseline": "FP32"}
    told = slower_than_baseline(latency, (None, least))
    assert (told is not None) == warned
    assert told is None or ("10 ms against 9 ms" in told and "--min-speedup" in told)


def test_what_an_engine_must_execute_follows_the_format() -> None:
    assert requested_compute(load_recipe("int4_svdquant")) == "INT8 GEMM"
    assert requested_compute(load_recipe("int8_w8a8")) == "INT8 GEMM"
    assert requested_compute(load_recipe("int4_w4only")) == "INT4 weights, FP32 arithmetic"
    assert requested_compute(load_recipe("int4_w4only"), "FP16") == "INT4 weights, FP16 arithmetic"
