"""Images as RGB arrays, from files and from what users' datasets return, and the folder of images.

A picture file is outside data: whatever is wrong with it becomes one `BadInput` line that names the file,
so that a run over thousands of photos can count it and go on.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from samq.errors import BadInput

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_FORMATS = ("JPEG", "PNG", "WEBP")
_EDGE_BYTES = 64 * 1024


@dataclass(frozen=True)
class Sample:
    """One image with the instances that are known on it.

    Attributes:
        name: Path relative to the source, or `dataset[3]`.
        image: uint8 [H, W, 3], RGB.
        masks: bool [n, H, W], one non-empty instance each; n is 0 where the ground truth has no instance on
            this image. None where the source has no ground truth.
    """

    name: str
    image: NDArray[np.uint8]
    masks: NDArray[np.bool_] | None


class ImageSource(Protocol):
    """A finite, ordered collection of images that are read one at a time.

    Attributes:
        description: One line for logs and reports.
        unreadable: "name: reason" of each item that `samq.calib.sources.take` had to skip.
    """

    description: str
    unreadable: list[str]

    def __len__(self) -> int:
        """Number of candidates, the unreadable ones included."""
        ...

    def __getitem__(self, index: int) -> Sample:
        """Read one item. Raises BadInput ("name: reason") when it is unreadable, IndexError past the end."""
        ...

    def fingerprint(self) -> str:
        """Hex digest that changes with the images and stays when they are copied elsewhere."""
        ...


class FolderSource:
    """All jpg, png and webp files below a folder, in the order of their relative paths, upright (EXIF).

    Symbolic links are followed, each real folder is visited once, and names with a leading dot are skipped.
    A sub-folder that cannot be listed counts as one unreadable candidate.
    """

    def __init__(self, folder: Path) -> None:
        """Raises BadInput when there is no candidate below `folder`."""
        self._folder = folder
        self._paths = _candidates(folder)
        if not self._paths:
            raise BadInput(f"{folder}: no {', '.join(SUFFIXES)} file in it or below; name another folder")
        self.description = f"folder {folder} ({len(self._paths)} images)"
        self.unreadable: list[str] = []

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Sample:
        name = self._paths[index]
        return Sample(printable(name), read_image(self._folder / name, name), masks=None)

    def fingerprint(self) -> str:
        return fingerprint_of_files(self._folder, self._paths)


def _candidates(folder: Path) -> list[str]:
    found: list[str] = []
    visited: set[tuple[int, int]] = set()

    def not_listed(error: OSError) -> None:
        found.append(os.path.relpath(error.filename, folder))

    for parent, folders, files in os.walk(folder, followlinks=True, onerror=not_listed):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in visited:
            folders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        images = (name for name in files if name.lower().endswith(SUFFIXES) and not name.startswith("."))
        found.extend(os.path.relpath(os.path.join(parent, name), folder) for name in images)
    return sorted(found)


def read_image(path: Path, name: str, *, upright: bool = True) -> NDArray[np.uint8]:
    """Read the first frame of a JPEG, PNG or WebP file as uint8 [H, W, 3] RGB.

    Args:
        path: The file.
        name: What to call it in an error.
        upright: Turn the image as its EXIF orientation says; False gives the pixels as stored.

    Raises:
        BadInput: it is missing, not a regular file, empty, truncated, corrupt, of another format, or larger
            than Pillow's limit against decompression bombs.
    """
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise BadInput(f"{printable(name)}: not a file that can be read")
        if not size:
            raise BadInput(f"{printable(name)}: the file is empty")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=_FORMATS) as image:
                return to_rgb(_upright(image) if upright else image)
    except BadInput:
        raise
    except UnidentifiedImageError as error:
        raise BadInput(f"{printable(name)}: not a JPEG, PNG or WebP image") from error
    except Exception as error:  # Pillow's decoders raise a dozen types on corrupt files
        raise BadInput(f"{printable(name)}: {reason(error)}") from error


def _upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF orientation says, or as stored where the EXIF part is broken."""
    image.load()
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # the pixels have been read; Pillow raises what it likes on broken EXIF
        return image


