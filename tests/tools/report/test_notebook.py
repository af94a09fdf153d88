"""The report in a notebook's cell."""

from __future__ import annotations

from pathlib import Path

import pytest
from browser import DESKTOP, Browser
from conftest import Answer

from samq.errors import BadInput
from samq.tools.report import show


def test_a_cell_shows_the_whole_report_and_lets_it_run_nothing(
    chromium: Browser, finished: tuple[Path, Answer], tmp_path: Path
) -> None:
    shown = show(str(finished[0]))
    assert shown.html == (finished[0] / "report" / "report.html").read_text(encoding="utf-8")
    notebook = tmp_path / "notebook.html"
    notebook.write_text(f'<!DOCTYPE html><meta charset="utf-8"><link rel="icon" href="data:,">{shown._repr_html_()}')
    chromium.open(notebook, DESKTOP)
    assert chromium.complaints() == []
    assert chromium.ask("document.querySelector('iframe').sandbox.length") == 0
    assert chromium.ask("document.querySelector('iframe').srcdoc") == shown.html
    chromium.driver.switch_to.frame(0)
    assert chromium.ask("document.querySelector('.headline').textContent") == "Built as requested; no gate was set"
    assert chromium.ask("[...document.images].filter(i => !i.naturalWidth).length") == 0
    chromium.driver.switch_to.default_content()


def test_a_directory_without_a_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"report\.json cannot be read .*samq-export validate"):
        show(tmp_path)
