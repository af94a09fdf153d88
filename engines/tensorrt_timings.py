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
        seen: the file as it was read or written last; all that can be had of it is among these timings.
    """

    path: Path
    cache: trt.ITimingCache
    seen: bytes


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
    with _no_errors_of_the_build(log):
        return _held(config, path, kept, log) or _of_file(config, path, kept, log) or _none_yet(config, path, kept, log)


def keep_timings(config: trt.IBuilderConfig, timings: Timings, log: Log) -> None:
    """Keep the timings, and with them what builds beside this one have written since it began.

    Raises:
        MachineLacks: the file cannot be written; this process keeps them all the same.
    """
    path = timings.path
    _HELD[path] = timings
    with _alone_in(path.parent), _no_errors_of_the_build(log):
        others = _content(path)
        if others not in (b"", timings.seen):
            _add(config, timings, others, log)
        serialized: trt.IHostMemory | None = timings.cache.serialize()
        if serialized is None:
            _warn(log, path, "is not written: TensorRT does not give its timings")
            return
        written = bytes(serialized)
        with written_whole(path) as temporary:
            temporary.write_bytes(written)
    timings.seen = written


def _held(config: trt.IBuilderConfig, path: Path, kept: bytes, log: Log) -> Timings | None:
    """What this process holds, with what others wrote since; None where that was thrown away or does not fit."""
    held = _HELD.get(path)
    if held is None or (held.seen and not kept):
        return None
    if kept not in (b"", held.seen):
        _add(config, held, kept, log)
        held.seen = kept
    return held if config.set_timing_cache(held.cache, False) else None


def _of_file(config: trt.IBuilderConfig, path: Path, kept: bytes, log: Log) -> Timings | None:
    if not kept:
        return None
    cache, whole = _read(config, kept, log)
    if cache is None or not config.set_timing_cache(cache, False):
        _warn(log, path, "does not fit; timings are measured anew")
        return None
    if not whole:
        _warn(log, path, "cannot be read in full by this TensorRT; the rest is measured anew")
    return Timings(path, cache, kept)


def _none_yet(config: trt.IBuilderConfig, path: Path, kept: bytes, log: Log) -> Timings | None:
    empty: trt.ITimingCache | None = config.create_timing_cache(b"")
    if empty is None or not config.set_timing_cache(empty, False):
        log.messages.append((WARNING, "this TensorRT takes no timings: all are measured anew"))
        return None
    return Timings(path, empty, kept)


def _add(config: trt.IBuilderConfig, timings: Timings, content: bytes, log: Log) -> None:
    """Add what other builds measured, unless this TensorRT cannot read it: 8.6 combines no timings of fused regions."""
    others, whole = _read(config, content, log)
    if others is not None and not whole:
        log.messages.append((INFO, f"{timings.path.name}: this TensorRT cannot add other builds' timings to its own"))
    elif others is None or not timings.cache.combine(others, False):
        _warn(log, timings.path, "does not fit; it is written anew")


def _read(config: trt.IBuilderConfig, content: bytes, log: Log) -> tuple[trt.ITimingCache | None, bool]:
    """Timings that were written before, and whether these are all of them: 8.6 says so in its log alone."""
    before = len(log.messages)
    cache: trt.ITimingCache | None = config.create_timing_cache(content)
    return cache, all(severity != ERROR for severity, _ in log.messages[before:])


@contextmanager
def _no_errors_of_the_build(log: Log) -> Iterator[None]:
    """What TensorRT says of timings must not stand for the reason that a build fails, should it fail."""
    before = len(log.messages)
    try:
        yield
    finally:
        log.messages[before:] = [(INFO if kind == ERROR else kind, text) for kind, text in log.messages[before:]]


def _warn(log: Log, path: Path, what: str) -> None:
    log.messages.append((WARNING, f"{path.name} {what}"))


def _content(path: Path) -> bytes:
    """Of a file; nothing where there is none yet.

    Raises:
        MachineLacks: it cannot be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise _unusable(path, error) from error


def _unusable(path: Path, error: OSError) -> MachineLacks:
    return MachineLacks(f"{path}: cannot be read or written ({error.strerror}); name another timing_cache")


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
            raise _unusable(folder, error) from error
        yield
