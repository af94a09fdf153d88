"""The record: one JSON file with every cell that was measured, written again after each.

    {"gpu": name, "runs": [facts of each run], "cells": {"<model>/<batch>/<row>": figures}}

The figures of a cell hold `run` (index into `runs`), `code` (digest of the code that it depends on), `seconds` (that it
took) and either `ms` and what else was measured, or `reason`, and `lacks` where the machine is the reason.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import samq
from samq.errors import BadInput, UsageError
from samq.files import write_json
from samq.tools.bench_gpu.cells import ROWS, Cell

DEPENDS_ON = {
    "torch": ("calib",),
    "onnxruntime": ("calib", "quant", "export", "engines"),
    "tensorrt": ("calib", "quant", "export", "engines"),
}


class Record:
    """The file at `path`, which need not exist yet.

    Args:
        run: facts about this run, `gpu` (its name) among them.

    Raises:
        BadInput: the file is no record.
        UsageError: it was measured on another GPU.
    """

    def __init__(self, path: Path, run: Mapping[str, Any]) -> None:
        self.path = path
        self._run = dict(run)
        self._content: dict[str, Any] = {"gpu": run["gpu"], "runs": [], "cells": {}}
        if path.exists():
            self._content = read_record(path)
            if self._content["gpu"] != run["gpu"]:
                raise UsageError(
                    f"{path} was measured on {self._content['gpu']}, and this is {run['gpu']}; name another --json"
                )

    def is_due(self, cell: Cell) -> bool:
        """It was not measured with this code; what the machine lacked is tried again."""
        figures = self._content["cells"].get(cell.key)
        return figures is None or figures["code"] != code_digest(cell) or bool(figures.get("lacks"))

    def put(self, cell: Cell, figures: Mapping[str, Any]) -> None:
        """Keep the figures of a cell, and write the file.

        Raises:
            MachineLacks: it cannot be written.
        """
        runs = self._content["runs"]
        if self._run not in runs:
            runs.append(self._run)
        kept = {"run": runs.index(self._run), "code": code_digest(cell), **figures}
        self._content["cells"][cell.key] = kept
        write_json(self.path, self._content)

    def known(self) -> dict[Cell, dict[str, Any]]:
        """Every cell in it."""
        return cells_of(self._content)


def read_record(path: Path) -> dict[str, Any]:
    """The content of a record.

    Raises:
        BadInput: there is none, or it is something else.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for figures in cells_of(content).values():
            content["runs"][figures["run"]]["command"]
        content["gpu"]
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror}); measure first, or name another --json") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise BadInput(f"{path}: is no record of bench_gpu; name another --json") from error
    return content


def cells_of(content: Mapping[str, Any]) -> dict[Cell, dict[str, Any]]:
    """The cells of a record's content; rows that are no more are left out."""
    found = {}
    for key, figures in content["cells"].items():
        model, batch, row = key.split("/")
        if row in ROWS:
            found[Cell(model, int(batch), ROWS[row])] = figures
    return found


def code_digest(cell: Cell) -> str:
    """Digest of samq's code that a cell's figures depend on."""
    return digest_of(DEPENDS_ON[cell.row.engine])


@cache
def digest_of(packages: tuple[str, ...]) -> str:
    """Digest of the Python files of samq's packages, 16 hex digits."""
    digest = hashlib.sha256()
    for package in packages:
        for path in sorted((Path(samq.__file__).parent / package).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
