"""OpenVINO as an engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from samq.engines.base import Arrays

OPENVINO = f"{__name__}:OpenVinoEngine"


class OpenVinoEngine:
    """One part as OpenVINO compiles it for the CPU (`samq.engines.base.Engine`).

    What is not INT8 is computed in FP32, also where the machine has BF16, as ONNX Runtime does.

    Args:
        path: the .xml file; weights stand beside it.
        threads: 0 for its own choice.
    """

    def __init__(self, path: Path, threads: int = 0) -> None:
        from openvino import Core

        options: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
        if threads:
            options["INFERENCE_NUM_THREADS"] = threads
        model = Core().compile_model(path, "CPU", options)
        self._request = model.create_infer_request()
        self.inputs: Sequence[str] = [port.any_name for port in model.inputs]
        self.outputs: Sequence[str] = [port.any_name for port in model.outputs]
        self.shapes: Mapping[str, Sequence[int | str]] = {port.any_name: list(port.shape) for port in model.inputs}

    def run(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        """As `samq.engines.base.Engine.run`."""
        answers = self._request.infer({name: feeds[name] for name in self.inputs})
        return {name: answers[name].copy() for name in self.outputs}
