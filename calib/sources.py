"""Where images come from: a folder, a COCO annotation file, or a user's own `torch.utils.data.Dataset`.

`open_source` makes a source of what the user wrote, `split` parts it into calibration and evaluation images,
and `take` draws a seeded subset, one image in memory at a time.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

from samq.calib.coco import CocoSource
from samq.calib.images import (
    FolderSource,
    ImageSource,
    Sample,
    as_array,
    as_masks,
    as_rgb,
    described,
    reason,
)
from samq.errors import BadInput, UsageError

__all__ = ["DatasetSource", "ImageSource", "Sample", "absolute", "open_source", "split", "take"]

FINGERPRINTED = 16  # items of a dataset; reading all of them would take as long as using them


def open_source(spec: str | Path) -> ImageSource:
    """Open a folder, a COCO `.json` file, `annotations.json:images_folder` or `module:factory`.

    A path that exists comes first, whatever colons it has.

    Raises:
        BadInput: there is no such thing, or there are no images in it.
    """
    text = os.path.expanduser(spec)
    if os.path.isdir(text):
        return FolderSource(Path(text))
    if os.path.isfile(text):
        if not text.lower().endswith(".json"):
            raise BadInput(f"{spec}: neither a folder nor a COCO .json file; name the folder of the images")
        return CocoSource(Path(text))
    for colon in re.finditer(":", text):
        annotations, folder = text[: colon.start()], text[colon.end() :]
        if annotations.lower().endswith(".json") and os.path.isfile(annotations):
            return CocoSource(Path(annotations), Path(folder).expanduser())
    names = re.fullmatch(r"(\w+(?:\.\w+)*):(\w+(?:\.\w+)*)", text)
    if names and not names[1].endswith(".json"):
        return DatasetSource(names[1], names[2])
    raise BadInput(
        f"'{spec}': no such folder or file; give a folder of images, a COCO .json file, or module:factory of a dataset"
    )


def absolute(spec: str) -> str:
    """What `open_source` takes, with its paths in full, so that it means the same from any directory."""
    if os.path.exists(os.path.expanduser(spec)):
        return os.path.abspath(os.path.expanduser(spec))
    for colon in re.finditer(":", spec):
        annotations, folder = spec[: colon.start()], spec[colon.end() :]
        if annotations.lower().endswith(".json") and os.path.isfile(os.path.expanduser(annotations)):
            return ":".join(os.path.abspath(os.path.expanduser(path)) for path in (annotations, folder))
    return spec


def take(source: ImageSource, count: int | None, seed: int = 0) -> Iterator[Sample]:
    """Draw `count` readable images at random without replacement, or all of them when `count` is None.

    The order depends on the number of candidates and the seed alone, and a larger count continues a smaller
    one. Unreadable items are noted in `source.unreadable` and others drawn instead, so fewer than `count`
    come only when the source is exhausted.

    Raises:
        UsageError: `count` is below 1, or the seed is out of range.
        BadInput: while iterating, when not a single image was readable.
    """
    if count is not None and count < 1:
        raise UsageError(f"{count} images asked for; ask for at least 1")
    return _drawn(source, _shuffled(len(source), seed), count)


def _drawn(source: ImageSource, order: list[int], count: int | None) -> Iterator[Sample]:
    taken = 0
    for index in order:
        try:
            sample = source[index]
        except BadInput as error:
            if str(error) not in source.unreadable:
                source.unreadable.append(str(error))
            continue
        yield sample
        del sample  # before the next one is read
        taken += 1
        if taken == count:
            return
    if not taken:
        first = f"; the first: {source.unreadable[0]}" if source.unreadable else ""
        raise BadInput(f"{source.description}: no readable image{first}; give other images")


def split(source: ImageSource, held_out: int, seed: int = 0) -> tuple[ImageSource, ImageSource]:
    """Part a source into (calibration, evaluation) views without overlap, deterministically.

    The second has `held_out` random items, the first has the others. Each notes its own `unreadable` items.

    Raises:
        UsageError: `held_out` is negative or leaves nothing to calibrate on, or the seed is out of range.
    """
    if not 0 <= held_out < len(source):
        raise UsageError(
            f"{held_out} images to hold out of {source.description}; hold out 0 to {len(source) - 1},"
            " or give more images"
        )
    order = _shuffled(len(source), seed)
    return (
        _Part(source, sorted(order[held_out:]), "calibration"),
        _Part(source, sorted(order[:held_out]), "evaluation"),
    )


def _shuffled(length: int, seed: int) -> list[int]:
    """A permutation of range(length); NumPy keeps the stream of RandomState the same in all versions."""
    if not 0 <= seed < 2**32:
        raise UsageError(f"seed {seed}; give a number from 0 to {2**32 - 1}")
    return [int(index) for index in np.random.RandomState(seed).permutation(length)]


class _Part:
    """Some items of a source, in the source's order."""

    def __init__(self, source: ImageSource, indices: Sequence[int], purpose: str) -> None:
        self._source = source
        self._indices = indices
        self.description = f"{len(indices)} {purpose} images of {source.description}"
        self.unreadable: list[str] = []

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Sample:
        return self._source[self._indices[index]]

    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self._source.fingerprint()} {list(self._indices)}".encode()).hexdigest()


