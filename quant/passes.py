"""Quantization passes. To add one: write a class like these and put it into `passes_for`.

A pass declares the statistics that it needs and whether it leaves the float model's output unchanged; the runner in
`samq.quant.quantize` holds it to both. `apply` returns the names of the layers that it touched.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import ClassVar

import torch
from torch import Tensor
from transformers import Sam2Model

from samq.calib.block_walk import BlockWalk
from samq.calib.parts import MASK_DECODER
from samq.calib.statistics import InputStatistics
from samq.quant.config import AUTO, Alpha, Recipe
from samq.quant.folds import Folds
from samq.quant.gptq import output_error
from samq.quant.grids import round_to_grid
from samq.quant.inputs import input_grid
from samq.quant.layers import LayerCodes, QuantizedLinear, replace_module
from samq.quant.low_rank import energies
from samq.quant.modelopt_quantizer import Decided, config_for, decide, shared_multiplier, version
from samq.quant.plan import LayerPlan, branch_allowance, grid_of, stacked, with_rank
from samq.quant.ranks import Candidate, share_out
from samq.quant.rotate import rotate_inputs, rotate_values
from samq.quant.rounding import Rounded, ToRound, round_layers, together
from samq.quant.scales import choose_scales
from samq.quant.shift import fold_offset, middle
from samq.quant.side_by_side import side_by_side
from samq.quant.sites import FoldSite, fold_sites, linear_at, obstacles
from samq.quant.smooth import fold_scale, magnitudes, multiply_inputs, smoothing_factors
from samq.quant.smooth_search import best_alpha
from samq.quant.streams import residual_streams, rotate_stream

RANGE = "range"  # smallest and largest input of each channel, and a sample of inputs
HESSIAN = "hessian"  # Σ x xᵀ
IMAGES = "images"  # the calibration images themselves
HISTOGRAM = "histogram"  # of all values that a layer reads, as its inputs are by then

EXACT_TOLERANCE = 1e-3  # relative, of both parts' outputs; FP32 rounding through the largest Hiera stays below
ROTATION_TOLERANCE = 1e-4  # Hiera-large stays below 2e-6, and outliers of 100 spread their rounding to 3e-5
SMALLEST = torch.finfo(torch.float64).tiny
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
        multipliers: what the inputs of a layer are multiplied by, [K], where nothing absorbs it.
        rotated: names of layers whose inputs are rotated at run time, behind that.
        images: pixel values [B, 3, S, S], for passes that need IMAGES.
        walk: through the encoder, where blocks are to be calibrated behind the quantized ones before them.
        tick: called with a layer's name when it is done.
    """

    model: Sam2Model
    recipe: Recipe
    plans: dict[str, LayerPlan]
    statistics: dict[str, InputStatistics]
    codes: dict[str, LayerCodes] = field(default_factory=dict)
    notes: dict[str, LayerNotes] = field(default_factory=dict)
    folds: Folds = field(default_factory=Folds)
    multipliers: dict[str, Tensor] = field(default_factory=dict)
    rotated: set[str] = field(default_factory=set)
    images: Iterable[Tensor] = ()
    walk: BlockWalk | None = None
    tick: Tick = lambda _: None

    def sites(self) -> list[FoldSite]:
        """Fold sites with a quantized layer; float layers of a site take its folds as exactly."""
        return [site for site in fold_sites(self.model) if self.readers(site)]

    def readers(self, site: FoldSite) -> list[str]:
        """The quantized layers of a site. All its layers read the same inputs, so theirs stand for all."""
        return [layer for layer in site.layers if layer in self.plans]

    def note(self, layer: str) -> LayerNotes:
        """The notes of one layer."""
        return self.notes.setdefault(layer, LayerNotes())

    def bias(self, layer: str) -> Tensor | None:
        """The float bias [N] of one layer."""
        bias = linear_at(self.model, layer).bias
        return None if bias is None else bias.detach().float()

    def put(self, layer: str, codes: LayerCodes) -> None:
        """Keep what one layer stores, and put its simulation into the model: the layer is done."""
        self.codes[layer] = codes
        replace_module(self.model, layer, QuantizedLinear(codes))
        self.tick(layer)


