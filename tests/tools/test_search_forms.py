"""Forms of layers as rules of a recipe."""

from __future__ import annotations

import pytest
from small_model import recipe_of as small_recipe
from transformers import Sam2Model

from samq.errors import UsageError
from samq.quant.config import Recipe, load_recipe, preset_names
from samq.quant.plan import describe_request, make_plan
from samq.tools.search_forms import CANDIDATES, FLOAT, check_candidates, recipe_of, rule_of, uniform


@pytest.mark.parametrize("preset", preset_names())
@pytest.mark.parametrize("candidate", [name for name in CANDIDATES if name != FLOAT])
def test_every_preset_takes_every_form(preset: str, candidate: str) -> None:
    base = load_recipe(preset)
    recipe = uniform(base, candidate)
    assert (recipe.wgts.bits, recipe.ipts) == (8 if candidate == "int8" else 4, base.ipts)
    assert (recipe.wgts.low_rank is not None) == candidate.endswith("rank8")
    assert recipe.wgts.kernel_gptq == base.wgts.kernel_gptq


def test_four_bits_are_those_of_the_config() -> None:
    base = load_recipe("int4_svdquant")
    without_branch = base.wgts.model_copy(update={"low_rank": None})
    assert uniform(base, "int4") == base.model_copy(update={"wgts": without_branch})
    assert rule_of("int4", load_recipe("int8_w8a8"))["group_shapes"] == [[1, 128]]


def test_a_recipe_gives_each_layer_its_form(small_model: Sam2Model) -> None:
    base = small_recipe()
    layers = [plan.name for plan in make_plan(small_model, base) if plan.skip is None]
    forms = dict(zip(layers, (["int4"] * 3 + list(CANDIDATES)) * len(layers), strict=False))
    recipe = recipe_of(base, forms)
    assert Recipe.model_validate(recipe.model_dump()) == recipe
    assert "int4" not in {form for layer, form in forms.items() if layer in recipe.layers}
    plans = {plan.name: plan for plan in make_plan(small_model, recipe)}
    alone = {
        form: {plan.name: plan for plan in make_plan(small_model, uniform(base, form))}
        for form in CANDIDATES
        if form != FLOAT
    }
    for layer, form in forms.items():
        if form == FLOAT:
            assert plans[layer].planned_bytes == plans[layer].fp16_bytes
        else:
            assert plans[layer] == alone[form][layer]
            assert describe_request(recipe.of_layer(layer)) == ("W8A8" if form == "int8" else "W4A8")


@pytest.mark.parametrize(
    ("candidates", "message"),
    [
        (["int4", "int5"], "'int5' is no candidate; choose from float, int8, int4 and int4-rank8"),
        (["int4", "int4-rank0"], "'int4-rank0' is no candidate"),
        (["int4"], "two --candidates or more"),
        (["float", "float"], "two --candidates or more"),
        ([], "two --candidates or more"),
    ],
)
def test_candidates_that_leave_nothing_to_choose(candidates: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_candidates(candidates, load_recipe("int4_w4a8"))


def test_a_config_of_modelopt_is_not_searched() -> None:
    wgts = {"dtype": "sint8", "group_shapes": [[1, -1]]}
    base = Recipe.model_validate({"quantizer": "modelopt", "modelopt": "INT8_WEIGHT_ONLY_CFG", "wgts": wgts})
    with pytest.raises(UsageError, match="a search tries samq's own forms, which quantizer: modelopt has not"):
        check_candidates(CANDIDATES, base)


def test_a_config_with_rules_is_not_searched() -> None:
    with pytest.raises(UsageError, match="has `layers` already"):
        check_candidates(CANDIDATES, small_recipe(layers={"*": {"dtype": "float"}}))
