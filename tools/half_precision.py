"""Whether the FP16 baseline of a GPU is one: held against the FP32 parts, in ONNX Runtime on the CPU.

Everything on a GPU is measured against FP16 engines, which overflow where FP32 does not (TensorRT issue 4723). Against
a baseline that overflowed, any engine that does so too looks perfect.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samq.calib.processor import SamProcessor
from samq.calib.sources import Sample
from samq.engines.base import Arrays
from samq.engines.predictor import Predictor
from samq.tools.evaluate import answers_to
from samq.tools.metrics import likeness, mean

IMAGES = 2  # compared: a few seconds each on a CPU
FAILS_BELOW, WARNS_BELOW = 0.90, 0.98
"""Mean mask IoU with FP32. Rounding to FP16 leaves it above 0.99; an overflow leaves no mask, or another one."""

AGREES, DIFFERS, BROKEN = "agrees", "differs", "broken"


def compare_with_fp32(
    half: Predictor,
    exact: Predictor,
    samples: Iterable[Sample],
    processor: SamProcessor,
    step: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """How FP16 engines agree with FP32 ones; the report's `half_precision`.

    Args:
        half, exact: the engines.
        samples: images, read once.
        step: called after each image.

    Returns:
        `images` and `prompts` compared; of the image embeddings the largest ‖FP16 − FP32‖ / ‖FP32‖ and the smallest
        cosine, None where a value is not finite; mean and smallest IoU of the masks, None without prompts; `state`.
    """
    one, other = _Remembering(exact), _Remembering(half)
    found: list[dict[str, float | None]] = []
    masks: list[float] = []
    for sample in samples:
        masks += [answer.record.agreement for answer in answers_to(one, other, sample, processor)]
        found.append(likeness(other.embeddings, one.embeddings))
        step()
    errors = [error for values in found if (error := values["relative_error"]) is not None]
    cosines = [cosine for values in found if (cosine := values["cosine"]) is not None]
    finite = len(errors) == len(found)
    agreement = mean(masks)
    return {
        "images": len(found),
        "prompts": len(masks),
        "relative_error": max(errors, default=None) if finite else None,
        "cosine": min(cosines, default=None) if finite else None,
        "mask_iou": agreement,
        "lowest_mask_iou": min(masks, default=None),
        "state": _state(finite, agreement),
    }


def complaint(compared: dict[str, Any] | None) -> str | None:
    """What is wrong with a baseline, and what to do, as one line; None where nothing is, or nothing was compared."""
    if compared is None or compared["state"] == AGREES:
        return None
    masks, limit = compared["mask_iou"], FAILS_BELOW if compared["state"] == BROKEN else WARNS_BELOW
    found = "FP16 image embeddings are not finite"
    if compared["relative_error"] is not None:
        found = f"FP16 masks agree with FP32 ones at IoU {masks:.4f}, below {limit:g}"
    return (
        f"{found}: what was measured against this FP16 baseline says little; "
        "run the model on the CPU (--engine onnxruntime --device cpu), and see whether FP16 overflows in it"
    )


def _state(finite: bool, agreement: float | None) -> str:
    if not finite or (agreement is not None and agreement < FAILS_BELOW):
        return BROKEN
    return DIFFERS if agreement is not None and agreement < WARNS_BELOW else AGREES


class _Remembering(Predictor):
    """Keeps the embeddings of the image that was encoded last."""

    def __init__(self, predictor: Predictor) -> None:
        super().__init__(predictor.encoder, predictor.decoder)
        self.embeddings: NDArray[np.float64] = np.zeros(0)

    def encode(self, pixel_values: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
        features = super().encode(pixel_values)
        self.embeddings = _embeddings(features)
        return features


def _embeddings(features: Arrays) -> NDArray[np.float64]:
    return np.asarray(features["image_embeddings"], np.float64).ravel()
