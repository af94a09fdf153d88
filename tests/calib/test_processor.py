"""The processor against its definition in numpy and against transformers' own scaling of points."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers.models.sam2.processing_sam2 import Sam2Processor

from samq.calib.processor import SamProcessor
from samq.errors import BadInput, UsageError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def picture(height: int, width: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def definition(image: NDArray[np.uint8], side: int) -> NDArray[np.float64]:
    resized = np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR))
    return np.asarray(((resized / 255 - MEAN) / STD).transpose(2, 0, 1))


@pytest.mark.parametrize("shape", [(40, 70), (90, 3), (3, 90), (1, 1), (64, 64)])
def test_pixels_are_what_the_definition_gives(shape: tuple[int, int]) -> None:
    image = picture(*shape)
    processed = SamProcessor.from_checkpoint(None, 64)(image)
    assert processed.original_size == shape
    assert processed.pixel_values.dtype == np.float32
    assert processed.pixel_values.flags.c_contiguous
    np.testing.assert_allclose(processed.pixel_values, definition(image, 64), atol=1e-6)


@pytest.mark.parametrize("value", [0, 1])
def test_dark_images_are_not_taken_for_floats(value: int) -> None:
    image = np.full((5, 7, 3), value, dtype=np.uint8)
    values = SamProcessor.from_checkpoint(None, 16)(image).pixel_values
    np.testing.assert_allclose(values, definition(image, 16), atol=1e-6)


def test_defaults_are_those_of_sam2(tmp_path: Path) -> None:
    for directory in (None, tmp_path, tmp_path / "missing"):
        assert SamProcessor.from_checkpoint(directory, None).image_size == 1024


def test_settings_of_a_checkpoint(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "image_processor_type": "Sam2ImageProcessorFast",
        "size": {"height": 32, "width": 32},
        "mask_size": {"height": 8, "width": 8},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "resample": 2,
        "do_pad": None,
        "device": None,
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    processor = SamProcessor.from_checkpoint(tmp_path, None)
    white = np.full((4, 4, 3), 255, dtype=np.uint8)
    assert np.allclose(processor(white).pixel_values, np.ones((3, 32, 32)))
    assert SamProcessor.from_checkpoint(tmp_path, 48)(white).pixel_values.shape == (3, 48, 48)

    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "Sam2Processor"}))
    assert SamProcessor.from_checkpoint(tmp_path, None).image_size == 32
    nested = {"image_processor": {**settings, "size": {"height": 40, "width": 40}}}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    assert SamProcessor.from_checkpoint(tmp_path, None).image_size == 40


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"size": {"longest_edge": 1024}, "do_pad": true, "pad_size": {"height": 1024, "width": 1024}}',
        '{"size": {"height": 32, "width": 64}}',
        '{"size": {"height": -1, "width": -1}}',
        '{"size": "large"}',
        '{"image_mean": [0.5]}',
        '{"image_std": [0, 0, 0], "size": {"height": 32, "width": 32}}',
        '{"do_resize": false, "size": {"height": 32, "width": 32}}',
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
def test_settings_that_make_no_sam2_image(tmp_path: Path, content: str) -> None:
    (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.raises(BadInput, match=r"preprocessor_config\.json: .*restore the original file$"):
        SamProcessor.from_checkpoint(tmp_path, None)


def test_image_size_must_be_positive() -> None:
    with pytest.raises(UsageError, match="image size 0"):
        SamProcessor.from_checkpoint(None, 0)


def test_points_and_boxes_scale_as_in_transformers() -> None:
    processor = SamProcessor.from_checkpoint(None, 512)
    points = np.random.default_rng(0).uniform(0, 500, (3, 5, 2)).astype(np.float32)
    expected = Sam2Processor._normalize_coordinates(None, 512, torch.from_numpy(points), (333, 501))
    assert np.array_equal(processor.points_to_model(points, (333, 501)), expected.numpy())
    boxes = points[:, :2]
    expected = Sam2Processor._normalize_coordinates(
        None, 512, torch.from_numpy(boxes.reshape(3, 4)), (333, 501), is_bounding_box=True
    )
    assert np.array_equal(processor.points_to_model(boxes, (333, 501)).reshape(3, 4), expected.numpy())
