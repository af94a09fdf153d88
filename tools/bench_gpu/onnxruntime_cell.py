"""One encoder on ONNX Runtime's CUDA provider, measured in a process of its own: one that hangs can be ended.

    python -m samq.tools.bench_gpu.onnxruntime_cell JOB

JOB is a JSON file: {"onnx": path, "images": path of an array, "found": where the arrays go, "options": of CudaOptions}.
Prints each step before it is taken, and at last what is told beside the arrays, as JSON. Imports no torch, which takes
longer than the measurement.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from samq.engines.onnxruntime_cuda import CudaOptions, OnnxRuntimeCudaEngine, executed_on_gpu
from samq.errors import SamqError
from samq.tools.bench_gpu.launched import launched

RUNS, FEWEST_RUNS = 100, 10
ENOUGH_SECONDS = 20.0  # of runs
EMBEDDINGS = "image_embeddings"


def main(arguments: list[str] | None = None) -> int:
    """Measure what JOB says; the exit code, behind one line of an error."""
    (job,) = sys.argv[1:] if arguments is None else arguments
    given = json.loads(Path(job).read_text(encoding="utf-8"))
    try:
        arrays, told = measured(Path(given["onnx"]), np.load(given["images"]), CudaOptions(**given["options"]))
    except SamqError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    np.savez(given["found"], **arrays)
    print(json.dumps(told))
    return 0


def measured(onnx: Path, images: Any, options: CudaOptions) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arrays (embeddings; milliseconds of plain launches and of CUDA graphs) and what is told beside them.

    Args:
        images: [batch, 3, S, S].
        options: of the provider; CUDA graphs are measured beside plain launches whatever they say.

    Raises:
        BadInput, MachineLacks: as `OnnxRuntimeCudaEngine`.
    """
    _step("making a session")
    started = time.perf_counter()
    engine = OnnxRuntimeCudaEngine(onnx, replace(options, cuda_graph=False))
    seconds = time.perf_counter() - started
    feeds = {engine.inputs[0]: images}
    _step("the first run")
    embeddings = np.asarray(engine.run(feeds)[EMBEDDINGS])
    _step("timed runs")
    runs = runs_for(engine.time(feeds, 1)[0])
    plain = engine.time(feeds, runs)
    del engine
    gc.collect()
    _step("a profiled run")
    execution = executed_on_gpu(onnx, options)
    told = {
        "build_seconds": seconds,
        "executed": dict(Counter(layer.compute for layer in execution.layers.values())),
        "operators": dict(execution.operators),
        "on_cpu": list(execution.elsewhere),
    }
    _step("runs of a CUDA graph")
    replayed: list[float] = []
    try:
        replayed = OnnxRuntimeCudaEngine(onnx, replace(options, cuda_graph=True)).time(feeds, runs)
    except SamqError as error:
        told["note"] = f"no CUDA graph: {error}"
    _step("a traced run")
    told |= launched(lambda: OnnxRuntimeCudaEngine(onnx, replace(options, cuda_graph=False)), feeds, onnx)
    return {"embeddings": embeddings, "ms": np.array(plain), "graph_ms": np.array(replayed)}, told


def runs_for(milliseconds: float) -> int:
    """How many runs are timed, by how long one takes."""
    return max(FEWEST_RUNS, min(RUNS, int(1000 * ENOUGH_SECONDS / milliseconds)))


def _step(name: str) -> None:
    print(name, flush=True)


if __name__ == "__main__":
    sys.exit(main())
