"""Which prompts are shown, and what their pictures show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from samq.calib.processor import SamProcessor
from samq.calib.sources import Sample
from samq.engines.predictor import Predictor
from samq.tools.evaluate import BOX, CLICK, Answer, Record, evaluate
from samq.tools.report.examples import BEST, MEDIAN, WORST, choose, draw_examples
from samq.tools.report.panels import BASELINE, DIFFERENCE, PANELS, PHOTO, QUANTIZED, SIDE, draw_panels

SIZE = 64
GREY = 128


def _record(agreement: float, share: float = 0.1, kind: str = BOX, prompt: Sequence[float] = (0, 0, 9, 9)) -> Record:
    return Record("one", kind, list(prompt), None, share, None, None, agreement, 1.0, 1.0)


def test_the_worst_the_median_and_the_best_are_chosen() -> None:
    records = [_record(value / 100) for value in range(101)]
    chosen = {rank: [record.agreement for record in found] for rank, found in choose(records[::-1]).items()}
    assert chosen == {WORST: [0.0, 0.01, 0.02], MEDIAN: [0.5, 0.51], BEST: [1.0]}


@pytest.mark.parametrize("count", range(8))
def test_no_prompt_is_shown_twice(count: int) -> None:
    chosen = [record for found in choose([_record(value / 10) for value in range(count)]).values() for record in found]
    assert len(chosen) == len({record.agreement for record in chosen}) <= count
    assert len(chosen) >= min(count, 4)


def test_of_equally_good_ones_the_largest_is_best() -> None:
    records = [_record(1.0, share) for share in (0.1, 0.5, 0.2, 0.0, 0.3, 0.4, 0.05)]
    assert choose(records)[BEST][0].share == 0.5


def _mask(box: tuple[int, int, int, int], height: int = SIZE, width: int = SIZE) -> NDArray[np.bool_]:
    mask = np.zeros((height, width), bool)
    left, top, right, bottom = box
    mask[top:bottom, left:right] = True
    return mask


def _pixels(image: Image.Image) -> NDArray[np.int64]:
    return np.asarray(image).astype(np.int64)


def _coloured(image: Image.Image, channel: int) -> NDArray[np.bool_]:
    """Where one of red and blue is far above the other."""
    pixels = _pixels(image)
    return pixels[..., channel] - pixels[..., 2 - channel] > 60


def test_the_difference_is_what_each_model_alone_covers() -> None:
    before, after = _mask((0, 0, 40, 64)), _mask((24, 0, 64, 64))
    photo = np.full((SIZE, SIZE, 3), GREY, np.uint8)
    panels = draw_panels(photo, Answer(_record(0.5, prompt=(0, 0, 63, 63)), before, after, None))
    orange, blue = (_coloured(panels[DIFFERENCE], channel) for channel in (0, 2))
    first, second = 24 * SIDE // SIZE, 40 * SIDE // SIZE  # masks this large are shown whole
    assert blue[:, : first - 1].all()
    assert not blue[:, first + 1 :].any()
    assert orange[:, second + 1 :].all()
    assert not orange[:, : second - 1].any()
    assert _coloured(panels[BASELINE], 2).mean() == pytest.approx(before.mean(), abs=0.01)
    assert _coloured(panels[QUANTIZED], 0).mean() == pytest.approx(after.mean(), abs=0.01)


def test_equal_masks_differ_nowhere() -> None:
    mask = _mask((10, 10, 30, 30))
    panels = draw_panels(np.full((SIZE, SIZE, 3), GREY, np.uint8), Answer(_record(1.0), mask, mask, mask))
    assert np.ptp(_pixels(panels[DIFFERENCE])) == 0


@pytest.mark.parametrize(("height", "width"), [(40, 90), (90, 40), (1, 300), (300, 1), (700, 900)])
def test_all_pictures_have_the_shape_of_the_photo(height: int, width: int) -> None:
    mask = _mask((0, 0, 1, 1), height, width)
    record = _record(1.0, kind=CLICK, prompt=(width - 1, height - 1))
    panels = draw_panels(np.zeros((height, width, 3), np.uint8), Answer(record, mask, mask, mask))
    assert tuple(panels) == PANELS
    (size,) = {image.size for image in panels.values()}
    assert max(size) == SIDE
    assert size[0] / size[1] == pytest.approx(width / height, rel=0.05) or min(size) <= 2


def test_a_small_object_is_shown_enlarged_and_framed() -> None:
    mask = _mask((300, 200, 310, 210), 480, 640)
    answer = Answer(_record(1.0, prompt=(300, 200, 309, 209)), mask, mask, None)
    panels = draw_panels(np.full((480, 640, 3), GREY, np.uint8), answer)
    assert _coloured(panels[BASELINE], 2).mean() > 10 * mask.mean()
    framed = (_pixels(panels[PHOTO]) != GREY).any(axis=2)
    assert framed.sum() > (_pixels(panels[PHOTO])[..., 2] < 60).sum()  # the prompt's box, and the frame around it


def test_the_true_mask_is_outlined_where_it_is_known() -> None:
    mask, truth = _mask((8, 8, 24, 24)), _mask((30, 30, 60, 60))
    photo = np.full((SIZE, SIZE, 3), GREY, np.uint8)
    with_truth, without = (draw_panels(photo, Answer(_record(1.0), mask, mask, known)) for known in (truth, None))
    assert (_pixels(with_truth[BASELINE]) == 255).all(axis=2).any()
    assert not (_pixels(without[BASELINE]) == 255).all(axis=2).any()


class Halves:
    """An engine for both parts that answers every prompt with the left part of the image, `share` of it."""

    inputs: Sequence[str] = ()
    outputs: Sequence[str] = ()
    shapes: Mapping[str, Sequence[int | str]] = {"point_coords": ["batch", "prompts", "points", 2]}

    def __init__(self, share: float) -> None:
        self.width = int(SIZE * share)

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Features, or one answer a prompt."""
        if "pixel_values" in feeds:
            return {"high_res_features_0": np.zeros((1, 1, SIZE, SIZE), np.float32)}
        prompts = feeds["point_coords"].shape[1]
        masks = np.full((1, prompts, 4, SIZE, SIZE), -5, np.float32)
        masks[..., : self.width] = 5
        scores = np.ones((1, prompts, 4), np.float32)
        return {"masks": masks, "iou_scores": scores, "object_score_logits": np.ones((1, prompts, 1), np.float32)}


