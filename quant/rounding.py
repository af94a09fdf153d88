"""Rounding the weights of single layers by the method of their recipe; on a GPU, layers of one shape together.

Layers that share a down-projection come as one, their weights stacked: [W₁; W₂] ≈ [U₁; U₂] V in one truncated SVD. No
row of a weight depends on another one when it is rounded, so that its codes are its own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from samq.quant.config import LowRankConfig, Recipe
from samq.quant.gptq import GptqResult, gptq_together
from samq.quant.grids import QuantizedWeight, round_to_grid
from samq.quant.low_rank import MAX_ROUNDS, LowRank, compensated, input_root, truncated_svd
from samq.quant.plan import LayerPlan, grid_of
from samq.quant.scales import choose_scales

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
    """Round layers of one shape, group size and recipe."""
    low_rank = layers[0].own.wgts.low_rank
    if low_rank is None or layers[0].plan.rank == 0:
        return _rounded(layers, [None] * len(layers))
    if not low_rank.needs_hessian:
        return _rounded(layers, [truncated_svd(layer.weight, layer.plan.rank) for layer in layers])
    return [_compensated(layer, low_rank) for layer in layers]


def _compensated(layer: ToRound, asked: LowRankConfig) -> Rounded:
    if layer.hessian is None or not layer.hessian.any():
        return _rounded([layer], [truncated_svd(layer.weight, layer.plan.rank)])[0]
    dampings: list[float | None] = []

    def quantize(residual: Tensor) -> QuantizedWeight:
        weight, damping = _round([layer], [residual])[0]
        dampings.append(damping)
        return weight

    root = None if asked.weighting == "none" else input_root(layer.hessian, asked.weighting)
    rounds = MAX_ROUNDS if asked.compensate else 1
    branch, weight = compensated(layer.weight, layer.plan.rank, quantize, layer.hessian, root, rounds)
    return Rounded(weight, branch, max((damping for damping in dampings if damping is not None), default=None))


def _rounded(layers: Sequence[ToRound], branches: Sequence[LowRank | None]) -> list[Rounded]:
    """Round what branches leave of the weights."""
    residuals = [
        layer.weight if branch is None else layer.weight - branch.product()
        for layer, branch in zip(layers, branches, strict=True)
    ]
    return [
        Rounded(weight, branch, damping)
        for (weight, damping), branch in zip(_round(layers, residuals), branches, strict=True)
    ]


def _round(layers: Sequence[ToRound], weights: Sequence[Tensor]) -> list[tuple[QuantizedWeight, float | None]]:
    """Codes of weights [N, K], and the damping of those that GPTQ rounds."""
    wgts, grid = layers[0].own.wgts, grid_of(layers[0].own)
    scales = [
        choose_scales(weight, grid, layer.plan.group_size, layer.importance, wgts.scales.norm)
        for layer, weight in zip(layers, weights, strict=True)
    ]
    by_gptq: dict[int, GptqResult] = {}
    hessians = {index: layer.hessian for index, layer in enumerate(layers) if layer.hessian is not None}
    if wgts.kernel_gptq is not None and hessians:
        asked = wgts.kernel_gptq
        results = gptq_together(
            [weights[index] for index in hessians],
            list(hessians.values()),
            [scales[index] for index in hessians],
            grid,
            asked.block_size,
            asked.damp_percentage,
        )
        by_gptq = dict(zip(hessians, results, strict=True))
    return [
        (by_gptq[index].weight, by_gptq[index].damping)
        if index in by_gptq
        else (round_to_grid(weights[index], scales[index], grid), None)
        for index in range(len(layers))
    ]
