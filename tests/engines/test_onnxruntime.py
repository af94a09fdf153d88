"""The ONNX Runtime engine, and its account of what it executes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from exported import canonical, quantized
from small_model import IMAGE_SIZE, pixels, recipe_of

from samq.calib.parts import IMAGE_ENCODER
from samq.engines import onnxruntime
from samq.engines.base import Executed
from samq.engines.onnxruntime import OnnxRuntimeEngine, executed_layers
from samq.engines.onnxruntime_options import EXACT_INT8, CpuOptions
from samq.errors import BadInput
from samq.export.lower_onnxruntime import lower_for_onnxruntime
from samq.export.parts import save_part
from samq.quant.config import Recipe
from samq.tools.targets import requested_compute

CPU_FLAGS = Path("/proc/cpuinfo")
PER_TOKEN = recipe_of("int4_w4a8_rtn", ipts={"mode": "dynamic", "granularity": "per_token"})


@pytest.mark.parametrize(
    ("recipe", "silently"),
    [(PER_TOKEN, "FP32 GEMM"), (recipe_of("int4_w4only_rtn"), "INT4 weights, INT8 arithmetic")],
    ids=["per token", "weights only"],
)
def test_what_the_canonical_graph_silently_runs_as_is_told(recipe: Recipe, silently: str, tmp_path: Path) -> None:
    """The case that samq exists to catch: a Q/DQ graph that executes as something else."""
    path = tmp_path / "canonical.onnx"
    save_part(canonical(recipe, IMAGE_ENCODER), path)
    executed = executed_layers(path)
    layers = [name for name in quantized(recipe).codes if name.startswith("vision_encoder.")]
    assert {executed[name].compute for name in layers} == {silently}
    assert silently != requested_compute(recipe)


@pytest.mark.parametrize("preset", ["int4_svdquant", "int4_w4only_rtn"])
def test_the_lowered_graph_executes_what_was_asked_for(preset: str, tmp_path: Path) -> None:
    recipe, path = recipe_of(preset), tmp_path / "lowered.onnx"
    save_part(lower_for_onnxruntime(canonical(recipe, IMAGE_ENCODER)), path)
    executed = executed_layers(path)
    layers = [name for name in quantized(recipe).codes if name.startswith("vision_encoder.")]
    assert {executed[name].compute for name in layers} == {requested_compute(recipe)}


def test_quantized_activations_of_weights_only_kernels_are_told(tmp_path: Path) -> None:
    path = tmp_path / "lowered.onnx"
    save_part(lower_for_onnxruntime(canonical(recipe_of("int4_w4only_rtn"), IMAGE_ENCODER)), path)
    model = onnx.load(path)
    changed = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    for attribute in (attribute for node in changed for attribute in node.attribute):
        if attribute.name == "accuracy_level":
            attribute.i = 4
    onnx.save(model, path)
    assert "INT4 weights, INT8 arithmetic" in {found.compute for found in executed_layers(path).values()}


def test_a_layer_in_several_gemms_is_told_once(tmp_path: Path) -> None:
    """Queries, keys and values have a GEMM each; where these run differently, all of it is told."""
    path = tmp_path / "lowered.onnx"
    save_part(lower_for_onnxruntime(canonical(recipe_of("int4_w4only_rtn"), IMAGE_ENCODER)), path)
    model = onnx.load(path)
    layer = "vision_encoder.backbone.blocks.0.attn.qkv"
    parts = [node for node in model.graph.node if node.name.startswith(f"{layer}/MatMul")]
    assert len(parts) == 3
    told = "INT4 weights, FP32 arithmetic"
    assert executed_layers(path)[layer] == Executed(told, "MatMulNBits")
    (level,) = (attribute for attribute in parts[1].attribute if attribute.name == "accuracy_level")
    level.i = 4
    onnx.save(model, path)
    assert executed_layers(path)[layer].compute == f"{told} and INT4 weights, INT8 arithmetic"


@pytest.mark.parametrize("exact", [True, False])
def test_kernels_are_told_to_be_exact_where_they_are_not(
    exact: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if exact and not onnxruntime.multiplies_exactly():
        pytest.skip("this machine's kernels are not exact by themselves")
    path, image = tmp_path / "lowered.onnx", {"pixel_values": pixels(1).numpy()}
    save_part(lower_for_onnxruntime(canonical(recipe_of("int8_w8a8"), IMAGE_ENCODER)), path)
    expected = OnnxRuntimeEngine(path).run(image)
    monkeypatch.setattr(onnxruntime, "multiplies_exactly", lambda: exact)
    session_options = onnxruntime._session_options(CpuOptions(), threads=1)
    if exact:
        with pytest.raises(RuntimeError, match=EXACT_INT8):  # not asked for, for it costs VNNI two thirds of its speed
            session_options.get_session_config_entry(EXACT_INT8)
    else:
        assert session_options.get_session_config_entry(EXACT_INT8) == "1"
    for output, found in OnnxRuntimeEngine(path).run(image).items():  # on integers there is one answer
        np.testing.assert_array_equal(found, expected[output])


@pytest.mark.skipif(not CPU_FLAGS.is_file(), reason="only Linux tells what the processor can do")
def test_the_probe_finds_vnni() -> None:
    flags = set(CPU_FLAGS.read_text().split())
    if "avx2" not in flags:
        pytest.skip("no x64 processor that saturates")
    assert onnxruntime.multiplies_exactly() == bool(flags & {"avx512_vnni", "avx_vnni"})


@pytest.mark.parametrize("content", [None, b"", b"not onnx", b"\x08\x07\x12\x00"])
def test_a_file_that_is_no_model_is_one_line(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadInput, match=r"model\.onnx") as caught:
        OnnxRuntimeEngine(path)
    assert "\n" not in str(caught.value)


def test_truncated_models_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    save_part(canonical(recipe_of("int4_w4only_rtn"), IMAGE_ENCODER), path)
    path.write_bytes(path.read_bytes()[:-1000])
    for use in (OnnxRuntimeEngine, executed_layers):
        with pytest.raises(BadInput, match=r"model\.onnx"):
            use(path)


def test_wrong_inputs_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    save_part(canonical(recipe_of("int4_w4only_rtn"), IMAGE_ENCODER), path)
    engine = OnnxRuntimeEngine(path, threads=1)
    assert engine.run({"pixel_values": pixels(1).numpy(), "more": np.zeros(1)}).keys() == set(engine.outputs)
    for feeds in ({"pixel_values": np.zeros((1, 3, 7, IMAGE_SIZE), np.float32)}, {"pixels": pixels(1).numpy()}):
        with pytest.raises(BadInput, match="pixel_values") as caught:
            engine.run(feeds)
        assert "\n" not in str(caught.value)
