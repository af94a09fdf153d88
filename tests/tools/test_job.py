"""Which images serve for what, and by what a job is known again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_model import recipe_of

from samq.calib.parts import IMAGE_ENCODER
from samq.calib.sources import ImageSource
from samq.errors import BadInput, UsageError
from samq.tools.demo.dataset import CHECKPOINT, IMAGES, SCENES
from samq.tools.job import MOST_SET_ASIDE, Data, Job, fingerprint, open_data

CALIBRATED, UNCALIBRATED = recipe_of("int8_w8a8"), recipe_of("int4_w4only_rtn")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for index in range(30):
        Image.fromarray(np.full((8, 8, 3), index, np.uint8)).save(folder / f"{index:02d}.png")
    return folder


def _names(source: ImageSource | None) -> set[str]:
    assert source is not None
    return {source[index].name for index in range(len(source))}


def test_no_image_is_calibrated_and_evaluated_on(photos: Path) -> None:
    data = open_data(Job("m", calib_data=str(photos)), CALIBRATED)
    calibrated, evaluated = _names(data.calibration), _names(data.evaluation)
    assert (len(calibrated), len(evaluated)) == (24, 6)
    assert not calibrated & evaluated
    assert "6 images set aside" in data.origin


@pytest.mark.parametrize("count", [1, 6, 30, 500])
def test_a_later_validate_with_another_number_of_images_sees_no_calibration_image(photos: Path, count: int) -> None:
    job = Job("m", calib_data=str(photos))
    calibrated = _names(open_data(job, CALIBRATED).calibration)
    later = open_data(replace(job, num_eval_samples=count), CALIBRATED)
    assert _names(later.calibration) == calibrated
    assert not _names(later.evaluation) & calibrated


def test_paths_mean_the_same_from_any_directory(photos: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(photos.parent)
    (photos.parent / "coco.json").write_text("{}")
    recipe = CALIBRATED
    job = Job.of(recipe, model="m", calib_data=photos.name, eval_data=f"coco.json:{photos.name}", seed=None)
    assert job == Job("m", calib_data=str(photos), eval_data=f"{photos.parent / 'coco.json'}:{photos}")
    assert Job.of(recipe, model=".", eval_data="module:factory") == Job(str(photos.parent), eval_data="module:factory")


def test_the_configs_own_path_serves_where_no_other_is_given(photos: Path) -> None:
    recipe = recipe_of("int8_w8a8", calib={"path": str(photos)})
    assert Job.of(recipe, model="m", calib_data=None).calib_data == str(photos)
    assert Job.of(recipe, model="m", calib_data="other").calib_data == "other"


def test_evaluation_data_changes_nothing_about_calibration(photos: Path) -> None:
    job = Job("m", calib_data=str(photos))
    data = open_data(replace(job, eval_data=str(photos)), CALIBRATED)
    assert _names(data.calibration) == _names(open_data(job, CALIBRATED).calibration)
    assert len(_names(data.evaluation)) == 30
    assert "--eval-data" in data.origin


def test_images_that_are_not_calibrated_on_are_all_evaluated_on(photos: Path) -> None:
    data = open_data(Job("m", calib_data=str(photos)), UNCALIBRATED)
    assert data.calibration is None
    assert len(_names(data.evaluation)) == 30


def test_without_images_a_config_that_needs_none_goes_on() -> None:
    assert open_data(Job("m"), UNCALIBRATED) == Data(None, None, "none: give --eval-data")
    with pytest.raises(UsageError, match="--calib-data"):
        open_data(Job("m"), CALIBRATED)


def test_a_few_images_are_all_calibrated_on(tmp_path: Path) -> None:
    for index in range(4):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{index}.png")
    data = open_data(Job("m", calib_data=str(tmp_path)), CALIBRATED)
    assert data.calibration is not None
    assert len(data.calibration) == 4
    assert data.evaluation is None
    assert "too small" in data.origin


def test_the_demo_has_held_out_scenes() -> None:
    data = open_data(Job(str(CHECKPOINT), calib_data=str(IMAGES)), CALIBRATED)
    assert data.calibration is not None
    assert data.evaluation is not None
    assert (len(data.calibration), len(data.evaluation)) == (len(list(IMAGES.glob("*.jpg"))), SCENES)
    assert MOST_SET_ASIDE < SCENES


def test_a_job_survives_json() -> None:
    job = Job("m", calib_data="c", parts=(IMAGE_ENCODER,), image_size=512, static_shapes=True, seed=3)
    assert Job.from_json(job.as_json()) == job
    for broken in ({"model": "m"}, job.as_json() | {"unknown": 1}):
        with pytest.raises(BadInput, match="--force"):
            Job.from_json(broken)


def test_the_fingerprint_tells_what_decides_the_weights(photos: Path, tmp_path: Path) -> None:
    job = Job("m", calib_data=str(photos))
    data = open_data(job, CALIBRATED)
    first = fingerprint(job, CALIBRATED, "c", data)
    assert fingerprint(replace(job, model="elsewhere", num_eval_samples=3), CALIBRATED, "c", data) == first
    (tmp_path / "photo.png").write_bytes((photos / "00.png").read_bytes())
    others = [
        fingerprint(job, recipe_of("int8_w8a8", smooth={"alpha": 0.6}), "c", data),
        fingerprint(job, CALIBRATED, "d", data),
        fingerprint(job, CALIBRATED, "c", open_data(Job("m", calib_data=str(tmp_path)), CALIBRATED)),
        fingerprint(replace(job, seed=1), CALIBRATED, "c", data),
        fingerprint(replace(job, parts=(IMAGE_ENCODER,)), CALIBRATED, "c", data),
        fingerprint(replace(job, image_size=256), CALIBRATED, "c", data),
    ]
    assert len({first, *others}) == 7


def test_the_fingerprint_tells_the_code(photos: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import samq

    job = Job("m", calib_data=str(photos))
    data = open_data(job, CALIBRATED)
    seen = set()
    for content in ("a = 1\n", "a = 2\n"):
        for package in ("calib", "quant", "export"):
            (tmp_path / package).mkdir(exist_ok=True)
            (tmp_path / package / "module.py").write_text(content)
        monkeypatch.setattr(samq, "__file__", str(tmp_path / "__init__.py"))
        seen.add(fingerprint(job, CALIBRATED, "c", data))
    monkeypatch.undo()
    assert len(seen | {fingerprint(job, CALIBRATED, "c", data)}) == 3
