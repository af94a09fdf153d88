"""A job on TensorRT, played by ONNX Runtime: what is built, and that prompts are answered as they are."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx
import pytest
from conftest import Answer, Inputs, refused, samq
from tensorrt_on_cpu import TensorRtOnCpu

from samq.calib.parts import PARTS
from samq.engines.tensorrt_plan import USUAL_RANGES, load_info
from samq.tools.cli import LARGEST

PROMPTS = {"point_coords", "point_labels", "mask_input", "has_mask_input"}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> TensorRtOnCpu:
    return TensorRtOnCpu().install(monkeypatch)


@pytest.fixture
def out(exported: Path, tmp_path: Path) -> Path:
    """A copy of the exported job's output directory."""
    shutil.copytree(exported, tmp_path / "out")
    return tmp_path / "out"


def build(out: Path, *options: object) -> None:
    answer = samq("build", "--output-dir", out, "--engine", "tensorrt", "--placement", "none", *options)
    assert answer.code == 0, answer.err


def validate(out: Path, inputs: Inputs, *options: object) -> Answer:
    return samq("validate", "--output-dir", out, "--eval-data", inputs.coco, "--json", *options)


def dynamic_sides(graph: onnx.GraphProto) -> dict[str, list[str]]:
    """Names of the dynamic sides of each input that has some."""
    sides = {v.name: [s.dim_param for s in v.type.tensor_type.shape.dim if s.dim_param] for v in graph.input}
    return {name: names for name, names in sides.items() if names}


def test_the_encoder_is_static_and_the_decoder_takes_any_prompts(out: Path, machine: TensorRtOnCpu) -> None:
    build(out, "--max-prompts", 64, "--max-points", 1)
    assert len(machine.built) == 2 * len(PARTS)
    for (encoder, _), (decoder, options) in (machine.built[:2], machine.built[2:]):
        assert dynamic_sides(encoder) == {}
        assert dynamic_sides(decoder).keys() == PROMPTS
        assert dynamic_sides(decoder)["point_coords"] == ["prompts", "points"]
        assert options.ranges == {**USUAL_RANGES, "prompts": (1, 1, 64), "points": (1, 1, 1)}


def test_the_help_tells_the_usual_ranges() -> None:
    assert {side: most for side, (most, _) in LARGEST.items()} == {side: r[2] for side, r in USUAL_RANGES.items()}


def test_clicks_and_boxes_are_answered_as_on_the_cpu(
    out: Path, machine: TensorRtOnCpu, finished: tuple[Path, Answer], inputs: Inputs
) -> None:
    """The plans compute in float32 here, so filled-up prompts are the only thing that could change the answers."""
    build(out)
    expected = finished[1].json["accuracy"]["by_kind"]
    found = validate(out, inputs).json["accuracy"]["by_kind"]
    for kind in ("box", "click"):
        assert found[kind]["miou_baseline"] == pytest.approx(expected[kind]["miou_baseline"], abs=1e-6)


def test_a_baseline_that_agrees_with_fp32_is_told_so(out: Path, machine: TensorRtOnCpu, inputs: Inputs) -> None:
    build(out)
    answer = validate(out, inputs)
    assert answer.code == 0, answer.err
    half = answer.json["half_precision"]
    assert (half["state"], half["images"], half["prompts"]) == ("agrees", 2, 8)
    assert half["relative_error"] < 1e-5
    assert "FP16 baseline (agrees): its masks agree with FP32's at IoU 1.0000" in (out / "report/report.md").read_text()
    assert "in ONNX Runtime on the CPU: its masks agree" in (out / "report/report.html").read_text()


def test_a_baseline_that_overflowed_ends_with_exit_code_3(out: Path, machine: TensorRtOnCpu, inputs: Inputs) -> None:
    """Both engines give zeros, so that they agree perfectly; the report is written nevertheless."""
    machine.spoils = lambda graph: any(value.name == "pixel_values" for value in graph.input)
    build(out)
    answer = validate(out, inputs)
    assert answer.code == 3
    assert answer.json["accuracy"]["agreement_iou"] > 0.999
    half = answer.json["half_precision"]
    assert (half["state"], half["relative_error"], half["cosine"]) == ("broken", 1, 0)
    assert "--engine onnxruntime --device cpu" in answer.json["error"]
    assert "The FP16 baseline is none" in (out / "report/report.html").read_text()


def test_an_fp32_baseline_is_not_compared_with_itself(finished: tuple[Path, Answer]) -> None:
    assert finished[1].json["half_precision"] is None


def test_plans_of_another_job_are_refitted(out: Path, machine: TensorRtOnCpu, inputs: Inputs, tmp_path: Path) -> None:
    """They stay what they were asked to be, and their directory is left alone."""
    other = tmp_path / "other"
    shutil.copytree(out, other)
    build(other, "--refittable", "--max-points", 5)
    before = {path: path.read_bytes() for path in (other / "engines").rglob("*.*")}
    machine.built.clear()
    build(out, "--refit", other)
    names = [f"{place}{part}.plan" for place in ("", "fp16/") for part in PARTS]
    plans = [(other / "engines/trt8" / name, out / "engines/trt8" / name) for name in names]
    assert machine.refitted == plans
    assert all(load_info(new).options.ranges["points"] == (1, 2, 5) for _, new in plans)
    assert before == {path: path.read_bytes() for path in (other / "engines").rglob("*.*")}
    assert validate(out, inputs).code == 0
    refused(samq("build", "--output-dir", out, "--refit", other), 2, "refit", "--engine tensorrt")
    options = ("--engine", "tensorrt", "--refit", other, "--refittable")
    refused(samq("build", "--output-dir", out, *options), 2, "refittable: --refit takes plans as they were built")


def test_static_shapes_change_the_answers_to_clicks_alone(
    out: Path, machine: TensorRtOnCpu, finished: tuple[Path, Answer], inputs: Inputs
) -> None:
    assert samq("export", "--output-dir", out, "--target", "trt8", "--static-shapes").code == 0
    build(out, "--static-shapes")
    assert all(dynamic_sides(graph) == {} for graph, _ in machine.built)
    expected = finished[1].json["accuracy"]["by_kind"]
    found = validate(out, inputs).json["accuracy"]["by_kind"]
    assert found["box"]["miou_baseline"] == pytest.approx(expected["box"]["miou_baseline"], abs=1e-6)
    assert found["click"]["miou_baseline"] != pytest.approx(expected["click"]["miou_baseline"], abs=1e-6)
