"""`samq-export` as its users meet it: the whole job, its stages, its plan, its refusals."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import Answer, Inputs, refused, samq, whole_job
from exported import canonical
from small_model import recipe_of

from samq.calib.checkpoint import load_checkpoint
from samq.calib.parts import PARTS
from samq.calib.sources import open_source
from samq.engines import tensorrt
from samq.export.parts import save_part
from samq.files import sha256_of, write_text
from samq.quant.folds import Folds
from samq.quant.storage import load_quantized
from samq.tools import cli
from samq.tools.outdir import OutputDir
from samq.tools.sqnr import layer_sqnr

STAGE_BY_STAGE = """
import sys
import torch
from samq.tools import cli, latency
torch.set_num_threads(1)
latency.SECONDS.update(dict.fromkeys(latency.SECONDS, 0.2))
for line in sys.argv[1:]:
    sys.argv = ["samq-export", *line.split("\\t")]
    try:
        cli.main()
    except SystemExit as ended:
        if ended.code:
            raise
"""


def hashes(out: Path, *folders: str) -> dict[str, str]:
    """sha256 of every file of some folders."""
    files = [path for folder in folders for path in sorted((out / folder).rglob("*")) if path.is_file()]
    return {str(path.relative_to(out)): sha256_of(path) for path in files}


def test_run_leaves_everything_that_is_promised(finished: tuple[Path, Answer]) -> None:
    out, answer = finished
    assert {path.name for path in out.iterdir()} == {
        "manifest.json", "config.yaml", "weights", "onnx", "engines", "report",
    }  # fmt: skip
    manifest = json.loads((out / "manifest.json").read_text())
    assert list(manifest["stages"]) == ["quantize", "export", "build", "validate"]
    assert re.fullmatch(r"[0-9a-f]{64}", manifest["fingerprint"])
    recorded = {name: sha for stage in manifest["stages"].values() for name, sha in stage["artifacts"].items()}
    assert recorded == hashes(out, "weights", "onnx", "engines", "report") | {
        "config.yaml": sha256_of(out / "config.yaml")
    }
    assert answer.json == json.loads((out / "report" / "report.json").read_text())
    assert {path.name for path in (out / "report").iterdir()} == {
        "report.json", "prompts.json", "report.md", "report.html", "examples",
    }  # fmt: skip


def test_the_manifest_and_the_report_tell_how_each_stage_was_made(finished: tuple[Path, Answer]) -> None:
    out, answer = finished
    stages = json.loads((out / "manifest.json").read_text())["stages"]
    (made,) = answer.json["commands"]
    assert made["stages"] == list(stages)
    assert made["command"].startswith("samq-export run --model-path ")
    assert made["command"].endswith(f"--output-dir {out} --json")
    assert {facts["command"] for facts in stages.values()} == {made["command"]}
    assert any(line.startswith("quantize 23 layers on 2 images: ") for line in answer.json["log"]["quantize"])
    assert not any(line.startswith("export") for line in answer.json["log"]["quantize"])
    assert all(facts["seconds"] > 0 for facts in stages.values())
    memory = answer.json["memory"]
    if Path("/proc/self/clear_refs").exists():
        assert all(peak > 100e6 for peak in memory["stages"].values())
        assert all(1e6 < peak < 1e9 for peak in memory["engine"].values())


def test_the_report_has_every_promised_figure(finished: tuple[Path, Answer]) -> None:
    report = finished[1].json
    accuracy, size, latency = report["accuracy"], report["size"], report["latency"]
    for key in ("miou_baseline", "miou_quantized", "miou_relative", "agreement_iou"):
        assert 0 < accuracy[key] <= 2
    assert accuracy["miou_relative"] == pytest.approx(accuracy["miou_quantized"] / accuracy["miou_baseline"])
    assert accuracy["prompts"] == {"count": 8, "images": 2, "source": "annotations"}
    out = finished[0] / "onnx"
    onnx_bytes, fp16_bytes = (sum((d / f"{p}.onnx").stat().st_size for p in PARTS) for d in (out, out / "fp16"))
    assert size["file_ratio"] == pytest.approx(onnx_bytes / fp16_bytes)
    assert 0.25 < size["quantized_layers_ratio"] < 0.35
    assert latency["engine"] == "onnxruntime"
    assert latency["speedup"] == pytest.approx(latency["baseline_ms"] / latency["quantized_ms"], abs=1e-3)
    assert report["disagreements"] == []
    quantized = [layer for layer in report["layers"] if layer["requested"] != "float"]
    assert len(quantized) == 23
    for layer in quantized:
        assert layer["requested"] == "W4A8: INT8 GEMM"
        assert layer["executed"].startswith("INT8 GEMM (")
        assert 0 < layer["sqnr_db"] < 60
        assert layer["group_size"] > 0
    assert any(layer["rank"] > 0 for layer in quantized)
    assert all(layer["skipped_because"] for layer in report["layers"] if layer["requested"] == "float")
    text = (finished[0] / "report" / "report.md").read_text()
    assert all(layer["name"] in text for layer in report["layers"])
    assert "Relative mIoU" in text


def test_json_answers_one_object_and_logs_go_to_stderr(finished: tuple[Path, Answer]) -> None:
    answer = finished[1]
    assert isinstance(answer.json, dict)
    assert "on 2 images" in answer.err
    assert "\x1b" not in answer.err  # no bars and no colours where there is no terminal


def test_the_sqnr_is_that_of_the_quantized_layers_against_the_folded_float_ones(
    finished: tuple[Path, Answer], inputs: Inputs
) -> None:
    weights = finished[0] / "weights"
    checkpoint = load_checkpoint(str(inputs.checkpoint))
    folds = Folds.load(weights)
    model, codes = load_quantized(weights)
    images = [open_source(f"{inputs.coco}")[index].image for index in (0, 1)]
    batches = [torch.from_numpy(checkpoint.processor(image).pixel_values)[None] for image in images]
    unfolded = layer_sqnr(checkpoint.model, model, list(codes), batches)
    folds.apply(checkpoint.model)
    expected = layer_sqnr(checkpoint.model, model, list(codes), batches)
    assert expected != unfolded, "the job smooths"
    told = {layer["name"]: layer["sqnr_db"] for layer in finished[1].json["layers"] if layer["name"] in codes}
    assert told == {name: pytest.approx(value, abs=0.02) for name, value in expected.items()}


def test_the_same_command_finds_everything_done(finished: tuple[Path, Answer], inputs: Inputs, tmp_path: Path) -> None:
    out = tmp_path / "again"
    shutil.copytree(finished[0], out)
    before = hashes(out, "weights", "onnx", "engines")
    answer = samq("run", *whole_job(inputs), "--output-dir", out)
    assert answer.code == 0
    assert answer.err.count("done before, nothing changed") == 3
    assert hashes(out, "weights", "onnx", "engines") == before
    assert "Every quantized layer executes what was requested" in answer.out


def test_stage_by_stage_gives_the_same_bytes(finished: tuple[Path, Answer], inputs: Inputs, tmp_path: Path) -> None:
    """In another process, with another hash seed, its evaluation images named at the end only."""
    out = tmp_path / "out"
    start = [argument for argument in whole_job(inputs) if argument not in ("--eval-data", inputs.coco)]
    lines = [
        ["quantize", *start, "--output-dir", out],
        ["export", "--output-dir", out],
        ["build", "--output-dir", out],
        ["validate", "--output-dir", out, "--eval-data", inputs.coco, "--quiet"],
    ]
    arguments = ["\t".join(map(str, line)) for line in lines]
    done = subprocess.run(
        [sys.executable, "-c", STAGE_BY_STAGE, *arguments],
        capture_output=True, text=True, check=False, cwd=tmp_path, env={**os.environ, "PYTHONHASHSEED": "12345"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"Done: {out} ({stage})" for stage in ("quantize", "export", "build")]
    expected = hashes(finished[0], "weights", "onnx", "engines")
    assert hashes(out, "weights", "onnx", "engines") == expected


def test_static_shapes_go_through_all_stages(finished: tuple[Path, Answer], inputs: Inputs, tmp_path: Path) -> None:
    out = tmp_path / "static"
    shutil.copytree(finished[0], out)
    answer = samq("run", *whole_job(inputs), "--output-dir", out, "--static-shapes", "--json")
    assert answer.code == 0, answer.err
    assert answer.err.count("done before") == 1
    assert answer.json["accuracy"]["prompts"]["count"] == 8
    assert answer.json["disagreements"] == []
    before = finished[1].json["accuracy"]["by_kind"]["box"]  # boxes have as many points as the static decoder takes
    assert answer.json["accuracy"]["by_kind"]["box"]["miou_baseline"] == pytest.approx(
        before["miou_baseline"], abs=0.02
    )


def test_what_the_runtime_makes_of_the_canonical_graph_is_flagged(
    finished: tuple[Path, Answer], tmp_path: Path
) -> None:
    """Q/DQ for one scale a token, which ONNX Runtime silently runs in FP32: requested and executed must differ."""
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    directory, folder = OutputDir.open(out), out / "engines" / "onnxruntime"
    recipe = recipe_of("int4_w4a8_rtn", ipts={"mode": "dynamic", "granularity": "per_token"})
    for part in PARTS:
        save_part(canonical(recipe, part), folder / f"{part}.onnx")
    directory.record("build", folder.iterdir(), options={"engine": "onnxruntime"})
    report = samq("validate", "--output-dir", out, "--json").json
    flagged = [layer for layer in report["layers"] if layer["name"] in report["disagreements"]]
    assert len(flagged) == report["size"]["quantized_layers"] == 23
    assert {layer["requested"] for layer in flagged} == {"W4A8: INT8 GEMM"}
    assert {layer["executed"] for layer in flagged} == {"FP32 GEMM (MatMul)"}
    text = (out / "report" / "report.md").read_text()
    assert "23 layers do not execute what was requested: 23 × FP32 GEMM (MatMul) instead of W4A8: INT8 GEMM" in text
    assert f"({', '.join(report['disagreements'][:3])} and 20 more)" in text
    assert text.count("⚠") == 23


def test_without_images_the_report_says_what_it_lacks(
    finished: tuple[Path, Answer], inputs: Inputs, tmp_path: Path
) -> None:
    """As of a job whose calibration images were too few to set some aside."""
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    (tmp_path / "few").mkdir()
    shutil.copy(inputs.photos / "0.png", tmp_path / "few")
    directory = OutputDir.open(out)
    directory.job |= {"eval_data": None, "calib_data": str(tmp_path / "few")}
    directory.stages["quantize"]["calibration_fingerprint"] = open_source(tmp_path / "few").fingerprint()
    directory.save()
    answer = samq("validate", "--output-dir", out, "--json")
    assert answer.code == 0, answer.err
    report = answer.json
    lacks = " ".join(report["lacks"])
    assert all(words in lacks for words in ("accuracy", "SQNR", "too small", "--eval-data"))
    assert {report["accuracy"][key] for key in ("miou_baseline", "miou_relative", "agreement_iou")} == {None}
    assert {layer["sqnr_db"] for layer in report["layers"]} == {None}
    assert report["latency"]["speedup"] > 0
    assert "Lacks accuracy" in (out / "report" / "report.md").read_text()
    refused(samq("validate", "--output-dir", out, "--min-relative-miou", 0.5), 2, "too small")


def test_calibration_images_that_changed_since_are_not_evaluated_on(
    finished: tuple[Path, Answer], inputs: Inputs, tmp_path: Path
) -> None:
    """Which of them were set aside cannot be told any more."""
    out, photos = tmp_path / "out", tmp_path / "photos"
    shutil.copytree(finished[0], out)
    shutil.copytree(inputs.photos, photos)
    directory = OutputDir.open(out)
    directory.job |= {"eval_data": None, "calib_data": str(photos)}
    directory.stages["quantize"]["calibration_fingerprint"] = open_source(photos).fingerprint()
    directory.save()
    shutil.copy(photos / "0.png", photos / "new.png")
    refused(samq("validate", "--output-dir", out), 6, "changed since `quantize`", "--eval-data")


@pytest.mark.parametrize(
    ("option", "value", "code", "words"),
    [("--min-relative-miou", 1.0, 3, "agreement with the baseline"), ("--min-speedup", 1000, 4, "speedup")],
)
def test_a_missed_gate_has_its_exit_code_and_keeps_the_report(
    finished: tuple[Path, Answer], inputs: Inputs, tmp_path: Path, option: str, value: float, code: int, words: str
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    shutil.rmtree(out / "report")
    answer = samq("validate", "--output-dir", out, "--eval-data", inputs.photos, option, value, "--json")
    refused(answer, code, words, option)
    assert answer.json["exit_code"] == code
    (gate,) = answer.json["gates"]
    assert (gate["asked"], gate["passed"]) == (value, False)
    assert json.loads((out / "report" / "report.json").read_text())["gates"] == [gate]
    assert "MISSED" in (out / "report" / "report.md").read_text()
    assert set(OutputDir.open(out).stages) == {"quantize", "export", "build", "validate"}


def test_the_manifest_tells_how_long_quantization_took(finished: tuple[Path, Answer]) -> None:
    told = OutputDir.open(finished[0]).stages["quantize"]
    assert 0 <= told["calibration_s"] <= told["quantization_s"] <= told["seconds"]
    assert told["quantization_s"] + told["waited_for_images_s"] <= told["seconds"] + 0.2  # each is rounded


def test_a_reached_gate_ends_with_0(finished: tuple[Path, Answer], tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    answer = samq("validate", "--output-dir", out, "--min-relative-miou", 0.1, "--min-speedup", 0.001)
    assert answer.code == 0, answer.err
    assert answer.out.count("passed") == 2


def test_an_accuracy_gate_without_images_is_refused_before_any_work(inputs: Inputs, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--model-path", inputs.checkpoint, "--config", "int4_w4only_rtn", "--output-dir", out]
    refused(samq("run", *arguments, "--min-relative-miou", 0.9), 2, "--min-relative-miou", "--eval-data")
    assert not out.exists()


def test_dry_run_tells_every_layer_and_writes_nothing(inputs: Inputs, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["quantize", *whole_job(inputs)[:-2], "--output-dir", out, "--dry-run"]
    answer = samq(*arguments)
    assert answer.code == 0, answer.err
    lines = answer.out.splitlines()
    name = "vision_encoder.backbone.blocks.3.mlp.proj_out"
    (line,) = [line for line in lines if line.startswith(f"{name} ")]  # one line a layer, nothing squeezed
    assert re.search(r"384 → 96 +W4A8, groups of 128 \+ rank auto +73,728 → \d+,\d+ ", line)
    assert "wgts.low_rank.max_overhead" in line
    (skipped,) = [line for line in lines if line.startswith("mask_decoder.iou_prediction_head.proj_in ")]
    assert "float" in skipped
    assert "wgts.skip_decoder" in skipped
    plan = samq(*arguments, "--json").json
    assert [row["name"] for row in plan["layers"]] == [line.split()[0] for line in lines[1 : lines.index("")]]
    assert plan["total"]["quantized"] == 23
    assert all(layer["skip"] or layer["planned_bytes"] < layer["fp16_bytes"] for layer in plan["layers"])
    assert not out.exists()


def test_dry_run_plans_the_bytes_that_are_stored(finished: tuple[Path, Answer], inputs: Inputs, tmp_path: Path) -> None:
    plan = samq("run", *whole_job(inputs), "--output-dir", tmp_path / "out", "--dry-run", "--json").json
    stored = {layer["name"]: layer["stored_bytes"] for layer in finished[1].json["layers"]}
    planned = {layer["name"]: layer["planned_bytes"] for layer in plan["layers"]}
    assert planned.keys() == stored.keys()
    assert 0.95 * sum(planned.values()) < sum(stored.values()) <= sum(planned.values()), "ranks share one budget"
    assert all(planned[layer["name"]] == stored[layer["name"]] for layer in plan["layers"] if layer["skip"])


def test_quiet_says_nothing(finished: tuple[Path, Answer], tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    assert samq("build", "--output-dir", out, "--quiet") == Answer(0, "", "")


def test_doctor_tells_the_machine_and_what_engines_execute() -> None:
    facts = samq("doctor", "--json").json
    assert facts["presets"]["int4_w4a8"]["onnxruntime"] == "INT8 GEMM"
    assert facts["presets"]["int4_w4only"]["onnxruntime"] == "INT4 weights, FP32 arithmetic"
    assert "CPUExecutionProvider" in facts["onnxruntime_providers"]
    assert facts["free_disk_gb"] > 0
    text = samq("doctor").out
    assert "int8_w8a8" in text
    assert facts["onnxruntime"] in text


def test_doctor_tells_the_tensorrt_of_another_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAMQ_TENSORRT_PYTHON", str(tmp_path / "nothing"))
    assert "nothing cannot be started (No such file" in samq("doctor", "--json").json["tensorrt"]
    for version, remark in (
        ("8.6.1", ""),
        ("10.0.1", " (TensorRT 10.0.1 is too old for trt10; install 10.3 or a later 10.x)"),
    ):
        monkeypatch.setattr(tensorrt, "about", lambda version=version: (version, None))
        assert samq("doctor", "--json").json["tensorrt"] == f"{version}, of {tmp_path / 'nothing'}{remark}"


def test_images_without_objects_are_bad_data(finished: tuple[Path, Answer], inputs: Inputs, tmp_path: Path) -> None:
    """Nothing can be told of them, whatever is asked for; the report that was there stays."""
    out, path = tmp_path / "out", tmp_path / "none.json"
    shutil.copytree(finished[0], out)
    content = json.loads(inputs.coco.read_text())
    for annotation in content["annotations"]:
        annotation["segmentation"] = []
    path.write_text(json.dumps(content))
    command = ("validate", "--output-dir", out, "--eval-data", f"{path}:{inputs.coco.parent}")
    answer = samq(*command, "--min-relative-miou", 0.9)
    refused(answer, 6, "none of the 2 evaluation images has an object", "--eval-data")
    assert (out / "report" / "report.html").is_file()


def test_a_dataset_of_the_users_own_is_calibrated_on(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_data.py").write_text(
        "import numpy as np\ndef make(): return [np.full((50, 60, 3), 40 * i, np.uint8) for i in range(5)]\n"
    )
    monkeypatch.chdir(tmp_path)
    arguments = ["--model-path", inputs.checkpoint, "--calib-data", "my_data:make", "--num-calib-samples", 1]
    answer = samq("quantize", *arguments, "--config", "int8_w8a8", "--output-dir", "out", "--json")
    assert answer.code == 0, answer.err
    assert "my_data:make" in OutputDir.open(Path("out")).stages["quantize"]["calibration"]


NO_SUCH = "no/such/folder"
JOB = "quantize --model-path {ck} --output-dir {out}"
REFUSALS = {
    "unknown command": ("quantise", 2, "quantise"),
    "unknown option": ("run --model x", 2, "--model", "--help"),
    "missing option": ("quantize --model-path {ck}", 2, "--output-dir"),
    "unknown preset": (f"{JOB} --config int4_w4a9", 2, "int4_w4a8"),
    "unknown part": (f"{JOB} --parts encoder", 2, "image_encoder"),
    "nothing to quantize": (
        f"{JOB} --config int4_w4only_rtn --parts mask_decoder",
        2,
        "no layer",
        "set wgts.skip_decoder: false",
    ),
    "nothing to plan": (f"{JOB} --config int4_w4only_rtn --parts mask_decoder --dry-run", 2, "no layer"),
    "TensorRT's options without it": (
        "run --model-path {ck} --output-dir {out} --config int4_w4only_rtn --optimization-level 0 --max-batch 4",
        2,
        "optimization_level, ranges",
        "--engine tensorrt",
    ),
    "no calibration images": (JOB, 2, "--calib-data"),
    "no such images": (f"{JOB} --calib-data {NO_SUCH}", 6, NO_SUCH),
    "no such checkpoint": (
        f"quantize --model-path {NO_SUCH} --output-dir {{out}} --config int4_w4only_rtn",
        6,
        NO_SUCH,
    ),
    "image size": (f"{JOB} --image-size 100 --config int4_w4only_rtn", 2, "multiples of 32"),
    "no GPU": (f"{JOB} --device cuda --config int4_w4only_rtn", 5, "--device cpu"),
    "no output directory": ("export --output-dir {out}", 6, "quantize"),
    "output is a file": ("quantize --model-path {ck} --output-dir {file} --config int4_w4only_rtn", 2, "is a file"),
    "output is another's": (
        "quantize --model-path {ck} --output-dir {ck} --config int4_w4only_rtn",
        2,
        "not samq's",
        "--force",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_are_one_line_with_the_documented_exit_code(case: str, inputs: Inputs, tmp_path: Path) -> None:
    if case == "no GPU" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    command, code, *words = REFUSALS[case]
    (tmp_path / "file").touch()
    known = {"ck": inputs.checkpoint, "out": tmp_path / "out", "file": tmp_path / "file"}
    filled = [word.format(**known) for word in command.split()]
    before = hashes(inputs.checkpoint, ".")
    refused(samq(*filled), code, *words)
    answer = samq(*filled, "--json")
    assert answer.json["exit_code"] == code
    assert all(word in answer.json["error"] for word in words)
    assert hashes(inputs.checkpoint, ".") == before


def test_no_command_is_a_refusal_that_points_to_the_help() -> None:
    refused(samq(), 2, "Missing command", "samq-export --help")


def test_an_unknown_key_of_a_config_is_named_with_its_line(inputs: Inputs, tmp_path: Path) -> None:
    config = tmp_path / "my.yaml"
    config.write_text("wgts:\n  dtype: sint4\n  group_shape: [[1, 64]]\n")
    arguments = ["--model-path", inputs.checkpoint, "--output-dir", tmp_path / "out", "--config", config]
    refused(samq("quantize", *arguments), 2, "group_shapes", "3")


def test_the_printed_exit_codes_are_the_real_ones() -> None:
    from samq import errors

    text = " ".join(samq("--help").out.split())
    for error, words in {
        errors.UsageError: "bad usage or config",
        errors.AccuracyGateMissed: "accuracy gate missed",
        errors.SpeedGateMissed: "engine slower than asked",
        errors.MachineLacks: "the machine lacks what was asked for",
        errors.BadInput: "bad input data, checkpoint or output directory",
    }.items():
        assert f"{error.exit_code} {words}" in text


def test_an_interrupt_is_one_line(inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "interrupting.py").write_text(
        "class Data:\n  def __len__(self): return 5\n  def __getitem__(self, i): raise KeyboardInterrupt\n"
        "def make(): return Data()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    arguments = ["--model-path", inputs.checkpoint, "--calib-data", "interrupting:make", "--output-dir", tmp_path / "o"]
    refused(samq("quantize", *arguments), 130, "interrupted")


def test_a_forced_job_that_fails_costs_nothing(finished: tuple[Path, Answer], inputs: Inputs, tmp_path: Path) -> None:
    out, junk = tmp_path / "out", tmp_path / "junk"
    shutil.copytree(finished[0], out)
    write_text(junk / "broken.png", "no image")
    before = hashes(out, ".")
    forced = ["quantize", "--model-path", inputs.checkpoint, "--output-dir", out, "--force"]
    refused(samq(*forced, "--calib-data", junk, "--config", "int8_w8a8"), 6, "broken.png")
    refused(samq(*forced, "--parts", "mask_decoder", "--config", "int4_w4only_rtn"), 2, "no layer")
    assert hashes(out, ".") == before


def test_a_job_that_failed_does_not_block_the_directory(inputs: Inputs, tmp_path: Path) -> None:
    write_text(tmp_path / "junk" / "broken.png", "no image")
    start = ["quantize", "--model-path", inputs.checkpoint, "--output-dir", tmp_path / "out", "--config"]
    refused(samq(*start, "int8_w8a8", "--calib-data", tmp_path / "junk"), 6, "broken.png")
    assert samq(*start, "int4_w4only_rtn").code == 0


def test_a_stage_looks_at_what_it_starts_from(finished: tuple[Path, Answer], tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    with (out / "onnx" / "mask_decoder.onnx").open("ab") as file:
        file.write(b"x")
    refused(samq("build", "--output-dir", out), 6, "onnx/mask_decoder.onnx was changed since `export`")


def test_shapes_other_than_the_exported_ones_are_refused(finished: tuple[Path, Answer], tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    refused(samq("build", "--output-dir", out, "--static-shapes"), 2, "samq-export export --static-shapes")


def test_evaluation_images_of_one_validation_are_not_those_of_the_next(
    finished: tuple[Path, Answer], inputs: Inputs, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    validate = ["validate", "--output-dir", out, "--json"]
    other = samq(*validate, "--eval-data", inputs.photos, "--num-eval-samples", 1).json
    again = samq(*validate).json
    assert other["evaluation_data"] != again["evaluation_data"] == finished[1].json["evaluation_data"]


def test_what_a_dataset_prints_is_not_in_the_answer(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "talking.py").write_text(
        "import numpy as np\ndef make():\n    print('hello')\n    return [np.zeros((40, 50, 3), np.uint8)] * 3\n"
    )
    monkeypatch.chdir(tmp_path)
    arguments = ["--model-path", inputs.checkpoint, "--calib-data", "talking:make", "--num-calib-samples", 1]
    answer = samq("quantize", *arguments, "--config", "int8_w8a8", "--output-dir", "out", "--json")
    assert answer.json["stages"] == ["quantize"]
    assert "hello" in answer.err


def test_a_bug_is_told_in_the_answer_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr("samq.tools.doctor.examine", broken)
    monkeypatch.setattr(sys, "argv", ["samq-export", "doctor", "--json"])
    answers = io.StringIO()
    with contextlib.redirect_stdout(answers), pytest.raises(ZeroDivisionError):
        cli.main()
    assert json.loads(answers.getvalue())["exit_code"] == 1


@pytest.mark.parametrize(("key", "value"), [("model", None), ("num_eval_samples", "x"), ("parts", 3)])
def test_a_damaged_manifest_is_one_line(finished: tuple[Path, Answer], tmp_path: Path, key: str, value: object) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["job"][key] = value
    (out / "manifest.json").write_text(json.dumps(manifest))
    refused(samq("validate", "--output-dir", out), 6, key, "--force")
