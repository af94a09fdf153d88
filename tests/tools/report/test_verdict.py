"""The verdict: one state, one sentence, and what was asked beside what was achieved."""

from __future__ import annotations

from typing import Any

import pytest

from samq.tools.gates import judge
from samq.tools.report.verdict import MISSED, PASSED, PLAIN, UNKNOWN, WARNING, claims, folded_branches, headline, speeds

MISFIT = {"name": "b", "requested": "W4A8: INT8 GEMM", "agrees": False}


def _report(**changes: Any) -> dict[str, Any]:
    report = {
        "format": "W4A8",
        "accuracy": {
            "miou_baseline": 0.8,
            "miou_quantized": 0.72,
            "miou_relative": 0.9,
            "agreement_iou": 0.95,
            "count": 4,
            "prompts": {"count": 4, "images": 1},
        },
        "size": {
            "quantized_layers": 1,
            "quantized_layers_ratio": 0.25,
            "quantized_layers_fp16_bytes": 4_000_000,
            "quantized_layers_bytes": 1_000_000,
            "file_ratio": 0.5,
        },
        "latency": {"baseline_ms": 20.0, "quantized_ms": 10.0, "speedup": 2.0, "baseline": "FP32"},
        "layers": [{"name": "a", "requested": "W4A8: INT8 GEMM", "agrees": True}],
        "disagreements": [],
        "gates": [],
    }
    return report | changes


@pytest.mark.parametrize(
    ("gates", "changes", "state", "words"),
    [
        ((None, None), {}, PLAIN, "no gate"),
        ((0.9, 1.5), {}, PASSED, "everything"),
        ((0.95, 1.5), {}, MISSED, "relative mIoU 0.9000, asked for 0.95"),
        ((0.95, 2.5), {}, MISSED, "0.95 and speedup 2.0000, asked for 2.5"),
        ((None, 2.0), {"latency": {"speedup": 1.9951}}, PASSED, "everything"),
        ((None, 2.0), {"latency": {"speedup": 1.9949}}, MISSED, "speedup 1.9949, asked for 2"),
        ((None, None), {"disagreements": ["b"]}, WARNING, "1 layer does not"),
        ((0.9, None), {"disagreements": ["b", "c"]}, WARNING, "Every gate passed, but 2 layers do not"),
        ((0.95, None), {"disagreements": ["b"]}, MISSED, "asked for 0.95"),
        ((None, None), {"accuracy": {"count": None}}, UNKNOWN, "not measured"),
    ],
)
def test_the_headline_tells_the_worst(gates: Any, changes: dict[str, Any], state: str, words: str) -> None:
    report = _report(**changes)
    report["gates"] = judge(report, gates)
    found, sentence = headline(report)
    assert found == state
    assert words in sentence


def test_what_was_asked_stands_beside_what_was_achieved() -> None:
    report = _report()
    report["gates"] = judge(report, (0.95, 1.5))
    accuracy, size, speed, executed = claims(report)
    assert (accuracy.asked, accuracy.achieved, accuracy.state) == ("≥ 0.95", "0.9000", MISSED)
    assert accuracy.detail == "mIoU 0.8000 → 0.7200; 4 prompts, 1 image"
    assert (size.asked, size.achieved) == ("W4A8 in 1 layer", "0.250")
    assert "4.00 MB → 1.00 MB" in size.detail
    assert (speed.asked, speed.achieved, speed.state) == ("≥ 1.5", "2.00×", PASSED)
    assert (executed.asked, executed.achieved, executed.state) == ("INT8 GEMM", "1 of 1", PASSED)


def test_what_nobody_asked_for_is_neither_passed_nor_missed() -> None:
    slow = {"baseline_ms": 10.0, "quantized_ms": 20.0, "speedup": 0.5, "baseline": "FP32"}
    accuracy, _, speed, _ = claims(_report(latency=slow))
    assert (accuracy.asked, accuracy.state) == ("no gate", PLAIN)
    assert (speed.asked, speed.state) == ("no gate", WARNING)
    assert "slower" in speed.of


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        (20.0, 9.96, "9.96 ms against 20.0 ms (2.01× as fast as FP16: faster)."),
        (4.154, 4.146, "4.15 ms against 4.15 ms (1.00× as fast as FP16: no difference)."),
        (4.0, 5.0, "5.00 ms against 4.00 ms (0.80× as fast as FP16: SLOWER)."),
    ],
)
def test_a_difference_that_two_digits_hide_is_none(before: float, after: float, told: str) -> None:
    times = {"baseline_ms": before, "quantized_ms": after, "speedup": before / after}
    assert speeds({"engine": "tensorrt", "baseline": "FP16", **times}) == f"tensorrt: {told}"


def test_a_layer_that_executes_something_else_is_counted() -> None:
    report = _report(disagreements=["b"])
    report["layers"] = [*report["layers"], MISFIT]
    executed = claims(report)[-1]
    assert (executed.achieved, executed.state) == ("1 of 2", WARNING)


def test_unknown_accuracy_is_not_called_passed() -> None:
    unmeasured = claims(_report(accuracy={"count": None}))[0]
    assert (unmeasured.achieved, unmeasured.state) == ("unknown", UNKNOWN)
    hopeless = {"count": 1, "prompts": {"count": 1, "images": 1}, "miou_baseline": 0.0, "miou_quantized": 0.0}
    report = _report(accuracy=hopeless | {"miou_relative": None, "agreement_iou": 1.0})
    assert claims(report)[0].state == UNKNOWN
    report["gates"] = judge(report, (0.5, None))
    assert claims(report)[0].state == MISSED


def test_the_largest_error_of_folded_branches_is_one_sentence() -> None:
    assert folded_branches(_report()) == folded_branches(_report(folded=None)) == ""
    told = folded_branches(_report(folded={"layers": 1, "largest_error": 0.01234, "layer": "a"}))
    assert told.startswith("Low-rank branches are folded, whole or in part, into the INT8 weights of 1 layer;")
    assert told.endswith("the largest error of that is 1.23 % of the weight, in a.")


def test_matrix_products_are_counted_by_their_numbers() -> None:
    launched = {kind: {"launches": count, "microseconds": 1.0} for kind, count in (("FP16 GEMM", 2), ("INT8 GEMM", 97))}
    kernels = {"image_encoder": launched | {"other": {"launches": 9, "microseconds": 2.0}}, "mask_decoder": launched}
    told = claims(_report(kernels=kernels))[-1].detail
    assert told.endswith("; by the names of its kernels the GPU runs 194 × INT8 GEMM and 4 × FP16 GEMM")
    for without in ({"kernels": None}, {"kernels": {}}, {}):
        assert claims(_report(**without))[-1].detail == "read from the runtime's own graph"