class Pass(ABC):
    """One step from the float model to the quantized one.

    Attributes:
        needs: statistics that must have been gathered, of RANGE, HESSIAN and HISTOGRAM, or IMAGES.
        exact: the float model's output is the same afterwards, up to rounding.
        tolerance: of an exact pass, how much of that output may change, ‖y' − y‖ / ‖y‖.
    """

    needs: frozenset[str] = frozenset()
    exact: ClassVar[bool]
    tolerance: ClassVar[float] = EXACT_TOLERANCE

    @abstractmethod
    def apply(self, work: Work) -> list[str]:
        """Change `work`; returns the names of the layers touched."""


class Shift(Pass):
    """Take the middle of each activation channel away where biases make up for it (`samq.quant.shift`)."""

    needs = frozenset({RANGE})
    exact = True

    def apply(self, work: Work) -> list[str]:
        """Shift every site that takes an offset, whose quantized layers have seen inputs."""
        touched: list[str] = []
        for site in work.sites():
            readers = work.readers(site)
            statistics = [work.statistics[layer] for layer in readers]
            if not site.takes_offset or not all(entry.rows for entry in statistics):
                continue
            low = torch.stack([entry.low for entry in statistics]).amin(0)
            high = torch.stack([entry.high for entry in statistics]).amax(0)
            offset = middle(low, high)
            fold_offset(work.model, site, offset)
            work.folds.offsets[site.source] = offset
            for layer, entry in zip(readers, statistics, strict=True):
                entry.shift(offset)
                work.note(layer).remark(f"inputs shifted, folded into {site.source}")
            touched.extend(readers)
        return touched


class Smooth(Pass):
    """Move activation outliers into the weights (`samq.quant.smooth`).

    Args:
        alpha: share of the range that moves, or "auto".
        multiply: also where nothing absorbs the scale; the layer's inputs are multiplied by it then.
    """

    needs = frozenset({RANGE})
    exact = True

    def __init__(self, alpha: Alpha, *, multiply: bool = False) -> None:
        self.alpha, self.multiply = alpha, multiply

    def apply(self, work: Work) -> list[str]:
        """Smooth every site with a quantized layer; says why not for layers that have none.

        Attention values come first. Theirs changes the rows of qkv, and only then do the columns of qkv tell by how
        much a channel before it matters: one row with an outlier would have the largest weight of every column.
        """
        touched: list[str] = []
        for site in sorted(work.sites(), key=lambda site: site.heads is None):
            readers = work.readers(site)
            alpha, factors = self._factors_of(readers, work)
            fold_scale(work.model, site, factors)
            work.folds.scales[site.source] = factors
            for layer in readers:
                work.statistics[layer].rescale(1 / factors)
                work.note(layer).remark(f"inputs smoothed (alpha {alpha:g}), folded into {site.source}")
            touched.extend(readers)
        reasons = {} if self.multiply else obstacles(work.model)
        for plan in stacked(plan for name, plan in work.plans.items() if name not in touched):
            if not self.multiply:
                for layer in plan.members:
                    work.note(layer).remark(f"inputs not smoothed: {reasons[layer]}")
                continue
            alpha, factors = self._factors_of(list(plan.members), work)
            for layer in plan.members:
                multiplier = multiply_inputs(linear_at(work.model, layer), factors)
                work.multipliers[layer] = multiplier * work.multipliers.get(layer, 1.0)
                work.statistics[layer].rescale(multiplier)
                work.note(layer).remark(f"inputs smoothed (alpha {alpha:g}) by a product in front of the layer")
                touched.append(layer)
        return touched

    def _factors_of(self, readers: list[str], work: Work) -> tuple[float, Tensor]:
        """Alpha, and the factors [K] of the inputs that these layers share."""
        layers = [linear_at(work.model, layer) for layer in readers]
        statistics = [work.statistics[layer] for layer in readers]
        alpha = self._alpha_of(readers, work)
        return alpha, smoothing_factors(*magnitudes(layers, statistics, work.recipe.weight_only), alpha)

    def _alpha_of(self, readers: list[str], work: Work) -> float:
        if self.alpha != AUTO:
            return self.alpha
        statistics = [work.statistics[layer] for layer in readers]
        if not all(entry.rows for entry in statistics):
            return WITHOUT_INPUTS
        layers = [linear_at(work.model, layer) for layer in readers]
        group_sizes = [work.plans[layer].group_size for layer in readers]
        recipes = [work.recipe.of_layer(layer) for layer in readers]
        return best_alpha(layers, group_sizes, statistics, recipes)


