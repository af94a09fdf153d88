"""The record: one JSON file with every row that was measured, written again after each.

    {"runs": [facts of each run], "rows": {"<model>/<method>": figures}}

Figures hold `run` (index into `runs`), `code` (digest of what they depend on), `scenes`, `seconds` and either what was
measured (`bits`, the sums of `samq.tools.bench_accuracy.scenes.Scores`, `photos`, `note`) or `reason`, and `lacks`
where the machine is the reason. The float model is the method "fp32". Several processes may write to one file.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from samq.errors import MachineLacks
from samq.files import write_json
from samq.tools.records import read_json_record

FP32, PHOTOS = "fp32", "photos"


class Record:
    """The file at `path`, which need not exist yet.

    Args:
        run: facts about this run.

    Raises:
        BadInput: the file is no record.
    """

    def __init__(self, path: Path, run: Mapping[str, Any]) -> None:
        self.path, self._run = path, dict(run)
        self._content()

    def figures(self, model: str, method: str) -> dict[str, Any] | None:
        """What is known of a row."""
        found: dict[str, Any] | None = self._content()["rows"].get(f"{model}/{method}")
        return found

    def is_due(self, model: str, method: str, code: str, scenes: int) -> bool:
        """It was not measured so; what the machine lacked is tried again."""
        figures = self.figures(model, method)
        return figures is None or (figures["code"], figures["scenes"]) != (code, scenes) or bool(figures.get("lacks"))

    def put(self, model: str, method: str, figures: Mapping[str, Any]) -> None:
        """Keep the figures of a row, and write the file.

        Raises:
            MachineLacks: it cannot be written.
        """
        with self._alone():
            content = self._content()
            if self._run not in content["runs"]:
                content["runs"].append(self._run)
            kept = {"run": content["runs"].index(self._run), **figures}
            content["rows"][f"{model}/{method}"] = kept
            write_json(self.path, content)

    def _content(self) -> dict[str, Any]:
        return read_record(self.path) if self.path.exists() else {"runs": [], "rows": {}}

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """No other process writes meanwhile."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            folder = os.open(self.path.parent, os.O_RDONLY)
        except OSError as error:
            raise MachineLacks(f"{self.path}: cannot be written ({error.strerror}); name another --json") from error
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)


def read_record(path: Path) -> dict[str, Any]:
    """The content of a record.

    Raises:
        BadInput: there is none, or it is something else.
    """
    return read_json_record(path, "bench_accuracy", _check)


def _check(content: Mapping[str, Any]) -> None:
    for key, figures in content["rows"].items():
        key.index("/")
        content["runs"][figures["run"]]["command"]
        figures["scenes"], figures["code"]
