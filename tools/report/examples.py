"""Which prompts the report shows, and their pictures in `report/examples/`."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from samq.calib.processor import SamProcessor
from samq.calib.sources import Sample
from samq.engines.predictor import Predictor
from samq.files import written_whole
from samq.tools.evaluate import Record, answers_to
from samq.tools.report.panels import draw_panels

FOLDER = "examples"
WORST, MEDIAN, BEST = "worst", "median", "best"
SHOWN = {WORST: 3, MEDIAN: 2, BEST: 1}
QUALITY = 82  # of the WebP files


def choose(records: list[Record]) -> dict[str, list[Record]]:
    """The prompts whose masks agree least, about as much as the median, and most.

    No prompt is chosen twice, so that of a few prompts there are fewer. Of equal ones, the largest object is best.
    """
    ordered = sorted(records, key=lambda record: (record.agreement, record.share))
    starts = {WORST: 0, MEDIAN: len(ordered) // 2, BEST: len(ordered) - SHOWN[BEST]}
    chosen: dict[str, list[Record]] = {}
    free = set(range(len(ordered)))
    for rank in (WORST, BEST, MEDIAN):
        taken = [index for index in range(starts[rank], starts[rank] + SHOWN[rank]) if index in free]
        free -= set(taken)
        chosen[rank] = [ordered[index] for index in taken]
    return {rank: chosen[rank] for rank in SHOWN}


def draw_examples(
    baseline: Predictor,
    quantized: Predictor,
    samples: Iterable[Sample],
    processor: SamProcessor,
    records: list[Record],
    report: Path,
) -> list[dict[str, Any]]:
    """Answer the chosen prompts once more, for masks of all prompts would not fit into memory, and draw them.

    Args:
        samples: the images of `records`, in any order; read until all chosen ones are found.
        records: all that was evaluated.
        report: the report's folder; the pictures go to its `examples/`.

    Returns:
        one object a prompt: `rank`, `place` in it, the record, and `panels`, name → file relative to `report`. Of a
        dataset that gives another image the second time, prompts may be missing.
    """
    wanted = {
        _key(record): (rank, place)
        for rank, chosen in choose(records).items()
        for place, record in enumerate(chosen, start=1)
    }
    images = {name for name, *_ in wanted}
    drawn: dict[tuple[str, int], dict[str, Any]] = {}
    for sample in samples if wanted else ():
        if sample.name not in images:
            continue
        for answer in answers_to(baseline, quantized, sample, processor):
            place = wanted.get(_key(answer.record))
            if place is not None and place not in drawn:
                panels = _write(draw_panels(sample.image, answer), report, f"{place[0]}-{place[1]}")
                drawn[place] = {"rank": place[0], "place": place[1], **asdict(answer.record), "panels": panels}
        if len(drawn) == len(wanted):
            break
    return [drawn[place] for place in wanted.values() if place in drawn]


def _key(record: Record) -> tuple[Any, ...]:
    return (record.image, record.kind, *record.prompt)


def _write(panels: dict[str, Any], report: Path, name: str) -> dict[str, str]:
    files = {}
    for panel, image in panels.items():
        encoded = io.BytesIO()
        image.save(encoded, "WEBP", quality=QUALITY, method=6)
        files[panel] = f"{FOLDER}/{name}-{panel}.webp"
        with written_whole(report / files[panel]) as temporary:
            temporary.write_bytes(encoded.getvalue())
    return files
