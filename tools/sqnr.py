"""Signal-to-quantization-noise ratio of each quantized layer's output, along the network as it runs.

SQNR = 10 log₁₀(Σ y² / Σ (y − ŷ)²), y from the float model (with the folds of the quantized one, see `samq.quant.folds`)
and ŷ from the quantized one on the same image, so that the noise of all earlier layers is part of it. The mask decoder
is prompted with a grid of clicks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

import torch
from torch import Tensor, nn
from transformers import Sam2Model

from samq.calib.calibrate import GRID_PER_SIDE, decode
from samq.calib.parts import MASK_DECODER, ImageEncoder, MaskDecoder, part_of
from samq.calib.prompts import clicks, grid
from samq.tools.metrics import sqnr_db

ROWS = 256  # of each layer's output that are compared: all layers of both models are held at once


@torch.no_grad()
def layer_sqnr(
    baseline: Sam2Model, quantized: Sam2Model, layers: Collection[str], batches: Iterable[Tensor]
) -> dict[str, float | None]:
    """SQNR in dB of every layer, None for layers that did not run or had no noise.

    Args:
        baseline, quantized: `Sam2Model`s; the second with `QuantizedLinear` layers.
        layers: names of layers.
        batches: pixel values [1, 3, S, S].
    """
    signal = dict.fromkeys(layers, 0.0)
    noise = dict.fromkeys(layers, 0.0)
    prompted = any(part_of(name) == MASK_DECODER for name in layers)
    for batch in batches:
        exact, rounded = (_outputs(model, layers, batch, prompted) for model in (baseline, quantized))
        for name in exact:
            signal[name] += float(exact[name].double().square().sum())
            noise[name] += float((exact[name] - rounded[name]).double().square().sum())
    return {name: sqnr_db(signal[name], noise[name]) for name in layers}


def _outputs(model: Sam2Model, layers: Collection[str], batch: Tensor, prompted: bool) -> dict[str, Tensor]:
    """Rows of the layers' outputs for one image."""
    kept: dict[str, Tensor] = {}
    handles = []
    try:
        for name in layers:
            handles.append(model.get_submodule(name).register_forward_hook(_keeping(kept, name)))
        features = ImageEncoder(model)(batch)
        if prompted:
            decode(MaskDecoder(model), features, clicks(grid(batch.shape[-1], GRID_PER_SIDE)))
    finally:
        for handle in handles:
            handle.remove()
    return kept


def _keeping(kept: dict[str, Tensor], name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        rows = output.reshape(-1, output.shape[-1])
        stride = max(1, rows.shape[0] // ROWS)
        kept[name] = rows[::stride][:ROWS].clone()

    return hook
