"""The training loss of the demo model: a click, a box and a correction, each asked of all four mask tokens.

Tokens: 0 answers alone (`multimask_output=False`); of 1 to 3 only the best one learns from a prompt. A
correction repeats a click with a second one where the first answer was wrong, for every other image with that
answer as the mask prompt. Masks are compared at half the image's size, with soft targets.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Sam2Model
from transformers.models.sam2.modeling_sam2 import Sam2MultiScaleAttention

from samq.tools.demo.sampling import CLICKS, Prompts

FOCAL_WEIGHT, DICE_WEIGHT, IOU_WEIGHT, OBJECT_WEIGHT = 20.0, 1.0, 1.0, 0.2
CORRECTION_WEIGHT = 0.3


class Answers(NamedTuple):
    """What the decoder says to P prompts for each of B images.

    Attributes:
        logits: [B, P, 4, h, w], low-resolution masks of all tokens.
        ious: [B, P, 4], predicted.
        objects: [B, P], logits of there being an object.
    """

    logits: Tensor
    ious: Tensor
    objects: Tensor


class Losses(NamedTuple):
    """The loss to minimize and, for the log, mean IoUs at half size, from a box and from one click."""

    total: Tensor
    box_iou: Tensor
    click_iou: Tensor


Comparison = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def prepare(model: Sam2Model) -> None:
    """Make a model answer for training; its weights and what they compute stay as they are.

    The decoder answers with all four masks where it is asked for one: outside of training mode it passes all its
    masks to the method replaced here, to choose the one to return. The encoder's attention skips a product of
    queries and keys that it computes and never uses.
    """
    model.mask_decoder.__dict__["_dynamic_multimask_via_stability"] = lambda masks, ious: (masks, ious)
    for module in model.modules():
        if isinstance(module, Sam2MultiScaleAttention):
            module.__dict__["forward"] = partial(_attend, module)


def _attend(attention: Sam2MultiScaleAttention, hidden_states: Tensor, **_: Any) -> Tensor:
    """`Sam2MultiScaleAttention.forward` without the unused product: [B, H, W, C] to [B, H', W', C']."""
    count, height, width, _channels = hidden_states.shape
    heads = attention.num_attention_heads
    qkv = attention.qkv(hidden_states).reshape(count, height * width, 3, heads, -1)
    query, key, value = qkv.unbind(2)
    if attention.query_stride:
        grid = query.reshape(count, height, width, -1).permute(0, 3, 1, 2)
        pooled = F.max_pool2d(grid, attention.query_stride)
        height, width = pooled.shape[2:]
        query = pooled.permute(0, 2, 3, 1).reshape(count, height * width, heads, -1)
    attended = F.scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), scale=attention.scale
    )
    projected: Tensor = attention.proj(attended.transpose(1, 2).reshape(count, height, width, -1))
    return projected


def losses(model: Sam2Model, pixels: Tensor, prompts: Prompts, noise: Tensor, compare: Comparison) -> Losses:
    """Ask the model, prepared by `prepare`, and compare.

    Args:
        model: the model, in evaluation mode (it has no dropout).
        pixels: float32 [B, 3, H, W], its normalized input.
        prompts: what to ask.
        noise: uniform random numbers [B, H/2, W/2], which place the corrections.
        compare: `compare_masks`, perhaps compiled.
    """
    targets, present = F.avg_pool2d(prompts.masks.float(), 2), prompts.present
    decoder = _Decoder(model, pixels)
    clicks, boxes = prompts.clicks[:, :, None], prompts.boxes.reshape(*prompts.boxes.shape[:2], 2, 2)
    click_answers = decoder(clicks, _labels(clicks, 1))
    box_answers = decoder(boxes, _labels(boxes, 2))
    first = Answers(*(field[:, :1].detach() for field in click_answers))
    correction, label = _correction(first, targets[:, 0], noise)
    points = torch.cat([clicks[:, :1], correction[:, None, None]], dim=2)
    labels = torch.stack([torch.ones_like(label), label], dim=1)[:, None]
    corrected_answers = decoder(points, labels, mask=_best(first))
    click_loss, click_ious = _prompt_losses(click_answers, targets[:, :CLICKS], present[:, :CLICKS], compare)
    box_loss, box_ious = _prompt_losses(box_answers, targets[:, CLICKS:], present[:, CLICKS:], compare)
    corrected_loss, _ = _prompt_losses(corrected_answers, targets[:, :1], present[:, :1], compare)
    chosen = click_answers.ious[..., 1:].argmax(dim=2, keepdim=True)
    return Losses(
        total=click_loss + box_loss + CORRECTION_WEIGHT * corrected_loss,
        box_iou=_mean(box_ious[..., 0], present[:, CLICKS:]),
        click_iou=_mean(click_ious[..., 1:].gather(2, chosen)[..., 0], present[:, :CLICKS]),
    )


def _labels(points: Tensor, first: int) -> Tensor:
    """Labels [B, P, N] for points [B, P, N, 2]: `first` and those after it, for every prompt."""
    return torch.arange(first, first + points.shape[2], device=points.device).expand(points.shape[:3])


