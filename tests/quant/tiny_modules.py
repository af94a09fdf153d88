"""Modules with one fold site of each kind, in float64, where nothing but the fold can change what they put out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import Sam2HieraDetConfig, Sam2MaskDecoderConfig
from transformers.models.sam2.modeling_sam2 import Sam2Attention, Sam2FeedForward, Sam2MultiScaleAttention

from samq.quant.sites import FoldSite, fold_sites

TOKENS = 5


@dataclass(frozen=True)
class Tiny:
    """A module and how to run it.

    Args:
        model: its fold sites are those of a `Sam2Model`, or `sites`.
        sites: in the order in which they run.
        run: what it puts out for fixed inputs.
    """

    model: nn.Module
    sites: list[FoldSite]
    run: Callable[[], Tensor]


def normal(*shape: int, seed: int) -> Tensor:
    """Float64."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def randomized(model: nn.Module, seed: int) -> nn.Module:
    """Every parameter from a normal distribution, gains of LayerNorms among them."""
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.data = normal(*parameter.shape, seed=1000 * seed + index)
    return model


def layer_norm(width: int, seed: int) -> Tiny:
    """A LayerNorm with two readers."""
    model = randomized(
        nn.ModuleDict({"norm": nn.LayerNorm(width), "one": nn.Linear(width, 3), "two": nn.Linear(width, 4)}), seed
    )
    x = normal(TOKENS, width, seed=seed)

    def run() -> Tensor:
        read = model.get_submodule("norm")(x)
        return torch.cat([model.get_submodule(name)(read) for name in ("one", "two")], -1)

    return Tiny(model, [FoldSite("norm", (0, width), ("one", "two"), takes_offset=True)], run)


def hiera_attention(width: int, heads: int, seed: int) -> Tiny:
    """Attention values of the encoder, with `width` channels a head."""
    config = Sam2HieraDetConfig()
    config._attn_implementation = "sdpa"
    attention = Sam2MultiScaleAttention(config, width + 1, heads * width, heads)
    model = randomized(nn.ModuleDict({"attn": attention}), seed)
    x = normal(1, 2, TOKENS, width + 1, seed=seed)
    return Tiny(model, fold_sites(model), lambda: model.get_submodule("attn")(x))


def decoder_attention(width: int, heads: int, seed: int) -> Tiny:
    """Attention values of the decoder, with `width` channels a head and half of all that it reads."""
    config = Sam2MaskDecoderConfig(hidden_size=2 * heads * width, num_attention_heads=heads)
    config._attn_implementation = "sdpa"
    model = randomized(nn.ModuleDict({"attn": Sam2Attention(config, downsample_rate=2)}), seed)
    queries, keys = (normal(1, 1, TOKENS, config.hidden_size, seed=seed + which) for which in range(2))
    return Tiny(model, fold_sites(model), lambda: model.get_submodule("attn")(queries, keys, keys)[0])


def relu_mlp(width: int, seed: int) -> Tiny:
    """Three linear layers with ReLU in between."""
    model = randomized(nn.ModuleDict({"mlp": Sam2FeedForward(4, width, 3, num_layers=3)}), seed)
    x = normal(TOKENS, 4, seed=seed)
    return Tiny(model, fold_sites(model), lambda: model.get_submodule("mlp")(x))
