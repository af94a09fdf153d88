"""Figures as text."""

from __future__ import annotations

import pytest

from samq.tools.report import units


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (units.data_size(0), "0 B"),
        (units.data_size(999), "999 B"),
        (units.data_size(1000), "1.00 kB"),
        (units.data_size(26_724_458), "26.7 MB"),
        (units.data_size(426_900_000), "427 MB"),
        (units.data_size(1_170_000_000), "1.17 GB"),
        (units.data_size(None), "—"),
        (units.milliseconds(259.42), "259 ms"),
        (units.milliseconds(14.725), "14.7 ms"),
        (units.milliseconds(0.1234), "0.12 ms"),
        (units.seconds(0.874), "0.9 s"),
        (units.seconds(134.2), "2 min 14 s"),
        (units.percent(32**2 / (640 * 480)), "0.333 %"),
        (units.percent(0.03), "3 %"),
        (units.number(0.99778), "0.9978"),
        (units.number(None), "—"),
        (units.counted(1, "prompt"), "1 prompt"),
        (units.counted(12345, "prompt"), "12,345 prompts"),
        (units.joined(["a"]), "a"),
        (units.joined(["a", "b", "c"]), "a, b and c"),
    ],
)
def test_units(text: str, expected: str) -> None:
    assert text == expected
