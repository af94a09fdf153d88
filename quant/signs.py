"""The sign fold for bimodal keys: Bimodal Integration of PTQ4SAM (Lv et al., arXiv 2405.03144).

    Q Kᵀ = (Q diag(γ)) (K diag(γ))ᵀ,   γ_j = 1 where mean(K_:j) ≥ 0, else −1

In SAM's mask decoder the channels of a key lie on one side of zero each, about as many on either side, so that all of
them together have two clouds with nothing in between. γ takes both to the positive side. It goes into rows and biases
of the query's and the key's linear layer. −x is as exact as x, so nothing changes but signs, not even rounding.

A grid of the keys that has a zero-point then has half the range to cover, which is worth one bit. One that is symmetric
about zero gains nothing, nor do the weights in front, for −w rounds as w does. No preset makes this fold, because
attention runs in floating point here; `samq.tools.bench_attention` measures what that saves.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.signal import find_peaks  # type: ignore[import-untyped]
from scipy.stats import gaussian_kde  # type: ignore[import-untyped]
from torch import Tensor, nn
from transformers.models.sam2.modeling_sam2 import Sam2Attention

from samq.calib.histogram import BINS, Histogram

POINTS = 128  # at which the density is looked at, from the smallest value to the largest; these three as in PTQ4SAM
LEAST_DISTANCE = 32  # of two peaks, in points
LEAST_HEIGHT = 0.01  # of a peak, as a share of the density's sum over all points


def decoder_attentions(model: nn.Module) -> dict[str, Sam2Attention]:
    """The attentions of a `Sam2Model`'s mask decoder by name, in its order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Sam2Attention)}


def is_bimodal(values: Tensor) -> bool:
    """A Gaussian kernel density estimate has two peaks that are high enough and far enough apart, and no third.

    It is estimated from a histogram of all values, with the width of the kernel that Scott's rule has for so many.

    Args:
        values: of any shape; not bimodal where there are none, or all are the same.

    Raises:
        ValueError: a value is infinite or NaN.
    """
    histogram = Histogram.of(values)
    if not histogram.is_finite():
        raise ValueError("keys that are infinite or NaN have no density")
    if not histogram.low < histogram.high:
        return False
    filled = histogram.counts.numpy().nonzero()[0]
    centres = (filled - BINS + 0.5) * histogram.width
    if len(filled) < 2:
        return False
    width = float(values.numel()) ** -0.2
    density = gaussian_kde(centres, bw_method=width, weights=histogram.counts.numpy()[filled])
    heights = density(np.linspace(histogram.low, histogram.high, POINTS))
    peaks, _ = find_peaks(heights, height=LEAST_HEIGHT * heights.sum(), distance=LEAST_DISTANCE)
    return len(peaks) == 2


def bimodal_signs(keys: Tensor) -> Tensor:
    """γ for the keys of an attention: −1 for channels with a negative mean, +1 for all others.

    Args:
        keys: [..., C] what the key's linear layer puts out.

    Returns:
        [C] of ±1 in float32; ones alone where the keys are not bimodal.

    Raises:
        ValueError: a key is infinite or NaN.
    """
    if not is_bimodal(keys):
        return torch.ones(keys.shape[-1], device=keys.device)
    means = keys.detach().reshape(-1, keys.shape[-1]).double().mean(0)
    return torch.where(means >= 0, 1.0, -1.0).float()


@torch.no_grad()
def fold_signs(attention: Sam2Attention, signs: Tensor) -> None:
    """Multiply channels of queries and keys by `signs`, in place; their products stay the same bit for bit.

    Args:
        signs: [C] of ±1, with C the width of queries and keys, all heads together.

    Raises:
        ValueError: these are no such signs.
    """
    if signs.shape != (attention.internal_dim,) or not bool((signs.abs() == 1).all()):
        raise ValueError(f"signs {list(signs.shape)} have to be {attention.internal_dim} of ±1")
    for layer in (attention.q_proj, attention.k_proj):
        layer.weight.mul_(signs[:, None])
        layer.bias.mul_(signs)
