"""Running a plan: what goes in and out, what is refused; TensorRT and CUDA are simulated on the host's memory."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from simulated_tensorrt import GRAPH, STATIC, VERSIONS, SimulatedCuda, Simulation

from samq.engines import cuda, tensorrt_log, tensorrt_run
from samq.engines.base import BoundedEngine
from samq.engines.kernels import Kernel
from samq.engines.tensorrt_build import build_engine
from samq.engines.tensorrt_plan import BuildOptions
from samq.engines.tensorrt_run import TensorRtEngine
from samq.errors import BadInput, MachineLacks


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> SimulatedCuda:
    simulated = SimulatedCuda()
    monkeypatch.setattr(cuda, "bindings", lambda: simulated)
    return simulated


@pytest.fixture(params=VERSIONS)
def trt(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, device: SimulatedCuda) -> Iterator[Simulation]:
    simulation = Simulation(request.param)
    monkeypatch.setitem(sys.modules, "tensorrt", simulation)
    tensorrt_log._logger.cache_clear()
    yield simulation
    tensorrt_log._logger.cache_clear()


@pytest.fixture
def plan(trt: Simulation, tmp_path: Path) -> Path:
    return built(GRAPH, tmp_path)


def built(graph: object, folder: Path) -> Path:
    (folder / "part.onnx").write_text(json.dumps(graph), encoding="utf-8")
    build_engine(folder / "part.onnx", folder / "part.plan", BuildOptions(ranges={"batch": (1, 2, 4)}))
    return folder / "part.plan"


def feeds(batch: int) -> dict[str, NDArray[Any]]:
    x = np.arange(batch * 3, dtype=np.float32).reshape(batch, 3)
    return {"x": x, "labels": np.arange(batch, dtype=np.int64)[:, None], "more": np.zeros(1)}


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_numbers(plan: Path, cuda_graph: bool) -> None:
    """int64 and float32 are what the callers have, int32 and FP16 what the engine takes; shapes change between runs."""
    engine = TensorRtEngine(plan, cuda_graph=cuda_graph)
    assert (engine.inputs, engine.outputs) == (["labels", "x"], ["y"])
    assert engine.shapes == {"labels": ("batch", 1), "x": ("batch", 3)}
    assert isinstance(engine, BoundedEngine)
    assert engine.largest == {"batch": 4}
    for batch in (3, 1, 4, 4):
        given = feeds(batch)
        answer = engine.run(given)
        assert answer.keys() == {"y"}
        assert answer["y"].dtype == np.float32
        np.testing.assert_array_equal(answer["y"], 2 * given["x"] + given["labels"])


def test_memory_is_allocated_once_and_given_back(plan: Path, device: SimulatedCuda) -> None:
    engine = TensorRtEngine(plan)
    before = sorted(device.memory)
    assert [len(memory) for memory in device.memory.values()] == [4 * 1 * 4, 4 * 3 * 2, 4 * 3 * 4]
    for batch in (1, 4, 2):
        engine.run(feeds(batch))
    assert sorted(device.memory) == before
    engine.close()
    assert not device.memory


def test_an_engine_that_is_forgotten_gives_its_memory_back(plan: Path, device: SimulatedCuda) -> None:
    TensorRtEngine(plan).run(feeds(1))
    assert not device.memory


def test_launches_are_recorded_once_for_each_shape(plan: Path, device: SimulatedCuda) -> None:
    engine = TensorRtEngine(plan, cuda_graph=True)
    for batch in (2, 2, 3, 3, 3):
        engine.run(feeds(batch))
    assert (device.graphs, device.launches) == (2, 5)


def test_launches_of_static_shapes_are_recorded_unasked(tmp_path: Path, trt: Simulation, device: SimulatedCuda) -> None:
    for graph, replays in ((STATIC, 2), (GRAPH, 0)):
        engine = TensorRtEngine(built(graph, tmp_path))
        before = device.launches
        for _ in range(2):
            engine.run(feeds(2))
        assert device.launches - before == replays


def test_launches_that_cannot_be_recorded_are_made_one_by_one(
    tmp_path: Path, trt: Simulation, device: SimulatedCuda
) -> None:
    plan = built(STATIC, tmp_path)
    device.statuses["cudaStreamEndCapture"] = 4
    engine = TensorRtEngine(plan)
    assert engine.run(feeds(2))["y"].tolist() == (2 * feeds(2)["x"] + feeds(2)["labels"]).tolist()
    assert any("launches are not recorded" in warning for warning in engine.warnings)
    with pytest.raises(MachineLacks, match="cudaStreamEndCapture"):
        TensorRtEngine(plan, cuda_graph=True).run(feeds(2))


def test_another_shape_s_launches_are_not_replayed(plan: Path, device: SimulatedCuda) -> None:
    engine = TensorRtEngine(plan, cuda_graph=True)
    engine.run(feeds(2))
    device.statuses["cudaStreamEndCapture"] = 4
    for _ in range(2):
        with pytest.raises(MachineLacks, match="cudaStreamEndCapture"):
            engine.run(feeds(3))
    del device.statuses["cudaStreamEndCapture"]
    assert engine.run(feeds(3))["y"].tolist() == (2 * feeds(3)["x"] + feeds(3)["labels"]).tolist()


def test_times_are_of_every_run(plan: Path, trt: Simulation) -> None:
    engine = TensorRtEngine(plan)
    copies = len(trt.values("IExecutionContext.set_input_shape"))
    before = len(trt.values("IExecutionContext.execute_async_v3"))
    assert engine.time(feeds(2), repeats=5, warm_ups=3) == [1.5] * 5
    assert len(trt.values("IExecutionContext.execute_async_v3")) - before == 3 + 5
    assert len(trt.values("IExecutionContext.set_input_shape")) - copies == 2, "inputs are given once"


def test_kernels_are_of_one_run_of_single_launches(
    tmp_path: Path, trt: Simulation, device: SimulatedCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not of the first one, which loads them, and of no CUDA graph."""
    seen: list[int] = []

    def count(run: Callable[[], object]) -> tuple[Kernel, ...]:
        before = len(trt.values("IExecutionContext.execute_async_v3"))
        run()
        seen.extend((before, len(trt.values("IExecutionContext.execute_async_v3"))))
        return (Kernel("mha0", 1, 2.0),)

    monkeypatch.setattr(tensorrt_run, "require_cupti", lambda: None)
    monkeypatch.setattr(tensorrt_run, "trace", count)
    engine = TensorRtEngine(built(STATIC, tmp_path))
    assert engine.kernels(feeds(2)) == (Kernel("mha0", 1, 2.0),)
    assert seen == [1, 2]
    assert device.launches == 0
    with pytest.raises(BadInput, match="the engine takes"):
        engine.kernels(feeds(1))


