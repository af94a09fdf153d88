"""One run of the script: what is due, group by group, until all is measured or the time is up."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import onnxruntime  # type: ignore[import-untyped]
import torch
import transformers

from samq.engines import tensorrt
from samq.errors import MachineLacks, SamqError
from samq.export.placement import shipped_for
from samq.tools.bench_gpu.bench import Bench, Built
from samq.tools.bench_gpu.cells import Cell, expected_seconds, groups
from samq.tools.bench_gpu.graphs import AtHand, Graph
from samq.tools.bench_gpu.record import Record
from samq.tools.bench_gpu.subject import Subject
from samq.tools.bench_gpu.table import progress_line
from samq.tools.targets import target_at_hand

NO_GPU = "this measures an NVIDIA GPU, and PyTorch sees none; run it on one (--prepare and --table need none)"
LONGEST_REASON = 300  # characters
MASKS_SECONDS = 120.0  # that the masks of a cell may take; a guess
BenchOf = Callable[[str], Bench]
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Settings:
    """What the command line asks for.

    Args:
        json: the record.
        work: folder of graphs and plans.
        jobs: plans built at once.
        built: leave for later what is not built yet.
        level: TensorRT's optimization level.
        scenes: held-out scenes on which masks are compared.
        redo: measure again what is measured.
        deadline: on the clock of `time.monotonic`, or None.
        command: for the record.
    """

    json: Path
    work: Path
    jobs: int
    built: bool
    level: int
    scenes: int
    redo: bool
    deadline: float | None
    command: str


def prepare(cells: Sequence[Cell], settings: Settings) -> None:
    """Trace the graphs of all cells, which needs no GPU."""
    bench_of = _benches(settings, "cpu")
    for cell in cells:
        bench_of(cell.model).graphs.prepare(cell)


def build(cells: Sequence[Cell], settings: Settings) -> None:
    """Only build what plans are missing, `settings.jobs` at once, whichever cells they belong to.

    Raises:
        MachineLacks: PyTorch sees no GPU.
    """
    _need_gpu()
    bench_of = _benches(settings, "cuda")
    with ThreadPoolExecutor(settings.jobs) as pool:
        for cell in (cell for cell in cells if cell.row.engine == "tensorrt"):
            bench = bench_of(cell.model)
            try:
                graphs = bench.lower(cell).graphs
            except Exception as error:  # it belongs to this cell
                print(f"{cell.key}: {reason(error)}", flush=True)
                continue
            for graph in graphs:
                pool.submit(_say_built, bench, cell, graph)


def _say_built(bench: Bench, cell: Cell, graph: Graph) -> None:
    started = time.monotonic()
    try:
        bench.engine(cell, graph)
        told = f"{time.monotonic() - started:.0f} s"
    except Exception as error:  # it belongs to this plan; measuring its cell tells it again
        told = reason(error)
    print(f"{cell.key}, {graph.path.name}: {told}", flush=True)


def measure(cells: Sequence[Cell], settings: Settings) -> None:
    """Measure what is due on the GPU at hand, then compare masks, and keep each figure at once.

    Raises:
        MachineLacks: PyTorch sees no GPU, or the record cannot be written.
        UsageError, BadInput: as `Record`.
    """
    _need_gpu()
    record = Record(settings.json, facts(settings.command))
    bench_of = _benches(settings, "cuda")
    due = [cell for cell in cells if settings.redo or record.is_due(cell)]
    print(f"{len(cells)} cells, {len(due)} to measure", flush=True)
    for group in groups(due, settings.jobs):
        seconds = expected_seconds(group, record.known(), built=settings.built)
        if settings.deadline is not None and time.monotonic() + seconds > settings.deadline:
            print(f"left for later: {', '.join(c.key for c in group)}, about {seconds:.0f} s", flush=True)
            continue
        ready = [cell for cell in group if not settings.built or _is_built(bench_of(cell.model), cell)]
        for cell in group:
            if cell not in ready:
                print(f"left for later: {cell.key}, not built", flush=True)
        for cell, figures in _figures(bench_of, ready) if ready else ():
            record.put(cell, figures)
            print(progress_line(cell, figures), flush=True)
    for cell in filter(record.lacks_masks, cells):  # after all times, for it takes minutes
        bench = bench_of(cell.model)
        late = settings.deadline is not None and time.monotonic() + MASKS_SECONDS > settings.deadline
        if late or (settings.built and not _is_built(bench, cell)):
            print(f"left for later: {cell.key}, masks", flush=True)
            continue
        try:
            record.put_masks(cell, bench.masks(cell, bench.build(cell, bench.lower(cell))))
        except Exception as error:  # it belongs to this cell
            print(f"{cell.key}, masks: {reason(error)}", flush=True)


def _need_gpu() -> None:
    if not torch.cuda.is_available():
        raise MachineLacks(NO_GPU)


def _benches(settings: Settings, device: str) -> BenchOf:
    """The bench of a model, made when it is first asked for."""
    return cache(
        lambda model: Bench(Subject.load(model, device), settings.work, _at_hand, settings.level, settings.scenes)
    )


@cache
def _at_hand() -> AtHand:
    version, gpu = tensorrt.about()
    return AtHand(target_at_hand(), shipped_for(gpu.name, version), f"{gpu.name}, TensorRT {version}")


def _figures(bench_of: BenchOf, group: Sequence[Cell]) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Build all engines of a group, then measure one after the other."""
    with ThreadPoolExecutor(len(group)) as pool:
        futures = [_start(pool, bench_of(cell.model), cell) for cell in group]
    for cell, future in zip(group, futures, strict=True):
        yield cell, _attempt(bench_of(cell.model), cell, future)


