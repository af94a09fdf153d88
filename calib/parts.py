"""The two parts of a SAM2 model, with the inputs and outputs that every engine sees.

`image_encoder`   pixel_values [B, 3, S, S]
                  → image_embeddings [B, C, h, w], high_res_features_0 [B, C/8, 4h, 4w],
                    high_res_features_1 [B, C/4, 2h, 2w]
`mask_decoder`    the three above, point_coords [B, P, N, 2], point_labels [B, P, N], mask_input [B, P, 1, 4h, 4w],
                  has_mask_input [B, P]
                  → masks [B, P, 1 + M, 4h, 4w], iou_scores [B, P, 1 + M], object_score_logits [B, P, 1]

B images, P prompts an image, N points a prompt, M multimask outputs (3). Points are (x, y) in pixels of the S×S input.
Labels: 1 foreground, 0 background, 2 and 3 the top-left and bottom-right corner of a box, -1 not a point, -10 padding.
Mask 0 is the model's single-mask answer (`multimask_output=False`, with its fallback to the best of the others when
unstable); masks 1…M are the multimask answer. Everything is computed by the model's own modules; a prompt is a batch
row of its own, so that every prompt may bring its own mask, which `Sam2Model.forward` allows for one prompt only.
"""

from __future__ import annotations

import copy
from types import MethodType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import Sam2Model
    from transformers.models.sam2.modeling_sam2 import Sam2MaskDecoder

IMAGE_ENCODER = "image_encoder"
MASK_DECODER = "mask_decoder"
PARTS = (IMAGE_ENCODER, MASK_DECODER)
BACKBONE = "vision_encoder.backbone"  # Hiera, within the image encoder

ENCODER_INPUTS = ("pixel_values",)
ENCODER_OUTPUTS = ("image_embeddings", "high_res_features_0", "high_res_features_1")
DECODER_INPUTS = (*ENCODER_OUTPUTS, "point_coords", "point_labels", "mask_input", "has_mask_input")
DECODER_OUTPUTS = ("masks", "iou_scores", "object_score_logits")


def part_of(layer: str) -> str:
    """The part that runs the module called `layer` in a `Sam2Model`."""
    runs_in_encoder = layer.startswith(("vision_encoder.", "mask_decoder.conv_s"))
    return IMAGE_ENCODER if runs_in_encoder else MASK_DECODER


class ImageEncoder(nn.Module):
    """`pixel_values` → embeddings and high-resolution features; see the module's docstring for shapes."""

    def __init__(self, model: Sam2Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        fine, middle, coarse = self.model.vision_encoder(pixel_values, return_dict=True).fpn_hidden_states
        decoder = self.model.mask_decoder
        no_memory = self.model.no_memory_embedding.reshape(1, -1, 1, 1)
        return coarse + no_memory, decoder.conv_s0(fine), decoder.conv_s1(middle)


class MaskDecoder(nn.Module):
    """Embeddings and prompts → masks and scores; see the module's docstring for shapes."""

    image_positions: Tensor

    def __init__(self, model: Sam2Model) -> None:
        super().__init__()
        self.prompt_encoder = model.prompt_encoder
        self.mask_decoder = _answering_single_and_multi(model.mask_decoder)
        with torch.no_grad():
            positions = model.get_image_wide_positional_embeddings()
        self.register_buffer("image_positions", positions, persistent=False)

    def forward(
        self,
        image_embeddings: Tensor,
        high_res_features_0: Tensor,
        high_res_features_1: Tensor,
        point_coords: Tensor,
        point_labels: Tensor,
        mask_input: Tensor,
        has_mask_input: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch, prompts = point_coords.shape[:2]
        sparse, no_mask = self.prompt_encoder(
            input_points=point_coords.flatten(0, 1).unsqueeze(1),  # [B·P, 1, N, 2]
            input_labels=point_labels.flatten(0, 1).unsqueeze(1),
            input_boxes=None,
            input_masks=None,
        )
        with_mask = self.prompt_encoder.mask_embed(mask_input.flatten(0, 1))  # [B·P, C, h, w]
        has_mask = has_mask_input.reshape(-1, 1, 1, 1) > 0
        masks, scores, _, object_scores = self.mask_decoder(
            image_embeddings=_one_per_prompt(image_embeddings, prompts),
            image_positional_embeddings=self.image_positions,
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=torch.where(has_mask, with_mask, no_mask),
            multimask_output=False,
            high_resolution_features=[
                _one_per_prompt(high_res_features_0, prompts),
                _one_per_prompt(high_res_features_1, prompts),
            ],
        )
        return (
            masks.reshape(batch, prompts, *masks.shape[2:]),
            scores.reshape(batch, prompts, -1),
            object_scores.reshape(batch, prompts, 1),
        )


def _one_per_prompt(features: Tensor, prompts: int) -> Tensor:
    """[B, C, h, w] → [B·P, C, h, w], each image repeated for each of its prompts."""
    return features.unsqueeze(1).expand(-1, prompts, -1, -1, -1).flatten(0, 1)


def _answering_single_and_multi(decoder: Sam2MaskDecoder) -> Sam2MaskDecoder:
    """A view of the decoder (weights shared) whose answer is the single mask followed by the multimask ones."""
    view = copy.copy(decoder)
    pick = type(decoder)._dynamic_multimask_via_stability
    falls_back = decoder.dynamic_multimask_via_stability

    def single_then_multi(self: Sam2MaskDecoder, masks: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        single, score = masks[:, :, :1], scores[:, :, :1]
        if falls_back:
            single, score = pick(self, masks, scores)  # type: ignore[no-untyped-call]
        return torch.cat([single, masks[:, :, 1:]], dim=2), torch.cat([score, scores[:, :, 1:]], dim=2)

    view.dynamic_multimask_via_stability = True
    view._dynamic_multimask_via_stability = MethodType(single_then_multi, view)  # type: ignore[method-assign]
    return view
