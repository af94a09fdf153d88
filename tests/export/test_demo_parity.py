"""The demo checkpoint's ONNX parts together equal the torch model on the prompts of held-out scenes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from exported import largest_error

from samq.calib.checkpoint import Checkpoint, load_checkpoint
from samq.calib.parts import PARTS
from samq.calib.prompts import Prompts, box_of, boxes, click_of, clicks
from samq.engines.onnxruntime import OnnxRuntimeEngine
from samq.engines.predictor import Predictor
from samq.export.parts import float_part, save_part
from samq.export.trace import trace
from samq.tools.demo.dataset import CHECKPOINT, HeldOutScenes

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return load_checkpoint(str(CHECKPOINT))


@pytest.fixture(scope="module")
def engines(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    paths = [tmp_path_factory.mktemp("demo") / f"{part}.onnx" for part in PARTS]
    for part, path in zip(PARTS, paths, strict=True):
        save_part(float_part(trace(checkpoint.model, part), checkpoint.model, half=False), path)
    return Predictor(*(OnnxRuntimeEngine(path) for path in paths))


def _compare(
    checkpoint: Checkpoint, engines: Predictor, pixels: np.ndarray, prompts: Prompts, mask: np.ndarray | None = None
) -> np.ndarray:
    """Check every output; returns the masks."""
    answer = engines.decode(engines.encode(pixels), prompts.coords, prompts.labels, mask)
    asked = {
        "input_points": torch.from_numpy(prompts.coords)[None],
        "input_labels": torch.from_numpy(prompts.labels)[None],
    }
    if mask is not None:
        asked["input_masks"] = torch.from_numpy(mask)[None]
    for multimask, part in ((False, slice(0, 1)), (True, slice(1, None))):
        with torch.no_grad():
            expected = checkpoint.model(
                pixel_values=torch.from_numpy(pixels)[None], multimask_output=multimask, **asked
            )
        assert largest_error(answer.masks[:, part], expected.pred_masks[0].numpy()) <= TOLERANCE
        assert largest_error(answer.scores[:, part], expected.iou_scores[0].numpy()) <= TOLERANCE
        object_scores = expected.object_score_logits.numpy().reshape(-1)
        assert largest_error(answer.object_scores, object_scores) <= TOLERANCE
    return answer.masks


@pytest.mark.parametrize("index", [0, 1])
def test_boxes_clicks_and_masks_of_a_scene(checkpoint: Checkpoint, engines: Predictor, index: int) -> None:
    scene = HeldOutScenes()[index]
    processed = checkpoint.processor(scene["image"])
    objects = [mask for mask in scene["masks"] if mask.any()]
    corners = np.array([box_of(mask) for mask in objects], np.float32).reshape(-1, 2, 2)
    points = np.array([click_of(mask) for mask in objects], np.float32).reshape(-1, 1, 2)
    placed = [checkpoint.processor.points_to_model(marks, processed.original_size) for marks in (corners, points)]
    assert len(objects) > 1
    pixels = processed.pixel_values
    masks = _compare(checkpoint, engines, pixels, boxes(placed[0].reshape(-1, 4)))
    _compare(checkpoint, engines, pixels, clicks(placed[1][:, 0]))
    again = boxes(placed[0][:1].reshape(-1, 4))
    _compare(checkpoint, engines, pixels, again, masks[:1, 0])
