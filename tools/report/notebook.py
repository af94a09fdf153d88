"""The report in a notebook."""

from __future__ import annotations

import os
from pathlib import Path

from markupsafe import escape

from samq.tools.report.page import report_page


class Shown:
    """A page that notebooks display in a frame of its own, where it can neither run scripts nor change the notebook.

    Args:
        html: the page.
        height: of the frame, in CSS pixels.
    """

    def __init__(self, html: str, height: int) -> None:
        self.html = html
        self.height = height

    def _repr_html_(self) -> str:
        style = f"width: 100%; height: {self.height}px; border: 0"
        return f'<iframe sandbox="" title="samq report" style="{style}" srcdoc="{escape(self.html)}"></iframe>'


def show(out: str | os.PathLike[str], height: int = 800) -> Shown:
    """Display the report of a finished output directory: let it be the last expression of a notebook's cell.

    Args:
        out: the output directory.
        height: of the frame, in CSS pixels.

    Raises:
        BadInput: the directory has no report, or one of another version of samq.
    """
    return Shown(report_page(Path(out)), height)
