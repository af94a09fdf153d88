"""Running a model over calibration images while a `Recorder` listens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import Sam2Model

from samq.calib.histogram import Histogram
from samq.calib.parts import ImageEncoder, MaskDecoder
from samq.calib.prompts import Prompts, box_of, boxes, clicks, grid
from samq.calib.statistics import InputStatistics, Recorder, listening
from samq.errors import BadInput

GRID_PER_SIDE = 4


@torch.no_grad()
def calibrate(
    model: Sam2Model,
    layers: Mapping[str, nn.Linear],
    batches: Iterable[Tensor],
    with_hessian: bool,
    with_decoder: bool,
    tick: Callable[[str], None] = lambda _: None,
    with_histogram: bool = False,
) -> dict[str, InputStatistics]:
    """Gather input statistics of `layers` in one pass.

    Args:
        model: a `Sam2Model` in eval mode.
        layers: the layers to observe, by name.
        batches: pixel values [B, 3, S, S]; read once, one batch in memory at a time.
        with_decoder: also run the decoder, see `run_images`.
        tick: called once a batch.

    Raises:
        BadInput: there was no image, or an activation became infinite or NaN.
    """
    recorder = Recorder(layers, with_hessian, with_histogram)
    with recorder.recording() as statistics:
        run_images(model, batches, with_decoder, tick)
    require_finite(statistics)
    return statistics


@torch.no_grad()
def histograms(
    model: Sam2Model, layers: Mapping[str, nn.Linear], batches: Iterable[Tensor], with_decoder: bool
) -> dict[str, Histogram]:
    """Count the values that `layers` read, in one pass; arguments and errors as of `calibrate`."""
    found = {name: Histogram() for name in layers}
    with listening(layers, found):
        run_images(model, batches, with_decoder)
    require_finite(found)
    return found


def run_images(
    model: Sam2Model, batches: Iterable[Tensor], with_decoder: bool, tick: Callable[[str], None] = lambda _: None
) -> None:
    """Run the encoder and, where it is wanted, the decoder.

    The decoder is prompted with a grid of clicks, with the boxes of the masks that these find, and with those masks
    themselves.

    Raises:
        BadInput: there was no image.
    """
    encoder, decoder = ImageEncoder(model), MaskDecoder(model)
    device = next(model.parameters()).device
    seen = 0
    for batch in batches:
        features = encoder(batch.to(device))
        if with_decoder:
            _prompt(decoder, features, batch.shape[-1])
        seen += batch.shape[0]
        tick("calibrate")
    if seen == 0:
        raise BadInput("calibration saw no image; give a folder with images as --calib-data")


def require_finite(statistics: Mapping[str, InputStatistics] | Mapping[str, Histogram]) -> None:
    """Insist that no input overflowed.

    Raises:
        BadInput: one did, or was NaN.
    """
    for name, entry in statistics.items():
        if not entry.is_finite():
            raise BadInput(f"{name}: its inputs are not finite on the calibration images; check the checkpoint")


def _prompt(decoder: MaskDecoder, features: tuple[Tensor, Tensor, Tensor], image_size: int) -> None:
    """Run the decoder on clicks, boxes and masks for every image of the batch."""
    for index in range(features[0].shape[0]):
        one = tuple(feature[index : index + 1] for feature in features)
        logits = decode(decoder, one, clicks(grid(image_size, GRID_PER_SIDE)))[0, :, 0]  # [P, side, side]
        found = (logits > 0).cpu().numpy()
        kept = [i for i, mask in enumerate(found) if mask.any()] or [0]
        corners = np.stack([_box(found[i], image_size / found.shape[-1]) for i in kept])
        decode(decoder, one, boxes(corners))
        decode(decoder, one, boxes(corners), logits[kept])


def _box(mask: NDArray[np.bool_], scale: float) -> NDArray[np.float32]:
    corners = box_of(mask) if mask.any() else np.array([0, 0, *mask.shape[::-1]], dtype=np.float32)
    return (corners * scale).astype(np.float32)


def decode(decoder: MaskDecoder, features: tuple[Tensor, ...], prompts: Prompts, masks: Tensor | None = None) -> Tensor:
    """Mask logits [1, P, 1 + M, h, w] of one image.

    Args:
        features: the encoder's outputs for it, batch size 1.
        masks: [P, h, w] logits as mask prompts, or None.
    """
    device = features[0].device
    count, side = len(prompts), features[1].shape[-1]
    mask_input = torch.zeros(1, count, 1, side, side, device=device) if masks is None else masks[None, :, None]
    has_mask = torch.full((1, count), float(masks is not None), device=device)
    coords = torch.from_numpy(prompts.coords)[None].to(device)
    labels = torch.from_numpy(prompts.labels)[None].to(device)
    answer: Tensor = decoder(*features, coords, labels, mask_input, has_mask)[0]
    return answer
