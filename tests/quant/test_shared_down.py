"""One down-projection for layers that read the same tokens: which, its rank and bytes, and the joint SVD behind it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from small_model import outputs, pixels, recipe_of
from torch import Tensor, nn
from transformers import Sam2Model

from samq.calib.parts import ImageEncoder
from samq.quant.config import Recipe
from samq.quant.low_rank import DAMPING
from samq.quant.passes import ChooseRanks, Work
from samq.quant.plan import make_plan
from samq.quant.quantize import Quantized, quantize
from samq.quant.sites import linear_at, same_inputs

BLOCK = "vision_encoder.backbone.blocks"
ATTENTION = "mask_decoder.transformer"
POOLING = [(f"{BLOCK}.{index}.attn.qkv", f"{BLOCK}.{index}.proj") for index in (1, 2, 4)]
DECODER = [
    tuple(f"{ATTENTION}.{layer}_proj" for layer in layers)
    for layers in (
        ("layers.0.self_attn.q", "layers.0.self_attn.k", "layers.0.self_attn.v"),
        ("layers.0.cross_attn_token_to_image.k", "layers.0.cross_attn_image_to_token.q"),
        ("layers.0.cross_attn_image_to_token.k", "layers.1.self_attn.q", "layers.1.self_attn.k"),
        ("layers.0.cross_attn_image_to_token.v", "layers.1.self_attn.v"),
        ("layers.1.cross_attn_token_to_image.k", "layers.1.cross_attn_image_to_token.q"),
        ("layers.1.cross_attn_image_to_token.k", "final_attn_token_to_image.q"),
    )
]
RANK_4 = {"rank": 4, "max_overhead": None}
AUTO = {"rank": "auto", "max_overhead": 0.1}


def sharing(preset: str, low_rank: dict[str, Any], *, shared: bool = True, **changes: Any) -> Recipe:
    """A preset with a branch, and one down-projection for layers that read the same tokens."""
    wgts = {"low_rank": low_rank | {"shared_down": shared}} | changes.pop("wgts", {})
    return recipe_of(preset, wgts=wgts, **changes)


def groups_of(model: Sam2Model, recipe: Recipe) -> set[tuple[str, ...]]:
    return {plan.sharing for plan in make_plan(model, recipe) if plan.sharing}


def inputs_of_layers(model: Sam2Model) -> dict[str, Tensor]:
    """What each linear layer reads when the model runs."""
    seen: dict[str, Tensor] = {}

    def listener(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def listen(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[name] = args[0]

        return listen

    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    handles = [module.register_forward_pre_hook(listener(name)) for name, module in linear.items()]
    try:
        outputs(model)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def tokens_of(x: Tensor) -> bytes:
    """The tokens that are not zero, sorted."""
    rows = x.detach().reshape(-1, x.shape[-1])
    return torch.unique(rows[rows.any(1)], dim=0).numpy().tobytes()


def test_layers_that_read_the_same_tokens_are_found(small_model: Sam2Model) -> None:
    readers = defaultdict(list)
    seen = inputs_of_layers(small_model)
    for name, module in small_model.named_modules():
        if isinstance(module, nn.Linear):
            readers[tokens_of(seen[name])].append(name)
    found = {tuple(names) for names in readers.values() if len(names) > 1}
    assert set(same_inputs(small_model)) == found == {*POOLING, *DECODER}


def test_layers_share_on_request(small_model: Sam2Model) -> None:
    assert groups_of(small_model, sharing("int4_w4a8", RANK_4)) == {*POOLING, *DECODER}
    assert groups_of(small_model, sharing("int4_w4a8", RANK_4, shared=False)) == set()
    assert groups_of(small_model, sharing("int4_w4a8", RANK_4, wgts={"skip_decoder": True})) == set(POOLING)


@pytest.mark.parametrize(
    ("pattern", "rule", "left"),
    [
        (f"{BLOCK}.1.proj", {"dtype": "float"}, {*POOLING[1:], *DECODER}),
        (f"{BLOCK}.1.proj", {"low_rank": None}, {*POOLING[1:], *DECODER}),
        (f"{BLOCK}.1.*", {"dtype": "uint4"}, {*POOLING, *DECODER}),  # all of a group have the same rule
        (f"{ATTENTION}.layers.0.self_attn.q_proj", {"dtype": "uint4"}, {*POOLING, DECODER[0][1:], *DECODER[1:]}),
        ("mask_decoder.*", {"low_rank": RANK_4}, set(POOLING)),  # a rule with the key's default
    ],
)
def test_layers_of_one_form_share(
    small_model: Sam2Model, pattern: str, rule: dict[str, Any], left: set[tuple[str, ...]]
) -> None:
    recipe = sharing("int4_w4a8", RANK_4, layers={pattern: rule})
    assert groups_of(small_model, recipe) == left


@pytest.mark.parametrize(("overhead", "rank"), [(None, 8), (0.2, 5), (0.05, 1)])
def test_a_given_rank_counts_the_shared_factor_once(small_model: Sam2Model, overhead: float | None, rank: int) -> None:
    """32 inputs, 3 · 64 and 64 outputs: 2 r (32 + 256) bytes of 2 · 32 · 256."""
    low_rank = {"rank": 8, "max_overhead": overhead}
    plans = {plan.name: plan for plan in make_plan(small_model, sharing("int4_w4a8", low_rank))}
    without = {plan.name: plan for plan in make_plan(small_model, recipe_of("int4_w4a8"))}
    first, second = POOLING[0]
    spent = [plans[name].planned_bytes - without[name].planned_bytes for name in (first, second)]
    assert [plans[name].rank for name in (first, second)] == [rank, rank]
    assert spent == [2 * rank * (32 + 192), 2 * rank * 64]
    if overhead is not None:
        assert sum(spent) <= overhead * 2 * 32 * 256 < 2 * (rank + 1) * (32 + 256)


def work_on(model: Sam2Model, recipe: Recipe) -> Work:
    return Work(model, recipe, {plan.name: plan for plan in make_plan(model, recipe) if plan.skip is None}, {})


def test_a_budget_counts_the_shared_factor_once(small_model: Sam2Model) -> None:
    spent, rank = {}, {}
    for shared in (False, True):
        recipe = sharing("int4_w4only_rtn", AUTO, shared=shared)
        work = work_on(small_model, recipe)
        before = {plan.name: plan for plan in make_plan(small_model, recipe_of("int4_w4only_rtn"))}
        assert ChooseRanks(recipe).apply(work) == list(work.plans)
        spent[shared] = sum(plan.planned_bytes - before[name].planned_bytes for name, plan in work.plans.items())
        budget = sum(int(0.1 * plan.fp16_bytes) for plan in work.plans.values())
        assert 0.9 * budget < spent[shared] <= budget
        rank[shared] = [[work.plans[name].rank for name in group] for group in POOLING + DECODER]
    assert all(len(set(ranks)) == 1 for ranks in rank[True])
    assert any(len(set(ranks)) > 1 for ranks in rank[False])
    assert any(ranks[0] for ranks in rank[True])


def quantized(model: Sam2Model, recipe: Recipe) -> Quantized:
    return quantize(model, recipe, [pixels(1)], measure=True)


def joint_svd(weight: NDArray[np.float64], rank: int, root: NDArray[np.float64]) -> NDArray[np.float64]:
    """The best approximation L of rank r in ‖(W − L) S‖ (Eckart and Young): the truncated SVD of W S, times S⁻¹."""
    left, singular, right = np.linalg.svd(weight @ root, full_matrices=False)
    best: NDArray[np.float64] = (left[:, :rank] * singular[:rank]) @ right[:rank] @ np.linalg.inv(root)
    return best


@pytest.mark.parametrize("group", POOLING + DECODER, ids=lambda group: group[-1])
def test_the_branch_is_the_best_one_of_the_stacked_weights(small_model: Sam2Model, group: tuple[str, ...]) -> None:
    made = quantize(small_model, sharing("int4_w4only_rtn", RANK_4), None)
    weights = np.concatenate([linear_at(small_model, name).weight.detach().double().numpy() for name in group])
    branches = [made.codes[name].branch for name in group]
    up = np.concatenate([branch.up.double().numpy() for branch in branches if branch is not None])
    down = [branch.down.double().numpy() for branch in branches if branch is not None]
    assert len(down) == len(group)
    assert all((other == down[0]).all() for other in down)
    of_rounding = 2.02 * 2**-11 * (np.abs(up) @ np.abs(down[0])) + 1e-7  # both factors are rounded to FP16
    best = joint_svd(weights, 4, np.eye(weights.shape[1]))
    assert (np.abs(up @ down[0] - best) <= of_rounding).all()


@pytest.mark.parametrize("group", POOLING[:2], ids=lambda group: group[-1])
def test_a_weighted_branch_fits_what_the_codes_of_all_leave(small_model: Sam2Model, group: tuple[str, ...]) -> None:
    recipe = sharing(
        "int4_w4only_rtn", RANK_4 | {"weighting": "full"}, wgts={"kernel_gptq": {}}, smooth={"enabled": False}
    )
    made = quantized(small_model, recipe)
    x = tokens_before(small_model, group[0])
    moments = x.T @ x
    root = np.linalg.cholesky(moments / np.diag(moments).mean() + DAMPING * np.eye(len(moments)))
    codes = [made.codes[name] for name in group]
    weights = [linear_at(small_model, name).weight.detach() for name in group]
    left = torch.cat([weight - one.weight.dequantize() for weight, one in zip(weights, codes, strict=True)])
    found = torch.cat([one.branch.product() for one in codes if one.branch is not None])
    best = joint_svd(left.double().numpy(), 4, root)
    assert np.linalg.norm((found.numpy() - best) @ root) < 5e-3 * np.linalg.norm(best @ root)


def tokens_before(model: Sam2Model, layer: str) -> NDArray[np.float64]:
    """The inputs [n, K] of a layer on the image of `quantized`."""
    seen: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        ImageEncoder(model)(pixels(1))
    handle.remove()
    found: NDArray[np.float64] = seen[0].double().reshape(-1, seen[0].shape[-1]).numpy()
    return found


FORMS = {
    "preset": sharing("int4_svdquant", AUTO),
    "compensated": sharing("int4_svdquant", RANK_4 | {"weighting": "diagonal", "compensate": True}),
    "8 bits": sharing("int8_w8a8", RANK_4),
    "sequential": sharing("int4_svdquant", RANK_4, calib={"mode": "sequential"}),
    "asymmetric, biases corrected": sharing("int4_w4only", RANK_4, wgts={"bias_correction": True}),
}


@pytest.mark.parametrize("name", FORMS)
def test_it_is_stored_once_and_told(small_model: Sam2Model, name: str) -> None:
    made = quantized(small_model, FORMS[name])
    ranked = {plan.name: plan for plan in made.plans if plan.rank}
    shared = {plan.name: plan.sharing[0] for plan in ranked.values() if plan.sharing and plan.name != plan.sharing[0]}
    assert shared
    assert {layer: codes.down_of for layer, codes in made.codes.items() if codes.down_of is not None} == shared
    for plan in made.plans:
        if plan.skip is not None:
            continue
        codes = made.codes[plan.name]
        assert codes.stored_bytes() == plan.planned_bytes
        told = f"low-rank branch with the down-projection of {shared.get(plan.name)}"
        assert (told in made.notes[plan.name].remarks) == (plan.name in shared)
        if plan.name in shared:
            own, first = codes.branch, made.codes[shared[plan.name]].branch
            assert own is not None
            assert first is not None
            assert own.down is first.down
            assert own.up.shape == (plan.out_features, plan.rank)


def test_without_a_choice_of_ranks_the_others_stay_as_they_are(small_model: Sam2Model) -> None:
    """Each layer that shares nothing has the codes and the branch that it has without sharing."""
    found, before = (
        quantize(small_model, sharing("int4_svdquant", RANK_4, shared=shared), [pixels(1)]).codes
        for shared in (True, False)
    )
    for name, codes in found.items():
        alone = not any(name in group for group in POOLING + DECODER)
        same = torch.equal(codes.effective_weight(), before[name].effective_weight())
        assert same == alone, name


def test_a_shared_factor_costs_some_of_the_output_and_saves_bytes(small_model: Sam2Model) -> None:
    """At the same rank. A factor of its own is the best for each layer."""
    low_rank = RANK_4 | {"weighting": "full", "compensate": True}
    own, one, none = (
        quantized(small_model, recipe)
        for recipe in (
            sharing("int4_w4only", low_rank, shared=False),
            sharing("int4_w4only", low_rank),
            recipe_of("int4_w4only"),
        )
    )

    def total(made: Quantized, of: Callable[[str], float | None]) -> float:
        return sum(of(name) or 0.0 for group in POOLING + DECODER for name in group)

    errors = [total(made, lambda name, made=made: made.notes[name].output_error) for made in (own, one, none)]
    sizes = [total(made, lambda name, made=made: made.codes[name].stored_bytes()) for made in (own, one, none)]
    assert errors[0] < errors[1] < errors[2]
    assert sizes[0] > sizes[1] > sizes[2]


def test_layers_that_share_are_multiplied_by_the_same(small_model: Sam2Model) -> None:
    """Nothing absorbs a scale in front of the decoder's queries, keys and values."""
    smooth = {"enabled": True, "multiply": True, "alpha": "auto"}
    made = quantized(small_model, sharing("int4_w4only", RANK_4, smooth=smooth))
    apart = quantized(small_model, sharing("int4_w4only", RANK_4, shared=False, smooth=smooth))
    first, *others = DECODER[0]
    multiplier = made.codes[first].multiplier
    assert multiplier is not None
    for name in others:
        found, alone = made.codes[name].multiplier, apart.codes[name].multiplier
        assert found is not None
        assert alone is not None
        assert torch.equal(found, multiplier)
        assert not torch.equal(alone, found)