def test_nothing_runs_where_kernels_cannot_be_traced(tmp_path: Path, trt: Simulation) -> None:
    engine = TensorRtEngine(built(STATIC, tmp_path))
    with pytest.raises(MachineLacks, match="cupti-python does not load"):
        engine.kernels(feeds(2))
    assert not trt.values("IExecutionContext.execute_async_v3")


def test_wrong_inputs_are_one_line(plan: Path, tmp_path: Path) -> None:
    engine = TensorRtEngine(plan)
    with pytest.raises(BadInput, match="input labels is missing"):
        engine.run({"x": feeds(2)["x"]})
    with pytest.raises(BadInput, match=r"labels is \[5, 1\], and the engine takes \[1, 1\] to \[4, 1\]"):
        engine.run(feeds(5))
    with pytest.raises(BadInput, match=r"x is \[2\], and the engine takes"):
        engine.run({**feeds(2), "x": np.zeros(2)})


def test_a_static_plan_takes_one_shape(trt: Simulation, tmp_path: Path) -> None:
    engine = TensorRtEngine(built(STATIC, tmp_path))
    assert engine.shapes == {"labels": (2, 1), "x": (2, 3)}
    assert engine.largest == {}
    assert engine.run(feeds(2))["y"].shape == (2, 3)
    with pytest.raises(BadInput, match=r"labels is \[1, 1\], and the engine takes \[2, 1\]"):
        engine.run(feeds(1))