class RotateStreams(Pass):
    """Spread outliers of the residual streams that can be rotated exactly (`samq.quant.streams`)."""

    exact = True
    tolerance = ROTATION_TOLERANCE

    def apply(self, work: Work) -> list[str]:
        """Rotate every stream with a quantized layer on it; says so for those that have to keep their basis."""
        touched: list[str] = []
        for stream in residual_streams(work.model):
            layers = [layer for layer in stream.layers_in(work.model) if layer in work.plans]
            if stream.obstacle is None and layers:
                rotate_stream(work.model, stream)
                work.folds.streams.append(stream.name)
                touched.extend(layers)
            for layer in layers:
                done = "rotated" if stream.obstacle is None else f"not rotated: {stream.obstacle}"
                work.note(layer).remark(f"residual stream of stage {stream.level + 1} {done}")
        return touched


class RotateValues(Pass):
    """Spread outliers of attention values over their head (`samq.quant.rotate`)."""

    exact = True
    tolerance = ROTATION_TOLERANCE

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


class RotateInputs(Pass):
    """Spread outliers of all other inputs at run time, by a product with R in front of the layer."""

    exact = True
    tolerance = ROTATION_TOLERANCE

    def apply(self, work: Work) -> list[str]:
        """Rotate the inputs of every quantized layer for which no rotation was folded."""
        sites = [site for site in fold_sites(work.model) if site.source in work.folds.rotated]
        for stream in residual_streams(work.model):
            sites += stream.sites_in(work.model) if stream.name in work.folds.streams else []
        left = {layer for site in sites for layer in site.layers}
        touched = [name for name in work.plans if name not in left]
        for layer in touched:
            rotation = rotate_inputs(linear_at(work.model, layer))
            if layer in work.statistics:
                work.statistics[layer].rotate(rotation)
            work.note(layer).remark("inputs rotated at run time by a product in front of the layer")
        work.rotated.update(touched)
        return touched


class ChooseRanks(Pass):
    """Share bytes or FLOPs of low-rank branches out among the layers whose rank is `auto` (`samq.quant.ranks`)."""

    exact = True

    def __init__(self, recipe: Recipe) -> None:
        asked = [own for own in recipe.variants() if own.auto_rank]
        self._in_flops = any(own.wgts.low_rank is not None and own.wgts.low_rank.budget == "flops" for own in asked)
        by_moments = any(own.wgts.needs_hessian for own in asked)
        self.needs = frozenset(need for need, wanted in ((HESSIAN, by_moments), (RANGE, self._in_flops)) if wanted)

    @torch.no_grad()
    def apply(self, work: Work) -> list[str]:
        """Give every layer that is left a choice its rank; zero is one."""
        names = [name for name in work.plans if work.recipe.of_layer(name).auto_rank]
        stacks = stacked(work.plans[name] for name in names)
        device = next(work.model.parameters()).device
        candidates = side_by_side(lambda stack: self._candidate(stack, work), stacks, device)
        # What a layer puts in: a share of its 2 K N bytes, or of as many FLOPs for each token.
        budget = sum(
            branch_allowance(work.plans[name].fp16_bytes, work.recipe.of_layer(name)) * self._tokens(name, work)
            for name in names
        )
        for stack, rank in zip(stacks, share_out(candidates, budget), strict=True):
            for name in stack.members:
                work.plans[name] = with_rank(work.plans[name], rank, work.recipe)
        return names

    def _candidate(self, stack: LayerPlan, work: Work) -> Candidate:
        weight = torch.cat([self._weighed(name, work) for name in stack.members])
        return Candidate(energies(weight), sum(weight.shape), self._tokens(stack.name, work))

    def _tokens(self, name: str, work: Work) -> int:
        """That the layer saw in calibration, where FLOPs are spent; at least one."""
        return max(1, work.statistics[name].rows) if self._in_flops else 1

    def _weighed(self, name: str, work: Work) -> Tensor:
        """A layer's weight [N, K] in float64, ‖ ‖² of which is the relative output error that rounding leaves."""
        own, statistics = work.recipe.of_layer(name), work.statistics.get(name)
        weight = linear_at(work.model, name).weight.detach().float()
        hessian = statistics.hessian if statistics is not None and own.wgts.needs_hessian else None
        if hessian is None or not hessian.any():
            hessian = torch.eye(weight.shape[1], device=weight.device)
        grid, group_size = grid_of(own), work.plans[name].group_size
        nearest = round_to_grid(weight, choose_scales(weight, grid, group_size, norm=own.wgts.scales.norm), grid)
        error, total = (output_error(of, hessian) for of in (weight - nearest.dequantize(), weight))
        relative = error / total if total > 0 else 0.0
        exact = weight.double()
        return exact * (relative / exact.square().sum().clamp(min=SMALLEST)).sqrt()


