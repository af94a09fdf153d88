"""Several runs in one table, and what in it cannot be compared."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from browser import DESKTOP, PHONE, Browser
from conftest import Answer, refused, samq

from samq.tools.report.compare import MARK, as_text, read_runs

HOSTILE = "<script>alert(1)<" + "script>"


@pytest.fixture
def other(finished: tuple[Path, Answer], tmp_path: Path) -> Callable[..., Path]:
    """Makes another run: the report of the finished one with some values changed."""

    def make(name: str = "other", **changes: Any) -> Path:
        out = tmp_path / name
        (out / "report").mkdir(parents=True)
        report = json.loads((finished[0] / "report" / "report.json").read_text())
        for key, value in changes.items():
            report[key] = report[key] | value if isinstance(value, dict) else value
        (out / "report" / "report.json").write_text(json.dumps(report))
        return out

    return make


@pytest.mark.parametrize(
    ("changes", "marked", "reason"),
    [
        ({}, set(), ""),
        ({"checkpoint": "f" * 64}, {"accuracy", "size", "speed", "memory"}, "another model"),
        ({"evaluation_fingerprint": "f" * 64}, {"accuracy"}, "other evaluation images"),
        ({"environment": {"processor": "a faster one"}}, {"speed", "memory"}, "another machine"),
        ({"latency": {"baseline": "FP16 plans"}}, {"speed"}, "another baseline"),
        ({"environment": {"python": "3.10.0"}}, set(), ""),
    ],
)
def test_what_cannot_be_compared_says_why(
    finished: tuple[Path, Answer], other: Callable[..., Path], changes: dict[str, Any], marked: set[str], reason: str
) -> None:
    first, second = read_runs([finished[0], other(**changes)])
    assert first.differs == {}
    assert second.differs == dict.fromkeys(marked, reason)


def test_the_table_marks_what_cannot_be_compared(finished: tuple[Path, Answer], other: Callable[..., Path]) -> None:
    text = as_text(read_runs([finished[0], other(evaluation_fingerprint="f", latency={"speedup": 3.0})]))
    rows = {line[:25].strip(): line for line in text.splitlines()}
    relative = finished[1].json["accuracy"]["miou_relative"]
    assert rows["mIoU, relative"].split()[-3:] == [f"{relative:.4f}", f"{relative:.4f}", MARK]
    assert rows["speedup"].endswith("3.00×")
    assert MARK not in rows["speedup"] + rows["ONNX files"] + rows["model"]
    assert text.endswith(f"{MARK} 2: accuracy cannot be compared with 1: other evaluation images")


def test_the_command_answers_a_table_or_json(finished: tuple[Path, Answer], other: Callable[..., Path]) -> None:
    out = other(
        f"{HOSTILE}\n",
        gates=[{"option": "--min-speedup", "gate": "speedup", "asked": 2, "reached": 1.0, "passed": False}],
    )
    table = samq("compare", finished[0], out)
    assert table.code == 0, table.err
    assert f"2  {out.parent / HOSTILE}\\n" in table.out.splitlines()
    runs = samq("compare", finished[0], out, "--json").json["runs"]
    report = finished[1].json
    assert [run["output_dir"] for run in runs] == [str(finished[0]), str(out)]
    assert [run["verdict"] for run in runs] == ["plain", "missed"]
    assert runs[0]["miou_relative"] == report["accuracy"]["miou_relative"]
    assert runs[0]["onnx_bytes"] == report["size"]["onnx_bytes"]
    assert runs[0]["not_comparable"] == {}


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_the_page_opens_without_fault(
    chromium: Browser, finished: tuple[Path, Answer], other: Callable[..., Path], tmp_path: Path, size: tuple[int, int]
) -> None:
    outs = [finished[0], other(HOSTILE, size={"quantized_layers_bytes": 1}), other("third", checkpoint="f")]
    page = tmp_path / "compare.html"
    assert samq("compare", *outs, "--html", page).code == 0
    chromium.open(page, size)
    assert chromium.complaints() == []
    assert chromium.requests() == [page.as_uri()]
    assert chromium.ask("document.documentElement.scrollWidth") <= size[0]
    assert chromium.ask("document.querySelectorAll('tbody tr:first-child td').length") == 3
    assert chromium.ask("document.scripts.length") == 0
    assert HOSTILE in chromium.ask("document.querySelector('.runs').textContent")
    text = chromium.ask("document.body.textContent")
    assert "3: accuracy cannot be compared with 1: another model" in text
    plots = (
        "[...document.querySelectorAll('#plots svg')].filter(s => s.getClientRects().length).map(s => s.textContent)"
    )
    accuracy, latency = chromium.ask(plots)
    assert "relative mIoU" in accuracy
    assert "run 2" in latency
    assert "run 3" not in latency


def test_refusals(finished: tuple[Path, Answer], other: Callable[..., Path], tmp_path: Path) -> None:
    refused(samq("compare", finished[0]), 2, "two or more")
    refused(samq("compare"), 2, "two or more")
    refused(samq("compare", finished[0], tmp_path), 6, "report.json", "samq-export validate")
    broken = tmp_path / "broken"
    shutil.copytree(other(), broken)
    (broken / "report" / "report.json").write_text("{")
    refused(samq("compare", finished[0], broken), 6, "not JSON", "samq-export validate")
    shutil.copy(finished[0] / "report" / "report.json", broken / "report")
    (broken / "manifest.json").write_text(json.dumps({"job": {}, "fingerprint": "f", "stages": {}}))
    refused(samq("compare", finished[0], broken), 6, "its report is of what was there before", "samq-export validate")
