"""`samq-export place`: what is measured, what is kept, what wins, what is refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import get_args

import onnx
import pytest
from conftest import Answer, Inputs, refused, samq
from tensorrt_on_cpu import H100, VERSION, TensorRtOnCpu

from samq.engines import tensorrt
from samq.engines.cuda import Device
from samq.errors import MachineLacks, UsageError
from samq.export.placement import MOST_EXACT_FIRST, RANKS, Figure, Form, Placement, load_placement
from samq.quant.config import load_recipe
from samq.tools import cli
from samq.tools.place import forms_for, table

BLOCK = "vision_encoder.backbone.blocks"
BLOCKS = [f"{BLOCK}.{index}" for index in range(5)]
FORMS: list[Form] = ["fp16", "branch", "fold"]


def quantizers(graph: onnx.GraphProto) -> int:
    return sum(node.op_type == "QuantizeLinear" for node in graph.node)


def has_branch(graph: onnx.GraphProto) -> bool:
    return any("/low_rank/" in node.name for node in graph.node)


def block_of(graph: onnx.GraphProto) -> str:
    return str(graph.output[0].name).removesuffix("/tokens")


def is_whole(graph: onnx.GraphProto) -> bool:
    return len(graph.output) > 1


def int8_wins(graph: onnx.GraphProto) -> float:
    """FP16 takes 2 ms, INT8 half of it; a branch costs 0.3 ms."""
    return (1.0 if quantizers(graph) else 2.0) + 0.3 * has_branch(graph)


def placed(exported: Path, path: Path, *options: object) -> Placement:
    answer = samq("place", "--output-dir", exported, "--out", path, *options)
    assert answer.code == 0, answer.err
    return load_placement(path)


def test_every_block_is_measured_as_it_stands_in_the_engine(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = TensorRtOnCpu(int8_wins).install(monkeypatch)
    placement = placed(exported, tmp_path / "placement.yaml", "--optimization-level", 4)
    assert (placement.gpu, placement.tensorrt) == (H100.name, VERSION)
    assert {block: list(forms) for block, forms in placement.blocks.items()} == dict.fromkeys(BLOCKS, FORMS)
    usual = Path(os.environ["XDG_CACHE_HOME"]) / "samq" / "tensorrt-timings"
    for graph, options in machine.built:
        assert options.timing_cache == str(usual)
        assert options.optimization_level == 4
        if is_whole(graph):
            continue
        ends = [value.name for value in (*graph.input, *graph.output) if value.name != "pixel_values"]
        assert options.half_io == tuple(ends)
        nodes = {node.name for node in graph.node}
        assert set(options.float32) <= nodes
        assert any(name.endswith("/variance") for name in options.float32) == (quantizers(graph) > 0)
    for figures in placement.blocks.values():
        times = [figures[form].milliseconds for form in FORMS]
        assert times in ([2.0, 1.3, 1.0], [2.0, 1.0, 1.0])  # of blocks whose layers are too small for a branch
        errors = [figures[form].error for form in FORMS]
        assert all(error is not None and 0 < error < 0.2 for error in errors)
        assert all(not figures[form].refused for form in FORMS)
    assert {placement.form(f"{block}.mlp.proj_in") for block in BLOCKS} <= {"branch", "fold"}


def test_the_placement_is_what_the_lowering_takes(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the first block is faster in INT8."""
    TensorRtOnCpu(lambda graph: 1.0 if block_of(graph) in BLOCKS[1:] else int8_wins(graph)).install(monkeypatch)
    path = tmp_path / "placement.yaml"
    placement = placed(exported, path)
    assert [placement.form(f"{block}.x") == "fp16" for block in BLOCKS] == [False, True, True, True, True]
    out = tmp_path / "out"
    shutil.copytree(exported, out)
    machine = TensorRtOnCpu().install(monkeypatch)
    answer = samq("build", "--output-dir", out, "--engine", "tensorrt", "--placement", path)
    assert answer.code == 0, answer.err
    encoder = machine.built[0][0]
    quantized = {node.name.partition("/")[0] for node in encoder.node if node.op_type == "QuantizeLinear"}
    assert quantized
    assert all(layer.startswith(f"{BLOCKS[0]}.") for layer in quantized)