def test_another_gpu_is_refused_before_the_plan_is_loaded(
    plan: Path, trt: Simulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = SimulatedCuda((8, 6), b"NVIDIA RTX A4000\0")
    monkeypatch.setattr(cuda, "bindings", lambda: other)
    loaded = len(trt.values("Runtime.deserialize_cuda_engine"))
    built_for = r"built for NVIDIA H100 80GB HBM3 \(compute capability 9\.0\)"
    with pytest.raises(MachineLacks, match=rf"{built_for}, and this is NVIDIA RTX A4000 \(compute capability 8\.6\)"):
        TensorRtEngine(plan)
    assert len(trt.values("Runtime.deserialize_cuda_engine")) == loaded


def test_another_version_is_refused_before_the_plan_is_loaded(plan: Path, trt: Simulation) -> None:
    built_with, trt.version = trt.version, "9.3.0"
    with pytest.raises(MachineLacks, match=rf"built for TensorRT {built_with}, and this is 9\.3\.0; build it again"):
        TensorRtEngine(plan)


@pytest.mark.parametrize("step", ["Runtime.deserialize_cuda_engine", "ICudaEngine.create_execution_context"])
def test_a_plan_that_does_not_load(plan: Path, trt: Simulation, step: str) -> None:
    trt.fails[step] = None
    trt.says[step] = [("ERROR", "2: Error Code 2: OutOfMemory (no further information)")]
    with pytest.raises(MachineLacks, match=r"part\.plan: the GPU's memory is not enough"):
        TensorRtEngine(plan)


def test_a_runtime_that_does_not_start(plan: Path, trt: Simulation) -> None:
    trt.fails["Runtime"] = None
    trt.says["Runtime"] = [("WARNING", "CUDA initialization failure with error: 2. Please check")]
    with pytest.raises(MachineLacks, match=r"part\.plan: the GPU's memory is not enough"):
        TensorRtEngine(plan)


def test_a_run_that_fails(plan: Path, trt: Simulation) -> None:
    engine = TensorRtEngine(plan)
    trt.fails["IExecutionContext.execute_async_v3"] = False
    trt.says["IExecutionContext.execute_async_v3"] = [("ERROR", "1: Error Code 1: Cuda Runtime (misaligned address)")]
    with pytest.raises(BadInput, match=r"part\.plan: TensorRT fails \(Cuda Runtime \(misaligned address\)\)"):
        engine.run(feeds(1))


def test_gpus(device: SimulatedCuda) -> None:
    found = cuda.find_device()
    assert found == cuda.Device("NVIDIA H100 80GB HBM3", (9, 0), 80 << 10)
    assert str(found) == "NVIDIA H100 80GB HBM3 (compute capability 9.0)"


@pytest.mark.parametrize(
    ("status", "driver", "sentence"),
    [
        ("cudaErrorNoDevice", 12040, "no NVIDIA GPU is visible"),
        ("cudaErrorInsufficientDriver", 11080, r"driver is too old: it gives CUDA 11\.8, cuda-python needs CUDA 12\.9"),
        ("cudaErrorInsufficientDriver", 0, "no NVIDIA driver is loaded"),
        ("cudaErrorUnknown", 12040, "looking for GPUs: something is wrong"),
    ],
)
def test_no_gpu(device: SimulatedCuda, status: str, driver: int, sentence: str) -> None:
    device.statuses["cudaGetDeviceCount"] = getattr(device.cudaError_t, status)
    device.versions["cudaDriverGetVersion"] = driver
    with pytest.raises(MachineLacks, match=sentence):
        cuda.find_device()


def test_full_gpus(plan: Path, device: SimulatedCuda) -> None:
    device.statuses["cudaMalloc"] = device.cudaError_t.cudaErrorMemoryAllocation
    with pytest.raises(MachineLacks, match="the GPU is out of memory"):
        TensorRtEngine(plan)


def test_cuda_python_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    cuda.bindings.cache_clear()
    with pytest.raises(
        MachineLacks, match=r"cuda-python 12\.9 or newer is not installed.*pip install samq\[tensorrt\]"
    ):
        cuda.find_device()
