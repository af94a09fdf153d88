"""The files of a report."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from conftest import Answer

from samq.tools.report.writing import write_report


def test_pictures_of_an_earlier_report_go(finished: tuple[Path, Answer], tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    report = json.loads((out / "report" / "report.json").read_text())
    removed = report["examples"].pop()
    written = write_report(out, report, [])
    assert set(written) == {path for path in (out / "report").rglob("*") if path.is_file()}
    assert not set(removed["panels"].values()) & {str(path.relative_to(out / "report")) for path in written}
    assert len(written) == 4 + 4 * len(report["examples"])
