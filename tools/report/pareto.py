"""The front of a search, where one was made: `report/pareto.json`.

    {"points": [{"config": "int4_w4a8", "bytes": 3045816, "miou_relative": 0.9978}, …]}

A point is one configuration that was tried: its name, the bytes of its quantized model, and its mIoU relative to the
float model's. A point is on the front when no other is at most as large and at least as accurate, and better in one.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from samq.errors import BadInput

FILE = "pareto.json"


class Tried(BaseModel):
    """One configuration that a search tried."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    config: str
    bytes: int = Field(gt=0)
    miou_relative: FiniteFloat


class _Search(BaseModel):
    model_config = ConfigDict(extra="forbid")

    points: list[Tried] = Field(min_length=1)


def read_search(report: Path) -> list[Tried]:
    """What a search tried, smallest first; nothing without a search.

    Args:
        report: the report's folder.

    Raises:
        BadInput: the file is not as above.
    """
    file = report / FILE
    if not file.is_file():
        return []
    try:
        points = _Search.model_validate_json(file.read_bytes()).points
    except (OSError, ValidationError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise BadInput(f"{file} is unreadable ({reason}); make it anew, or remove it") from error
    return sorted(points, key=lambda point: (point.bytes, -point.miou_relative))


def front(points: list[Tried]) -> list[Tried]:
    """Those that no other point dominates, smallest first."""
    return [point for point in points if not any(_dominates(other, point) for other in points)]


def _dominates(one: Tried, other: Tried) -> bool:
    no_worse = one.bytes <= other.bytes and one.miou_relative >= other.miou_relative
    return no_worse and (one.bytes < other.bytes or one.miou_relative > other.miou_relative)
