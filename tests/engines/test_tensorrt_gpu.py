"""Building and running with the TensorRT at hand, on the GPU at hand: this interpreter's, or SAMQ_TENSORRT_PYTHON's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from exported import as_written
from lowered import feeds as prompts_of
from lowered import static_form
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from samq.calib.parts import MASK_DECODER
from samq.engines import tensorrt
from samq.engines.kernels import by_kind
from samq.engines.tensorrt_plan import BuildOptions, executed_layers, load_info
from samq.errors import BadInput, MachineLacks, UsageError
from samq.export.lower_tensorrt import lower_for_tensorrt
from samq.export.parts import save_part
from samq.export.tensorrt_rewrites import REWRITES
from samq.export.tensorrt_targets import TARGETS

pytestmark = pytest.mark.gpu

INPUTS, OUTPUTS, TOKENS = 64, 128, 256
WEIGHT = np.random.default_rng(0).standard_normal((INPUTS, OUTPUTS)).astype(np.float32)
SCALE = np.float32(1 / 32)
STEP = np.abs(WEIGHT).max(axis=0) / 127
CODES = np.round(WEIGHT / STEP).astype(np.int8)


@pytest.fixture(scope="module", autouse=True)
def _needs_tensorrt() -> None:
    try:
        tensorrt.about()
    except MachineLacks as error:
        pytest.skip(str(error))


def graph(path: Path, batch: int | str = 1, *, quantized: bool = False, weight: NDArray[np.float32] = WEIGHT) -> Path:
    """x [batch, tokens, 64] → MatMul → + labels [batch, 1, 1] (int64) → y, with Q/DQ around the product or without."""
    names = ("x", "weight")
    constants = {"weight": weight}
    nodes = []
    if quantized:
        constants = {"codes": CODES, "scale": np.array(SCALE), "step": STEP.astype(np.float32)}
        constants |= {"zero": np.array(0, np.int8), "zeros": np.zeros(OUTPUTS, np.int8)}
        nodes = [
            helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], "a.layer/QuantizeLinear"),
            helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["dq"], "a.layer/DequantizeLinear"),
            helper.make_node("DequantizeLinear", ["codes", "step", "zeros"], ["w"], "a.layer/weight", axis=1),
        ]
        names = ("dq", "w")
    nodes += [
        helper.make_node("MatMul", names, ["product"], "a.layer/MatMul"),
        helper.make_node("Cast", ["labels"], ["number"], "number", to=TensorProto.FLOAT),
        helper.make_node("Add", ["product", "number"], ["y"], "add"),
    ]
    made = helper.make_graph(
        nodes,
        "graph",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, TOKENS, INPUTS]),
            helper.make_tensor_value_info("labels", TensorProto.INT64, [batch, 1, 1]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, TOKENS, OUTPUTS])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def attention(path: Path, name: str) -> Path:
    """Each token attends to all of x [1, tokens, 64] → y: a region that TensorRT fuses."""
    nodes = [
        helper.make_node("Transpose", ["x"], ["keys"], f"{name}/Transpose", perm=[0, 2, 1]),
        helper.make_node("MatMul", ["x", "keys"], ["scores"], f"{name}/scores"),
        helper.make_node("Softmax", ["scores"], ["weights"], f"{name}/Softmax", axis=-1),
        helper.make_node("MatMul", ["weights", "x"], ["y"], f"{name}/MatMul"),
    ]
    x, y = (helper.make_tensor_value_info(value, TensorProto.FLOAT, [1, TOKENS, INPUTS]) for value in "xy")
    made = helper.make_graph(nodes, "graph", [x], [y])
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def feeds(batch: int) -> dict[str, NDArray[Any]]:
    x = np.random.default_rng(batch).standard_normal((batch, TOKENS, INPUTS)).astype(np.float32)
    return {"x": x, "labels": np.arange(batch, dtype=np.int64)[:, None, None]}


def expected(given: dict[str, NDArray[Any]]) -> NDArray[Any]:
    answer: NDArray[Any] = given["x"] @ WEIGHT + given["labels"]
    return answer


def relative_error(found: NDArray[Any], exact: NDArray[Any]) -> float:
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_a_static_plan(tmp_path: Path, cuda_graph: bool) -> None:
    plan, steps = tmp_path / "part.plan", []
    options = BuildOptions(timing_cache=str(tmp_path / "timings"), workspace_mib=256)
    info = tensorrt.build_engine(graph(tmp_path / "part.onnx"), plan, options, lambda *step: steps.append(step))
    assert info == load_info(plan)
    assert {"parse", "build", "inspect"} <= {phase for phase, _, _ in steps}
    assert len(list((tmp_path / "timings").iterdir())) == 1
    engine = tensorrt.open_engine(plan, cuda_graph=cuda_graph)
    given = feeds(1)
    for _ in range(3):
        assert relative_error(engine.run(given)["y"], expected(given)) < 2e-3
    times = engine.time(given, repeats=20)
    assert len(times) == 20
    assert min(times) > 0
    with pytest.raises(BadInput, match="the engine takes"):
        engine.run(feeds(2))
    engine.close()


def test_timings_serve_later_builds(tmp_path: Path) -> None:
    """Those of this process as a whole, though 8.6 does not read all of them back from the file."""
    options = BuildOptions(timing_cache=str(tmp_path / "timings"))
    x = feeds(1)["x"] / 4
    weights = np.exp(x @ x.transpose(0, 2, 1))
    exact = weights / weights.sum(axis=-1, keepdims=True) @ x
    sizes = []
    for name in ("first", "second"):
        plan = tmp_path / f"{name}.plan"
        info = tensorrt.build_engine(attention(tmp_path / f"{name}.onnx", name), plan, options)
        assert not [warning for warning in info.warnings if ".cache" in warning]
        engine = tensorrt.open_engine(plan)
        assert relative_error(engine.run({"x": x})["y"], exact) < 1e-2
        engine.close()
        (timings,) = (tmp_path / "timings").iterdir()
        sizes.append(timings.stat().st_size)
    assert sizes[0] == sizes[1]  # nothing is measured again, which has another size by luck alone
    before = timings.stat().st_mtime_ns
    tensorrt.build_apart(tmp_path / "first.onnx", tmp_path / "third.plan", options)
    assert timings.stat().st_mtime_ns > before


@pytest.mark.parametrize("quantized", [False, True])
def test_kernels_tell_what_they_compute_with(tmp_path: Path, quantized: bool) -> None:
    plan = tmp_path / "part.plan"
    tensorrt.build_engine(graph(tmp_path / "part.onnx", quantized=quantized), plan)
    engine = tensorrt.open_engine(plan)
    try:
        found = by_kind(engine.kernels(feeds(1)))
    except MachineLacks as error:
        pytest.skip(str(error))
    gemms = {"INT8 GEMM"} if quantized else {"FP16 GEMM", "TF32 GEMM"}  # 8.6 took TF32 once for so small a product
    assert gemms & found.keys(), found
    assert quantized or "INT8 GEMM" not in found
    engine.close()


def test_a_dynamic_plan(tmp_path: Path) -> None:
    path, plan = graph(tmp_path / "part.onnx", "batch"), tmp_path / "part.plan"
    with pytest.raises(UsageError, match="dynamic side 'batch'"):
        tensorrt.build_engine(path, plan, BuildOptions(ranges={}))
    tensorrt.build_engine(path, plan, BuildOptions(ranges={"batch": (1, 2, 4)}))
    engine = tensorrt.open_engine(plan, cuda_graph=True)
    assert engine.shapes["x"] == ("batch", TOKENS, INPUTS)
    for batch in (4, 1, 2, 2):
        given = feeds(batch)
        assert relative_error(engine.run(given)["y"], expected(given)) < 2e-3
    engine.close()


@pytest.mark.parametrize("fp16", [False, True])
def test_a_refittable_plan_gets_other_weights(tmp_path: Path, fp16: bool) -> None:
    plan, new = tmp_path / "old.plan", tmp_path / "new.plan"
    tensorrt.build_engine(graph(tmp_path / "old.onnx"), plan, BuildOptions(fp16=fp16, refittable=True))
    tensorrt.refit_engine(plan, graph(tmp_path / "new.onnx", weight=-2 * WEIGHT), new)
    given = feeds(1)
    for path, factor in ((plan, 1), (new, -2)):
        engine = tensorrt.open_engine(path)
        exact = factor * (given["x"] @ WEIGHT) + given["labels"]
        assert relative_error(engine.run(given)["y"], exact) < 2e-3
        engine.close()
    with pytest.raises(BadInput, match="other layers or shapes"):
        tensorrt.refit_engine(plan, graph(tmp_path / "other.onnx", quantized=True), new)


def test_a_mask_decoder_takes_any_prompts(tmp_path: Path) -> None:
    version, _ = tensorrt.about()
    lowered = lower_for_tensorrt(
        static_form("float", MASK_DECODER), TARGETS[f"trt{version.partition('.')[0]}"], rewrites=REWRITES
    )
    path, plan = tmp_path / "decoder.onnx", tmp_path / "decoder.plan"
    save_part(lowered.model, path)
    tensorrt.build_engine(path, plan, BuildOptions(float32=lowered.float32))
    engine, exact = tensorrt.open_engine(plan), static_form("float", MASK_DECODER)
    for sizes in ({"prompts": 1, "points": 1}, {"prompts": 1, "points": 2}, {"prompts": 16, "points": 16}):
        given = prompts_of(exact, sizes)
        found = engine.run(given)
        for name, expected in zip(engine.outputs, as_written(exact, given), strict=True):
            last = slice(-3, None)  # without the mask that is chosen by a threshold, which FP16 may cross
            assert relative_error(found[name][:, :, last], expected[:, :, last]) < 2e-2
    engine.close()


def test_int8_is_executed_and_told(tmp_path: Path) -> None:
    path, plan = graph(tmp_path / "part.onnx", quantized=True), tmp_path / "part.plan"
    tensorrt.build_engine(path, plan)
    assert executed_layers(plan)["a.layer"].compute == "INT8 GEMM"
    engine, given = tensorrt.open_engine(plan), feeds(1)
    codes = np.clip(np.round(given["x"] / SCALE), -128, 127)
    simulated = (codes * SCALE) @ (CODES * STEP) + given["labels"]
    assert relative_error(engine.run(given)["y"], simulated) < 2e-3
    engine.close()


def test_float32_is_kept_where_it_is_asked_for(tmp_path: Path) -> None:
    path, plan = graph(tmp_path / "part.onnx"), tmp_path / "part.plan"
    info = tensorrt.build_engine(path, plan, BuildOptions(float32=("a.layer/MatMul",)))
    assert executed_layers(plan)["a.layer"].compute == "FP32 GEMM"
    assert not [text for text in info.warnings if "no layer to keep" in text]


def test_fp16_at_the_ends_where_it_is_asked_for(tmp_path: Path) -> None:
    """As between the blocks of an engine; a strongly typed graph says its own types."""
    for quantized in (False, True):
        path, plan = graph(tmp_path / "part.onnx", quantized=quantized), tmp_path / "part.plan"
        info = tensorrt.build_engine(path, plan, BuildOptions(half_io=("x", "y")))
        types = {tensor.name: tensor.dtype for tensor in (*info.inputs, *info.outputs)}
        wanted = "float32" if info.strongly_typed else "float16"
        assert (types["x"], types["y"]) == (wanted, wanted)
        engine, given = tensorrt.open_engine(plan), feeds(1)
        assert relative_error(engine.run(given)["y"].astype(np.float32), expected(given)) < (
            0.02 if quantized else 3e-3
        )
        engine.close()


def test_an_operator_that_is_unknown_is_named(tmp_path: Path) -> None:
    path = graph(tmp_path / "part.onnx")
    model = onnx.load(path)
    model.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(model, path)
    with pytest.raises(BadInput, match=r"does not take node a\.layer/MatMul \(NoSuchOperator\)"):
        tensorrt.build_engine(path, tmp_path / "part.plan")


def test_a_file_that_is_no_plan_is_one_line(tmp_path: Path) -> None:
    plan = tmp_path / "part.plan"
    info = tensorrt.build_engine(graph(tmp_path / "part.onnx"), plan)
    plan.write_bytes(bytes(info.plan_bytes))
    with pytest.raises((BadInput, MachineLacks), match=r"part\.plan") as caught:
        tensorrt.open_engine(plan)
    assert "\n" not in str(caught.value)
