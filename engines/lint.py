"""Checks a lowered graph against what its TensorRT target takes, before a GPU is touched.

One table, `RULES`; each rule says where it is from. A rule finds what is wrong by name, one line each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from samq.engines import lint_nodes as nodes
from samq.engines import lint_quantizers as quantizers
from samq.engines.lint_nodes import Findings
from samq.errors import BadInput
from samq.export.tensorrt_targets import TensorRtTarget

Check = Callable[[ir.Model, TensorRtTarget], Findings]
ALL = ("trt8", "trt10", "trt11")


@dataclass(frozen=True)
class Rule:
    """One thing that a target asks of a graph.

    Args:
        name: short and unique.
        targets: that ask it.
        source: where that is written.
        check: yields the node (or value) and what is wrong with it.
    """

    name: str
    targets: tuple[str, ...]
    source: str
    check: Check


@dataclass(frozen=True)
class Violation:
    """A node (or value) that breaks a rule."""

    node: str
    rule: str
    message: str


def lint(model: ir.Model, target: TensorRtTarget) -> list[Violation]:
    """Everything that breaks a rule of the target, by rule and in graph order."""
    return [
        Violation(node, rule.name, message)
        for rule in RULES
        if target.name in rule.targets
        for node, message in rule.check(model, target)
    ]


def require_clean(model: ir.Model, target: TensorRtTarget) -> None:
    """Refuse a graph that breaks a rule.

    Raises:
        BadInput: the message names the first node, its rule and how many more there are.
    """
    found = lint(model, target)
    if found:
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise BadInput(
            f"{found[0].node} breaks {target.name}'s rule {found[0].rule}: {found[0].message}{more}; "
            f"export again with --target {target.name}"
        )


_IMPORTER = "onnx-tensorrt, QuantDequantLinearHelper"
_DOCS = "docs.nvidia.com/deeplearning/tensorrt"

RULES: tuple[Rule, ...] = (
    Rule("opset", ALL, "onnx-tensorrt 8.6 docs/operators.md: up to 17; 10.15: 9 to 24, samq writes 21", nodes.opset),
    Rule("flat", ALL, "samq's own: subgraphs would go unchecked", nodes.flat),
    Rule("names", ALL, "samq's own: layer precisions and reports go by node name", nodes.names),
    Rule("operator", ALL, "onnx-tensorrt docs/operators.md of 8.6, 10.1 and 10.15", nodes.operator),
    Rule(
        "operator-types", ALL, "onnx-tensorrt docs/operators.md of 8.6 and 10.1, column of types", nodes.operator_types
    ),
    Rule(
        "tensor-types", ALL, "onnx-tensorrt docs/operators.md: no UINT8 inside a network; no UINT4", nodes.tensor_types
    ),
    Rule("known-shapes", ALL, f"{_DOCS}: optimization profiles go by named sides of a known rank", nodes.known_shapes),
    Rule("folded", ALL, "samq's own: TensorRT 8.6 has no cubic Resize, and folding costs build time", nodes.folded),
    Rule("constant-axes", ALL, "onnx-tensorrt docs/operators.md: `axes` must be an initializer", nodes.axes_constant),
    Rule("int64-range", ("trt8",), "onnx-tensorrt 8.6, convertINT64 clamps", nodes.int64_range),
    Rule("whole-shape", ("trt8",), "onnx-tensorrt 8.6, Shape: reads no attributes", nodes.whole_shape),
    Rule("resize", ALL, "onnx-tensorrt docs/operators.md, Resize", nodes.resize),
    Rule(
        "layer-normalization", ALL, "TensorRT issue 4723: FP16 overflow; one node since 8.6", nodes.layer_normalization
    ),
    Rule(
        "explicit-zero-point",
        ("trt8",),
        f"{_IMPORTER} of 8.6: inputs.at(2) unconditionally",
        quantizers.explicit_zero_point,
    ),
    Rule("zero-point", ALL, f"{_IMPORTER}: all zeros, as many as scales", quantizers.zero_point),
    Rule(
        "scale",
        ALL,
        "NvInfer.h, IQuantizeLayer: the scale is a build-time constant and positive",
        quantizers.scale_constant,
    ),
    Rule("scale-type", ALL, f"{_IMPORTER}: read as float by 8.6, the output's type in 10", quantizers.scale_type),
    Rule(
        "input-scale",
        ALL,
        "NvInfer.h, IQuantizeLayer: activations cannot be quantized per channel",
        quantizers.input_scale,
    ),
    Rule("channel-axis", ALL, f"{_IMPORTER}: as many scales as output channels", quantizers.channel_axis),
    Rule(
        "int4-blocks", ("trt10", "trt11"), f"{_DOCS}, quantized-types-schemes.html: 64 or 128", quantizers.int4_blocks
    ),
    Rule(
        "int4-gemm",
        ("trt10", "trt11"),
        f"{_DOCS}, weight-only quantization: INT4 blocks with GEMM layers alone",
        quantizers.int4_gemm,
    ),
    Rule(
        "weight-matrix",
        ALL,
        "NvInfer.h, IDequantizeLayer: rooted at an IConstantLayer; 2-D to 10.6",
        quantizers.weight_matrix,
    ),
    Rule(
        "attention-product",
        ALL,
        "TensorRT issue 3724: no fused INT8 attention above 512 tokens, and SAM2 has 4096",
        quantizers.attention_products,
    ),
    Rule(
        "stored-codes", ("trt8",), "NvInfer.h of 8.6, IConstantLayer; onnxruntime issue 11535", quantizers.stored_codes
    ),
    Rule("fusable", ALL, f"{_DOCS}: Q/DQ fusion wants nothing between DequantizeLinear and MatMul", quantizers.fusable),
    Rule(
        "gemm-size",
        ALL,
        "ModelOpt 0.47, onnx/quantization/graph_utils.py: skips GEMMs with K or N below 16",
        quantizers.gemm_size,
    ),
    Rule(
        "shared-quantization", ALL, "samq's own: one Q/DQ for all GEMMs behind a LayerNormalization", quantizers.shared
    ),
)
