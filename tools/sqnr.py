"""Signal-to-quantization-noise ratio of each quantized layer's output, along the network as it runs.

SQNR = 10 log₁₀(Σ y² / Σ (y − ŷ)²), y from the float model and ŷ from the quantized one on the same image, so that the
noise of all earlier layers is part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import Sam2Model

from samq.calib.parts import ImageEncoder
from samq.tools.metrics import sqnr_db

ROWS = 4096  # of each layer's output that are compared; bounds the memory


@torch.no_grad()
def encoder_sqnr(
    baseline: Sam2Model, quantized: Sam2Model, layers: Collection[str], batches: Iterable[Tensor]
) -> dict[str, float | None]:
    """SQNR in dB of every layer of the image encoder, None for layers that did not run or had no noise.

    Args:
        baseline, quantized: `Sam2Model`s; the second with `QuantizedLinear` layers.
        layers: names of layers.
        batches: pixel values [B, 3, S, S].
    """
    signal = dict.fromkeys(layers, 0.0)
    noise = dict.fromkeys(layers, 0.0)
    for batch in batches:
        with _outputs(baseline, layers) as exact:
            ImageEncoder(baseline)(batch)
        with _outputs(quantized, layers) as rounded:
            ImageEncoder(quantized)(batch)
        for name in exact:
            signal[name] += float(exact[name].square().sum())
            noise[name] += float((exact[name] - rounded[name]).square().sum())
    return {name: sqnr_db(signal[name], noise[name]) for name in layers}


@contextmanager
def _outputs(model: nn.Module, layers: Collection[str]) -> Iterator[dict[str, Tensor]]:
    """Rows of the layers' outputs while the model runs inside the `with` block."""
    kept: dict[str, Tensor] = {}
    handles = [model.get_submodule(name).register_forward_hook(_keeping(kept, name)) for name in layers]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def _keeping(kept: dict[str, Tensor], name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        rows = output.reshape(-1, output.shape[-1])
        stride = max(1, rows.shape[0] // ROWS)
        kept[name] = rows[::stride].double()

    return hook
