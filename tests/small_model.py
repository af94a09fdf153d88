"""A SAM2 model of 0.7 M parameters for images of 128×128, with every mechanism of the released ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Sam2Config, Sam2Model
from transformers.models.sam2.configuration_sam2 import (
    Sam2HieraDetConfig,
    Sam2MaskDecoderConfig,
    Sam2PromptEncoderConfig,
    Sam2VisionConfig,
)

from samq.calib.parts import ImageEncoder, MaskDecoder
from samq.quant.config import Recipe, load_recipe

IMAGE_SIZE = 128
NOISE = 0.1


def small_config() -> Sam2Config:
    """Query pooling, windows that pad, a global block, the feature pyramid and the whole mask decoder."""
    backbone = Sam2HieraDetConfig(
        hidden_size=32,
        image_size=[IMAGE_SIZE, IMAGE_SIZE],
        blocks_per_stage=[1, 1, 2, 1],
        embed_dim_per_stage=[32, 64, 96, 128],
        num_attention_heads_per_stage=[1, 2, 2, 4],
        window_size_per_stage=[8, 4, 6, 3],
        global_attention_blocks=[3],
        window_positional_embedding_background_size=[4, 4],
    )
    vision = Sam2VisionConfig(
        backbone_config=backbone,
        backbone_channel_list=[128, 96, 64, 32],
        backbone_feature_sizes=[[32, 32], [16, 16], [8, 8]],
        fpn_hidden_size=64,
    )
    return Sam2Config(
        vision_config=vision,
        prompt_encoder_config=Sam2PromptEncoderConfig(hidden_size=64, image_size=IMAGE_SIZE),
        mask_decoder_config=Sam2MaskDecoderConfig(
            hidden_size=64,
            mlp_dim=128,
            num_attention_heads=4,
            iou_head_hidden_dim=64,
            dynamic_multimask_stability_thresh=0.0,  # mask 0 is the single mask, never another one
        ),
    )


def small_sam2(seed: int = 0) -> Sam2Model:
    """A random model, its weights large enough for every layer to matter.

    What starts as zeros or ones gets noise, so that a lost bias or gain shows.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = Sam2Model(small_config()).eval()
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.weight /= module.weight.std() * module.weight[0].numel() ** 0.5
        for parameter in model.parameters():
            if parameter.ndim == 1 or not parameter.any():
                parameter += NOISE * torch.randn_like(parameter)
    return model


def pixels(images: int, seed: int = 0) -> Tensor:
    """Smooth random images, [images, 3, S, S], in about the range of normalized photographs."""
    coarse = torch.randn(images, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, (IMAGE_SIZE, IMAGE_SIZE), mode="bicubic")


@torch.no_grad()
def outputs(model: Sam2Model, seed: int = 0) -> list[Tensor]:
    """Every output of both parts for two images with three prompts each: two clicks, the last with a mask."""
    generator = torch.Generator().manual_seed(seed)
    features = ImageEncoder(model)(pixels(2, seed))
    coords = torch.rand(2, 3, 2, 2, generator=generator) * IMAGE_SIZE
    labels = torch.tensor([[[1, 0], [2, 3], [1, 1]]] * 2)
    masks = torch.randn(2, 3, 1, *features[1].shape[-2:], generator=generator)
    has_mask = torch.tensor([[0.0, 0.0, 1.0]] * 2)
    return [*features, *MaskDecoder(model)(*features, coords, labels, masks, has_mask)]


def relative(change: Tensor, of: Tensor) -> float:
    """‖change‖ / ‖of‖, in float64."""
    return float(change.detach().double().norm() / of.detach().double().norm())


def recipe_of(preset: str = "int4_w4a8", **changes: Any) -> Recipe:
    """A preset with some values changed, given as sections: `wgts={"dtype": "uint4"}`, `ipts=None`.

    The mask decoder is quantized unless a change says otherwise.
    """
    base = load_recipe(preset).model_dump()
    base["wgts"]["skip_decoder"] = False
    for section, values in changes.items():
        merge = isinstance(values, dict) and isinstance(base[section], dict)
        base[section] = base[section] | values if merge else values
    return Recipe.model_validate(base)
