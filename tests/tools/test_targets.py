"""Targets on the command line: graphs for engines that are not here, and what is said when they are asked for."""

from __future__ import annotations

import json
import shutil
import threading
from collections import Counter
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from conftest import Answer, Inputs, refused, samq, whole_job
from lowered import static_form
from small_model import pixels, recipe_of

from samq.calib.parts import IMAGE_ENCODER, PARTS
from samq.engines import tensorrt
from samq.engines.cuda import Device
from samq.engines.onnxruntime import OnnxRuntimeEngine
from samq.engines.tensorrt_plan import BuildOptions
from samq.engines.tensorrt_progress import Progress
from samq.errors import BadInput, MachineLacks, UsageError
from samq.export.lower_onnxruntime_cuda import NO_INT8, UNPACKED, lower_for_onnxruntime_cuda
from samq.export.lower_tensorrt import PLACED, lower_for_tensorrt
from samq.export.lowered_layer import FLOAT_GEMM, LoweredLayer
from samq.export.placement import SHIPPED, fastest, load_placement
from samq.export.tensorrt_targets import TARGETS, TRT8
from samq.export.trace import ANY_PROMPTS, ANY_SHAPE, StaticShape
from samq.quant.config import load_recipe, preset_names
from samq.tools import stages, targets
from samq.tools.job import SHAPES, Job
from samq.tools.latency import alternate
from samq.tools.outdir import OutputDir
from samq.tools.progress import Reporter
from samq.tools.targets import (
    OnnxRuntimeCpu,
    OnnxRuntimeCuda,
    TensorRt,
    executions,
    target_of,
    tensorrt_target,
)

TENSORRT = ("trt8", "trt10", "trt11")
GPU = Device("NVIDIA Orin", (8, 7), 30_000)


