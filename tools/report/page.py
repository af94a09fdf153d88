"""`report.html`: the report as one page that needs nothing but itself, made of the files of an output directory."""

from __future__ import annotations

import base64
from itertools import groupby
from pathlib import Path
from typing import Any

from markupsafe import Markup

from samq.calib.parts import PARTS
from samq.errors import BadInput
from samq.tools.evaluate import BOX, CLICK
from samq.tools.report import plots
from samq.tools.report.examples import FOLDER as EXAMPLES
from samq.tools.report.pareto import Tried, front, read_search
from samq.tools.report.plots import Bar, Point
from samq.tools.report.reading import FOLDER, read_bytes, read_prompts, read_report
from samq.tools.report.rendering import render
from samq.tools.report.units import data_size, milliseconds
from samq.tools.report.verdict import (
    FLOAT,
    agreement_with_fp32,
    claims,
    executes_as_told,
    folded_branches,
    headline,
    kernel_rows,
    placed_layers,
)

NOISIEST = 5  # layers that are named beside the plot
IN_WORDS = {"image_encoder": "image encoder", "mask_decoder": "mask decoder"}


def report_page(out: Path) -> str:
    """The page of a finished output directory.

    Raises:
        BadInput: `report/` lacks a file, or one is unreadable.
    """
    report = read_report(out)
    search = read_search(out / FOLDER)
    return render(
        "report.html.j2",
        report=report,
        model=model_name(report),
        headline=headline(report),
        claims=claims(report),
        examples=_examples(out, report),
        accuracy=_accuracy_rows(report),
        half=_half_precision(report),
        layers=sorted(report["layers"], key=executes_as_told),
        misfits=[layer for layer in report["layers"] if not executes_as_told(layer)],
        executes_as_told=executes_as_told,
        noisiest=_noisiest(report),
        executions=_executions(report),
        placed=placed_layers(report),
        folded=folded_branches(report),
        kernels=kernel_rows(report),
        engine_log=report.get("engine_log", []),
        search=search,
        front=front(search),
        config=_config(out),
        plots=_plots(out, report, search),
        parts=IN_WORDS,
    )


def model_name(report: dict[str, Any]) -> str:
    """The model, short: a hub id, or the last two folders of a path."""
    return "/".join(Path(report["model"]).parts[-2:])


def _config(out: Path) -> str:
    try:
        return (out / "config.yaml").read_text(encoding="utf-8")
    except OSError as error:
        raise BadInput(f"{out / 'config.yaml'} cannot be read ({error.strerror}); run again with --force") from error


def _examples(out: Path, report: dict[str, Any]) -> list[dict[str, Any]]:
    """The prompts to show, their pictures as data URIs."""

    def picture(name: str) -> str:
        content = read_bytes(out, f"{EXAMPLES}/{Path(name).name}")
        return f"data:image/webp;base64,{base64.b64encode(content).decode()}"

    return [
        example | {"panels": {panel: picture(name) for panel, name in example["panels"].items()}}
        for example in report["examples"]
    ]


