"""Quantization passes. To add one: write a class like these and put it into `passes_for`.

A pass declares the statistics that it needs and whether it leaves the float model's output unchanged; the runner in
`samq.quant.quantize` holds it to both. `apply` returns the names of the layers that it touched.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from transformers import Sam2Model

from samq.calib.statistics import InputStatistics
from samq.quant.config import AUTO, Alpha, Recipe
from samq.quant.folds import Folds
from samq.quant.gptq import gptq, output_error
from samq.quant.grids import QuantizedWeight, round_to_grid
from samq.quant.inputs import input_grid
from samq.quant.layers import LayerCodes, QuantizedLinear, replace_module
from samq.quant.low_rank import LowRank, compensated, truncated_svd
from samq.quant.plan import LayerPlan, grid_of
from samq.quant.rotate import rotate_values
from samq.quant.scales import choose_scales
from samq.quant.shift import fold_offset, middle
from samq.quant.sites import FoldSite, fold_sites, linear_at
from samq.quant.smooth import fold_scale, magnitudes, smoothing_factors
from samq.quant.smooth_search import best_alpha

RANGE = "range"  # smallest and largest input of each channel, and a sample of inputs
HESSIAN = "hessian"  # Σ x xᵀ

WITHOUT_INPUTS = 0.5  # alpha of layers that calibration did not reach, so that there is nothing to search on

Tick = Callable[[str], None]


@dataclass
class LayerNotes:
    """What the passes did to one layer, for the report.

    Args:
        output_error: ‖(W − Ŵ) X‖² / ‖W X‖² over the calibration inputs, or None without a Hessian.
        damping: damping that GPTQ needed, None where GPTQ did not run.
        remarks: sentences for people.
    """

    output_error: float | None = None
    damping: float | None = None
    remarks: list[str] = field(default_factory=list)

    def remark(self, sentence: str) -> None:
        """Add a remark that is not there yet; the rounds of a compensated branch repeat theirs."""
        if sentence not in self.remarks:
            self.remarks.append(sentence)


@dataclass
class Work:
    """The model on its way through the passes.

    Args:
        model: changed in place.
        recipe: what was asked for.
        plans: the quantized layers' plans by name.
        statistics: of their inputs; empty until a pass needs them.
        codes: results by layer name.
        notes: remarks by layer name.
        folds: the exact changes of basis so far.
        tick: called with a layer's name when it is done.
    """

    model: Sam2Model
    recipe: Recipe
    plans: dict[str, LayerPlan]
    statistics: dict[str, InputStatistics]
    codes: dict[str, LayerCodes] = field(default_factory=dict)
    notes: dict[str, LayerNotes] = field(default_factory=dict)
    folds: Folds = field(default_factory=Folds)
    tick: Tick = lambda _: None

    def sites(self) -> list[FoldSite]:
        """Fold sites all of whose layers are quantized."""
        return [site for site in fold_sites(self.model) if all(layer in self.plans for layer in site.layers)]

    def note(self, layer: str) -> LayerNotes:
        """The notes of one layer."""
        return self.notes.setdefault(layer, LayerNotes())


class Pass(ABC):
    """One step from the float model to the quantized one.

    Attributes:
        needs: statistics that must have been gathered, of RANGE and HESSIAN.
        exact: the float model's output is the same afterwards, up to rounding.
    """

    needs: frozenset[str] = frozenset()
    exact: ClassVar[bool]

    @abstractmethod
    def apply(self, work: Work) -> list[str]:
        """Change `work`; returns the names of the layers touched."""


class Shift(Pass):
    """Take the middle of each activation channel away where biases make up for it (`samq.quant.shift`)."""

    needs = frozenset({RANGE})
    exact = True

    def apply(self, work: Work) -> list[str]:
        """Shift every site that takes an offset, whose layers are all quantized and have seen inputs."""
        touched: list[str] = []
        for site in work.sites():
            statistics = [work.statistics[layer] for layer in site.layers]
            if not site.takes_offset or not all(entry.rows for entry in statistics):
                continue
            low = torch.stack([entry.low for entry in statistics]).amin(0)
            high = torch.stack([entry.high for entry in statistics]).amax(0)
            offset = middle(low, high)
            fold_offset(work.model, site, offset)
            work.folds.offsets[site.source] = offset
            for layer, entry in zip(site.layers, statistics, strict=True):
                entry.shift(offset)
                work.note(layer).remark(f"inputs shifted, folded into {site.source}")
            touched.extend(site.layers)
        return touched


class Smooth(Pass):
    """Move activation outliers into the weights where something absorbs them (`samq.quant.smooth`)."""

    needs = frozenset({RANGE})
    exact = True

    def __init__(self, alpha: Alpha) -> None:
        self.alpha = alpha

    def apply(self, work: Work) -> list[str]:
        """Smooth every site whose layers are all quantized; says so for layers that have none.

        Attention values come first. Theirs changes the rows of qkv, and only then do the columns of qkv tell by how
        much a channel before it matters: one row with an outlier would have the largest weight of every column.
        """
        touched: list[str] = []
        for site in sorted(work.sites(), key=lambda site: site.heads is None):
            layers, statistics = site.layers_in(work.model), [work.statistics[layer] for layer in site.layers]
            alpha = self._alpha_of(site, work)
            factors = smoothing_factors(*magnitudes(layers, statistics, work.recipe.weight_only), alpha)
            fold_scale(work.model, site, factors)
            work.folds.scales[site.source] = factors
            for layer, entry in zip(site.layers, statistics, strict=True):
                entry.rescale(1 / factors)
                work.note(layer).remark(f"inputs smoothed (alpha {alpha:g}), folded into {site.source}")
            touched.extend(site.layers)
        for layer in [name for name in work.plans if name not in touched]:
            work.note(layer).remark("inputs not smoothed: nothing before this layer can absorb a scale")
        return touched

    def _alpha_of(self, site: FoldSite, work: Work) -> float:
        if self.alpha != AUTO:
            return self.alpha
        statistics = [work.statistics[layer] for layer in site.layers]
        if not all(entry.rows for entry in statistics):
            return WITHOUT_INPUTS
        group_sizes = [work.plans[layer].group_size for layer in site.layers]
        return best_alpha(site.layers_in(work.model), group_sizes, statistics, work.recipe)


class RotateValues(Pass):
    """Spread outliers of attention values over their head (`samq.quant.rotate`)."""

    exact = True

    def apply(self, work: Work) -> list[str]:
        """Rotate every attention whose output projection is quantized."""
        sites = [site for site in work.sites() if site.heads is not None]
        for site in sites:
            (layer,) = site.layers
            rotation = rotate_values(work.model, site)
            work.folds.rotated.append(site.source)
            if layer in work.statistics:
                work.statistics[layer].rotate(rotation)
            work.note(layer).remark(f"inputs rotated per head, folded into {site.source}")
        return [site.layers[0] for site in sites]


class Quantize(Pass):
    """Round the weights (RTN or GPTQ), with a low-rank branch where asked for, and fix the inputs' grids."""

    exact = False

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        needs = set()
        if recipe.ipts is not None and recipe.ipts.mode == "static":
            needs.add(RANGE)
        low_rank = recipe.wgts.low_rank
        if recipe.wgts.kernel_gptq is not None or (low_rank is not None and low_rank.compensate):
            needs.add(HESSIAN)
        self.needs = frozenset(needs)

    @torch.no_grad()
    def apply(self, work: Work) -> list[str]:
        """Quantize every planned layer and put its simulation into the model."""
        for name, plan in work.plans.items():
            layer = linear_at(work.model, name)
            statistics = work.statistics.get(name)
            weight = layer.weight.detach().float()
            branch, quantized = self._quantize_weight(weight, plan, statistics, work.note(name))
            bias = None if layer.bias is None else layer.bias.detach().float()
            codes = LayerCodes(quantized, input_grid(self.recipe.ipts, weight, statistics), branch, bias)
            if statistics is not None and statistics.hessian is not None:
                total = output_error(weight, statistics.hessian)
                left = output_error(weight - codes.effective_weight(), statistics.hessian)
                work.note(name).output_error = left / total if total > 0 else 0.0
                statistics.hessian = None  # the largest thing in memory, and no longer needed
            work.codes[name] = codes
            replace_module(work.model, name, QuantizedLinear(codes))
            work.tick(name)
        return list(work.plans)

    def _quantize_weight(
        self, weight: Tensor, plan: LayerPlan, statistics: InputStatistics | None, notes: LayerNotes
    ) -> tuple[LowRank | None, QuantizedWeight]:
        hessian = None if statistics is None or HESSIAN not in self.needs else statistics.hessian
        if self.recipe.wgts.kernel_gptq is not None and (hessian is None or not hessian.any()):
            notes.remark("no calibration input reached this layer: rounded to nearest")
            hessian = None

        def quantize(residual: Tensor) -> QuantizedWeight:
            return self._round(residual, plan, hessian, notes)

        low_rank = self.recipe.wgts.low_rank
        if low_rank is None or plan.rank == 0:
            return None, quantize(weight)
        if low_rank.compensate and hessian is not None:
            return compensated(weight, plan.rank, quantize, hessian)
        branch = truncated_svd(weight, plan.rank)
        return branch, quantize(weight - branch.product())

    def _round(self, weight: Tensor, plan: LayerPlan, hessian: Tensor | None, notes: LayerNotes) -> QuantizedWeight:
        grid, asked = grid_of(self.recipe), self.recipe.wgts.kernel_gptq
        importance = None if hessian is None else hessian.diagonal()
        scales = choose_scales(weight, grid, plan.group_size, importance)
        if asked is None or hessian is None:
            return round_to_grid(weight, scales, grid)
        result = gptq(weight, hessian, scales, grid, asked.block_size, asked.damp_percentage)
        notes.damping = result.damping
        if result.damping > asked.damp_percentage:
            notes.remark(
                f"the Hessian did not factorize: damping raised from {asked.damp_percentage:g} to {result.damping:g}"
            )
        return result.weight


