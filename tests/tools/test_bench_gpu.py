"""The GPU benchmark: what it measures next, what it keeps, what it prints; its graphs, run on the CPU."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from exported import as_written, float_model
from lowered import FLIPPED_CODES, HALF_ERROR
from onnx import TensorProto, helper
from small_model import IMAGE_SIZE, pixels, relative
from tensorrt_on_cpu import TensorRtOnCpu

from samq.calib.parts import ENCODER_OUTPUTS, ImageEncoder
from samq.calib.processor import SamProcessor
from samq.calib.sources import Sample
from samq.engines import tensorrt
from samq.engines.kernels import Kernel
from samq.engines.lint import lint
from samq.engines.onnxruntime import OnnxRuntimeEngine
from samq.engines.onnxruntime_cuda import (
    CPU,
    CUDA,
    CudaOptions,
    DeviceIO,
    Execution,
    OnnxRuntimeCudaEngine,
    executed_by,
)
from samq.engines.predictor import Predictor
from samq.engines.tensorrt_plan import BuildOptions
from samq.errors import BadInput, MachineLacks, UsageError
from samq.export.fold import fold_constants
from samq.export.parts import float_part
from samq.export.placement import Placement
from samq.export.tensorrt_targets import TARGETS, TRT8, TensorRtTarget
from samq.quant.config import load_recipe
from samq.tools.bench_gpu import cells, graphs, onnxruntime_cell, record, runtimes, session, shells
from samq.tools.bench_gpu.__main__ import main
from samq.tools.bench_gpu.bench import Bench, Built, Lowered
from samq.tools.bench_gpu.cells import DEMO, NAIVE_FP16, OUR_FP16, ROWS, Cell, cell_of, expected_seconds, groups, plan
from samq.tools.bench_gpu.code import digest_of, modules_of
from samq.tools.bench_gpu.graphs import AtHand, Graphs
from samq.tools.bench_gpu.masks import compare_masks, miou
from samq.tools.bench_gpu.record import Record, code_digest, read_record
from samq.tools.bench_gpu.subject import Pixels, Subject
from samq.tools.bench_gpu.table import markdown
from samq.tools.metrics import likeness
from samq.tools.simulation import torch_predictor

RUN = {"command": "bench", "gpu": "A GPU", "TensorRT": "8.6.0"}
DOCS = Path(__file__).parents[2] / "docs"
DONE = {"ms": 2.0, "seconds": 10.0}
EXACT = 1e-5
TRT = [name for name, row in ROWS.items() if row.engine == "tensorrt"]


def cell(row: str, model: str = "tiny", batch: int = 1) -> Cell:
    return Cell(model, batch, ROWS[row])


# --- what is measured


def test_cells_go_by_model_then_batch_then_row() -> None:
    planned = plan(["tiny", DEMO], [1, 8], [OUR_FP16, "torch-eager"])
    assert [c.key for c in planned[:3]] == ["tiny/1/trt-fp16", "tiny/1/torch-eager", "tiny/8/trt-fp16"]
    assert len({c.key for c in planned}) == len(planned) == 8
    assert [c.key for c in planned if c.with_masks] == ["demo/1/trt-fp16"]


def test_a_cell_is_found_by_its_key() -> None:
    planned = plan(["tiny", DEMO], [1, 8], [OUR_FP16, "torch-eager"])
    assert [cell_of(c.key) for c in planned] == planned


def test_only_neighbours_on_tensorrt_are_built_at_once() -> None:
    planned = plan(["tiny", "large"], [1], ["torch-eager", "ort-fp16", *TRT])
    sizes = [[c.row.name for c in group] for group in groups(planned[: 2 + len(TRT)], 4)]
    assert sizes == [["torch-eager"], ["ort-fp16"], *(TRT[start : start + 4] for start in range(0, len(TRT), 4))]
    (both,) = groups([cell(OUR_FP16), cell(OUR_FP16, "large")], 4)
    assert [c.model for c in both] == ["tiny", "large"]
    assert [len(group) for group in groups(planned, 1)] == [1] * len(planned)


def test_expected_time_follows_what_was_seen() -> None:
    def expected(group: list[Cell], known: dict[Cell, dict[str, Any]], *, built: bool = False) -> float:
        return expected_seconds(group, known, built=built)

    large = [cell(OUR_FP16, "large")]
    guessed = expected(large, {})
    assert guessed > expected([cell(OUR_FP16)], {})
    slow = {cell(NAIVE_FP16): {"ms": 1.0, "seconds": 1000.0, "measuring_seconds": 10.0}}
    assert expected(large, slow) > 1000 * cells.SIZES["large"]
    assert expected([cell("torch-eager", "large")], slow) == expected([cell("torch-eager", "large")], {})
    failed = {cell(NAIVE_FP16): {"reason": "it does not build", "seconds": 1000.0}}
    assert expected(large, failed) == guessed
    assert expected(large * 3, {}) > guessed
    assert expected(large, {}, built=True) < guessed, "what is built is only measured"
    assert 10 * cells.SIZES["large"] < expected(large, slow, built=True) < 20 * cells.SIZES["large"]
    assert expected(large * 3, slow, built=True) == pytest.approx(3 * expected(large, slow, built=True))


# --- the record


def test_a_cell_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "gpu.json"
    first, second = cell("torch-eager"), cell(OUR_FP16)
    Record(path, RUN).put(first, DONE)
    again = Record(path, RUN | {"command": "bench --jobs 2"})
    assert not again.is_due(first)
    assert again.is_due(second)
    again.put(second, {"reason": "no such tactic", "lacks": False, "seconds": 3.0})
    assert not Record(path, RUN).is_due(second)
    again.put(second, {"reason": "no TensorRT", "lacks": True, "seconds": 0.0})
    assert Record(path, RUN).is_due(second)
    content = read_record(path)
    assert [content["cells"][c.key]["run"] for c in (first, second)] == [0, 1]
    assert [run["command"] for run in content["runs"]] == ["bench", "bench --jobs 2"]
    monkeypatch.setattr(record, "code_digest", lambda _: "another")
    assert Record(path, RUN).is_due(first)


def test_a_cell_depends_on_its_row_and_its_code_alone() -> None:
    assert code_digest(cell(OUR_FP16)) == code_digest(cell(OUR_FP16, "large", 8))
    assert len({code_digest(cell(row)) for row in ROWS}) == len(ROWS)
    assert code_digest(cell(OUR_FP16, DEMO)) != code_digest(cell(OUR_FP16, DEMO, 8))  # with masks, and without


def test_code_that_a_cell_does_not_use_is_not_in_its_digest() -> None:
    tensorrt = modules_of(tuple(record._roots(cell("trt-w4a8"))))
    assert {"samq.export.tensorrt_weights", "samq.export.hiera", "samq.engines.tensorrt_build", "samq.quant.gptq"} <= (
        tensorrt
    )
    assert not {name for name in tensorrt if "onnxruntime" in name or "bench_gpu" in name}
    onnxruntime = modules_of(tuple(record._roots(cell("ort-w4only"))))
    assert {"samq.export.unpack_at_load", "samq.engines.onnxruntime_cuda"} <= onnxruntime
    assert not {name for name in onnxruntime if "tensorrt" in name}


def test_shells_depend_on_the_trace_alone() -> None:
    traced = modules_of(shells.TRACE_CODE, shells.NOT_TRACED)
    assert {"samq.export.trace", "samq.export.hiera", "samq.calib.parts"} <= traced
    assert not {name for name in traced if "lower" in name or "samq.quant" in name or "samq.tools" in name}
    naive = modules_of(shells.NAIVE_CODE)
    assert "samq.calib.parts" in naive
    assert not {name for name in naive if name.startswith(("samq.export.", "samq.quant."))}
    assert digest_of(shells.TRACE_CODE, shells.NOT_TRACED) != digest_of(shells.TRACE_CODE)


def test_a_module_that_is_none_is_named() -> None:
    with pytest.raises(ValueError, match=r"samq\.nowhere"):
        modules_of(["samq.files", "samq.nowhere"])


def test_figures_of_two_gpus_are_not_mixed(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    Record(path, RUN).put(cell("torch-eager"), DONE)
    with pytest.raises(UsageError, match=r"A GPU.*Another.*--json"):
        Record(path, RUN | {"gpu": "Another"})


@pytest.mark.parametrize("text", ["", "[]", '{"gpu": "A GPU", "runs": [], "cells": {"a/1/trt-fp16": {"run": 0}}}'])
def test_another_file_is_no_record(tmp_path: Path, text: str) -> None:
    path = tmp_path / "gpu.json"
    path.write_text(text)
    with pytest.raises(BadInput, match="is no record"):
        read_record(path)


# --- one run


class Stand:
    """In the place of `Bench`: figures at once, and what is to be raised for some rows."""

    def __init__(self, raises: Mapping[str, BaseException], unbuilt: Sequence[str]) -> None:
        self.raises, self.unbuilt, self.measured = raises, unbuilt, list[str]()

    def is_built(self, cell: Cell, lowered: Lowered) -> bool:
        return cell.row.name not in self.unbuilt

    def lower(self, cell: Cell) -> Lowered:
        if isinstance(self.raises.get(cell.row.name), MachineLacks):
            raise self.raises[cell.row.name]
        return Lowered(None, {}, 0.0)

    def build(self, cell: Cell, lowered: Lowered) -> Built:
        if isinstance(self.raises.get(cell.row.name), ValueError):
            raise self.raises[cell.row.name]
        return Built(None, {}, {}, 5.0)

    def figures(self, cell: Cell, built: Built) -> dict[str, Any]:
        if cell.row.name in self.raises:
            raise self.raises[cell.row.name]
        self.measured.append(cell.row.name)
        return {"ms": 1.5}

    def masks(self, cell: Cell, built: Built) -> dict[str, Any]:
        self.measured.append(f"{cell.row.name}, masks")
        return {"scenes": 9}


Start = Callable[..., tuple[Stand, dict[str, Any]]]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Runs `measure` as if there were a GPU, over rows of tiny; gives the stand-in and the record's cells."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(session, "facts", lambda command: RUN | {"command": command})

    def run(
        rows: Sequence[str],
        raises: Mapping[str, BaseException] | None = None,
        unbuilt: Sequence[str] = (),
        models: Sequence[str] = ("tiny",),
        **changes: Any,
    ) -> Any:
        stand = Stand(raises or {}, unbuilt)
        monkeypatch.setattr(session, "_benches", lambda settings, device: lambda model: stand)
        path = tmp_path / "gpu.json"
        values: dict[str, Any] = {
            "jobs": 1,
            "built": False,
            "level": 3,
            "scenes": 1,
            "redo": False,
            "deadline": None,
            "command": "bench",
        }
        with contextlib.suppress(KeyboardInterrupt):
            session.measure(plan(models, [1], rows), session.Settings(path, tmp_path, **(values | changes)))
        return stand, read_record(path)["cells"] if path.exists() else {}

    return run


def test_a_run_that_is_cut_off_goes_on(start: Start) -> None:
    rows = ["torch-eager", "torch-compile", OUR_FP16]
    stand, kept = start(rows, {"torch-compile": KeyboardInterrupt()})
    assert stand.measured == ["torch-eager"]
    assert kept.keys() == {"tiny/1/torch-eager"}
    assert kept["tiny/1/torch-eager"]["seconds"] >= 5
    stand, kept = start(rows)
    assert stand.measured == ["torch-compile", OUR_FP16]
    assert len(kept) == 3
    assert start(rows)[0].measured == []
    assert start(rows, redo=True)[0].measured == rows


def test_a_failure_is_a_reason_and_costs_no_other_cell(start: Start) -> None:
    rows = ["torch-eager", NAIVE_FP16, OUR_FP16, "trt-w4a8"]
    wrong = {
        "torch-eager": RuntimeError("it \x1b[96mbreaks\x1b[0m\nat length"),
        NAIVE_FP16: MachineLacks("no TensorRT"),
        OUR_FP16: ValueError(),
    }
    stand, kept = start(rows, wrong, jobs=3)
    assert stand.measured == ["trt-w4a8"]
    assert [kept[f"tiny/1/{row}"].get("reason") for row in rows] == ["it breaks", "no TensorRT", "ValueError", None]
    assert start(rows)[0].measured == [NAIVE_FP16]


def test_masks_are_compared_last_and_once(start: Start) -> None:
    rows = [OUR_FP16, "trt-w8a8"]
    stand, kept = start(rows, models=[DEMO])
    assert stand.measured == [*rows, *(f"{row}, masks" for row in rows)]
    assert [kept[f"demo/1/{row}"]["masks"] for row in rows] == [{"scenes": 9}] * 2
    assert start(rows, models=[DEMO])[0].measured == []
    stand, kept = start(rows, {"trt-w8a8": ValueError("no plan")}, models=[DEMO], redo=True)
    assert stand.measured == [OUR_FP16, f"{OUR_FP16}, masks"]
    assert "masks" not in kept["demo/1/trt-w8a8"]
    assert start(rows, models=[DEMO], built=True, unbuilt=rows)[0].measured == []
    assert start(rows, models=[DEMO], deadline=time.monotonic() - 1)[0].measured == []


def test_nothing_is_started_that_cannot_end(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    seconds = expected_seconds([cell("torch-eager")], {}, built=False) + 5
    stand, kept = start([OUR_FP16, "torch-eager"], deadline=time.monotonic() + seconds)
    assert stand.measured == ["torch-eager"]
    assert kept.keys() == {"tiny/1/torch-eager"}
    assert "left for later: tiny/1/trt-fp16" in capsys.readouterr().out


def test_what_is_not_built_can_be_left_for_later(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    stand, kept = start([OUR_FP16, "torch-eager"], unbuilt=(OUR_FP16,), built=True)
    assert stand.measured == ["torch-eager"]
    assert kept.keys() == {"tiny/1/torch-eager"}
    assert "left for later: tiny/1/trt-fp16, not built" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="PyTorch sees a CUDA GPU here")
def test_without_a_gpu_one_line_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "gpu.json"
    assert main(["--json", str(path)]) == 5
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not path.exists()
    assert main(["--json", str(path), "--table"]) == 6
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_what_is_not_there_cannot_be_asked_for() -> None:
    cells = [["--cells", key] for key in ("tiny/1/trt-int2", "huge/1/trt-fp16", "tiny/0/trt-fp16", "tiny/trt-fp16")]
    late = [["--seconds-left", "60", f"--{only}"] for only in ("build", "prepare")]
    for wrong in (["--rows", "trt-int2"], ["--models", "huge"], ["--batches", "0"], ["--level", "6"], *late, *cells):
        with pytest.raises(SystemExit) as ended:
            main(wrong)
        assert ended.value.code == 2


# --- graphs


@pytest.fixture(scope="module")
def subject() -> Subject:
    """The small model on the CPU, in the place of a full-size one."""
    return Subject("small", float_model(), "cpu")


@pytest.fixture(scope="module")
def made(subject: Subject, tmp_path_factory: pytest.TempPathFactory) -> Graphs:
    return Graphs(subject, tmp_path_factory.mktemp("work"), lambda: AtHand(TRT8))


@pytest.mark.parametrize("form", [shells.OURS, shells.NAIVE, shells.ATTENTION])
def test_a_shell_holds_no_weights_and_is_traced_once(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = float_model()
    first = shells.shell_of(model, "small", form, 2, tmp_path)
    (path,) = tmp_path.iterdir()
    assert path.stat().st_size < 0.5 * sum(parameter.nbytes for parameter in model.vision_encoder.parameters())
    monkeypatch.setattr(shells, "_TRACES", {})
    again = shells.shell_of(model, "small", form, 2, tmp_path)
    assert [node.name for node in again.graph] == [node.name for node in first.graph]
    filled = shells.fill(again, model)
    assert [value.name for value in filled.graph.inputs] == ["pixel_values"]
    given = fold_constants(float_part(filled, model, half=False) if form == shells.OURS else filled)
    found = as_written(given, {"pixel_values": pixels(2, seed=3).numpy()}, *ENCODER_OUTPUTS)
    with torch.no_grad():
        expected = ImageEncoder(model)(pixels(2, seed=3))
    assert max(relative(torch.from_numpy(f) - e, e) for f, e in zip(found, expected, strict=True)) < EXACT


@pytest.mark.parametrize(
    "row", [name for name, row in ROWS.items() if row.engine != "torch" and row.peer != "modelopt"]
)
def test_every_graph_computes_what_the_model_does(row: str, made: Graphs, subject: Subject) -> None:
    made_of = cell(row, "small")
    graph = made.encoder(made_of)
    images = subject.pixels(1)
    (found,) = as_written(onnx.load(graph.path), {"pixel_values": images}, runtimes.EMBEDDINGS)
    preset = made_of.row.preset
    simulated = runtimes.exact_embeddings(subject.model if preset is None else subject.quantized(preset).model, images)
    error = likeness(found, simulated)["relative_error"]
    assert error is not None
    if preset is None:
        assert error < (HALF_ERROR if made_of.row.engine == "onnxruntime" else EXACT)
    else:  # single INT8 codes flip, folding a branch rounds it again, and MLPs are a part of what is simulated
        quantization = likeness(simulated, runtimes.exact_embeddings(subject.model, images))["relative_error"]
        assert quantization is not None
        assert error < (quantization if made_of.row.placement == "mlp" else min(FLIPPED_CODES, 0.5 * quantization))
    if made_of.row.engine == "tensorrt":
        assert lint(ir.load(graph.path), TRT8) == []
    requested = graph.facts.get("requested", {})
    assert ("INT8 GEMM" in requested) == (row in TRT and preset is not None)
    assert ("largest_fold_error" in graph.facts) == (row in ("trt-svdquant-fold", "trt-svdquant-fold-everywhere"))


def test_a_shipped_placement_is_what_a_user_gets(subject: Subject, tmp_path: Path) -> None:
    """All blocks in FP16: every preset's graph has the structure of ours in FP16, and the two branches one graph."""
    made = Graphs(
        subject, tmp_path, lambda: AtHand(TRT8, Placement(layers={"vision_encoder.backbone.blocks.*": "fp16"}))
    )
    exact, branch, fold = (
        made.encoder(cell(row, "small")) for row in (OUR_FP16, "trt-svdquant-branch", "trt-svdquant-fold")
    )
    assert operators(branch.path) == operators(exact.path)
    assert branch.path.read_bytes() == fold.path.read_bytes()
    assert branch.facts["requested"].keys() == {"FP16 GEMM"}
    everywhere = made.encoder(cell("trt-svdquant-branch-everywhere", "small"))
    assert everywhere.facts["requested"]["INT8 GEMM"] > 0


