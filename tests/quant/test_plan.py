"""The plan: reasons for skipping, groups, ranks and bytes."""

from __future__ import annotations

import pytest
import torch
from small_model import recipe_of
from torch import nn
from transformers import Sam2Model

from samq.calib.parts import PARTS, part_of
from samq.quant.config import Recipe, load_recipe, preset_names
from samq.quant.grids import Grid, round_to_grid
from samq.quant.layers import LayerCodes
from samq.quant.low_rank import truncated_svd
from samq.quant.plan import RANK_IS_OPEN, LayerPlan, describe_request, grid_of, group_for, make_plan, with_rank
from samq.quant.scales import choose_scales

BLOCK = "vision_encoder.backbone.blocks"


def by_name(model: Sam2Model, recipe: Recipe, **options: object) -> dict[str, LayerPlan]:
    return {plan.name: plan for plan in make_plan(model, recipe, **options)}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("inputs", "weight_only", "size", "told"),
    [
        (48, False, 48, "one group: K = 48"),
        (96, False, 96, "one group: K = 96"),
        (112, False, 112, "one group: K = 112"),
        (128, False, 128, "one group: K = 128"),
        (144, False, 48, "48 is the largest multiple of 16 up to 128 that does"),
        (224, False, 112, "112 is the largest"),
        (256, False, 128, ""),
        (448, False, 112, "112 is the largest"),
        (576, False, 96, "96 is the largest"),
        (1152, False, 128, ""),
        (136, False, 136, "one group: no multiple of 16 up to 128 divides 136"),
        (48, True, 48, "one group: K = 48"),
        (96, True, 96, "one group: K = 96"),
        (112, True, 112, "one group: K = 112"),
        (144, True, 128, "2 groups of 128, the last one of 16"),
        (224, True, 128, "2 groups of 128, the last one of 96"),
        (448, True, 128, "4 groups of 128, the last one of 64"),
        (576, True, 128, "5 groups of 128, the last one of 64"),
        (1152, True, 128, ""),
    ],
)
def test_groups_of_128(inputs: int, weight_only: bool, size: int, told: str) -> None:
    found, how = group_for(inputs, 128, weight_only)
    assert found == size
    assert told in how if told else how == ""
    assert weight_only or inputs % found == 0


@pytest.mark.parametrize("weight_only", [True, False])
@pytest.mark.parametrize("inputs", [48, 144, 1152])
def test_a_group_per_row_is_what_was_asked_for(inputs: int, weight_only: bool) -> None:
    assert group_for(inputs, -1, weight_only) == (inputs, "")


@pytest.mark.parametrize(
    ("wgts", "skipped", "kept"),
    [
        ({"skip_decoder": True}, "mask_decoder.transformer.layers.0.self_attn.q_proj", f"{BLOCK}.0.attn.qkv"),
        ({"skip_first_block": True}, f"{BLOCK}.0.attn.qkv", f"{BLOCK}.4.attn.qkv"),
        ({"skip_last_block": True}, f"{BLOCK}.4.attn.qkv", f"{BLOCK}.3.attn.qkv"),
    ],
)
def test_flags_skip(small_model: Sam2Model, wgts: dict[str, bool], skipped: str, kept: str) -> None:
    (flag,) = wgts
    plans = by_name(small_model, recipe_of(wgts=wgts))
    assert plans[skipped].skip == f"wgts.{flag}"
    assert plans[skipped].planned_bytes == plans[skipped].fp16_bytes
    assert plans[kept].skip is None
    others = by_name(small_model, recipe_of())
    assert others[skipped].skip is None
    changed = {name for name in plans if plans[name].skip != others[name].skip}
    prefix = skipped.split(".attn")[0] if BLOCK in skipped else "mask_decoder."
    linear = {name for name, module in small_model.named_modules() if isinstance(module, nn.Linear)}
    assert changed == {name for name in linear if name.startswith(prefix)}


@pytest.mark.parametrize("part", PARTS)
def test_parts_that_are_not_asked_for_are_skipped(small_model: Sam2Model, part: str) -> None:
    plans = by_name(small_model, recipe_of(), parts=[part])
    quantized = {name for name, plan in plans.items() if plan.skip is None}
    assert quantized
    assert {plans[name].part for name in quantized} == {part}
    other = next(plan for plan in plans.values() if plan.part != part and "convolution" not in str(plan.skip))
    assert other.skip in (f"{other.part} is not among --parts", "patch embedding: only linear layers are quantized")


def test_every_layer_with_a_gemm_is_planned(small_model: Sam2Model) -> None:
    plans = by_name(small_model, recipe_of())
    kinds = nn.Linear | nn.Conv2d | nn.ConvTranspose2d
    assert list(plans) == [name for name, module in small_model.named_modules() if isinstance(module, kinds)]
    for name, plan in plans.items():
        assert plan.part == part_of(name)
        weight = small_model.get_submodule(name).weight
        assert plan.fp16_bytes == 2 * weight.numel()  # type: ignore[operator, union-attr]


