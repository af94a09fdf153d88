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
from samq.quant.config import Recipe
from samq.quant.folds import Folds
from samq.quant.gptq import gptq, output_error
from samq.quant.grids import QuantizedWeight, round_to_grid
from samq.quant.inputs import InputGrid, static_grid
from samq.quant.layers import LayerCodes, QuantizedLinear, replace_module
from samq.quant.low_rank import LowRank, compensated, truncated_svd
from samq.quant.plan import LayerPlan, grid_of
from samq.quant.rotate import rotate_values
from samq.quant.scales import choose_scales
from samq.quant.sites import FoldSite, fold_sites, linear_at
from samq.quant.smooth import smooth

RANGE = "range"  # smallest and largest input of each channel, and a sample of inputs
HESSIAN = "hessian"  # Σ x xᵀ

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


class RotateValues(Pass):
    """Spread outliers of attention values over their head (`samq.quant.rotate`)."""

    exact = True

    def apply(self, work: Work) -> list[str]:
        """Rotate every attention whose output projection is quantized."""
        sites = [site for site in work.sites() if site.heads is not None]
        for site in sites:
            rotate_values(work.model, site)
            work.folds.rotated.append(site.source)
            work.note(site.layers[0]).remark(f"inputs rotated per head, folded into {site.source}")
        return [site.layers[0] for site in sites]


class Smooth(Pass):
    """Move activation outliers into the weights where something absorbs them (`samq.quant.smooth`)."""

    needs = frozenset({RANGE})
    exact = True

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha

    def apply(self, work: Work) -> list[str]:
        """Smooth every site whose layers are all quantized; says so for layers that have none."""
        touched: list[str] = []
        for site in work.sites():
            absmax = torch.stack([work.statistics[layer].absmax() for layer in site.layers]).amax(0)
            factors = smooth(work.model, site, absmax, self.alpha)
            work.folds.scales[site.source] = factors
            for layer in site.layers:
                work.statistics[layer].rescale(1 / factors)
                work.note(layer).remark(f"inputs smoothed, folded into {site.source}")
            touched.extend(site.layers)
        for layer in [name for name in work.plans if name not in touched]:
            work.note(layer).remark("inputs not smoothed: nothing before this layer can absorb a scale")
        return touched


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
            codes = LayerCodes(quantized, self._input_grid(weight, statistics), branch, bias)
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

    def _input_grid(self, weight: Tensor, statistics: InputStatistics | None) -> InputGrid | None:
        asked = self.recipe.ipts
        if asked is None:
            return None
        if asked.mode == "dynamic":
            return InputGrid(asked.dtype, asked.granularity)
        assert statistics is not None
        if statistics.rows == 0:
            return InputGrid(asked.dtype, asked.granularity, scale=1.0)
        importance = weight.square().sum(0)
        return static_grid(asked.dtype, statistics.low, statistics.high, statistics.sample, importance)


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
    """The passes of a recipe, in order."""
    passes: list[Pass] = []
    if recipe.rotation.enabled:
        passes.append(RotateValues())
    if recipe.smooth.enabled:
        passes.append(Smooth(recipe.smooth.alpha))
    return [*passes, Quantize(recipe), RoundRest()]
