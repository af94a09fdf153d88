"""TensorRT 8.6 on an H100 played by ONNX Runtime: "plans" are ONNX files that it runs as they are written.

Plans have a real sidecar and log, so that everything around building and running is the real code. The clock is the
caller's, for what a kernel takes is no business of a test.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from samq.engines import tensorrt
from samq.engines.base import Arrays
from samq.engines.cuda import Device
from samq.engines.kernels import Kernel
from samq.engines.tensorrt_layers import MYELIN, EngineLayer
from samq.engines.tensorrt_log import INFO, WARNING, Log
from samq.engines.tensorrt_plan import BuildOptions, PlanInfo, PlanTensor, load_info, log_of, save_info
from samq.engines.tensorrt_progress import Progress, silent
from samq.errors import BadInput, MachineLacks
from samq.files import sha256_of

H100 = Device("NVIDIA H100 80GB HBM3", (9, 0), 81559)
VERSION = "8.6.0"


def one_millisecond(graph: onnx.GraphProto) -> float:
    """A clock that stands still."""
    return 1.0


@dataclass
class TensorRtOnCpu:
    """What `samq.engines.tensorrt` offers.

    Attributes:
        clock: milliseconds of a run of a graph.
        refuses: graphs that cannot be built.
        spoils: graphs whose engine gives nothing but zeros.
        warnings: what is said while a plan is built.
        steps: of the monitor, which later versions have.
        traces: kernels can be recorded.
        edges: precision at the edges of the one fused region that a plan is; empty where its layers are not told.
        version, gpu: of the machine.
        built: graphs and options of all builds.
        refitted: plans that were refitted, and where to.
    """

    clock: Callable[[onnx.GraphProto], float] = one_millisecond
    refuses: Callable[[onnx.GraphProto], bool] = lambda graph: False
    spoils: Callable[[onnx.GraphProto], bool] = lambda graph: False
    warnings: tuple[str, ...] = ()
    steps: int = 0
    traces: bool = True
    edges: str = ""
    version: str = VERSION
    gpu: Device = H100
    built: list[tuple[onnx.GraphProto, BuildOptions]] = field(default_factory=list)
    refitted: list[tuple[Path, Path]] = field(default_factory=list)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> TensorRtOnCpu:
        """Put it in TensorRT's place."""
        monkeypatch.setattr(tensorrt, "about", lambda: (self.version, self.gpu))
        monkeypatch.setattr(tensorrt, "build_engine", self.build_engine)
        monkeypatch.setattr(tensorrt, "build_apart", self.build_engine)
        monkeypatch.setattr(tensorrt, "open_engine", self.open_engine)
        monkeypatch.setattr(tensorrt, "refit_engine", self.refit_engine)
        return self

    def build_engine(
        self, onnx_path: Path, plan_path: Path, options: BuildOptions | None = None, progress: Progress = silent
    ) -> PlanInfo:
        graph = onnx.load(onnx_path).graph
        if self.refuses(graph):
            raise BadInput(f"{onnx_path.name}: no implementation")
        options = options or BuildOptions()
        self.built.append((graph, options))
        for phase in ("parse", "build"):
            progress(phase, 0, 0)
        for step in range(self.steps):
            progress("Building Engine", step + 1, self.steps)
        progress("inspect", 0, 0)
        shutil.copyfile(onnx_path, plan_path)
        log = Log([(INFO, "Global timing cache in use."), *((WARNING, text) for text in self.warnings)])
        log_of(plan_path).write_text(str(log), encoding="utf-8")
        gemms = tuple(node.name for node in graph.node if node.op_type == "MatMul")
        info = PlanInfo(
            gpu=self.gpu.name,
            capability=self.gpu.capability,
            tensorrt=self.version,
            onnx=onnx_path.name,
            onnx_sha256=sha256_of(onnx_path),
            strongly_typed=False,
            inputs=_tensors(graph.input),
            outputs=_tensors(graph.output),
            options=options,
            seconds=0.0,
            plan_bytes=plan_path.stat().st_size,
            gemms=gemms,
            layers=(EngineLayer("region", MYELIN, self.edges, "", "", gemms),) if self.edges else (),
            warnings=tuple(log.of(WARNING)),
        )
        save_info(plan_path, info)
        return info

    def refit_engine(self, plan_path: Path, onnx_path: Path, new_path: Path, progress: Progress = silent) -> PlanInfo:
        options = load_info(plan_path).options
        self.refitted.append((plan_path, new_path))
        return self.build_engine(onnx_path, new_path, options, progress)

    def open_engine(self, plan_path: Path, *, cuda_graph: bool | None = None) -> EngineOnCpu:
        return EngineOnCpu(self, plan_path)


class EngineOnCpu:
    """An opened plan."""

    def __init__(self, owner: TensorRtOnCpu, path: Path) -> None:
        info = load_info(path)
        self.inputs: Sequence[str] = [tensor.name for tensor in info.inputs]
        self.outputs: Sequence[str] = [tensor.name for tensor in info.outputs]
        self.shapes = {tensor.name: tensor.shape for tensor in info.inputs}
        graph = onnx.load(path).graph
        self._milliseconds, self._factor = owner.clock(graph), 0 if owner.spoils(graph) else 1
        self._traces, self._gemms = owner.traces, len(info.gemms)
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        self._session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        answers = self._session.run(None, {name: feeds[name] for name in self.inputs})
        return {name: self._factor * answer for name, answer in zip(self.outputs, answers, strict=True)}

    def time(self, feeds: Arrays, repeats: int) -> list[float]:
        return [float(factor) * self._milliseconds for factor in np.linspace(0.99, 1.01, repeats)]

    def kernels(self, feeds: Arrays) -> tuple[Kernel, ...]:
        if not self._traces:
            raise MachineLacks("kernels cannot be traced: no cupti")
        assert {name: len(feeds[name].shape) for name in self.inputs} == {n: len(s) for n, s in self.shapes.items()}
        return (Kernel("sm80_xmma_gemm_i8i8_i8i32_f32_tn_n", self._gemms, 5.0), Kernel("mha0", 1, 0.5))

    def close(self) -> None:
        del self._session


def _tensors(values: Sequence[onnx.ValueInfoProto]) -> tuple[PlanTensor, ...]:
    return tuple(
        PlanTensor(value.name, tuple(s.dim_param or s.dim_value for s in value.type.tensor_type.shape.dim), "float32")
        for value in values
    )
