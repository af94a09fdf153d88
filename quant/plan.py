"""What each linear layer will become, decided from shapes and the recipe alone, before any data is seen."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from torch import nn

from samq.calib.parts import PARTS, part_of
from samq.errors import UsageError
from samq.quant.config import AUTO, Recipe
from samq.quant.grids import Grid, groups_of
from samq.quant.sites import linear_at, same_inputs

SMALLEST_WIDTH = 16  # narrower GEMMs gain nothing from INT8 or INT4 in any engine
GROUP_MULTIPLE = 16
FP16_BYTES = 2
RANK_IS_OPEN = "rank chosen when quantizing (wgts.low_rank.max_overhead)"

_BLOCK = re.compile(r"vision_encoder\.backbone\.blocks\.(\d+)\.")


@dataclass(frozen=True)
class LayerPlan:
    """The decision for one layer with weights.

    Args:
        name: module name in the `Sam2Model`.
        part: "image_encoder" or "mask_decoder".
        in_features, out_features: K and N.
        skip: why the layer keeps its float weights, or None when it is quantized.
        group_size: inputs that share a scale.
        grouping: how the group size came about where it is not simply what was asked for, else "".
        rank: rank of the low-rank branch, 0 for none.
        ranking: why the rank is not what was asked for, else "".
        sharing: names of the layers that share one down-projection, this one among them, else (). It is stored with
            the first of them.
        fp16_bytes: bytes of the weight in FP16.
        planned_bytes: bytes of the weight, scales and branch as planned; with an open rank, its share of the budget.
    """

    name: str
    part: str
    in_features: int
    out_features: int
    skip: str | None = None
    group_size: int = 0
    grouping: str = ""
    rank: int = 0
    ranking: str = ""
    sharing: tuple[str, ...] = ()
    fp16_bytes: int = 0
    planned_bytes: int = 0

    @property
    def members(self) -> tuple[str, ...]:
        """The layers that make up one matrix for the low-rank branch: those sharing, or this one alone."""
        return self.sharing or (self.name,)


def grid_of(recipe: Recipe) -> Grid:
    """The weight grid that a recipe asks for."""
    return Grid(recipe.wgts.bits, recipe.wgts.signed, recipe.two_level)


def describe_request(recipe: Recipe) -> str:
    """What a quantized layer with this recipe (`Recipe.of_layer`) is asked to compute, e.g. "W4A8" or "W4A16"."""
    return f"W{recipe.wgts.bits}A{16 if recipe.weight_only else 8}"


def block_of(layer: str) -> int | None:
    """Index of the encoder's block that a layer is in, None for layers elsewhere."""
    match = _BLOCK.match(layer)
    return None if match is None else int(match[1])