class Quantize(Pass):
    """Round the weights (RTN or GPTQ), with a low-rank branch where asked for, and fix the inputs' grids."""

    exact = False

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        needs = set()
        static = recipe.ipts is not None and recipe.ipts.mode == "static"
        if static or recipe.wgts.scales.weighted or recipe.wgts.bias_correction:
            needs.add(RANGE)
        if recipe.needs_histograms:
            needs.add(HISTOGRAM)
        if any(own.wgts.needs_hessian for own in recipe.variants()):
            needs.add(HESSIAN)
        self.needs = frozenset(needs)

    @torch.no_grad()
    def apply(self, work: Work) -> list[str]:
        """Quantize every planned layer and put its simulation into the model."""
        if work.walk is None:
            self._quantize(work, list(work.plans), work.statistics)
        else:
            for statistics in work.walk.steps(work.plans):
                self._quantize(work, list(statistics), statistics)
        work.codes = {name: work.codes[name] for name in work.plans}
        return list(work.plans)

    def _quantize(self, work: Work, names: list[str], statistics: dict[str, InputStatistics]) -> None:
        device = next(work.model.parameters()).device
        for group in together(stacked(work.plans[name] for name in names), self.recipe, device):
            stacks = [work.plans[name].members for name in group]
            moments = {name: self._moments(work, name, statistics.get(name)) for name in chain(*stacks)}
            layers = [self._to_round(work, stack, statistics.get(stack[0]), moments[stack[0]]) for stack in stacks]
            for stack, layer, rounded in zip(stacks, layers, round_layers(layers), strict=True):
                start = 0
                for name in stack:
                    rows = slice(start, start + work.plans[name].out_features)
                    own = replace(layer, weight=layer.weight[rows])
                    self._finish(work, name, own, rounded.of_rows(rows), statistics.get(name), moments[name])
                    start = rows.stop

    def _moments(self, work: Work, name: str, statistics: InputStatistics | None) -> Tensor | None:
        """Second moments of the inputs, those around the mean where the bias makes up for the mean's error.

        They are taken out of the statistics, for they are the largest thing in memory.
        """
        if statistics is None or statistics.hessian is None:
            return None
        moments = statistics.covariance() if self._corrects(work, name, statistics) else statistics.hessian
        statistics.hessian = None
        return moments

    def _corrects(self, work: Work, name: str, statistics: InputStatistics | None) -> bool:
        has_bias = linear_at(work.model, name).bias is not None
        return self.recipe.wgts.bias_correction and has_bias and statistics is not None and statistics.rows > 0

    def _to_round(
        self, work: Work, names: tuple[str, ...], statistics: InputStatistics | None, moments: Tensor | None
    ) -> ToRound:
        """Layers that share a down-projection, stacked; or one. Statistics and moments are the first one's."""
        own = self.recipe.of_layer(names[0])
        hessian = moments if own.wgts.needs_hessian else None
        if own.wgts.kernel_gptq is not None and (hessian is None or not hessian.any()):
            for name in names:
                work.note(name).remark("no calibration input reached this layer: rounded to nearest")
            hessian = None
        importance = None
        if own.wgts.scales.weighted and statistics is not None and statistics.rows:
            importance = statistics.sample.square().mean(0) if hessian is None else hessian.diagonal()
            importance = importance if importance.any() else None
        weight = torch.cat([linear_at(work.model, name).weight.detach().float() for name in names])
        return ToRound(weight, own, work.plans[names[0]], hessian, importance)

    def _finish(
        self,
        work: Work,
        name: str,
        layer: ToRound,
        rounded: Rounded,
        statistics: InputStatistics | None,
        moments: Tensor | None,
    ) -> None:
        """Put the layer's simulation into the model, and note what it cost."""
        bias, notes = work.bias(name), work.note(name)
        codes = LayerCodes(rounded.weight, input_grid(self.recipe.ipts, layer.weight, statistics), rounded.branch, bias)
        lost = layer.weight - codes.effective_weight()
        total = 0.0 if moments is None else output_error(layer.weight, moments)
        if bias is not None and statistics is not None and self._corrects(work, name, statistics):
            mean = statistics.mean()
            codes = replace(codes, bias=(bias.double() + lost.double() @ mean).float())
            total += statistics.rows * float((layer.weight.double() @ mean).square().sum())
        if moments is not None:
            notes.output_error = output_error(lost, moments) / total if total > 0 else 0.0
        notes.damping = rounded.damping
        asked = layer.own.wgts.kernel_gptq
        if asked is not None and rounded.damping is not None and rounded.damping > asked.damp_percentage:
            notes.remark(
                f"the Hessian did not factorize: damping raised from {asked.damp_percentage:g} to {rounded.damping:g}"
            )
        first, *_ = work.plans[name].members
        shares = rounded.branch is not None and name != first
        if shares:
            notes.remark(f"low-rank branch with the down-projection of {first}")
        multiplier, rotated = work.multipliers.get(name), name in work.rotated
        work.put(name, replace(codes, multiplier=multiplier, down_of=first if shares else None, rotated=rotated))


