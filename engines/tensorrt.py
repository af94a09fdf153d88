"""TensorRT plans: built and run here, or by the interpreter that SAMQ_TENSORRT_PYTHON names.

    plan = build_engine(Path("image_encoder.onnx"), Path("image_encoder.plan"))
    engine = open_engine(Path("image_encoder.plan"))

What a plan is and what it executes can be read anywhere: `load_info` and `executed_layers` of `tensorrt_plan`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

from samq.engines import tensorrt_build, tensorrt_refit
from samq.engines.cuda import Device, find_device
from samq.engines.tensorrt_log import ANOTHER_PYTHON, load_tensorrt, version_of
from samq.engines.tensorrt_plan import BuildOptions, PlanInfo
from samq.engines.tensorrt_process import Worker, WorkerEngine
from samq.engines.tensorrt_progress import Progress, silent
from samq.engines.tensorrt_run import TensorRtEngine

_STARTED: dict[str, Worker] = {}  # one process for all plans, by interpreter
_STARTING = Lock()


def about() -> tuple[str, Device]:
    """Version of the TensorRT at hand, and the GPU.

    Raises:
        MachineLacks: there is no TensorRT, or no GPU.
    """
    worker = _worker()
    return worker.about() if worker else (version_of(load_tensorrt()), find_device())


def build_engine(
    onnx_path: Path, plan_path: Path, options: BuildOptions | None = None, progress: Progress = silent
) -> PlanInfo:
    """See `samq.engines.tensorrt_build.build_engine`."""
    worker = _worker()
    build = worker.build if worker else tensorrt_build.build_engine
    return build(onnx_path, plan_path, options, progress)


def build_apart(
    onnx_path: Path, plan_path: Path, options: BuildOptions | None = None, progress: Progress = silent
) -> PlanInfo:
    """`build_engine` in a process of its own, for builds at the same time: each keeps one core busy.

    Args, results and errors are those of `build_engine`.

    Raises:
        MachineLacks: the process cannot be started, or ended before the plan was done.
    """
    with own_worker() as worker:
        return worker.build(onnx_path, plan_path, options, progress)


def refit_engine(plan_path: Path, onnx_path: Path, new_path: Path, progress: Progress = silent) -> PlanInfo:
    """See `samq.engines.tensorrt_refit.refit_engine`."""
    worker = _worker()
    refit = worker.refit if worker else tensorrt_refit.refit_engine
    return refit(plan_path, onnx_path, new_path, progress)


def open_engine(plan_path: Path, *, cuda_graph: bool | None = None) -> TensorRtEngine | WorkerEngine:
    """See `samq.engines.tensorrt_run.TensorRtEngine`."""
    worker = _worker()
    if worker:
        return WorkerEngine(worker, plan_path, cuda_graph=cuda_graph)
    return TensorRtEngine(plan_path, cuda_graph=cuda_graph)


@contextmanager
def own_worker() -> Iterator[Worker]:
    """A TensorRT process of its own, ended at the end of the `with` block; a crash costs nobody else.

    Raises:
        MachineLacks: it cannot be started.
    """
    worker = Worker(os.environ.get(ANOTHER_PYTHON, sys.executable))
    try:
        yield worker
    finally:
        worker.close()


def _worker() -> Worker | None:
    """The process for all plans, started anew where one has ended: a crash costs its own call alone."""
    python = os.environ.get(ANOTHER_PYTHON)
    if not python:
        return None
    with _STARTING:
        if python not in _STARTED or _STARTED[python].has_ended:
            _STARTED[python] = Worker(python)
        return _STARTED[python]
