"""COCO instance annotations: images with their ground-truth masks.

The coordinates of an annotation refer to the pixels as they are stored in the file, so EXIF orientation is
not applied here, unlike in a folder. An image whose stored size is not the annotated one is refused.

Polygons are drawn by pycocotools, whose rounding is the one COCO's scores are defined with. Run lengths are
decoded here, because pycocotools 2.0.11 returns uninitialized memory for those that are too short.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask  # type: ignore[import-untyped]

from samq.calib.images import Sample, fingerprint_of_files, printable, read_image, reason
from samq.errors import BadInput
from samq.files import sha256_of


@dataclass(frozen=True)
class _Entry:
    """One element of the annotation file's `images`."""

    name: str
    key: int | str
    size: tuple[int, int] | None  # (height, width), where the file gives it


class CocoSource:
    """The images of a COCO annotation file in the order of their names, pixels and masks as stored.

    Crowd regions and empty masks are left out. Masks are None throughout when no annotation of the file has a
    segmentation (captions, boxes, or a test set's list of images).
    """

    def __init__(self, annotations: Path, images: Path | None = None) -> None:
        """Read the annotation file; `images` is the folder of its images, looked for when None.

        Raises:
            BadInput: no JSON, no COCO, or none of its images was found.
        """
        self._annotations = annotations
        self._entries, self._segmentations = _read(annotations)
        self._folder = _image_folder(annotations, images, [entry.name for entry in self._entries])
        unused = "" if self._segmentations is not None else "; without segmentations, so boxes are not used"
        self.description = f"COCO {annotations} ({len(self._entries)} images in {self._folder}{unused})"
        self.unreadable: list[str] = []

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Sample:
        entry = self._entries[index]
        name = printable(entry.name)
        image = read_image(self._folder / entry.name, entry.name, upright=False)
        size = (image.shape[0], image.shape[1])
        if entry.size not in (None, size):
            raise BadInput(f"{name}: {size} pixels (H, W) are stored, but the annotations say {entry.size}")
        if self._segmentations is None:
            return Sample(name, image, masks=None)
        try:
            masks = [decode_segmentation(item, size) for item in self._segmentations.get(entry.key, ())]
        except (ValueError, TypeError) as error:
            raise BadInput(f"{name}: bad segmentation in {self._annotations}: {error}") from error
        found = [mask for mask in masks if mask.any()]
        return Sample(name, image, np.stack(found) if found else np.zeros((0, *size), dtype=np.bool_))

    def fingerprint(self) -> str:
        files = fingerprint_of_files(self._folder, [entry.name for entry in self._entries])
        return hashlib.sha256(f"{sha256_of(self._annotations)} {files}".encode()).hexdigest()


