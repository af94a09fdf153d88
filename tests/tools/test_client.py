"""The client where no server is needed to say no."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import refused, samq
from PIL import Image

from samq.errors import BadInput, MachineLacks, UsageError
from samq.tools.client import Protocol, SamClient, save_mask

NOBODY = "127.0.0.1:9"


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    Image.new("RGB", (30, 20)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_no_server_is_one_line(photo: Path, tmp_path: Path, protocol: str) -> None:
    out = tmp_path / "mask.png"
    options = ["--point", "3,4", "--url", NOBODY, "--protocol", protocol, "--timeout", 5]
    refused(samq("client", "--image", photo, "--out", out, *options), 5, NOBODY, "start a Triton server")
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--box", "1,2,3"], "4 numbers"),
        (["--box", "1,2,3,x"], "4 numbers"),
        (["--point", "1"], "2 or 3 numbers"),
        ([], "--box or --point"),
        (["--point", "1,2", "--handle", "x"], "either --image or --handle"),
        (["--point", "1,2", "--url", "http://localhost:8000"], "host:port"),
        (["--point", "1,2", "--header", "token"], "NAME=VALUE"),
        (["--point", "1,2", "--timeout", "0"], "--timeout"),
    ],
)
def test_wrong_usage_is_one_line(photo: Path, tmp_path: Path, options: list[str], words: str) -> None:
    refused(samq("client", "--image", photo, "--out", tmp_path / "mask.png", *options), 2, words)


def test_a_bad_image_is_told_before_any_server_is_asked(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"no picture")
    options = ["--point", "1,2", "--out", tmp_path / "mask.png", "--url", NOBODY]
    refused(samq("client", "--image", tmp_path / "photo.jpg", *options), 6, "photo.jpg", "not a JPEG")


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_without_tritonclient_the_fix_is_named(monkeypatch: pytest.MonkeyPatch, protocol: Protocol) -> None:
    monkeypatch.setitem(sys.modules, f"tritonclient.{protocol}", None)
    with pytest.raises(MachineLacks, match=r'pip install "samq\[triton\]"'):
        SamClient(protocol=protocol)


def test_what_is_no_array_is_refused() -> None:
    with SamClient(NOBODY) as client:
        with pytest.raises(BadInput, match="uint8"):
            client.predict(np.zeros((4, 4, 3), np.float32))
        with pytest.raises(BadInput, match="boxes"):
            client.predict(handle="x", boxes=[[1, 2], [3]])
    with pytest.raises(UsageError, match="host:port"):
        SamClient("localhost")


def test_a_mask_is_written_white_on_black(tmp_path: Path) -> None:
    mask = np.eye(3, 5, dtype=np.bool_)
    save_mask(tmp_path / "deep" / "mask.png", mask)
    image = Image.open(tmp_path / "deep" / "mask.png")
    assert (image.mode, image.size) == ("L", (5, 3))
    assert (np.asarray(image) == 255 * mask).all()
