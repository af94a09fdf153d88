"""Masks from logits, and how well they agree."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray


def mask_of(logits: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.bool_]:
    """Low-resolution logits [h, w] → mask of `size` (H, W): bilinear, then > 0, as transformers post-processes.

    The model's input is the image stretched to a square, so stretching back is all there is to it.
    """
    enlarged = F.interpolate(torch.from_numpy(logits)[None, None], size=size, mode="bilinear", align_corners=False)
    found: NDArray[np.bool_] = (enlarged[0, 0] > 0).numpy()
    return found


def iou(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    """Intersection over union; two empty masks agree."""
    union = int(np.count_nonzero(one | other))
    return 1.0 if union == 0 else int(np.count_nonzero(one & other)) / union


def relative_error(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """‖found − expected‖ / ‖expected‖, in float64."""
    exact = expected.astype(np.float64)
    return float(np.linalg.norm(found.astype(np.float64) - exact) / np.linalg.norm(exact))


def cosine(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """Of the angle between the two, in float64; 0 where `found` is nothing but zeros."""
    one, other = found.astype(np.float64).ravel(), expected.astype(np.float64).ravel()
    lengths = float(np.linalg.norm(one) * np.linalg.norm(other))
    return float(one @ other) / lengths if one.any() else 0.0


def likeness(found: NDArray[Any], expected: NDArray[Any]) -> dict[str, float | None]:
    """`relative_error` and `cosine` by their names, both None where `found` is not finite."""
    if not np.isfinite(found).all():
        return {"relative_error": None, "cosine": None}
    return {"relative_error": relative_error(found, expected), "cosine": cosine(found, expected)}


def sqnr_db(signal_power: float, noise_power: float) -> float | None:
    """10 log₁₀(signal / noise) in dB; None where there is no noise or no signal."""
    if noise_power <= 0 or signal_power <= 0:
        return None
    return float(10 * np.log10(signal_power / noise_power))


def mean(values: Any) -> float | None:
    """Arithmetic mean, None of nothing."""
    listed = list(values)
    return float(np.mean(listed)) if listed else None