class DatasetSource:
    """What `factory()` of a user's module returns: any object with `__len__` and `__getitem__`.

    An item is an image, a tuple (image, masks), or a dict with `image` and perhaps `masks`. An image is a PIL
    image, a uint8 [H, W, 3] or [3, H, W] array or tensor, or such floats from 0 to 1. Masks are bool or
    integers [n, H, W], non-zero on the instance. A tuple's second member may also be a dict with `masks`, or
    a label (a number, a string), which is ignored.
    """

    def __init__(self, module: str, factory: str) -> None:
        """Import `module` (the current directory is on the path) and call its `factory` without arguments.

        Raises:
            BadInput: any of that failed, or the result is not a dataset with at least one item.
        """
        self._spec = f"{module}:{factory}"
        if "" not in sys.path:
            sys.path.insert(0, "")
        try:
            function = attrgetter(factory)(importlib.import_module(module))
        except (Exception, SystemExit) as error:
            raise BadInput(
                f"{self._spec}: cannot be imported ({reason(error)}); try `python -c 'import {module}'`"
            ) from error
        if not callable(function):
            raise BadInput(f"{self._spec}: is {described(function)}; name a function that returns the dataset")
        try:
            self._dataset = function()
        except (Exception, SystemExit) as error:
            raise BadInput(f"{self._spec}: calling it without arguments failed ({reason(error)})") from error
        if not (hasattr(self._dataset, "__len__") and hasattr(self._dataset, "__getitem__")):
            raise BadInput(
                f"{self._spec}: returned {described(self._dataset)}; return an object with __len__ and __getitem__"
            )
        try:
            self._length = len(self._dataset)
        except Exception as error:
            raise BadInput(f"{self._spec}: its dataset has no length ({reason(error)})") from error
        if not self._length:
            raise BadInput(f"{self._spec}: its dataset is empty")
        self.description = f"dataset {self._spec} ({self._length} images)"
        self.unreadable: list[str] = []

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self._length:
            raise IndexError(index)
        name = f"dataset[{index}]"
        try:
            item = self._dataset[index]
        except (Exception, SystemExit) as error:
            raise BadInput(f"{name}: {reason(error)}") from error
        try:
            image, masks = _image_and_masks(item)
            rgb = as_rgb(image)
            return Sample(name, rgb, None if masks is None else as_masks(masks, rgb.shape[:2]))
        except ValueError as error:
            raise BadInput(f"{name}: {error}") from error

    def fingerprint(self) -> str:
        """Over the name, the length, and some evenly spaced images."""
        digest = hashlib.sha256(f"{self._spec} {self._length}".encode())
        for index in sorted({round(i) for i in np.linspace(0, self._length - 1, FINGERPRINTED)}):
            try:
                digest.update(self[index].image.tobytes())
            except BadInput as error:
                digest.update(str(error).encode())
        return digest.hexdigest()


def _image_and_masks(item: Any) -> tuple[Any, Any]:
    if isinstance(item, dict):
        if "image" not in item:
            raise ValueError(f"returned a dict with {sorted(map(str, item))}; it needs 'image'")
        return item["image"], item.get("masks")
    if isinstance(item, tuple | list) and item:
        second = item[1] if len(item) > 1 else None
        if isinstance(second, dict):
            return item[0], second.get("masks")
        return item[0], second if np.ndim(as_array(second)) else None
    return item, None
