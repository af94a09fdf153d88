"""`samq-export search`: what it writes, what `run` makes of it, how it goes on, and how it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import Answer, Inputs, refused, samq

from samq.quant.config import load_recipe
from samq.tools import search as searching
from samq.tools.outdir import OutputDir
from samq.tools.report.pareto import read_search


def arguments(inputs: Inputs, *more: object) -> list[object]:
    """A search that takes seconds."""
    return [
        "search", "--model-path", inputs.checkpoint, "--calib-data", inputs.photos, "--num-calib-samples", 2,
        "--config", "int4_w4a8", "--eval-data", inputs.coco, "--sensitivity-images", 1, "--points", 2,
        "--candidates", "float,int8,int4", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def budget(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> int:
    """Half way between all layers in 4 bits and in 8."""
    sizes = []
    for config in ("int4_w4a8", "int8_w8a8"):
        told = samq(
            "run", "--model-path", inputs.checkpoint, "--calib-data", inputs.photos, "--config", config,
            "--output-dir", "unused", "--dry-run", "--json",
        )  # fmt: skip
        sizes.append(told.json["total"]["planned_bytes"])
    assert sizes[0] < sizes[1]
    return int(sum(sizes) // 2)


@pytest.fixture(scope="module")
def searched(inputs: Inputs, budget: int, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Answer]:
    """The output directory of a search and its answer; not to be changed."""
    out = tmp_path_factory.mktemp("searched") / "out"
    answer = samq(*arguments(inputs, "--max-bytes", budget, "--output-dir", out, "--json"))
    assert answer.code == 0, answer.err
    return out, answer


@pytest.fixture
def copied(searched: tuple[Path, Answer], tmp_path: Path) -> Path:
    """A copy of the searched directory."""
    return Path(shutil.copytree(searched[0], tmp_path / "out"))


def test_it_writes_the_front_the_plot_and_the_winner(searched: tuple[Path, Answer], budget: int) -> None:
    out, answer = searched
    found = answer.json
    assert found["best"] in found["points"]
    assert -1 <= found["rank_correlation"] <= 1
    assert found["best"]["bytes"] <= budget
    fitting = [point for point in found["points"] if point["bytes"] <= budget]
    assert found["best"]["agreement"] == max(point["agreement"] for point in fitting)
    assert {"int4_w4a8", "int8"} <= {point["config"] for point in found["points"]}
    mixes = [point for point in found["points"] if point["config"].startswith("mix-")]
    assert max(point["bytes"] for point in mixes if point["bytes"] <= budget) > 0.97 * budget
    tried = {(point.config, point.bytes, point.miou_relative) for point in read_search(out / "report")}
    assert tried == {(point["config"], point["bytes"], point["miou_relative"]) for point in found["points"]}
    plot = (out / "report" / "pareto.svg").read_text()
    assert all(point["config"] in plot for point in found["points"])
    assert found["config"] == str(out / "search" / "best.yaml")
    assert "effect of 23 layers as int4" in answer.err


def test_the_bytes_of_a_mix_are_those_that_a_dry_run_counts(searched: tuple[Path, Answer], inputs: Inputs) -> None:
    out, answer = searched
    for point in answer.json["points"]:
        if point["config"].startswith("mix-"):
            told = samq(
                "run", "--model-path", inputs.checkpoint, "--calib-data", inputs.photos, "--dry-run", "--json",
                "--config", out / "search" / f"{point['config']}.yaml", "--output-dir", out,
            ).json  # fmt: skip
            assert told["total"]["planned_bytes"] == point["bytes"] == int(point["config"].removeprefix("mix-"))
            assert len({layer["becomes"].partition(",")[0] for layer in told["layers"]}) > 1


def test_run_takes_a_mix_and_the_report_tells_each_layers_own_form(
    searched: tuple[Path, Answer], copied: Path, inputs: Inputs
) -> None:
    mixes = [point for point in searched[1].json["points"] if point["config"].startswith("mix-")]
    name = max(mixes, key=lambda point: int(point["bytes"]))["config"]
    answer = samq(
        "run", "--model-path", inputs.checkpoint, "--calib-data", inputs.photos, "--eval-data", inputs.coco,
        "--config", copied / "search" / f"{name}.yaml", "--output-dir", copied, "--json",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    recipe = load_recipe(str(copied / "search" / f"{name}.yaml"))
    assert recipe.layers
    assert answer.json["disagreements"] == []
    forms = set()
    for layer in answer.json["layers"]:
        if layer["requested"] != "float":
            own = recipe.of_layer(layer["name"])
            forms.add(f"W{own.wgts.bits}A8")
            assert layer["requested"] == f"W{own.wgts.bits}A8: INT8 GEMM"
            assert layer["executed"].startswith("INT8 GEMM")
        elif recipe.stays_float(layer["name"]):
            assert layer["skipped_because"] == f"layers.{layer['name']}"
    assert answer.json["format"] == " and ".join(sorted(forms))
    assert "Size and accuracy of every configuration tried" in (copied / "report" / "report.html").read_text()
    # A search that goes on beside a report shows in its page, and the manifest knows the new one.
    before = (copied / "report" / "report.html").read_text()
    smaller = searched[1].json["best"]["bytes"]
    assert samq(*arguments(inputs, "--max-bytes", smaller, "--points", 1, "--output-dir", copied)).code == 0
    assert (copied / "report" / "report.html").read_text() != before
    assert OutputDir.open(copied).done("validate")


def test_it_goes_on_where_it_stopped(
    searched: tuple[Path, Answer], copied: Path, inputs: Inputs, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    state_file = copied / "search" / searching.STATE
    state = json.loads(state_file.read_text())
    lost = dict([state["measured"].popitem()])
    state_file.write_text(json.dumps(state))
    quantized: list[str] = []
    really = vars(searching)["quantize"]

    def counted(model: Any, recipe: Any, *more: Any) -> Any:
        quantized.append(recipe.to_yaml())
        return really(model, recipe, *more)

    monkeypatch.setattr(searching, "quantize", counted)
    answer = samq(*arguments(inputs, "--max-bytes", budget, "--output-dir", copied, "--json"))
    assert answer.json["points"] == searched[1].json["points"]
    assert len(quantized) == len(lost) == 1


def test_interrupted_it_keeps_what_it_measured(
    inputs: Inputs, budget: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(searching, "evaluate", interrupted)
    answer = samq(*arguments(inputs, "--max-bytes", budget, "--output-dir", tmp_path / "out"))
    assert answer.code == 130
    state = json.loads((tmp_path / "out" / "search" / searching.STATE).read_text())
    assert state["effects"].keys() == {"int8"}
    assert state["measured"] == {}


def test_the_smallest_that_is_accurate_enough(searched: tuple[Path, Answer], copied: Path, inputs: Inputs) -> None:
    reached = sorted(point["miou_relative"] for point in searched[1].json["points"])
    answer = samq(*arguments(inputs, "--min-relative-miou", min(reached[0], 1.0), "--output-dir", copied, "--json"))
    found = answer.json
    assert found["best"]["bytes"] == min(
        point["bytes"] for point in found["points"] if point["miou_relative"] >= min(reached[0], 1.0)
    )


def test_where_none_is_accurate_enough_the_front_is_written(
    copied: Path, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(searching, "_best", lambda *_: None)  # random weights reach any accuracy by chance
    (copied / "report" / "pareto.json").unlink()
    answer = samq(*arguments(inputs, "--min-relative-miou", 1.0, "--output-dir", copied))
    refused(answer, 3, "relative mIoU is", "at most", "below --min-relative-miou 1.0")
    assert read_search(copied / "report")


def test_a_budget_that_nothing_fits_is_refused_before_anything_is_measured(inputs: Inputs, tmp_path: Path) -> None:
    answer = samq(*arguments(inputs, "--max-bytes", 1000, "--output-dir", tmp_path / "out"))
    refused(answer, 2, "--max-bytes 1000: the smallest of these configurations takes ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ([], "give either --max-bytes or --min-relative-miou"),
        (["--max-bytes", 10, "--min-relative-miou", 0.9], "give either --max-bytes or --min-relative-miou"),
        (["--max-bytes", 10, "--candidates", "int4,int3"], "'int3' is no candidate"),
        (["--max-bytes", 10, "--config", "int4_w4only_rtn"], "a search measures on calibration images"),
    ],
)
def test_bad_usage(more: list[object], words: str, inputs: Inputs, tmp_path: Path) -> None:
    refused(samq(*arguments(inputs, "--output-dir", tmp_path / "out", *more)), 2, words)


def test_another_search_is_not_overwritten(copied: Path, inputs: Inputs, budget: int) -> None:
    other = arguments(inputs, "--max-bytes", budget, "--output-dir", copied, "--seed", 1)
    refused(samq(*other), 2, "holds another search", "--force")
    before = json.loads((copied / "search" / searching.STATE).read_text())
    assert samq(*other, "--force").code == 0
    assert json.loads((copied / "search" / searching.STATE).read_text())["fingerprint"] != before["fingerprint"]


def test_a_broken_state_is_told(copied: Path, inputs: Inputs, budget: int) -> None:
    (copied / "search" / searching.STATE).write_text("{")
    refused(samq(*arguments(inputs, "--max-bytes", budget, "--output-dir", copied)), 6, "is unreadable", "--force")


def test_run_takes_no_directory_with_more_in_it_than_a_search(copied: Path, inputs: Inputs) -> None:
    (copied / "mine.txt").write_text("mine")
    answer = samq(
        "run", "--model-path", inputs.checkpoint, "--calib-data", inputs.photos,
        "--config", copied / "search" / "best.yaml", "--output-dir", copied,
    )  # fmt: skip
    refused(answer, 2, "is not empty and not samq's")
    assert (copied / "search" / searching.STATE).is_file()