def test_convolutions_and_narrow_layers_stay_float(small_model: Sam2Model) -> None:
    plans = by_name(small_model, recipe_of())
    patches = plans["vision_encoder.backbone.patch_embed.projection"]
    assert patches.skip == "patch embedding: only linear layers are quantized"
    assert plans["mask_decoder.conv_s0"].skip == "convolution: only linear layers are quantized"
    assert plans["mask_decoder.upscale_conv1"].skip == "convolution: only linear layers are quantized"
    assert plans["mask_decoder.iou_prediction_head.proj_out"].skip == "narrower than 16"
    assert plans["mask_decoder.pred_obj_score_head.proj_out"].skip == "narrower than 16"
    narrow = [p for p in plans.values() if p.skip == "narrower than 16"]
    assert all(min(p.in_features, p.out_features) < 16 for p in narrow)


@pytest.mark.parametrize(
    ("low_rank", "rank", "told"),
    [
        ({"rank": 8, "max_overhead": None}, 8, ""),
        ({"rank": 500, "max_overhead": None}, 32, "rank 500 asked for; the layer's smaller side allows 32"),
        ({"rank": 500, "max_overhead": 1.0}, 24, "rank 500 asked for; wgts.low_rank.max_overhead allows 24"),
        ({"rank": 32, "max_overhead": 0.1}, 2, "rank 32 asked for; wgts.low_rank.max_overhead allows 2"),
        ({"rank": 32, "max_overhead": 0.001}, 0, "rank 32 asked for; wgts.low_rank.max_overhead allows 0"),
    ],
)
def test_ranks(small_model: Sam2Model, low_rank: dict[str, object], rank: int, told: str) -> None:
    plan = by_name(small_model, recipe_of(wgts={"low_rank": low_rank}))[f"{BLOCK}.0.attn.qkv"]  # [96, 32]
    assert (plan.rank, plan.ranking) == (rank, told)


def test_an_open_rank_counts_with_its_share_of_the_budget(small_model: Sam2Model) -> None:
    low_rank = {"rank": "auto", "max_overhead": 0.1}
    opened = by_name(small_model, recipe_of(wgts={"low_rank": low_rank}))[f"{BLOCK}.0.attn.qkv"]
    without = by_name(small_model, recipe_of())[f"{BLOCK}.0.attn.qkv"]
    assert (opened.rank, opened.ranking) == (0, RANK_IS_OPEN)
    assert opened.planned_bytes == without.planned_bytes + int(0.1 * opened.fp16_bytes)
    chosen = with_rank(opened, 8, recipe_of(wgts={"low_rank": low_rank}))
    assert chosen.planned_bytes == without.planned_bytes + 2 * 8 * (32 + 96)


@pytest.mark.parametrize("preset", preset_names())
def test_the_branch_keeps_its_overhead(small_model: Sam2Model, preset: str) -> None:
    recipe = load_recipe(preset)
    for plan in make_plan(small_model, recipe):
        if recipe.wgts.low_rank is None or plan.skip is not None:
            assert plan.rank == 0
        else:
            assert 2 * plan.rank * (plan.in_features + plan.out_features) <= 0.027 * plan.fp16_bytes


@pytest.mark.parametrize("preset", preset_names())
@pytest.mark.parametrize("dtype", [None, "uint4"])
@pytest.mark.parametrize("group", [None, 16, 64, -1])
def test_planned_bytes_are_those_of_the_codes(
    small_model: Sam2Model, preset: str, dtype: str | None, group: int | None
) -> None:
    changes = {} if dtype is None else {"dtype": dtype}
    if group is not None:
        changes["group_shapes"] = [[1, group]]
    if preset == "int8_w8a8" and changes:
        pytest.skip("INT8 weights with INT8 activations have one format")
    recipe = recipe_of(preset, wgts={**changes, "low_rank": {"rank": 8, "max_overhead": 0.2}})
    grid = grid_of(recipe)

    def shape_of(plan: LayerPlan) -> tuple[int, ...]:
        return (plan.out_features, plan.in_features, plan.group_size, plan.rank)

    checked: dict[tuple[int, ...], int] = {}
    for plan in make_plan(small_model, recipe):
        if plan.skip is not None:
            continue
        if shape_of(plan) not in checked:
            weight = torch.ones(plan.out_features, plan.in_features)
            quantized = round_to_grid(weight, choose_scales(weight, grid, plan.group_size), grid)
            branch = truncated_svd(weight, plan.rank) if plan.rank else None
            checked[shape_of(plan)] = LayerCodes(quantized, None, branch, None).stored_bytes()
        assert plan.planned_bytes == checked[shape_of(plan)]
    assert len(checked) > 10


def test_grid_and_request() -> None:
    assert grid_of(recipe_of()) == Grid(4, True, True)
    assert grid_of(recipe_of("int4_w4only")) == Grid(4, False, False)
    assert grid_of(recipe_of("int8_w8a8")) == Grid(8, True, False)
    assert describe_request(recipe_of()) == "W4A8"
    assert describe_request(recipe_of("int4_w4only")) == "W4A16"
    assert describe_request(recipe_of("int8_w8a8")) == "W8A8"
