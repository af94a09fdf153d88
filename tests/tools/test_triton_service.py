"""What `sam` answers, without Triton: preprocessing, masks at the image's size, prompts in portions, the store."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from exported import float_predictor
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from small_model import IMAGE_SIZE

from samq.calib.processor import Processed, SamProcessor
from samq.engines.predictor import Predictor
from samq.errors import BadInput, UsageError
from samq.tools.metrics import mask_of
from samq.tools.triton.preprocessing import ROUNDING, measured
from samq.tools.triton.served.images import mask_at
from samq.tools.triton.served.requests import Limits
from samq.tools.triton.served.service import SamService
from samq.tools.triton.served.store import EmbeddingStore, Encoded, UnknownHandle

SIZES = st.integers(1, 70)
LIMITS = Limits(image_pixels=10_000, prompts=8, points=4, mask_pixels=100_000)


def picture(height: int, width: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("changed", [{}, {"resample": 3}, {"image_mean": [0.1, 0.2, 0.3]}, {"do_normalize": False}])
@pytest.mark.parametrize("shape", [(40, 70), (300, 200), (1, 1)])
def test_pixels_are_those_of_the_processor(changed: dict[str, Any], shape: tuple[int, int]) -> None:
    processor = SamProcessor({"size": {"height": 64, "width": 64}, **changed}, "test")
    image = picture(*shape)
    found = measured(processor)(image)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, processor(image).pixel_values, rtol=0, atol=ROUNDING)


class Darkening(SamProcessor):
    """A processor that bends the values between black and white."""

    def __call__(self, image: NDArray[np.uint8]) -> Processed:
        return super().__call__((255 * (image / 255.0) ** 2).astype(np.uint8))


def test_a_processor_that_does_more_is_refused() -> None:
    with pytest.raises(BadInput, match=r"more than resize, scale and shift.*preprocessor_config\.json"):
        measured(Darkening.from_checkpoint(None, 64))


@settings(max_examples=60)
@given(SIZES, SIZES, st.integers(1, 600), SIZES)
def test_masks_are_enlarged_as_in_the_evaluation(h: int, w: int, height: int, width: int) -> None:
    """`mask_of` is torch's interpolation; a pixel may differ where the logit is zero to within rounding."""
    logits = np.random.default_rng(h * 71 + w).standard_normal((h, w), np.float32)
    found, expected = mask_at(logits, (height, width)), mask_of(logits, (height, width))
    assert found.shape == expected.shape
    assert np.count_nonzero(found != expected) <= 1e-3 * expected.size


def encoded(megabytes: float) -> Encoded:
    return Encoded({"features": np.zeros(int(megabytes * 1e6), np.uint8)}, (4, 4))


def test_the_store_keeps_what_was_used_last_within_its_bytes() -> None:
    store = EmbeddingStore(3_000_000)
    handles = [store.keep(encoded(1)) for _ in range(3)]
    assert (len(store), store.nbytes) == (3, 3_000_000)
    store.find(handles[0])
    store.keep(encoded(0.5))
    assert (len(store), store.nbytes) == (3, 2_500_000)
    store.find(handles[0])
    with pytest.raises(UnknownHandle, match="send the image again"):
        store.find(handles[1])


def test_an_image_larger_than_the_store_is_refused_and_nothing_is_lost() -> None:
    store = EmbeddingStore(1_000_000)
    handle = store.keep(encoded(1))
    with pytest.raises(UsageError, match="store_mib"):
        store.keep(encoded(1.1))
    store.find(handle)


def test_handles_are_random_and_differ() -> None:
    store = EmbeddingStore(10)
    handles = {store.keep(Encoded({}, (1, 1))) for _ in range(1000)}
    assert len(handles) == 1000
    assert all(len(handle) == 32 for handle in handles)


def test_the_store_holds_its_bytes_under_many_threads() -> None:
    store = EmbeddingStore(1_000_000)

    def visit(seed: int) -> None:
        for _ in range(200):
            handle = store.keep(encoded(0.1))
            with contextlib.suppress(UnknownHandle):  # where the others were quick
                assert store.find(handle).nbytes == 100_000
            assert store.nbytes <= 1_000_000

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(visit, range(8)))
    assert (len(store), store.nbytes) == (10, 1_000_000)


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    return float_predictor(tmp_path_factory.mktemp("parts"))


def service_of(predictor: Predictor, prompts_at_once: int = 16) -> SamService:
    preprocessing = measured(SamProcessor.from_checkpoint(None, IMAGE_SIZE))
    store = EmbeddingStore(1 << 24)
    return SamService(predictor, preprocessing, store, LIMITS, multimasks=3, prompts_at_once=prompts_at_once)


@pytest.mark.parametrize("multimask", [False, True])
@pytest.mark.parametrize("with_masks", [False, True])
def test_prompts_in_portions_are_answered_as_all_at_once(
    predictor: Predictor, multimask: bool, with_masks: bool
) -> None:
    random = np.random.default_rng(0)
    inputs: dict[str, NDArray[Any]] = {
        "image": picture(60, 90),
        "points": random.uniform(0, 60, (5, 2, 2)).astype(np.float32),
        "labels": random.integers(0, 2, (5, 2)),
        "multimask": np.array([multimask]),
    }
    if with_masks:
        inputs["mask_input"] = random.standard_normal((5, 32, 32), np.float32)
    whole, portions = (service_of(predictor, at_once).answer(inputs) for at_once in (16, 2))
    assert whole["masks"].shape == (5, 3 if multimask else 1, 60, 90)
    for name in ("scores", "object_scores", "logits"):
        np.testing.assert_allclose(portions[name], whole[name], rtol=1e-3, atol=1e-3)


def test_a_box_with_points_is_one_prompt(predictor: Predictor) -> None:
    service, image = service_of(predictor), {"image": picture(64, 64)}
    box, point = np.array([[5, 5, 40, 40]], np.float32), np.array([[[20, 20]]], np.float32)
    both = service.answer({**image, "boxes": box, "points": point, "labels": np.zeros((1, 1), np.int32)})
    corners = np.concatenate([box.reshape(1, 2, 2), point], axis=1) * (IMAGE_SIZE / 64)
    features = predictor.encode(service.preprocessing(image["image"]))
    expected = predictor.decode(features, corners.astype(np.float32), np.array([[2, 3, 0]]))
    np.testing.assert_allclose(both["logits"][0, 0], expected.masks[0, 0], rtol=1e-3, atol=1e-3)


def test_a_refused_request_does_not_run_the_encoder(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    service = service_of(predictor)
    monkeypatch.setattr(predictor.encoder, "run", lambda feeds: pytest.fail("the encoder ran"))
    with pytest.raises(BadInput, match="NaN"):
        service.answer({"image": picture(9, 9), "points": np.full((1, 1, 2), np.nan, np.float32)})
    boxes = np.tile(np.array([1, 1, 9, 9], np.float32), (8, 1))
    with pytest.raises(BadInput, match="max_mask_pixels"):
        service.answer({"image": picture(99, 99), "boxes": boxes, "multimask": np.array([True])})


def test_the_limit_of_image_pixels_is_exact(predictor: Predictor) -> None:
    service = service_of(predictor)
    assert service.answer({"image": picture(100, 100)})["masks"].shape == (0, 1, 100, 100)
    with pytest.raises(BadInput, match="10000 of max_image_pixels"):
        service.answer({"image": picture(100, 101)})
