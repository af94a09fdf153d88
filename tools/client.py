"""A client of the model `sam` on a Triton server: image and prompts in, masks out.

    with SamClient("localhost:8000") as client:
        answer = client.predict(image, boxes=[[x1, y1, x2, y2]])
        more = client.predict(handle=answer.handle, points=[[[x, y]]])     # the encoder does not run again

`docs/triton.md` shows how to serve it.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from samq.errors import BadInput, MachineLacks, UsageError
from samq.files import written_whole
from samq.tools.triton.config import INSTALL, SAM

Protocol = Literal["http", "grpc"]
PORTS: dict[Protocol, int] = {"http": 8000, "grpc": 8001}
OUTPUTS = ("masks", "scores", "object_scores", "logits", "handle")

_DTYPES = {
    "image": ("UINT8", np.uint8),
    "handle": ("BYTES", np.object_),
    "points": ("FP32", np.float32),
    "labels": ("INT32", np.int32),
    "boxes": ("FP32", np.float32),
    "mask_input": ("FP32", np.float32),
    "multimask": ("BOOL", np.bool_),
}
_REFUSED = ("400", "404", "StatusCode.INVALID_ARGUMENT", "StatusCode.NOT_FOUND")


@dataclass(frozen=True)
class Answer:
    """Answers to P prompts on one image, K masks each.

    Args:
        masks: [P, K, H, W] bool, of the image's size.
        scores: [P, K] IoU that the model predicts for each mask.
        object_scores: [P] logits of there being an object.
        logits: [P, K, h, w] float32, low resolution; one of them is a `mask_input` for a next prompt.
        handle: stands for the image in further requests, as long as the server keeps it.
    """

    masks: NDArray[np.bool_]
    scores: NDArray[np.float32]
    object_scores: NDArray[np.float32]
    logits: NDArray[np.float32]
    handle: str


class SamClient:
    """A connection to a server. Each thread needs one of its own.

    Args:
        url: "host:port"; the default is this machine, at Triton's usual port.
        protocol: "http" or "grpc".
        ssl: the server, or the gateway before it, speaks TLS.
        headers: sent with each request, for a gateway that asks for a token.
        timeout: seconds that an answer may take.

    Raises:
        MachineLacks: tritonclient is not installed.
        UsageError: the URL is none.
    """

    def __init__(
        self,
        url: str | None = None,
        protocol: Protocol = "http",
        *,
        ssl: bool = False,
        headers: Mapping[str, str] | None = None,
        timeout: float = 60.0,
    ) -> None:
        self.url, self.protocol, self.timeout = url or f"localhost:{PORTS[protocol]}", protocol, timeout
        self._headers = dict(headers or {})
        try:
            self._module = importlib.import_module(f"tritonclient.{protocol}")
        except (ImportError, RuntimeError) as error:  # tritonclient turns the one into the other
            raise MachineLacks(f"tritonclient is not installed; run {INSTALL}") from error
        host, _, port = self.url.rpartition(":")
        if not host or "/" in self.url or not port.isdecimal():
            raise UsageError(f"{self.url} is no host:port; give one as in localhost:{PORTS[protocol]}")
        limits = {"connection_timeout": timeout, "network_timeout": timeout} if protocol == "http" else {}
        self._client = self._module.InferenceServerClient(self.url, ssl=ssl, **limits)

    def predict(
        self,
        image: NDArray[np.uint8] | None = None,
        *,
        handle: str | None = None,
        points: ArrayLike | None = None,
        labels: ArrayLike | None = None,
        boxes: ArrayLike | None = None,
        mask_input: ArrayLike | None = None,
        multimask: bool = False,
    ) -> Answer:
        """Masks for P prompts on an image, or on one sent before; without prompts, only a handle for later ones.

        Args:
            image: uint8 [H, W, 3], RGB.
            handle: of an earlier answer, instead of an image.
            points: [P, N, 2] (x, y) in pixels of the image.
            labels: [P, N], 1 foreground, 0 background, -10 no point; by default all 1.
            boxes: [P, 4] x1, y1, x2, y2 in pixels of the image.
            mask_input: [P, h, w] logits of an earlier answer.
            multimask: give all masks that the model proposes (K = 3), not the best one (K = 1).

        Raises:
            BadInput: the server refuses the request; its words are in the message.
            MachineLacks: no server answers, or it fails.
        """
        given = {
            "image": image,
            "handle": None if handle is None else [handle.encode()],
            "points": points,
            "labels": labels,
            "boxes": boxes,
            "mask_input": mask_input,
            "multimask": [True] if multimask else None,
        }
        inputs = [self._input(name, value) for name, value in given.items() if value is not None]
        outputs = [self._module.InferRequestedOutput(name) for name in OUTPUTS]
        with self._errors_told():
            answer = self._client.infer(SAM, inputs, outputs=outputs, headers=self._headers, **self._limit())
            values = {name: answer.as_numpy(name)[0] for name in OUTPUTS}
        return Answer(**{**values, "handle": values["handle"][0].decode()})

    def close(self) -> None:
        """End the connection."""
        self._client.close()

    def __enter__(self) -> SamClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _input(self, name: str, value: Any) -> Any:
        datatype, dtype = _DTYPES[name]
        if name == "image" and np.asarray(value).dtype != np.uint8:
            raise BadInput("the image is no array of uint8; give RGB as uint8 [H, W, 3]")
        try:
            array = np.asarray(value, dtype)[None]  # a batch of one image
        except (TypeError, ValueError) as error:
            raise BadInput(f"{name} is no array of numbers ({error}); see SamClient.predict") from error
        tensor = self._module.InferInput(name, list(array.shape), datatype)
        tensor.set_data_from_numpy(array)
        return tensor

    def _limit(self) -> dict[str, float]:
        return {"client_timeout": self.timeout} if self.protocol == "grpc" else {}

    @contextmanager
    def _errors_told(self) -> Iterator[None]:
        refused = self._module.InferenceServerException
        try:
            yield
        except refused as error:
            if error.status() in _REFUSED:
                raise BadInput(f"{self.url} refuses: {error.message()}") from error
            raise self._no_answer(error.message()) from error
        except (OSError, ValueError) as error:
            raise self._no_answer(error) from error

    def _no_answer(self, reason: object) -> MachineLacks:
        return MachineLacks(f"no answer from {self.url} ({reason}); start a Triton server there, or see its log")


def save_mask(path: Path, mask: NDArray[np.bool_]) -> None:
    """Write a mask [H, W] as a PNG file, white on black, whole or not at all.

    Raises:
        MachineLacks: the file cannot be written.
    """
    with written_whole(path) as temporary:
        Image.fromarray(np.where(mask, np.uint8(255), np.uint8(0))).save(temporary, format="PNG")
