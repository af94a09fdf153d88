"""One image, any number of prompts, on engines of dynamic and of static shape."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from exported import float_model, float_predictor
from numpy.typing import NDArray
from small_model import IMAGE_SIZE, pixels

from samq.calib.parts import MASK_DECODER
from samq.engines.base import Arrays, BoundedEngine
from samq.engines.onnxruntime import OnnxRuntimeEngine
from samq.engines.predictor import MULTI, SINGLE, Predictions, Predictor
from samq.errors import UsageError
from samq.export.parts import float_part, save_part
from samq.export.trace import ANY_PROMPTS, StaticShape, trace

COORDS = (np.random.default_rng(0).random((5, 2, 2)) * IMAGE_SIZE).astype(np.float32)
LABELS = np.array([[1, 0], [2, 3], [1, 1], [2, 3], [1, 0]], np.int64)


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    return float_predictor(tmp_path_factory.mktemp("dynamic"))


@pytest.fixture(scope="module")
def static(dynamic: Predictor, tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    """Its decoder takes two prompts of three points at a time."""
    path = tmp_path_factory.mktemp("static") / "decoder.onnx"
    skeleton = trace(float_model(), MASK_DECODER, StaticShape(prompts=2, points=3))
    save_part(float_part(skeleton, float_model(), half=False), path)
    return Predictor(dynamic.encoder, OnnxRuntimeEngine(path))


def test_a_static_decoder_is_static(static: Predictor) -> None:
    assert static.decoder.shapes["point_coords"] == [1, 2, 3, 2]
    assert static.decoder.shapes["has_mask_input"] == [1, 2]


@pytest.mark.parametrize("prompts", [1, 2, 5])
@pytest.mark.parametrize("with_masks", [False, True])
def test_a_static_decoder_answers_any_number_of_prompts(
    dynamic: Predictor, static: Predictor, prompts: int, with_masks: bool
) -> None:
    features = dynamic.encode(pixels(1)[0].numpy())
    side = features["high_res_features_0"].shape[-2:]
    masks = np.random.default_rng(1).standard_normal((prompts, *side), np.float32) if with_masks else None
    padded = np.pad(COORDS, ((0, 0), (0, 1), (0, 0))), np.pad(LABELS, ((0, 0), (0, 1)), constant_values=-10)
    expected = dynamic.decode(features, padded[0][:prompts], padded[1][:prompts], masks)
    found = static.decode(features, COORDS[:prompts], LABELS[:prompts], masks)
    for field in ("masks", "scores", "object_scores"):
        exact = getattr(expected, field)
        assert getattr(found, field).shape == exact.shape
        np.testing.assert_allclose(getattr(found, field), exact, rtol=1e-3, atol=1e-4 * np.abs(exact).max())


def test_more_points_than_a_static_decoder_takes_is_one_line(static: Predictor) -> None:
    features = static.encode(pixels(1)[0].numpy())
    with pytest.raises(UsageError, match="3 points a prompt, not 4"):
        static.decode(features, np.zeros((1, 4, 2), np.float32), np.ones((1, 4), np.int64))


class Bounded(OnnxRuntimeEngine):
    """Takes two prompts of two points at most, as a plan with such a profile does."""

    largest = MappingProxyType({"prompts": 2, "points": 2})

    def run(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        assert feeds["point_coords"].shape[1] <= self.largest["prompts"]
        return super().run(feeds)


@pytest.mark.parametrize("points", [1, 2])
def test_a_decoder_of_dynamic_shape_gets_prompts_as_they_are(dynamic: Predictor, points: int, tmp_path: Path) -> None:
    """No prompt is filled up, however many the decoder takes at a time."""
    path = tmp_path / "decoder.onnx"
    save_part(float_part(trace(float_model(), MASK_DECODER, ANY_PROMPTS), float_model(), half=False), path)
    bounded = Predictor(dynamic.encoder, Bounded(path))
    assert isinstance(bounded.decoder, BoundedEngine)
    assert not isinstance(dynamic.decoder, BoundedEngine)
    features = dynamic.encode(pixels(1)[0].numpy())
    coords, labels = COORDS[:, :points], LABELS[:, :points]
    together, apart = (predictor.decode(features, coords, labels) for predictor in (dynamic, bounded))
    np.testing.assert_allclose(apart.masks, together.masks, rtol=1e-3, atol=1e-4 * np.abs(together.masks).max())
    np.testing.assert_allclose(apart.scores, together.scores, rtol=1e-4, atol=1e-5)
    with pytest.raises(UsageError, match=r"2 points a prompt, not 3; .*--max-points 3"):
        bounded.decode(features, np.zeros((1, 3, 2), np.float32), np.ones((1, 3), np.int64))


def test_prompts_do_not_see_each_other(dynamic: Predictor) -> None:
    features = dynamic.encode(pixels(1)[0].numpy())
    together = dynamic.decode(features, COORDS, LABELS)
    for index in range(len(COORDS)):
        alone = dynamic.decode(features, COORDS[index : index + 1], LABELS[index : index + 1])
        np.testing.assert_allclose(alone.masks[0], together.masks[index], rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(alone.scores[0], together.scores[index], rtol=1e-4, atol=1e-5)


def test_the_best_mask_is_the_single_one_or_the_best_scored_of_several() -> None:
    masks = np.arange(4, dtype=np.float32).reshape(1, 4, 1, 1)
    predictions = Predictions(masks, np.array([[0.9, 0.1, 0.7, 0.3]], np.float32), np.zeros(1, np.float32))
    assert predictions.best(0, ambiguous=False) == (np.float32(SINGLE), pytest.approx(0.9))
    assert predictions.best(0, ambiguous=True) == (np.float32(MULTI + 1), pytest.approx(0.7))
