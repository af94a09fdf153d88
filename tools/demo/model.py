"""The demo model's architecture: a SAM 2 of 6.6 M parameters for images of 256×256.

    level    features   width   blocks                                          used for
    0        64×64      48      3, windows of 8                                 masks (high resolution)
    1        32×32      96      4, windows of 4 (8 in the block that pools)     masks (high resolution)
    2        16×16      192     8, windows of 6 that pad to 18, and 3 global    image embedding, 128 wide
    3        8×8        384     1, windows of 6 that pad to 18, then pools      image embedding, from above

Every mechanism of the released checkpoints is there, on a small scale: query pooling between all stages,
windows that pad, also in a block that pools, global blocks, the feature pyramid with its top-down path,
high-resolution features and the full mask decoder.
"""

import torch
from torch import Tensor
from transformers import Sam2Config
from transformers.models.sam2.configuration_sam2 import (
    Sam2HieraDetConfig,
    Sam2MaskDecoderConfig,
    Sam2PromptEncoderConfig,
    Sam2VisionConfig,
)

IMAGE_SIZE = 256
HIDDEN_SIZE = 128
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)


def demo_config() -> Sam2Config:
    """The configuration from which the demo model is trained."""
    widths = [48, 96, 192, 384]
    backbone = Sam2HieraDetConfig(
        hidden_size=widths[0],
        num_attention_heads=1,
        image_size=[IMAGE_SIZE, IMAGE_SIZE],
        window_positional_embedding_background_size=[8, 8],
        num_query_pool_stages=3,
        blocks_per_stage=[3, 4, 8, 1],
        embed_dim_per_stage=widths,
        num_attention_heads_per_stage=[1, 2, 4, 8],
        window_size_per_stage=[8, 4, 6, 4],
        global_attention_blocks=[9, 11, 14],
    )
    vision = Sam2VisionConfig(
        backbone_config=backbone,
        backbone_channel_list=widths[::-1],
        backbone_feature_sizes=[[64, 64], [32, 32], [16, 16]],
        fpn_hidden_size=HIDDEN_SIZE,
    )
    prompts = Sam2PromptEncoderConfig(hidden_size=HIDDEN_SIZE, image_size=IMAGE_SIZE, patch_size=16)
    decoder = Sam2MaskDecoderConfig(
        hidden_size=HIDDEN_SIZE, mlp_dim=512, num_attention_heads=4, iou_head_hidden_dim=HIDDEN_SIZE
    )
    return Sam2Config(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder)


def pixel_values(images: Tensor) -> Tensor:
    """The model's input for images of its own size, as its image processor would make it.

    Args:
        images: uint8 [B, H, W, 3], RGB.

    Returns:
        float32 [B, 3, H, W], normalized by ImageNet's mean and deviation.
    """
    channels = [
        (images[..., channel].float() / 255 - mean) / std
        for channel, (mean, std) in enumerate(zip(IMAGE_MEAN, IMAGE_STD, strict=True))
    ]
    return torch.stack(channels, dim=1)