def _read(path: Path) -> tuple[list[_Entry], dict[int | str, list[Any]] | None]:
    """The images by name, and the segmentations by image id (None where the file has none at all)."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise BadInput(f"{path}: {reason(error)}") from error
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: not valid JSON ({reason(error)}); fetch or export the file again") from error
    try:
        entries = [_Entry(item["file_name"], item["id"], _size(item)) for item in content["images"]]
        entries.sort(key=lambda entry: entry.name)
        segmentations = defaultdict[int | str, list[Any]](list)
        for item in content["annotations"]:
            if item.get("segmentation") and not item.get("iscrowd"):
                segmentations[item["image_id"]].append(item["segmentation"])
        has_masks = any("segmentation" in item for item in content["annotations"])
        for entry in entries:
            os.fsencode(entry.name)  # raises when it cannot be a file's name
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise _not_coco(path, reason(error)) from error
    if not entries:
        raise _not_coco(path, "no images")
    if segmentations and not segmentations.keys() & {entry.key for entry in entries}:
        raise _not_coco(path, "no segmentation has the id of one of the images as its image_id")
    return entries, segmentations if has_masks else None


def _size(item: dict[str, Any]) -> tuple[int, int] | None:
    return (int(item["height"]), int(item["width"])) if item.get("height") and item.get("width") else None


def _not_coco(path: Path, what: str) -> BadInput:
    return BadInput(
        f"{path}: not a COCO instances file ({what}); it needs `images` with id and file_name,"
        " and `annotations` with image_id and segmentation"
    )


def _image_folder(annotations: Path, given: Path | None, names: list[str]) -> Path:
    """The folder that holds most of the images: `given`, or the usual places around the annotation file."""
    if given is not None:
        folders = [given]
        places = str(given)
    else:
        stem = annotations.stem
        below = ("", "images", stem, stem.rpartition("_")[2])  # instances_train2017 -> train2017
        bases = (annotations.parent, annotations.parent.parent)
        folders = [base / first / second for base, first, second in product(bases, ("", "images"), below)]
        places = f"its folder or the one above, nor in {', '.join(below[1:])} there"
    counts = [sum(os.path.isfile(folder / name) for name in names) if folder.is_dir() else 0 for folder in folders]
    if not any(counts):
        raise BadInput(
            f"{annotations}: none of its {len(names)} images (first: {printable(names[0])}) is in {places};"
            f" name their folder as {annotations}:IMAGES_FOLDER"
        )
    return folders[counts.index(max(counts))]


def decode_segmentation(segmentation: Any, size: tuple[int, int]) -> NDArray[np.bool_]:
    """A COCO segmentation as a bool mask [H, W].

    Args:
        segmentation: A list of polygons [x0, y0, x1, y1, ...] in pixels, whose union is meant, or
            {"size": [H, W], "counts": run lengths}, with the counts as numbers or as COCO's string.
        size: (H, W) of the image.

    Raises:
        ValueError: it is neither, or does not fit the size.
        TypeError: its parts are not the numbers they should be.
    """
    if isinstance(segmentation, list):
        return _from_polygons(segmentation, size)
    if not isinstance(segmentation, dict) or "counts" not in segmentation:
        raise ValueError("neither polygons nor run lengths")
    if list(segmentation.get("size", size)) != list(size):
        raise ValueError(f"run lengths for {segmentation['size']} pixels, the image has {list(size)}")
    counts = segmentation["counts"]
    return _from_run_lengths(_parse_counts(counts) if isinstance(counts, str) else counts, size)


def _from_polygons(polygons: list[Any], size: tuple[int, int]) -> NDArray[np.bool_]:
    height, width = size
    limit = 2 * max(size)  # pycocotools crashes on coordinates far away, and hangs on those that are not finite
    for polygon in polygons:
        points = np.asarray(polygon, dtype=np.float64)
        if points.ndim != 1 or points.size % 2:
            raise ValueError("a polygon is not a flat list of x, y pairs")
        if not np.all(np.abs(points) <= limit):
            raise ValueError(f"a polygon reaches further than {limit} pixels from the origin")
    areas = [polygon for polygon in polygons if len(polygon) >= 6]  # two points enclose nothing
    if not areas:
        return np.zeros(size, dtype=np.bool_)
    union = coco_mask.merge(coco_mask.frPyObjects(areas, height, width))
    return _from_run_lengths(_parse_counts(union["counts"].decode()), size)


def _from_run_lengths(counts: Sequence[int], size: tuple[int, int]) -> NDArray[np.bool_]:
    """Runs of 0 and 1 in turn, starting with 0, down the columns."""
    height, width = size
    if not all(type(count) is int and count >= 0 for count in counts) or sum(counts) != height * width:
        raise ValueError(f"run lengths do not add up to {height}×{width} pixels")
    values = np.arange(len(counts)) % 2 == 1
    return np.ascontiguousarray(np.repeat(values, counts).reshape(width, height).T)


def _parse_counts(text: str) -> list[int]:
    """Run lengths from COCO's string (`rleToString` of cocoapi's maskApi.c).

    Characters 48 to 111 carry 6 bits: 5 of a little-endian two's complement number, and 32 for "more follow".
    From the fourth on, a number is the difference to the run length two before.
    """
    counts: list[int] = []
    value = shift = 0
    for char in text:
        bits = ord(char) - 48
        if not 0 <= bits < 64:
            raise ValueError(f"{char!r} in a string of run lengths")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        counts.append(value + counts[-2] if len(counts) > 2 else value)
        value = shift = 0
    if shift:
        raise ValueError("a string of run lengths that breaks off")
    return counts
