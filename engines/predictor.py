"""Prompting a pair of engines: the image once, then as many prompts as wanted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samq.engines.base import Arrays, BoundedEngine, Engine
from samq.errors import UsageError

PADDING = -10  # label of a point that fills up a prompt; SAM 2 attends to it, so the answer is another one
MOST_PROMPTS_AT_ONCE = 16  # at 1024×1024 a prompt takes tens of megabytes while it is decoded
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
        """Answer P prompts, a few at a time.

        Prompts do not see each other, so a decoder for a fixed number of them gets the last one several times. A
        decoder for a fixed number of points gets prompts filled up, and answers a little less well (`PADDING`).

        Args:
            features: from `encode`.
            coords: [P, N, 2] (x, y) in pixels of the S×S input.
            labels: [P, N], see `samq.calib.parts`.
            masks: [P, h, w] logits of an earlier answer, or None.

        Raises:
            UsageError: the decoder takes fewer points a prompt.
        """
        _, prompts, points, _ = self.decoder.shapes["point_coords"]
        most = self._most(points, coords.shape[1])
        if coords.shape[1] > most:
            raise UsageError(
                f"the decoder takes {most} points a prompt, not {coords.shape[1]}; "
                f"export it without static shapes, and build it with --max-points {coords.shape[1]}"
            )
        if isinstance(points, int):
            coords, labels = _padded(coords, labels, points)
        at_once = self._most(prompts, MOST_PROMPTS_AT_ONCE)
        answers = []
        for start in range(0, max(1, len(coords)), at_once):
            chunk = slice(start, start + at_once)
            seen = None if masks is None else _filled(masks[chunk], prompts)
            feeds = prompt_feeds(features, _filled(coords[chunk], prompts), _filled(labels[chunk], prompts), seen)
            answers.append(self.decoder.run({**features, **feeds}))
        whole = {name: np.concatenate([a[name][0] for a in answers])[: len(coords)] for name in answers[0]}
        return Predictions(whole["masks"], whole["iou_scores"], whole["object_score_logits"][:, 0])

    def _most(self, side: int | str, otherwise: int) -> int:
        """The most that a side of the decoder's prompts takes; `otherwise` where it has no end."""
        if isinstance(side, int):
            return side
        return self.decoder.largest.get(side, otherwise) if isinstance(self.decoder, BoundedEngine) else otherwise


def _padded(
    coords: NDArray[np.float32], labels: NDArray[np.int64], points: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Prompts of `points` points each."""
    missing = points - coords.shape[1]
    return (
        np.pad(coords, ((0, 0), (0, missing), (0, 0))),
        np.pad(labels, ((0, 0), (0, missing)), constant_values=PADDING),
    )


def _filled(rows: NDArray[Any], count: int | str) -> NDArray[Any]:
    """`count` rows, the last one repeated where there are fewer."""
    missing = count - len(rows) if isinstance(count, int) else 0
    return np.concatenate([rows, np.repeat(rows[-1:], missing, axis=0)]) if missing else rows


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
