"""Proof that the FP32 ONNX parts together equal the torch model, for full-size SAM2.1 models with random weights.

    python -m samq.tools.prove_parity tiny base-plus large

prints, for each model, the largest error of every output relative to its largest value, on points, boxes and masks.
Exit code 1 when one is above 1e-4. Random weights, because no hub is needed then; the graphs are the published ones'.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    Sam2Config,
    Sam2HieraDetConfig,
    Sam2MaskDecoderConfig,
    Sam2Model,
    Sam2PromptEncoderConfig,
    Sam2VisionConfig,
)

from samq.calib.parts import IMAGE_ENCODER, MASK_DECODER
from samq.calib.prompts import Prompts, boxes, clicks
from samq.engines.onnxruntime import OnnxRuntimeEngine
from samq.engines.predictor import Predictor
from samq.export.parts import float_part, save_part
from samq.export.trace import trace

TOLERANCE = 1e-4
IMAGE_SIZE = 1024

# Hiera variants of SAM 2.1 (arXiv 2408.00714, appendix D; facebook/sam2.1-hiera-*)
BACKBONES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 96, "blocks_per_stage": [1, 2, 7, 2], "global_attention_blocks": [5, 7, 9]},
    "small": {"hidden_size": 96, "blocks_per_stage": [1, 2, 11, 2], "global_attention_blocks": [7, 10, 13]},
    "base-plus": {
        "hidden_size": 112,
        "num_attention_heads": 2,
        "num_attention_heads_per_stage": [2, 4, 8, 16],
        "blocks_per_stage": [2, 3, 16, 3],
        "global_attention_blocks": [12, 16, 20],
        "window_positional_embedding_background_size": [14, 14],
    },
    "large": {
        "hidden_size": 144,
        "num_attention_heads": 2,
        "num_attention_heads_per_stage": [2, 4, 8, 16],
        "blocks_per_stage": [2, 6, 36, 4],
        "global_attention_blocks": [23, 33, 43],
        "window_size_per_stage": [8, 4, 16, 8],
    },
}


def random_sam2(name: str, seed: int = 0) -> Sam2Model:
    """A full-size SAM2.1 with random weights.

    Args:
        name: "tiny", "small", "base-plus" or "large".
    """
    torch.manual_seed(seed)
    backbone = BACKBONES[name]
    width: int = backbone["hidden_size"]
    widths = [width << stage for stage in range(4)]
    vision = Sam2VisionConfig(
        backbone_config=Sam2HieraDetConfig(**backbone, embed_dim_per_stage=widths),
        backbone_channel_list=widths[::-1],
    )
    config = Sam2Config(
        vision_config=vision,
        prompt_encoder_config=Sam2PromptEncoderConfig(),
        mask_decoder_config=Sam2MaskDecoderConfig(),
    )
    model = Sam2Model(config)
    model.train(False)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1 or not parameter.any():  # biases and embeddings start at zero or one
                parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def worst_errors(model: Sam2Model, image_size: int = IMAGE_SIZE, seed: int = 0) -> dict[str, float]:
    """Export the float parts of a model and compare them with it; relative errors by prompt and output."""
    with tempfile.TemporaryDirectory() as folder:
        engines = []
        for part in (IMAGE_ENCODER, MASK_DECODER):
            path = Path(folder) / f"{part}.onnx"
            save_part(float_part(trace(model, part), model, half=False), path)
            engines.append(OnnxRuntimeEngine(path))
        return _compare(model, Predictor(*engines), image_size, np.random.default_rng(seed))


def _compare(model: Sam2Model, predictor: Predictor, image_size: int, random: np.random.Generator) -> dict[str, float]:
    pixels = random.standard_normal((3, image_size, image_size), dtype=np.float32)
    features = predictor.encode(pixels)
    with torch.no_grad():
        exact = model.get_image_embeddings(torch.from_numpy(pixels)[None])
    names = ("high_res_features_0", "high_res_features_1", "image_embeddings")
    errors = {name: _relative(features[name], tensor) for name, tensor in zip(names, exact, strict=True)}
    points = random.uniform(0, image_size, (3, 2)).astype(np.float32)
    corners = np.array([[0.1, 0.2, 0.6, 0.7], [0.3, 0.3, 0.9, 0.8]], np.float32) * image_size
    side = features["high_res_features_0"].shape[-1]
    mask = random.standard_normal((1, side, side), dtype=np.float32)
    cases: dict[str, tuple[Prompts, np.ndarray[tuple[int, ...], np.dtype[np.float32]] | None]] = {
        "points": (clicks(points), None),
        "boxes": (boxes(corners), None),
        "mask": (boxes(corners[:1]), mask),
    }
    for name, (prompts, masks) in cases.items():
        answer = predictor.decode(features, prompts.coords, prompts.labels, masks)
        for multimask, chosen in ((False, slice(0, 1)), (True, slice(1, None))):
            with torch.no_grad():
                expected = model(
                    image_embeddings=list(exact),
                    input_points=torch.from_numpy(prompts.coords)[None],
                    input_labels=torch.from_numpy(prompts.labels)[None],
                    input_masks=None if masks is None else torch.from_numpy(masks)[None],
                    multimask_output=multimask,
                )
            kind = f"{name}, {'multimask' if multimask else 'single'}"
            errors[f"{kind}: masks"] = _relative(answer.masks[:, chosen], expected.pred_masks[0])
            errors[f"{kind}: IoU scores"] = _relative(answer.scores[:, chosen], expected.iou_scores[0])
        errors[f"{name}: object score"] = _relative(answer.object_scores, expected.object_score_logits[0, :, 0])
    return errors


def _relative(found: object, expected: torch.Tensor) -> float:
    difference = (torch.as_tensor(np.asarray(found)).reshape(expected.shape) - expected).abs().max()
    return float(difference / expected.abs().max())


def main() -> int:
    """Compare the named models; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", choices=sorted(BACKBONES))
    failed = False
    for name in parser.parse_args().models:
        started = time.perf_counter()
        errors = worst_errors(random_sam2(name))
        worst = max(errors, key=lambda key: errors[key])
        failed |= not errors[worst] <= TOLERANCE
        seconds = time.perf_counter() - started
        print(f"{name:<10} worst relative error {errors[worst]:.1e} ({worst}), {len(errors)} outputs, {seconds:.0f} s")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
