"""Opening, drawing from and splitting sources, and datasets of a user's own module."""

from __future__ import annotations

import json
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from samq.calib.images import FolderSource
from samq.calib.sources import ImageSource, Sample, open_source, split, take
from samq.errors import BadInput, UsageError


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Ten images, of which 3.png and 7.png are broken."""
    folder = tmp_path / "my photos"
    folder.mkdir()
    for index in range(10):
        Image.new("RGB", (4, 4), (index, 0, 0)).save(folder / f"{index}.png")
    (folder / "3.png").write_bytes(b"")
    (folder / "7.png").write_bytes(b"broken")
    return folder


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An importable file user_data.py in the current directory, still empty."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield tmp_path / "user_data.py"
    sys.modules.pop("user_data", None)


def names(samples: Iterator[Sample]) -> list[str]:
    return [sample.name for sample in samples]


def test_take_skips_and_notes_the_unreadable(photos: Path) -> None:
    source = open_source(photos)
    assert sorted(names(take(source, None))) == [f"{index}.png" for index in (0, 1, 2, 4, 5, 6, 8, 9)]
    noted = ["3.png: the file is empty", "7.png: not a JPEG, PNG or WebP image"]
    assert sorted(source.unreadable) == noted
    assert len(names(take(source, 8, seed=1))) == 8
    assert sorted(source.unreadable) == noted


def test_take_is_seeded_and_a_larger_count_continues(photos: Path) -> None:
    source = open_source(photos)
    few = names(take(source, 4, seed=5))
    assert names(take(source, 6, seed=5))[:4] == few
    assert names(take(open_source(str(photos)), 4, seed=5)) == few
    assert few == ["9.png", "5.png", "2.png", "4.png"]
    assert names(take(source, 4, seed=6)) != few
    assert len(names(take(source, 100))) == 8


def test_take_holds_one_image_at_a_time(photos: Path) -> None:
    seen: list[weakref.ref[Sample]] = []

    class Watched(FolderSource):
        def __getitem__(self, index: int) -> Sample:
            assert not seen or seen[-1]() is None
            sample = super().__getitem__(index)
            seen.append(weakref.ref(sample))
            return sample

    assert sum(1 for _ in map(id, take(Watched(photos), None))) == 8


def test_take_with_nothing_readable(photos: Path) -> None:
    for path in photos.iterdir():
        path.write_bytes(b"")
    with pytest.raises(BadInput, match=r"my photos \(10 images\): no readable image; the first: \d\.png: the"):
        list(take(open_source(photos), 3))


@pytest.mark.parametrize(("count", "seed"), [(0, 0), (-1, 0), (1, -1), (1, 2**32)])
def test_take_checks_its_numbers_at_once(photos: Path, count: int, seed: int) -> None:
    with pytest.raises(UsageError):
        take(open_source(photos), count, seed)


def test_split_is_disjoint_whole_and_deterministic(photos: Path) -> None:
    source = open_source(photos)
    calibration, evaluation = split(source, 4, seed=3)
    assert (len(calibration), len(evaluation)) == (6, 4)
    both = names(take(calibration, None)) + names(take(evaluation, None))
    assert sorted(both) == sorted(names(take(source, None)))
    assert len(calibration.unreadable) + len(evaluation.unreadable) == 2
    again = split(open_source(photos), 4, seed=3)
    assert [view.fingerprint() for view in again] == [calibration.fingerprint(), evaluation.fingerprint()]
    assert calibration.fingerprint() != evaluation.fingerprint()
    assert calibration.description == f"6 calibration images of folder {photos} (10 images)"


def test_split_limits(photos: Path) -> None:
    source = open_source(photos)
    for held_out in (-1, 10):
        with pytest.raises(UsageError, match="hold out 0 to 9"):
            split(source, held_out)
    _, nothing = split(source, 0)
    with pytest.raises(BadInput, match="0 evaluation images"):
        list(take(nothing, 1))


def test_coco_with_colons_in_its_paths(photos: Path, tmp_path: Path) -> None:
    annotations = tmp_path / "a:b" / "c.json"
    annotations.parent.mkdir()
    annotations.write_text(json.dumps({"images": [{"id": 0, "file_name": "0.png"}], "annotations": []}))
    assert len(open_source(f"{annotations}:{photos}")) == 1
    photos.rename(tmp_path / "p:q.json")
    assert len(open_source(f"{annotations}:{tmp_path}/p:q.json")) == 1
    assert len(open_source(tmp_path / "p:q.json")) == 10


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("", "no such folder or file"),
        ("missing", "no such folder or file"),
        ("missing.json", "no such folder or file"),
        ("missing.json:images", "no such folder or file"),
        ("my module:make", "no such folder or file"),
        ("x" * 5000, "no such folder or file"),
        (__file__, "neither a folder nor a COCO .json file"),
        ("no_such_module_of_mine:make", "ModuleNotFoundError: No module named 'no_such_module_of_mine'"),
        ("json:no_such_function", "AttributeError"),
        ("json:__name__", "is of type str; name a function"),
        ("builtins:object", "returned of type object; return an object with __len__ and __getitem__"),
        ("builtins:list", "its dataset is empty"),
        ("json:loads", "calling it without arguments failed"),
    ],
)
def test_specs_that_name_nothing(spec: str, said: str) -> None:
    with pytest.raises(BadInput, match=said) as caught:
        open_source(spec)
    assert "\n" not in str(caught.value)


DATASET = """
import numpy as np
import torch
from PIL import Image

