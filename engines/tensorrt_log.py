"""TensorRT itself: loading it, starting it, catching its log, and turning what it says into one line with a fix."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samq.engines.cuda import INSTALL
from samq.errors import BadInput, MachineLacks, SamqError

if TYPE_CHECKING:
    import tensorrt as trt

ANOTHER_PYTHON = "SAMQ_TENSORRT_PYTHON"
ERROR, WARNING, INFO = "error", "warning", "info"

_MEMORY = "the GPU's memory is not enough; free some of it, set a smaller workspace, batch or --image-size"
_OTHER_VERSION = "the plan was built by another version of TensorRT; build it again with this one"
_OTHER_GPU = "the plan was built for another GPU; build it again on this one"
_NO_PLAN = "the file is no plan, or one of a TensorRT far from this one; build it again with this one"
_UNKNOWN_GPU = (
    "this TensorRT does not support the GPU; install a newer one, or, where the GPU is too old for it, an older one"
)
_DRIVER = "CUDA does not start (error {0}): no GPU, or the NVIDIA driver is missing or too old; see `nvidia-smi`"
_NO_KERNEL = (
    "TensorRT has no kernel for {0}; keep that layer in FP16, build without --refittable, or take another version"
)

# The texts are those of 8.6 to 10.x; the first that is found in what TensorRT said decides.
_SENTENCES: tuple[tuple[str, type[SamqError], str], ...] = (
    (r"CUDA initialization failure with error: (?!2\b)(\d+)", MachineLacks, _DRIVER),
    (r"Target GPU SM \d+ is not supported|Unsupported SM\b", MachineLacks, _UNKNOWN_GPU),
    (r"Version tag does not match|expecting library version", MachineLacks, _OTHER_VERSION),
    (r"generated on an incompatible device", MachineLacks, _OTHER_GPU),
    (
        r"CUDA initialization failure with error: 2\b|OutOfMemory|out of memory|STATUS_ALLOC_FAILED"
        r"|could not be allocated|due to insufficient (?:memory|workspace)",
        MachineLacks,
        _MEMORY,
    ),
    (r"Could not find any implementation for node (.+?)(?:\.\)|\.$|\)$|$)", BadInput, _NO_KERNEL),
    (r"Magic tag does not match|PLAN_MAGIC_TAG", BadInput, _NO_PLAN),
)
_NO_OBJECT = "factory function returned nullptr"  # what the bindings say, whatever the reason
_ORIGIN = re.compile(r"^(?:\d+: )?(?:\[\S+\] |\S+\.cpp:\d+: )?(?:Error Code \d+: )?")
_NODE_NAME = re.compile(r'^(?:\S+\.cpp:\d+: )?name: "(.*)"$', re.MULTILINE)
_NODE_TYPE = re.compile(r'^(?:\S+\.cpp:\d+: )?op_type: "(.*)"$', re.MULTILINE)


@dataclass
class Log:
    """What TensorRT said while it was listened to: severity (`error`, `warning`, `info`) and text, in order."""

    messages: list[tuple[str, str]] = field(default_factory=list)

    def of(self, *severities: str) -> list[str]:
        """The different texts of these severities, in order."""
        return list(dict.fromkeys(text for severity, text in self.messages if severity in severities))

    def __str__(self) -> str:
        return "".join(f"{severity}: {text}\n" for severity, text in self.messages)


def load_tensorrt() -> Any:
    """The module `tensorrt`.

    Raises:
        MachineLacks: it is not installed, or one of its libraries is missing.
    """
    try:
        return importlib.import_module("tensorrt")
    except ModuleNotFoundError as error:
        fix = f"run {INSTALL}, or name an interpreter that has it in {ANOTHER_PYTHON}"
        raise MachineLacks(f"TensorRT is not installed; {fix}") from error
    except (ImportError, OSError) as error:
        raise MachineLacks(
            f"TensorRT cannot be loaded ({first_line(str(error))}); put it on LD_LIBRARY_PATH"
        ) from error


def version_of(api: Any) -> str:
    """Version of a loaded TensorRT."""
    return str(api.__version__)


@contextmanager
def captured() -> Iterator[tuple[trt.ILogger, Log]]:
    """The logger to hand to TensorRT, and the log that it writes to until the block ends."""
    logger, log = _logger(), Log()
    before, logger.log_to = logger.log_to, log
    try:
        yield logger, log
    finally:
        logger.log_to = before


@cache
def _logger() -> Any:
    """One for the process: TensorRT keeps the first that it is given."""
    api = load_tensorrt()
    severities = {
        api.ILogger.INTERNAL_ERROR: ERROR,
        api.ILogger.ERROR: ERROR,
        api.ILogger.WARNING: WARNING,
        api.ILogger.INFO: INFO,
    }

    class Logger(api.ILogger):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            api.ILogger.__init__(self)
            self.log_to = Log()

        def log(self, severity: Any, text: str) -> None:
            if severity in severities:
                self.log_to.messages.append((severities[severity], text))

    return Logger()


def new_builder(api: Any, logger: trt.ILogger, log: Log, onnx_path: Path) -> trt.Builder:
    """A builder.

    Args:
        log: that `logger` writes to.
        onnx_path: what it is for, for the message.

    Raises:
        SamqError: TensorRT does not start.
    """
    builder: trt.Builder = _started(api.Builder, logger, log, onnx_path)
    return builder


def new_runtime(api: Any, logger: trt.ILogger, log: Log, plan_path: Path) -> trt.Runtime:
    """A runtime; arguments and errors are those of `new_builder`."""
    runtime: trt.Runtime = _started(api.Runtime, logger, log, plan_path)
    return runtime


def new_refitter(api: Any, engine: trt.ICudaEngine, logger: trt.ILogger, log: Log, plan_path: Path) -> trt.Refitter:
    """A refitter of an engine; the other arguments and errors are those of `new_builder`."""
    refitter: trt.Refitter = _started(partial(api.Refitter, engine), logger, log, plan_path)
    return refitter


def _started(kind: Callable[[trt.ILogger], Any], logger: trt.ILogger, log: Log, path: Path) -> Any:
    try:
        return kind(logger)
    except TypeError as error:  # what the bindings raise where the library gives nothing
        raise failure(path, log) from error


def failure(path: Path, log: Log) -> SamqError:
    """The error that explains why TensorRT failed with a file."""
    errors = [error for error in log.of(ERROR) if _NO_OBJECT not in error]
    # warnings decide where there is no other reason alone: tactics are skipped for memory in builds that end well, too
    for said in map("\n".join, (errors, () if errors else log.of(WARNING))):
        for pattern, error, sentence in _SENTENCES:
            found = re.search(pattern, said, re.MULTILINE)
            if found is not None:
                return error(f"{path.name}: {sentence.format(*found.groups())}")
    reason = next(iter(log.of(ERROR)), "no reason given")
    return BadInput(f"{path.name}: TensorRT fails ({plain(reason)}); its log has more")


def parse_failure(path: Path, description: str, log: Log, version: str) -> BadInput:
    """The error for an ONNX file that TensorRT's importer refuses.

    Args:
        description: of the importer's first error, "" where it gives none.
        log: holds the node, which 8.6 gives nowhere else.
    """
    said = "\n".join(log.of(ERROR))
    name, operator = _NODE_NAME.search(said), _NODE_TYPE.search(said)
    description = description or next(iter(log.of(ERROR)), "no reason given")
    where = f"node {name[1]} ({operator[1]})" if name and operator else "the file"
    return BadInput(
        f"{path.name}: TensorRT {version} does not take {where}: {plain(description)}; export it for this version"
    )


def plain(text: str) -> str:
    """A message of TensorRT in one line, without the place in its sources."""
    return " ".join(_ORIGIN.sub("", text.strip()).split()).rstrip(".;")


def first_line(text: str) -> str:
    """First line of a text that may be empty."""
    return next(iter(text.strip().splitlines()), "no reason given")
