"""The embedded benchmark: rows that can be made and run, masks, the record and its tables. No figure is judged."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from exported import float_model
from small_model import IMAGE_SIZE

from samq.calib.parts import IMAGE_ENCODER, MASK_DECODER
from samq.calib.processor import SamProcessor
from samq.engines.onnxruntime import OnnxRuntimeEngine
from samq.errors import MachineLacks
from samq.files import write_json
from samq.tools.bench_embedded import measure
from samq.tools.bench_embedded.__main__ import main
from samq.tools.bench_embedded.rows import DECODERS, FP32, REWRITTEN, ROWS, Row
from samq.tools.bench_embedded.subject import Graphs
from samq.tools.bench_embedded.table import markdown
from samq.tools.bench_gpu.subject import Subject
from samq.tools.demo.dataset import CHECKPOINT
from samq.tools.progress import Reporter

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Graphs:
    """Those of the small model, which counts as one with random weights."""
    made = Graphs.__new__(Graphs)
    made.subject, made.folder = Subject("small", float_model(), "cpu"), tmp_path_factory.mktemp("graphs")
    return made


def _encoded(path: Path) -> dict[str, Any]:
    pixels = np.random.default_rng(5).standard_normal((1, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=np.float32)
    return OnnxRuntimeEngine(path, 1).run({"pixel_values": pixels})


@pytest.mark.parametrize("key", [key for key, row in ROWS.items() if row.engine == ROWS[FP32].engine])
def test_rows_of_onnxruntime_compute_what_fp32_computes(graphs: Graphs, key: str) -> None:
    exact, found = (_encoded(ROWS[k].make(graphs))["image_embeddings"] for k in (FP32, key))
    error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    assert error < (1e-5 if key in (FP32, REWRITTEN) else 0.5)
    assert (error > 1e-4) == (key not in (FP32, REWRITTEN))


def test_static_peers_quantize_activations_as_their_titles_say(graphs: Graphs) -> None:
    for key, wanted in (("ort-static-u8s8", onnx.TensorProto.UINT8), ("ort-static-s8s8", onnx.TensorProto.INT8)):
        graph = onnx.load(ROWS[key].make(graphs)).graph
        zero_points = {i.name: i for i in graph.initializer}
        first = next(node for node in graph.node if node.op_type == "QuantizeLinear")
        assert zero_points[first.input[2]].data_type == wanted


def test_a_peer_that_is_not_installed_says_how(graphs: Graphs) -> None:
    if find_spec("openvino") and find_spec("nncf"):
        assert ROWS["openvino"].make(graphs).is_file()
        return
    with pytest.raises(MachineLacks, match="pip install openvino nncf"):
        ROWS["nncf"].make(graphs)


class TestMeasuring:
    def _rows(self, *rows: Row) -> list[Row]:
        return [ROWS[FP32], *rows]

    def test_speed_of_every_row_and_why_a_peer_has_none(self, graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(measure, "STARTS", 1)

        def fails(graphs: Graphs) -> Path:
            raise RuntimeError("no kernel\nof many lines")

        rows = self._rows(ROWS[REWRITTEN], Row("nncf", "A peer", fails, peer=True))
        found = measure.speed(graphs, rows, runs=2, threads=1, reporter=Reporter(quiet=True))
        assert found[IMAGE_ENCODER]["nncf"] == {"reason": "RuntimeError: no kernel"}
        for key in (FP32, REWRITTEN):
            figures = found[IMAGE_ENCODER][key]
            assert figures["runs"] == 2
            assert figures["start_ms"] > 0
            assert figures["file_bytes"] == ROWS[key].make(graphs).stat().st_size
        assert set(found[MASK_DECODER]) == set(DECODERS)

    def test_a_bug_of_ours_is_no_entry(self, graphs: Graphs) -> None:
        def fails(graphs: Graphs) -> Path:
            raise RuntimeError("a bug")

        with pytest.raises(RuntimeError, match="a bug"):
            measure.speed(graphs, [Row("x", "Ours", fails)], 1, 1, Reporter(quiet=True))

    def test_masks_on_held_out_scenes(self, graphs: Graphs) -> None:
        graphs.subject.processor = SamProcessor.from_checkpoint(CHECKPOINT, IMAGE_SIZE)
        found = measure.masks(graphs, self._rows(ROWS[REWRITTEN]), 1, 1, Reporter(quiet=True))
        for kind in ("box", "click"):
            told = found[REWRITTEN][kind]
            assert told["count"] > 0
            assert told["agreement_iou"] > 0.99
            assert told["miou_relative"] == pytest.approx(told["miou_quantized"] / told["miou_baseline"])


def _record() -> dict[str, Any]:
    def timed(milliseconds: float) -> dict[str, Any]:
        return {"median_ms": milliseconds, "min_ms": milliseconds / 2, "runs": 3}

    encoders = {
        key: {**timed(speed), "start_ms": 2000, "peak_bytes": 5e8, "file_bytes": 1.5e8}
        for key, speed in ((FP32, 200), (REWRITTEN, 160), ("int8_w8a8", 100))
    }
    kind = {"miou_relative": 0.99876, "agreement_iou": 0.97654}
    return {
        "command": "python -m samq.tools.bench_embedded",
        "environment": {"cores": 2, "processor": "A CPU"},
        "versions": {"onnxruntime": "1.32.0"},
        "threads": 2,
        "scenes": 7,
        "load": [0.5, 2.25],
        "speed": {
            IMAGE_ENCODER: encoders | {"nncf": {"reason": "none here"}},
            MASK_DECODER: {key: timed(20) for key in DECODERS},
        },
        "masks": {"int8_w8a8": {"box": kind, "click": kind}},
    }


class TestTheTables:
    def test_ratios_are_to_both_forms_of_fp32(self) -> None:
        (line,) = (line for line in markdown(_record()).splitlines() if "W8A8" in line and "| 100 |" in line)
        assert "| 100 | 50 | 2.00 / 2.00 | 1.60 / 1.60 | 2000 | 500 | 150.0 |" in line

    def test_reasons_accuracy_machine_and_load_are_told(self) -> None:
        text = markdown(_record())
        assert "- OpenVINO with NNCF, INT8: none: none here" in text
        assert "| 0.9988 | 0.9765 | 0.9988 | 0.9765 |" in text
        assert "on 2 cores of A CPU; onnxruntime 1.32.0. Load at the start" in text
        assert "7 held-out scenes" in text

    def test_printing_a_record(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = tmp_path / "record.json"
        write_json(path, _record())
        assert main(["--json", str(path), "--table"]) == 0
        assert capsys.readouterr().out == markdown(_record())

    @pytest.mark.parametrize("content", [None, "[]", "{}", "not JSON"])
    def test_no_record(self, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None) -> None:
        path = tmp_path / "record.json"
        if content is not None:
            path.write_text(content)
        assert main(["--json", str(path), "--table"]) == 6
        told = capsys.readouterr().err.splitlines()
        assert len(told) == 1
        assert "without --table" in told[0]

    def test_rows_without_their_baseline(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["--json", str(tmp_path / "x.json"), "--rows", "nncf"]) == 2
        assert FP32 in capsys.readouterr().err

    def test_the_document_shows_the_record_beside_it(self) -> None:
        record = json.loads((DOCS / "benchmarks.json").read_text(encoding="utf-8"))
        assert (DOCS / "benchmarks.md").read_text(encoding="utf-8").endswith(markdown(record))
