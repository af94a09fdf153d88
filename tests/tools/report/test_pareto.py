"""The front of a search, and files that hold none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from samq.errors import BadInput
from samq.tools.report.pareto import FILE, Tried, front, read_search


def _tried(name: str, size: int, accuracy: float) -> Tried:
    return Tried(config=name, bytes=size, miou_relative=accuracy)


def test_the_front_has_what_nothing_else_beats() -> None:
    small, good, worse, larger = (
        _tried("small", 10, 0.9), _tried("good", 20, 0.99), _tried("worse", 20, 0.95), _tried("larger", 30, 0.99),
    )  # fmt: skip
    assert front([small, good, worse, larger]) == [small, good]


def test_equal_points_are_both_on_the_front() -> None:
    twins = [_tried("a", 10, 0.9), _tried("b", 10, 0.9)]
    assert front(twins) == twins


def test_a_search_is_read_smallest_first(tmp_path: Path) -> None:
    assert read_search(tmp_path) == []
    points = [{"config": "b", "bytes": 20, "miou_relative": 1}, {"config": "a", "bytes": 10, "miou_relative": 0.9}]
    (tmp_path / FILE).write_text(json.dumps({"points": points}))
    assert [point.config for point in read_search(tmp_path)] == ["a", "b"]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"points": []}',
        '{"points": [{"config": "a", "bytes": 0, "miou_relative": 1}]}',
        '{"points": [{"config": "a", "bytes": 1, "miou_relative": NaN}]}',
        '{"points": [{"config": "a", "bytes": 1}]}',
    ],
)
def test_a_broken_search_is_refused_in_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE).write_text(content)
    with pytest.raises(BadInput, match=r"pareto.json is unreadable .*remove it$") as refused:
        read_search(tmp_path)
    assert "\n" not in str(refused.value)
