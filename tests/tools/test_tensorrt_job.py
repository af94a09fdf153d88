"""A job on TensorRT, played by ONNX Runtime: what is built, and that prompts are answered as they are."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import onnx
import pytest
from conftest import Answer, Inputs, refused, samq
from tensorrt_on_cpu import TensorRtOnCpu

from samq.calib.parts import PARTS
from samq.engines import tensorrt
from samq.engines.cuda import Device
from samq.engines.tensorrt_plan import USUAL_RANGES, BuildOptions, load_info
from samq.errors import MachineLacks
from samq.export.lower_tensorrt import PLACED
from samq.export.lowered_layer import FLOAT_GEMM, INT8_GEMM
from samq.export.placement import Placement
from samq.tools import targets
from samq.tools.cli import LARGEST
from samq.tools.progress import Reporter
from samq.tools.report.page import report_page
from samq.tools.report.verdict import PASSED, PLAIN, WARNING, claims, headline

PROMPTS = {"point_coords", "point_labels", "mask_input", "has_mask_input"}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> TensorRtOnCpu:
    return TensorRtOnCpu().install(monkeypatch)


@pytest.fixture
def out(exported: Path, tmp_path: Path) -> Path:
    """A copy of the exported job's output directory."""
    shutil.copytree(exported, tmp_path / "out")
    return tmp_path / "out"


def build(out: Path, *options: object) -> Answer:
    answer = samq("build", "--output-dir", out, "--engine", "tensorrt", "--placement", "none", *options)
    assert answer.code == 0, answer.err
    return answer


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


