"""Every way to run SAM2's image encoder on this GPU, measured: PyTorch, ONNX Runtime, and TensorRT, naive and ours.

    python -m samq.tools.bench_gpu --prepare --work FOLDER        traces the graphs; needs no GPU, but takes minutes
    python -m samq.tools.bench_gpu --build --work FOLDER          builds the plans, --jobs at once
    python -m samq.tools.bench_gpu --work FOLDER --json FILE      measures what is not in FILE yet, cell by cell
    python -m samq.tools.bench_gpu --json FILE --table            prints FILE as Markdown; needs no GPU

A cell is a row for one model and one batch. It is in FILE as soon as it is measured, so that a run may be cut off at
any time and the same command goes on. Cells of older code, and what the machine lacked, are measured anew. Graphs and
plans are kept in the folder of --work. Models have random weights, but for the demo model, whose masks are compared
with the truth too. Full-size models are quantized by rounding to nearest, which gives the same graphs as GPTQ does.

Exit codes: 0 done; 2 bad usage; 5 the machine lacks something, as a GPU; 6 FILE is no record.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from samq.errors import SamqError
from samq.tools.arguments import command_line, count
from samq.tools.bench_gpu.cells import DEFAULT_BATCHES, DEFAULT_MODELS, MODELS, ROWS, Cell, cell_of, plan
from samq.tools.bench_gpu.record import read_record
from samq.tools.bench_gpu.session import Settings, build, measure, prepare
from samq.tools.bench_gpu.table import markdown
from samq.tools.demo.dataset import SCENES


def main(arguments: list[str] | None = None) -> int:
    """Measure, prepare or print; returns the exit code."""
    parser = _parser()
    given = parser.parse_args(arguments)
    if given.seconds_left is not None and (given.prepare or given.build):
        parser.error("--seconds-left is for measuring")
    try:
        if given.table:
            print(markdown(read_record(given.json)), end="")
            return 0
        settings = Settings(
            json=given.json,
            work=given.work,
            jobs=given.jobs,
            built=given.built,
            level=given.level,
            scenes=given.scenes,
            redo=given.redo,
            deadline=None if given.seconds_left is None else time.monotonic() + given.seconds_left,
            command=command_line("samq.tools.bench_gpu", arguments),
        )
        cells = given.cells or plan(given.models, given.batches, given.rows)
        (prepare if given.prepare else build if given.build else measure)(cells, settings)
    except SamqError as error:
        print(f"bench_gpu: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bench_gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, default=Path("docs/gpu.json"), help="the record (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=Path("out/bench_gpu"), help="where graphs and plans are kept")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(DEFAULT_MODELS))
    parser.add_argument("--batches", nargs="+", type=count(), default=list(DEFAULT_BATCHES))
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--cells", nargs="+", type=_cell, metavar="CELL", help="these alone, as tiny/1/trt-fp16")
    parser.add_argument("--scenes", type=count(), default=SCENES, help="held-out scenes for the demo model's masks")
    parser.add_argument("--level", type=int, default=3, choices=range(6), help="TensorRT's optimization level")
    parser.add_argument(
        "--jobs",
        type=count(),
        default=1,
        help="plans built at once, which disturbs their tuning; each takes a core and up to 10 GB",
    )
    parser.add_argument("--seconds-left", type=float, help="start nothing that is not expected to end within this time")
    parser.add_argument("--redo", action="store_true", help="measure again what is measured")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--prepare", action="store_true", help="only trace the graphs into --work")
    only.add_argument("--build", action="store_true", help="only build the plans into --work")
    only.add_argument("--built", action="store_true", help="measure only what is built")
    only.add_argument("--table", action="store_true", help="only print the record as Markdown")
    return parser


def _cell(key: str) -> Cell:
    try:
        return cell_of(key)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


if __name__ == "__main__":
    sys.exit(main())
