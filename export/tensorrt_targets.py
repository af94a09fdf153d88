"""What each TensorRT target takes. A target stands for all releases of its major version from its `least` one on.

Sources, by release: the importer (github.com/onnx/onnx-tensorrt: 8.6-GA `builtin_op_importers.cpp`, 10.1-GA
`onnxOpImporters.cpp`, and their `docs/operators.md`), the headers (github.com/NVIDIA/TensorRT, `include/NvInfer.h` of
release/8.6, 10.3, 10.16 and 11.1), and docs.nvidia.com/deeplearning/tensorrt (`quantized-types-*.html`).
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

SMALLEST_GEMM = 16  # inputs or outputs; INT8 tensor cores take K in steps of 16 and more


@dataclass(frozen=True)
class TensorRtTarget:
    """One target.

    Args:
        name: as on the command line.
        version: the release whose documents the facts are from, as messages call it.
        least: oldest release that samq's calls fit, major and minor.
        opset: highest ONNX opset.
        ir_version: of the ONNX file; that of the opset.
        strongly_typed: the engine takes its types from the graph, so FP16 arithmetic is written there. Otherwise the
            graph is float32 and the builder's FP16 and INT8 flags let TensorRT choose.
        stored_int8: INT8 constants may go into DequantizeLinear. Otherwise weights are float32 constants that
            QuantizeLinear reads, which the builder folds.
        explicit_zero_points: every Q/DQ needs a third input.
        int4_blocks: numbers of inputs that may share an INT4 scale, best first; none without INT4 weights.
        scale_type: of Q/DQ scales.
        widest_integer: INT64 constants are cast to it.
        integer_sums: Reduce operators take integers.
    """

    name: str
    version: str
    least: tuple[int, int]
    opset: int
    ir_version: int
    strongly_typed: bool
    stored_int8: bool
    explicit_zero_points: bool
    int4_blocks: tuple[int, ...]
    scale_type: ir.DataType
    widest_integer: ir.DataType
    integer_sums: bool


TRT8 = TensorRtTarget(
    name="trt8",
    version="8.6",
    least=(8, 6),
    opset=17,  # docs/operators.md: "up to Opset 17"
    ir_version=8,
    strongly_typed=False,  # NetworkDefinitionCreationFlag has EXPLICIT_BATCH alone
    # IConstantLayer documents real and INT32 constants, no INT8 ones (TensorRT 8 answered them with "invalid weights
    # type of Int8", github.com/microsoft/onnxruntime/issues/11535), and IQuantizeLayer per-channel scales of weights.
    stored_int8=False,
    explicit_zero_points=True,  # QuantDequantLinearHelper reads inputs.at(2) unconditionally
    int4_blocks=(),  # DataType ends at UINT8 and FP8
    scale_type=ir.DataType.FLOAT,  # QuantDequantLinearHelper reads scale values as float whatever their type
    widest_integer=ir.DataType.INT32,  # convertINT64 clamps to 32 bits
    integer_sums=False,  # docs/operators.md: Reduce* takes FP32 and FP16
)

TRT10 = TensorRtTarget(
    name="trt10",
    version="10",
    least=(10, 3),  # the oldest 10.x that the calls are held against (tests/data/trt_api)
    # docs/operators.md of 10.1 says 20, of 10.15 24; the 10.1 importer checks no upper limit and reads block scales and
    # output_dtype, which opset 21 brought.
    opset=21,
    ir_version=10,
    strongly_typed=True,  # NetworkDefinitionCreationFlag.STRONGLY_TYPED
    stored_int8=True,  # quantized-types-explicit-quantization.html, "Quantized Weights"
    explicit_zero_points=False,  # the 10.1 importer reads the third input if there is one
    int4_blocks=(128, 64),  # quantized-types-schemes.html: "The supported block sizes are {64, 128}"
    scale_type=ir.DataType.FLOAT16,  # addDequantize(…, scaleType): the scale's type is the output's
    widest_integer=ir.DataType.INT64,  # docs/Changelog.md, 9.0
    integer_sums=True,  # docs/operators.md of 10.1
)

TRT11 = TensorRtTarget(
    name="trt11",
    version="11",
    least=(11, 0),
    opset=21,  # as trt10; 11 only takes strongly typed networks
    ir_version=10,
    strongly_typed=True,
    stored_int8=True,
    explicit_zero_points=False,
    int4_blocks=(128, 64),  # as trt10; NvInfer.h of 11.1 still has INT4 block dequantization
    scale_type=ir.DataType.FLOAT16,
    widest_integer=ir.DataType.INT64,
    integer_sums=True,
)

TARGETS: dict[str, TensorRtTarget] = {target.name: target for target in (TRT8, TRT10, TRT11)}
