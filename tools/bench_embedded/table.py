"""The record as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from samq.calib.parts import IMAGE_ENCODER, MASK_DECODER
from samq.tools.bench_embedded.rows import DECODERS, FP32, REWRITTEN, ROWS
from samq.tools.evaluate import BOX, CLICK
from samq.tools.markdown_table import table

NONE = "—"
SPEED = ("encoder", "ms, median", "ms, least", "× FP32", "× rewritten", "load + first, ms", "peak, MB", "file, MB")
CLICKS = ("decoder, one click", "ms, median", "ms, least", "× FP32")
MASKS = ("encoder and decoder", "box: relative mIoU", "box: agreement", "click: relative mIoU", "click: agreement")


def markdown(record: Mapping[str, Any]) -> str:
    """Speed of encoders and decoders, accuracy of the masks, and where the figures are from."""
    encoders, decoders = record["speed"][IMAGE_ENCODER], record["speed"][MASK_DECODER]
    measured = [key for key in ROWS if "median_ms" in encoders.get(key, {})]
    parts = [
        "### SAM2.1 tiny, 1024×1024, random weights\n",
        table(SPEED, [_encoder(key, encoders) for key in measured]),
        _reasons(encoders),
        table(CLICKS, [_decoder(key, decoders) for key in DECODERS]),
        f"### The demo model, {record['scenes']} held-out scenes\n",
        table(MASKS, [_masks(key, record["masks"]) for key in ROWS if BOX in record["masks"].get(key, {})]),
        _reasons(record["masks"]),
        _source(record, encoders[FP32]["runs"], decoders[FP32]["runs"]),
    ]
    return "\n".join(part for part in parts if part)


def _encoder(key: str, encoders: Mapping[str, Any]) -> list[str]:
    figures = encoders[key]
    peak = figures["peak_bytes"]
    return [
        ROWS[key].title,
        f"{figures['median_ms']:.0f}",
        f"{figures['min_ms']:.0f}",
        *(_ratios(encoders, base, key) for base in (FP32, REWRITTEN)),
        f"{figures['start_ms']:.0f}",
        NONE if peak is None else f"{peak / 1e6:.0f}",
        f"{figures['file_bytes'] / 1e6:.1f}",
    ]


def _decoder(key: str, decoders: Mapping[str, Any]) -> list[str]:
    figures = decoders[key]
    title = ROWS[key].title
    return [title, f"{figures['median_ms']:.1f}", f"{figures['min_ms']:.1f}", _ratios(decoders, FP32, key)]


def _ratios(rows: Mapping[str, Any], base: str, key: str) -> str:
    """How many times as fast as the base: by medians, and by the least."""
    if base not in rows:
        return NONE
    return " / ".join(f"{rows[base][figure] / rows[key][figure]:.2f}" for figure in ("median_ms", "min_ms"))


def _masks(key: str, masks: Mapping[str, Any]) -> list[str]:
    kinds = [masks[key][kind] for kind in (BOX, CLICK)]
    return [
        ROWS[key].title,
        *(f"{kind[figure]:.4f}" for kind in kinds for figure in ("miou_relative", "agreement_iou")),
    ]


def _reasons(rows: Mapping[str, Any]) -> str:
    told = [(key, rows[key]["reason"]) for key in ROWS if "reason" in rows.get(key, {})]
    return "".join(f"- {ROWS[key].title}: none: {reason}\n" for key, reason in told)


def _source(record: Mapping[str, Any], runs: int, clicks: int) -> str:
    facts = record["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return (
        f"`{record['command']}`: {runs} runs of each encoder and {clicks} of each decoder, in turns in one process, "
        f"{record['threads']} threads, on {facts['cores']} cores of {facts['processor']}; {versions}. Load at the "
        f"start and at the end of the timed runs: {record['load'][0]:.1f} and {record['load'][1]:.1f}.\n"
    )