def operators(path: Path) -> list[str]:
    """Types of the nodes of a file, in order."""
    return [node.op_type for node in onnx.load(path).graph.node]


def test_peers_on_onnxruntime_are_what_they_are_called(made: Graphs) -> None:
    graphs_of = {
        name: made.encoder(cell(name, "small")) for name in ROWS if name.startswith("ort-") and ROWS[name].peer
    }
    found = {name: set(operators(graph.path)) for name, graph in graphs_of.items()}
    assert "Attention" in found.pop("ort-attention-fp16")
    assert all("Softmax" in operators_found for operators_found in found.values())
    assert "BiasGelu" in found["ort-tools-fp16"] - found["ort-naive-fp16"]
    told = graphs_of["ort-tools-fp16"].facts
    assert told["fused"]["LayerNormalization"] > 0
    assert "model type bert" in told["note"]
    for graph in graphs_of.values():
        halves = [tensor for tensor in onnx.load(graph.path).graph.initializer if len(tensor.dims) > 1]
        assert {onnx.TensorProto.DataType.Name(tensor.data_type) for tensor in halves} == {"FLOAT16"}
        assert not list(graph.path.parent.glob(f"{graph.path.stem}.*.onnx"))


def test_a_graph_is_made_once(made: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    first = made.encoder(cell("trt-svdquant-fold", "small"))
    before = first.path.stat().st_mtime_ns
    monkeypatch.setattr(graphs, "lower_for_tensorrt", None)
    assert made.encoder(cell("trt-svdquant-fold", "small")) == first
    assert first.path.stat().st_mtime_ns == before


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda target: target.name)
def test_the_naive_graph_fits_every_target(target: TensorRtTarget, subject: Subject, made: Graphs) -> None:
    graph = Graphs(subject, made.work, lambda: AtHand(target)).encoder(cell(NAIVE_FP16, "small"))
    assert lint(ir.load(graph.path), target) == []


