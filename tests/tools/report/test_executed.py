"""Which layers of ONNX Runtime on CUDA are executed as lowering says, and which are a misfit all the same."""

from __future__ import annotations

import pytest

from samq.engines.base import Executed
from samq.export.lower_onnxruntime_cuda import UNPACKED
from samq.export.lowered_layer import LoweredLayer
from samq.tools.report.build import _placed

LOWERED = LoweredLayer("INT4 weights, dequantized at load, FP16 GEMM", UNPACKED)


@pytest.mark.parametrize(
    ("compute", "told"),
    [
        (LOWERED.compute, True),
        ("INT4 weights, dequantized at every run, FP16 GEMM", False),
        (f"{LOWERED.compute}, on the CPU", False),
        (f"{LOWERED.compute} and FP16 GEMM", False),
        ("FP16 GEMM", False),
        (None, False),
    ],
)
def test_what_is_executed_as_lowered_is_no_misfit(compute: str | None, told: bool) -> None:
    found = None if compute is None else Executed(compute, "MatMul")
    assert _placed(LOWERED, found) == told
    assert not _placed(None, found), "it was lowered to what was requested, as far as is known"
