"""The model `sam` for Triton's Python backend: requests to `SamService`, its engines the server's other two models.

Triton gives a batch of requests at a time, each with images and prompts of its own shape (ragged batching). They are
answered side by side, so that the server can batch what they ask of encoder and decoder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from samq.engines.predictor import Predictor
from samq.errors import BadInput, MachineLacks
from samq.tools.triton.served.errors import refusal
from samq.tools.triton.served.images import Preprocessing
from samq.tools.triton.served.requests import Limits
from samq.tools.triton.served.service import SamService
from samq.tools.triton.served.store import EmbeddingStore

HANDLE = "handle"
MEBIBYTE = 1 << 20


class TritonPythonModel:
    """What Triton's Python backend calls."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Read config.pbtxt and the settings that were laid out beside this model."""
        config = json.loads(args["model_config"])
        folder = Path(args["model_repository"]) / args["model_version"]
        settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
        numbers = {name: int(entry["string_value"]) for name, entry in config["parameters"].items()}
        self._dtypes = {
            output["name"]: pb_utils.triton_string_to_numpy(output["data_type"]) for output in config["output"]
        }
        self._service = SamService(
            Predictor(ServerModel(settings["image_encoder"]), ServerModel(settings["mask_decoder"])),
            Preprocessing(**settings["preprocessing"]),
            EmbeddingStore(numbers["store_mib"] * MEBIBYTE),
            Limits(**{name: numbers[f"max_{name}"] for name in ("image_pixels", "prompts", "points", "mask_pixels")}),
            multimasks=settings["multimasks"],
            prompts_at_once=settings["prompts_at_once"],
        )
        self._threads = ThreadPoolExecutor(config["max_batch_size"])

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response for each request."""
        return list(self._threads.map(self._respond, requests))

    def finalize(self) -> None:
        """The server stops."""
        self._threads.shutdown()

    def _respond(self, request: Any) -> Any:
        try:
            inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
            wanted = request.requested_output_names()
            counts = {len(values) for values in inputs.values()}
            if len(counts) != 1:
                raise BadInput("the inputs differ in their first dimension, the number of images; send 1 in each")
            answers = [
                self._service.answer({name: values[image] for name, values in inputs.items()}, keep=HANDLE in wanted)
                for image in range(counts.pop())
            ]
            return pb_utils.InferenceResponse(
                [
                    pb_utils.Tensor(name, np.stack([answer[name] for answer in answers]).astype(dtype, copy=False))
                    for name, dtype in self._dtypes.items()
                    if name in wanted
                ]
            )
        except Exception as error:
            return refusal("sam", error)


class ServerModel:
    """Another model of this server, as an engine; see `samq.engines.base.Engine`.

    Args:
        settings: the model's name as "model", its "inputs" with "shape" and numpy's "dtype", and names of "outputs".
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._name: str = settings["model"]
        self._dtypes = {name: np.dtype(tensor["dtype"]) for name, tensor in settings["inputs"].items()}
        self.inputs: Sequence[str] = list(settings["inputs"])
        self.outputs: Sequence[str] = settings["outputs"]
        self.shapes: Mapping[str, Sequence[int | str]] = {
            name: tensor["shape"] for name, tensor in settings["inputs"].items()
        }

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Outputs by name; `feeds` may hold more than the inputs.

        Raises:
            MachineLacks: the server refuses, or the model fails.
        """
        response = pb_utils.InferenceRequest(
            model_name=self._name,
            requested_output_names=list(self.outputs),
            inputs=[
                pb_utils.Tensor(name, np.ascontiguousarray(feeds[name], dtype=dtype))
                for name, dtype in self._dtypes.items()
            ],
            preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
        ).exec()
        if response.has_error():
            raise MachineLacks(f"{self._name}: {response.error().message()}")
        # copied, for they lie in memory that the response shares with the server
        return {tensor.name(): np.array(tensor.as_numpy()) for tensor in response.output_tensors()}
