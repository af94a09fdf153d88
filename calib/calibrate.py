"""Running a model over calibration images while a `Recorder` listens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import Sam2Model

from samq.calib.parts import ImageEncoder, MaskDecoder
from samq.calib.prompting import Prompts, boxes, clicks, grid
from samq.calib.prompts import box_of
from samq.calib.statistics import InputStatistics, Recorder
from samq.errors import BadInput

GRID_PER_SIDE = 4
DECODER_CALLS = 3  # clicks, then boxes, then masks of what the clicks found


@torch.no_grad()
def calibrate(
    model: Sam2Model,
    layers: Mapping[str, nn.Linear],
    batches: Iterable[Tensor],
    expected_batches: int,
    with_hessian: bool,
    with_decoder: bool,
    tick: Callable[[str], None] = lambda _: None,
) -> dict[str, InputStatistics]:
    """Gather input statistics of `layers` in one pass.

    The decoder, when it is wanted, is prompted with a grid of clicks, with the boxes of the masks that these find, and
    with those masks themselves.

    Args:
        model: a `Sam2Model` in eval mode.
        layers: the layers to observe, by name.
        batches: pixel values [B, 3, S, S]; read once, one batch in memory at a time.
        expected_batches: number of batches, for spreading the samples.
        tick: called once a batch.

    Raises:
        BadInput: there was no image, or an activation became infinite or NaN.
    """
    encoder, decoder = ImageEncoder(model), MaskDecoder(model)
    device = next(model.parameters()).device
    calls = max(1, expected_batches) * (DECODER_CALLS if with_decoder else 1)
    recorder = Recorder(layers, with_hessian, calls)
    seen = 0
    with recorder.recording() as statistics:
        for batch in batches:
            features = encoder(batch.to(device))
            if with_decoder:
                _prompt(decoder, features, batch.shape[-1])
            seen += batch.shape[0]
            tick("calibrate")
    if seen == 0:
        raise BadInput("calibration saw no image; give a folder with images as --calib-data")
    for name, entry in statistics.items():
        if not entry.is_finite():
            raise BadInput(f"{name}: its inputs are not finite on the calibration images; check the checkpoint")
    return statistics


def _prompt(decoder: MaskDecoder, features: tuple[Tensor, Tensor, Tensor], image_size: int) -> None:
    """Run the decoder on `DECODER_CALLS` kinds of prompts for every image of the batch."""
    for index in range(features[0].shape[0]):
        one = tuple(feature[index : index + 1] for feature in features)
        side = one[1].shape[-1]
        logits = _decode(decoder, one, clicks(grid(image_size, GRID_PER_SIDE)), side, None)[0, :, 0]  # [P, side, side]
        found = (logits > 0).cpu().numpy()
        kept = [i for i, mask in enumerate(found) if mask.any()] or [0]
        corners = np.stack([_box(found[i], image_size / side) for i in kept])
        _decode(decoder, one, boxes(corners), side, None)
        _decode(decoder, one, boxes(corners), side, logits[kept])


def _box(mask: NDArray[np.bool_], scale: float) -> NDArray[np.float32]:
    corners = box_of(mask) if mask.any() else np.array([0, 0, *mask.shape[::-1]], dtype=np.float32)
    return (corners * scale).astype(np.float32)


def _decode(
    decoder: MaskDecoder, features: tuple[Tensor, ...], prompts: Prompts, side: int, masks: Tensor | None
) -> Tensor:
    device = features[0].device
    count = len(prompts)
    mask_input = torch.zeros(1, count, 1, side, side, device=device) if masks is None else masks[None, :, None]
    has_mask = torch.full((1, count), float(masks is not None), device=device)
    coords = torch.from_numpy(prompts.coords)[None].to(device)
    labels = torch.from_numpy(prompts.labels)[None].to(device)
    answer: Tensor = decoder(*features, coords, labels, mask_input, has_mask)[0]
    return answer
