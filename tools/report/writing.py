"""All files of a report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from samq.files import write_json, write_text
from samq.tools.evaluate import Record, as_json
from samq.tools.report.examples import FOLDER as EXAMPLES
from samq.tools.report.markdown import to_markdown
from samq.tools.report.page import report_page
from samq.tools.report.reading import FOLDER, PROMPTS, REPORT

MARKDOWN, PAGE = "report.md", "report.html"


def write_report(out: Path, report: dict[str, Any], records: list[Record]) -> list[Path]:
    """Write `report.json` and `prompts.json`, and `report.md` and `report.html` from them.

    Pictures that the report does not name are of an earlier one, and go last.

    Args:
        out: the output directory; the pictures that the report names are in it.

    Returns:
        all files of the report.
    """
    folder = out / FOLDER
    write_json(folder / PROMPTS, as_json(records))
    write_json(folder / REPORT, report)
    write_text(folder / MARKDOWN, to_markdown(report))
    write_text(folder / PAGE, report_page(out))
    pictures = [folder / name for example in report["examples"] for name in example["panels"].values()]
    for old in set((folder / EXAMPLES).glob("*.webp")) - set(pictures):
        old.unlink()
    return [*(folder / name for name in (PROMPTS, REPORT, MARKDOWN, PAGE)), *pictures]
