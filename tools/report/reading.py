"""A finished report, read back from its output directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from samq.errors import BadInput

FOLDER, REPORT, PROMPTS = "report", "report.json", "prompts.json"
SCHEMA = 1  # of report.json; a figure that moves or goes makes a new one


def read_report(out: Path) -> dict[str, Any]:
    """`report/report.json` of an output directory.

    Raises:
        BadInput: there is none, or it is not of this version of samq.
    """
    report = _read(out, REPORT)
    if not isinstance(report, dict) or report.get("schema") != SCHEMA:
        raise BadInput(f"{out / FOLDER / REPORT} is of another version of samq; {_remedy(out)}")
    return report


def read_prompts(out: Path) -> list[dict[str, Any]]:
    """`report/prompts.json` of an output directory: one object a prompt.

    Raises:
        BadInput: there is none.
    """
    prompts: list[dict[str, Any]] = _read(out, PROMPTS)
    return prompts


def read_bytes(out: Path, name: str) -> bytes:
    """A file that the report names.

    Raises:
        BadInput: there is none.
    """
    file = out / FOLDER / name
    try:
        return file.read_bytes()
    except OSError as error:
        raise BadInput(f"{file} cannot be read ({error.strerror}); {_remedy(out)}") from error


def _read(out: Path, name: str) -> Any:
    try:
        return json.loads(read_bytes(out, name))
    except ValueError as error:
        raise BadInput(f"{out / FOLDER / name} is not JSON ({error}); {_remedy(out)}") from error


def _remedy(out: Path) -> str:
    return f"run `samq-export validate --output-dir {out}`"
