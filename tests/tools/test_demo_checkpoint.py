"""The shipped demo checkpoint, loaded as a user's checkpoint is."""

import pytest
import torch
from transformers import Sam2Model

from samq.tools.demo.evaluate import CHECKPOINT, evaluate
from samq.tools.demo.model import demo_config
from samq.tools.demo.scenes import held_out_scene

MAX_BYTES = 14_000_000


@pytest.fixture(scope="module")
def model() -> Sam2Model:
    model, report = Sam2Model.from_pretrained(CHECKPOINT, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    return model


def test_the_weights_are_small_enough_to_ship() -> None:
    assert (CHECKPOINT / "model.safetensors").stat().st_size <= MAX_BYTES


def test_the_configuration_is_the_one_in_the_code(model: Sam2Model) -> None:
    shipped, coded = model.config, demo_config()
    for part in ("prompt_encoder_config", "mask_decoder_config"):
        assert getattr(shipped, part).hidden_size == getattr(coded, part).hidden_size
    assert shipped.vision_config.backbone_feature_sizes == coded.vision_config.backbone_feature_sizes
    assert shipped.vision_config.backbone_config.blocks_per_stage == [3, 4, 8, 1]


def test_prompts_and_image_share_one_positional_encoding(model: Sam2Model) -> None:
    torch.testing.assert_close(
        model.shared_image_embedding.positional_embedding,
        model.prompt_encoder.shared_embedding.positional_embedding,
    )


def test_the_model_segments_held_out_scenes(model: Sam2Model) -> None:
    figures = evaluate(model, (held_out_scene(index) for index in range(8)))
    assert figures.scenes == 8
    assert figures.box_miou > 0.75
    assert figures.click_miou > 0.6