@pytest.mark.skipif(find_spec("modelopt") is not None, reason="ModelOpt is installed here")
def test_modelopt_is_named_where_it_is_missing(made: Graphs) -> None:
    with pytest.raises(MachineLacks, match=r"samq\[modelopt\]"):
        made.encoder(cell("trt-naive-int8", "small"))


def test_random_weights_are_rounded_and_the_demo_is_not(subject: Subject) -> None:
    demo = Subject.load(DEMO, "cpu")
    assert demo.recipe("int4_w4a8") == load_recipe("int4_w4a8")
    changed = subject.recipe("int4_w4a8")
    assert changed.wgts.kernel_gptq is None
    assert changed.smooth == load_recipe("int4_w4a8").smooth
    assert "RTN" in subject.note("int4_w4a8")
    assert "RTN" not in subject.note("int8_w8a8")
    assert demo.pixels(2).shape == (2, 3, 256, 256)
    assert subject.pixels(2).shape == (2, 3, IMAGE_SIZE, IMAGE_SIZE)


# --- figures


def test_masks_are_compared_with_the_simulation(subject: Subject, made: Graphs) -> None:
    masks = np.zeros((2, IMAGE_SIZE, IMAGE_SIZE), bool)
    masks[0, 20:60, 30:90], masks[1, 70:120, 10:50] = True, True
    scene = Sample("scene", np.random.default_rng(0).integers(0, 255, (IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8), masks)
    processor = SamProcessor({"size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE}}, "a test")
    exact = cell(OUR_FP16, "small")
    decoders = {points: OnnxRuntimeEngine(graph.path) for points, graph in made.decoders(exact).items()}
    assert [decoder.shapes["point_coords"] for decoder in decoders.values()] == [
        [1, shells.PROMPTS, n, 2] for n in (1, 2)
    ]
    engines = Predictor(OnnxRuntimeEngine(made.encoder(exact).path), runtimes.ByPoints(decoders))
    found = compare_masks(torch_predictor(subject.model), engines, [scene], processor)
    alone = miou(torch_predictor(subject.model), [scene], processor)
    assert found["scenes"] == 1
    for kind in ("box", "click"):
        assert alone[kind] == found[kind]["simulated"]
        assert found[kind]["prompts"] == 2
        assert found[kind]["agreement"] > 0.999
        assert found[kind]["engines"] == pytest.approx(found[kind]["simulated"], abs=1e-3)
        assert 0 < found[kind]["simulated"] < 1


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda target: target.name)
def test_the_decoders_fit_every_target(target: TensorRtTarget, subject: Subject, made: Graphs) -> None:
    for graph in Graphs(subject, made.work, lambda: AtHand(target)).decoders(cell("trt-w8a8", "small")).values():
        assert lint(ir.load(graph.path), target) == []
        assert bool(graph.float32) == (not target.strongly_typed)


def test_plans_are_built_alone(
    tmp_path: Path, subject: Subject, made: Graphs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of all cells; what cannot be built costs the others nothing."""
    built: list[Path] = []

    def build_plan(onnx_path: Path, folder: Path, options: BuildOptions, machine: str) -> Path:
        if "naive" in onnx_path.name:
            raise MachineLacks("out of memory")
        built.append(onnx_path)
        return folder / onnx_path.name

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(runtimes, "build_plan", build_plan)
    bench = Bench(subject, made.work, lambda: AtHand(TRT8), 3, 1)
    monkeypatch.setattr(session, "_benches", lambda settings, device: lambda model: bench)
    cells = [cell(row, "small") for row in (OUR_FP16, "torch-eager", NAIVE_FP16, "trt-w8a8")]
    session.build(cells, session.Settings(tmp_path / "gpu.json", tmp_path, 2, False, 3, 1, False, None, "bench"))
    assert len(set(built)) == len(built) == 2
    told = capsys.readouterr().out.splitlines()
    assert [line.partition(",")[0] for line in sorted(told)] == [
        f"small/1/{row}" for row in (OUR_FP16, NAIVE_FP16, "trt-w8a8")
    ]
    assert [line for line in told if line.endswith(": out of memory")] == [line for line in told if NAIVE_FP16 in line]
    assert not bench.is_built(cells[0], bench.lower(cells[0]))
    assert bench.is_built(cells[1], bench.lower(cells[1]))


def test_a_plan_is_built_once_for_one_graph_and_one_way_to_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by rows that are built at the same time; on another machine it is another plan."""
    machine = TensorRtOnCpu().install(monkeypatch)
    for name, operator in (("one", "Neg"), ("same", "Neg"), ("other", "Abs")):
        ends = [helper.make_tensor_value_info(end, TensorProto.FLOAT, [1]) for end in "xy"]
        nodes = [helper.make_node(operator, ["x"], ["y"], "node")]
        onnx.save(helper.make_model(helper.make_graph(nodes, "graph", ends[:1], ends[1:])), tmp_path / name)
    with ThreadPoolExecutor(2) as pool:
        plans = list(pool.map(lambda name: build(tmp_path / name, tmp_path), ("one", "same")))
    assert plans[0] == plans[1]
    assert len(machine.built) == 1
    one = tmp_path / "one"
    others = [build(tmp_path / "other", tmp_path), build(one, tmp_path, "A100")]
    others.append(build(one, tmp_path, float32=("norm",)))
    assert len({plans[0], *others}) == len(machine.built) == 4
    monkeypatch.setattr(runtimes, "digest_of", lambda *_: "new code")
    assert build(one, tmp_path) not in {plans[0], *others}
    assert build(one, tmp_path).is_file()
    assert len(machine.built) == 5


def build(onnx_path: Path, folder: Path, machine: str = "H100", float32: tuple[str, ...] = ()) -> Path:
    return runtimes.build_plan(onnx_path, folder, BuildOptions(float32=float32), machine)


def test_a_cell_has_its_figures(subject: Subject, made: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on TensorRT, but that ONNX Runtime on the CPU runs the lowered graph."""

    def measure(onnx_path: Path, images: Pixels) -> runtimes.Measured:
        answer = OnnxRuntimeEngine(onnx_path).run({"pixel_values": images})[runtimes.EMBEDDINGS]
        return runtimes.Measured([3.0, 1.0, 2.0], [0.5], answer, 7.0, 60.04, {"note": "on the CPU"})

    monkeypatch.setattr(runtimes, "build_plan", lambda onnx_path, *_: onnx_path)
    monkeypatch.setattr(runtimes, "measure_tensorrt", measure)
    of_small = Bench(subject, made.work, lambda: AtHand(TRT8), 3, 1)
    chosen = cell("trt-svdquant-fold", "small")
    figures = of_small.figures(chosen, of_small.build(chosen, of_small.lower(chosen)))
    assert (figures["ms"], figures["graph_ms"], figures["build_seconds"], figures["megabytes"]) == (2.0, 0.5, 60.0, 7.0)
    assert figures["relative_error"] == pytest.approx(figures["simulated_error"], rel=0.1)
    assert 0 < figures["largest_fold_error"] < 0.1
    assert figures["note"].startswith("random weights")
    assert figures["note"].endswith("; on the CPU")
    peer = replace(of_small.build(chosen, of_small.lower(chosen)), facts={"note": "of its fusions"})
    assert of_small.figures(chosen, peer)["note"].endswith("; of its fusions; on the CPU")
    json.dumps(figures)


class OfPlan:
    """A plan in a worker: 3 ms launched kernel by kernel, 2 ms as a CUDA graph."""

    def __init__(self, worker: list[bool | None], plan: Path, *, cuda_graph: bool | None = None) -> None:
        worker.append(cuda_graph)
        self._graph = cuda_graph is not False

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        return {runtimes.EMBEDDINGS: feeds["pixel_values"]}

    def time(self, feeds: Mapping[str, Any], repeats: int) -> list[float]:
        return [2.0 if self._graph else 3.0] * repeats

    def kernels(self, feeds: Mapping[str, Any]) -> tuple[Kernel, ...]:
        raise MachineLacks("no cupti")


def test_plans_are_measured_launch_by_launch_and_as_a_graph(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each in a process of its own; what cannot be traced costs no figure."""
    workers: list[list[bool | None]] = []

    def own_worker() -> contextlib.AbstractContextManager[list[bool | None]]:
        workers.append([])
        return contextlib.nullcontext(workers[-1])

    info = SimpleNamespace(plan_bytes=1_000_000, seconds=5.0, layers=())
    monkeypatch.setattr(runtimes, "WorkerEngine", OfPlan)
    monkeypatch.setattr(runtimes, "load_info", lambda _: info)
    monkeypatch.setattr(runtimes, "executed_layers", lambda _: {})
    monkeypatch.setattr(tensorrt, "own_worker", own_worker)
    measured = runtimes.measure_tensorrt(tmp_path / "a.plan", np.ones((1, 3, 2, 2), np.float32))
    assert workers == [[False], [True]]
    assert (set(measured.ms), set(measured.graph_ms)) == ({3.0}, {2.0})
    assert measured.facts == {"executed": {}, "layers": 0, "launched": None, "not_traced": "no cupti"}


# --- ONNX Runtime, in a process of its own


def test_slow_encoders_run_less_often() -> None:
    runs = [onnxruntime_cell.runs_for(milliseconds) for milliseconds in (0.5, 200, 1000, 60_000)]
    assert runs == [100, 100, 20, 10]


@pytest.mark.skipif(CUDA in ort.get_available_providers(), reason="this onnxruntime has a CUDA provider")
def test_the_process_tells_what_the_machine_lacks(made: Graphs) -> None:
    path = made.encoder(cell("ort-fp16", "small")).path
    with pytest.raises(MachineLacks, match=r"has no CUDA provider.*pip install"):
        runtimes.measure_onnxruntime(path, made.subject.pixels(1), CudaOptions())


def python(code: str) -> list[str]:
    return [sys.executable, "-I", "-S", "-c", code]


@pytest.mark.parametrize(
    ("code", "longest", "told"),
    [
        (
            "import time; print('timed runs', flush=True); time.sleep(60)",
            3.0,
            "not done within 3 s; it was at: timed runs",
        ),
        ("import time; time.sleep(60)", 0.01, "not done within 0.01 s; it was at: its start"),
        ("import os; print('the first run', flush=True); os.abort()", 60.0, "status -6 at: the first run"),
        ("import sys; sys.exit('Traceback\\nValueError: wrong')", 60.0, "status 1 at: its start .ValueError: wrong"),
        ("import sys; print('no such operator', file=sys.stderr); sys.exit(6)", 60.0, "^no such operator$"),
    ],
)
def test_a_process_that_hangs_or_breaks_costs_its_own_cell(code: str, longest: float, told: str) -> None:
    with pytest.raises(BadInput, match=told):
        runtimes._told_of(python(code), longest)


class OnCpu(OnnxRuntimeCudaEngine):
    """The engine but for its device; it records no CUDA graphs."""

    def __init__(self, path: Path, options: CudaOptions) -> None:
        if options.cuda_graph:
            raise BadInput("a node runs elsewhere")
        self.path, self.keep, self._io = path, False, DeviceIO(ort.InferenceSession(str(path), providers=[CPU]), "cpu")
        self.inputs, self.outputs = self._io.inputs, self._io.outputs

    def kernels(self, feeds: Mapping[str, Any]) -> tuple[Kernel, ...]:
        self.run(feeds)
        return (Kernel("nvjet_hsh_1", 1, 2.0), Kernel("nvjet_hsh_2", 1, 1.0))


def profiled_on_cpu(path: Path, _: CudaOptions) -> Execution:
    options = ort.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(path.with_suffix(".profile"))
    return executed_by(ort.InferenceSession(str(path), options, providers=[CPU]), path, CPU)


def test_what_the_process_measures(
    made: Graphs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on a GPU, but on the CPU."""
    monkeypatch.setattr(onnxruntime_cell, "OnnxRuntimeCudaEngine", OnCpu)
    monkeypatch.setattr(onnxruntime_cell, "executed_on_gpu", profiled_on_cpu)
    monkeypatch.setattr(onnxruntime_cell, "runs_for", lambda _: 3)
    path, images = made.encoder(cell("ort-fp16", "small")).path, made.subject.pixels(1)
    np.save(tmp_path / "images.npy", images)
    found = tmp_path / "found.npz"
    given = {"onnx": str(path), "images": str(tmp_path / "images.npy"), "found": str(found), "options": {}}
    (tmp_path / "job.json").write_text(json.dumps(given), encoding="utf-8")
    assert onnxruntime_cell.main([str(tmp_path / "job.json")]) == 0
    *steps, last = capsys.readouterr().out.splitlines()
    assert steps[0] == "making a session"
    told = json.loads(last)
    assert told["note"] == "no CUDA graph: a node runs elsewhere"
    assert sum(told["executed"].values()) == len({name.partition("/")[0] for name in matmuls(path)})
    assert told["operators"]["MultiHeadAttention"] == 5
    assert told["launched"] == {"FP16 GEMM": {"launches": 2, "microseconds": 3.0}}
    assert json.loads(path.with_suffix(".kernels.json").read_text())[0]["name"] == "nvjet_hsh_1"
    with np.load(found) as arrays:
        assert (arrays["ms"].shape, arrays["graph_ms"].shape) == ((3,), (0,))
        np.testing.assert_array_equal(
            arrays["embeddings"], OnnxRuntimeEngine(path).run({"pixel_values": images})[runtimes.EMBEDDINGS]
        )


def matmuls(path: Path) -> list[str]:
    """Names of the GEMMs of a file."""
    return [node.name for node in onnx.load(path).graph.node if "/MatMul" in node.name]


# --- the tables


def _masks(engines: float, simulated: float) -> dict[str, Any]:
    told = {"engines": engines, "simulated": simulated, "agreement": 1.0, "prompts": 3}
    return {"scenes": 9, "box": told, "click": told, "float": {"box": 0.8, "click": 0.8}}


def _content() -> dict[str, Any]:
    done = {"run": 0, "code": "0", "seconds": 1.0}
    return {
        "gpu": "A GPU",
        "runs": [RUN],
        "cells": {
            "demo/1/trt-w8a8": done
            | {
                "ms": 1.0,
                "masks": _masks(0.77, 0.78),
                "executed": {"INT8 GEMM": 3, "FP16 GEMM": 60},
                "on_cpu": ["node_pad_1 (Pad)", "node_pad_2 (Pad)"],
            },
            "demo/1/trt-fp16": done
            | {
                "ms": 1.5,
                "graph_ms": 1.2,
                "masks": _masks(0.8, 0.8),
                "launched": {"FP16 GEMM": {"launches": 84, "microseconds": 336.9}},
            },
            "demo/1/trt-naive-fp16": done
            | {"ms": 3.0, "megabytes": 12.34, "relative_error": 0.00123, "note": "as it is"},
            "demo/1/torch-eager": done | {"reason": "no such device", "lacks": True},
            "large/8/torch-eager": done | {"ms": 100.0, "build_seconds": None},
            "large/8/trt-w4a8": done | {"ms": 60.0, "launched": None, "not_traced": "no cupti"},
        },
    }


def test_the_tables_show_what_was_measured() -> None:
    lines = markdown(_content()).splitlines()
    assert [line for line in lines if line.startswith("###")] == ["### large, batch 8", "### demo, batch 1"]
    start = next(index for index, line in enumerate(lines) if line.startswith("| encoder and decoder"))
    times, masks = ({line[0]: line[1:] for line in map(_cells, part)} for part in (lines[:start], lines[start:]))
    assert times[ROWS["trt-fp16"].title][:3] == ["1.50", "1.20", "2.50"]
    assert times[ROWS["trt-naive-fp16"].title][2:6] == ["1.00", "12.3", "—", "1.2e-03"]
    assert times[ROWS["torch-eager"].title][:3] == ["100.00", "—", "—"]
    assert list(times).index(ROWS["trt-naive-fp16"].title) < list(times).index(ROWS["trt-fp16"].title)
    assert masks[ROWS["trt-fp16"].title] == ["9", *["1.0000"] * 4]
    assert masks[ROWS["trt-w8a8"].title] == ["9", *["0.9625", "0.9750"] * 2]
    assert f"- {ROWS['torch-eager'].title}: none: no such device" in lines
    assert f"- {ROWS['trt-naive-fp16'].title}: as it is" in lines
    assert f"- {ROWS['trt-w8a8'].title}: executes 60 × FP16 GEMM, 3 × INT8 GEMM" in lines
    assert f"- {ROWS['trt-w8a8'].title}: on the CPU 2 × Pad" in lines
    assert f"- {ROWS['trt-fp16'].title}: launches 84 × FP16 GEMM (337 µs)" in lines
    assert f"- {ROWS['trt-w4a8'].title}: launches: not known; no cupti" in lines
    assert lines[-1] == "1. `bench` on A GPU: TensorRT 8.6.0"


def _cells(line: str) -> list[str]:
    """The cells of a line of a table; a line of text is one cell."""
    return line.strip("| ").split(" | ")


def test_the_tables_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(_content()))
    assert main(["--json", str(path), "--table"]) == 0
    assert capsys.readouterr().out == markdown(_content())


@pytest.mark.parametrize("name", ["gpu", "gpu-h200"])
def test_the_documents_are_the_records(name: str) -> None:
    content = read_record(DOCS / f"{name}.json")
    assert (DOCS / f"{name}.md").read_text(encoding="utf-8") == markdown(content)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA GPU here")
def test_the_demo_model_is_measured(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    rows = ["torch-eager", "ort-fp16", "trt-naive-fp16", "trt-fp16", "trt-w8a8"]
    options = ["--models", DEMO, "--batches", "1", "--scenes", "2", "--level", "0", "--jobs", "8"]
    assert main(["--json", str(path), "--work", str(tmp_path), "--rows", *rows, *options]) == 0
    found = read_record(path)["cells"]
    assert found.keys() == {f"demo/1/{row}" for row in rows}
    for figures in found.values():
        if not figures.get("lacks"):  # ONNX Runtime without CUDA, or no TensorRT
            assert figures["ms"] > 0, figures
            assert figures["relative_error"] < 0.05
            assert figures.get("masks", _masks(1, 1))["box"]["agreement"] > 0.95
