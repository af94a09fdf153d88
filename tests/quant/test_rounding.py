"""Layers that are rounded together: each comes out as it does alone, whatever happens beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_model import recipe_of
from torch import Tensor

from samq.quant.config import Recipe
from samq.quant.gptq import output_error
from samq.quant.plan import LayerPlan
from samq.quant.rounding import Rounded, ToRound, round_layers

ROWS, INPUTS, RANK = 24, 48, 4
LOW_RANK: dict[str, Any] = {"rank": RANK, "max_overhead": None}
FORMS: dict[str, dict[str, Any]] = {
    "no branch": {},
    "plain branch": {"low_rank": LOW_RANK | {"weighting": "none"}},
    "refitted branch": {"low_rank": LOW_RANK | {"weighting": "full"}},
    "compensated branch": {"low_rank": LOW_RANK | {"weighting": "full", "compensate": True}},
    "compensated branch, rounded to nearest": {
        "low_rank": LOW_RANK | {"weighting": "diagonal", "compensate": True},
        "kernel_gptq": None,
    },
}


def layer_of(seed: int, own: Recipe, hessian: Tensor | None = None) -> ToRound:
    """A layer with a large channel whose inputs go together; without a branch where none is asked for."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(ROWS, INPUTS, generator=generator)
    weight[:, seed] *= 10
    x = torch.randn(200, 4, generator=generator) @ torch.randn(4, INPUTS, generator=generator)
    x += torch.randn(200, INPUTS, generator=generator) * (1 + seed)
    rank = 0 if own.wgts.low_rank is None else RANK
    plan = LayerPlan(str(seed), "image_encoder", INPUTS, ROWS, group_size=16, rank=rank)
    return ToRound(weight, own, plan, x.T @ x if hessian is None else hessian, None)


def assert_alike(found: Rounded, expected: Rounded) -> None:
    assert torch.equal(found.weight.codes, expected.weight.codes)
    assert found.damping == expected.damping
    if expected.branch is None:
        assert found.branch is None
        return
    assert found.branch is not None
    assert torch.equal(found.branch.down, expected.branch.down)
    assert torch.equal(found.branch.up, expected.branch.up)


@pytest.mark.parametrize("form", FORMS)
def test_layers_come_out_together_as_they_do_alone(form: str) -> None:
    own = recipe_of("int4_w4a8", wgts=FORMS[form])
    layers = [layer_of(seed, own) for seed in range(5)]
    together = round_layers(layers)
    for found, layer in zip(together, layers, strict=True):
        (expected,) = round_layers([layer])
        assert_alike(found, expected)
    assert (together[0].damping is None) == (own.wgts.kernel_gptq is None)
    assert (together[0].branch is None) == (own.wgts.low_rank is None)


def test_compensation_goes_on_for_as_many_rounds_as_asked() -> None:
    """One round is none: the branch is refitted once. Further ones never end with a larger error, here with less."""
    forms = [{"compensate": False}, *({"compensate": True, "max_rounds": rounds} for rounds in (1, 2, 20))]
    owns = [recipe_of("int4_w4a8", wgts={"low_rank": LOW_RANK | {"weighting": "full"} | form}) for form in forms]
    errors = []
    for seed in range(3):
        layers = [layer_of(seed, own) for own in owns]
        without, *found = [round_layers([layer])[0] for layer in layers]
        assert_alike(found[0], without)
        left = [layers[0].weight - each.weight.dequantize() - each.branch.product() for each in found if each.branch]
        assert layers[0].hessian is not None
        errors.append([output_error(difference, layers[0].hessian) for difference in left])
    assert all(one >= two >= many for one, two, many in errors)
    assert sum(one > two > many for one, two, many in errors) > 0


@pytest.mark.parametrize("form", FORMS)
def test_a_layer_without_inputs_stands_beside_others(form: str) -> None:
    """Nothing is known of its inputs, so that it gets a plain branch and is rounded to nearest."""
    own = recipe_of("int4_w4a8", wgts=FORMS[form])
    layers = [layer_of(seed, own) for seed in range(3)]
    layers[1] = ToRound(layers[1].weight, own, layers[1].plan, None, None)
    together = round_layers(layers)
    plain = recipe_of("int4_w4a8", wgts=FORMS["no branch" if form == "no branch" else "plain branch"])
    assert together[1].damping is None
    for index in (0, 2):
        (expected,) = round_layers([layers[index]])
        assert_alike(together[index], expected)
    (expected,) = round_layers([ToRound(layers[1].weight, plain, layers[1].plan, None, None)])
    assert_alike(together[1], expected)
