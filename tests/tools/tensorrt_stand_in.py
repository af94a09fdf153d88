"""Stands in for Triton's TensorRT backend, which PyPI's server has not got: "plans" are ONNX files, run on the CPU.

It looks for the plan as the config names it, takes and gives the types of the config, and refuses others.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnxruntime as ort
import triton_python_backend_utils as pb_utils

CAPABILITY = "8.9"  # of the GPU that it pretends to have


class TritonPythonModel:
    """A backend written in Python: it gets the model's config and folder, and has no code in the repository."""

    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        name = config["cc_model_filenames"].get(CAPABILITY, config["default_model_filename"])
        self._session = ort.InferenceSession(Path(args["model_repository"]) / args["model_version"] / name)
        self._computed = {value.name: ort_type(value) for value in self._session.get_inputs()}
        self._inputs, self._outputs = (
            {entry["name"]: pb_utils.triton_string_to_numpy(entry["data_type"]) for entry in config[side]}
            for side in ("input", "output")
        )

    def execute(self, requests: list[Any]) -> list[Any]:
        responses = []
        for request in requests:
            feeds = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
            assert {name: array.dtype.type for name, array in feeds.items()} == self._inputs
            answers = self._session.run(
                list(self._outputs), {name: array.astype(self._computed[name]) for name, array in feeds.items()}
            )
            tensors = zip(self._outputs.items(), answers, strict=True)
            responses.append(
                pb_utils.InferenceResponse([pb_utils.Tensor(name, a.astype(dtype)) for (name, dtype), a in tensors])
            )
        return responses


def ort_type(value: Any) -> str:
    """numpy's name of an ONNX Runtime input's type."""
    return {"tensor(float)": "float32", "tensor(int64)": "int64"}[value.type]
