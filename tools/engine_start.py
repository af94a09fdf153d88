"""What it takes to start engines: load, first run and memory, in a process of their own, and the files they load.

    python -m samq.tools.engine_start samq.engines.onnxruntime:OnnxRuntimeEngine 2 image_encoder.onnx mask_decoder.onnx

opens the parts with 2 threads, segments one image with one click (or encodes it, where there is no decoder), and prints
a JSON object: `load_ms`, `first_ms` and `peak_bytes`, the peak of resident memory above what the process held before:
weights, activations and the runtime's own buffers; None where the system does not tell. Python and the runtime's
libraries are loaded before the clock starts.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from samq.calib.prompts import clicks
from samq.engines.base import Engine
from samq.engines.predictor import Predictor
from samq.errors import BadInput
from samq.tools.memory import peak_bytes, reset_peak, resident_bytes

ONNXRUNTIME = "samq.engines.onnxruntime:OnnxRuntimeEngine"  # any graph
ONNXRUNTIME_ENGINE = "samq.engines.onnxruntime:open_engine"  # as its sidecar says
ONNXRUNTIME_CUDA = "samq.engines.onnxruntime_cuda:OnnxRuntimeCudaEngine"
TENSORRT = "samq.engines.tensorrt:open_engine"


def opener(name: str, threads: int = 0) -> Callable[[Path], Engine]:
    """What opens one part.

    Args:
        name: module and function or class, as `ONNXRUNTIME`.
        threads: that it is opened with; 0 where that is the runtime's choice.
    """
    module, _, attribute = name.partition(":")
    make: Callable[..., Engine] = getattr(import_module(module), attribute)
    return partial(make, threads=threads) if threads else make


def start_engines(name: str, parts: Sequence[Path], threads: int = 0) -> dict[str, Any]:
    """The figures that the command above prints.

    Args:
        name: as `opener`.
        parts: files of the image encoder and, if it is to be asked, of the mask decoder.
        threads: as `opener`.

    Raises:
        BadInput: the engines do not start; the last line of that process says why.
    """
    command = [sys.executable, "-m", "samq.tools.engine_start", name, str(threads), *map(str, parts)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise BadInput(f"{parts[0]} does not start: {said[-1]}")
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def measure_engine_memory(name: str, parts: Sequence[Path]) -> int | None:
    """Peak bytes that engines add to a fresh process; None where that cannot be measured.

    Args:
        name, parts: as `start_engines`.
    """
    try:
        peak: int | None = start_engines(name, parts)["peak_bytes"]
    except BadInput:
        return None
    return peak


def file_bytes(path: Path) -> int:
    """Bytes of a part's file and, where its weights stand beside it (ONNX, OpenVINO), of those."""
    beside = (path.with_name(f"{path.name}.data"), path.with_suffix(".bin"))
    return path.stat().st_size + sum(file.stat().st_size for file in beside if file.is_file())


def main() -> None:
    """Start the engines and print the figures."""
    name, threads, *parts = sys.argv[1:]
    make = opener(name, int(threads))
    before = resident_bytes() if reset_peak() else None
    started = time.perf_counter()
    engines = [make(Path(part)) for part in parts]
    loaded = time.perf_counter()
    side = int(engines[0].shapes["pixel_values"][-1])
    image = np.zeros((3, side, side), np.float32)
    features = engines[0].run({"pixel_values": image[None]})
    if len(engines) > 1:
        click = clicks(np.full((1, 2), side / 2, np.float32))
        Predictor(*engines).decode(features, click.coords, click.labels)
    first = time.perf_counter()
    peak = peak_bytes()
    figures = {
        "load_ms": round(1000 * (loaded - started), 3),
        "first_ms": round(1000 * (first - loaded), 3),
        "peak_bytes": None if before is None or peak is None else peak - before,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