def make_plan(model: nn.Module, recipe: Recipe, parts: Collection[str] = PARTS) -> list[LayerPlan]:
    """Plan every linear layer and every convolution of a `Sam2Model`, in the model's order.

    Raises:
        UsageError: a pattern of `layers` decides about no layer.
    """
    last_block = max((block_of(name) or 0 for name, _ in model.named_modules()), default=0)
    skipped = {
        name: _reason_to_skip(name, module, recipe, parts, last_block)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    _require_use_of_patterns(skipped, recipe)
    together = {name: group for group in _sharing(model, recipe, skipped) for name in group}
    plans = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            sharing = together.get(name, ())
            rows = sum(linear_at(model, member).out_features for member in sharing or (name,))
            plans.append(_plan_linear(name, module, recipe, skipped[name], sharing, rows))
        elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            plans.append(_plan_convolution(name, module))
    return plans


def _sharing(model: nn.Module, recipe: Recipe, skipped: Mapping[str, str | None]) -> Iterator[tuple[str, ...]]:
    """Names of quantized layers with one down-projection: those that read the same tokens and have one form."""
    for readers in same_inputs(model):
        own = {name: recipe.of_layer(name) for name in readers if skipped[name] is None}
        for first, form in own.items():
            alike = tuple(name for name, other in own.items() if other == form)
            asked = form.wgts.low_rank is not None and form.wgts.low_rank.shared_down
            if asked and len(alike) > 1 and alike[0] == first:
                yield alike


def _require_use_of_patterns(skipped: Mapping[str, str | None], recipe: Recipe) -> None:
    """Insist that each pattern of `layers` decides about a layer.

    Args:
        skipped: name of every linear layer → why it stays float, or None.

    Raises:
        UsageError: one does not; the message names what decides instead, or the nearest layer.
    """
    layers = list(skipped)
    for pattern in recipe.layers:
        reasons = [reason or "" for layer, reason in skipped.items() if recipe.pattern_for(layer) == pattern]
        if reasons and all(reason.startswith("wgts.") for reason in reasons):
            raise UsageError(
                f"layers.{pattern}: {reasons[0]} keeps all its layers float; set that to false, or remove the pattern"
            )
        if reasons:
            continue
        matched = [layer for layer in layers if fnmatchcase(layer, pattern)]
        if matched:
            raise UsageError(
                f"layers.{pattern}: patterns before it decide about all its layers; put it before "
                f"{recipe.pattern_for(matched[0])}, or remove it"
            )
        near = difflib.get_close_matches(pattern.replace("*", ""), layers, n=1, cutoff=0.0)
        raise UsageError(
            f"layers.{pattern}: no linear layer has such a name; the nearest is {near[0] if near else 'none'} "
            "(* stands for any text, and --dry-run lists the names)"
        )


def require_layers(plans: Sequence[LayerPlan]) -> None:
    """Insist that something is left to quantize.

    Raises:
        UsageError: nothing is; the message names the most frequent reason.
    """
    if any(plan.skip is None for plan in plans):
        return
    keys = Counter(plan.skip for plan in plans if plan.skip and plan.skip.startswith("wgts."))
    advice = f"; set {keys.most_common(1)[0][0]}: false" if keys else ""
    raise UsageError(f"the config and --parts leave no layer to quantize{advice}")


def group_for(inputs: int, asked: int, weight_only: bool) -> tuple[int, str]:
    """Group size for K inputs, and how it came about ("" when it is what was asked for).

    Weights-only engines unpack blocks of one size and take a short last block (filled up with zeros when lowered), so
    the size stays. INT8 engines see one folded INT8 weight, so any divisor does: the largest multiple of 16 is taken,
    and one group a row where there is none.
    """
    if asked == -1 or asked >= inputs:
        return inputs, "" if asked == -1 else f"one group: K = {inputs} is not larger than {asked}"
    if inputs % asked == 0:
        return asked, ""
    if weight_only:
        last = inputs % asked
        return (
            asked,
            f"{groups_of(inputs, asked)} groups of {asked}, the last one of {last}: {asked} does not divide {inputs}",
        )
    for size in range(asked - asked % GROUP_MULTIPLE, 0, -GROUP_MULTIPLE):
        if inputs % size == 0:
            return (
                size,
                f"{asked} does not divide {inputs}; {size} is the largest multiple of 16 up to {asked} that does",
            )
    return inputs, f"one group: no multiple of 16 up to {asked} divides {inputs}"


def _reason_to_skip(
    name: str, module: nn.Linear, recipe: Recipe, parts: Collection[str], last_block: int
) -> str | None:
    part, wgts = part_of(name), recipe.wgts
    block = block_of(name)
    if part not in parts:
        return f"{part} is not among --parts"
    if wgts.skip_decoder and part == "mask_decoder":
        return "wgts.skip_decoder"
    if wgts.skip_first_block and block == 0:
        return "wgts.skip_first_block"
    if wgts.skip_last_block and block == last_block:
        return "wgts.skip_last_block"
    if min(module.in_features, module.out_features) < SMALLEST_WIDTH:
        return f"narrower than {SMALLEST_WIDTH}"
    return f"layers.{recipe.pattern_for(name)}" if recipe.stays_float(name) else None


def _plan_linear(
    name: str, module: nn.Linear, recipe: Recipe, skip: str | None, sharing: tuple[str, ...], rows: int
) -> LayerPlan:
    """The plan of one layer; `rows` are the outputs of all that share its down-projection."""
    inputs, outputs = module.in_features, module.out_features
    fp16_bytes = FP16_BYTES * inputs * outputs
    if skip is not None:
        return LayerPlan(name, part_of(name), inputs, outputs, skip, fp16_bytes=fp16_bytes, planned_bytes=fp16_bytes)
    own = recipe.of_layer(name)
    group_size, grouping = group_for(inputs, own.wgts.group_size, own.weight_only)
    rank, ranking = _rank_for(inputs, rows, own)
    plan = LayerPlan(
        name, part_of(name), inputs, outputs, None, group_size, grouping, rank, ranking, sharing, fp16_bytes
    )
    return replace(plan, planned_bytes=stored_bytes(plan, rank, grid_of(own)) + branch_allowance(fp16_bytes, own))


def stored_bytes(plan: LayerPlan, rank: int, grid: Grid) -> int:
    """Bytes of codes, scales, zero-points and FP16 branch of a layer; a shared down-projection is the first one's."""
    inputs, outputs, group_size = plan.in_features, plan.out_features, plan.group_size
    groups = groups_of(inputs, group_size)
    code_bits = outputs * inputs * grid.bits
    zero_point_bits = 0 if grid.signed else outputs * groups * grid.bits
    scale_bytes = outputs * groups + FP16_BYTES * outputs if grid.two_level else FP16_BYTES * outputs * groups
    channels = outputs + (inputs if plan.name == plan.members[0] else 0)
    return -(-(code_bits + zero_point_bits) // 8) + scale_bytes + FP16_BYTES * rank * channels


def stacked(plans: Iterable[LayerPlan]) -> list[LayerPlan]:
    """The plans with layers that share a down-projection as one: the first's, which has the outputs of all."""
    by_name = {plan.name: plan for plan in plans}
    return [
        replace(plan, out_features=sum(by_name[member].out_features for member in plan.members))
        for plan in by_name.values()
        if plan.name == plan.members[0]
    ]


def _rank_for(inputs: int, outputs: int, recipe: Recipe) -> tuple[int, str]:
    low_rank = recipe.wgts.low_rank
    if low_rank is None:
        return 0, ""
    if low_rank.rank == AUTO:
        return 0, RANK_IS_OPEN
    largest, limit = min(inputs, outputs), "the layer's smaller side"
    if low_rank.max_overhead is not None:
        capped = int(low_rank.max_overhead * inputs * outputs / (inputs + outputs))
        if capped < largest:
            largest, limit = capped, "wgts.low_rank.max_overhead"
    if low_rank.rank <= largest:
        return low_rank.rank, ""
    return largest, f"rank {low_rank.rank} asked for; {limit} allows {largest}"


def branch_allowance(fp16_bytes: int, own: Recipe) -> int:
    """Bytes that a layer with an open rank puts into the budget of all branches, 0 with a given rank.

    Args:
        fp16_bytes: of its weight.
        own: the layer's own recipe.
    """
    low_rank = own.wgts.low_rank
    if low_rank is None or low_rank.rank != AUTO or low_rank.max_overhead is None:
        return 0
    return int(low_rank.max_overhead * fp16_bytes)


def with_rank(plan: LayerPlan, rank: int, recipe: Recipe) -> LayerPlan:
    """The plan of a layer whose rank was open, with the rank that it got."""
    planned = stored_bytes(plan, rank, grid_of(recipe.of_layer(plan.name)))
    told = f"rank {rank} of the budget for all layers (wgts.low_rank.rank: auto)"
    return replace(plan, rank=rank, ranking=told, planned_bytes=planned)


def _plan_convolution(name: str, module: nn.Conv2d | nn.ConvTranspose2d) -> LayerPlan:
    fp16_bytes = FP16_BYTES * module.weight.numel()
    reason = "patch embedding" if name.endswith("patch_embed.projection") else "convolution"
    return LayerPlan(
        name,
        part_of(name),
        module.in_channels,
        module.out_channels,
        f"{reason}: only linear layers are quantized",
        fp16_bytes=fp16_bytes,
        planned_bytes=fp16_bytes,
    )
