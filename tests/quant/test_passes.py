"""The passes one by one: what they note, and what Hessians and statistics do to them."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from small_model import outputs, pixels, recipe_of, relative
from torch import Tensor, nn
from transformers import Sam2Model

from samq.calib.statistics import InputStatistics
from samq.quant.config import Recipe, preset_names
from samq.quant.gptq import output_error
from samq.quant.grids import round_to_grid
from samq.quant.layers import QuantizedLinear
from samq.quant.passes import (
    HESSIAN,
    RANGE,
    ChooseRanks,
    Quantize,
    RotateInputs,
    RotateStreams,
    RotateValues,
    RoundRest,
    Shift,
    Smooth,
    Work,
    passes_for,
)
from samq.quant.plan import grid_of, make_plan
from samq.quant.quantize import quantize
from samq.quant.rotate import runtime_rotation
from samq.quant.scales import choose_scales
from samq.quant.sites import fold_sites, linear_at, obstacles
from samq.quant.smooth_search import best_alpha

LAYER = "vision_encoder.backbone.blocks.0.attn.qkv"  # [96, 32]
NO_SMOOTHING = {"enabled": False}


def statistics_of(rows: Tensor, with_hessian: bool = True) -> InputStatistics:
    entry = InputStatistics.empty(rows.shape[-1], with_hessian, rows.device)
    if len(rows):
        entry.add(rows)
    return entry


def inputs(rows: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 4, generator=generator) @ torch.randn(4, 32, generator=generator)


def work_on_one_layer(model: Sam2Model, recipe: Recipe, statistics: InputStatistics | None) -> Work:
    plans = {plan.name: plan for plan in make_plan(model, recipe) if plan.name == LAYER}
    gathered = {} if statistics is None else {LAYER: statistics}
    return Work(copy.deepcopy(model), recipe, plans, gathered)


def quantized(model: Sam2Model, recipe: Recipe, statistics: InputStatistics | None) -> Work:
    work = work_on_one_layer(model, recipe, statistics)
    assert Quantize(recipe).apply(work) == [LAYER]
    assert isinstance(work.model.get_submodule(LAYER), QuantizedLinear)
    return work


@pytest.mark.parametrize(
    ("preset", "kinds", "needs"),
    [
        ("int4_w4a8", [Shift, Smooth, Quantize, RoundRest], {RANGE, HESSIAN}),
        ("int4_svdquant", [Shift, Smooth, ChooseRanks, Quantize, RoundRest], {RANGE, HESSIAN}),
        ("int4_w4a8_rtn", [Quantize, RoundRest], {RANGE}),
        ("int4_w4only", [Shift, Smooth, Quantize, RoundRest], {RANGE, HESSIAN}),
        ("int4_w4only_rtn", [Quantize, RoundRest], set()),
        ("int4_w4only_sym", [Shift, Smooth, Quantize, RoundRest], {RANGE, HESSIAN}),
        ("int8_w8a8", [Shift, Smooth, Quantize, RoundRest], {RANGE}),
    ],
)
def test_passes_of_presets(preset: str, kinds: list[type], needs: set[str]) -> None:
    passes = passes_for(recipe_of(preset))
    assert [type(step) for step in passes] == kinds
    assert frozenset().union(*(step.needs for step in passes)) == needs
    assert [step.exact for step in passes] == [kind in (Shift, Smooth, ChooseRanks) for kind in kinds]


@pytest.mark.parametrize("preset", preset_names())
def test_what_the_recipe_says_it_needs_is_what_the_passes_need(preset: str) -> None:
    recipe = recipe_of(preset)
    assert recipe.needs_calibration == any(step.needs for step in passes_for(recipe))


def test_channels_are_shifted_then_smoothed_then_rotated() -> None:
    kinds = [type(step) for step in passes_for(recipe_of(rotation={"enabled": True}))]
    assert kinds == [Shift, Smooth, RotateValues, Quantize, RoundRest]
    everything = {"enabled": True, "residual": True, "online": True}
    kinds = [type(step) for step in passes_for(recipe_of(rotation=everything))]
    assert kinds == [RotateStreams, Shift, Smooth, RotateValues, RotateInputs, Quantize, RoundRest]


def test_gptq_notes_its_damping_and_error(small_model: Sam2Model) -> None:
    recipe = recipe_of("int4_w4only", wgts={"group_shapes": [[1, 16]], "bias_correction": False})
    entry = statistics_of(inputs(200) + 0.1 * torch.randn(200, 32, generator=torch.Generator().manual_seed(1)))
    assert entry.hessian is not None
    hessian = entry.hessian.clone()
    work = quantized(small_model, recipe, entry)
    notes = work.notes[LAYER]
    assert notes.damping == 0.01
    assert notes.remarks == []
    weight = small_model.get_submodule(LAYER).weight.detach()
    left = output_error(weight - work.codes[LAYER].effective_weight(), hessian)
    assert notes.output_error == pytest.approx(left / output_error(weight, hessian), rel=1e-4)
    scales = choose_scales(weight, grid_of(recipe), 16, hessian.diagonal(), recipe.wgts.scales.norm)
    assert left < output_error(weight - round_to_grid(weight, scales, grid_of(recipe)).dequantize(), hessian)
    assert entry.hessian is None, "the Hessians of done layers are freed"


def test_inputs_are_clipped_where_the_weights_do_not_read_them(small_model: Sam2Model) -> None:
    """The grid has the least error behind the weights, not in the inputs themselves."""
    rows = torch.randn(400, 32, generator=torch.Generator().manual_seed(0))
    rows[:, 5] *= 4
    recipe = recipe_of("int8_w8a8", smooth=NO_SMOOTHING)
    model = copy.deepcopy(small_model)
    scales = []
    for factor in (1.0, 0.0):
        with torch.no_grad():
            model.get_submodule(LAYER).weight[:, 5] *= factor
        grid = quantized(model, recipe, statistics_of(rows)).codes[LAYER].inputs
        assert grid is not None
        scales.append(grid.scale)
    assert scales[1] < 0.7 * scales[0]


@pytest.mark.parametrize("low_rank", [None, {"rank": 4, "compensate": True, "max_overhead": None}])
def test_raised_damping_is_remarked_once(small_model: Sam2Model, low_rank: dict[str, object] | None) -> None:
    gptq = {"block_size": 128, "damp_percentage": 1e-12}
    recipe = recipe_of("int4_w4only", wgts={"kernel_gptq": gptq, "low_rank": low_rank})
    notes = quantized(small_model, recipe, statistics_of(inputs(200))).notes[LAYER]  # of rank 4
    assert notes.damping is not None
    assert notes.damping > 1e-12
    assert notes.remarks == [f"the Hessian did not factorize: damping raised from 1e-12 to {notes.damping:g}"]


@pytest.mark.parametrize("rows", [inputs(0), torch.zeros(8, 32)], ids=["none", "zeros"])
@pytest.mark.parametrize("low_rank", [None, {"rank": 4, "compensate": True, "max_overhead": None}])
def test_without_inputs_weights_are_rounded_to_nearest(
    small_model: Sam2Model, rows: Tensor, low_rank: dict[str, object] | None
) -> None:
    recipe = recipe_of(smooth=NO_SMOOTHING, wgts={"low_rank": low_rank})
    work = quantized(small_model, recipe, statistics_of(rows))
    assert work.notes[LAYER].remarks == ["no calibration input reached this layer: rounded to nearest"]
    assert work.notes[LAYER].damping is None
    codes = work.codes[LAYER]
    weight = small_model.get_submodule(LAYER).weight.detach()
    residual = weight if codes.branch is None else weight - codes.branch.product()
    scales = choose_scales(residual, grid_of(recipe), 32, norm=recipe.wgts.scales.norm)
    nearest = round_to_grid(residual, scales, grid_of(recipe))
    assert torch.equal(codes.weight.codes, nearest.codes)
    assert codes.inputs is not None
    assert codes.inputs.scale is not None


def mean_output(weight: Tensor, bias: Tensor | None, rows: Tensor) -> Tensor:
    """[N] in float64."""
    assert bias is not None
    return (rows.double() @ weight.double().T + bias.double()).mean(0)


@pytest.mark.parametrize("gptq", [None, {"block_size": 128, "damp_percentage": 0.01}])
@pytest.mark.parametrize("low_rank", [None, {"rank": 4, "max_overhead": None}])
def test_bias_correction_keeps_the_mean_output(
    small_model: Sam2Model, gptq: dict[str, object] | None, low_rank: dict[str, object] | None
) -> None:
    rows = 3 + inputs(200)
    layer = small_model.get_submodule(LAYER)
    exact, off, errors = mean_output(layer.weight.detach(), layer.bias.detach(), rows), [], []
    for corrected in (False, True):
        wgts = {"kernel_gptq": gptq, "low_rank": low_rank, "bias_correction": corrected}
        work = quantized(small_model, recipe_of("int4_w4only", wgts=wgts), statistics_of(rows))
        codes = work.codes[LAYER]
        off.append(float((mean_output(codes.effective_weight(), codes.bias, rows) - exact).norm()))
        answers = [
            rows.double() @ w.double().T + b.double() for w, b in ((layer.weight.detach(), layer.bias.detach()),)
        ]
        answers.append(rows.double() @ codes.effective_weight().double().T + codes.bias.double())
        total = (answers[0] - layer.bias.detach()).square().sum()
        errors.append(float((answers[1] - answers[0]).square().sum() / total))
        assert work.notes[LAYER].output_error == pytest.approx(errors[-1], rel=1e-2, abs=1e-9)
    assert off[1] < 1e-5 * float(exact.norm())
    assert off[1] < 0.01 * off[0]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("low_rank", [None, {"rank": 4, "max_overhead": None}])
def test_bias_correction_is_the_equation(small_model: Sam2Model, low_rank: dict[str, object] | None) -> None:
    """b + (W − Ŵ) E[x] in float64 (Nagel et al., arXiv 1906.04721, section 4.2)."""
    rows, layer = 3 + inputs(200), linear_at(small_model, LAYER)
    wgts = {"low_rank": low_rank, "bias_correction": True}
    codes = quantized(small_model, recipe_of("int4_w4only", wgts=wgts), statistics_of(rows)).codes[LAYER]
    weight, bias, x = (tensor.detach().double().numpy() for tensor in (layer.weight, layer.bias, rows))
    rounded = codes.weight.dequantize().double().numpy()
    if codes.branch is not None:
        rounded = rounded + codes.branch.up.double().numpy() @ codes.branch.down.double().numpy()
    assert codes.bias is not None
    np.testing.assert_allclose(codes.bias.numpy(), bias + (weight - rounded) @ x.mean(0), rtol=1e-5, atol=1e-6)


def test_nothing_is_corrected_without_inputs_or_a_bias(small_model: Sam2Model) -> None:
    recipe = recipe_of(wgts={"bias_correction": True})
    found = quantized(small_model, recipe, statistics_of(inputs(0))).codes[LAYER].bias
    assert torch.equal(found, small_model.get_submodule(LAYER).bias)
    model = copy.deepcopy(small_model)
    model.get_submodule(LAYER).bias = None
    work = quantized(model, recipe, statistics_of(3 + inputs(200)))
    assert work.codes[LAYER].bias is None
    assert work.notes[LAYER].output_error is not None


def test_scales_are_chosen_as_asked(small_model: Sam2Model) -> None:
    rows = inputs(200) * torch.logspace(-1, 1, 32)
    weight, group = small_model.get_submodule(LAYER).weight.detach(), {"group_shapes": [[1, 16]], "kernel_gptq": None}
    importance = rows.square().mean(0)
    for scales, norm, of_inputs in (
        ({"method": "max", "weighted": False}, None, None),
        ({"method": "mse", "weighted": False}, 2.0, None),
        ({"method": "p_norm", "p": 3.5, "weighted": False}, 3.5, None),
        ({"method": "mse", "weighted": True}, 2.0, importance),
    ):
        recipe = recipe_of("int4_w4only", wgts=group | {"scales": scales})
        found = quantized(small_model, recipe, statistics_of(rows, with_hessian=False)).codes[LAYER].weight.scales
        expected = choose_scales(weight, grid_of(recipe), 16, of_inputs, norm)
        torch.testing.assert_close(found.scale, expected.scale)


@pytest.mark.parametrize("compensate", [True, False])
def test_the_branch_lowers_the_output_error(small_model: Sam2Model, compensate: bool) -> None:
    errors = []
    rows = inputs(200) + 0.3 * torch.randn(200, 32, generator=torch.Generator().manual_seed(1))
    for low_rank in (None, {"rank": 8, "compensate": compensate, "max_overhead": None}):
        recipe = recipe_of("int4_w4only", wgts={"low_rank": low_rank})
        work = quantized(small_model, recipe, statistics_of(rows))
        errors.append(work.notes[LAYER].output_error)
        assert (work.codes[LAYER].branch is None) == (low_rank is None)
    assert errors[1] < errors[0]


def test_compensation_needs_a_hessian_even_with_rounding_to_nearest() -> None:
    low_rank = {"rank": 8, "compensate": True, "max_overhead": None}
    recipe = recipe_of("int4_w4only_rtn", wgts={"low_rank": low_rank})
    assert Quantize(recipe).needs == {HESSIAN}


def test_a_branch_weighted_by_the_inputs_leaves_less_of_the_output(small_model: Sam2Model) -> None:
    rows = inputs(200) + 0.3 * torch.randn(200, 32, generator=torch.Generator().manual_seed(1))
    errors = {}
    for weighting in ("none", "diagonal", "full"):
        low_rank = {"rank": 8, "weighting": weighting, "max_overhead": None}
        recipe = recipe_of("int4_w4only_rtn", wgts={"low_rank": low_rank})
        assert Quantize(recipe).needs == (frozenset() if weighting == "none" else {HESSIAN})
        work = quantized(small_model, recipe, statistics_of(rows))
        weight = small_model.get_submodule(LAYER).weight.detach()
        hessian = statistics_of(rows).hessian
        assert hessian is not None
        errors[weighting] = output_error(weight - work.codes[LAYER].effective_weight(), hessian)
    assert errors["full"] < errors["diagonal"] < errors["none"]


@pytest.mark.parametrize("rows", [inputs(0), torch.zeros(8, 32)], ids=["none", "zeros"])
@pytest.mark.parametrize("weighting", ["diagonal", "full"])
def test_without_inputs_a_branch_has_no_weights(small_model: Sam2Model, rows: Tensor, weighting: str) -> None:
    branches = []
    for asked in (weighting, "none"):
        low_rank = {"rank": 8, "weighting": asked, "max_overhead": None}
        recipe = recipe_of("int4_w4only_rtn", wgts={"low_rank": low_rank})
        branches.append(quantized(small_model, recipe, statistics_of(rows)).codes[LAYER].branch)
    assert branches[0] is not None
    assert branches[1] is not None
    assert torch.equal(branches[0].product(), branches[1].product())


AUTO_RANK = {"rank": "auto", "max_overhead": 0.1}


@pytest.mark.parametrize("weighting", ["none", "full"])
def test_ranks_share_one_budget(small_model: Sam2Model, weighting: str) -> None:
    recipe = recipe_of("int4_svdquant", wgts={"low_rank": AUTO_RANK | {"weighting": weighting}})
    work = work_on_all_layers(small_model, recipe)
    planned = sum(plan.planned_bytes for plan in work.plans.values())
    names = list(work.plans)
    assert ChooseRanks(recipe).apply(work) == names
    ranks = {name: plan.rank for name, plan in work.plans.items()}
    spent = sum(2 * rank * (work.plans[n].in_features + work.plans[n].out_features) for n, rank in ranks.items())
    budget = 0.1 * sum(plan.fp16_bytes for plan in work.plans.values())
    assert 0.9 * budget < spent <= budget
    assert {rank % 8 for rank in ranks.values()} == {0}
    assert len(set(ranks.values())) > 1
    assert sum(plan.planned_bytes for plan in work.plans.values()) <= planned
    again = work_on_all_layers(small_model, recipe)
    ChooseRanks(recipe).apply(again)
    assert again.plans == work.plans


def test_the_layer_that_gains_most_gets_the_rank(small_model: Sam2Model) -> None:
    """Of layers alike, that whose weight is of low rank."""
    recipe = recipe_of("int4_w4only_rtn", wgts={"low_rank": AUTO_RANK})
    work = work_on_all_layers(small_model, recipe)
    first, second = (f"vision_encoder.backbone.blocks.{block}.mlp.proj_in" for block in (3, 2))
    work.plans = {name: work.plans[name] for name in (first, second)}
    weight = linear_at(work.model, second).weight
    with torch.no_grad():
        weight.copy_(0.1 * weight + 5 * torch.outer(weight[:, 0], weight[0]))
    ChooseRanks(recipe).apply(work)
    assert work.plans[first].rank == 0
    assert work.plans[second].rank > 0
    assert work.plans[second].ranking == f"rank {work.plans[second].rank} of the budget for all layers " + (
        "(wgts.low_rank.rank: auto)"
    )


def test_ranks_without_moments_do_not_depend_on_whether_there_are_any(small_model: Sam2Model) -> None:
    """A Hessian that is gathered for the report only must not change the weights."""
    recipe = recipe_of("int4_w4only_rtn", wgts={"low_rank": AUTO_RANK})
    with_moments, without = work_on_all_layers(small_model, recipe), work_on_all_layers(small_model, recipe)
    without.statistics = {}
    for work in (with_moments, without):
        ChooseRanks(recipe).apply(work)
    assert with_moments.plans == without.plans


def test_layers_with_a_rank_of_their_own_keep_it(small_model: Sam2Model) -> None:
    name = "vision_encoder.backbone.blocks.3.mlp.proj_in"
    own = {"low_rank": {"rank": 3, "max_overhead": None}}
    recipe = recipe_of("int4_w4only_rtn", wgts={"low_rank": AUTO_RANK}, layers={name: own})
    work = work_on_all_layers(small_model, recipe)
    assert name not in ChooseRanks(recipe).apply(work)
    assert work.plans[name].rank == 3


def test_ranks_share_flops(small_model: Sam2Model) -> None:
    """The budget is kept, and ranks move from layers that see many tokens to those that see few."""
    share, tokens, per_token = 0.05, {}, []
    for budget in ("bytes", "flops"):
        low_rank = {"rank": "auto", "max_overhead": share, "budget": budget}
        work = work_on_all_layers(small_model, recipe_of("int4_svdquant", wgts={"low_rank": low_rank}))
        for name, entry in work.statistics.items():
            entry.rows = 160 if ".blocks.0." in name or ".blocks.1." in name else 10
        tokens = {name: entry.rows for name, entry in work.statistics.items()}
        ChooseRanks(work.recipe).apply(work)
        spent = {n: plan.rank * (plan.in_features + plan.out_features) for n, plan in work.plans.items()}
        per_token.append(sum(spent[name] * tokens[name] for name in spent) / sum(spent.values()))
    whole = sum(plan.in_features * plan.out_features * tokens[name] for name, plan in work.plans.items())
    assert 0.8 * share * whole < sum(spent[name] * tokens[name] for name in spent) <= share * whole
    assert per_token[1] < 0.95 * per_token[0]


def test_ranks_are_chosen_after_all_folds_and_streams_rotated_before() -> None:
    recipe = recipe_of("int4_svdquant", wgts={"low_rank": AUTO_RANK}, rotation={"enabled": True, "residual": True})
    kinds = [type(step) for step in passes_for(recipe)]
    assert kinds == [RotateStreams, Shift, Smooth, RotateValues, ChooseRanks, Quantize, RoundRest]


@pytest.mark.parametrize("granularity", ["per_tensor", "per_token"])
def test_dynamic_inputs_need_no_statistics(small_model: Sam2Model, granularity: str) -> None:
    recipe = recipe_of("int4_w4a8_rtn", ipts={"mode": "dynamic", "granularity": granularity})
    assert Quantize(recipe).needs == frozenset()
    grid = quantized(small_model, recipe, None).codes[LAYER].inputs
    assert grid is not None
    assert (grid.granularity, grid.scale, grid.zero_point) == (granularity, None, 0)


@pytest.mark.parametrize("dtype", ["sint8", "uint8"])
def test_static_inputs_cover_the_range(small_model: Sam2Model, dtype: str) -> None:
    recipe = recipe_of("int4_w4a8_rtn", ipts={"dtype": dtype})
    rows = inputs(500).abs()
    grid = quantized(small_model, recipe, statistics_of(rows, with_hessian=False)).codes[LAYER].inputs
    assert grid is not None
    assert grid.scale is not None
    error = (grid.fake_quantize(rows) - rows).square().mean().sqrt() / rows.square().mean().sqrt()
    assert float(error) < (0.015 if dtype == "sint8" else 0.0075)
    levels = 127 if dtype == "sint8" else 255
    assert 0.3 * float(rows.max()) < levels * grid.scale <= 1.01 * float(rows.max())


def work_on_all_layers(model: Sam2Model, recipe: Recipe | None = None, rows: int = 16) -> Work:
    """With inputs that are far from zero."""
    recipe = recipe_of() if recipe is None else recipe
    plans = {plan.name: plan for plan in make_plan(model, recipe) if plan.skip is None}
    generator = torch.Generator().manual_seed(0)
    statistics = {
        name: statistics_of(5 + torch.randn(rows, plan.in_features, generator=generator))
        for name, plan in plans.items()
    }
    return Work(copy.deepcopy(model), recipe, plans, statistics)


def test_shifted_channels_lie_around_zero(small_model: Sam2Model) -> None:
    work = work_on_all_layers(small_model)
    sites = [site for site in fold_sites(small_model) if site.takes_offset]
    of_one_reader = {site.layers[0] for site in sites if len(site.layers) == 1}
    touched = Shift().apply(work)
    assert set(touched) == {layer for site in sites for layer in site.layers}
    assert work.folds.offsets.keys() == {site.source for site in sites}
    for name, entry in work.statistics.items():
        if name in of_one_reader:
            torch.testing.assert_close(entry.low, -entry.high)
        assert (float(entry.absmax().max()) < 5) == (name in touched)
        assert bool(work.notes.get(name)) == (name in touched)


def test_a_layer_that_saw_no_input_is_not_shifted(small_model: Sam2Model) -> None:
    work = work_on_all_layers(small_model, rows=0)
    assert Shift().apply(work) == []
    assert not work.folds.offsets


def test_the_values_are_smoothed_before_the_norms(small_model: Sam2Model) -> None:
    """A value row with an outlier has the largest weight of all columns of qkv; it must not decide their factors."""
    factors = []
    for outlier in (1.0, 1000.0):
        work = work_on_all_layers(small_model)
        qkv, proj = (linear_at(work.model, f"vision_encoder.backbone.blocks.0.attn.{name}") for name in ("qkv", "proj"))
        with torch.no_grad():  # a value 1000 times as large, read by weights 1000 times as small
            qkv.weight[-1] *= outlier
            qkv.bias[-1] *= outlier
            proj.weight[:, -1] /= outlier
        work.statistics["vision_encoder.backbone.blocks.0.attn.proj"].rescale(
            torch.ones(32).index_fill(0, torch.tensor([31]), outlier)
        )
        Smooth(0.5).apply(work)
        factors.append(work.folds.scales["vision_encoder.backbone.blocks.0.layer_norm1"])
    torch.testing.assert_close(factors[1], factors[0])


@pytest.mark.parametrize("gathered", [True, False])
def test_rotation_takes_the_statistics_with_it(small_model: Sam2Model, gathered: bool) -> None:
    work = work_on_all_layers(small_model)
    before = copy.deepcopy(work.statistics)
    if not gathered:
        work.statistics = {}
    touched = RotateValues().apply(work)
    assert work.folds.rotated == [site.source for site in fold_sites(small_model) if site.heads is not None]
    for name, entry in work.statistics.items():
        old = before[name]
        assert entry.hessian is not None
        assert old.hessian is not None
        assert torch.equal(entry.hessian, old.hessian) == (name not in touched)
        if name in touched:  # what the layer puts out over its inputs stays
            weights = [linear_at(model, name).weight.detach() for model in (small_model, work.model)]
            torch.testing.assert_close(entry.sample @ weights[1].T, old.sample @ weights[0].T, rtol=1e-3, atol=1e-3)
            outs = [
                output_error(w, e.hessian) for w, e in zip(weights, (old, entry), strict=True) if e.hessian is not None
            ]
            assert outs[1] == pytest.approx(outs[0], rel=1e-4)


@pytest.mark.parametrize("residual", [False, True])
def test_what_nothing_absorbs_is_rotated_at_run_time(small_model: Sam2Model, residual: bool) -> None:
    """The float model stays what it was; layers whose inputs a folded rotation has are left alone."""
    blocks = "vision_encoder.backbone.blocks"
    work = work_on_all_layers(small_model, recipe_of("int8_w8a8"))
    folded = set(RotateValues().apply(work))
    if residual:
        RotateStreams().apply(work)
        folded |= {f"{blocks}.{name}" for name in ("0.attn.qkv", "0.mlp.proj_in", "1.attn.qkv", "1.proj")}
    touched = set(RotateInputs().apply(work))
    assert touched == work.rotated == set(work.plans) - folded
    assert {f"{blocks}.0.mlp.proj_out", f"{blocks}.4.proj", f"{blocks}.4.attn.qkv"} < touched
    for found, expected in zip(outputs(work.model), outputs(small_model), strict=True):
        assert relative(found - expected, expected) < 1e-4
    remark = "inputs rotated at run time by a product in front of the layer"
    assert {name for name, notes in work.notes.items() if remark in notes.remarks} == touched


@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize("inputs", [{}, {"granularity": "per_token", "mode": "dynamic"}], ids=["static", "per token"])
def test_channels_behind_relu_that_calibration_never_used_do_no_harm(
    small_model: Sam2Model, online: bool, inputs: dict[str, Any]
) -> None:
    """One image leaves dead channels behind ReLU, which the next one uses."""
    recipe = recipe_of("int8_w8a8", rotation={"enabled": online, "online": online}, ipts=inputs)
    result = quantize(small_model, recipe, [pixels(1, seed=1)])
    masks, exact = outputs(result.model)[3], outputs(small_model)[3]
    assert relative(masks - exact, exact) < 0.2
    assert result.codes["mask_decoder.transformer.layers.0.mlp.proj_out"].rotated == online


def test_inputs_are_multiplied_then_rotated(small_model: Sam2Model) -> None:
    work = work_on_all_layers(small_model, recipe_of("int8_w8a8"))
    layer = "vision_encoder.backbone.blocks.0.mlp.proj_out"
    rows, old = work.statistics[layer].sample, linear_at(small_model, layer)
    Smooth(0.5, multiply=True).apply(work)
    RotateInputs().apply(work)
    entry, new = work.statistics[layer], linear_at(work.model, layer).weight.detach()
    rotation = runtime_rotation(new.shape[1])
    torch.testing.assert_close(new @ rotation * work.multipliers[layer], old.weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(entry.sample, (rows * work.multipliers[layer]) @ rotation.T, rtol=1e-3, atol=1e-3)
    Quantize(work.recipe).apply(work)
    codes, module = work.codes[layer], work.model.get_submodule(layer)
    assert codes.rotated
    assert codes.multiplier is not None
    assert relative(codes.effective_weight() - old.weight, old.weight) < 0.02  # 8 bits
    assert relative(module(rows) - old(rows), old(rows)) < 0.05  # one scale for all inputs


def test_second_moments_are_rotated(small_model: Sam2Model) -> None:
    """R H Rᵀ from the definition, and with it the output error of the turned weight."""
    work = work_on_all_layers(small_model)
    layer = "vision_encoder.backbone.blocks.0.mlp.proj_out"
    before = copy.deepcopy(work.statistics[layer])
    RotateInputs().apply(work)
    entry, weights = work.statistics[layer], [linear_at(m, layer).weight.detach() for m in (small_model, work.model)]
    assert before.hessian is not None
    assert entry.hessian is not None
    rotation = runtime_rotation(before.hessian.shape[0]).double()
    expected = rotation @ before.hessian.double() @ rotation.T
    assert relative(entry.hessian - expected, expected) < 1e-6
    errors = [output_error(w, h) for w, h in zip(weights, (before.hessian, entry.hessian), strict=True)]
    assert errors[1] == pytest.approx(errors[0], rel=1e-4)


def test_smoothing_says_which_layers_it_left_and_why(small_model: Sam2Model) -> None:
    work = work_on_all_layers(small_model)
    plans, statistics = work.plans, work.statistics
    before = {name: entry.absmax().clone() for name, entry in statistics.items()}
    touched = Smooth(0.5).apply(work)
    assert touched
    assert set(touched) < set(plans)
    assert work.notes.keys() == plans.keys()
    for name in plans:
        (remark,) = work.notes[name].remarks
        if name in touched:
            assert remark.startswith("inputs smoothed (alpha 0.5), folded into")
        else:
            assert remark == f"inputs not smoothed: {obstacles(small_model)[name]}"
    # y = (x / s)(s W)ᵀ: what the weights gained, the statistics of the inputs lost
    layer = "vision_encoder.backbone.blocks.0.mlp.proj_in"
    old, new = (model.get_submodule(layer).weight.detach() for model in (small_model, work.model))
    factors = (new / old).mean(0)
    torch.testing.assert_close(statistics[layer].absmax(), before[layer] / factors)


def test_what_nothing_absorbs_is_multiplied_on_request(small_model: Sam2Model) -> None:
    """The float model stays what it was, and so does the layer that carries the product."""
    work = work_on_all_layers(small_model, recipe_of("int8_w8a8"))
    folded = set(Smooth(0.5).apply(copy.deepcopy(work)))
    assert set(Smooth(0.5, multiply=True).apply(work)) == set(work.plans)
    assert set(work.multipliers) == set(work.plans) - folded != set()
    for found, expected in zip(outputs(work.model), outputs(small_model), strict=True):
        assert relative(found - expected, expected) < 1e-5
    layer = "vision_encoder.backbone.blocks.0.mlp.proj_out"
    rows = work.statistics[layer].sample
    old, new = (linear_at(model, layer).weight.detach() for model in (small_model, work.model))
    torch.testing.assert_close(new * work.multipliers[layer], old)
    Quantize(work.recipe).apply(work)
    codes, module = work.codes[layer], work.model.get_submodule(layer)
    assert codes.multiplier is not None
    assert torch.equal(codes.multiplier, work.multipliers[layer])
    assert relative(codes.effective_weight() - old, old) < 0.01  # 8 bits
    given = rows / codes.multiplier
    assert relative(module(given) - linear_at(small_model, layer)(given), linear_at(small_model, layer)(given)) < 0.02


def test_products_in_front_of_a_layer_add_up(small_model: Sam2Model) -> None:
    once, twice = (work_on_all_layers(small_model) for _ in range(2))
    layer = "vision_encoder.backbone.blocks.0.mlp.proj_out"
    for work, alphas in ((once, [0.5]), (twice, [0.9, 0.5])):
        for alpha in alphas:
            Smooth(alpha, multiply=True).apply(work)
    torch.testing.assert_close(twice.multipliers[layer], once.multipliers[layer])


@pytest.mark.parametrize("preset", ["int4_w4a8", "int4_w4only", "int8_w8a8"])
def test_the_search_finds_an_alpha_for_each_site(small_model: Sam2Model, preset: str) -> None:
    work = work_on_all_layers(small_model, recipe_of(preset))
    layer = "vision_encoder.backbone.blocks.0.attn.proj"  # of the first site that is smoothed
    best = best_alpha(
        [linear_at(small_model, layer)], [work.plans[layer].group_size], [work.statistics[layer]], [work.recipe]
    )
    fixed, searched = work, copy.deepcopy(work)
    Smooth(best).apply(fixed)
    touched = Smooth("auto").apply(searched)
    assert torch.equal(linear_at(searched.model, layer).weight, linear_at(fixed.model, layer).weight)
    assert searched.notes[layer] == fixed.notes[layer]
    alphas = {remark.partition(",")[0] for name in touched for remark in searched.notes[name].remarks}
    assert len(alphas) > 1


def test_the_search_leaves_layers_without_inputs_half_way(small_model: Sam2Model) -> None:
    works = [work_on_all_layers(small_model, rows=0) for _ in range(2)]
    Smooth("auto").apply(works[0])
    Smooth(0.5).apply(works[1])
    assert works[0].notes == works[1].notes


def test_a_site_with_a_float_layer_is_left_alone(small_model: Sam2Model) -> None:
    recipe = recipe_of()
    work = work_on_one_layer(small_model, recipe, statistics_of(inputs(8)))
    assert Smooth(0.5).apply(work) == [LAYER]
    assert RotateValues().apply(work) == []  # the output projection is not among the plans


def test_the_rest_is_rounded_to_fp16_but_vectors_are_not(small_model: Sam2Model) -> None:
    work = work_on_one_layer(small_model, recipe_of("int4_w4only_rtn"), None)
    Quantize(work.recipe).apply(work)
    codes = copy.deepcopy(work.codes[LAYER])
    touched = set(RoundRest().apply(work))
    before = dict(small_model.named_parameters())
    for name, parameter in work.model.named_parameters():
        assert (name in touched) == (parameter.ndim >= 2)
        expected = before[name].half().float() if parameter.ndim >= 2 else before[name]
        assert torch.equal(parameter, expected)
    layer = work.model.get_submodule(LAYER)
    assert isinstance(layer, QuantizedLinear)
    assert torch.equal(layer.weight, codes.weight.dequantize())
    assert isinstance(layer.bias, nn.Parameter)
