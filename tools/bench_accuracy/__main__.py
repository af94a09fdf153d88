"""Accuracy of samq's methods beside ModelOpt's and llm-compressor's, on a demo model and on its hostile variant.

    python -m samq.tools.bench_accuracy --json FILE            measures what is not in FILE yet, row by row
    python -m samq.tools.bench_accuracy --json FILE --table    prints FILE as Markdown

All methods quantize the same layers of the same checkpoint, calibrated on the same images, and are simulated in PyTorch
on the same prompts and held-out scenes. A row is in FILE as soon as it is measured, so that a run may be cut off at any
time and the same command goes on; rows of other code, peers or scenes are measured anew. Several processes may share
FILE, each with its own --models. Where a peer refuses, its message is the row. How to install the peers stands in
docs/accuracy.md.

Exit codes: 0 done; 2 bad usage or config; 5 FILE cannot be written; 6 FILE is no record, or the photos are none.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from samq.errors import SamqError
from samq.tools.arguments import command_line, count
from samq.tools.bench_accuracy.method import MODELS
from samq.tools.bench_accuracy.record import Record, read_record
from samq.tools.bench_accuracy.rows import METHODS, rows
from samq.tools.bench_accuracy.session import Session, Settings
from samq.tools.bench_accuracy.table import markdown
from samq.tools.demo.dataset import CALIBRATION_IMAGES, SCENES
from samq.tools.report.environment import environment


def main(arguments: list[str] | None = None) -> int:
    """Measure, and print the table; returns the exit code."""
    given = _parser().parse_args(arguments)
    try:
        methods = rows(given.methods, given.config)
        if not given.table:
            command = command_line("samq.tools.bench_accuracy", arguments)
            record = Record(given.json, {"command": command, **environment()})
            settings = Settings(given.scenes, given.calibration, given.photos, given.redo)
            Session(record, settings).measure(given.models, methods)
        print(markdown(read_record(given.json), methods), end="")
    except SamqError as error:
        print(f"bench_accuracy: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bench_accuracy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--json", type=Path, default=Path("out/accuracy.json"), help="the record (default: %(default)s)"
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="METHOD", help=", ".join(METHODS))
    parser.add_argument("--config", nargs="+", default=[], help="YAML files that get a row each, as search/best.yaml")
    parser.add_argument("--scenes", type=count(SCENES), default=SCENES, help="held-out scenes (default: %(default)s)")
    parser.add_argument(
        "--calibration",
        type=count(CALIBRATION_IMAGES),
        default=CALIBRATION_IMAGES,
        help="calibration images (default: %(default)s)",
    )
    parser.add_argument("--photos", type=Path, help="folder of images on which agreement with FP32 is measured")
    parser.add_argument("--redo", action="store_true", help="measure again what is measured")
    parser.add_argument("--table", action="store_true", help="only print the record as Markdown")
    return parser


if __name__ == "__main__":
    sys.exit(main())
