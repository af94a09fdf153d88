"""Whose an output directory is, what is done in it, and what may be removed from it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Inputs, refused, samq
from test_files import disk_of

from samq.errors import BadInput, UsageError
from samq.files import temporaries, write_text
from samq.tools.outdir import BENCH, MANIFEST, OURS, OutputDir, alone_in

JOB = {"model": "m"}
DEADLY_DATA = """
import os, signal
import numpy as np
class Data:
    def __len__(self):
        return 5
    def __getitem__(self, index):
        Data.seen += 1
        if "DEADLY" in os.environ and Data.seen == 7:  # five for the fingerprint, then calibration
            os.kill(os.getpid(), signal.SIGKILL)
        return np.full((40, 50, 3), 50 * index, np.uint8)
    seen = 0
def make():
    return Data()
"""


def _filled(path: Path) -> OutputDir:
    """An output directory with one finished stage."""
    out = OutputDir.claim(path, JOB, "f1", force=False)
    write_text(path / "weights" / "w", "w")
    write_text(path / "config.yaml", "c")
    out.record("quantize", [path / "weights" / "w", path / "config.yaml"])
    return out


def test_a_claimed_directory_is_known_again_before_any_stage_is_done(tmp_path: Path) -> None:
    OutputDir.claim(tmp_path / "out", JOB, "f1", force=False)
    assert OutputDir.claim(tmp_path / "out", JOB, "f1", force=False).stages == {}


def test_the_same_job_goes_on(tmp_path: Path) -> None:
    _filled(tmp_path / "out")
    again = OutputDir.claim(tmp_path / "out", JOB, "f1", force=False)
    assert again.done("quantize")
    assert not again.done("export")


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_a_stage_with_a_damaged_artifact_is_not_done(damage: str, tmp_path: Path) -> None:
    out = _filled(tmp_path / "out")
    artifact = tmp_path / "out" / "weights" / "w"
    artifact.unlink() if damage == "missing" else artifact.write_text("other")
    assert not out.done("quantize")
    with pytest.raises(BadInput, match="samq-export quantize"):
        out.require("quantize")


def test_a_stage_done_again_invalidates_the_later_ones(tmp_path: Path) -> None:
    out = _filled(tmp_path / "out")
    for stage in ("export", "build"):
        out.record(stage, [tmp_path / "out" / "config.yaml"])
    out.record("export", [tmp_path / "out" / "config.yaml"])
    assert set(OutputDir.open(tmp_path / "out").stages) == {"quantize", "export"}


def test_what_a_stage_left_behind_goes_with_the_next_job(tmp_path: Path) -> None:
    """Files of stages that are done again or void, and what `bench` measured."""
    out = _filled(tmp_path)
    for name in ("engines/trt8", "engines/trt10", "report/report.json", BENCH):
        write_text(tmp_path / name, name)
    out.record("export", [tmp_path / "engines" / "trt8"])
    out.record("validate", [tmp_path / "report" / "report.json"])
    out.record("export", [tmp_path / "engines" / "trt10"])
    assert OutputDir.open(tmp_path).superseded == ("engines/trt8", "report/report.json")
    out = OutputDir.claim(tmp_path, JOB, "f1", force=False)
    out.record("validate", [tmp_path / "report" / "report.json"])
    assert OutputDir.open(tmp_path).superseded == ("engines/trt8",)
    OutputDir.claim(tmp_path, JOB, "f2", force=True).make_room()
    assert [path.name for path in tmp_path.iterdir()] == [MANIFEST]


def test_two_do_not_work_in_one_directory(tmp_path: Path) -> None:
    with alone_in(tmp_path / "out"), pytest.raises(UsageError, match="another samq-export works in"):  # noqa: SIM117
        with alone_in(tmp_path / "out"):
            pass
    assert not (tmp_path / "out").exists(), "it stayed empty"
    readers = [alone_in(tmp_path / "out", reads=True) for _ in range(2)]
    with readers[0], readers[1], pytest.raises(UsageError, match="another samq-export"), alone_in(tmp_path / "out"):
        pass
    with alone_in(tmp_path / "out"):
        write_text(tmp_path / "file", "")
    with alone_in(tmp_path / "file"):
        pass


def test_a_file_belongs_to_the_stage_that_wrote_it_last(tmp_path: Path) -> None:
    """`build` lowers again what `export --target` lowered."""
    out = _filled(tmp_path / "out")
    files = [tmp_path / "out" / "onnx" / "a", tmp_path / "out" / "engines" / "a"]
    for path in files:
        write_text(path, "as exported")
    out.record("export", files)
    write_text(files[1], "as built")
    out.record("build", files[1:])
    out.require("build")
    assert list(out.stages["export"]["artifacts"]) == ["onnx/a"]
    write_text(files[1], "changed by hand")
    with pytest.raises(BadInput, match="since `build`"):
        out.require("build")


def test_another_job_never_overwrites(tmp_path: Path) -> None:
    _filled(tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    with pytest.raises(UsageError, match="another job"):
        OutputDir.claim(tmp_path / "out", JOB, "f2", force=False)
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before


def test_force_removes_the_other_jobs_results_when_there_are_new_ones(tmp_path: Path) -> None:
    """Until then nothing is lost, and what others put there stays."""
    out = tmp_path / "out"
    _filled(out)
    theirs = ("notes.txt", "photos/1.png", "weights/mine.bin")
    for name in theirs:
        write_text(out / name, "mine")
    claimed = OutputDir.claim(out, JOB, "f2", force=True)
    assert claimed.stages == {}
    assert OutputDir.open(out).done("quantize"), "a job that fails now has cost nothing"
    claimed.make_room()
    left = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert left == {*theirs, MANIFEST}
    assert OutputDir.open(out).fingerprint == "f2"


def test_folders_that_are_left_empty_go_too(tmp_path: Path) -> None:
    _filled(tmp_path)
    OutputDir.claim(tmp_path, JOB, "f2", force=True).make_room()
    assert [path.name for path in tmp_path.iterdir()] == [MANIFEST]


def test_a_manifest_cannot_make_force_remove_what_is_elsewhere(tmp_path: Path) -> None:
    write_text(tmp_path / "precious", "mine")
    out = _filled(tmp_path / "out")
    out.stages["quantize"]["artifacts"]["../precious"] = "0"
    out.save()
    OutputDir.claim(tmp_path / "out", JOB, "f2", force=True).make_room()
    assert (tmp_path / "precious").read_text() == "mine"


def test_a_job_that_finished_nothing_does_not_hold_the_directory(tmp_path: Path) -> None:
    OutputDir.claim(tmp_path, JOB, "f1", force=False)
    assert OutputDir.claim(tmp_path, JOB, "f2", force=False).stages == {}
    assert OutputDir.open(tmp_path).fingerprint == "f2"


def test_a_note_that_is_missing_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="lacks checkpoint of `quantize`"):
        _filled(tmp_path).detail("quantize", "checkpoint")


def test_force_on_a_foreign_directory_removes_nothing(tmp_path: Path) -> None:
    """Someone's own `weights/` and `config.yaml` are not samq's because of their names."""
    foreign = [tmp_path / "weights" / "mine.bin", tmp_path / "config.yaml", tmp_path / "onnx" / "mine.onnx"]
    for path in foreign:
        write_text(path, "mine")
    with pytest.raises(UsageError, match="not samq's"):
        OutputDir.claim(tmp_path, JOB, "f1", force=False)
    OutputDir.claim(tmp_path, JOB, "f1", force=True)
    assert all(path.read_text() == "mine" for path in foreign)


def test_a_foreign_directory_is_not_touched(tmp_path: Path) -> None:
    theirs = tmp_path / "weights" / ".download.iso.abcdefgh.part"
    theirs.parent.mkdir()
    theirs.write_text("theirs")
    with pytest.raises(UsageError, match="not samq's"):
        OutputDir.claim(tmp_path, {}, "a", force=False)
    assert theirs.read_text() == "theirs"


def test_what_comes_before_a_stage_is_required_too(tmp_path: Path) -> None:
    directory = OutputDir.claim(tmp_path, {}, "a", force=False)
    for stage in ("quantize", "export", "build"):
        write_text(tmp_path / stage, stage)
        directory.record(stage, [tmp_path / stage])
    directory.require("build")
    write_text(tmp_path / "export", "changed")
    with pytest.raises(BadInput, match="was changed since `export`"):
        directory.require("build")


def test_force_does_not_follow_links(tmp_path: Path) -> None:
    write_text(tmp_path / "elsewhere" / "precious", "mine")
    out = _filled(tmp_path / "out")
    (tmp_path / "out" / "onnx").symlink_to(tmp_path / "elsewhere")
    out.record("export", [tmp_path / "out" / "onnx" / "precious"])
    OutputDir.claim(tmp_path / "out", JOB, "f2", force=True).make_room()
    assert (tmp_path / "elsewhere" / "precious").read_text() == "mine"


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"job": 1, "fingerprint": 2, "stages": 3}',
                '{"job": {}, "fingerprint": "f", "stages": {"quantize": {}}}'],
)  # fmt: skip
def test_an_unreadable_manifest_is_one_line_and_force_helps(content: str, tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(BadInput, match="--force"):
        OutputDir.claim(tmp_path, JOB, "f1", force=False)
    assert OutputDir.claim(tmp_path, JOB, "f1", force=True).stages == {}


def test_a_job_killed_in_the_middle_goes_on_with_the_same_command(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "deadly.py").write_text(DEADLY_DATA)
    out = tmp_path / "out"
    arguments = [
        "quantize", "--model-path", str(inputs.checkpoint), "--calib-data", "deadly:make", "--config", "int8_w8a8",
        "--num-calib-samples", "3", "--output-dir", str(out),
    ]  # fmt: skip
    command = [sys.executable, "-m", "samq.tools.cli", *arguments]
    calm = {**os.environ, "OMP_NUM_THREADS": "1"}  # the tensors are small; threads would only wait for each other
    killed = subprocess.run(
        command, cwd=tmp_path, env={**calm, "DEADLY": "1"}, capture_output=True, text=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [path.name for path in out.iterdir()] == [MANIFEST]
    left = out / "weights" / ".quantized.safetensors.abcd_123.part"  # as if it had been killed a little later
    write_text(left, "half")
    assert list(temporaries(out)) == [left]
    monkeypatch.syspath_prepend(tmp_path)
    answer = samq(*arguments)
    assert answer.code == 0, answer.err
    assert OutputDir.open(out).done("quantize")
    assert not list(temporaries(out))


def test_a_full_disk_loses_nothing_and_the_same_command_goes_on(inputs: Inputs, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [
        "quantize", "--model-path", inputs.checkpoint, "--config", "int4_w4only_rtn", "--output-dir", out,
    ]  # fmt: skip
    with disk_of(100_000):
        refused(samq(*command), 5, "the disk is full", "quantized.safetensors")
    assert [path.name for path in out.iterdir() if path.is_file()] == [MANIFEST]
    assert list((out / "weights").iterdir()) == []
    assert samq(*command).code == 0
    assert OutputDir.open(out).done("quantize")


def test_another_config_needs_force_on_the_command_line_too(inputs: Inputs, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["quantize", "--model-path", inputs.checkpoint, "--output-dir", out, "--quiet", "--config"]
    assert samq(*command, "int4_w4only_rtn").code == 0
    config = tmp_path / "other.yaml"
    config.write_text("wgts: {dtype: uint8, group_shapes: [[1, -1]]}\n")
    before = (out / MANIFEST).read_bytes()
    refused(samq(*command, config), 2, "another job", "--force")
    assert (out / MANIFEST).read_bytes() == before
    assert samq(*command, config, "--force").code == 0
    assert "uint8" in (out / "config.yaml").read_text()
    assert set(json.loads((out / MANIFEST).read_text())["stages"]) == {"quantize"}
    assert set(OURS) >= {path.name for path in out.iterdir()}


def test_a_checkpoint_that_changed_since_is_refused(inputs: Inputs, tmp_path: Path) -> None:
    checkpoint, out = tmp_path / "checkpoint", tmp_path / "out"
    shutil.copytree(inputs.checkpoint, checkpoint)
    start = ["quantize", "--model-path", checkpoint, "--config", "int4_w4only_rtn", "--output-dir", out]
    assert samq(*start).code == 0
    config = checkpoint / "config.json"
    config.write_text(config.read_text() + "\n")
    refused(samq("export", "--output-dir", out), 6, "changed since", str(checkpoint))
    refused(samq(*start), 2, "another job")
