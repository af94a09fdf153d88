"""SAM2's image encoder on a CPU: samq's engines beside those of ONNX Runtime's quantizers and of OpenVINO with NNCF.

    python -m samq.tools.bench_embedded --json FILE            measures, writes FILE and prints the tables
    python -m samq.tools.bench_embedded --json FILE --table    prints FILE as Markdown

Speed is that of SAM2.1 tiny at 1024×1024 with random weights, which are rounded to nearest where a preset says GPTQ:
the graphs are the same. All encoders run in turns in one process; start and memory are taken in processes of their own.
Masks are those of the demo model on held-out scenes, by the same methods. Peers start from the FP32 encoder that samq
exports. Where a peer does not run, its message is the entry. OpenVINO needs `pip install openvino nncf`.

Exit codes: 0 done; 2 bad usage; 5 FILE cannot be written; 6 FILE is no record.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from samq.errors import BadInput, SamqError, UsageError
from samq.files import write_json
from samq.tools.arguments import command_line, count
from samq.tools.bench_embedded.measure import masks, speed
from samq.tools.bench_embedded.rows import FP32, ROWS, Row
from samq.tools.bench_embedded.subject import Graphs
from samq.tools.bench_embedded.table import markdown
from samq.tools.demo.dataset import SCENES
from samq.tools.progress import Reporter
from samq.tools.report.environment import environment

TIMED, JUDGED = "tiny", "demo"
PACKAGES = ("onnxruntime", "openvino", "nncf")


def main(arguments: list[str] | None = None) -> int:
    """Measure or print; returns the exit code."""
    given = _parser().parse_args(arguments)
    try:
        if not given.table:
            write_json(given.json, _measured(given, command_line("samq.tools.bench_embedded", arguments)))
        print(markdown(_read(given.json)), end="")
    except SamqError as error:
        print(f"bench_embedded: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _measured(given: argparse.Namespace, command: str) -> dict[str, Any]:
    if FP32 not in given.rows:
        raise UsageError(f"--rows without {FP32}, which all others are measured against; add it")
    rows: list[Row] = [ROWS[key] for key in ROWS if key in given.rows]
    reporter = Reporter()
    with tempfile.TemporaryDirectory() as folder:
        work = given.work or Path(folder)
        judged = masks(Graphs(JUDGED, work / JUDGED), rows, given.scenes, given.threads, reporter)
        before = os.getloadavg()[0]
        timed = speed(Graphs(TIMED, work / TIMED), rows, given.runs, given.threads, reporter)
    return {
        "command": command,
        "environment": environment(),
        "versions": _versions(),
        "threads": given.threads,
        "scenes": given.scenes,
        "load": [before, os.getloadavg()[0]],
        "speed": timed,
        "masks": judged,
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        missing = {"speed", "masks", "environment"} - set(record)
    except (OSError, ValueError, TypeError) as error:
        raise BadInput(f"{path} is no record of this benchmark ({error}); measure without --table") from error
    if missing:
        raise BadInput(f"{path} is no record of this benchmark; measure without --table")
    return record


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bench_embedded", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, default=Path("out/embedded.json"), help="default: %(default)s")
    parser.add_argument("--rows", nargs="+", choices=ROWS, metavar="ROW", default=list(ROWS), help=", ".join(ROWS))
    parser.add_argument("--runs", type=count(), default=15, help="of each encoder (default: %(default)s)")
    parser.add_argument("--threads", type=count(), default=2, help="default: %(default)s")
    parser.add_argument("--scenes", type=count(), default=48, help=f"at most {SCENES} (default: %(default)s)")
    parser.add_argument("--work", type=Path, help="folder where graphs are kept, and used again")
    parser.add_argument("--table", action="store_true", help="only print the record as Markdown")
    return parser


if __name__ == "__main__":
    sys.exit(main())
