"""The report: every figure as JSON, and the same as a page, as Markdown, and in a notebook.

build.py      figures → report.json
verdict.py    what was asked, what was achieved
examples.py   which prompts are shown, and panels.py their pictures
page.py       a finished output directory → report.html, with plots.py and templates/
compare.py    several of them → one table and page
"""

from samq.tools.report.notebook import show

__all__ = ["show"]
