"""Files of the ONNX parts: checked, whole, with external data where they are large."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from exported import as_written, canonical, float_model, largest_error, skeleton
from small_model import pixels, recipe_of
from test_files import disk_of

from samq.calib.parts import IMAGE_ENCODER, PARTS
from samq.engines.onnxruntime import OnnxRuntimeEngine
from samq.errors import MachineLacks
from samq.export import parts
from samq.export.lower_onnxruntime import lower_for_onnxruntime
from samq.export.parts import float_part, save_part


def _answers(path: Path) -> list[np.ndarray]:
    engine = OnnxRuntimeEngine(path)
    return list(engine.run({"pixel_values": pixels(1).numpy()}).values())


@pytest.mark.parametrize("part", PARTS)
def test_every_file_passes_the_full_check_at_opset_21(part: str, tmp_path: Path) -> None:
    for name, model in {
        "fp32": float_part(skeleton(part), float_model(), half=False),
        "fp16": float_part(skeleton(part), float_model(), half=True),
        "canonical": canonical(recipe_of("int4_svdquant"), part),
        "lowered": lower_for_onnxruntime(canonical(recipe_of("int4_svdquant"), part)),
    }.items():
        path = tmp_path / f"{name}.onnx"
        assert save_part(model, path) == [path]
        onnx.checker.check_model(str(path), full_check=True)
        opsets = {entry.domain: entry.version for entry in onnx.load(path).opset_import}
        assert opsets[""] == 21
        assert "samq" not in opsets
    assert {path.name for path in tmp_path.iterdir()} == {"fp32.onnx", "fp16.onnx", "canonical.onnx", "lowered.onnx"}


def test_a_large_part_keeps_its_weights_in_a_second_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = canonical(recipe_of("int4_w4only"), IMAGE_ENCODER)
    whole, path = tmp_path / "whole.onnx", tmp_path / "part.onnx"
    save_part(model, whole)
    monkeypatch.setattr(parts, "EXTERNAL_DATA_ABOVE", 100_000)
    written = save_part(canonical(recipe_of("int4_w4only"), IMAGE_ENCODER), path)
    assert written == [path, tmp_path / "part.onnx.data"]
    assert all(file.stat().st_size > 10_000 for file in written)
    assert path.stat().st_size < whole.stat().st_size / 2
    assert {file.name for file in tmp_path.iterdir()} == {"whole.onnx", "part.onnx", "part.onnx.data"}
    onnx.checker.check_model(str(path), full_check=True)
    for inside, outside in zip(_answers(whole), _answers(path), strict=True):
        np.testing.assert_array_equal(inside, outside)


def test_a_part_with_external_data_is_lowered_and_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, large = tmp_path / "small.onnx", tmp_path / "large.onnx"
    save_part(lower_for_onnxruntime(canonical(recipe_of("int4_w4only"), IMAGE_ENCODER)), expected)
    monkeypatch.setattr(parts, "EXTERNAL_DATA_ABOVE", 100_000)
    save_part(canonical(recipe_of("int4_w4only"), IMAGE_ENCODER), large)
    lowered = tmp_path / "engine" / "large.onnx"
    assert len(save_part(lower_for_onnxruntime(ir.load(large)), lowered)) == 2
    for one, other in zip(_answers(expected), _answers(lowered), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_part_that_became_small_leaves_no_data_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "part.onnx"
    with monkeypatch.context() as patched:
        patched.setattr(parts, "EXTERNAL_DATA_ABOVE", 1)
        save_part(canonical(recipe_of("int4_w4only"), IMAGE_ENCODER), path)
    save_part(canonical(recipe_of("int4_w4only"), IMAGE_ENCODER), path)
    assert [file.name for file in tmp_path.iterdir()] == ["part.onnx"]


def test_an_invalid_graph_never_gets_its_name(tmp_path: Path) -> None:
    model = canonical(recipe_of("int4_w4only"), IMAGE_ENCODER)
    next(node for node in model.graph if node.op_type == "MatMul").op_type = "NoSuchOperator"
    with pytest.raises(onnx.checker.ValidationError, match="NoSuchOperator"):
        save_part(model, tmp_path / "part.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("external", [False, True])
def test_a_full_disk_is_one_line_and_keeps_the_old_file(
    external: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "part.onnx"
    if external:
        monkeypatch.setattr(parts, "EXTERNAL_DATA_ABOVE", 1)
    save_part(canonical(recipe_of("int4_w4only"), IMAGE_ENCODER), path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with disk_of(100_000), pytest.raises(MachineLacks, match="the disk is full"):
        save_part(canonical(recipe_of("int8_w8a8"), IMAGE_ENCODER), path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_the_same_part_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one.onnx", "two.onnx"):
        save_part(canonical(recipe_of("int4_svdquant"), IMAGE_ENCODER), tmp_path / name)
    assert (tmp_path / "one.onnx").read_bytes() == (tmp_path / "two.onnx").read_bytes()


def test_the_fp16_baseline_is_half_the_size_and_near(tmp_path: Path) -> None:
    feeds = {"pixel_values": pixels(1).numpy()}
    exact = float_part(skeleton(IMAGE_ENCODER), float_model(), half=False)
    half = float_part(skeleton(IMAGE_ENCODER), float_model(), half=True)
    save_part(exact, tmp_path / "fp32.onnx")
    save_part(half, tmp_path / "fp16.onnx")
    sizes = [(tmp_path / f"{name}.onnx").stat().st_size for name in ("fp16", "fp32")]
    assert sizes[0] < 0.6 * sizes[1]
    for one, other in zip(as_written(exact, feeds), as_written(half, feeds), strict=True):
        assert 0 < largest_error(other, one) < 0.01
