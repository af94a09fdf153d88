import copy
import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Sam2Model

from samq.calib.prompts import box_of
from samq.tools.demo.bank import object_numbers
from samq.tools.demo.losses import prepare
from samq.tools.demo.model import demo_config, pixel_values
from samq.tools.demo.sampling import CLICKS, MAX_ZOOM, Prompts, bounding_boxes, sample_prompts, turned, zoomed
from samq.tools.demo.scenes import train_scene
from samq.tools.demo.train import Trainer, new_model, write_checkpoint


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.from_numpy(np.stack([object_numbers(train_scene(index)) for index in range(4)]))


@pytest.fixture(scope="module")
def prompts(ids: torch.Tensor) -> Prompts:
    torch.manual_seed(0)
    return sample_prompts(ids)


def test_clicks_lie_in_their_masks(prompts: Prompts) -> None:
    x, y = prompts.clicks.long().unbind(dim=-1)
    scene, prompt = torch.meshgrid(torch.arange(len(x)), torch.arange(CLICKS), indexing="ij")
    assert prompts.masks[scene, prompt, y, x].all()


def test_boxes_are_those_of_the_masks_up_to_jitter(prompts: Prompts) -> None:
    exact = bounding_boxes(prompts.masks[:, CLICKS:])
    size = (exact[..., 2:] - exact[..., :2]).repeat(1, 1, 2)
    moved = (prompts.boxes - exact).abs() / size
    assert (moved[prompts.present[:, CLICKS:]] <= 0.1 + 1e-5).all()
    np.testing.assert_array_equal(exact[0, 0].numpy(), box_of(prompts.masks[0, CLICKS].numpy()))


def test_turning_moves_image_and_objects_together(ids: torch.Tensor) -> None:
    images = ids[..., None].expand(-1, -1, -1, 3)
    turned_images, turned_ids = turned(images, ids)
    assert torch.equal(turned_images[..., 0], turned_ids)
    assert torch.equal(turned_ids.flatten(1).sort().values, ids.flatten(1).sort().values)


def test_zooming_magnifies_image_and_objects_together(ids: torch.Tensor) -> None:
    ids = ids.repeat(4, 1, 1)
    images = 20 * ids[..., None].expand(-1, -1, -1, 3)
    torch.manual_seed(2)
    zoomed_images, zoomed_ids = zoomed(images, ids)
    assert zoomed_images.dtype == zoomed_ids.dtype == torch.uint8
    unchanged = (zoomed_ids == ids).flatten(1).all(dim=1)
    assert 0 < unchanged.sum() < len(ids)
    assert torch.equal(zoomed_images[unchanged], images[unchanged])
    assert ((zoomed_images[..., 0] == 20 * zoomed_ids).float().mean(dim=(1, 2)) > 0.9).all()
    growth = (zoomed_ids > 0).sum() / (ids > 0).sum()
    assert 1 < growth < MAX_ZOOM**2


def test_what_is_hardly_seen_is_not_asked_for() -> None:
    ids = torch.zeros(3, 256, 256, dtype=torch.uint8)
    ids[0, :5, :5], ids[0, 100:150, 100:150] = 1, 2
    ids[1, :5, :5] = 1
    ids[2, 100:150, 100:150] = 1
    prompts = sample_prompts(ids)
    areas = prompts.masks.sum(dim=(2, 3))
    assert set(areas[0][prompts.present[0]].tolist()) == {2500}
    assert not prompts.present[1].any()
    assert prompts.present[2].any()


def test_pixel_values_are_normalized_as_imagenet() -> None:
    grey = pixel_values(torch.full((1, 2, 2, 3), 124, dtype=torch.uint8))
    assert grey.shape == (1, 3, 2, 2)
    torch.testing.assert_close(grey[0, :, 0, 0], torch.tensor([0.0056, 0.1352, 0.3565]), atol=1e-3, rtol=0)


def test_a_stage_pads_its_windows() -> None:
    vision = demo_config().vision_config
    backbone = vision.backbone_config
    paddings = [
        -height % window
        for (height, _), window in zip(vision.backbone_feature_sizes, backbone.window_size_per_stage, strict=False)
    ]
    assert any(paddings)
    assert backbone.global_attention_blocks


class FixedBank:
    """The first scenes, over and over, in place of a bank that draws."""

    device = torch.device("cpu")
    next_scene = 0

    def sample(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        scenes = [train_scene(index) for index in range(count)]
        images = torch.from_numpy(np.stack([scene.image for scene in scenes]))
        return images, torch.from_numpy(np.stack([object_numbers(scene) for scene in scenes]))


def trainer() -> Trainer:
    options = Namespace(batch=1, learning_rate=1e-3, warm_up=1, seed=0, weights=None, compile=False)
    return Trainer(FixedBank(), options)  # type: ignore[arg-type]


def test_training_resumes_where_it_stopped() -> None:
    straight = trainer()
    straight.advance(0.0)
    state = copy.deepcopy(straight.state())
    straight.advance(0.5)
    resumed = trainer()
    resumed.restore(state)
    resumed.advance(0.5)
    assert resumed.step == straight.step == 2
    for one, other in zip(straight.average.parameters(), resumed.average.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_training_leaves_what_the_model_computes_alone() -> None:
    torch.manual_seed(0)
    plain = new_model(torch.device("cpu"))
    for parameter in plain.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    prepared = copy.deepcopy(plain)
    prepare(prepared)
    pixels, boxes = torch.randn(1, 3, 256, 256), torch.tensor([[[20.0, 30.0, 90.0, 70.0]]])
    with torch.inference_mode():
        expected = plain(pixels, input_boxes=boxes, multimask_output=True).pred_masks
        answered = prepared(pixels, input_boxes=boxes, multimask_output=False).pred_masks
    torch.testing.assert_close(answered[:, :, 1:], expected)


def test_the_written_checkpoint_loads_as_a_users(tmp_path: Path) -> None:
    model = new_model(torch.device("cpu"))
    write_checkpoint(model, tmp_path / "checkpoint")
    loaded = Sam2Model.from_pretrained(tmp_path / "checkpoint")
    assert loaded.dtype == torch.float32
    for one, other in zip(model.parameters(), loaded.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)
    processor = json.loads((tmp_path / "checkpoint" / "preprocessor_config.json").read_text())
    assert processor["image_processor_type"] == "Sam2ImageProcessor"
