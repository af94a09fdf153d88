"""Places in a SAM2 model where a change of the activations' basis can be folded into weights, exactly.

| site            | sits on the input of         | its inverse goes into         | algebra                             |
|-----------------|------------------------------|-------------------------------|-------------------------------------|
| after LayerNorm | the linears that it feeds    | its gain and bias             | diag(s): LN(x)·s; offset: LN(x) − c |
| value → output  | an attention's output linear | the rows of v, as softmax     | diag(s), a rotation per head, or an |
|                 |                              | mixes tokens only             | offset, as its weights sum to one   |
| ReLU in between | an MLP's next linear         | the rows of the linear before | diag(s), s > 0: relu(s·x)=s·relu(x) |

Queries and keys of an attention could be changed exactly, too: the signs of channels in both (`samq.quant.signs`, for
keys in two clouds of opposite sign), a scale of one against the other, an offset of the keys. No preset does. It is of
use to integer products of queries and keys (`samq.tools.bench_attention`), and attention runs in floating point here;
the weights before it do not gain, for each row has scales of its own and −w rounds as w does.

Elsewhere nothing can absorb it, and `obstacles` says why: GELU is not homogeneous, the decoder's LayerNorms also feed
the residual stream or other layers. Hiera's windows and pooling are no obstacle to a scale: windows hold whole tokens,
and what is pooled reaches no linear layer but through LayerNorm or softmax. A LayerNorm behind which windows are filled
up with zeros takes no offset, for these zeros would not have it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import nn
from transformers.models.sam2.modeling_sam2 import (
    Sam2Attention,
    Sam2FeedForward,
    Sam2HieraDetModel,
    Sam2MaskDecoder,
    Sam2MultiScaleAttention,
    Sam2MultiScaleBlock,
    Sam2TwoWayTransformer,
)

NO_PRODUCER = "no LayerNorm or linear layer puts out what it reads"
RESIDUAL = "{} also feeds the residual stream"
SEVERAL = "{} also feeds layers that are not smoothed together with this one"
NONLINEAR = "{} in front lets no scale pass"


@dataclass(frozen=True)
class FoldSite:
    """One place for a fold.

    Args:
        source: name of the LayerNorm or linear layer that takes the inverse.
        rows: the rows of `source` that produce the activations (output channels), start and stop.
        layers: names of the linear layers that read the activations.
        heads: attention heads when the activations are attention values, else None.
        takes_offset: the layers read nothing but what `source` puts out, on each token or averaged over tokens, so that
            their biases can make up for an offset of its bias.
    """

    source: str
    rows: tuple[int, int]
    layers: tuple[str, ...]
    heads: int | None = None
    takes_offset: bool = False

    def source_in(self, model: nn.Module) -> nn.LayerNorm | nn.Linear:
        """The module that takes the inverse."""
        module = model.get_submodule(self.source)
        assert isinstance(module, nn.LayerNorm | nn.Linear)
        return module

    def layers_in(self, model: nn.Module) -> list[nn.Linear]:
        """The linear layers that read the activations."""
        return [linear_at(model, name) for name in self.layers]


def linear_at(model: nn.Module, name: str) -> nn.Linear:
    """The linear layer called `name`."""
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear), f"{name} is no linear layer"
    return layer


def fold_sites(model: nn.Module) -> list[FoldSite]:
    """All fold sites of a `Sam2Model`, in the order in which they run."""
    sites: list[FoldSite] = []
    unpadded: set[nn.Module] = set()
    for name, module in model.named_modules():
        if isinstance(module, Sam2HieraDetModel):
            unpadded |= _unpadded_blocks(module)
        elif isinstance(module, Sam2MultiScaleBlock):
            fed = (f"{name}.proj",) if module.dim != module.dim_out else ()
            readers = (*fed, f"{name}.attn.qkv")
            sites.append(
                FoldSite(f"{name}.layer_norm1", (0, module.dim), readers, takes_offset=module in unpadded),
            )
            mlp = (f"{name}.mlp.proj_in",)
            sites.append(FoldSite(f"{name}.layer_norm2", (0, module.dim_out), mlp, takes_offset=True))
        elif isinstance(module, Sam2MultiScaleAttention):
            rows = (2 * module.dim_out, 3 * module.dim_out)
            sites.append(FoldSite(f"{name}.qkv", rows, (f"{name}.proj",), module.num_attention_heads, True))
        elif isinstance(module, Sam2Attention):
            rows = (0, module.internal_dim)
            sites.append(FoldSite(f"{name}.v_proj", rows, (f"{name}.o_proj",), module.num_attention_heads, True))
        elif isinstance(module, Sam2FeedForward) and isinstance(module.activation, nn.ReLU):
            chain = ["proj_in", *(f"layers.{i}" for i in range(len(module.layers))), "proj_out"]
            for before, after in pairwise(chain):
                rows = (0, linear_at(module, before).out_features)
                sites.append(FoldSite(f"{name}.{before}", rows, (f"{name}.{after}",)))
    return sites


def obstacles(model: nn.Module) -> dict[str, str]:
    """Why nothing before a linear layer absorbs a scale of its inputs, for those of a `Sam2Model` at no fold site."""
    told: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, Sam2FeedForward):
            activation = type(module.activation).__name__.removesuffix("Activation")
            behind = [f"{name}.layers.{index}" for index in range(len(module.layers))]
            told |= dict.fromkeys([*behind, f"{name}.proj_out"], NONLINEAR.format(activation))
        elif isinstance(module, Sam2MaskDecoder):
            told |= _obstacles_of_decoder(name, module)
    absorbed = {layer for site in fold_sites(model) for layer in site.layers}
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return {name: told.get(name, NO_PRODUCER) for name in layers if name not in absorbed}


def _obstacles_of_decoder(name: str, decoder: Sam2MaskDecoder) -> dict[str, str]:
    """What each layer behind one of the decoder's LayerNorms shares it with; the first block reads prompts and image.

    The last image tokens are also upscaled, and each of the last prompts goes into a head of its own.
    """
    told: dict[str, str] = {}
    transformer = f"{name}.transformer"
    prompts = image = NO_PRODUCER
    for index in range(len(decoder.transformer.layers)):
        block = f"{transformer}.layers.{index}"
        norms = [RESIDUAL.format(f"{block}.layer_norm{number}") for number in (1, 2, 3, 4)]
        told |= {f"{block}.self_attn.{letter}_proj": prompts for letter in "qkv"}
        told |= _obstacles_of_attention(f"{block}.cross_attn_token_to_image", norms[0], image)
        told[f"{block}.mlp.proj_in"] = norms[1]
        told |= _obstacles_of_attention(f"{block}.cross_attn_image_to_token", image, norms[2])
        prompts, image = norms[2], norms[3]
    last = SEVERAL.format(f"{transformer}.layers.{len(decoder.transformer.layers) - 1}.layer_norm4")
    told |= _obstacles_of_attention(f"{transformer}.final_attn_token_to_image", prompts, last)
    heads = [child for child, module in decoder.named_modules() if isinstance(module, Sam2FeedForward)]
    together = SEVERAL.format(f"{transformer}.layer_norm_final_attn")
    told |= {f"{name}.{head}.proj_in": together for head in heads if not head.startswith("transformer.")}
    return told


def _obstacles_of_attention(name: str, queries: str, keys: str) -> dict[str, str]:
    return {f"{name}.q_proj": queries, f"{name}.k_proj": keys, f"{name}.v_proj": keys}


def same_inputs(model: nn.Module) -> list[tuple[str, ...]]:
    """Names of linear layers of a `Sam2Model` that read the very same tokens, wherever several do, in its order.

    In a backbone's block that widens, these are qkv and the projection of the skip connection; windows may have the
    tokens in another order, with zeros in between.
    """
    found: list[tuple[str, ...]] = []
    for name, module in model.named_modules():
        if isinstance(module, Sam2MultiScaleBlock) and module.dim != module.dim_out:
            found.append((f"{name}.attn.qkv", f"{name}.proj"))
        elif isinstance(module, Sam2TwoWayTransformer):
            found += _same_inputs_of_decoder(name, [f"{name}.layers.{index}" for index in range(len(module.layers))])
    return found


def _same_inputs_of_decoder(name: str, blocks: Sequence[str]) -> list[tuple[str, ...]]:
    """Between its norms, a block's prompts and image stay as they are, with positions added or without.

    The prompts that the image attends to at the end of a block are those that attend to each other in the next one, or
    to the image at last. In the first block, prompts attend to each other without positions.
    """
    found = [tuple(f"{blocks[0]}.self_attn.{letter}_proj" for letter in "qkv")]
    for block, after in zip(blocks, (*blocks[1:], None), strict=True):
        image = f"{block}.cross_attn_image_to_token"
        found.append((f"{block}.cross_attn_token_to_image.k_proj", f"{image}.q_proj"))
        if after is None:
            found.append((f"{image}.k_proj", f"{name}.final_attn_token_to_image.q_proj"))
        else:
            found.append((f"{image}.k_proj", f"{after}.self_attn.q_proj", f"{after}.self_attn.k_proj"))
            found.append((f"{image}.v_proj", f"{after}.self_attn.v_proj"))
    return found


def _unpadded_blocks(backbone: Sam2HieraDetModel) -> set[nn.Module]:
    """The blocks into whose windows the tokens of an image of the configured size fit without any filling."""
    config = backbone.config
    geometry = (config.image_size, config.patch_padding, config.patch_kernel_size, config.patch_stride)
    grid = [
        (size + 2 * padding - kernel) // stride + 1
        for size, padding, kernel, stride in zip(*map(_pair, geometry), strict=True)
    ]
    unpadded: set[nn.Module] = set()
    for block in backbone.blocks:
        assert isinstance(block, Sam2MultiScaleBlock)
        if block.window_size == 0 or not any(side % block.window_size for side in grid):
            unpadded.add(block)
        if block.query_stride is not None:
            grid = [side // stride for side, stride in zip(grid, _pair(block.query_stride), strict=True)]
    return unpadded


def _pair(configured: int | Sequence[int] | None) -> tuple[int, int]:
    """A size as transformers' configurations hold it: one number for both sides, or two."""
    assert configured is not None
    both = (configured, configured) if isinstance(configured, int) else configured
    return both[0], both[1]
