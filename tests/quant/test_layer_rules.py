"""The section `layers`: which rule decides, what it changes in plan and weights, and how wrong ones are told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_model import outputs, pixels, recipe_of, relative
from torch import nn
from transformers import Sam2Model

from samq.errors import UsageError
from samq.quant.config import GptqConfig, Recipe, load_recipe
from samq.quant.layers import QuantizedLinear
from samq.quant.passes import HESSIAN, passes_for
from samq.quant.plan import LayerPlan, describe_request, make_plan
from samq.quant.quantize import Quantized, quantize
from samq.quant.storage import load_quantized, save_quantized

INT8 = {"dtype": "sint8", "group_shapes": [[1, -1]]}
FIRST = "vision_encoder.backbone.blocks.0"
LAYERS = {
    f"{FIRST}.attn.*": {"dtype": "float"},
    f"{FIRST}.*": INT8,
    "*.mlp.proj_out": {"kernel_gptq": None, "low_rank": {"rank": 4, "max_overhead": None}},
}


def mixed(preset: str = "int4_w4a8", layers: dict[str, Any] | None = None) -> Recipe:
    return recipe_of(preset, layers=LAYERS if layers is None else layers)


def plans_of(model: nn.Module, recipe: Recipe) -> dict[str, LayerPlan]:
    return {plan.name: plan for plan in make_plan(model, recipe)}


def error_of(tmp_path: Path, layers: str, rest: str = "ipts: {}") -> str:
    path = tmp_path / "my.yaml"
    path.write_text(f"wgts: {{dtype: sint4}}\n{rest}\nlayers:\n{layers}\n")
    with pytest.raises(UsageError) as caught:
        load_recipe(str(path))
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value).removeprefix(f"{path}, ")


def test_the_first_pattern_that_matches_decides() -> None:
    recipe = mixed()
    assert recipe.stays_float(f"{FIRST}.attn.qkv")
    assert not recipe.stays_float(f"{FIRST}.mlp.proj_out")
    assert describe_request(recipe.of_layer(f"{FIRST}.mlp.proj_out")) == "W8A8"  # not the rule of all proj_out
    later = recipe.of_layer("vision_encoder.backbone.blocks.1.mlp.proj_out").wgts
    assert (later.bits, later.kernel_gptq) == (4, None)
    assert later.low_rank is not None
    assert later.low_rank.rank == 4
    other = recipe.of_layer("vision_encoder.backbone.blocks.1.mlp.proj_in")
    assert other == recipe_of("int4_w4a8")
    assert [describe_request(own) for own in recipe.variants()] == ["W4A8", "W8A8", "W4A8"]


def test_yaml_keeps_what_was_given_and_what_was_not(tmp_path: Path) -> None:
    recipe = mixed()
    (tmp_path / "my.yaml").write_text(recipe.to_yaml())
    again = load_recipe(str(tmp_path / "my.yaml"))
    assert again == recipe
    assert again.to_yaml() == recipe.to_yaml()
    rule = again.model_dump()["layers"]["*.mlp.proj_out"]
    assert rule.keys() == {"kernel_gptq", "low_rank"}
    assert again.of_layer("a.mlp.proj_out").wgts.kernel_gptq is None
    assert again.of_layer("a.mlp.proj_in").wgts.kernel_gptq == GptqConfig()


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ('  "*": {dtype: int8}', "line 4: layers.*.dtype: 'int8' is not one of float, uint4, sint4, uint8, sint8"),
        ('  "*": {dtpe: sint8}', "line 4: layers.*.dtpe is not a known key; did you mean layers.*.dtype?"),
        ('  "*": {low_rank: {rnk: 4}}', "line 4: layers.*.low_rank.rnk is not a known key; did you mean layers.*.low"),
        ('  "*": {low_rank: {rank: 0}}', "line 4: layers.*.low_rank.rank must be at least 1, not 0 (a branch"),
        ('  "*": float', "line 4: layers.*: 'float' is not a mapping; its keys are dtype, group_shapes, kernel_gptq"),
        ('  "*": {}', "line 4: layers.*: says nothing; give one of dtype, group_shapes, kernel_gptq, low_rank"),
        ('  "*": {dtype: null}', "line 4: layers.*.dtype: null is none; leave the key out"),
        ('  "*":\n    low_rank: {}\n    dtype: float', "line 6: layers.*.dtype: a layer that stays float has no other"),
        ("  a.b.*:\n    dtype: sint8", "line 4: layers.a.b.*: sint8 weights with ipts need [[1, -1]], not [[1, 128]]"),
        ("  a.b.*:\n    dtype: uint8", "line 5: layers.a.b.*.dtype: uint8 does not go with ipts"),
        ("  a:\n    group_shapes: [[1, 7]]", "line 5: layers.a.group_shapes: n of [1, n] is -1 (per channel) or a p"),
        ("  a: {dtype: sint8}\n  a: {dtype: float}", "line 5: layers.a is given twice, first on line 4"),
    ],
)
def test_wrong_rules_are_told_with_line_key_and_fix(layers: str, message: str, tmp_path: Path) -> None:
    assert message in error_of(tmp_path, layers)


def test_rules_are_held_to_what_engines_run_without_quantized_inputs(tmp_path: Path) -> None:
    told = error_of(tmp_path, "  a:\n    dtype: uint4\n    group_shapes: [[1, 48]]", "ipts: null")
    assert told.startswith("line 6: layers.a.group_shapes: 4-bit weights without ipts take groups of -1, 16, 32")


@pytest.mark.parametrize(
    ("layers", "told"),
    [
        ({"*.mlp.proj_ou": INT8}, "no linear layer has such a name; the nearest is "),
        (
            {"*.mlp.*": INT8, "*.mlp.proj_out": INT8},
            "patterns before it decide about all its layers; put it before *.mlp",
        ),
    ],
)
def test_a_pattern_that_decides_nothing_is_refused(small_model: Sam2Model, layers: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError) as caught:
        make_plan(small_model, mixed(layers=layers))
    assert str(caught.value).startswith(f"layers.{list(layers)[-1]}: ")
    assert told in str(caught.value)


def test_the_nearest_layer_is_named(small_model: Sam2Model) -> None:
    with pytest.raises(UsageError, match=rf"the nearest is {FIRST}\.attn\.qkv "):
        make_plan(small_model, mixed(layers={f"{FIRST}.atn.qkv": INT8}))


def test_a_pattern_for_layers_that_wgts_skips_is_refused(small_model: Sam2Model) -> None:
    recipe = recipe_of(wgts={"skip_decoder": True}, layers={"mask_decoder.*": INT8})
    with pytest.raises(UsageError, match=r"layers\.mask_decoder\.\*: wgts\.skip_decoder keeps all its layers float"):
        make_plan(small_model, recipe)


def test_the_plan_follows_the_rules(small_model: Sam2Model) -> None:
    plans, plain = plans_of(small_model, mixed()), plans_of(small_model, recipe_of())
    qkv, proj_in = plans[f"{FIRST}.attn.qkv"], plans[f"{FIRST}.mlp.proj_in"]
    assert qkv.skip == f"layers.{FIRST}.attn.*"
    assert qkv.planned_bytes == qkv.fp16_bytes
    assert (proj_in.skip, proj_in.group_size) == (None, proj_in.in_features)
    assert proj_in.planned_bytes == proj_in.in_features * proj_in.out_features + 2 * proj_in.out_features
    branched = [plan for name, plan in plans.items() if name.endswith(".mlp.proj_out") and FIRST not in name]
    assert branched
    assert {plan.rank for plan in branched} == {4}
    changed = {name for name in plans if plans[name] != plain[name]}
    linear = {name for name in plans if isinstance(small_model.get_submodule(name), nn.Linear)}
    assert changed == {name for name in linear if name.startswith(FIRST) or plans[name] in branched}


@pytest.mark.parametrize("gptq_elsewhere", [True, False])
def test_hessians_are_gathered_where_a_rule_asks_for_gptq(gptq_elsewhere: bool) -> None:
    rules = {"*.mlp.*": {"kernel_gptq": {}}} if gptq_elsewhere else {"*.mlp.*": INT8}
    recipe = recipe_of("int4_w4only_rtn", layers=rules)
    assert recipe.needs_calibration is gptq_elsewhere
    assert any(HESSIAN in step.needs for step in passes_for(recipe)) is gptq_elsewhere


@pytest.fixture(scope="module", params=["int4_w4a8", "int4_w4only"])
def result(request: pytest.FixtureRequest, small_model: Sam2Model) -> tuple[Recipe, Quantized]:
    recipe = mixed(request.param)
    return recipe, quantize(small_model, recipe, [pixels(1)])


def test_each_layer_gets_its_own_form(result: tuple[Recipe, Quantized]) -> None:
    recipe, made = result
    assert isinstance(made.model.get_submodule(f"{FIRST}.attn.qkv"), nn.Linear)
    assert f"{FIRST}.attn.qkv" not in made.codes
    for name, codes in made.codes.items():
        expected = 8 if name.startswith(FIRST) else 4
        branch = name.endswith(".mlp.proj_out") and expected == 4
        assert codes.weight.grid.bits == expected
        assert codes.weight.grid.two_level is (expected == 4 and not recipe.weight_only)
        assert (codes.branch is not None) == branch
        assert (codes.inputs is None) == recipe.weight_only
        assert (made.notes[name].damping is None) == branch  # the rule of proj_out rounds to nearest
        assert codes.stored_bytes() == next(plan for plan in made.plans if plan.name == name).planned_bytes


def test_a_layer_has_what_its_form_gives_in_a_recipe_of_that_form_alone(small_model: Sam2Model) -> None:
    """Round to nearest without folds: what other layers are does not matter."""
    recipe = recipe_of("int4_w4only_rtn", layers={"*.mlp.*": INT8})
    alone = recipe_of("int4_w4only_rtn", wgts=INT8)
    found, eight, four = (
        quantize(small_model, one, None).codes for one in (recipe, alone, recipe_of("int4_w4only_rtn"))
    )
    for name, codes in found.items():
        same = (eight if ".mlp." in name else four)[name]
        assert torch.equal(codes.weight.codes, same.weight.codes)
        assert torch.equal(codes.weight.dequantize(), same.weight.dequantize())


def test_more_bits_come_nearer_to_the_float_model(small_model: Sam2Model) -> None:
    exact = outputs(small_model)[0]

    def error_of_rules(layers: dict[str, Any]) -> float:
        made = quantize(small_model, recipe_of("int4_w4only_rtn", layers=layers), None)
        return relative(outputs(made.model)[0] - exact, exact)

    four, mixed_bits, eight = (error_of_rules(rules) for rules in ({}, {"*.mlp.*": INT8}, {"*": INT8}))
    assert eight < mixed_bits < four


def test_it_loads_back_bit_for_bit(result: tuple[Recipe, Quantized], tmp_path: Path) -> None:
    made = result[1]
    save_quantized(tmp_path, made.model, made.codes)
    model, codes = load_quantized(tmp_path)
    assert codes.keys() == made.codes.keys()
    assert not isinstance(model.get_submodule(f"{FIRST}.attn.qkv"), QuantizedLinear)
    for found, expected in zip(outputs(model), outputs(made.model), strict=True):
        assert torch.equal(found, expected)


def test_a_float_layer_takes_the_folds_of_the_quantized_one_beside_it(small_model: Sam2Model) -> None:
    """Otherwise a float layer would cost the other one its smoothing."""
    beside = "vision_encoder.backbone.blocks.1"  # whose proj and qkv read one LayerNorm
    recipe = recipe_of("int8_w8a8", layers={f"{beside}.proj": {"dtype": "float"}})
    made, plain = (quantize(small_model, one, [pixels(1)]) for one in (recipe, recipe_of("int8_w8a8")))
    source = f"{beside}.layer_norm1"
    assert f"{beside}.proj" not in made.codes
    assert made.folds.scales.keys() == plain.folds.scales.keys()
    assert made.folds.offsets.keys() == plain.folds.offsets.keys()
    moved = made.model.get_submodule(f"{beside}.proj").weight / small_model.get_submodule(f"{beside}.proj").weight
    torch.testing.assert_close(moved.median(0).values, made.folds.scales[source], rtol=1e-2, atol=0)
    assert any("inputs smoothed" in remark for remark in made.notes[f"{beside}.attn.qkv"].remarks)
    assert f"{beside}.proj" not in made.notes
