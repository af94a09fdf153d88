"""`samq-export bench`: what it measures, what it writes and says, and what it refuses. No figure is judged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import Answer, refused, samq

from samq.engines.onnxruntime import OnnxRuntimeEngine
from samq.errors import BadInput
from samq.files import sha256_of
from samq.tools.alternation import WARM_UPS, beside, spread, time_in_turns
from samq.tools.bench import SIDES, slower
from samq.tools.engine_start import (
    ONNXRUNTIME,
    ONNXRUNTIME_ENGINE,
    file_bytes,
    measure_engine_memory,
    opener,
    start_engines,
)
from samq.tools.outdir import BENCH, MANIFEST, OutputDir


@pytest.fixture(scope="module")
def measured(finished: tuple[Path, Answer], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Answer]:
    """The finished job in a directory of its own, and what `bench --json` answered."""
    out = tmp_path_factory.mktemp("bench") / "out"
    shutil.copytree(finished[0], out)
    return out, samq("bench", "--output-dir", out, "--threads", 2, "--runs", 4, "--json")


def _copy(finished: tuple[Path, Answer], tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished[0], tmp_path / "out"))


def _edit_manifest(out: Path, edit: Any) -> None:
    manifest = json.loads((out / MANIFEST).read_text())
    edit(manifest)
    (out / MANIFEST).write_text(json.dumps(manifest))


class TestWhatItMeasures:
    def test_both_parts_of_both_engines_with_their_spread(self, measured: tuple[Path, Answer]) -> None:
        found = measured[1].json
        for part in ("image_encoder", "mask_decoder"):
            for side in SIDES:
                figures = found[part][side]
                assert 0 < figures["min_ms"] <= figures["p10_ms"] <= figures["median_ms"] <= figures["p90_ms"]
                assert figures["runs"] == 4
            ratio = found[part]["baseline"]["median_ms"] / found[part]["quantized"]["median_ms"]
            assert found[part]["speedup"] == pytest.approx(ratio, abs=1e-3)

    def test_an_image_and_a_click_are_both_parts(self, measured: tuple[Path, Answer]) -> None:
        found = measured[1].json
        for side in SIDES:
            parts = (found[part][side]["median_ms"] for part in ("image_encoder", "mask_decoder"))
            assert found["image_and_click"][f"{side}_ms"] == pytest.approx(sum(parts), abs=1e-2)

    def test_start_memory_and_files_of_each(self, measured: tuple[Path, Answer]) -> None:
        out, answer = measured
        found = answer.json
        for side, folder in (("baseline", "onnx/fp32"), ("quantized", "engines/onnxruntime")):
            assert found["start"][side]["load_ms"] > 0
            assert found["start"][side]["first_ms"] > 0
            assert found["file_bytes"][side] == sum(path.stat().st_size for path in (out / folder).glob("*.onnx"))
            if Path("/proc/self/clear_refs").exists():
                assert 1e6 < found["peak_bytes"][side] < 1e9

    def test_on_what(self, measured: tuple[Path, Answer]) -> None:
        out, answer = measured
        found = answer.json
        assert found["threads"] == 2
        assert found["engine"] == "onnxruntime"
        assert found["fingerprint"] == json.loads((out / MANIFEST).read_text())["fingerprint"]
        assert found["environment"]["cores"] > 0
        assert found["command"].startswith(f"samq-export bench --output-dir {out} --threads 2")


class TestWhatItWrites:
    def test_the_answer_and_nothing_else(self, finished: tuple[Path, Answer], measured: tuple[Path, Answer]) -> None:
        out, answer = measured
        assert answer.code == 0, answer.err
        assert json.loads((out / BENCH).read_text()) == answer.json
        before, after = (
            {str(path.relative_to(top)): sha256_of(path) for path in top.rglob("*") if path.is_file()}
            for top in (finished[0], out)
        )
        assert set(after) - set(before) == {BENCH}
        assert {name: after[name] for name in before} == before
        assert OutputDir.open(out).done("validate")

    def test_a_table_for_people(self, finished: tuple[Path, Answer], tmp_path: Path) -> None:
        answer = samq("bench", "--output-dir", _copy(finished, tmp_path), "--runs", 1)
        assert answer.code == 0, answer.err
        titles = ("encoder", "click", "load + first click", "peak memory", "files", "median (10–90 %) of 1 runs")
        lines = answer.out.splitlines()[1:]
        assert all(line.startswith(title) for line, title in zip(lines, titles, strict=True))
        assert "threads as the runtime chooses" in answer.out

    def test_quiet_says_nothing_of_what_it_does(self, finished: tuple[Path, Answer], tmp_path: Path) -> None:
        out = _copy(finished, tmp_path)
        answer = samq("bench", "--output-dir", out, "--runs", 1, "--quiet")
        assert (answer.code, answer.out, answer.err) == (0, "", "")
        assert (out / BENCH).is_file()


class TestTheLineForSlowEngines:
    def _found(self, baseline: float, quantized: float) -> dict[str, Any]:
        together = {"baseline_ms": baseline, "quantized_ms": quantized, "speedup": baseline / quantized}
        return {"image_and_click": together, "baseline": "FP32"}

    def test_is_one(self) -> None:
        told = slower(self._found(100, 125))
        assert told is not None
        assert "\n" not in told
        assert all(word in told for word in ("slower", "125 ms", "100 ms", "0.80×", "FP32"))

    @pytest.mark.parametrize("quantized", [50, 100, 100.4])
    def test_is_none_where_they_are_not(self, quantized: float) -> None:
        assert slower(self._found(100, quantized)) is None


class TestWhatItRefuses:
    def test_a_directory_that_is_none(self, tmp_path: Path) -> None:
        refused(samq("bench", "--output-dir", tmp_path / "nowhere"), 6, "no output directory", "run")

    def test_a_job_without_engines(self, finished: tuple[Path, Answer], tmp_path: Path) -> None:
        out = _copy(finished, tmp_path)
        _edit_manifest(out, lambda manifest: [manifest["stages"].pop(stage) for stage in ("build", "validate")])
        refused(samq("bench", "--output-dir", out), 6, "`build` is not done", "samq-export build")
        assert not (out / BENCH).exists()

    def test_an_engine_that_was_changed(self, finished: tuple[Path, Answer], tmp_path: Path) -> None:
        out = _copy(finished, tmp_path)
        (out / "engines" / "onnxruntime" / "mask_decoder.onnx").write_bytes(b"other")
        refused(samq("bench", "--output-dir", out), 6, "mask_decoder.onnx was changed")

    def test_an_engine_whose_sidecar_is_gone(self, finished: tuple[Path, Answer], tmp_path: Path) -> None:
        out = _copy(finished, tmp_path)
        (out / "engines" / "onnxruntime" / "mask_decoder.onnx.json").unlink()
        refused(samq("bench", "--output-dir", out), 6, "mask_decoder.onnx.json is missing", "samq-export build")

    @pytest.mark.parametrize("option", ["--threads", "--runs"])
    def test_no_threads_and_no_runs(self, finished: tuple[Path, Answer], option: str) -> None:
        refused(samq("bench", "--output-dir", finished[0], option, 0), 2, option)

    def test_engines_that_do_not_run_here(self, finished: tuple[Path, Answer], tmp_path: Path) -> None:
        out = _copy(finished, tmp_path)
        _edit_manifest(out, lambda manifest: manifest["job"].update(engine="tensorrt", target="trt8"))
        refused(samq("bench", "--output-dir", out), 5, "TensorRT")


class _Noted:
    """An engine that notes when it is run."""

    inputs = outputs = ()
    shapes: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, name: str, log: list[str]) -> None:
        self._name, self._log = name, log

    def run(self, feeds: Any) -> dict[str, Any]:
        self._log.append(self._name + feeds["of"])
        return {}


def test_engines_take_turns_each_with_its_own_inputs() -> None:
    log: list[str] = []
    engines = [(_Noted(name, log), {"of": name.upper()}) for name in "ab"]
    times = time_in_turns(engines, 3)  # type: ignore[arg-type]
    assert log == ["aA", "bB"] * (WARM_UPS + 3)
    assert [len(taken) for taken in times] == [3, 3]


class _Timed(_Noted):
    """An engine with a clock of its own."""

    def time(self, feeds: Any, repeats: int) -> list[float]:
        return [7.0] * repeats


def test_engines_with_a_clock_are_timed_by_it() -> None:
    assert time_in_turns([(_Timed("a", []), {})], 2) == [[7.0, 7.0]]  # type: ignore[list-item]


def test_turns_end_with_their_time_but_not_before_the_least() -> None:
    log: list[str] = []
    (times,) = time_in_turns([(_Noted("a", log), {"of": ""})], 50, least=3, seconds=0)  # type: ignore[list-item]
    assert len(times) == 3
    assert len(log) == WARM_UPS + 3
    timed = [(_Timed(name, []), {}) for name in "ab"]
    assert time_in_turns(timed, 50, least=3, seconds=0, at_once=2) == [[7.0] * 4] * 2  # type: ignore[arg-type]


def test_two_latencies_and_their_ratio() -> None:
    assert beside(10.00049, 4.0) == {"baseline_ms": 10.0, "quantized_ms": 4.0, "speedup": 2.5001}


def test_the_spread_of_known_times() -> None:
    times = [float(value) for value in range(1, 12)]
    assert spread(times) == {"median_ms": 6, "p10_ms": 2, "p90_ms": 10, "min_ms": 1, "runs": 11}


def test_an_encoder_starts_alone_too(finished: tuple[Path, Answer]) -> None:
    encoder = finished[0] / "engines" / "onnxruntime" / "image_encoder.onnx"
    assert isinstance(opener(ONNXRUNTIME_ENGINE, threads=1)(encoder), OnnxRuntimeEngine)
    assert set(start_engines(ONNXRUNTIME_ENGINE, [encoder], threads=1)) == {"load_ms", "first_ms", "peak_bytes"}


def test_files_count_with_the_weights_beside_them(tmp_path: Path) -> None:
    for name, size in (("a.onnx", 1), ("a.onnx.data", 20), ("b.xml", 300), ("b.bin", 4000), ("c.onnx", 50_000)):
        (tmp_path / name).write_bytes(bytes(size))
    assert [file_bytes(tmp_path / name) for name in ("a.onnx", "b.xml", "c.onnx")] == [21, 4300, 50_000]


def test_a_start_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"gone\.onnx does not start: .*is missing"):
        start_engines(ONNXRUNTIME, [tmp_path / "gone.onnx"])


def test_engines_that_do_not_start_have_no_memory(tmp_path: Path) -> None:
    assert measure_engine_memory(ONNXRUNTIME, [tmp_path / "image_encoder.onnx", tmp_path / "mask_decoder.onnx"]) is None