def _accuracy_rows(report: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    accuracy = report["accuracy"]
    if not accuracy["count"]:
        return []
    groups = [("all prompts", accuracy), *accuracy["by_kind"].items(), *accuracy["by_size"].items()]
    return [(name, figures) for name, figures in groups if figures["count"]]


def _half_precision(report: dict[str, Any]) -> dict[str, str] | None:
    """State and words of the FP16 baseline; None where it is in FP32, or was not compared."""
    half = report.get("half_precision")
    return None if half is None else {"state": half["state"], "words": agreement_with_fp32(half)}


def _executions(report: dict[str, Any]) -> list[tuple[str, str, int, bool]]:
    """(requested, executed, layers, as told), misfits first."""

    def kind(layer: dict[str, Any]) -> tuple[bool, str, str]:
        return executes_as_told(layer), layer["requested"], layer["executed"]

    grouped = groupby(sorted(report["layers"], key=kind), kind)
    rows = [(requested, executed, len(list(layers)), agrees) for (agrees, requested, executed), layers in grouped]
    return sorted(rows, key=lambda row: (row[3], row[0] == FLOAT))


def _noisiest(report: dict[str, Any]) -> list[dict[str, Any]]:
    measured = [layer for layer in report["layers"] if layer["sqnr_db"] is not None]
    return sorted(measured, key=lambda layer: float(layer["sqnr_db"]))[:NOISIEST]


def _plots(out: Path, report: dict[str, Any], search: list[Tried]) -> dict[str, Markup]:
    """All plots by name; one whose figures were not measured is empty."""
    return {
        "agreement": _agreement_plot(out),
        "sqnr": _sqnr_plot(report),
        "size": _size_plot(report),
        "latency": _latency_plot(report),
        "memory": _memory_plot(report),
        "search": _search_plot(search),
    }


def _agreement_plot(out: Path) -> Markup:
    prompts = read_prompts(out)
    kinds = {
        f"{kind} prompts": [prompt["agreement"] for prompt in prompts if prompt["kind"] == kind]
        for kind in (BOX, CLICK)
    }
    return plots.histogram(kinds, "mask IoU with the baseline", "prompts") if prompts else Markup("")


def _sqnr_plot(report: dict[str, Any]) -> Markup:
    decibels = [
        (IN_WORDS[layer["part"]], layer["sqnr_db"], executes_as_told(layer))
        for layer in report["layers"]
        if layer["sqnr_db"] is not None
    ]
    return plots.along_network(decibels) if decibels else Markup("")


def _search_plot(search: list[Tried]) -> Markup:
    if not search:
        return Markup("")
    best = front(search)
    points = [
        Point(one.bytes / 1e6, one.miou_relative, one.config if one in best else "", one in best) for one in search
    ]
    title = "Size and accuracy of every configuration tried"
    return plots.scatter("search", title, points, "size (MB)", "relative mIoU")


def _size_plot(report: dict[str, Any]) -> Markup:
    size = report["size"]

    def bar(key: str, colour: str) -> Bar:
        return Bar(size[key], data_size(size[key]), colour)

    groups = {
        "ONNX, FP32": [bar("onnx_fp32_bytes", plots.BASELINE)],
        "ONNX, FP16": [bar("onnx_fp16_bytes", plots.BASELINE)],
        "ONNX, quantized": [bar("onnx_bytes", plots.QUANTIZED)],
        "engine files": [bar("engine_bytes", plots.QUANTIZED)],
        "layers, FP16": [bar("quantized_layers_fp16_bytes", plots.BASELINE)],
        "layers, quantized": [bar("quantized_layers_bytes", plots.QUANTIZED)],
    }
    return plots.bars("size", "Sizes in bytes", groups)


def _latency_plot(report: dict[str, Any]) -> Markup:
    def pair(times: dict[str, Any]) -> list[Bar]:
        before, after = times["baseline_ms"], times["quantized_ms"]
        return [
            Bar(before, milliseconds(before), plots.BASELINE),
            Bar(after, f"{milliseconds(after)} ({times['speedup']:.2f}×)", plots.QUANTIZED),
        ]

    latency = report["latency"]
    groups = {"together": pair(latency)} | {IN_WORDS[part]: pair(latency[part]) for part in PARTS}
    return plots.bars("latency", "Latency of baseline and quantized engine in milliseconds", groups)


def _memory_plot(report: dict[str, Any]) -> Markup:
    memory = report["memory"]
    measured = {f"stage {stage}": (peak, plots.OTHER) for stage, peak in memory["stages"].items()}
    measured["baseline engine"] = (memory["engine"].get("baseline_bytes"), plots.BASELINE)
    measured["quantized engine"] = (memory["engine"].get("quantized_bytes"), plots.QUANTIZED)
    groups = {
        label: [Bar(peak, data_size(peak), colour)] for label, (peak, colour) in measured.items() if peak is not None
    }
    return plots.bars("memory", "Peak memory in bytes", groups) if groups else Markup("")
