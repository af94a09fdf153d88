"""Times, sizes and answers of one encoder on each runtime; every figure is taken with the GPU to itself."""

from __future__ import annotations

import copy
import gc
import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import Sam2Model

from samq.calib.float32 import without_tf32
from samq.calib.parts import ENCODER_INPUTS, ImageEncoder
from samq.engines import tensorrt
from samq.engines.base import Arrays, Engine
from samq.engines.onnxruntime_cuda import CudaOptions
from samq.engines.predictor import Predictor
from samq.engines.tensorrt_plan import BuildOptions, executed_layers, load_info
from samq.engines.tensorrt_process import WorkerEngine
from samq.errors import BadInput, MachineLacks, SamqError
from samq.files import sha256_of
from samq.tools.bench_gpu.code import KERNEL_NAMES, digest_of
from samq.tools.bench_gpu.launched import launched
from samq.tools.bench_gpu.onnxruntime_cell import EMBEDDINGS, RUNS
from samq.tools.bench_gpu.subject import Pixels
from samq.tools.metrics import likeness

WARM_UPS = 20
CELL = "samq.tools.bench_gpu.onnxruntime_cell"
START = "its start"
LONGEST_CELL = 120.0  # seconds of a cell on ONNX Runtime, which is ended then
MEGA = 1e6
BUILDER_CODE = ("samq.engines.tensorrt_worker",)
_BUILDING: defaultdict[Path, Lock] = defaultdict(Lock)
_LOCKING = Lock()


@dataclass(frozen=True)
class Measured:
    """What a runtime told about an encoder.

    Args:
        ms: of each run.
        graph_ms: of each run as a CUDA graph; none where there is none.
        embeddings: `image_embeddings` [B, C, h, w].
        megabytes: of the engine: plan, ONNX file, or FP16 parameters.
        build_seconds: from the ONNX file (torch: the module) to the engine.
        facts: whatever else is worth keeping.
    """

    ms: Sequence[float]
    graph_ms: Sequence[float]
    embeddings: NDArray[Any]
    megabytes: float
    build_seconds: float | None
    facts: dict[str, Any]

    def figures(self, expected: NDArray[np.float32]) -> dict[str, Any]:
        """As JSON values.

        Args:
            expected: the embeddings in float32.
        """
        figures = {
            "ms": round(statistics.median(self.ms), 4),
            "ms_10_90": [round(float(np.percentile(self.ms, percent)), 4) for percent in (10, 90)],
            "graph_ms": round(statistics.median(self.graph_ms), 4) if self.graph_ms else None,
            "runs": len(self.ms),
            "megabytes": round(self.megabytes, 2),
            "build_seconds": None if self.build_seconds is None else round(self.build_seconds, 1),
            **likeness(self.embeddings, expected),
        }
        return figures | self.facts


@torch.no_grad()
def exact_embeddings(model: Sam2Model, pixels: Pixels) -> NDArray[np.float32]:
    """`image_embeddings` of the float32 model, without TF32."""
    with without_tf32():
        device = next(model.parameters()).device
        embeddings: NDArray[np.float32] = ImageEncoder(model)(torch.from_numpy(pixels).to(device))[0].cpu().numpy()
    return embeddings


def give_memory_back() -> None:
    """Free what PyTorch holds of the GPU without using it: TensorRT is another process."""
    gc.collect()
    torch.cuda.empty_cache()


@torch.no_grad()
def measure_torch(model: Sam2Model, pixels: Pixels, *, compiled: bool) -> Measured:
    """The encoder in FP16 on the GPU, by CUDA events."""
    encoder: Any = ImageEncoder(copy.deepcopy(model)).half().cuda().eval()
    size = sum(parameter.nbytes for parameter in encoder.model.vision_encoder.parameters())
    images = torch.from_numpy(pixels).cuda().half()
    if compiled:
        encoder = torch.compile(encoder)
    started = time.perf_counter()
    embeddings = encoder(images)[0].float().cpu().numpy()
    seconds = time.perf_counter() - started if compiled else None
    times = _by_events(lambda: encoder(images))
    if compiled:
        torch.compiler.reset()
    return Measured(times, [], embeddings, size / MEGA, seconds, {})


def _by_events(launch: Callable[[], Any]) -> list[float]:
    for _ in range(WARM_UPS):
        launch()
    event: Any = torch.cuda.Event
    events = [[event(enable_timing=True) for _ in range(2)] for _ in range(RUNS)]
    for begin, end in events:
        begin.record()
        launch()
        end.record()
    torch.cuda.synchronize()
    return [float(begin.elapsed_time(end)) for begin, end in events]


