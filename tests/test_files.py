"""Files appear whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from samq.errors import MachineLacks
from samq.files import locked, sha256_of, temporaries, write_json, write_text, written_whole

KILLED_WHILE_WRITING = """
import os, signal, sys
from pathlib import Path
from samq.files import written_whole
with written_whole(Path(sys.argv[1])) as temporary:
    temporary.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes, which the kernel refuses while writing, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("before", [None, "old"])
def test_a_process_killed_while_writing_changes_nothing(before: str | None, tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file.txt"
    if before is not None:
        write_text(path, before)
    done = subprocess.run([sys.executable, "-c", KILLED_WHILE_WRITING, path], check=False)
    assert done.returncode == -signal.SIGKILL
    assert (path.read_text() if path.exists() else None) == before
    (left,) = temporaries(tmp_path)
    assert left.read_text() == "half"
    left.unlink()
    write_text(path, "new")
    assert path.read_text() == "new"
    assert [file.name for file in path.parent.iterdir()] == ["file.txt"]


def test_an_error_while_writing_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "old")
    with pytest.raises(TypeError), written_whole(path) as temporary, temporary.open("w") as file:
        file.writelines(["half", 2])  # type: ignore[list-item]
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_one_line_and_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    write_json(path, {"old": 1})
    with disk_of(1000), pytest.raises(MachineLacks, match="the disk is full") as caught:
        write_json(path, list(range(1000)))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert path.read_text() == '{\n  "old": 1\n}\n'
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_every_way_a_disk_is_full_is_told_as_such(code: int, tmp_path: Path) -> None:
    with pytest.raises(MachineLacks, match="free some space"), written_whole(tmp_path / "file"):
        raise OSError(code, os.strerror(code))


def test_a_folder_that_is_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    with pytest.raises(MachineLacks, match="choose another --output-dir"):
        write_text(tmp_path / "taken" / "file.txt", "text")


def test_only_what_a_killed_write_left_counts_as_temporary(tmp_path: Path) -> None:
    for name in (".git", ".env.part", ".hidden.abc", "file.abcdefgh.part", ".my notes.part"):
        (tmp_path / name).touch()
    assert list(temporaries(tmp_path)) == []


def test_written_files_are_readable_by_others(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "text")
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("size", [0, 1, 3_000_000])
def test_the_digest_is_the_contents(size: int, tmp_path: Path) -> None:
    content = bytes(range(256)) * (size // 256 + 1)
    (tmp_path / "file").write_bytes(content[:size])
    assert sha256_of(tmp_path / "file") == hashlib.sha256(content[:size]).hexdigest()


def test_a_lock_is_held_by_one_and_let_go(tmp_path: Path) -> None:
    for _ in range(2):
        with locked(tmp_path), pytest.raises(BlockingIOError), locked(tmp_path, wait=False):
            pass
    shared = locked(tmp_path, shared=True), locked(tmp_path, shared=True, wait=False)
    with shared[0], shared[1], pytest.raises(BlockingIOError), locked(tmp_path, wait=False):
        pass
    with pytest.raises(OSError, match="nowhere"), locked(tmp_path / "nowhere"):
        pass
