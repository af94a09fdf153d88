"""Weights that a session unpacks when it is made: folded by a real one, and as small in the file as packed ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from exported import canonical, float_model, quantized
from small_model import recipe_of
from test_linear import WEIGHTS_ONLY, codes, filled

from samq.calib.parts import IMAGE_ENCODER, MASK_DECODER
from samq.engines.onnxruntime_cuda import BIAS_FUSION, CPU, executed_by
from samq.export.graph import LAYER_KEY, producer
from samq.export.lower_onnxruntime_cuda import Weights, lower_for_onnxruntime_cuda
from samq.export.parts import quantized_part, save_part
from samq.export.trace import StaticShape, trace
from samq.export.unpack_at_load import FEW_ROWS
from samq.quant.layers import LayerCodes

AS_ON_CUDA = {"providers": [CPU], "disabled_optimizers": [BIAS_FUSION]}


def as_optimized(path: Path, folder: Path) -> onnx.ModelProto:
    """What a session makes of a file before it looks for a provider's kernels."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    ort.InferenceSession(str(path), options, **AS_ON_CUDA)
    return onnx.load(folder / "optimized.onnx")


def saved(model: ir.Model, path: Path) -> Path:
    save_part(lower_for_onnxruntime_cuda(model).model, path)
    return path


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize(("bits", "signed", "group"), WEIGHTS_ONLY)
def test_a_session_folds_the_weight_of_the_simulation(
    bits: int, signed: bool, group: int, rank: int, tmp_path: Path
) -> None:
    layer = codes(bits, signed, group, rank=rank)
    model = as_optimized(saved(filled(layer), tmp_path / "layer.onnx"), tmp_path)
    assert {node.op_type for node in model.graph.node} <= {"Cast", "MatMul", "Add"}
    (weight,) = [onnx.numpy_helper.to_array(t) for t in model.graph.initializer if len(t.dims) == 2]
    np.testing.assert_allclose(weight.astype(np.float32), expected_weight(layer), rtol=2**-10, atol=2**-24)


def expected_weight(layer: LayerCodes) -> np.ndarray[Any, Any]:
    """[K, N] of the simulation, the branch in it."""
    weight = layer.weight.dequantize().T
    if layer.branch is not None:
        weight = weight + layer.branch.down.T.float() @ layer.branch.up.T.float()
    return weight.numpy()


@pytest.mark.parametrize("preset", ["int4_w4only_rtn", "int4_svdquant"])
def test_the_report_says_when_weights_were_dequantized(preset: str, tmp_path: Path) -> None:
    path = saved(canonical(recipe_of(preset), IMAGE_ENCODER), tmp_path / "encoder.onnx")
    options = ort.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
    execution = executed_by(ort.InferenceSession(str(path), options, **AS_ON_CUDA), path, CPU)
    bits = 4 if preset == "int4_w4only_rtn" else 8
    layers = {name for name in quantized(recipe_of(preset)).codes if name.startswith("vision_encoder.")}
    assert execution.layers.keys() == layers
    told = {executed.compute.rpartition(", ")[0] for executed in execution.layers.values()}
    assert told == {f"INT{bits} weights, dequantized at load"}


def test_a_session_that_folds_nothing_is_told(tmp_path: Path) -> None:
    path = saved(filled(codes(4, True, 16)), tmp_path / "layer.onnx")
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
    execution = executed_by(ort.InferenceSession(str(path), options, **AS_ON_CUDA), path, CPU)
    (executed,) = execution.layers.values()
    assert executed.compute.startswith("INT4 weights, dequantized at every run, ")


def test_the_file_stays_small(tmp_path: Path) -> None:
    """Beside packed ones of the same codes."""
    sizes = {}
    for weights in get_args(Weights):
        path = tmp_path / f"{weights}.onnx"
        save_part(lower_for_onnxruntime_cuda(filled(codes(4, True, 64, sizes=(256, 512))), weights=weights).model, path)
        sizes[weights] = path.stat().st_size
    assert sizes["dequantized at load"] < sizes["packed"] + 4096 < 0.5 * sizes["dequantized"]


def test_layers_of_few_rows_stay_packed() -> None:
    """The decoder's for single tokens; its layers over the image's tokens do not."""
    weights = quantized(recipe_of("int4_w4only_rtn"))
    skeleton = trace(float_model(), MASK_DECODER, StaticShape(prompts=1, points=1))
    lowered = lower_for_onnxruntime_cuda(quantized_part(skeleton, weights.model, weights.codes))
    packed = [rows_of(node) for node in lowered.model.graph if node.op_type == "MatMulNBits"]
    unpacked = [
        rows_of(node)
        for node in lowered.model.graph
        if node.op_type == "MatMul" and not str(node.name).startswith(f"{node.metadata_props.get(LAYER_KEY)}/weight")
        if producer(node.inputs[1], "Cast") is not None
    ]
    assert max(packed) <= FEW_ROWS < min(unpacked)
    assert [done.count for done in lowered.rewrites if done.name == "unpack_at_load"] == [len(unpacked)]
    assert len(lowered.rewrites[-1].refused) == len(packed)


def rows_of(node: ir.Node) -> int:
    """Rows of the left operand."""
    value = node.inputs[0]
    assert value is not None
    assert value.shape is not None
    return int(np.prod(value.shape.numpy()[:-1]))