class _Decoder:
    """The prompt encoder and mask decoder over one batch of encoded images."""

    def __init__(self, model: Sam2Model, pixels: Tensor) -> None:
        self._model = model
        features = model.get_image_features(pixels, return_dict=True).fpn_hidden_states
        features[-1] = features[-1] + model.no_memory_embedding
        sizes = model.backbone_feature_sizes
        self._features = [f.permute(1, 2, 0).unflatten(2, size) for f, size in zip(features, sizes, strict=True)]

    def __call__(self, points: Tensor, labels: Tensor, mask: Tensor | None = None) -> Answers:
        """Answers to points [B, P, N, 2] with labels [B, P, N]; every other image gets its `mask` too.

        A box is two points with labels 2 and 3, which the prompt encoder embeds as it does a box; `mask` is
        [B, 1, h, w], the logits of an earlier answer.
        """
        model, count = self._model, len(points)
        with torch.autocast(points.device.type, enabled=False):
            sparse, dense = model.prompt_encoder(points, labels, None, mask)
            positions = model.get_image_wide_positional_embeddings().expand(count, -1, -1, -1)
            if mask is not None:
                every_other = torch.arange(count, device=mask.device)[:, None, None, None] % 2 == 0
                dense = torch.where(every_other, dense, model.prompt_encoder.no_mask_embed.weight[..., None, None])
        logits, ious, _, objects = model.mask_decoder(
            image_embeddings=self._features[-1],
            image_positional_embeddings=positions,
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
            high_resolution_features=self._features[:-1],
        )
        return Answers(logits.float(), ious.float(), objects[..., 0].float())


def _best(answers: Answers) -> Tensor:
    """The mask logits [B, 1, h, w] of the token (1 to 3) with the highest predicted IoU, for one prompt."""
    chosen = answers.ious[:, 0, 1:].argmax(dim=1)
    images = torch.arange(len(chosen), device=chosen.device)
    return answers.logits[images, 0, 1 + chosen][:, None]


def _correction(first: Answers, target: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """A random point [B, 2] (x, y, pixels) where the best mask of `first` is wrong, and its label [B].

    Where nothing is wrong it is a point inside the target [B, H/2, W/2], or anywhere if that is empty.
    """
    wanted = target > 0.5
    said = F.interpolate(_best(first), size=target.shape[-2:], mode="bilinear")[:, 0] > 0
    score = noise + 2 * (said != wanted) + wanted
    position = score.flatten(1).argmax(dim=1)
    width = target.shape[-1]
    points = torch.stack([position % width, position // width], dim=1).float() * 2 + 0.5
    return points, wanted.flatten(1).gather(1, position[:, None])[:, 0].long()


def _prompt_losses(answers: Answers, targets: Tensor, present: Tensor, compare: Comparison) -> tuple[Tensor, Tensor]:
    """The mean loss over prompts, and the IoU of every mask [B, P, 4].

    Args:
        answers: to P prompts for each of B images.
        targets: [B, P, H/2, W/2], the covered share of each pixel.
        present: bool [B, P], whether there is an object; where not, only the object score is judged.
        compare: `compare_masks`, perhaps compiled.
    """
    high = F.interpolate(answers.logits.flatten(0, 1), scale_factor=2.0, mode="bilinear")
    mask_losses, ious = compare(high.reshape(*present.shape, *high.shape[1:]), targets[:, :, None])
    iou_losses = (answers.ious - ious).square().mean(dim=2)
    per_prompt = mask_losses[..., 0] + mask_losses[..., 1:].amin(dim=2) + IOU_WEIGHT * iou_losses
    object_loss = F.binary_cross_entropy_with_logits(answers.objects, present.float())
    return _mean(per_prompt, present) + OBJECT_WEIGHT * object_loss, ious


def compare_masks(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The mask loss and the IoU of each mask: [..., H, W] with soft targets to [...], twice."""
    mask_losses = FOCAL_WEIGHT * _focal(logits, targets) + DICE_WEIGHT * _dice(logits, targets)
    return mask_losses, _ious(logits, targets)


def _mean(values: Tensor, where: Tensor) -> Tensor:
    return (values * where).sum() / where.sum().clamp(min=1)


def _focal(logits: Tensor, targets: Tensor) -> Tensor:
    """Focal loss (α 0.25, γ 2) as a mean over pixels: [..., H, W] with soft targets to [...]."""
    probability = logits.sigmoid()
    cross_entropy = F.softplus(logits) - logits * targets
    miss = (probability - targets).abs()
    alpha = 0.25 * targets + 0.75 * (1 - targets)
    return (alpha * miss.square() * cross_entropy).mean(dim=(-2, -1))


def _dice(logits: Tensor, targets: Tensor) -> Tensor:
    """Dice loss: [..., H, W] with soft targets to [...]."""
    probability = logits.sigmoid()
    overlap = (probability * targets).sum(dim=(-2, -1))
    total = probability.sum(dim=(-2, -1)) + targets.sum(dim=(-2, -1))
    return 1 - (2 * overlap + 1) / (total + 1)


def _ious(logits: Tensor, targets: Tensor) -> Tensor:
    """IoU of masks cut at 0 with targets cut at a half: [..., H, W] to [...]."""
    said, wanted = logits > 0, targets > 0.5
    union = (said | wanted).sum(dim=(-2, -1))
    return (said & wanted).sum(dim=(-2, -1)) / union.clamp(min=1)
