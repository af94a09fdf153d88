"""How good the demo model is: its mIoU on held-out scenes, from a box and from one click.

    python -m samq.tools.demo.evaluate [--model-path DIR] [--scenes 500] [--json FILE]

Every instance of at least 32 visible pixels is asked for twice. From its box, the single-mask answer counts;
from a click at its deepest point, the one of three masks with the highest predicted IoU. Masks are upsampled
bilinearly to the image's size and cut at 0. The figures are means over instances.
"""

import argparse
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Sam2Model

from samq.calib.prompts import box_of, click_of
from samq.tools.demo.model import pixel_values
from samq.tools.demo.scenes import Scene, held_out_scene

CHECKPOINT = Path(__file__).parent / "checkpoint"
MIN_AREA = 32


@dataclass(frozen=True)
class Figures:
    """What was measured, over how much."""

    scenes: int
    instances: int
    box_miou: float
    click_miou: float


def evaluate(model: Sam2Model, scenes: Iterable[Scene]) -> Figures:
    """Measure a model, on the device where it is, over scenes of its input size."""
    model.train(False)
    per_scene = [_scene_ious(model, scene) for scene in scenes]
    ious = torch.cat(per_scene)
    box, click = ious.mean(dim=0).tolist()
    return Figures(scenes=len(per_scene), instances=len(ious), box_miou=box, click_miou=click)


@torch.inference_mode()
def _scene_ious(model: Sam2Model, scene: Scene) -> Tensor:
    """The IoU of each instance [n, 2]: from its box, and from one click."""
    masks = scene.masks[scene.masks.sum(axis=(1, 2)) >= MIN_AREA]
    truth = torch.from_numpy(masks).to(model.device)
    boxes = torch.from_numpy(np.stack([box_of(mask) for mask in masks])).to(model.device)
    clicks = torch.from_numpy(np.stack([click_of(mask) for mask in masks])).to(model.device)
    image = torch.from_numpy(scene.image).to(model.device)
    embeddings = model.get_image_embeddings(pixel_values(image[None]))
    from_box = model(image_embeddings=embeddings, input_boxes=boxes[None], multimask_output=False)
    points = clicks[None, :, None]
    from_click = model(image_embeddings=embeddings, input_points=points, multimask_output=True)
    best = from_click.iou_scores[0].argmax(dim=1)
    from_click_best = from_click.pred_masks[0, torch.arange(len(masks)), best]
    return torch.stack([_iou(from_box.pred_masks[0, :, 0], truth), _iou(from_click_best, truth)], dim=1)


def _iou(logits: Tensor, truth: Tensor) -> Tensor:
    """IoU [n] of low-resolution logits [n, h, w] with masks [n, H, W]."""
    predicted = F.interpolate(logits[:, None].float(), size=truth.shape[-2:], mode="bilinear")[:, 0] > 0
    return (predicted & truth).sum(dim=(1, 2)) / (predicted | truth).sum(dim=(1, 2))


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure a Sam2Model on the demo's held-out scenes.")
    parser.add_argument("--model-path", type=Path, default=CHECKPOINT, help="a Sam2Model (default: the demo)")
    parser.add_argument("--scenes", type=int, default=500, help="how many held-out scenes (default: 500)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    model = Sam2Model.from_pretrained(options.model_path, dtype=torch.float32).to(options.device)
    figures = evaluate(model, (held_out_scene(index) for index in range(options.scenes)))
    print(
        f"mIoU from a box {figures.box_miou:.4f}, from one click {figures.click_miou:.4f}"
        f" ({figures.scenes} held-out scenes, {figures.instances} instances)"
    )
    if options.json:
        options.json.write_text(json.dumps(asdict(figures), indent=2) + "\n")


if __name__ == "__main__":
    main()
