"""Prompting a pair of engines: the image once, then as many prompts as wanted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samq.engines.base import Arrays, Engine

SINGLE, MULTI = 0, 1  # index of the single mask, and of the first multimask one


@dataclass(frozen=True)
class Predictions:
    """Answers to P prompts.

    Args:
        masks: [P, 1 + M, h, w] float32 logits, low resolution; index 0 is the single-mask answer.
        scores: [P, 1 + M] predicted IoU.
        object_scores: [P] logits.
    """

    masks: NDArray[np.float32]
    scores: NDArray[np.float32]
    object_scores: NDArray[np.float32]

    def best(self, prompt: int, *, ambiguous: bool) -> tuple[NDArray[np.float32], float]:
        """Logits [h, w] and predicted IoU of one prompt: the single mask, or the best-scored one of several.

        Args:
            ambiguous: the prompt may mean several things (a click), so the multimask answer is the right one.
        """
        index = MULTI + int(self.scores[prompt, MULTI:].argmax()) if ambiguous else SINGLE
        return self.masks[prompt, index], float(self.scores[prompt, index])


class Predictor:
    """An image encoder and a mask decoder that work together."""

    def __init__(self, encoder: Engine, decoder: Engine) -> None:
        self.encoder, self.decoder = encoder, decoder

    def encode(self, pixel_values: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
        """Features of one preprocessed image [3, S, S], for any number of `decode` calls."""
        return self.encoder.run({"pixel_values": pixel_values[None]})

    def decode(
        self,
        features: Arrays,
        coords: NDArray[np.float32],
        labels: NDArray[np.int64],
        masks: NDArray[np.float32] | None = None,
    ) -> Predictions:
        """Answer P prompts.

        Args:
            features: from `encode`.
            coords: [P, N, 2] (x, y) in pixels of the S×S input.
            labels: [P, N], see `samq.calib.parts`.
            masks: [P, h, w] logits of an earlier answer, or None.
        """
        answer = self.decoder.run({**features, **prompt_feeds(features, coords, labels, masks)})
        return Predictions(answer["masks"][0], answer["iou_scores"][0], answer["object_score_logits"][0, :, 0])


def prompt_feeds(
    features: Arrays, coords: NDArray[np.float32], labels: NDArray[np.int64], masks: NDArray[np.float32] | None = None
) -> dict[str, NDArray[Any]]:
    """The decoder's prompt inputs for one image; see `Predictor.decode` for the arguments."""
    prompts = len(coords)
    side = features["high_res_features_0"].shape[-2:]
    mask_input = np.zeros((prompts, *side), np.float32) if masks is None else masks
    return {
        "point_coords": coords[None],
        "point_labels": labels[None],
        "mask_input": mask_input[None, :, None],
        "has_mask_input": np.full((1, prompts), float(masks is not None), np.float32),
    }