def measure_onnxruntime(onnx: Path, pixels: Pixels, options: CudaOptions, longest: float = LONGEST_CELL) -> Measured:
    """An encoder on ONNX Runtime's CUDA provider, inputs and outputs on the GPU, in a process of its own.

    Args:
        options: of the provider; CUDA graphs are measured beside plain launches whatever they say.
        longest: seconds, after which the process is ended.

    Raises:
        MachineLacks: there is no CUDA provider, none of its libraries, or no GPU.
        BadInput: ONNX Runtime does not take the graph, or is not done in time; the message says how far it came.
    """
    with tempfile.TemporaryDirectory() as folder:
        images, found, job = (Path(folder) / name for name in ("images.npy", "found.npz", "job.json"))
        np.save(images, pixels)
        given = {"onnx": str(onnx), "images": str(images), "found": str(found), "options": asdict(options)}
        job.write_text(json.dumps(given), encoding="utf-8")
        facts = _told_of([sys.executable, "-m", CELL, str(job)], longest)
        with np.load(found) as arrays:
            ms, graph_ms, embeddings = (arrays[name] for name in ("ms", "graph_ms", "embeddings"))
    seconds = facts.pop("build_seconds")
    return Measured(ms.tolist(), graph_ms.tolist(), embeddings, onnx.stat().st_size / MEGA, seconds, facts)


def _told_of(command: Sequence[str], longest: float) -> dict[str, Any]:
    """The last line of a cell's process."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=longest)
    except subprocess.TimeoutExpired as late:
        said = late.stdout or b""  # bytes also where text was asked for
        steps = (said if isinstance(said, str) else said.decode()).splitlines()
        raise BadInput(f"not done within {longest:g} s; it was at: {steps[-1] if steps else START}") from late
    last = [START, *done.stdout.splitlines()][-1]
    if done.returncode == 0:
        told: dict[str, Any] = json.loads(last)
        return told
    reason = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
    kind = MachineLacks if done.returncode == MachineLacks.exit_code else BadInput
    known = done.returncode in (MachineLacks.exit_code, BadInput.exit_code)
    raise kind(reason if known else f"ONNX Runtime's process ended with status {done.returncode} at: {last} ({reason})")


def plan_of(onnx: Path, folder: Path, options: BuildOptions, machine: str) -> Path:
    """Where the plan of a graph is kept: one for the same graph, options, machine and code."""
    how = hashlib.sha256(f"{options} {machine} {digest_of(BUILDER_CODE, KERNEL_NAMES)}".encode()).hexdigest()
    return folder / f"{sha256_of(onnx)[:16]}-{how[:16]}.plan"


def is_whole(plan: Path) -> bool:
    """Whether a plan is there, and what goes with it."""
    try:
        load_info(plan)
    except BadInput:
        return False
    return True


def build_plan(onnx: Path, folder: Path, options: BuildOptions, machine: str) -> Path:
    """The plan of a graph, from `folder` where the same was built there before.

    Args:
        machine: GPU and TensorRT that it is for.

    Raises:
        SamqError: as `samq.engines.tensorrt_build.build_engine`.
    """
    plan = plan_of(onnx, folder, options, machine)
    with _LOCKING:
        alone = _BUILDING[plan]  # two rows may have one graph
    with alone:
        if not is_whole(plan):
            tensorrt.build_apart(onnx, plan, options)
    return plan


def measure_tensorrt(plan: Path, pixels: Pixels) -> Measured:
    """A plan, launched kernel by kernel and as a CUDA graph."""
    feeds = {ENCODER_INPUTS[0]: pixels}
    info = load_info(plan)
    with tensorrt.own_worker() as worker:
        engine = WorkerEngine(worker, plan, cuda_graph=False)
        embeddings = engine.run(feeds)[EMBEDDINGS]
        times = engine.time(feeds, RUNS)
        executed = Counter(layer.compute for layer in executed_layers(plan).values())
        facts = {"executed": dict(executed), "layers": len(info.layers)} | launched(lambda: engine, feeds, plan)
    replayed: Sequence[float] = []
    try:
        with tensorrt.own_worker() as worker:  # where a plan was opened before, the demo's took a tenth longer
            replayed = WorkerEngine(worker, plan, cuda_graph=True).time(feeds, RUNS)
    except SamqError as error:
        facts["note"] = f"no CUDA graph: {error}"
    return Measured(times, replayed, embeddings, info.plan_bytes / MEGA, info.seconds, facts)


@contextmanager
def tensorrt_predictor(encoder: Path, decoders: Mapping[int, Path]) -> Iterator[Predictor]:
    """Both parts as plans, the decoder's by points a prompt."""
    with tensorrt.own_worker() as worker:
        by_points = {points: WorkerEngine(worker, plan) for points, plan in decoders.items()}
        yield Predictor(WorkerEngine(worker, encoder), ByPoints(by_points))


class ByPoints:
    """Decoders of static shapes as one engine: a prompt filled up to more points would get another answer.

    Args:
        decoders: by points a prompt.
    """

    def __init__(self, decoders: Mapping[int, Engine]) -> None:
        self._decoders = decoders
        first = next(iter(decoders.values()))
        batch, prompts, _, coordinates = first.shapes["point_coords"]
        self.inputs, self.outputs = first.inputs, first.outputs
        self.shapes: Mapping[str, Sequence[int | str]] = {
            **first.shapes,
            "point_coords": (batch, prompts, "points", coordinates),
        }

    def run(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        """Outputs by name."""
        return self._decoders[feeds["point_coords"].shape[2]].run(feeds)