class RoundRest(Pass):
    """Round the weights that stay float to FP16, as they are stored and as every GPU engine runs them.

    Vectors (biases, LayerNorm) keep FP32: they are few, and LayerNorm is where FP16 goes wrong first. So does a matrix
    with a weight beyond FP16's range.
    """

    exact = False

    @torch.no_grad()
    def apply(self, work: Work) -> list[str]:
        """Round every float parameter of two or more dimensions that FP16 can hold."""
        touched = []
        for name, parameter in work.model.named_parameters():
            rounded = parameter.half()
            if parameter.ndim >= 2 and bool(torch.isfinite(rounded).all()):
                parameter.copy_(rounded.to(parameter.dtype))
                touched.append(name)
        return touched


def passes_for(recipe: Recipe) -> list[Pass]:
    """The passes of a recipe, in order: each makes the next one's work easier.

    Middles are taken away before channels are compared by their ranges, and channels are made alike before a rotation
    mixes them. The other way round one outlier would be in all channels of a head, where no scale reaches it.
    """
    passes: list[Pass] = []
    if recipe.shift.enabled:
        passes.append(Shift())
    if recipe.smooth.enabled:
        passes.append(Smooth(recipe.smooth.alpha))
    if recipe.rotation.enabled:
        passes.append(RotateValues())
    return [*passes, Quantize(recipe), RoundRest()]
