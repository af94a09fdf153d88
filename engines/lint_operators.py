"""The operators that each TensorRT importer takes, from the tables of its `docs/operators.md`.

trt8: 8.6-GA. trt10: 10.1-GA; later releases only add. trt11: the table of 10.15, as 11's was not at hand.
`INTEGERS` and `TRUTH_VALUES` are the operators whose data may be INT32 (with trt10, INT64) or BOOL; all but the logical
ones and DequantizeLinear take FP32 and FP16.
"""

from __future__ import annotations


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_SINCE_8 = _names(
    """
    Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization Cast Ceil Celu Clip Concat
    Constant ConstantOfShape Conv ConvTranspose Cos Cosh CumSum DepthToSpace DequantizeLinear Div Dropout Einsum Elu
    Equal Erf Exp Expand EyeLike Flatten Floor GRU Gather GatherElements GatherND Gemm GlobalAveragePool GlobalLpPool
    GlobalMaxPool Greater GreaterOrEqual GridSample GroupNormalization HardSigmoid HardSwish Identity If ImageScaler
    InstanceNormalization IsInf IsNaN LRN LSTM LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax Loop
    LpNormalization LpPool MatMul Max MaxPool Mean MeanVarianceNormalization Min Mod Mul Neg NonMaxSuppression NonZero
    Not OneHot Or PRelu Pad ParametricSoftplus Pow QuantizeLinear RNN RandomNormal RandomNormalLike RandomUniform
    RandomUniformLike Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin
    ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize ReverseSequence RoiAlign Round ScaledTanh Scan Scatter
    ScatterElements ScatterND Selu Shape Shrink Sigmoid Sign Sin Sinh Size Slice Softmax Softplus Softsign SpaceToDepth
    Split Sqrt Squeeze Sub Sum Tan Tanh ThresholdedRelu Tile TopK Transpose Trilu Unsqueeze Upsample Where Xor
    """
)
_SINCE_10 = _SINCE_8 | _names("CastLike DeformConv Gelu Hardmax Mish")
_SINCE_10_15 = _SINCE_10 | _names(
    "Attention BlackmanWindow HammingWindow HannWindow RMSNormalization RotaryEmbedding STFT TensorScatter"
)

OPERATORS: dict[str, frozenset[str]] = {"trt8": _SINCE_8, "trt10": _SINCE_10, "trt11": _SINCE_10_15}

_INTEGERS_8 = _names(
    """
    Abs Add ArgMax ArgMin AveragePool Cast Concat Constant DepthToSpace Div Equal Expand EyeLike Flatten Gather
    GatherElements GatherND Greater GreaterOrEqual Identity If IsNaN Less LessOrEqual Loop Max Mean Min Mod Mul Neg
    OneHot Pad Range Reshape ReverseSequence Scatter ScatterElements ScatterND Shape Shrink Sign Size Slice SpaceToDepth
    Split Squeeze Sub Sum Tile TopK Transpose Trilu Unsqueeze Where
    """
)
_INTEGERS_10 = (_INTEGERS_8 - {"AveragePool"}) | _names(
    """
    CastLike ConstantOfShape Gelu ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin
    ReduceProd ReduceSum ReduceSumSquare Relu
    """
)

INTEGERS: dict[str, frozenset[str]] = {"trt8": _INTEGERS_8, "trt10": _INTEGERS_10, "trt11": _INTEGERS_10}

_TRUTH_VALUES_8 = _names(
    """
    And Cast Concat Constant Expand EyeLike Flatten Gather GatherElements GatherND Identity If Loop Not OneHot Or
    Reshape ReverseSequence Shape Size Slice Split Squeeze Tile Transpose Trilu Unsqueeze Where Xor
    """
)
_TRUTH_VALUES_10 = _TRUTH_VALUES_8 | {"CastLike", "ConstantOfShape"}

TRUTH_VALUES: dict[str, frozenset[str]] = {
    "trt8": _TRUTH_VALUES_8,
    "trt10": _TRUTH_VALUES_10,
    "trt11": _TRUTH_VALUES_10,
}
