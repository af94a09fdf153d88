"""Files that appear whole or not at all, and their fingerprints."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from samq.errors import MachineLacks

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_SHORT_WRITE = re.compile(r"\d+ requested and \d+ written")  # numpy's only word on a full disk, without an errno
_TEMPORARY = re.compile(r"\..+\.[a-z0-9_]{8}\.part")


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success flush it to disk and rename it onto `path`.

    On any error the temporary file is removed and `path` is left as it was.

    Raises:
        MachineLacks: the disk is full or not writable.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        os.close(handle)
    except OSError as error:
        raise _cannot_write(path, error) from error
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
        _flush_directory(path.parent)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path, *, shared: bool = False, wait: bool = True) -> Iterator[None]:
    """Hold the lock of a folder, where its file system has locks.

    Args:
        shared: with others who share it.
        wait: until whoever holds it lets go.

    Raises:
        BlockingIOError: another holds it, and `wait` is false.
        OSError: the folder cannot be opened.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise
        except OSError:
            pass  # no locks there
        yield
    finally:
        os.close(handle)


def removed(path: Path) -> None:
    """Remove a file, a link or an empty folder, if it is there.

    Raises:
        MachineLacks: it cannot be removed.
    """
    try:
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise _cannot_write(path, error) from error


def temporaries(directory: Path) -> Iterator[Path]:
    """What a killed `written_whole` left in a directory and below it."""
    return (path for path in directory.rglob(".*") if is_temporary(path))


def is_temporary(path: Path) -> bool:
    """The name is one that `written_whole` gives to unfinished files."""
    return _TEMPORARY.fullmatch(path.name) is not None


def _flush_directory(directory: Path) -> None:
    """Make a rename last through a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _cannot_write(path: Path, error: OSError) -> MachineLacks:
    if error.errno in DISK_FULL or _SHORT_WRITE.search(str(error)):
        return MachineLacks(f"{path}: the disk is full; free some space and run the same command again")
    return MachineLacks(f"{path}: cannot be written ({error.strerror or error}); choose another --output-dir")


def write_text(path: Path, text: str) -> None:
    """Write `text` (UTF-8) to `path`, whole or not at all."""
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON to `path`, whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def sha256_of(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(file)


def _sha256(file: Any) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()
