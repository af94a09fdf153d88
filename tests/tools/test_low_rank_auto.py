"""`--low-rank auto`: branches folded into INT8 weights, unless that costs too much accuracy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
from conftest import Answer, Inputs, samq
from tensorrt_on_cpu import TensorRtOnCpu

from samq.calib.parts import PARTS

BLOCK = "vision_encoder.backbone.blocks"


@pytest.fixture
def out(exported: Path, tmp_path: Path) -> Path:
    """A copy of the exported job's output directory."""
    shutil.copytree(exported, tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> TensorRtOnCpu:
    return TensorRtOnCpu().install(monkeypatch)


def build(out: Path, *options: object) -> Answer:
    chosen = options or ("--placement", "none")
    answer = samq("build", "--output-dir", out, "--engine", "tensorrt", "--low-rank", "auto", *chosen)
    assert answer.code == 0, answer.err
    return answer


def made(out: Path) -> str | None:
    """What the manifest says became of the branches."""
    content: dict[str, Any] = json.loads((out / "manifest.json").read_text())
    low_rank: str | None = content["stages"]["build"]["low_rank"]
    return low_rank


def with_branches(graphs: list[onnx.GraphProto]) -> int:
    return sum(any("/low_rank/" in node.name for node in graph.node) for graph in graphs)


def graphs(machine: TensorRtOnCpu) -> list[onnx.GraphProto]:
    return [graph for graph, _ in machine.built]


def test_folded_branches_that_are_accurate_enough_stay(out: Path, machine: TensorRtOnCpu) -> None:
    build(out)
    answer = samq("validate", "--output-dir", out, "--min-relative-miou", 0, "--json")
    assert answer.code == 0, answer.err
    assert (made(out), answer.json["low_rank"]) == ("fold", "fold")
    assert len(machine.built) == 2 * len(PARTS)
    assert with_branches(graphs(machine)) == 0


def test_branches_are_kept_where_folding_misses_the_gate(out: Path, machine: TensorRtOnCpu, inputs: Inputs) -> None:
    """Folded engines give zeros here; those with branches compute what they should."""
    machine.spoils = lambda graph: not with_branches([graph]) and any(n.op_type == "QuantizeLinear" for n in graph.node)
    build(out)
    assert made(out) == "fold"
    validate = ("validate", "--output-dir", out, "--eval-data", inputs.photos, "--num-eval-samples", 2)
    answer = samq(*validate, "--min-relative-miou", 0.8, "--json")
    assert answer.code == 0, answer.err
    assert (made(out), answer.json["low_rank"]) == ("branch", "branch")
    assert len(machine.built) == 2 * 2 * len(PARTS)
    assert with_branches(graphs(machine)[2 * len(PARTS) :]) > 0
    (line,) = (line for line in answer.json["log"]["build"] if "built again with branches" in line)
    assert "below 0.8" in line
    assert "nothing changed" in build(out).err, "the decision stays"
    assert samq(*validate, "--min-relative-miou", 1).code == 3
    assert len(machine.built) == 2 * 2 * len(PARTS)


def test_what_a_placement_says_is_done(out: Path, machine: TensorRtOnCpu, tmp_path: Path) -> None:
    """No layer is left to choose for, so that a missed gate changes nothing."""
    path = tmp_path / "placement.yaml"
    path.write_text(f"layers:\n  {BLOCK}.1.*: branch\n  '*': fold\n")
    build(out, "--placement", path)
    assert made(out) is None
    machine.spoils = lambda graph: True
    samq("validate", "--output-dir", out, "--min-relative-miou", 1)
    assert len(machine.built) == 2 * len(PARTS)
    assert with_branches(graphs(machine)) == 1


def test_without_a_choice_on_the_command_line_branches_stay(out: Path, machine: TensorRtOnCpu) -> None:
    answer = samq("build", "--output-dir", out, "--engine", "tensorrt", "--placement", "none")
    assert answer.code == 0, answer.err
    assert made(out) == "branch"
    assert with_branches(graphs(machine)) == 1


def test_an_engine_that_is_slower_than_its_baseline_is_told(out: Path, machine: TensorRtOnCpu, tmp_path: Path) -> None:
    machine.clock = lambda graph: 1.5 if any(node.op_type == "QuantizeLinear" for node in graph.node) else 1.0
    build(out)
    for gate in (("--min-relative-miou", 0), ("--min-speedup", 0.7)):
        answer = samq("validate", "--output-dir", out, *gate)
        assert answer.code == 0
        assert "warning: the engine is slower than its baseline: 2.5 ms against 2 ms (0.80×" in answer.err
    answer = samq("validate", "--output-dir", out, "--min-speedup", 1)
    assert answer.code == 4
    assert "speedup is 0.8000, below --min-speedup 1" in answer.err
    assert "warning" not in answer.err