class ModelOpt(Pass):
    """Let NVIDIA ModelOpt quantize, and take its codes and scales over (`samq.quant.modelopt_quantizer`)."""

    needs = frozenset({IMAGES})
    exact = False

    def __init__(self, recipe: Recipe) -> None:
        config_for(recipe)  # which complains before images are read

    @torch.no_grad()
    def apply(self, work: Work) -> list[str]:
        """Fold the multipliers that something absorbs, and put the simulation of every planned layer into the model."""
        with_decoder = any(plan.part == MASK_DECODER for plan in work.plans.values())
        decided = decide(work.model, work.recipe, work.plans, work.images, with_decoder)
        rows = {name: torch.ones_like(one.scale[:, :1]) for name, one in decided.items()}
        absorbed = self._fold(work, decided, rows)
        for name, one in decided.items():
            notes = work.note(name)
            weight = one.weight(work.plans[name], work.recipe, rows[name])
            multiplier = None if name in absorbed else one.multiplier
            notes.remark(f"quantized by {work.recipe.modelopt} of ModelOpt {version()}")
            if multiplier is not None:
                notes.remark("inputs multiplied by ModelOpt's pre_quant_scale, which nothing before this layer absorbs")
            work.put(name, LayerCodes(weight, one.inputs, None, work.bias(name), multiplier))
        return list(work.plans)

    @staticmethod
    def _fold(work: Work, decided: dict[str, Decided], rows: dict[str, Tensor]) -> set[str]:
        """Fold each site's one multiplier; rows of quantized sources are noted in `rows`, for their codes stay.

        Returns:
            the layers whose multipliers are folded.
        """
        absorbed: set[str] = set()
        for site in work.sites():
            readers = work.readers(site)
            multiplier = shared_multiplier(decided[name] for name in readers)
            if multiplier is None:
                continue
            factors = 1 / multiplier
            fold_scale(work.model, site, factors)
            work.folds.scales[site.source] = factors
            if site.source in rows:
                rows[site.source][slice(*site.rows)] *= factors[:, None]
            for name in readers:
                work.note(name).remark(f"ModelOpt's pre_quant_scale folded into {site.source}")
            absorbed.update(readers)
        return absorbed


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
    mixes them. The other way round one outlier would be in all channels of a head, where no scale reaches it. A
    residual stream is rotated first of all, as that takes the gains of its LayerNorms away, and scales with them. At
    run time inputs are rotated last of all, when it is known what was folded.
    """
    if recipe.quantizer == "modelopt":
        return [ModelOpt(recipe), RoundRest()]
    passes: list[Pass] = []
    if recipe.rotation.residual:
        passes.append(RotateStreams())
    if recipe.shift.enabled:
        passes.append(Shift())
    if recipe.smooth.enabled:
        passes.append(Smooth(recipe.smooth.alpha, multiply=recipe.smooth.multiply))
    if recipe.rotation.enabled:
        passes.append(RotateValues())
    if recipe.rotation.online:
        passes.append(RotateInputs())
    if any(own.auto_rank for own in recipe.variants()):
        passes.append(ChooseRanks(recipe))
    return [*passes, Quantize(recipe), RoundRest()]
