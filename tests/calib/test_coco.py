"""COCO annotation files: masks against pycocotools, images where people keep them, and broken files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask  # type: ignore[import-untyped]

from samq.calib.coco import CocoSource, decode_segmentation
from samq.errors import BadInput

SIZE = (20, 30)
SQUARE = [[5, 5, 10, 5, 10, 10, 5, 10]]


def write_coco(path: Path, segmentations: list[Any], images_folder: Path, **image: Any) -> Path:
    """An annotation file about the one image a.png of 20×30 pixels, which is written too."""
    images_folder.mkdir(parents=True, exist_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", SIZE[::-1], (1, 2, 3)).save(images_folder / "a.png")
    entry = {"id": 7, "file_name": "a.png", "height": SIZE[0], "width": SIZE[1], **image}
    annotations = [{"image_id": 7, "iscrowd": 0, "segmentation": item} for item in segmentations]
    path.write_text(json.dumps({"images": [entry], "annotations": annotations}))
    return path


def ring() -> NDArray[np.bool_]:
    mask = np.zeros(SIZE, dtype=np.bool_)
    mask[3:15, 4:20] = True
    mask[6:10, 8:12] = False
    return mask


def run_lengths(mask: NDArray[np.bool_]) -> list[int]:
    down_columns = mask.T.ravel()
    changes = np.flatnonzero(np.diff(down_columns)) + 1
    edges = np.concatenate([[0], changes, [mask.size]])
    return ([0] if down_columns[0] else []) + [int(length) for length in np.diff(edges)]


def test_run_lengths_keep_holes() -> None:
    segmentation = {"size": list(SIZE), "counts": run_lengths(ring())}
    assert np.array_equal(decode_segmentation(segmentation, SIZE), ring())


@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 1.0])
def test_compressed_run_lengths_as_pycocotools_writes_them(density: float) -> None:
    for size in [SIZE, (700, 900)]:
        mask = np.random.default_rng(0).random(size) < density
        encoded = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        decoded = decode_segmentation({"size": list(size), "counts": encoded["counts"].decode()}, size)
        assert np.array_equal(decoded, mask)


def test_polygons_are_united() -> None:
    other = [15, 5, 20, 5, 20, 10]
    union = decode_segmentation([*SQUARE, other, [1, 1, 2, 2]], SIZE)
    parts = decode_segmentation(SQUARE, SIZE) | decode_segmentation([other], SIZE)
    assert np.array_equal(union, parts)
    assert decode_segmentation(SQUARE, SIZE).sum() == 25


@pytest.mark.parametrize(
    "segmentation",
    [
        "text",
        {"size": [20, 30]},
        {"size": [30, 20], "counts": [600]},
        {"size": 600, "counts": [600]},
        {"counts": [599]},
        {"counts": [-1, 601]},
        {"counts": [600.0]},
        {"counts": None},
        {"counts": "5"},
        {"counts": "P"},
        {"counts": "ü"},
        [[0, 0, 1e9, 0, 1e9, 1e9]],
        [[float("nan"), 0, 5, 0, 5, 5]],
        [[0, 0, 5, 0, 5, 5, 5]],
        [[None, 0, 5, 0, 5, 5]],
        [5],
        [{"x": 1}],
    ],
    ids=str,
)
def test_broken_segmentation_makes_the_image_unreadable(tmp_path: Path, segmentation: Any) -> None:
    source = CocoSource(write_coco(tmp_path / "a.json", [segmentation], tmp_path))
    with pytest.raises(BadInput, match=r"^a\.png: bad segmentation"):
        source[0]


def test_crowds_and_empty_masks_are_left_out(tmp_path: Path) -> None:
    path = write_coco(tmp_path / "a.json", [SQUARE, [], {"counts": [600]}, [[1, 1, 2, 2]]], tmp_path)
    content = json.loads(path.read_text())
    content["annotations"].append({"image_id": 7, "iscrowd": 1, "segmentation": {"counts": [0, 600]}})
    path.write_text(json.dumps(content))
    sample = CocoSource(path)[0]
    assert sample.name == "a.png"
    assert sample.masks is not None
    assert np.array_equal(sample.masks, decode_segmentation(SQUARE, SIZE)[None])


def test_no_instance_is_not_the_same_as_no_ground_truth(tmp_path: Path) -> None:
    masks = CocoSource(write_coco(tmp_path / "a.json", [[]], tmp_path))[0].masks
    assert masks is not None
    assert masks.shape == (0, *SIZE)
    assert CocoSource(write_coco(tmp_path / "b.json", [], tmp_path))[0].masks is None


@pytest.mark.parametrize(
    ("annotations", "images"),
    [
        ("a.json", ""),
        ("a.json", "images"),
        ("instances_val2017.json", "val2017"),
        ("annotations/instances_val2017.json", "val2017"),
        ("annotations/instances_val2017.json", "images/val2017"),
        ("annotations/mine.json", "mine"),
        ("annotations/instances_default.json", "images"),
    ],
)
def test_images_are_found_in_the_usual_places(tmp_path: Path, annotations: str, images: str) -> None:
    source = CocoSource(write_coco(tmp_path / annotations, [SQUARE], tmp_path / images))
    assert source[0].image.shape == (*SIZE, 3)


def test_images_in_a_folder_that_is_named(tmp_path: Path) -> None:
    path = write_coco(tmp_path / "a/b/c.json", [SQUARE], tmp_path / "far away")
    assert len(CocoSource(path, tmp_path / "far away")) == 1
    with pytest.raises(BadInput, match=r"name their folder as .*c\.json:IMAGES_FOLDER"):
        CocoSource(path)
    with pytest.raises(BadInput, match="nowhere"):
        CocoSource(path, tmp_path / "nowhere")


def test_pixels_as_stored(tmp_path: Path) -> None:
    path = write_coco(tmp_path / "a.json", [SQUARE], tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", SIZE[::-1]).save(tmp_path / "a.png", exif=exif)
    assert CocoSource(path)[0].image.shape == (*SIZE, 3)


def test_sizes_that_disagree(tmp_path: Path) -> None:
    source = CocoSource(write_coco(tmp_path / "a.json", [SQUARE], tmp_path, height=30, width=20))
    with pytest.raises(BadInput, match=r"^a\.png: \(20, 30\) pixels .* stored, .* say \(30, 20\)"):
        source[0]


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "\xff",
        "[" * 100_000,
        "[]",
        "null",
        "{}",
        '{"images": []}',
        '{"annotations": []}',
        '{"images": [], "annotations": []}',
        '{"images": [{"id": 1}], "annotations": []}',
        '{"images": [{"id": 1, "file_name": 5}], "annotations": []}',
        '{"images": [{"id": 1, "file_name": "\\ud800.jpg"}], "annotations": []}',
        '{"images": [{"id": 1, "file_name": "a", "height": "x", "width": 1}], "annotations": []}',
        '{"images": [{"id": 1, "file_name": "a"}], "annotations": [5]}',
        '{"images": [{"id": 1, "file_name": "a"}], "annotations": [{"segmentation": [[1]]}]}',
    ],
    ids=range(15),
)
def test_files_that_are_not_coco(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(BadInput, match=r"^.*a\.json: not (valid JSON|a COCO instances file) ") as caught:
        CocoSource(path)
    assert "\n" not in str(caught.value)


def test_segmentations_of_other_images_are_refused(tmp_path: Path) -> None:
    path = write_coco(tmp_path / "a.json", [SQUARE], tmp_path)
    content = json.loads(path.read_text())
    content["annotations"][0]["image_id"] = 101
    path.write_text(json.dumps(content))
    with pytest.raises(BadInput, match="no segmentation has the id of one of the images"):
        CocoSource(path)


def test_fingerprint_covers_annotations_and_images(tmp_path: Path) -> None:
    path = write_coco(tmp_path / "a.json", [SQUARE], tmp_path)
    first = CocoSource(path).fingerprint()
    write_coco(path, [SQUARE, SQUARE], tmp_path)
    second = CocoSource(path).fingerprint()
    Image.new("RGB", SIZE[::-1], (9, 9, 9)).save(tmp_path / "a.png")
    assert len({first, second, CocoSource(path).fingerprint()}) == 3
