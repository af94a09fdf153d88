"""A small checkpoint, images for it, and one finished job that all tests of the command line look at."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Browser, browser, missing_browser
from exported import float_model
from filelock import FileLock
from PIL import Image

from samq.tools import cli, latency


@dataclass(frozen=True)
class Answer:
    """What a command answered."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Its stdout as the one JSON object that it must be."""
        return json.loads(self.out)


@dataclass(frozen=True)
class Inputs:
    """Paths to start from."""

    checkpoint: Path
    photos: Path
    coco: Path


def samq(*arguments: object) -> Answer:
    """Run `samq-export` in this process, through its entry point."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["samq-export", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
            cli.main()
    finally:
        sys.argv = before
    return Answer(int(ended.value.code or 0), out.getvalue(), err.getvalue())


def refused(answer: Answer, code: int, *words: str) -> str:
    """The one line with which a command must have ended, with all of `words` in it."""
    lines = answer.err.strip().splitlines()
    assert answer.code == code, answer.err
    assert "Traceback" not in answer.err
    assert lines[-1].startswith("samq-export: ")
    assert all(word in lines[-1] for word in words), lines[-1]
    return lines[-1]


@pytest.fixture(autouse=True, scope="session")
def _short_measurements() -> None:
    latency.SECONDS.update(dict.fromkeys(latency.SECONDS, 0.2))


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What one build keeps for the next stays out of the user's home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def common(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of one run have in common, for what takes long to make."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """A folder, filled by the worker that asks for it first."""
    done = folder / "made"
    with FileLock(f"{folder}.lock"):
        if not done.exists():
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


@pytest.fixture(scope="session")
def inputs(common: Path) -> Inputs:
    """The small model as a checkpoint, six photos, and two of them annotated; not to be changed."""
    folder = made_once(common / "inputs", _write_inputs)
    return Inputs(folder / "checkpoint", folder / "photos", folder / "coco.json")


def _write_inputs(folder: Path) -> None:
    float_model().save_pretrained(folder / "checkpoint")
    (folder / "photos").mkdir()
    random = np.random.default_rng(0)
    for index in range(6):
        coarse = Image.fromarray(random.integers(0, 255, (9, 12, 3), dtype=np.uint8))
        coarse.resize((96, 80), Image.Resampling.BICUBIC).save(folder / "photos" / f"{index}.png")
    boxes = [(10, 10, 40, 30), (30, 25, 80, 70)]
    coco = {
        "images": [{"id": i, "file_name": f"photos/{i}.png", "width": 96, "height": 80} for i in (0, 1)],
        "annotations": [
            {
                "id": 10 * image + index,
                "image_id": image,
                "category_id": 1,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": (x2 - x1) * (y2 - y1),
                "iscrowd": 0,
                "segmentation": [[x1, y1, x2, y1, x2, y2, x1, y2]],
            }
            for image in (0, 1)
            for index, (x1, y1, x2, y2) in enumerate(boxes)
        ],
        "categories": [{"id": 1, "name": "thing"}],
    }
    (folder / "coco.json").write_text(json.dumps(coco))


def whole_job(inputs: Inputs) -> list[object]:
    """Arguments that the finished job was started with, but for its output directory."""
    return [
        "--model-path", inputs.checkpoint, "--calib-data", inputs.photos, "--num-calib-samples", 2,
        "--config", "int4_svdquant", "--eval-data", inputs.coco,
    ]  # fmt: skip


@pytest.fixture(scope="session")
def finished(inputs: Inputs, common: Path) -> tuple[Path, Answer]:
    """The output directory of `run --json` and its answer; not to be changed."""

    def run(folder: Path) -> None:
        answer = samq("run", *whole_job(inputs), "--output-dir", folder / "out", "--json")
        assert answer.code == 0, answer.err
        (folder / "answer.json").write_text(json.dumps(asdict(answer)), encoding="utf-8")

    folder = made_once(common / "finished", run)
    return folder / "out", Answer(**json.loads((folder / "answer.json").read_text(encoding="utf-8")))


@pytest.fixture(scope="session")
def exported(finished: tuple[Path, Answer], common: Path) -> Path:
    """The finished job (with low-rank branches), exported with static shapes; not to be changed."""

    def export(folder: Path) -> None:
        shutil.copytree(finished[0], folder / "out")
        assert samq("export", "--output-dir", folder / "out", "--target", "trt8").code == 0

    return made_once(common / "exported", export) / "out"


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A browser to open pages in."""
    missing = missing_browser()
    if missing is not None:
        pytest.skip(missing)
    with browser(tmp_path_factory.mktemp("profile")) as running:
        yield running
