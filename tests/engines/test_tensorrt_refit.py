"""New weights in plans that were built refittable; TensorRT is simulated."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from simulated_tensorrt import GRAPH, VERSIONS, WEIGHTS, SimulatedCuda, Simulation

from samq.engines import cuda, tensorrt, tensorrt_log
from samq.engines.tensorrt_build import build_engine
from samq.engines.tensorrt_plan import BuildOptions, load_info, log_of
from samq.engines.tensorrt_run import TensorRtEngine
from samq.engines.tensorrt_weights import digest_of
from samq.errors import BadInput, MachineLacks
from samq.files import sha256_of

OLD, NEW = 1 + 2 + 3 + 4 + 5 + 6, 1 + 20 + 3 + 40 + 5 + 6
CHANGES = {"table/CONSTANT": [20], "c/KERNEL": [3, 40]}


@pytest.fixture(params=VERSIONS)
def trt(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Simulation]:
    simulation, device = Simulation(request.param), SimulatedCuda()
    monkeypatch.setitem(sys.modules, "tensorrt", simulation)
    monkeypatch.setattr(cuda, "bindings", lambda: device)
    monkeypatch.delenv("SAMQ_TENSORRT_PYTHON", raising=False)
    tensorrt_log._logger.cache_clear()
    yield simulation
    tensorrt_log._logger.cache_clear()


def graph(path: Path, weights: dict[str, list[float]] | None = None, **changes: Any) -> Path:
    content: dict[str, Any] = copy.deepcopy({**WEIGHTS, **changes})
    content["weights"].update(weights or {})
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


@pytest.fixture
def plan(trt: Simulation, tmp_path: Path) -> Path:
    path = tmp_path / "old.plan"
    build_engine(graph(tmp_path / "old.onnx"), path, BuildOptions(refittable=True))
    return path


def answer(plan: Path) -> float:
    """What the engine gives for zeros: the sum of its weights."""
    feeds = {"x": np.zeros((1, 3), np.float32), "labels": np.zeros((1, 1), np.int64)}
    return float(TensorRtEngine(plan).run(feeds)["y"][0, 0])


def test_new_weights_are_in_the_new_plan_and_old_ones_in_the_old(plan: Path, tmp_path: Path) -> None:
    onnx, new = graph(tmp_path / "new.onnx", CHANGES), tmp_path / "new.plan"
    assert answer(plan) == OLD
    before = load_info(plan)
    info = tensorrt.refit_engine(plan, onnx, new)
    assert (answer(new), answer(plan)) == (NEW, OLD)
    assert info == load_info(new)
    assert (info.onnx, info.onnx_sha256) == ("new.onnx", sha256_of(onnx))
    assert (info.options, info.layers, info.gemms, info.inputs) == (
        before.options, before.layers, before.gemms, before.inputs,
    )  # fmt: skip
    assert log_of(new).is_file()


def test_a_refitted_plan_is_refitted_again_in_its_place(plan: Path, tmp_path: Path) -> None:
    for weights, total in ((CHANGES, NEW), ({}, OLD), ({}, OLD)):
        tensorrt.refit_engine(plan, graph(tmp_path / "new.onnx", weights), plan)
        assert answer(plan) == total


def test_8_6_gets_what_is_new_and_what_was_merged_with_it(trt: Simulation, plan: Path, tmp_path: Path) -> None:
    tensorrt.refit_engine(plan, graph(tmp_path / "new.onnx", CHANGES), tmp_path / "new.plan")
    given = {f"{layer}/{role.name}" for layer, role, _ in trt.values("Refitter.set_weights")}
    by_file = trt.values("OnnxParserRefitter.refit_from_file")
    if trt.version == "8.6.0":
        assert (given, by_file) == ({"table/CONSTANT", "c/KERNEL", "c/BIAS"}, [])
    else:
        assert (given, by_file) == (set(), [(str(tmp_path / "new.onnx"),)])


def test_weights_that_were_folded_into_kernels_are_a_refusal(plan: Path, tmp_path: Path) -> None:
    onnx, new = graph(tmp_path / "new.onnx", {**CHANGES, "angles/Constant/CONSTANT": [7]}), tmp_path / "new.plan"
    with pytest.raises(BadInput, match=r"has folded 1 weights .* angles/Constant/CONSTANT .*without --refit"):
        tensorrt.refit_engine(plan, onnx, new)
    assert not new.exists()
    assert answer(plan) == OLD


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": [*WEIGHTS["layers"], ["e", "UNARY", "e", "FLOAT"]]},
        {"layers": [["renamed", *layer[1:]] if layer[0] == "b/Add" else layer for layer in GRAPH["layers"]]},
        {"layers": [[*layer[:3], "INT32"] if layer[0] == "b/Add" else layer for layer in WEIGHTS["layers"]]},
        {"shape": [2]},
    ],
    ids=["one more layer", "another name", "another type", "another shape"],
)
def test_another_graph_is_a_refusal(plan: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=r"new\.onnx has other layers or shapes than the plan old\.plan"):
        tensorrt.refit_engine(plan, graph(tmp_path / "new.onnx", **changes), tmp_path / "new.plan")


def test_what_cannot_be_refitted_is_one_line(trt: Simulation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnx, plan = graph(tmp_path / "part.onnx"), tmp_path / "part.plan"
    info = build_engine(onnx, plan)
    assert info.refittable is None
    with pytest.raises(BadInput, match=r"part\.plan: was not built refittable; build it again with --refittable"):
        tensorrt.refit_engine(plan, onnx, plan)
    with pytest.raises(BadInput, match=r"none\.onnx is missing"):
        tensorrt.refit_engine(plan, tmp_path / "none.onnx", plan)
    with pytest.raises(BadInput, match=r"none\.plan is missing"):
        tensorrt.refit_engine(tmp_path / "none.plan", onnx, plan)
    build_engine(onnx, plan, BuildOptions(refittable=True))
    another = SimulatedCuda((8, 6), b"NVIDIA A10\0")
    monkeypatch.setattr(cuda, "bindings", lambda: another)
    with pytest.raises(MachineLacks, match="this is NVIDIA A10"):
        tensorrt.refit_engine(plan, onnx, plan)


@pytest.mark.parametrize("step", ["open", "hand over", "refit", "write"])
def test_failures_of_tensorrt_are_one_line(trt: Simulation, plan: Path, tmp_path: Path, step: str) -> None:
    old = trt.version == "8.6.0"
    fails, answer, words = {
        "open": ("Runtime.deserialize_cuda_engine", None, "TensorRT fails"),
        "refit": ("Refitter.refit_cuda_engine", False, "TensorRT fails"),
        "write": ("ICudaEngine.serialize", None, "TensorRT fails"),
        "hand over": ("Refitter.set_weights", False, "does not take the weights")
        if old
        else ("OnnxParserRefitter.refit_from_file", False, "an initializer is missing"),
    }[step]
    trt.fails[fails] = answer
    with pytest.raises(BadInput, match=words):
        tensorrt.refit_engine(plan, graph(tmp_path / "new.onnx", CHANGES), tmp_path / "new.plan")
    assert not (tmp_path / "new.plan").exists()


@pytest.mark.parametrize(("kind", "file"), [("Builder", "new.onnx"), ("Runtime", "old.plan"), ("Refitter", "old.plan")])
def test_what_tensorrt_does_not_start_is_one_line(
    trt: Simulation, plan: Path, tmp_path: Path, kind: str, file: str
) -> None:
    trt.fails[kind] = None
    trt.says[kind] = [("WARNING", "CUDA initialization failure with error: 35. Please check")]
    with pytest.raises(MachineLacks, match=f"{file}: CUDA does not start"):
        tensorrt.refit_engine(plan, graph(tmp_path / "new.onnx", CHANGES), tmp_path / "new.plan")


def test_weights_that_numpy_has_not_count_as_new() -> None:
    one, other = np.ones(3, np.float32), np.ones(3, np.float16)
    assert digest_of(one) == digest_of(one.copy()) != digest_of(other)
    assert digest_of(one) != digest_of(one[:, None])
    assert digest_of(object()) == ""
