"""The quantized linear layer as PyTorch simulates it: what every engine's answer is held against."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from samq.quant.grids import QuantizedWeight
from samq.quant.inputs import InputGrid
from samq.quant.low_rank import LowRank
from samq.quant.rotate import runtime_rotation


@dataclass(frozen=True)
class LayerCodes:
    """All that one quantized layer stores.

    Args:
        weight: codes and scales of W, of W diag(p)⁻¹ when there is a multiplier p, of W R⁻¹ when inputs are rotated,
            or of the residual W − up·down when there is a branch.
        inputs: grid of the activations, None for float activations.
        branch: low-rank branch on the unquantized activations, or None.
        bias: [N] float32, or None.
        multiplier: p [K] float32, by which the inputs are multiplied before anything else, where nothing before the
            layer could absorb it; or None.
        down_of: name of the layer whose down-projection the branch has, so that it is stored once, with that layer;
            or None where it is the layer's own.
        rotated: the inputs, multiplied or not, are then multiplied by R = `runtime_rotation(K)`, which the width tells.
    """

    weight: QuantizedWeight
    inputs: InputGrid | None
    branch: LowRank | None
    bias: Tensor | None
    multiplier: Tensor | None = None
    down_of: str | None = None
    rotated: bool = False

    def effective_weight(self) -> Tensor:
        """Dequantized weight plus the branch, times the rotation and the multiplier, [N, K]."""
        dequantized = self.weight.dequantize()
        whole = dequantized if self.branch is None else dequantized + self.branch.product()
        if self.rotated:
            whole = whole @ runtime_rotation(whole.shape[1], whole.device)
        return whole if self.multiplier is None else whole * self.multiplier

    def stored_bytes(self) -> int:
        """Bytes of weight, branch and multiplier; the bias is the same before and after and does not count.

        Nor does a down-projection that is stored with another layer, nor a rotation, which its width tells.
        """
        branch = 0 if self.branch is None else self.branch.stored_bytes(with_down=self.down_of is None)
        return self.weight.stored_bytes() + branch + (0 if self.multiplier is None else self.multiplier.nbytes)


class QuantizedLinear(nn.Module):
    """y = Q(x) Ŵᵀ + (x downᵀ) upᵀ + b, in floating point (SVDQuant, arXiv 2411.05007, eq. 5); a p makes x to x · p.

    A rotation makes that to R x before anything else sees it.
    """

    weight: Tensor
    down: Tensor
    up: Tensor
    multiplier: Tensor
    rotation: Tensor

    def __init__(self, codes: LayerCodes) -> None:
        super().__init__()
        self.codes = codes
        self.out_features, self.in_features = codes.weight.codes.shape
        self.register_buffer("weight", codes.weight.dequantize(), persistent=False)
        if codes.branch is not None:
            self.register_buffer("down", codes.branch.down, persistent=False)
            self.register_buffer("up", codes.branch.up, persistent=False)
        if codes.multiplier is not None:
            self.register_buffer("multiplier", codes.multiplier, persistent=False)
        if codes.rotated:
            self.register_buffer("rotation", runtime_rotation(self.in_features, self.weight.device), persistent=False)
        self.bias = None if codes.bias is None else nn.Parameter(codes.bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] → [..., N]."""
        if self.codes.multiplier is not None:
            x = x * self.multiplier
        if self.codes.rotated:
            x = F.linear(x, self.rotation)
        grid = self.codes.inputs
        y = F.linear(x if grid is None else grid.fake_quantize(x), self.weight, self.bias)
        return y if self.codes.branch is None else y + F.linear(F.linear(x, self.down), self.up)


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place called `name`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
