"""What the quantization of one layer alone does to the masks, on images with fixed prompts.

A layer's own output error says little: what later layers drop does not matter, and a small error of a layer that all
masks hang on does. So the masks themselves are compared, those of the float model with those of the float model with a
single layer quantized. Hard masks only change where a logit changes its sign, which takes many images to see. The
proxy is the Tanimoto distance of the soft masks p, q = sigmoid(logits),

    d(p, q) = Σ (p − q)² / (Σ p² + Σ q² − Σ p q + 1)

For masks of zeros and ones it is 1 − IoU (the 1 is one pixel, with which two empty masks agree). For small errors it is
their square, and squares of independent errors add up: Σ over layers of d is what a model of many such layers is
expected to lose, and what `samq.tools.search` minimizes.

It is trusted as far as it orders layers as the hard masks do, which `search` tells of every run: Spearman's correlation
of d with 1 − IoU of the same masks. On the demo model it is 0.94 over 67 layers in 3 forms, on 2 images, with
    samq-export search --model-path tools/demo/checkpoint --calib-data tools/demo/images --num-calib-samples 16 \\
        --max-bytes 4900000 --num-eval-samples 8 --sensitivity-images 2 --points 3 --output-dir OUT
(2 cores of a shared Xeon, no GPU).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Sam2Model

from samq.calib.calibrate import decode
from samq.calib.parts import MASK_DECODER, ImageEncoder, MaskDecoder, part_of
from samq.calib.prompts import Prompts, box_of, boxes, clicks, grid
from samq.quant.layers import replace_module
from samq.quant.plan import block_of
from samq.quant.quantize import Quantized

CLICKS_PER_SIDE = 3
ONE_PIXEL = 1.0

Features = tuple[Tensor, ...]


@dataclass(frozen=True)
class Effect:
    """What one layer does to the masks when it alone is quantized.

    Args:
        loss: d of the soft masks, mean over prompts and images.
        disagreement: 1 − IoU of the hard masks at the logits' resolution, likewise.
    """

    loss: float
    disagreement: float


def soft_mask_distance(found: Tensor, exact: Tensor) -> Tensor:
    """d of two batches of mask logits [..., h, w] → [...]."""
    p, q = found.double().sigmoid(), exact.double().sigmoid()
    overlap, total = (p * q).sum((-2, -1)), (p.square() + q.square()).sum((-2, -1))
    return (p - q).square().sum((-2, -1)) / (total - overlap + ONE_PIXEL)


def mask_disagreement(found: Tensor, exact: Tensor) -> Tensor:
    """1 − IoU of two batches of masks, given as logits [..., h, w] → [...]; two empty masks agree."""
    one, other = found > 0, exact > 0
    union = (one | other).sum((-2, -1))
    return 1 - torch.where(union > 0, (one & other).sum((-2, -1)) / union.clamp(min=1), 1.0)


@torch.no_grad()
def layer_effects(
    model: Sam2Model,
    quantized: Quantized,
    layers: Collection[str],
    batches: Iterable[Tensor],
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Effect]:
    """The effect of each layer, with the form that it has in a quantized model.

    What comes before a layer's block is computed once an image, not once a layer.

    Args:
        model: the float model; not changed.
        quantized: made from it, all of `layers` quantized.
        layers: names of quantized layers.
        batches: pixel values [1, 3, S, S]; read once.
        tick: called after each layer of each image.

    Raises:
        ValueError: there was no image.
    """
    twin = copy.deepcopy(model)
    twin.mask_decoder.dynamic_multimask_via_stability = False  # the single mask never jumps to another one
    quantized.folds.apply(twin)  # the same function; layers of `quantized` fit into it
    decoder = MaskDecoder(twin)
    device = next(twin.parameters()).device
    sums = {name: torch.zeros(2, dtype=torch.float64) for name in layers}
    images = 0
    for batch in batches:
        image = _Image(twin, decoder, batch.to(device))
        for name in layers:
            with _swapped(twin, name, quantized.model.get_submodule(name)):
                sums[name] += image.compared(name)
            tick()
        images += 1
    if images == 0:
        raise ValueError("no image to compare masks on")
    return {name: Effect(*(total / images).tolist()) for name, total in sums.items()}


class _Image:
    """One image as the float model sees it: tokens behind each block, features, prompts and masks."""

    def __init__(self, model: Sam2Model, decoder: MaskDecoder, pixels: Tensor) -> None:
        self.model, self.decoder, self.pixels = model, decoder, pixels
        self.tokens: list[Tensor] = []
        blocks = model.vision_encoder.backbone.blocks
        handles = [block.register_forward_hook(self._keep) for block in blocks]
        try:
            self.features = self._encoded()
        finally:
            for handle in handles:
                handle.remove()
        size = pixels.shape[-1]
        self.clicks = clicks(grid(size, CLICKS_PER_SIDE))
        found = decode(decoder, self.features, self.clicks)[0]
        self.boxes = _boxes_of(found, size)
        self.masks = self._answers(self.features)

    def compared(self, layer: str) -> Tensor:
        """Loss and disagreement [2] of the model as it is now, a layer being changed; mean over the prompts."""
        features = self.features if part_of(layer) == MASK_DECODER else self._encoded(block_of(layer) or 0)
        found = self._answers(features)
        return torch.stack([_mean(measure, found, self.masks) for measure in (soft_mask_distance, mask_disagreement)])

    def _encoded(self, first: int = 0) -> Features:
        """The encoder's features; tokens of blocks before `first` are the float model's."""
        blocks = self.model.vision_encoder.backbone.blocks
        with _replaying(blocks, self.tokens[:first]):
            features: Features = ImageEncoder(self.model)(self.pixels)
        return features

    def _answers(self, features: Features) -> list[Tensor]:
        """Logits [P, M, h, w] of all multimasks of the clicks, and [P, 1, h, w] of the boxes' single masks."""
        answers = [decode(self.decoder, features, self.clicks)[0, :, 1:]]
        if self.boxes is not None:
            answers.append(decode(self.decoder, features, self.boxes)[0, :, :1])
        return answers

    def _keep(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self.tokens.append(output)


def _mean(measure: Callable[[Tensor, Tensor], Tensor], found: list[Tensor], exact: list[Tensor]) -> Tensor:
    """Mean of a measure over all prompts; a click counts once, however many masks it has."""
    of_prompts = [measure(one, other).double().mean(-1) for one, other in zip(found, exact, strict=True)]
    return torch.cat(of_prompts).mean().cpu()


def _boxes_of(logits: Tensor, size: int) -> Prompts | None:
    """The boxes of the first multimask of each click, from [P, 1 + M, h, w]; None where all are empty."""
    masks = (logits[:, 1] > 0).cpu().numpy()
    scale = np.float32(size / masks.shape[-1])
    corners = np.array([box_of(mask) * scale for mask in masks if mask.any()], np.float32).reshape(-1, 4)
    return boxes(np.unique(corners, axis=0)) if len(corners) else None


class _Replay(nn.Module):
    """Stands for a block whose tokens are known."""

    def __init__(self, tokens: Tensor) -> None:
        super().__init__()
        self.tokens = tokens

    def forward(self, *args: object, **options: object) -> Tensor:
        return self.tokens


@contextmanager
def _replaying(blocks: nn.ModuleList, tokens: list[Tensor]) -> Iterator[None]:
    """The first blocks put out these tokens, whatever they get."""
    first = list(blocks[: len(tokens)])
    try:
        for index, known in enumerate(tokens):
            blocks[index] = _Replay(known)
        yield
    finally:
        for index, block in enumerate(first):
            blocks[index] = block


@contextmanager
def _swapped(model: nn.Module, name: str, module: nn.Module) -> Iterator[None]:
    """`module` stands in the place called `name`."""
    before = model.get_submodule(name)
    replace_module(model, name, module)
    try:
        yield
    finally:
        replace_module(model, name, before)
