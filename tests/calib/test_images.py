"""Folders of images: every kind of file that a user may have, and every way in which one can be broken."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from samq.calib.images import FolderSource, as_masks, as_rgb, printable, read_image
from samq.errors import BadInput

COLOUR = (200, 10, 30)


def flat(height: int = 4, width: int = 6) -> Image.Image:
    return Image.new("RGB", (width, height), COLOUR)


def noise(path: Path) -> bytes:
    """A 64×64 image of random pixels, in the format of the file's suffix."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path.read_bytes()


def test_sub_folders_suffixes_and_odd_names(tmp_path: Path) -> None:
    names = ["b.JPG", "a b/ü 日本.png", "a b/x.webp", "c.jpeg", os.fsdecode(b"z\xff.png")]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        flat().save(tmp_path / name)
    for ignored in ("notes.txt", "._b.jpg", ".thumbnails/x.png"):
        (tmp_path / ignored).parent.mkdir(exist_ok=True)
        (tmp_path / ignored).write_text("no image")
    source = FolderSource(tmp_path)
    found = [source[index].name for index in range(len(source))]
    assert found == ["a b/x.webp", "a b/ü 日本.png", "b.JPG", "c.jpeg", "z\\xff.png"]
    assert source.description == f"folder {tmp_path} (5 images)"


def test_links_are_followed_once(tmp_path: Path) -> None:
    (tmp_path / "photos/sub").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    flat().save(tmp_path / "photos/a.png")
    flat().save(tmp_path / "elsewhere/b.png")
    (tmp_path / "photos/sub/loop").symlink_to(tmp_path / "photos")
    (tmp_path / "photos/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos/self.png").symlink_to("self.png")
    source = FolderSource(tmp_path / "photos")
    assert [source[0].name, source[1].name, len(source)] == ["a.png", "link/b.png", 3]
    with pytest.raises(BadInput, match=r"self\.png: Too many levels of symbolic links"):
        source[2]


def test_folder_without_images(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="name another folder"):
        FolderSource(tmp_path)


def test_fingerprint_follows_content_not_place_or_time(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    noise(tmp_path / "one/a.png")
    noise(tmp_path / "one/b.png")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    os.utime(tmp_path / "two/a.png", (0, 0))
    first = FolderSource(tmp_path / "one").fingerprint()
    assert FolderSource(tmp_path / "two").fingerprint() == first
    flat().save(tmp_path / "two/b.png")
    assert FolderSource(tmp_path / "two").fingerprint() != first


def test_missing_file_has_a_fingerprint_too(tmp_path: Path) -> None:
    noise(tmp_path / "a.png")
    os.mkfifo(tmp_path / "pipe.png")
    source = FolderSource(tmp_path)
    before = source.fingerprint()
    (tmp_path / "a.png").unlink()
    assert source.fingerprint() != before


def test_exif_orientation(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90° clockwise to show
    flat(4, 6).save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg", "a").shape == (6, 4, 3)
    assert read_image(tmp_path / "a.jpg", "a", upright=False).shape == (4, 6, 3)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
def test_broken_exif_does_not_matter(tmp_path: Path, name: str) -> None:
    flat().save(tmp_path / name, exif=b"Exif\0\0garbage")
    assert read_image(tmp_path / name, name).shape == (4, 6, 3)


def test_sixteen_bit_grey_keeps_its_brightness(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 128 * 257, 65535]], dtype=np.uint16)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", "a").tolist() == [[[0] * 3, [128] * 3, [255] * 3]]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparency_lies_over_white(tmp_path: Path, mode: str) -> None:
    clear = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    (clear.convert("LA") if mode == "LA" else clear.quantize(2) if mode == "PA" else clear).save(tmp_path / "a.png")
    assert (read_image(tmp_path / "a.png", "a") == 255).all()


