"""An image encoder or a mask decoder on ONNX Runtime, for Triton's Python backend."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from samq.engines.base import Arrays, Engine
from samq.errors import BadInput
from samq.tools.triton.served.errors import refusal

MODEL = "model.onnx"
MOST = "max_"  # parameter `max_prompts` limits the side `prompts`


class TritonPythonModel:
    """What Triton's Python backend calls."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Start ONNX Runtime on the CPU, or on the GPU that the instance belongs to."""
        config = json.loads(args["model_config"])
        self._name: str = config["name"]
        self._most = {
            name.removeprefix(MOST): int(entry["string_value"])
            for name, entry in config.get("parameters", {}).items()
            if name.startswith(MOST)
        }
        path = Path(args["model_repository"]) / args["model_version"] / MODEL
        gpu = int(args["model_instance_device_id"]) if args["model_instance_kind"] == "GPU" else None
        self._engine = open_engine(path, gpu)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response for each request. All go through the engine in one run: Triton batches those of one shape."""
        try:
            feeds = [{tensor.name(): tensor.as_numpy() for tensor in request.inputs()} for request in requests]
            require_sides(feeds[0], self._engine.shapes, self._most)
            results = self._engine.run({name: np.concatenate([fed[name] for fed in feeds]) for name in feeds[0]})
        except Exception as error:
            return [refusal(self._name, error) for _ in requests]
        ends = np.cumsum([len(next(iter(fed.values()))) for fed in feeds])
        responses = []
        for request, start, end in zip(requests, (0, *ends), ends, strict=False):
            names = request.requested_output_names()
            tensors = [pb_utils.Tensor(name, np.ascontiguousarray(results[name][start:end])) for name in names]
            responses.append(pb_utils.InferenceResponse(tensors))
        return responses


def open_engine(path: Path, gpu: int | None) -> Engine:
    """The engine of one part, on a GPU or on the CPU (None)."""
    if gpu is None:
        from samq.engines.onnxruntime import open_engine as open_on_cpu

        return open_on_cpu(path)
    from samq.engines.onnxruntime_cuda import CudaOptions, OnnxRuntimeCudaEngine

    return OnnxRuntimeCudaEngine(path, CudaOptions(device=gpu))


def require_sides(feeds: Arrays, shapes: Mapping[str, Sequence[int | str]], most: Mapping[str, int]) -> None:
    """Insist that each limited side has the same size in every input, from 1 to its limit; Triton checks the others.

    Args:
        shapes: of the inputs; a dynamic side has a name.
        most: by name of the side.

    Raises:
        BadInput: one has not.
    """
    sizes: dict[str, int] = {}
    for name, array in feeds.items():
        for side, size in zip(shapes[name], array.shape, strict=True):
            if not isinstance(side, str) or side not in most:
                continue
            if sizes.setdefault(side, size) != size:
                raise BadInput(f"{name} has {size} {side}, other inputs {sizes[side]}; send the same of each")
            if not 1 <= size <= most[side]:
                raise BadInput(f"{name} has {size} {side}; send 1 to {most[side]}")