def _is_built(bench: Bench, cell: Cell) -> bool:
    """Whether there is nothing to build; what cannot be lowered gets its reason when it is measured."""
    try:
        return bench.is_built(cell, bench.lower(cell))
    except Exception:
        return True


def _start(pool: ThreadPoolExecutor, bench: Bench, cell: Cell) -> Future[Built]:
    """Lower a cell, and let its engines be built while the next one is lowered."""
    try:
        return pool.submit(bench.build, cell, bench.lower(cell))
    except Exception as error:  # it belongs to this cell, see `_attempt`
        failed: Future[Built] = Future()
        failed.set_exception(error)
        return failed


def _attempt(bench: Bench, cell: Cell, built: Future[Built]) -> dict[str, Any]:
    """The figures of a cell, or the reason why there are none: what one engine raises must not cost the others."""
    started = time.monotonic()
    try:
        done = built.result()
        started = time.monotonic()
        figures = bench.figures(cell, done)
        measuring = time.monotonic() - started
        return figures | {"seconds": round(done.seconds + measuring, 1), "measuring_seconds": round(measuring, 1)}
    except Exception as error:
        lacks = isinstance(error, MachineLacks | torch.OutOfMemoryError)
        return {"reason": reason(error), "lacks": lacks, "seconds": round(time.monotonic() - started, 1)}


def reason(error: BaseException) -> str:
    """An error and its cause, a line each, without what colours a terminal."""
    line = _COLOUR.sub("", str(error)).strip().partition("\n")[0] or type(error).__name__
    cause = "" if error.__cause__ is None or isinstance(error, SamqError) else f" ({reason(error.__cause__)})"
    return f"{line[:LONGEST_REASON]}{cause}"


def facts(command: str) -> dict[str, Any]:
    """The machine and the versions, for the record."""
    try:
        version, _ = tensorrt.about()
    except MachineLacks as error:
        version = f"none ({error})"
    return {
        "command": command,
        "gpu": torch.cuda.get_device_name(),
        "driver": _driver(),
        "cores": os.cpu_count(),
        "TensorRT": version,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "ONNX Runtime": onnxruntime.__version__,
    }


def _driver() -> str:
    """Version of the driver, as nvidia-smi tells it."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return answer.stdout.splitlines()[0].strip()
