"""What TensorRT measured of its kernels, for later builds.

It is kept in a file of its own for each version and kind of GPU, and by the process that measured it. The file is not
enough: 8.6.0 reads back what it wrote but for the timings of fused regions (`myelinCache … Error Code 1: Myelin`), and
an encoder is hardly anything else. "It can be shared across builder instances" (TensorRT's API, ITimingCache).
"""

from __future__ import annotations

import atexit
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from samq.engines.cuda import Device
from samq.engines.tensorrt_log import ERROR, INFO, WARNING, Log
from samq.errors import MachineLacks
from samq.files import locked, written_whole

if TYPE_CHECKING:
    import tensorrt as trt


@dataclass
class Timings:
    """Timings that builds use and add to.

    Args:
        path: file that they are kept in.
        content: what is known of that file: it is among these timings, or cannot be read.
    """

    path: Path
    cache: trt.ITimingCache
    content: bytes


_HELD: dict[Path, Timings] = {}  # by this process
atexit.register(_HELD.clear)  # while the logger is there, which they speak to when they go


def timings_file(folder: Path, version: str, device: Device) -> Path:
    """Timings hold for one version on one kind of GPU."""
    gpu = re.sub(r"[^a-z0-9]+", "-", device.name.lower()).strip("-")
    return folder / f"tensorrt-{version}-{gpu}.cache"


def use_timings(config: trt.IBuilderConfig, path: Path, log: Log) -> Timings | None:
    """Let a builder use and add to the timings of a file; None where it takes none at all.

    Raises:
        MachineLacks: the file could not be written later.
    """
    with _alone_in(path.parent):
        kept = _content(path)
    held = _HELD.get(path)
    if held is not None and (kept or not held.content) and config.set_timing_cache(held.cache, False):
        return held
    for content in dict.fromkeys((kept, b"")):
        cache, whole = _read(config, content, log)
        if cache is not None and config.set_timing_cache(cache, False):
            if not whole:
                _warn(log, path, "cannot be read in full by this TensorRT; the rest is measured anew")
            return Timings(path, cache, kept)
        _warn(log, path, "does not fit; timings are measured anew")
    return None


def keep_timings(config: trt.IBuilderConfig, timings: Timings, log: Log) -> None:
    """Keep the timings, and with them what builds beside this one have written since it began.

    Raises:
        MachineLacks: the file cannot be written; this process keeps them all the same.
    """
    path, cache = timings.path, timings.cache
    _HELD[path] = timings
    with _alone_in(path.parent), written_whole(path) as temporary:
        others = _content(path)
        if others not in (b"", timings.content) and not _added(config, cache, others, log):
            _warn(log, path, "does not fit; it is written anew")
        timings.content = bytes(cache.serialize())
        temporary.write_bytes(timings.content)


def _added(config: trt.IBuilderConfig, cache: trt.ITimingCache, content: bytes, log: Log) -> bool:
    others, _ = _read(config, content, log)
    before = len(log.messages)
    added = others is not None and cache.combine(others, False)
    _hush(log, before)
    return added


def _read(config: trt.IBuilderConfig, content: bytes, log: Log) -> tuple[trt.ITimingCache | None, bool]:
    """Timings that were written before, and whether these are all of them: 8.6 says so in its log alone."""
    before = len(log.messages)
    cache: trt.ITimingCache | None = config.create_timing_cache(content)
    return cache, not _hush(log, before)


def _hush(log: Log, before: int) -> bool:
    """What TensorRT says of timings is no error of the build, and must not stand for the reason of one.

    Returns:
        It has said one after the first `before` messages.
    """
    said = log.messages[before:]
    log.messages[before:] = [(INFO if severity == ERROR else severity, text) for severity, text in said]
    return any(severity == ERROR for severity, _ in said)


def _warn(log: Log, path: Path, what: str) -> None:
    log.messages.append((WARNING, f"{path.name} {what}"))


def _content(path: Path) -> bytes:
    """Of a file; nothing where there is none yet."""
    return path.read_bytes() if path.is_file() else b""


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Wait until no other build keeps its timings in a folder, where its file system has locks.

    Raises:
        MachineLacks: there is no such folder, and it cannot be made.
    """
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(folder))
        except OSError as error:
            raise MachineLacks(f"{folder}: cannot be written ({error.strerror}); name another timing_cache") from error
        yield
