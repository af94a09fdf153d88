"""Why layers at no fold site are not smoothed: each obstacle is one, and stands where it is said to."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from small_model import outputs, relative, small_config, small_sam2
from torch import Tensor, nn
from transformers import Sam2Model
from transformers.models.sam2.modeling_sam2 import Sam2HieraDetModel

from samq.quant.sites import NO_PRODUCER, fold_sites, linear_at, obstacles

OBSTACLES = obstacles(small_sam2())
TOLERANCE = 2e-5  # FP32 through the whole model
BLOCKS, DECODER = "vision_encoder.backbone.blocks", "mask_decoder.transformer"
FINAL_NORM = f"{DECODER}.layer_norm_final_attn"
BEHIND_NORMS = {  # the norm that an obstacle names → layers
    norm: [layer for layer, why in OBSTACLES.items() if why.startswith(f"{norm} also feeds")]
    for norm in dict.fromkeys(why.split()[0] for why in OBSTACLES.values() if "also feeds" in why)
}


def test_every_layer_is_at_a_site_or_has_an_obstacle(small_model: Sam2Model) -> None:
    absorbed = {layer for site in fold_sites(small_model) for layer in site.layers}
    layers = {name for name, module in small_model.named_modules() if isinstance(module, nn.Linear)}
    assert absorbed | OBSTACLES.keys() == layers
    assert not absorbed & OBSTACLES.keys()


def test_hiera_has_no_obstacle_but_gelu(small_model: Sam2Model) -> None:
    """Neither the edge of a window nor pooling stands before a layer; the small model has both."""
    found = {name: why for name, why in OBSTACLES.items() if name.startswith("vision_encoder")}
    expected = [f"{BLOCKS}.{block}.mlp.proj_out" for block in range(5)]
    assert found == dict.fromkeys(expected, "GELU in front lets no scale pass")
    blocks = small_model.vision_encoder.backbone.blocks
    assert any(block.window_size and block.query_stride for block in blocks)


@pytest.mark.parametrize(("activation", "told"), [("silu", "SiLU in front lets no scale pass"), ("relu", None)])
def test_the_activation_is_named(activation: str, told: str | None) -> None:
    backbone = small_config().vision_config.backbone_config
    backbone.hidden_act = activation
    assert obstacles(Sam2HieraDetModel(backbone)).get("blocks.0.mlp.proj_out") == told


def test_what_the_decoder_is_told() -> None:
    """One layer of each kind, word by word; the report and `--dry-run` show it."""
    norms = {"residual": f"{DECODER}.layers.0.layer_norm2", "image": f"{DECODER}.layers.1.layer_norm4"}
    apart = "also feeds layers that are not smoothed together with this one"
    assert OBSTACLES[f"{DECODER}.layers.0.mlp.proj_in"] == f"{norms['residual']} also feeds the residual stream"
    assert OBSTACLES[f"{DECODER}.final_attn_token_to_image.v_proj"] == f"{norms['image']} {apart}"
    assert OBSTACLES["mask_decoder.iou_prediction_head.proj_in"] == f"{FINAL_NORM} {apart}"
    unproduced = "no LayerNorm or linear layer puts out what it reads"
    assert [name for name, why in OBSTACLES.items() if why == unproduced] == [
        *(f"{DECODER}.layers.0.self_attn.{letter}_proj" for letter in "qkv"),
        *(f"{DECODER}.layers.0.cross_attn_token_to_image.{letter}_proj" for letter in "kv"),
        f"{DECODER}.layers.0.cross_attn_image_to_token.q_proj",
    ]


def changed_by_a_scale(model: Sam2Model, source: str, layers: list[str]) -> float:
    """How far outputs change with twice what a module puts out, and half the columns of these layers."""
    scaled = copy.deepcopy(model)
    scaled.get_submodule(source).register_forward_hook(lambda module, args, output: 2 * output)
    with torch.no_grad():
        for layer in layers:
            linear_at(scaled, layer).weight /= 2
    return max(relative(a - b, b) for a, b in zip(outputs(scaled), outputs(model), strict=True))


@pytest.mark.parametrize("norm", [norm for norm in BEHIND_NORMS if norm != FINAL_NORM])
def test_a_norm_that_is_named_takes_no_scale(small_model: Sam2Model, norm: str) -> None:
    """Not even when all linear layers behind it are changed with it."""
    assert changed_by_a_scale(small_model, norm, BEHIND_NORMS[norm]) > 20 * TOLERANCE


@pytest.mark.parametrize("block", range(5))
def test_gelu_lets_no_scale_pass(small_model: Sam2Model, block: int) -> None:
    mlp = f"{BLOCKS}.{block}.mlp"
    assert changed_by_a_scale(small_model, f"{mlp}.proj_in", [f"{mlp}.proj_out"]) > 20 * TOLERANCE


def test_the_heads_take_a_scale_only_together(small_model: Sam2Model) -> None:
    first, *others = BEHIND_NORMS[FINAL_NORM]
    assert changed_by_a_scale(small_model, FINAL_NORM, [first, *others]) < TOLERANCE
    assert changed_by_a_scale(small_model, FINAL_NORM, others) > 20 * TOLERANCE


def test_the_norm_that_is_named_is_the_one_in_front(small_model: Sam2Model) -> None:
    """A layer reads what its norm puts out, with positions added or not; without one, what the transformer is given."""
    seen: dict[str, Tensor] = {}

    def listen(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def listener(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            seen[f"{name} reads"], seen[name] = args[0], output

        return listener

    def given(module: nn.Module, args: tuple[()], named: dict[str, Tensor]) -> None:
        kinds = ("image_embeddings", "image_positional_embeddings")
        seen["image"], seen["positions"] = (named[kind].flatten(2).transpose(1, 2)[:, None] for kind in kinds)
        seen["prompts"] = named["point_embeddings"].clone()

    model = copy.deepcopy(small_model)
    model.get_submodule(DECODER).register_forward_pre_hook(given, with_kwargs=True)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.LayerNorm):
            module.register_forward_hook(listen(name))
    outputs(model)
    checked = [name for name in OBSTACLES if name.startswith(DECODER)]
    assert len(checked) > 20
    for name in checked:
        fronts = ("prompts", "image") if OBSTACLES[name] == NO_PRODUCER else (OBSTACLES[name].split()[0],)
        added = (torch.zeros(1, 1), seen["prompts"], seen["positions"])
        sums = [
            seen[front] + more for front in fronts for more in added if more.shape[-2] in (1, seen[front].shape[-2])
        ]
        assert any(torch.equal(each, seen[f"{name} reads"]) for each in sums), name