@pytest.mark.parametrize("whole", [2.0, None])
def test_the_whole_encoder_has_the_last_word(
    whole: float | None, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks alone are faster in INT8; together they are not, or cannot be built."""

    def placed_so(graph: onnx.GraphProto) -> bool:
        return is_whole(graph) and quantizers(graph) > 0

    machine = TensorRtOnCpu(lambda graph: whole or 1.0 if placed_so(graph) else int8_wins(graph)).install(monkeypatch)
    machine.refuses = lambda graph: whole is None and placed_so(graph)
    path = tmp_path / "placement.yaml"
    answer = samq("place", "--output-dir", exported, "--out", path)
    assert answer.code == 0, answer.err
    why = "cannot be built so" if whole is None else "is not faster so than in FP16"
    assert f"the whole encoder {why}: every block is placed in FP16" in answer.err
    assert "Whole encoder fp16: 2.0000 ms." in answer.out
    placement = load_placement(path)
    assert {placement.form(f"{block}.x") for block in BLOCKS} == {"fp16"}
    assert {form: figure.milliseconds for form, figure in placement.whole.items()} == {"fp16": 2.0, "placed": whole}
    assert all(figures["fold"].milliseconds == 1.0 for figures in placement.blocks.values()), "they are kept"
    builds = len(machine.built)
    assert placed(exported, path) == placement
    assert len(machine.built) == builds


def test_until_the_whole_encoder_has_spoken_every_block_is_in_fp16(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted between its two builds; the first is kept, and so are both when fewer forms are asked for later."""

    def interrupted(graph: onnx.GraphProto) -> bool:
        if is_whole(graph) and quantizers(graph):
            raise KeyboardInterrupt
        return False

    machine = TensorRtOnCpu(int8_wins, refuses=interrupted).install(monkeypatch)
    path = tmp_path / "placement.yaml"
    assert samq("place", "--output-dir", exported, "--out", path).code == 130
    assert {load_placement(path).form(f"{block}.x") for block in BLOCKS} == {"fp16"}
    assert list(load_placement(path).whole) == ["fp16"]
    machine.refuses = lambda graph: False
    machine.built.clear()
    whole = placed(exported, path)
    assert len(machine.built) == 1
    assert {whole.form(f"{block}.x") for block in BLOCKS} <= {"branch", "fold"}
    assert placed(exported, path, "--forms", "fp16").whole == whole.whole
    assert placed(exported, path) == whole
    assert len(machine.built) == 1


def test_int8_in_mlps_alone_can_be_measured(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = TensorRtOnCpu(int8_wins).install(monkeypatch)
    path = tmp_path / "placement.yaml"
    answer = samq("place", "--output-dir", exported, "--out", path, "--forms", "mlp")
    placement = load_placement(path)
    assert [line.split()[-2] for line in answer.out.splitlines() if line.startswith(f"| {BLOCKS[0]}")] == ["mlp"]
    assert [placement.form(f"{BLOCKS[0]}.{layer}") for layer in ("mlp.proj_in", "attn.qkv")] == ["int8", "fp16"]
    quantized = {
        node.name.partition("/")[0]
        for graph, _ in machine.built
        for node in graph.node
        if node.op_type == "QuantizeLinear"
    }
    assert quantized
    assert all(".mlp." in layer for layer in quantized)
    assert all(0 < figures["mlp"].error < 0.2 for figures in placement.blocks.values())  # type: ignore[operator]


def test_what_is_measured_is_not_measured_again(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "placement.yaml"
    machine = TensorRtOnCpu(int8_wins).install(monkeypatch)
    whole = placed(exported, path)
    builds = len(machine.built)
    assert placed(exported, path) == whole
    assert len(machine.built) == builds
    assert placed(exported, path, "--forms", "fp16").blocks == whole.blocks, "other forms are kept"
    placed(exported, path, "--optimization-level", 5)
    assert len(machine.built) == 2 * builds


def test_an_interrupted_measurement_goes_on(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "placement.yaml"
    machine = TensorRtOnCpu(int8_wins).install(monkeypatch)
    whole = placed(exported, tmp_path / "whole.yaml")
    builds = len(machine.built)

    def interrupted(graph: onnx.GraphProto) -> bool:
        if len(machine.built) == builds + 7:
            raise KeyboardInterrupt
        return False

    machine.refuses = interrupted
    assert samq("place", "--output-dir", exported, "--out", path).code == 130
    assert sum(map(len, load_placement(path).blocks.values())) == 7
    machine.refuses = lambda graph: False
    assert placed(exported, path) == whole
    assert len(machine.built) == 2 * builds


def test_blocks_built_at_once_are_timed_one_by_one(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of five blocks three, then two; none is timed before all of its batch are built."""
    machine = TensorRtOnCpu(int8_wins).install(monkeypatch)
    one_by_one = placed(exported, tmp_path / "one.yaml")
    at_each_run: list[int] = []

    def clock(graph: onnx.GraphProto) -> float:
        at_each_run.append(len(machine.built))
        return int8_wins(graph)

    machine = TensorRtOnCpu(clock).install(monkeypatch)
    assert placed(exported, tmp_path / "three.yaml", "--jobs", 3) == one_by_one
    assert at_each_run[:10] == [3, 3, 3, 5, 5, 8, 8, 8, 10, 10]
    assert len(at_each_run) == len(machine.built)
    assert {options.timing_cache for graph, options in machine.built if not is_whole(graph)} == {None}
    machine.refuses = lambda graph: quantizers(graph) > 0 and block_of(graph) == BLOCKS[3]
    refusing = placed(exported, tmp_path / "refusing.yaml", "--jobs", 3)
    assert "no implementation" in refusing.blocks[BLOCKS[3]]["fold"].refused


def test_a_block_for_which_there_was_no_memory_beside_others_is_built_alone(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = TensorRtOnCpu(int8_wins).install(monkeypatch)

    def build_apart(onnx_path: Path, *others: object) -> None:
        if block_of(onnx.load(onnx_path).graph) == BLOCKS[1]:
            raise MachineLacks("the TensorRT process ended with status -9")
        machine.build_engine(onnx_path, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(tensorrt, "build_apart", build_apart)
    placement = placed(exported, tmp_path / "placement.yaml", "--jobs", 3)
    assert all(figures["fp16"].milliseconds == 2.0 for figures in placement.blocks.values())


def test_what_another_gpu_measured_is_not_overwritten(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "placement.yaml"
    TensorRtOnCpu(int8_wins).install(monkeypatch)
    placed(exported, path, "--forms", "fp16")
    kept = path.read_bytes()
    monkeypatch.setattr(tensorrt, "about", lambda: ("8.6.0", Device("NVIDIA Orin", (8, 7), 1)))
    refused(samq("place", "--output-dir", exported, "--out", path), 2, H100.name, "--out")
    assert path.read_bytes() == kept


def test_a_form_that_fails_or_computes_something_else_does_not_win(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = TensorRtOnCpu(int8_wins).install(monkeypatch)
    machine.refuses = lambda graph: quantizers(graph) > 0 and block_of(graph) == BLOCKS[3]
    machine.spoils = lambda graph: quantizers(graph) > 0 and block_of(graph) == BLOCKS[4]
    path = tmp_path / "placement.yaml"
    answer = samq("place", "--output-dir", exported, "--out", path)
    assert answer.code == 0
    placement = load_placement(path)
    assert [placement.form(f"{block}.x") == "fp16" for block in BLOCKS] == [False, False, False, True, True]
    failed, spoiled = (placement.blocks[block]["fold"] for block in BLOCKS[3:])
    assert failed.milliseconds is None
    assert "no implementation" in failed.refused
    assert "quantization explains" in spoiled.refused
    assert "fails" in answer.out
    assert "refused" in answer.out
    machine.refuses = lambda graph: False
    assert placed(exported, path).blocks[BLOCKS[3]]["fold"].milliseconds == 1.0, "failures are tried again"


def test_fp16_that_computes_something_else_is_warned_of(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    TensorRtOnCpu(int8_wins, spoils=lambda graph: block_of(graph) == BLOCKS[1]).install(monkeypatch)
    answer = samq("place", "--output-dir", exported, "--out", tmp_path / "placement.yaml")
    assert answer.code == 0
    assert f"{BLOCKS[1]} computes something else in FP16" in answer.err
    assert load_placement(tmp_path / "placement.yaml").form(f"{BLOCKS[1]}.x") == "fp16"


def test_without_fp16_there_is_nothing_to_compare_with(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    TensorRtOnCpu(refuses=lambda graph: block_of(graph) == BLOCKS[1]).install(monkeypatch)
    path = tmp_path / "placement.yaml"
    refused(samq("place", "--output-dir", exported, "--out", path), 6, "no implementation")
    assert list(load_placement(path).blocks) == [BLOCKS[0]]


def test_a_rewrite_can_be_left_out(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = TensorRtOnCpu(lambda graph: len(graph.node) / 100).install(monkeypatch)
    rewritten = placed(exported, tmp_path / "a.yaml", "--forms", "fp16")
    plain = placed(exported, tmp_path / "b.yaml", "--forms", "fp16", "--without", "split_qkv,concat_pad")
    assert len(machine.built) == 2 * len(BLOCKS)
    assert plain.blocks != rewritten.blocks
    refused(samq("place", "--output-dir", exported, "--without", "nothing"), 2, "split_qkv", "concat_pad")


def test_a_budget_buys_accuracy(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = TensorRtOnCpu(int8_wins).install(monkeypatch)
    path = tmp_path / "placement.yaml"
    fastest = placed(exported, path, "--timing-cache", "none")
    assert {options.timing_cache for _, options in machine.built} == {None}
    assert {fastest.form(f"{block}.x") for block in BLOCKS} == {"branch", "fold"}
    richest = placed(exported, path, "--budget", 200)
    assert {richest.form(f"{block}.x") for block in BLOCKS} == {"fp16"}


def components(graph: onnx.GraphProto) -> int:
    """Components of the branches of a graph."""
    sides = {tensor.name: tensor.dims[0] for tensor in graph.initializer if tensor.dims}
    ups = [node for node in graph.node if node.op_type == "MatMul" and node.name.endswith("/low_rank/up")]
    return sum(sides[name] for node in ups for name in node.input if name in sides)


def test_a_budget_buys_ranks(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A component costs 1 µs, all of them 88, and the budget is 50: those that remove least are folded."""
    TensorRtOnCpu(lambda graph: (1.0 if quantizers(graph) else 9.0) + 0.001 * components(graph)).install(monkeypatch)
    path = tmp_path / "placement.yaml"
    placement = placed(exported, path, "--budget", 1)
    assert all(set(forms) == {"fp16", "branch", *RANKS, "fold"} for forms in placement.blocks.values())
    for block in BLOCKS[:2]:  # the branches of the others have few components or none
        most_first = [placement.blocks[block][form] for form in ("branch", *RANKS, "fold")]
        times, errors = (
            [figure.milliseconds or 0 for figure in most_first],
            [figure.error or 0 for figure in most_first],
        )
        assert times == sorted(times, reverse=True)
        assert errors == sorted(errors)
    assert {placement.form_of_block(f"{block}.") for block in BLOCKS[:2]} == {"branch-8"}
    out = tmp_path / "out"
    shutil.copytree(exported, out)
    assert samq("export", "--output-dir", out, "--target", "trt8", "--placement", path).code == 0
    lowered = json.loads((out / "engines" / "trt8" / "lowering.json").read_text())["image_encoder"]["layers"]
    narrowed = {name: layer["kept_rank"] for name, layer in lowered.items() if layer["kept_rank"] is not None}
    assert {name.rpartition(".blocks.")[2][0] for name in narrowed} == {"0", "1"}
    assert set(narrowed.values()) == {8}


def test_the_answer_as_json(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    TensorRtOnCpu(int8_wins).install(monkeypatch)
    path = tmp_path / "placement.yaml"
    answer = samq("place", "--output-dir", exported, "--out", path, "--json")
    told = answer.json
    assert told.pop("file") == str(path)
    assert Placement.model_validate(told) == load_placement(path)


def test_refusals(
    finished: tuple[Path, Answer], exported: Path, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    TensorRtOnCpu().install(monkeypatch)
    refused(samq("place", "--output-dir", finished[0]), 2, "dynamic shapes", "--target")
    refused(samq("place", "--output-dir", tmp_path), 6, "no output directory")
    refused(samq("place", "--output-dir", exported, "--forms", "int8"), 2, "int8", "fp16, mlp, branch, branch-32")
    refused(samq("place", "--output-dir", exported, "--eval-data", tmp_path / "gone"), 6, "gone")
    refused(samq("place", "--output-dir", exported, "--timing-cache", inputs.coco / "folder"), 5, "--timing-cache")
    out = tmp_path / "out"
    samq("quantize", "--model-path", inputs.checkpoint, "--config", "int4_w4only_rtn", "--output-dir", out)
    refused(samq("place", "--output-dir", out), 6, "`export` is not done")

    def nothing() -> tuple[str, Device]:
        raise MachineLacks("TensorRT is not installed; run `pip install samq[tensorrt]`")

    monkeypatch.setattr(tensorrt, "about", nothing)
    refused(samq("place", "--output-dir", exported), 5, "samq[tensorrt]")
    assert not (exported / "placement.yaml").exists()


@pytest.mark.gpu
def test_on_the_gpu_at_hand(exported: Path, tmp_path: Path) -> None:
    """FP16 can be built, and computes what its graph says."""
    try:
        version, gpu = tensorrt.about()
    except MachineLacks as error:
        pytest.skip(str(error))
    out = tmp_path / "out"
    shutil.copytree(exported, out)
    placement = placed(out, tmp_path / "placement.yaml")
    assert (placement.gpu, placement.tensorrt) == (gpu.name, version)
    for figures in placement.blocks.values():
        assert figures["fp16"].milliseconds is not None
        assert not figures["fp16"].refused


def test_the_table_says_what_a_branch_is_worth() -> None:
    """0.05² − 0.03² for 4 µs, next to nothing for a branch that costs no time, and blocks without one."""
    figures = {
        form: Figure(milliseconds=taken, error=error, structure=form)
        for form, taken, error in (("fp16", 0.2, 0.01), ("branch", 0.104, 0.03), ("fold", 0.1, 0.05))
    }
    free = figures | {"branch": Figure(milliseconds=0.09, error=0.03)}
    same = figures | {"branch": figures["fold"]}
    blocks = {f"{BLOCK}.{index}": forms for index, forms in enumerate((figures, free, same))}
    header, _, *rows = table(Placement.model_validate({"layers": {"*": "fold"}, "blocks": blocks}))
    assert "error² · 10⁶ / µs" in header
    assert [row.split(" | ")[4].strip() for row in rows] == ["400", "free", ""]
    assert rows[0] == f"| {BLOCK}.0 | 0.2000 (0.01) | 0.1040 (0.03) | 0.1000 (0.05) | 400 | fold |"


def test_forms_follow_the_recipe() -> None:
    assert set(cli.FORMS) == set(get_args(Form)) == set(MOST_EXACT_FIRST)
    assert forms_for(load_recipe("int4_svdquant")) == ["fp16", "branch", "fold"]
    assert forms_for(load_recipe("int4_w4a8")) == forms_for(load_recipe("int4_w4only")) == ["fp16", "int8"]
    assert forms_for(load_recipe("int4_svdquant"), ("fold",)) == ["fp16", "fold"]
    assert forms_for(load_recipe("int4_svdquant"), budget=0.1) == ["fp16", "branch", *RANKS, "fold"]
    assert forms_for(load_recipe("int4_w4a8"), ("int8", "mlp")) == ["fp16", "mlp", "int8"]
    with pytest.raises(UsageError, match="branch: the forms of a recipe without low-rank branches are fp16, mlp, int8"):
        forms_for(load_recipe("int4_w4a8"), ("branch",))
