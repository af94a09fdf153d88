"""Rounding the weights of single layers by the method of their recipe; on a GPU, layers of one shape together.

Layers that share a down-projection come as one, their weights stacked: [W₁; W₂] ≈ [U₁; U₂] V in one truncated SVD. No
row of a weight depends on another one when it is rounded, so that its codes are its own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from samq.quant.config import Recipe
from samq.quant.gptq import Factor, factorize, gptq_together
from samq.quant.grids import QuantizedWeight, round_to_grid
from samq.quant.low_rank import LowRank, compensated, input_root, truncated_svd
from samq.quant.plan import LayerPlan, grid_of
from samq.quant.scales import choose_scales
from samq.quant.side_by_side import side_by_side

Method = Generator[Tensor, QuantizedWeight, tuple[LowRank | None, QuantizedWeight]]
"""Yields weights [N, K] that are sent back quantized; returns the branch and the codes beside it."""

TOGETHER = 1 << 27  # numbers in the largest matrix of each layer, summed over layers that are rounded together


@dataclass(frozen=True)
class ToRound:
    """A layer whose weight is to be rounded.

    Args:
        weight: [N, K] float32.
        own: the recipe as it is for this layer.
        plan: its group size and rank; of stacked layers, that of one of them.
        hessian: [K, K], Σ x xᵀ of its inputs, or None where no method looks at it or no input was seen.
        importance: [K], by which errors are weighted when scales are chosen, or None.
    """

    weight: Tensor
    own: Recipe
    plan: LayerPlan
    hessian: Tensor | None
    importance: Tensor | None


@dataclass(frozen=True)
class Rounded:
    """The outcome: codes, the low-rank branch beside them, and the most damping that GPTQ needed, None without it."""

    weight: QuantizedWeight
    branch: LowRank | None
    damping: float | None

    def of_rows(self, rows: slice) -> Rounded:
        """The outcome for some output channels: one of several layers that came as one."""
        branch = None if self.branch is None else LowRank(self.branch.down, self.branch.up[rows])
        return Rounded(self.weight.of_rows(rows), branch, self.damping)


def together(plans: Iterable[LayerPlan], recipe: Recipe, device: torch.device) -> list[list[str]]:
    """Names of layers in the groups in which `round_layers` is to have them: one by one, unless on a GPU.

    There, layers of the same shape and form make up a group, up to a bound on memory.
    """
    if device.type != "cuda":
        return [[plan.name] for plan in plans]
    alike: defaultdict[tuple[object, ...], list[LayerPlan]] = defaultdict(list)
    for plan in plans:
        shape = plan.in_features, plan.out_features
        alike[shape, plan.group_size, plan.rank > 0, recipe.pattern_for(plan.name)].append(plan)
    groups = []
    for members in alike.values():
        size = members[0].in_features * max(members[0].in_features, members[0].out_features)
        count = max(1, TOGETHER // size)
        groups += [[plan.name for plan in members[i : i + count]] for i in range(0, len(members), count)]
    return groups


def round_layers(layers: Sequence[ToRound]) -> list[Rounded]:
    """Round layers of one shape, group size and recipe at once; those that are done go along until the last one is."""
    device = layers[0].weight.device
    factors = side_by_side(_factor, layers, device)
    methods = side_by_side(_method, layers, device)
    asked = dict(enumerate(side_by_side(next, methods, device)))  # weights to be quantized, of those that are not done
    weights, done = list(asked.values()), dict[int, Rounded]()
    while asked:
        codes = _codes(layers, factors, weights)
        told = [(methods[index], codes[index]) for index in asked]
        for index, answer in zip(list(asked), side_by_side(_answer, told, device), strict=True):
            if isinstance(answer, Tensor):
                asked[index] = weights[index] = answer
                continue
            del asked[index]
            (branch, weight), factor = answer, factors[index]
            done[index] = Rounded(weight, branch, None if factor is None else factor.damping)
    return [done[index] for index in range(len(layers))]


def _answer(told: tuple[Method, QuantizedWeight]) -> Tensor | tuple[LowRank | None, QuantizedWeight]:
    """What a method that is told its codes wants quantized next, or its outcome."""
    method, codes = told
    try:
        return method.send(codes)
    except StopIteration as end:
        outcome: tuple[LowRank | None, QuantizedWeight] = end.value
        return outcome


def _factor(layer: ToRound) -> Factor | None:
    """What GPTQ needs of a layer's Hessian; None where it does not round the layer."""
    asked = layer.own.wgts.kernel_gptq
    return None if asked is None or layer.hessian is None else factorize(layer.hessian, asked.damp_percentage)


def _method(layer: ToRound) -> Method:
    """What is to be quantized for a layer, step by step."""
    asked, rank = layer.own.wgts.low_rank, layer.plan.rank
    if asked is None or rank == 0:
        return _beside(None, layer.weight)
    if not asked.needs_hessian or layer.hessian is None or not layer.hessian.any():
        return _beside(truncated_svd(layer.weight, rank), layer.weight)
    root = None if asked.weighting == "none" else input_root(layer.hessian, asked.weighting)
    return compensated(layer.weight, rank, layer.hessian, root, asked.max_rounds if asked.compensate else 1)


def _beside(branch: LowRank | None, weight: Tensor) -> Method:
    """What a branch leaves of a weight is quantized once."""
    return branch, (yield weight if branch is None else weight - branch.product())


def _codes(
    layers: Sequence[ToRound], factors: Sequence[Factor | None], weights: Sequence[Tensor]
) -> list[QuantizedWeight]:
    """Codes of weights [N, K], by GPTQ where there is a factor."""
    wgts, grid = layers[0].own.wgts, grid_of(layers[0].own)
    scales = [
        choose_scales(weight, grid, layer.plan.group_size, layer.importance, wgts.scales.norm)
        for layer, weight in zip(layers, weights, strict=True)
    ]
    by_gptq: dict[int, QuantizedWeight] = {}
    known = {index: factor for index, factor in enumerate(factors) if factor is not None}
    if known and wgts.kernel_gptq is not None:
        own_weights, own_scales = [weights[index] for index in known], [scales[index] for index in known]
        found = gptq_together(own_weights, list(known.values()), own_scales, grid, wgts.kernel_gptq.block_size)
        by_gptq = dict(zip(known, found, strict=True))
    return [
        by_gptq[index] if index in by_gptq else round_to_grid(weights[index], scales[index], grid)
        for index in range(len(layers))
    ]
