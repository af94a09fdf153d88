"""The record: one JSON file with every cell that was measured, written again after each.

    {"gpu": name, "runs": [facts of each run], "cells": {"<model>/<batch>/<row>": figures}}

The figures of a cell hold `run` (index into `runs`), `code` (digest of the code that it depends on), `seconds` (that it
took, with what had to be built in that run; `measuring_seconds` without) and either `ms` and what else was measured, or
`reason`, and `lacks` where the machine is the reason.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from samq.errors import UsageError
from samq.export.placement import SHIPPED, load_placement
from samq.files import write_json
from samq.quant.config import load_recipe
from samq.tools.bench_gpu.cells import ROWS, Cell
from samq.tools.bench_gpu.code import KERNEL_NAMES, digest_of
from samq.tools.records import read_json_record

ENGINE_CODE = {
    "torch": ("samq.calib.parts",),
    "onnxruntime": ("samq.engines.onnxruntime_cuda",),
    "tensorrt": ("samq.engines.tensorrt_process", "samq.engines.tensorrt_worker"),
}
LOWERING_CODE = {
    "torch": (),
    "onnxruntime": ("samq.export.lower_onnxruntime_cuda",),
    "tensorrt": ("samq.export.lower_tensorrt", "samq.export.tensorrt_rewrites"),
}
PEER_CODE = ("samq.tools.bench_gpu.naive", "samq.tools.bench_gpu.peers")
NAIVE_TENSORRT_CODE = ("samq.export.fold", "samq.export.half", "samq.export.opset17", "samq.export.tensorrt_operators")
MASKS_CODE = ("samq.engines.predictor", "samq.tools.evaluate")


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

    def lacks_masks(self, cell: Cell) -> bool:
        """It was measured, but not its masks."""
        figures = self._content["cells"].get(cell.key, {})
        return cell.with_masks and "ms" in figures and "masks" not in figures

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

    def put_masks(self, cell: Cell, masks: Mapping[str, Any]) -> None:
        """Keep the masks of a cell that was measured, and write the file.

        Raises:
            MachineLacks: it cannot be written.
        """
        self._content["cells"][cell.key]["masks"] = dict(masks)
        write_json(self.path, self._content)

    def known(self) -> dict[Cell, dict[str, Any]]:
        """Every cell in it."""
        return cells_of(self._content)


def read_record(path: Path) -> dict[str, Any]:
    """The content of a record.

    Raises:
        BadInput: there is none, or it is something else.
    """
    return read_json_record(path, "bench_gpu", _check)


def _check(content: Mapping[str, Any]) -> None:
    for figures in cells_of(content).values():
        content["runs"][figures["run"]]["command"]
    content["gpu"]


def cells_of(content: Mapping[str, Any]) -> dict[Cell, dict[str, Any]]:
    """The cells of a record's content; rows that are no more are left out."""
    found = {}
    for key, figures in content["cells"].items():
        model, batch, row = key.split("/")
        if row in ROWS:
            found[Cell(model, int(batch), ROWS[row])] = figures
    return found


@cache
def code_digest(cell: Cell) -> str:
    """Digest of what a cell's figures depend on: samq's code, the row, its preset, the shipped placements.

    The bench itself is left out: a new row must not cost the old ones, and --redo measures again.
    """
    without = KERNEL_NAMES if cell.row.preset else (*KERNEL_NAMES, "samq.quant")
    digest = hashlib.sha256(digest_of(tuple(_roots(cell)), without).encode())
    digest.update(repr(replace(cell.row, title="")).encode())
    if cell.row.preset is not None:
        digest.update(load_recipe(cell.row.preset).to_yaml().encode())
        if cell.row.engine == "tensorrt":
            digest.update("".join(str(load_placement(path).layers) for path in sorted(SHIPPED.glob("*.yaml"))).encode())
    return digest.hexdigest()[:16]


def _roots(cell: Cell) -> Iterator[str]:
    """The modules that make and run a cell's engine."""
    row = cell.row
    yield from ENGINE_CODE[row.engine]
    if row.peer:
        yield from PEER_CODE
        yield from NAIVE_TENSORRT_CODE if row.engine == "tensorrt" else ()
    elif row.engine != "torch":
        yield from ("samq.export.trace", "samq.export.parts", *LOWERING_CODE[row.engine])
    if row.preset is not None:
        yield "samq.quant.quantize"
    if cell.with_masks:
        yield from MASKS_CODE
