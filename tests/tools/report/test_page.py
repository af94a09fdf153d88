"""The page as people see it: opened in Chromium, at the sizes of a desktop and a phone, light and dark."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from browser import DESKTOP, PHONE, Browser
from conftest import Answer, Inputs, samq

from samq.errors import BadInput
from samq.tools.evaluate import summarize
from samq.tools.report.page import report_page

SCRIPT = "<script>document.title = 'owned'</script>"
IMAGE = "<img src=x onerror=\"document.title = 'owned'\">"
SIZES = {"desktop": DESKTOP, "phone": PHONE}

CONTRASTS = """
(() => {
  const parse = text => text.match(/[\\d.]+/g).map(Number);
  const luminance = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map(v => v / 255).map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const behind = element => {
    for (let e = element; e; e = e.parentElement) {
      const [r, g, b, a] = parse(getComputedStyle(e).backgroundColor);
      if (a === undefined || a > 0) return [r, g, b];
    }
  };
  const poor = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].filter(n => n.nodeType === 3 && n.textContent.trim());
    if (!own.length || !element.getClientRects().length) continue;
    const style = getComputedStyle(element);
    const ink = luminance(parse(element.closest("svg") ? style.fill : style.color));
    const paper = luminance(behind(element));
    const ratio = (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
    if (ratio < 4.5) poor.push(`${ratio.toFixed(2)}: ${own[0].textContent.trim().slice(0, 40)}`);
  }
  return poor;
})()
"""

HIDDEN = """
[...document.querySelectorAll("#verdict .headline, #verdict .claim")].filter(element => {
  const box = element.getBoundingClientRect();
  const inside = box.top >= 0 && box.left >= 0 && box.bottom <= innerHeight && box.right <= innerWidth;
  return !inside || element.scrollWidth > element.clientWidth;
}).map(element => element.textContent.trim())
"""

SMALL_TEXT = """
[...document.querySelectorAll("svg text")].filter(t => t.getClientRects().length)
  .map(t => t.getBoundingClientRect().height).filter(height => height < 11).length
