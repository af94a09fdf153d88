"""Image and prompts in, masks out: what the model `sam` answers, apart from Triton."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from samq.engines.predictor import MULTI, SINGLE, Predictor
from samq.errors import BadInput
from samq.tools.triton.served.images import Preprocessing, mask_at
from samq.tools.triton.served.requests import Inputs, Limits, Prompts, flag, image_of, prompts_of
from samq.tools.triton.served.store import EmbeddingStore, Encoded


class SamService:
    """Answers requests, from as many threads at a time as the predictor's engines take.

    Args:
        predictor: the two parts of the model.
        preprocessing: of its images.
        store: of encoded images.
        limits: on a request.
        multimasks: M, the masks of a multimask answer.
        prompts_at_once: the most that the mask decoder takes.
    """

    def __init__(
        self,
        predictor: Predictor,
        preprocessing: Preprocessing,
        store: EmbeddingStore,
        limits: Limits,
        *,
        multimasks: int,
        prompts_at_once: int,
    ) -> None:
        self.predictor, self.preprocessing, self.store, self.limits = predictor, preprocessing, store, limits
        self.multimasks, self.prompts_at_once = multimasks, prompts_at_once
        height, width = predictor.decoder.shapes["mask_input"][-2:]
        self._mask_side = (int(height), int(width))

    def answer(self, inputs: Inputs, *, keep: bool = True) -> dict[str, NDArray[Any]]:
        """Answer one request; docs/triton.md has its inputs and outputs.

        Args:
            inputs: by name, without the batch dimension.
            keep: the client wants a handle, so a new image is kept.

        Raises:
            BadInput: the request is wrong; the message says what to send instead.
            UnknownHandle: no image is kept under its handle.
            SamqError: an engine refuses.
        """
        if ("image" in inputs) == ("handle" in inputs):
            raise BadInput("send either an image or the handle of an earlier one")
        if "handle" in inputs:
            handle = _text(inputs["handle"])
            encoded = self.store.find(handle)
            prompts = self._prompts(inputs, encoded.size)
        else:
            image = image_of(inputs, self.limits)
            size = (image.shape[0], image.shape[1])
            prompts = self._prompts(inputs, size)  # a bad one does not cost a run of the encoder
            encoded = Encoded(self.predictor.encode(self.preprocessing(image)), size)
            handle = self.store.keep(encoded) if keep else ""
        answer = self._decoded(encoded, prompts, multimask=flag(inputs, "multimask"))
        return {**answer, "handle": np.array([handle.encode()], np.object_)}

    def _prompts(self, inputs: Inputs, size: tuple[int, int]) -> Prompts:
        prompts = prompts_of(inputs, size, self._mask_side, self.limits)
        masks = len(prompts) * (self.multimasks if flag(inputs, "multimask") else 1)
        if masks * size[0] * size[1] > self.limits.mask_pixels:
            raise BadInput(
                f"{masks} masks of {size[1]} × {size[0]} have more than the {self.limits.mask_pixels} pixels of "
                "max_mask_pixels; send fewer prompts at a time"
            )
        return prompts

    def _decoded(self, encoded: Encoded, prompts: Prompts, *, multimask: bool) -> dict[str, NDArray[Any]]:
        """Outputs for P prompts with K masks each: the multimask answer, or the one that `Predictions.best` chooses."""
        height, width = encoded.size
        side = self.preprocessing.size
        coords = prompts.coords * np.array([side / width, side / height], np.float32)
        count = self.multimasks if multimask else 1
        logits = np.empty((len(prompts), count, *self._mask_side), np.float32)
        scores = np.empty((len(prompts), count), np.float32)
        objects = np.empty(len(prompts), np.float32)
        for start in range(0, len(prompts), self.prompts_at_once):
            rows = slice(start, start + self.prompts_at_once)
            masks = None if prompts.masks is None else prompts.masks[rows]
            found = self.predictor.decode(encoded.features, coords[rows], prompts.labels[rows], masks)
            objects[rows] = found.object_scores
            if multimask:
                logits[rows], scores[rows] = found.masks[:, MULTI:], found.scores[:, MULTI:]
            else:
                for row in range(len(found.object_scores)):
                    logits[start + row, SINGLE], scores[start + row, SINGLE] = found.best(
                        row, ambiguous=prompts.ambiguous
                    )
        enlarged = np.empty((len(prompts), count, height, width), np.bool_)
        for index in np.ndindex(enlarged.shape[:2]):
            enlarged[index] = mask_at(logits[index], encoded.size)
        return {"masks": enlarged, "scores": scores, "object_scores": objects, "logits": logits}


def _text(handle: NDArray[Any]) -> str:
    """A STRING [1] input."""
    (value,) = handle.ravel()[:1] if handle.size == 1 else (b"",)
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
