"""Plots as elements of a page: deterministic, coloured by the page, and with labels that stay text."""

from __future__ import annotations

import re
from collections.abc import Callable
from xml.etree import ElementTree

import pytest
from markupsafe import Markup

from samq.tools.report import plots
from samq.tools.report.plots import Bar, Point

HOSTILE = "<script>alert('$x$')</script>"
BARS = {"<b>": [Bar(1.0, HOSTILE, plots.BLUE)], "zero": [Bar(0, "0", plots.RED)]}

DRAWN: dict[str, Callable[[], Markup]] = {
    "histogram": lambda: plots.histogram({"a": [0.2, 0.9, 1.0], "b": []}, "IoU", "prompts"),
    "equal": lambda: plots.histogram({"a": [1.0, 1.0], "b": [1.0]}, "IoU", "prompts"),
    "bars": lambda: plots.bars("b", HOSTILE, BARS),
    "network": lambda: plots.along_network([(HOSTILE, 20.0, True), (HOSTILE, 10.0, False), ("b", -3.0, True)]),
    "scatter": lambda: plots.scatter("s", HOSTILE, [Point(1, 2, HOSTILE, True), Point(2, 1, "", False)], "MB", "mIoU"),
}  # fmt: skip


@pytest.mark.parametrize("name", DRAWN)
def test_a_plot_is_the_same_each_time(name: str) -> None:
    assert DRAWN[name]() == DRAWN[name]()


@pytest.mark.parametrize("name", DRAWN)
def test_colours_are_names_of_the_style_sheet(name: str) -> None:
    drawn = DRAWN[name]()
    assert set(re.findall(r"(?:fill|stroke): ([^;\"]+)", drawn)) <= {"none", *plots.COLOURS.values()}
    assert "var(--ink)" in drawn


@pytest.mark.parametrize("name", DRAWN)
def test_a_plot_is_two_elements_without_anything_from_elsewhere(name: str) -> None:
    wide, phone = ElementTree.fromstring(f"<div>{DRAWN[name]()}</div>")
    assert (wide.get("class"), phone.get("class")) == ("on-wide", "on-phone")
    assert {element.tag for element in wide.iter()} <= {
        "div",
        "svg",
        "g",
        "path",
        "text",
        "use",
        "defs",
        "clipPath",
        "rect",
    }
    links = [element.get("href") for element in wide.iter() if element.get("href")]
    assert all(link.startswith("#") for link in links if link)


@pytest.mark.parametrize("name", ["bars", "network", "scatter"])
def test_labels_stay_text(name: str) -> None:
    drawn = DRAWN[name]()
    root = ElementTree.fromstring(f"<div>{drawn}</div>")
    assert "<script" not in drawn
    assert HOSTILE in [element.text for element in root.iter("text")]


def test_ids_of_two_plots_never_meet() -> None:
    page = "".join(draw() for name, draw in DRAWN.items() if name != "equal")
    for element in ElementTree.fromstring(f"<div>{page}</div>").iter("svg"):
        own = {part.get("id") for part in element.iter() if part.get("id")}
        used = set(re.findall(r"#(\w+)", ElementTree.tostring(element, encoding="unicode")))
        assert used <= own
        assert all(page.count(f'id="{name}"') == 1 for name in own)