IMAGE = np.full((4, 6, 3), 9, dtype=np.uint8)
MASKS = np.ones((2, 4, 6), dtype=bool)

class Items(torch.utils.data.Dataset):
    items = [
        Image.fromarray(IMAGE), IMAGE, {"image": IMAGE, "masks": MASKS}, (IMAGE, MASKS), (IMAGE, 3),
        [torch.from_numpy(IMAGE), {"masks": torch.from_numpy(MASKS), "labels": [1, 2]}], {"image": IMAGE},
        "a.png", {"img": IMAGE}, (IMAGE, MASKS[:, :2]), None,
    ]
    def __len__(self):
        return 12
    def __getitem__(self, index):
        return self.items[index]

class Streaming(torch.utils.data.IterableDataset):
    pass

def stopped():
    raise SystemExit("usage: ...")
"""


def test_dataset_items(module: Path) -> None:
    module.write_text(DATASET)
    source: ImageSource = open_source("user_data:Items")
    assert source.description == "dataset user_data:Items (12 images)"
    samples = [source[index] for index in range(7)]
    assert [sample.name for sample in samples] == [f"dataset[{index}]" for index in range(7)]
    assert all(np.array_equal(sample.image, samples[0].image) for sample in samples)
    assert [None if s.masks is None else len(s.masks) for s in samples] == [None, None, 2, 2, None, 2, None]
    with pytest.raises(IndexError):
        source[12]
    assert len(names(take(source, None))) == 7
    unreadable = "\n".join(sorted(source.unreadable))
    assert "dataset[7]: the image is of type str; return a PIL image" in unreadable
    assert "dataset[8]: returned a dict with ['img']; it needs 'image'" in unreadable
    assert "dataset[9]: the masks are ndarray bool [2, 2, 6]" in unreadable
    assert "dataset[10]: the image is of type NoneType" in unreadable
    assert "dataset[11]: IndexError: list index out of range" in unreadable
    assert open_source("user_data:Items").fingerprint() == source.fingerprint()


def test_datasets_that_do_not_start(module: Path) -> None:
    module.write_text(DATASET)
    with pytest.raises(BadInput, match=r"user_data:Streaming: "):
        open_source("user_data:Streaming")
    with pytest.raises(BadInput, match=r"failed \(SystemExit: usage: \.\.\.\)"):
        open_source("user_data:stopped")


@pytest.mark.parametrize("content", ["def broken(:\n", "raise RuntimeError('two\\nlines')", "exit(3)"])
def test_modules_that_do_not_import(module: Path, content: str) -> None:
    module.write_text(content)
    with pytest.raises(BadInput, match=r"cannot be imported .*; try `python -c 'import user_data'`$") as caught:
        open_source("user_data:make")
    assert "\n" not in str(caught.value)
