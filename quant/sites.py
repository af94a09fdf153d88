"""Places in a SAM2 model where a change of the activations' basis can be folded into weights, exactly.

| site            | sits on the input of         | its inverse goes into         | algebra                             |
|-----------------|------------------------------|-------------------------------|-------------------------------------|
| after LayerNorm | the linears that it feeds    | its gain and bias             | diag(s) only: LN(x)·s               |
| value → output  | an attention's output linear | the rows of v, as softmax     | diag(s), or a rotation per head     |
|                 |                              | mixes tokens only             |                                     |
| ReLU in between | an MLP's next linear         | the rows of the linear before | diag(s), s > 0: relu(s·x)=s·relu(x) |

Elsewhere nothing can absorb it: GELU is not homogeneous, the decoder's LayerNorms also feed the residual stream.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from torch import nn
from transformers.models.sam2.modeling_sam2 import (
    Sam2Attention,
    Sam2FeedForward,
    Sam2MultiScaleAttention,
    Sam2MultiScaleBlock,
)


@dataclass(frozen=True)
class FoldSite:
    """One place for a fold.

    Args:
        source: name of the LayerNorm or linear layer that takes the inverse.
        rows: the rows of `source` that produce the activations (output channels), start and stop.
        layers: names of the linear layers that read the activations.
        heads: attention heads when the activations are attention values, else None.
    """

    source: str
    rows: tuple[int, int]
    layers: tuple[str, ...]
    heads: int | None = None

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
    for name, module in model.named_modules():
        if isinstance(module, Sam2MultiScaleBlock):
            fed = (f"{name}.proj",) if module.dim != module.dim_out else ()
            sites.append(FoldSite(f"{name}.layer_norm1", (0, module.dim), (*fed, f"{name}.attn.qkv")))
            sites.append(FoldSite(f"{name}.layer_norm2", (0, module.dim_out), (f"{name}.mlp.proj_in",)))
        elif isinstance(module, Sam2MultiScaleAttention):
            width = module.dim_out
            heads = module.num_attention_heads
            sites.append(FoldSite(f"{name}.qkv", (2 * width, 3 * width), (f"{name}.proj",), heads))
        elif isinstance(module, Sam2Attention):
            rows = (0, module.internal_dim)
            sites.append(FoldSite(f"{name}.v_proj", rows, (f"{name}.o_proj",), module.num_attention_heads))
        elif isinstance(module, Sam2FeedForward) and isinstance(module.activation, nn.ReLU):
            chain = ["proj_in", *(f"layers.{i}" for i in range(len(module.layers))), "proj_out"]
            for before, after in pairwise(chain):
                rows = (0, linear_at(module, before).out_features)
                sites.append(FoldSite(f"{name}.{before}", rows, (f"{name}.{after}",)))
    return sites