def to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    """Any Pillow image as uint8 [H, W, 3]: transparency over white (as transformers does), 16 bits to 8."""
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.float64) * (255 / 65535)
        return np.repeat(np.rint(grey).clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)
    if image.has_transparency_data:
        opaque = image.convert("RGBA")
        white = Image.new("RGBA", opaque.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, opaque)
    return np.array(image.convert("RGB"), dtype=np.uint8)


def as_array(value: Any) -> Any:
    """A tensor of any device and precision as an array; anything else as it is."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        return (value.float() if value.is_floating_point() else value).numpy()
    return value


def as_rgb(value: Any) -> NDArray[np.uint8]:
    """A PIL image, or uint8 or 0..1 floats [H, W, 3] or [3, H, W], as uint8 [H, W, 3].

    Raises:
        ValueError: it is anything else.
    """
    if isinstance(value, Image.Image):
        try:
            return to_rgb(value)
        except Exception as error:  # a file that was opened lazily is only decoded here
            raise ValueError(reason(error)) from error
    array = as_array(value)
    if isinstance(array, np.ndarray) and array.ndim == 3 and array.size and 3 in array.shape[::2]:
        pixels = array if array.shape[2] == 3 else array.transpose(1, 2, 0)
        if pixels.dtype == np.uint8:
            return np.ascontiguousarray(pixels)
        if np.issubdtype(pixels.dtype, np.floating) and pixels.min() >= 0 and pixels.max() <= 1:
            return np.ascontiguousarray(np.rint(pixels * 255).astype(np.uint8))
    raise ValueError(
        f"the image is {described(value)}; return a PIL image, uint8 [H, W, 3] or [3, H, W], or floats from 0 to 1"
    )


def as_masks(value: Any, size: tuple[int, ...]) -> NDArray[np.bool_]:
    """Bool or integers [n, H, W], non-zero on the instance, as bool without the empty instances.

    Raises:
        ValueError: they are anything else, or do not have the image's `size` (H, W).
    """
    array = np.asarray(as_array(value))
    if array.ndim != 3 or array.shape[1:] != size or array.dtype.kind not in "bui":
        raise ValueError(f"the masks are {described(value)}; return bool or integers [n, {size[0]}, {size[1]}]")
    masks: NDArray[np.bool_] = array != 0
    return masks[masks.any(axis=(1, 2))]


def described(value: Any) -> str:
    """The type of a value, with its shape, precision and range where it has them."""
    array = as_array(value)
    if not isinstance(array, np.ndarray):
        return f"of type {type(value).__name__}"
    values = f" with values from {array.min():g} to {array.max():g}" if array.size and array.dtype.kind in "fui" else ""
    return f"{type(value).__name__} {array.dtype} {list(array.shape)}{values}"


def fingerprint_of_files(folder: Path, names: Iterable[str]) -> str:
    """SHA-256 over the names, sizes and first and last 64 KiB of files; a missing one counts as missing."""
    digest = hashlib.sha256()
    for name in names:
        digest.update(os.fsencode(name) + b"\0")
        path = os.path.join(folder, name)
        if not os.path.isfile(path):  # opening a pipe would wait for its writer
            digest.update(b"missing\0")
            continue
        try:
            with open(path, "rb") as file:
                size = file.seek(0, os.SEEK_END)
                digest.update(f"{size}\0".encode())
                file.seek(0)
                digest.update(file.read(_EDGE_BYTES))
                file.seek(max(size - _EDGE_BYTES, 0))
                digest.update(file.read(_EDGE_BYTES))
        except OSError:
            digest.update(b"unreadable\0")
    return digest.hexdigest()


def printable(name: str) -> str:
    """A file name that can be written as UTF-8 on one line, whatever bytes and line breaks it has."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def reason(error: BaseException) -> str:
    """What went wrong, on one line: the operating system's words, or the type and its message."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