@pytest.mark.parametrize(("mode", "suffix"), [("CMYK", "jpg"), ("L", "jpg"), ("P", "png"), ("1", "png")])
def test_other_colour_modes(tmp_path: Path, mode: str, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    flat().convert(mode).save(path)
    with Image.open(path) as image:
        expected = np.array(image.convert("RGB"))
    assert np.array_equal(read_image(path, "a"), expected)


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    second = Image.new("RGB", (6, 4), (0, 0, 0))
    flat().save(tmp_path / "a.webp", save_all=True, append_images=[second], lossless=True)
    assert tuple(read_image(tmp_path / "a.webp", "a")[0, 0]) == COLOUR


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
def test_truncated_files(tmp_path: Path, name: str) -> None:
    content = noise(tmp_path / name)
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(BadInput, match=f"^{name}: ") as caught:
        read_image(tmp_path / name, name)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_images(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("hello")
    flat().save(tmp_path / "gif.png", format="GIF")
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    expected = {
        "empty.png": "the file is empty",
        "text.png": "not a JPEG, PNG or WebP image",
        "gif.png": "not a JPEG, PNG or WebP image",
        "folder.png": "not a file that can be read",
        "pipe.png": "not a file that can be read",
        "missing.png": "No such file or directory",
    }
    for name, why in expected.items():
        with pytest.raises(BadInput, match=f"^{name}: {why}$"):
            read_image(tmp_path / name, name)


def test_decompression_bomb(tmp_path: Path) -> None:
    Image.new("1", (14000, 14000)).save(tmp_path / "bomb.png")
    with pytest.raises(BadInput, match=r"^bomb\.png: DecompressionBombError"):
        read_image(tmp_path / "bomb.png", "bomb.png")


def test_printable_is_one_line_of_utf8() -> None:
    assert printable("ü\n" + os.fsdecode(b"\xfe")) == "ü\\n\\xfe"


@pytest.mark.parametrize(
    "image",
    [
        flat(),
        np.full((4, 6, 3), COLOUR, dtype=np.uint8),
        torch.tensor(COLOUR, dtype=torch.uint8)[:, None, None].expand(3, 4, 6),
        torch.tensor(COLOUR)[:, None, None].expand(3, 4, 6) / 255,
        (np.full((4, 6, 3), COLOUR) / 255).astype(np.float64),
    ],
    ids=["pil", "uint8 HWC", "uint8 CHW tensor", "float tensor", "float array"],
)
def test_images_that_a_dataset_may_return(image: object) -> None:
    assert np.array_equal(as_rgb(image), np.full((4, 6, 3), COLOUR, dtype=np.uint8))


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (5, "of type int"),
        (np.zeros((4, 6), dtype=np.uint8), r"ndarray uint8 \[4, 6\]"),
        (np.zeros((4, 0, 3), dtype=np.uint8), r"\[4, 0, 3\]"),
        (np.zeros((4, 6, 3), dtype=np.int64), "int64"),
        (torch.full((3, 4, 6), -1.5), r"Tensor float32 \[3, 4, 6\] with values from -1\.5 to -1\.5"),
        (torch.full((3, 4, 6), float("nan")), "from nan to nan"),
    ],
)
def test_images_that_it_may_not(image: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        as_rgb(image)


def test_truncated_file_that_a_dataset_opened(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(noise(tmp_path / "a.png")[:6000])
    with Image.open(tmp_path / "a.png") as image, pytest.raises(ValueError, match="truncated"):
        as_rgb(image)


def test_masks_of_a_dataset() -> None:
    masks = torch.zeros(2, 4, 6, dtype=torch.uint8)
    masks[1, 2, 3] = 255
    assert as_masks(masks, (4, 6)).tolist() == (masks[1:] > 0).tolist()
    assert as_masks(np.zeros((0, 4, 6), dtype=np.bool_), (4, 6)).shape == (0, 4, 6)
    for wrong in (masks[0], masks.float(), masks.transpose(1, 2), "cat"):
        with pytest.raises(ValueError, match=r"return bool or integers \[n, 4, 6\]"):
            as_masks(wrong, (4, 6))