"""


def _altered(finished: Path, folder: Path, change: Callable[[dict[str, Any]], None], prompts: bool = True) -> Path:
    """A copy of a finished output directory, with another report, and the page of it."""
    out = folder / "out"
    shutil.copytree(finished, out)
    file = out / "report" / "report.json"
    report = json.loads(file.read_text())
    change(report)
    file.write_text(json.dumps(report))
    if not prompts:
        (out / "report" / "prompts.json").write_text("[]")
    (out / "report" / "report.html").write_text(report_page(out), encoding="utf-8")
    return out


def _with_misfits(report: dict[str, Any]) -> None:
    for layer in report["layers"][5:30]:
        layer["agrees"] = False
        layer["executed"] = SCRIPT
        layer["notes"] = [IMAGE]
        del layer["placed"]  # as in reports of before
    report["layers"][7]["name"] = IMAGE
    report["disagreements"] = [layer["name"] for layer in report["layers"] if not layer["agrees"]]
    report["commands"] = [{"command": f"samq-export run {SCRIPT}", "stages": ["quantize"]}]
    report["model"] = f"/data/{IMAGE.replace('/', '-')}"
    report["evaluation_data"] = report["calibration"]["calibration"] = SCRIPT
    report["environment"]["processor"] = SCRIPT
    report["folded"] = {"layers": 25, "largest_error": 0.0123, "layer": IMAGE}
    report["engine_log"] = [
        {"engine": f"engines/{IMAGE}", "warnings": [SCRIPT, "x" * 300], "more_warnings": 7, "log": IMAGE},
        {"engine": "engines/trt8/mask_decoder.plan", "warnings": [], "more_warnings": 0, "log": "x" * 300},
    ]


def _unmeasured(report: dict[str, Any]) -> None:
    report["accuracy"] = dict.fromkeys(summarize([]))
    report["examples"] = []
    report["lacks"] = ["accuracy and SQNR: no evaluation images (none: give --eval-data)"]
    report["memory"] = {kind: dict.fromkeys(peaks) for kind, peaks in report["memory"].items()}
    for layer in report["layers"]:
        layer["sqnr_db"] = None


@pytest.fixture(scope="module")
def outs(
    finished: tuple[Path, Answer], inputs: Inputs, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, str]]:
    """Reports of all kinds: output directories, and words of their headlines."""
    photos, misses = tmp_path_factory.mktemp("photos"), tmp_path_factory.mktemp("misses")
    shutil.copy(inputs.photos / "0.png", photos / (IMAGE.replace("/", "-") + ".png"))
    (photos / f"{SCRIPT.replace('/', '-')}.jpg").write_bytes(b"broken")
    shutil.copytree(finished[0], misses / "out")
    command = ["validate", "--output-dir", misses / "out", "--eval-data", photos, "--quiet"]
    assert samq(*command, "--min-relative-miou", 1, "--min-speedup", 1000).code == 3
    found = _altered(finished[0], tmp_path_factory.mktemp("misfits"), _with_misfits)
    points = [{"config": SCRIPT, "bytes": 3_000_000, "miou_relative": 0.99}]
    points += [{"config": "int8", "bytes": 6_000_000, "miou_relative": value} for value in (0.98, 1.0)]
    (found / "report" / "pareto.json").write_text(json.dumps({"points": points}))
    (found / "report" / "report.html").write_text(report_page(found), encoding="utf-8")
    return {
        "finished": (finished[0], "Built as requested"),
        "missed gates, photos": (misses / "out", "Missed: agreement with the baseline"),
        "misfits, search": (found, "do not execute what was requested"),
        "no evaluation": (
            _altered(finished[0], tmp_path_factory.mktemp("none"), _unmeasured, prompts=False),
            "accuracy was not measured",
        ),
    }


KINDS = ("finished", "missed gates, photos", "misfits, search", "no evaluation")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_report_opens_without_fault_and_its_verdict_is_seen_at_once(
    chromium: Browser, outs: dict[str, tuple[Path, str]], kind: str, size: str, dark: bool
) -> None:
    out, words = outs[kind]
    page = out / "report" / "report.html"
    chromium.open(page, SIZES[size], dark=dark)
    assert chromium.ask("[innerWidth, innerHeight]") == list(SIZES[size])
    assert chromium.complaints() == []
    assert [url for url in chromium.requests() if not url.startswith("data:")] == [page.resolve().as_uri()]
    assert chromium.ask("[...document.images].filter(i => !i.complete || !i.naturalWidth).length") == 0
    assert words in chromium.ask("document.querySelector('.headline').textContent")
    assert chromium.ask("document.querySelectorAll('#verdict .claim').length") == 4
    assert chromium.ask(HIDDEN) == []
    assert chromium.ask("document.documentElement.scrollWidth") <= SIZES[size][0]
    chromium.ask("document.querySelectorAll('details').forEach(element => element.open = true)")
    assert chromium.ask("document.documentElement.scrollWidth") <= SIZES[size][0]
    assert chromium.ask(CONTRASTS) == []
    assert chromium.ask(SMALL_TEXT) == 0
    light = chromium.ask("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0]") > 128
    assert light is not dark


def test_hostile_names_are_text(chromium: Browser, outs: dict[str, tuple[Path, str]]) -> None:
    for kind, told in (("misfits, search", SCRIPT), ("missed gates, photos", SCRIPT.replace("/", "-"))):
        chromium.open(outs[kind][0] / "report" / "report.html", DESKTOP)
        assert chromium.ask("document.title").startswith("samq: ")
        assert chromium.ask("document.scripts.length") == 0
        assert (
            chromium.ask("document.querySelectorAll('[onerror], img:not([src^=\"data:image/webp;base64,\"])').length")
            == 0
        )
        text = chromium.ask("document.body.textContent")
        assert told in text
        assert IMAGE.replace("/", "-") in text


def test_masks_are_shown_for_the_worst_the_median_and_the_best(
    chromium: Browser, finished: tuple[Path, Answer]
) -> None:
    chromium.open(finished[0] / "report" / "report.html", DESKTOP)
    shown = chromium.ask("[...document.querySelectorAll('.example')].map(e => e.querySelector('b').textContent.trim())")
    assert shown == ["worst 1", "worst 2", "worst 3", "median 1", "median 2", "best"]
    sides = "[...document.querySelectorAll('.example')].map(e => [...e.querySelectorAll('img')].map(i => i.offsetTop))"
    assert [len(set(row)) for row in chromium.ask(sides)] == [1] * 6  # side by side
    assert chromium.ask("document.images.length") == 24


def test_every_section_is_there_when_its_figures_are(chromium: Browser, outs: dict[str, tuple[Path, str]]) -> None:
    always = {"verdict", "layers", "cost", "made"}
    expected = {
        "finished": always | {"masks", "accuracy"},
        "missed gates, photos": always | {"lacks", "masks", "accuracy"},
        "misfits, search": always | {"masks", "accuracy", "search"},
        "no evaluation": always | {"lacks"},
    }
    for kind, sections in expected.items():
        chromium.open(outs[kind][0] / "report" / "report.html", DESKTOP)
        assert set(chromium.ask("[...document.querySelectorAll('section')].map(e => e.id)")) == sections
        links = chromium.ask("[...document.querySelectorAll('nav a')].map(a => a.hash.slice(1))")
        assert set(links) == sections - {"verdict", "lacks"}


def test_the_page_has_the_figures_of_the_report(chromium: Browser, finished: tuple[Path, Answer]) -> None:
    out, answer = finished
    chromium.open(out / "report" / "report.html", DESKTOP)
    text = chromium.ask("document.body.textContent")
    report = answer.json
    accuracy = report["accuracy"]
    for part in (accuracy, *accuracy["by_kind"].values(), *accuracy["by_size"].values()):
        if part["count"]:
            assert all(f"{part[key]:.4f}" in text for key in ("miou_baseline", "miou_quantized", "agreement_iou"))
    assert all(layer["name"] in text and layer["executed"] in text for layer in report["layers"])
    assert all(f"{layer['sqnr_db']:.1f}" in text for layer in report["layers"] if layer["sqnr_db"])
    assert all(f"{value:,}" in text for key, value in report["size"].items() if key.endswith("_bytes"))
    assert report["commands"][0]["command"] in text
    assert all(line in text for lines in report["log"].values() for line in lines)
    assert (out / "config.yaml").read_text() in text


def test_misfits_come_first(chromium: Browser, outs: dict[str, tuple[Path, str]]) -> None:
    out = outs["misfits, search"][0]
    chromium.open(out / "report" / "report.html", DESKTOP)
    rows = "[...document.querySelectorAll('#layers details tbody tr')].map(row => row.className)"
    classes = chromium.ask(rows)
    assert classes == sorted(classes, reverse=True)
    assert classes.count("misfit") == 25
    assert chromium.ask("document.querySelectorAll('#layers > .scroll')[1].querySelectorAll('tbody tr').length") == 25


def test_the_same_files_make_the_same_page(finished: tuple[Path, Answer]) -> None:
    out = finished[0]
    assert report_page(out) == (out / "report" / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["report/report.json", "report/prompts.json", "config.yaml"])
def test_a_missing_file_is_named(finished: tuple[Path, Answer], tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    (out / name).unlink()
    with pytest.raises(BadInput, match=name):
        report_page(out)


def test_pictures_are_read_from_their_own_folder_only(finished: tuple[Path, Answer], tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")

    def pointed_elsewhere(report: dict[str, Any]) -> None:
        report["examples"][0]["panels"]["photo"] = "../../secret"

    with pytest.raises(BadInput, match="examples/secret"):
        _altered(finished[0], tmp_path, pointed_elsewhere)


def test_a_report_of_another_version_is_refused(finished: tuple[Path, Answer], tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="another version of samq; run `samq-export validate"):
        _altered(finished[0], tmp_path, lambda report: report.pop("schema"))