def _samples(*names: str) -> list[Sample]:
    masks = np.stack([_mask((4 * i, 4 * i, 4 * i + 20, 4 * i + 20)) for i in range(4)])
    return [Sample(name, np.full((SIZE, SIZE, 3), 40 * index, np.uint8), masks) for index, name in enumerate(names)]


def test_pictures_are_written_and_named_by_rank(tmp_path: Path) -> None:
    pair = [Predictor(engine, engine) for engine in (Halves(0.5), Halves(0.75))]
    processor = SamProcessor({"size": {"height": SIZE, "width": SIZE}}, "a test")
    records = evaluate(*pair, _samples("a", "b"), processor)
    drawn = draw_examples(*pair, _samples("b", "a"), processor, records, tmp_path)
    assert [(example["rank"], example["place"]) for example in drawn] == [
        (WORST, 1), (WORST, 2), (WORST, 3), (MEDIAN, 1), (MEDIAN, 2), (BEST, 1),
    ]  # fmt: skip
    named = [tmp_path / file for example in drawn for file in example["panels"].values()]
    assert sorted(named) == sorted((tmp_path / "examples").iterdir())
    assert all(Image.open(file).format == "WEBP" for file in named)
    assert drawn[0].items() >= {"agreement": pytest.approx(2 / 3), "kind": records[0].kind}.items()


def test_an_image_that_is_gone_the_second_time_is_left_out(tmp_path: Path) -> None:
    pair = [Predictor(engine, engine) for engine in (Halves(0.5), Halves(0.75))]
    processor = SamProcessor({"size": {"height": SIZE, "width": SIZE}}, "a test")
    records = evaluate(*pair, _samples("a"), processor)
    assert draw_examples(*pair, _samples("other"), processor, records, tmp_path) == []
    assert draw_examples(*pair, [], processor, [], tmp_path) == []
