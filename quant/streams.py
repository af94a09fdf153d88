"""Residual streams of Hiera, and their rotation, folded offline (QuaRot, arXiv 2404.00456, section 4, stage 1a).

A stream x is a sum of what linear maps write into it, and is read through LayerNorms and by the neck's convolution.
With an orthogonal R for which R 1 = 1, a token's mean and variance stay, and no LayerNorm has to become an RMSNorm:

    LN(R x) = R LN(x)                                       without gain and bias
    W (g · LN(x) + b) = (W diag(g) Rᵀ) LN(R x) + W b        gain and bias go into the layers behind it first

R goes into the rows of every layer that writes, Rᵀ into the columns of those that read. Behind a LayerNorm whose
windows are filled up with zeros W b cannot go into a bias, for these zeros have none; the LayerNorm keeps R (b / g).

A stage that begins with query pooling begins with max-pooled channels, and max(R x) is not R max(x). Its stream keeps
its basis. In the released models these are all stages but the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from transformers import Sam2Model
from transformers.models.sam2.modeling_sam2 import Sam2HieraDetModel, Sam2MultiScaleBlock

from samq.calib.parts import BACKBONE
from samq.quant.rotate import mean_keeping_rotation
from samq.quant.sites import FoldSite, fold_sites, linear_at

POOLED = "it begins with max-pooled channels, and maxima do not pass through a rotation"
SMALLEST_GAIN = 1e-3  # of the largest; below it, b / g would be an outlier of its own


@dataclass(frozen=True)
class Stream:
    """The residual stream of a stage.

    Args:
        name: of the first block that adds to it.
        width: channels.
        writers: names of the linear layers whose outputs are summed; the embedding too, for the first one.
        norms: names of the LayerNorms that read it.
        level: stage in the model, from 0.
        obstacle: why it cannot be rotated, None where it can.
    """

    name: str
    width: int
    writers: tuple[str, ...]
    norms: tuple[str, ...]
    level: int
    obstacle: str | None

    def layers_in(self, model: nn.Module) -> list[str]:
        """Names of the linear layers that write or read it."""
        return [*self.writers, *(layer for site in self.sites_in(model) for layer in site.layers)]

    def sites_in(self, model: nn.Module) -> list[FoldSite]:
        """What the LayerNorms that read it feed."""
        return [site for site in fold_sites(model) if site.source in self.norms]


def residual_streams(model: Sam2Model) -> list[Stream]:
    """The streams of the backbone, in the order in which they run."""
    backbone = model.get_submodule(BACKBONE)
    assert isinstance(backbone, Sam2HieraDetModel)
    starts = [0, *(end + 1 for end in backbone.stage_ends)]
    blocks = list(backbone.blocks)
    sites = {site.source: site for site in fold_sites(model)}
    found = []
    for level, (start, stop) in enumerate(pairwise(starts)):
        names = [f"{BACKBONE}.blocks.{index}" for index in range(start, stop)]
        first = blocks[start]
        assert isinstance(first, Sam2MultiScaleBlock)
        widens = first.dim != first.dim_out
        writers = [f"{name}.{layer}" for name in names for layer in ("attn.proj", "mlp.proj_out")]
        # The first block of a later stage reads the stream before it.
        norms = [f"{BACKBONE}.blocks.{index}.layer_norm1" for index in range(start + (level > 0), stop)]
        norms += [f"{BACKBONE}.blocks.{stop}.layer_norm1"] if stop < len(blocks) else []
        norms += [f"{name}.layer_norm2" for name in names]
        if first.query_stride is not None:
            obstacle: str | None = POOLED
        elif (level > 0 and not widens) or _goes_on(blocks[stop:]):
            obstacle = "it is one stream with that of the next or the last stage, which has the same width"
        else:
            obstacle = _small_gains(model, [sites[name] for name in norms])
        writers += [f"{names[0]}.proj"] if widens else []
        found.append(Stream(names[0], first.dim_out, tuple(writers), tuple(norms), level, obstacle))
    return found


def _goes_on(blocks: Sequence[nn.Module]) -> bool:
    """The next block, if there is one, adds to the stream that it reads."""
    following = next(iter(blocks), None)
    return isinstance(following, Sam2MultiScaleBlock) and following.dim == following.dim_out


def _small_gains(model: nn.Module, sites: Sequence[FoldSite]) -> str | None:
    for site in sites:
        gains = site.source_in(model).weight.abs()
        if not site.takes_offset and bool(gains.min() < SMALLEST_GAIN * gains.max()):
            return f"{site.source} has gains near zero before windows that are filled up with zeros"
    return None


@torch.no_grad()
def rotate_stream(model: Sam2Model, stream: Stream) -> Tensor:
    """Rotate a residual stream; what the model puts out stays the same up to rounding.

    Args:
        stream: one without an obstacle.

    Returns:
        R [K, K] in float64, by which the stream is now multiplied.
    """
    assert stream.obstacle is None
    backbone, neck = model.get_submodule(BACKBONE), model.vision_encoder.neck
    assert isinstance(backbone, Sam2HieraDetModel)
    projection = backbone.patch_embed.projection
    rotation = mean_keeping_rotation(stream.width).to(projection.weight.device)
    for site in stream.sites_in(model):
        _fold_gain(model, site, rotation)
    written: list[Tensor] = []
    for name in stream.writers:
        layer = linear_at(model, name)
        written += [layer.weight, layer.bias]
    if stream.level == 0:
        assert projection.bias is not None
        written += [projection.weight, projection.bias]
        for position in (backbone.pos_embed, backbone.pos_embed_window):  # [1, C, h, w]
            position.copy_(torch.einsum("ij,bjhw->bihw", rotation, position.double()))
    for tensor in written:
        tensor.copy_(torch.tensordot(rotation, tensor.double(), 1))
    reader = neck.convs[len(neck.convs) - 1 - stream.level].weight  # [N, C, h, w]
    reader.copy_(torch.einsum("ncij,dc->ndij", reader.double(), rotation))
    return rotation


def _fold_gain(model: nn.Module, site: FoldSite, rotation: Tensor) -> None:
    """Take gain and bias of a LayerNorm into the layers behind it, whose inputs are now rotated."""
    norm = site.source_in(model)
    gain, bias = (tensor.double().clone() for tensor in (norm.weight, norm.bias))  # copies, of float64 too
    for layer in site.layers_in(model):
        weight = layer.weight.double()
        if site.takes_offset:
            layer.bias.add_((weight @ bias).to(layer.bias.dtype))
        layer.weight.copy_(weight * gain @ rotation.T)
    norm.weight.fill_(1)
    norm.bias.copy_(torch.zeros_like(bias) if site.takes_offset else rotation @ (bias / gain))