def test_plans_that_do_not_serve_here_are_built_again(
    out: Path, machine: TensorRtOnCpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another GPU, another TensorRT, another placement that samq ships; and none of them where nothing is at hand."""
    command = ("build", "--output-dir", out, "--engine", "tensorrt")
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["job"]["target"] = None
    (out / "manifest.json").write_text(json.dumps(manifest))

    def built_again() -> str | None:
        machine.built.clear()
        answer = samq(*command)
        assert answer.code == 0, answer.err
        assert ("done before" in answer.err) == (not machine.built), answer.err
        return answer.err if machine.built else None

    assert built_again() is not None
    assert built_again() is None
    machine.gpu = Device("NVIDIA A100", (8, 0), 81559)
    assert "build again: image_encoder.plan: it was built for NVIDIA H100" in str(built_again())
    machine.gpu = Device("NVIDIA A30", (8, 0), 24576)
    assert "it was tuned on NVIDIA A100, and this is NVIDIA A30" in str(built_again())
    machine.version = "10.3.0"
    assert built_again() is not None
    machine.version = "8.6.0"
    assert built_again() is not None, "what stands in trt8 is of before"
    machine.version = "8.6.1"
    assert "it was built for TensorRT 8.6.0, and this is 8.6.1" in str(built_again())
    monkeypatch.setattr(targets, "shipped_for", lambda gpu, version: Placement(layers={"*": "fp16"}))
    assert "samq places layers otherwise" in str(built_again())
    (out / "engines/trt8/fp16/mask_decoder.plan").unlink()
    assert built_again() is not None
    monkeypatch.setattr(tensorrt, "about", no_tensorrt)
    assert built_again() is None


def no_tensorrt() -> tuple[str, Device]:
    raise MachineLacks("no TensorRT here")


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


def test_what_tensorrt_warned_of_is_in_the_report(out: Path, machine: TensorRtOnCpu, inputs: Inputs) -> None:
    """Each text once, wherever in its sources TensorRT said it; what is too much is counted."""
    machine.warnings = (
        "onnx2trt_utils.cpp:374: INT64 weights\nare cast <b>down</b>",
        "onnx2trt_utils.cpp:391: INT64 weights are cast <b>down</b>.",
        *(f"Missing scale and zero-point for tensor t{index}" for index in range(25)),
    )
    build(out)
    said = validate(out, inputs).json["engine_log"]
    names = [f"engines/trt8/{place}{part}.plan" for place in ("", "fp16/") for part in PARTS]
    assert [entry["engine"] for entry in said] == names
    for entry in said:
        assert entry["warnings"][:2] == [
            "INT64 weights are cast <b>down</b>",
            "Missing scale and zero-point for tensor t0",
        ]
        assert (len(entry["warnings"]), entry["more_warnings"]) == (20, 6)
        log = (out / entry["log"]).read_text()
        assert all(text in log for text in machine.warnings)
    markdown, page = ((out / "report" / name).read_text() for name in ("report.md", "report.html"))
    assert markdown.count("  - and 6 more") == page.count("and 6 more") == 4
    for text in (markdown, page):
        assert "26 warnings" in text.replace("\N{NO-BREAK SPACE}", " ")
        assert all(entry["log"] in text for entry in said)
    assert "INT64 weights are cast &lt;b&gt;down" in page


def test_the_report_tells_the_kernels_that_the_gpu_runs(out: Path, machine: TensorRtOnCpu, inputs: Inputs) -> None:
    build(out)
    report = validate(out, inputs).json
    gemms = {part: len(load_info(out / f"engines/trt8/{part}.plan").gemms) for part in PARTS}
    for part in PARTS:
        products = {"launches": gemms[part], "microseconds": 5.0}
        assert report["kernels"][part] == {
            "INT8 GEMM": products,
            "fused attention": {"launches": 1, "microseconds": 0.5},
        }
    claim = claims(report)[-1].detail
    assert claim.endswith(f"by the names of its kernels the GPU runs {sum(gemms.values())} × INT8 GEMM")
    markdown, page = ((out / "report" / name).read_text() for name in ("report.md", "report.html"))
    assert f"| image_encoder | INT8 GEMM | {gemms['image_encoder']} | 5.0 |" in markdown
    assert page.count("<td>fused attention</td>") == 2


def test_kernels_that_cannot_be_recorded_are_lacking(out: Path, machine: TensorRtOnCpu, inputs: Inputs) -> None:
    machine.traces = False
    build(out)
    report = validate(out, inputs).json
    assert report["kernels"] is None
    assert "the GPU's kernels: kernels cannot be traced: no cupti" in report["lacks"]
    assert "What the GPU launches" not in (out / "report" / "report.html").read_text()


def test_engines_that_nothing_builds_have_no_log(finished: tuple[Path, Answer]) -> None:
    out, answer = finished
    assert (answer.json["engine_log"], answer.json["folded"], answer.json["kernels"]) == ([], None, {})
    assert all(layer["lowered"] is None for layer in answer.json["layers"])
    assert not any("lowered to" in note for layer in answer.json["layers"] for note in layer["notes"])
    assert all("TensorRT's log" not in (out / "report" / name).read_text() for name in ("report.md", "report.html"))


def test_a_report_from_before_there_was_a_log_is_still_shown(finished: tuple[Path, Answer], tmp_path: Path) -> None:
    shutil.copytree(finished[0], tmp_path / "out")
    file = tmp_path / "out" / "report" / "report.json"
    report = json.loads(file.read_text())
    for layer in report["layers"]:
        del layer["lowered"]
    file.write_text(json.dumps({key: report[key] for key in report if key not in ("engine_log", "folded", "kernels")}))
    assert report_page(tmp_path / "out") == report_page(finished[0])


def test_the_report_says_what_became_of_each_layer_and_why(
    out: Path, machine: TensorRtOnCpu, inputs: Inputs, tmp_path: Path
) -> None:
    placement = tmp_path / "placement.yaml"
    blocks = "vision_encoder.backbone.blocks"
    placement.write_text(f"layers:\n  {blocks}.0.*: fp16\n  {blocks}.1.*: branch-8\n")
    build(out, "--low-rank", "fold", "--placement", placement)
    report = validate(out, inputs).json
    notes = json.loads((out / "engines/trt8/lowering.json").read_text())
    lowered = {name: layer for part in PARTS for name, layer in notes[part]["layers"].items()}
    assert {layer["name"]: layer["lowered"] for layer in report["layers"] if layer["lowered"]} == lowered
    told = {layer["name"]: layer["notes"][-1] for layer in report["layers"] if layer["requested"] != "float"}
    errors = {name: layer["fold_error"] for name, layer in lowered.items() if layer["fold_error"] is not None}
    narrowed = {name for name, layer in lowered.items() if layer["kept_rank"] is not None}
    assert narrowed < errors.keys()
    assert {name[: len(blocks) + 3] for name in narrowed} == {f"{blocks}.1."}
    for name, note in told.items():
        if name.startswith(f"{blocks}.0."):
            assert lowered[name]["reason"].startswith(f"{PLACED}; FP16 rounds the weights by up to 0.04")
            assert note.startswith(f"lowered to {FLOAT_GEMM} ({lowered[name]['reason']})")
        elif name in errors:
            became = "kept to rank 8, the rest folded" if name in narrowed else "folded"
            assert note == (
                f"lowered to {INT8_GEMM}, low-rank branch {became} with an error of {100 * errors[name]:.3g} %"
            )
        else:
            assert note.startswith("lowered to ")
    worst = max(errors, key=errors.__getitem__)
    assert report["folded"] == {"layers": len(errors), "largest_error": errors[worst], "layer": worst}
    sentence = f"the largest error of that is {100 * errors[worst]:.3g} % of the weight, in {worst}."
    for file in ("report.md", "report.html"):
        text = (out / "report" / file).read_text()
        assert sentence in text
        assert all(note in text for note in told.values())


@pytest.mark.parametrize(("edges", "told"), [("FP16", True), ("FP32", False), ("FP32/FP16", False), ("", False)])
def test_layers_that_samq_placed_are_no_misfits(
    edges: str, told: bool, out: Path, machine: TensorRtOnCpu, inputs: Inputs, tmp_path: Path
) -> None:
    """Unless the engine contradicts: its regions are in float32, or it does not name them."""
    machine.edges = edges
    placement = tmp_path / "placement.yaml"
    placement.write_text('layers:\n  "*": fp16\n')
    build(out, "--placement", placement)
    report = validate(out, inputs, "--min-speedup", 0.5).json
    assert bool(report["placed"]) == told
    assert bool(report["disagreements"]) != told
    quantized = {layer["name"] for layer in report["layers"] if layer["requested"] != "float"}
    assert {*report["placed"], *report["disagreements"]} == quantized
    state, sentence = headline(report)
    assert (state == PASSED) == told
    assert (f"samq runs {len(quantized)} layers as {FLOAT_GEMM}" in sentence) == told
    assert (claims(report)[-1].state, claims(report)[-1].achieved.split()[0]) == (PLAIN if told else WARNING, "0")
    page = (out / "report/report.html").read_text()
    assert (f"{len(quantized)} layers lowered to {FLOAT_GEMM}: {PLACED}." in page) == told
    assert ('class="mark">differs' in page) != told


def test_phases_are_told_and_the_monitor_s_steps_now_and_then(
    out: Path, machine: TensorRtOnCpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.steps = 50
    lines = build(out).err.splitlines()
    names = [f"{place}{part}.plan" for place in ("", "fp16/") for part in PARTS]
    phases = [f"{name}: {phase}" for name in names for phase in ("parse", "build", "inspect")]
    assert [line for line in lines if ".plan: " in line] == phases
    monkeypatch.setattr(targets, "SECONDS_BETWEEN", 0.0)
    lines = build(out, "--optimization-level", 5).err.splitlines()
    assert lines.count("fp16/mask_decoder.plan: Building Engine, step 49 of 50") == 1
    manifest = json.loads((out / "manifest.json").read_text())
    assert set(phases) < set(manifest["stages"]["build"]["log"])


def test_timings_are_kept_for_the_next_build(out: Path, machine: TensorRtOnCpu, tmp_path: Path) -> None:
    usual = Path(os.environ["XDG_CACHE_HOME"]) / "samq" / "tensorrt-timings"
    for options, folder in (
        ((), str(usual)),
        (("--timing-cache", "none"), None),
        (("--timing-cache", tmp_path / "own"), str(tmp_path / "own")),
    ):
        machine.built.clear()
        build(out, *options)
        assert [built.timing_cache for _, built in machine.built] == [folder] * 2 * len(PARTS)
        assert folder is None or list(Path(folder).iterdir()) == []


def test_a_cache_that_cannot_be_written_is_an_error_only_where_it_was_asked_for(
    out: Path, machine: TensorRtOnCpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(out)
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    assert "nothing changed" in build(out).err, "where timings are kept is not what is built"
    machine.built.clear()
    answer = build(out, "--workspace-mib", 64)
    assert answer.err.count("warning: ") == answer.err.count("warning: TensorRT's timings are not kept (") == 1
    assert str(file) in answer.err
    assert {built.timing_cache for _, built in machine.built} == {None}
    command = ("--output-dir", out, "--timing-cache")
    refused(samq("build", "--engine", "tensorrt", *command, file / "own"), 5, str(file), "none")
    refused(samq("build", "--engine", "tensorrt", *command, file), 2, "--timing-cache", "is a file")
    refused(samq("build", *command, "none"), 2, "timing_cache", "--engine tensorrt")


def test_without_a_named_cache_directory_that_of_the_home_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative XDG_CACHE_HOME names none."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    chosen = targets.with_timings(BuildOptions(), None, Reporter(quiet=True))
    assert chosen.timing_cache == str(tmp_path / ".cache" / "samq" / "tensorrt-timings")
