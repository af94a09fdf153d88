"""The kernels of a cell's run: by kind in the record, by name in a file beside its engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from samq.engines.base import Arrays, TracedEngine
from samq.engines.kernels import by_kind
from samq.errors import SamqError
from samq.files import write_json


def launched(open_engine: Callable[[], TracedEngine], feeds: Arrays, path: Path) -> dict[str, Any]:
    """What a run launches, for the record; the reason where it cannot be traced.

    Args:
        open_engine: launches kernel by kernel.
        path: of the engine; the kernels are written beside it.
    """
    try:
        kernels = open_engine().kernels(feeds)
    except SamqError as error:
        return {"launched": None, "not_traced": str(error)}
    write_json(path.with_suffix(".kernels.json"), [asdict(kernel) for kernel in kernels])
    return {"launched": {kind: asdict(sums) for kind, sums in by_kind(kernels).items()}}
