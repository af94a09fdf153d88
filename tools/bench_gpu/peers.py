"""Peers: what others make of the encoder that transformers exports, each by its own documented way.

| row                  | what the exported graph goes through                                                         |
|----------------------|----------------------------------------------------------------------------------------------|
| ONNX Runtime, naive  | `onnxruntime.transformers.float16`, then the optimizer that every session runs               |
| ONNX Runtime's tools | that, behind fusions that `onnxruntime.transformers` has for SAM2 or for BERT (see below)    |
| ModelOpt             | `modelopt.onnx.quantization`, INT8, calibrated with "max" on the images that are measured    |

The tools' recipe for SAM2 (onnxruntime/transformers/models/sam2/convert_to_onnx.py of 1.32) lets a session optimize the
graph at the basic level and then looks for patterns. That session now turns MatMul and Add into Gemm, in which the
patterns find nothing; so it is asked not to, and of the model types "sam2" and "bert" the one that fuses more is taken.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx

from samq.calib.parts import ENCODER_INPUTS
from samq.errors import MachineLacks
from samq.tools.bench_gpu.subject import Pixels
from samq.tools.quiet import quiet

MODELOPT = "ModelOpt is not installed; run `pip install samq[modelopt]`"
MODEL_TYPES = ("sam2", "bert")
KEPT_APART = ["ConstantSharing", "MatMulAddFusion"]  # the first as in the tools' own `optimize_model`
BASIC = 1


def with_fp16(exact: Path, path: Path) -> dict[str, Any]:
    """ONNX Runtime's own conversion to FP16, inputs and outputs in float32 like ours."""
    from onnxruntime.transformers.float16 import convert_float_to_float16  # type: ignore[import-untyped]

    onnx.save(convert_float_to_float16(onnx.load(exact), keep_io_types=True), path)
    return {}


def with_fusions(exact: Path, path: Path) -> dict[str, Any]:
    """The fusions of ONNX Runtime's tools, then FP16; returns what was fused."""
    from onnxruntime.transformers.optimizer import (  # type: ignore[import-untyped]
        optimize_by_fusion,
        optimize_by_onnxruntime,
    )

    basic = path.with_suffix(".basic.onnx")
    fused = {}
    with quiet():
        optimize_by_onnxruntime(str(exact), False, str(basic), BASIC, KEPT_APART)
        for kind in MODEL_TYPES:
            model = optimize_by_fusion(onnx.load(basic), kind)
            fused[kind] = model, {name: count for name, count in model.get_fused_operator_statistics().items() if count}
        kind, (model, counts) = max(fused.items(), key=lambda entry: sum(entry[1][1].values()))
        model.convert_float_to_float16(keep_io_types=True)
        onnx.save(model.model, path)
    basic.unlink()
    return {"fused": counts, "note": f"model type {kind} of ONNX Runtime's tools, which fused {_listed(counts)}"}


def with_modelopt(exact: Path, path: Path, pixels: Pixels, *, half: bool) -> dict[str, Any]:
    """ModelOpt's Q/DQ.

    Args:
        pixels: that it calibrates on.
        half: leave FP16 beside the Q/DQ, for strongly typed targets.

    Raises:
        MachineLacks: ModelOpt is not there.
    """
    try:
        from modelopt.onnx.quantization import quantize
    except ImportError as error:
        raise MachineLacks(MODELOPT) from error
    quantized = path.with_suffix(".int8.onnx")
    quantize(
        str(exact),
        quantize_mode="int8",
        calibration_data={ENCODER_INPUTS[0]: pixels},
        calibration_method="max",
        high_precision_dtype="fp16" if half else "fp32",
        output_path=str(quantized),
    )
    quantized.replace(path)
    return {}


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items())) or "nothing"