@pytest.fixture
def out(exported: Path, tmp_path: Path) -> Path:
    """A copy of a job's output directory that was exported for TensorRT 8, and for ONNX Runtime before."""
    shutil.copytree(exported, tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def dynamic(finished: tuple[Path, Answer], tmp_path: Path) -> Path:
    """A copy of a finished job's output directory, with graphs of dynamic shapes."""
    shutil.copytree(finished[0], tmp_path / "dynamic")
    return tmp_path / "dynamic"


@pytest.mark.parametrize("target", TENSORRT)
def test_graphs_are_lowered_where_no_tensorrt_is(out: Path, target: str) -> None:
    answer = samq("export", "--output-dir", out, "--target", target)
    assert answer.code == 0, answer.err
    folder = out / "engines" / target
    written = {str(path.relative_to(folder)) for path in folder.rglob("*.*")}
    assert written == {f"{place}{part}.onnx" for place in ("", "fp16/") for part in PARTS} | {"lowering.json"}
    directory = OutputDir.open(out)
    assert directory.done("export")
    assert {f"engines/{target}/{name}" for name in written} <= directory.stages["export"]["artifacts"].keys()
    layers = json.loads((folder / "lowering.json").read_text())["image_encoder"]["layers"]
    quantized = [layer for layer in layers.values() if layer["compute"] == "INT8 GEMM"]
    assert len(quantized) + sum(bool(layer["reason"]) for layer in layers.values()) == 23


def test_the_lowered_engines_answer_as_those_of_onnx_runtime(out: Path) -> None:
    samq("export", "--output-dir", out, "--target", "trt8")
    engines = out / "engines"
    answers = [
        OnnxRuntimeEngine(folder / "image_encoder.onnx").run({"pixel_values": pixels(1, 7).numpy()})
        for folder in (engines / "onnxruntime", engines / "trt8", engines / "trt8" / "fp16")
    ]
    name = "image_encoder.onnx"
    assert (engines / "trt8" / name).read_bytes() != (engines / "trt8" / "fp16" / name).read_bytes()
    for output, expected in answers[0].items():
        scale = float(np.abs(expected).max())
        # The same INT8 products, summed and rounded elsewhere; the float baseline lies farther away.
        assert np.abs(answers[1][output] - expected).mean() < 2e-3 * scale
        assert np.abs(answers[2][output] - expected).mean() > np.abs(answers[1][output] - expected).mean()


def test_parts_of_the_same_shapes_are_lowered_as_they_are(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other shapes are traced anew, and so is what was changed."""
    before = {path: path.stat().st_mtime_ns for path in (out / "onnx").rglob("*.onnx")}
    traced: list[str] = []

    def stop(model: object, part: str, shape: object) -> None:
        traced.append(part)
        raise UsageError("traced")

    monkeypatch.setattr(stages, "trace", stop)
    answer = samq("export", "--output-dir", out, "--target", "trt10")
    assert answer.code == 0, answer.err
    assert {path: path.stat().st_mtime_ns for path in (out / "onnx").rglob("*.onnx")} == before
    assert OutputDir.open(out).done("export")
    refused(samq("export", "--output-dir", out, "--target", "trt10", "--static-shapes"), 2, "traced")
    next(iter(before)).unlink()
    refused(samq("export", "--output-dir", out, "--target", "trt11"), 2, "traced")
    assert traced == [IMAGE_ENCODER] * 2


def test_graphs_of_several_targets_lie_side_by_side(out: Path) -> None:
    for command in (("--target", "trt8"), ("--target", "trt11"), ("--target", "trt8", "--low-rank", "fold"), ()):
        assert samq("export", "--output-dir", out, *command).code == 0
    directory = OutputDir.open(out)
    lowered = {
        str(path.relative_to(out)) for name in ("trt8", "trt11") for path in (out / "engines" / name).rglob("*.*")
    }
    assert lowered <= directory.stages["export"]["artifacts"].keys()
    assert not lowered & {*directory.superseded}
    assert directory.done("export")


def test_stages_that_an_export_makes_void_are_named(
    finished: tuple[Path, Answer], inputs: Inputs, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    again = samq("run", *whole_job(inputs), "--output-dir", out, "--target", "trt8")
    assert again.code == 0, again.err
    assert "onnx/ is for one image" in again.err
    assert "`samq-export" not in again.err, "it makes all of them again"
    answer = samq("export", "--output-dir", out, "--low-rank", "fold")
    assert answer.code == 0, answer.err
    assert "`samq-export build --engine onnxruntime` and `samq-export validate` again" in answer.err


def test_a_placement_that_no_target_heeds_is_refused(out: Path, inputs: Inputs, tmp_path: Path) -> None:
    path = tmp_path / "placement.yaml"
    path.write_text("layers:\n  '*': fp16\n")
    before = (out / "manifest.json").read_bytes()
    for command in (("build", "--output-dir", out), ("run", *whole_job(inputs), "--output-dir", tmp_path / "new")):
        engine = ("--engine", "onnxruntime") if command[0] == "run" else ()
        answer = samq(*command, *engine, "--placement", path)
        told = refused(answer, 2, "--placement is for TensorRT", "--engine tensorrt")
        assert ("--target" in told) == (command[0] == "run")
    refused(samq("export", "--output-dir", out, "--target", "trt8", "--placement", tmp_path / "none"), 2, "none")
    assert (out / "manifest.json").read_bytes() == before


def test_a_branch_can_be_folded(out: Path) -> None:
    samq("export", "--output-dir", out, "--target", "trt8", "--low-rank", "fold")
    layers = json.loads((out / "engines" / "trt8" / "lowering.json").read_text())["image_encoder"]["layers"]
    folded = [layer for layer in layers.values() if layer["branch"] == "folded"]
    assert folded
    assert not [layer for layer in layers.values() if layer["branch"] == "kept"]
    assert all(0 < layer["fold_error"] < 0.05 for layer in folded)


def test_a_format_that_no_tensorrt_has_is_refused(inputs: Inputs, tmp_path: Path) -> None:
    config = tmp_path / "per_token.yaml"
    config.write_text("wgts: {dtype: sint8, group_shapes: [[1, -1]]}\nipts: {granularity: per_token, mode: dynamic}\n")
    out = tmp_path / "out"
    samq("quantize", "--model-path", inputs.checkpoint, "--config", config, "--output-dir", out)
    refused(samq("export", "--output-dir", out, "--target", "trt10"), 2, "blocks.0", "per_tensor", "static")
    assert OutputDir.open(out).done("quantize")


@pytest.mark.skipif(find_spec("tensorrt") is not None, reason="TensorRT is installed here")
def test_building_without_tensorrt_or_gpu_says_how_to_get_them(dynamic: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SAMQ_TENSORRT_PYTHON", raising=False)
    for chosen in ((), ("--target", "trt8")):
        refused(samq("build", "--output-dir", dynamic, "--engine", "tensorrt", *chosen), 5, "samq[tensorrt]")
    refused(samq("build", "--output-dir", dynamic, "--device", "cuda"), 5, "onnxruntime-gpu")
    assert OutputDir.open(dynamic).done("build")


@pytest.mark.skipif(find_spec("tensorrt") is not None, reason="TensorRT is installed here")
def test_a_job_for_an_engine_that_is_not_here_ends_before_it_begins(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SAMQ_TENSORRT_PYTHON", raising=False)
    out = tmp_path / "out"
    refused(samq("run", *whole_job(inputs), "--output-dir", out, "--engine", "tensorrt"), 5, "samq[tensorrt]")
    assert not out.exists()


def test_a_plan_needs_graphs_that_were_exported_for_it(dynamic: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt, "about", lambda: ("8.6.0", GPU))
    build = ("build", "--output-dir", dynamic, "--engine", "tensorrt")
    refused(samq(*build), 2, "for dynamic shapes", "one image and any prompts", "export --target trt8`")
    refused(samq(*build, "--static-shapes"), 2, "take static shapes", "export --target trt8 --static-shapes`")
    refused(samq(*build, "--target", "trt10"), 2, "--target trt8")
    monkeypatch.setattr(tensorrt, "about", lambda: ("7.2.3", GPU))
    refused(samq(*build), 5, "TensorRT 7.2.3", "trt8, trt10, trt11")


@pytest.mark.parametrize(
    ("version", "found"),
    [
        ("8.5.2", "TensorRT 8.5.2 is too old for trt8; install 8.6 or a later 8.x"),
        ("8.6.0", "trt8"),
        ("8.6.1.6", "trt8"),
        ("10.0.1", "TensorRT 10.0.1 is too old for trt10; install 10.3 or a later 10.x"),
        ("10.2.0.post1", "TensorRT 10.2.0.post1 is too old for trt10; install 10.3 or a later 10.x"),
        ("10.3.0", "trt10"),
        ("10.16.1.11", "trt10"),
        ("11.0.0", "trt11"),
        ("9.3.0", "TensorRT 9.3.0 is none of trt8, trt10, trt11; install one of these"),
    ],
)
def test_a_target_takes_no_older_tensorrt(version: str, found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt, "about", lambda: (version, GPU))
    if found in TARGETS:
        assert targets.target_at_hand() == TARGETS[found]
        return
    for job in (Job("m", engine="tensorrt"), Job("m", engine="tensorrt", target="trt8")):
        with pytest.raises(MachineLacks) as caught:
            target_of(job).require()
        assert str(caught.value) == found


def test_a_phase_that_no_monitor_tells_of_is_told_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every half minute; a monitor tells of its steps instead, and a bar has a clock."""
    reporter, now = Reporter(quiet=True), [0.0]
    told = targets._Told("a.plan", reporter, lambda: now[0])

    def said(*seconds: float) -> list[str]:
        before = len(reporter.said)
        for second in seconds:
            now[0] = second
            told.still()
        return [line.removeprefix("a.plan: ") for line in reporter.said[before:]]

    assert said(50) == [], "nothing has begun"
    told("build", 0, 0)
    assert said(*range(51, 145)) == ["build, 30 s so far", "build, 60 s so far", "build, 90 s so far"]
    told("inspect", 0, 0)
    assert said(145) == []
    told("build", 0, 0)
    told("Building Engine", 0, 9)
    assert said(200, 300) == []
    told("Building Engine", 1, 9)
    assert reporter.said[-1] == "a.plan: Building Engine, step 1 of 9"
    told("inspect", 0, 0)
    assert said(340) == ["inspect, 40 s so far"]
    monkeypatch.setattr(Reporter, "draws", True)
    assert said(400) == []


def test_a_build_is_told_to_go_on_until_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard, before = threading.Event(), threading.enumerate()

    class Hears(Reporter):
        def say(self, message: str) -> None:
            super().say(message)
            if message.startswith("image_encoder.plan: build, ") and message.endswith(" s so far"):
                heard.set()

    def build(onnx: Path, plan: Path, options: BuildOptions, progress: Progress) -> None:
        progress("build", 0, 0)
        assert heard.wait(60)
        raise BadInput("it fails")

    monkeypatch.setattr(targets, "SECONDS_BETWEEN", 0.0)
    monkeypatch.setattr(targets, "SECONDS_BETWEEN_LOOKS", 0.001)
    monkeypatch.setattr(tensorrt, "build_engine", build)
    (tmp_path / "lowering.json").write_text('{"image_encoder": {"float32": []}}', encoding="utf-8")
    with pytest.raises(BadInput, match="it fails"):
        TensorRt(TRT8, timings="none").build(tmp_path, lambda: None, Hears(quiet=True))
    assert threading.enumerate() == before


def test_each_engine_has_its_target() -> None:
    assert target_of(Job("model")) == OnnxRuntimeCpu()
    assert target_of(Job("model", device="cuda")) == OnnxRuntimeCuda()
    # A target that was lowered for before does not make TensorRT the engine.
    assert target_of(Job("model", target="trt8")) == OnnxRuntimeCpu()
    for name in TENSORRT:
        target = target_of(Job("model", engine="tensorrt", target=name, build_options={"optimization_level": 5}))
        assert isinstance(target, TensorRt)
        assert (target.folder, target.options.optimization_level) == (name, 5)


def test_gpus_take_one_image_and_any_prompts_unless_told_otherwise() -> None:
    for job, unasked in (
        (Job("model", engine="tensorrt"), ANY_PROMPTS),
        (Job("model", target="trt10"), ANY_PROMPTS),
        (Job("model", device="cuda"), ANY_PROMPTS),
        (Job("model"), ANY_SHAPE),
    ):
        assert SHAPES[job.shapes] == unasked
        assert SHAPES[replace(job, static_shapes=False).shapes] == ANY_SHAPE
        assert SHAPES[replace(job, static_shapes=True).shapes] == StaticShape()


@pytest.mark.parametrize("name", preset_names())
def test_what_engines_execute_is_what_the_lowerings_make(name: str) -> None:
    told = executions(load_recipe(name))
    assert set(told) == {"onnxruntime", "onnxruntime-cuda", *TENSORRT}
    for target in TENSORRT:
        layers = lower_for_tensorrt(static_form(name, IMAGE_ENCODER), TARGETS[target]).layers
        changed = [layer for layer in layers.values() if layer.compute != FLOAT_GEMM or layer.reason]
        usual = [layer for layer in changed if "no multiple" not in layer.reason]  # the small model has narrow layers
        assert told[target] == Counter(map(_words, usual)).most_common(1)[0][0]
    on_gpu = lower_for_onnxruntime_cuda(static_form(name, IMAGE_ENCODER)).layers
    assert told["onnxruntime-cuda"] == Counter(layer.compute for layer in on_gpu.values()).most_common(1)[0][0]


def test_what_cuda_makes_of_layers_is_noted_and_told(dynamic: Path) -> None:
    """W4A8, which no kernel of the provider computes."""
    target, folder = OnnxRuntimeCuda(), dynamic / "engines" / "onnxruntime-cuda"
    paths = target.lower(dynamic / "onnx", folder, lambda: None)
    assert folder / "lowering.json" in paths
    layers = target.lowered(folder)
    compute = "INT8 weights, dequantized at load, FP16 GEMM"
    reason = f"{NO_INT8}, and {UNPACKED}"
    assert set(layers.values()) == {LoweredLayer(compute, reason), LoweredLayer(compute, reason, "folded")}
    assert target.told(folder) == [
        f"onnxruntime-cuda: {len(layers)} layers: {len(layers)} × {compute}",
        f"{len(layers)} of them not as asked, each told in lowering.json; most often: {reason}",
    ]
    report = json.loads((dynamic / "report" / "report.json").read_text())
    assert layers.keys() == {layer["name"] for layer in report["layers"] if layer["requested"] != "float"}
    (folder / "lowering.json").unlink()
    assert target.lowered(folder) == {}, "it was built before there were notes"


def _words(layer: LoweredLayer) -> str:
    return f"{layer.compute}, weights dequantized" if layer.reason.startswith("weights dequantized") else layer.compute


def test_what_no_tensorrt_has_is_told_so() -> None:
    recipe = recipe_of("int4_w4a8", ipts={"mode": "dynamic"})
    assert executions(recipe)["trt10"].startswith("refused")
    assert executions(recipe)["onnxruntime"] == "INT8 GEMM"


class _Clocked:
    """An engine with a clock of its own."""

    def __init__(self, milliseconds: float) -> None:
        self.milliseconds = milliseconds

    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    shapes: dict[str, tuple[int, ...]] = {}  # noqa: RUF012

    def run(self, feeds: object) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]:
        raise AssertionError("the host's clock was used")

    def time(self, feeds: object, repeats: int) -> list[float]:
        return [self.milliseconds] * repeats


def test_an_engine_s_own_clock_is_preferred() -> None:
    measured = alternate(_Clocked(3.0), _Clocked(2.0), ({}, {}), seconds=0.0)
    assert (measured["baseline_ms"], measured["quantized_ms"], measured["speedup"]) == (3.0, 2.0, 1.5)


def test_layers_are_placed_as_the_file_says(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing() -> tuple[str, Device]:
        raise MachineLacks("no TensorRT here")

    monkeypatch.setattr(tensorrt, "about", nothing)
    monkeypatch.chdir(tmp_path)
    Path("placement.yaml").write_text("layers:\n  vision_encoder.backbone.blocks.0.*: fp16\n")
    answer = samq("export", "--output-dir", out, "--target", "trt8", "--placement", "placement.yaml")
    assert answer.code == 0, answer.err
    layers = json.loads((out / "engines" / "trt8" / "lowering.json").read_text())["image_encoder"]["layers"]
    placed = {name for name, layer in layers.items() if layer["reason"].startswith(PLACED)}
    assert placed == {name for name in layers if name.startswith("vision_encoder.backbone.blocks.0.")}
    assert f"{len(placed)} of them not as asked, each told in lowering.json; most often: {PLACED}" in answer.err
    assert "INT8 wherever it can be" not in answer.err
    answer = samq("export", "--output-dir", out, "--target", "trt8", "--low-rank", "fold")
    assert f"most often: {PLACED}" in answer.err, "a file that was named counts for later stages"
    answer = samq("export", "--output-dir", out, "--target", "trt8", "--placement", "shipped")
    assert "not as asked" not in answer.err
    layers = json.loads((out / "engines" / "trt8" / "lowering.json").read_text())
    gemms = sum(layer["compute"] == "INT8 GEMM" for part in PARTS for layer in layers[part]["layers"].values())
    assert f"trt8: {gemms} layers: {gemms} × INT8 GEMM" in answer.err
    assert "no GPU with TensorRT is here" in answer.err
    Path("placement.yaml").write_text("layers:\n  '*': fp32\n")
    refused(
        samq("export", "--output-dir", out, "--target", "trt8", "--placement", "placement.yaml"), 2, "line 2", "fp16"
    )


def test_a_gpu_that_was_measured_gets_its_placement(monkeypatch: pytest.MonkeyPatch) -> None:
    block = "vision_encoder.backbone.blocks.3.mlp.proj_in"
    measured = {
        ("8.6.0", "NVIDIA H100 80GB HBM3"): "fp16",
        ("8.6.0", "NVIDIA H200"): "fp16",
        ("8.6.0", "Orin"): "int8",
        ("10.3.0", "NVIDIA H100"): "int8",
    }
    for (version, gpu), form in measured.items():
        monkeypatch.setattr(tensorrt, "about", lambda v=version, g=gpu: (v, Device(g, (9, 0), 1)))
        assert tensorrt_target(Job("m")).placement.form(block) == form
        assert tensorrt_target(Job("m", target="trt11")).placement.form(block) == "int8"
        assert tensorrt_target(Job("m", placement="shipped")).placement.form(block) == form
        assert tensorrt_target(Job("m", placement="none")).placement.form(block) == "int8"


def test_why_nothing_measured_is_known_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt, "about", lambda: ("8.6.0", Device("NVIDIA H200", (9, 0), 1)))
    for placement in (None, "shipped", "none"):
        assert tensorrt_target(Job("m", placement=placement)).unmeasured == ""
    assert "nothing is known of trt10" in tensorrt_target(Job("m", target="trt10")).unmeasured
    monkeypatch.setattr(tensorrt, "about", lambda: ("8.6.0", Device("Orin", (8, 7), 1)))
    told = tensorrt_target(Job("m")).unmeasured
    assert told == "no placement was measured for Orin with TensorRT 8.6.0; `samq-export place` does so"


def test_an_encoder_of_dynamic_shapes_is_told(
    finished: tuple[Path, Answer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was exported without --device cuda; the CPU stands in for the GPU."""
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    monkeypatch.setattr(stages, "target_of", lambda job: OnnxRuntimeCpu())
    answer = samq("build", "--output-dir", out, "--device", "cuda")
    assert answer.code == 0, answer.err
    assert "exported for dynamic shapes: the encoder may not be recorded as a CUDA graph" in answer.err
    assert "`samq-export export --device cuda`" in answer.err


def test_shipped_placements_choose_the_fastest_form() -> None:
    for path in SHIPPED.glob("*.yaml"):
        placement = load_placement(path)
        chosen = fastest(placement.blocks, placement.gpu, placement.tensorrt)
        assert placement.blocks
        for block in placement.blocks:
            assert placement.form(f"{block}.attn.qkv") == chosen.form(f"{block}.attn.qkv")
