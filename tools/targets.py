"""The targets: how each engine's graphs are lowered and its engines made, opened, and asked what they execute.

| `--engine`    | `--device` | folder under `engines/` | baseline                                  |
|---------------|------------|-------------------------|-------------------------------------------|
| `onnxruntime` | `cpu`      | `onnxruntime`           | FP32 parts, as ONNX Runtime optimizes them |
| `onnxruntime` | `cuda`     | `onnxruntime-cuda`      | FP16 parts, lowered and run the same way  |
| `tensorrt`    | any        | `trt8`, `trt10`, `trt11` | FP16 plans, lowered and built the same way |

A GPU's baseline stands in `fp16/` of the target's folder.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir

from samq.calib.parts import PARTS
from samq.engines import tensorrt
from samq.engines.base import Engine, Executed, TracedEngine, sidecar_of
from samq.engines.kernels import Kernel, require_cupti
from samq.engines.lint import require_clean
from samq.engines.onnxruntime import VERSION, OnnxRuntimeEngine, executed_layers, open_engine
from samq.engines.onnxruntime_cuda import CudaOptions, OnnxRuntimeCudaEngine, executed_on_gpu, require_cuda
from samq.engines.onnxruntime_options import CpuEngineInfo, load_info
from samq.engines.predictor import Predictor
from samq.engines.tensorrt_log import plain
from samq.engines.tensorrt_plan import BuildOptions, log_of
from samq.engines.tensorrt_plan import executed_layers as tensorrt_layers
from samq.engines.tensorrt_plan import load_info as plan_info
from samq.errors import BadInput, MachineLacks, UsageError
from samq.export.lower_onnxruntime import lower_for_onnxruntime, requested_layers
from samq.export.lower_onnxruntime_cuda import lower_for_onnxruntime_cuda
from samq.export.lower_tensorrt import Branch, lower_for_tensorrt
from samq.export.lowered_layer import FLOAT_GEMM, INT4_GEMM, INT8_GEMM, LoweredLayer
from samq.export.parts import save_part
from samq.export.placement import EVERYWHERE, Form, Placement, load_placement, shipped_for
from samq.export.tensorrt_rewrites import REWRITES
from samq.export.tensorrt_targets import TARGETS, TensorRtTarget
from samq.files import write_json
from samq.quant.config import AUTO, Recipe
from samq.tools.job import NO_PLACEMENT, REFIT, SHIPPED, Job
from samq.tools.progress import Reporter, every

ENGINES = "engines"  # folder of an output directory
BASELINE = "fp16"  # folder of a GPU target's baseline
LOWERING = "lowering.json"
_NUMBER = re.compile(r"-?\b\d[\d.]*")
TIMING_CACHE, NO_TIMINGS = "timing_cache", "none"  # the builder's option, and its value for none
PHASES = ("parse", "build", "refit", "inspect")  # of `samq.engines`; those of TensorRT's own monitor are others
SECONDS_BETWEEN = 30.0  # lines that tell of TensorRT's own steps, or that it is still at work
SECONDS_BETWEEN_LOOKS = 1.0  # at whether such a line is due

Step = Callable[[], None]


@dataclass(frozen=True)
class Remarks:
    """What a builder said about one engine.

    Args:
        engine: its file.
        warnings: the different ones, each in one line.
        log: file of all that was said.
    """

    engine: Path
    warnings: tuple[str, ...]
    log: Path


class Target(Protocol):
    """One row of the table above."""

    @property
    def folder(self) -> str:
        """Name of its folder under `engines/`."""
        ...

    @property
    def baseline(self) -> str:
        """What the quantized engines are measured against, in words."""
        ...

    @property
    def float_arithmetic(self) -> str:
        """Of layers whose activations are not quantized."""
        ...

    def executes(self, recipe: Recipe) -> str:
        """What a quantized layer of usual size is lowered to, in the words of `samq.engines`."""
        ...

    @property
    def graphs(self) -> int:
        """How many graphs `lower` writes and `build` takes, with a call of `step` for each."""
        ...

    def require(self) -> None:
        """Insist that engines can be built and run here.

        Raises:
            MachineLacks: they cannot; the message names the fix.
        """
        ...

    def lower(self, onnx: Path, folder: Path, step: Step) -> list[Path]:
        """Write the lowered graphs of what `export` left in `onnx` to `folder`; returns the files."""
        ...

    def build(self, folder: Path, step: Step, reporter: Reporter) -> list[Path]:
        """Make engines of the lowered graphs, or see that they run; returns the new files."""
        ...

    def open(self, onnx: Path, folder: Path) -> tuple[Predictor, Predictor]:
        """The baseline and the quantized engines."""
        ...

    def executed(self, folder: Path) -> dict[str, Executed]:
        """What the runtime made of each layer."""
        ...

    def kernels(self, folder: Path, reporter: Reporter) -> dict[str, tuple[Kernel, ...]]:
        """The kernels that a GPU runs for each part, on zeros, dynamic sides 1; empty where there is no GPU.

        Raises:
            MachineLacks: nothing records them, see `samq.engines.kernels`.
        """
        ...

    def lowered(self, folder: Path) -> dict[str, LoweredLayer]:
        """What `lower` made of each layer, and why; empty where it keeps no notes."""
        ...

    def told(self, folder: Path) -> list[str]:
        """What `lower` made of all layers together, in lines for the user; empty where it keeps no notes."""
        ...

    def remarks(self, folder: Path) -> list[Remarks]:
        """What was said while `build` made each engine; empty where none is made."""
        ...

    def files(self, folder: Path) -> list[Path]:
        """What a runtime loads, a file a part."""
        ...


def requested_compute(recipe: Recipe, float_arithmetic: str = "FP32") -> str:
    """What an engine must execute for a quantized layer, in the words of `samq.engines`."""
    return f"INT{recipe.wgts.bits} weights, {float_arithmetic} arithmetic" if recipe.weight_only else "INT8 GEMM"


def executions(recipe: Recipe) -> dict[str, str]:
    """What each kind of engine executes for a recipe's quantized layers."""
    kinds: tuple[Target, ...] = (OnnxRuntimeCpu(), OnnxRuntimeCuda(), *map(TensorRt, TARGETS.values()))
    return {kind.folder: kind.executes(recipe) for kind in kinds}


class _OnnxRuntime:
    """What its two targets have in common: engines are the lowered graphs themselves."""

    folder: str

    def lowered(self, folder: Path) -> dict[str, LoweredLayer]:
        return _lowered_layers(folder)

    def told(self, folder: Path) -> list[str]:
        return _told_of(self.folder, self.lowered(folder))

    def remarks(self, folder: Path) -> list[Remarks]:
        return []

    def files(self, folder: Path) -> list[Path]:
        return _of_parts(folder, "onnx")


@dataclass(frozen=True)
class OnnxRuntimeCpu(_OnnxRuntime):
    """ONNX Runtime on the CPU."""

    folder: str = "onnxruntime"
    baseline: str = "FP32, the same runtime"
    float_arithmetic: str = "FP32"
    graphs: int = len(PARTS)

    def executes(self, recipe: Recipe) -> str:
        return requested_compute(recipe, self.float_arithmetic)

    def require(self) -> None:
        """ONNX Runtime is always there."""

    def lower(self, onnx: Path, folder: Path, step: Step) -> list[Path]:
        paths = []
        for part in PARTS:
            graph, path = ir.load(onnx / f"{part}.onnx"), folder / f"{part}.onnx"
            info = CpuEngineInfo(VERSION, requested_layers(graph))
            paths += save_part(lower_for_onnxruntime(graph), path)
            write_json(sidecar_of(path), info.as_json())
            paths.append(sidecar_of(path))
            step()
        return paths

    def build(self, folder: Path, step: Step, reporter: Reporter) -> list[Path]:
        for path in self.files(folder):
            open_engine(path)
            step()
        return []

    def open(self, onnx: Path, folder: Path) -> tuple[Predictor, Predictor]:
        return self.baseline_of(onnx), _predictor(self.files(folder), open_engine)

    def baseline_of(self, onnx: Path) -> Predictor:
        """The float parts that `export` left, in FP32."""
        return _predictor(self.files(onnx / "fp32"), OnnxRuntimeEngine)

    def executed(self, folder: Path) -> dict[str, Executed]:
        return _together(executed_layers(path, load_info(path).options) for path in self.files(folder))

    def kernels(self, folder: Path, reporter: Reporter) -> dict[str, tuple[Kernel, ...]]:
        return {}


@dataclass(frozen=True)
class OnnxRuntimeCuda(_OnnxRuntime):
    """ONNX Runtime on an NVIDIA GPU."""

    folder: str = "onnxruntime-cuda"
    baseline: str = "FP16, the same runtime"
    float_arithmetic: str = "FP16"
    graphs: int = 2 * len(PARTS)

    def executes(self, recipe: Recipe) -> str:
        """As `Target.executes`; CUDA kernels take no INT8 activations, and two levels of scales are stored as INT8."""
        return f"INT{8 if recipe.two_level else recipe.wgts.bits} weights, dequantized at load, FP16 GEMM"

    def require(self) -> None:
        require_cuda()

    def lower(self, onnx: Path, folder: Path, step: Step) -> list[Path]:
        """As `Target.lower`; notes what each quantized layer became."""

        def lower(graph: ir.Model) -> tuple[ir.Model, dict[str, Any]]:
            lowered = lower_for_onnxruntime_cuda(graph)
            return lowered.model, {"layers": _as_json(lowered.layers)}

        return _lower_all(onnx, folder, lower, step)

    def build(self, folder: Path, step: Step, reporter: Reporter) -> list[Path]:
        for place in (folder, folder / BASELINE):
            for part in PARTS:
                OnnxRuntimeCudaEngine(place / f"{part}.onnx")
                step()
        return []

    def open(self, onnx: Path, folder: Path) -> tuple[Predictor, Predictor]:
        make = OnnxRuntimeCudaEngine
        return _predictor(self.files(folder / BASELINE), make), _predictor(self.files(folder), make)

    def executed(self, folder: Path) -> dict[str, Executed]:
        return _together(executed_on_gpu(path).layers for path in self.files(folder))

    def kernels(self, folder: Path, reporter: Reporter) -> dict[str, tuple[Kernel, ...]]:
        require_cupti()
        launched = CudaOptions(cuda_graph=False)
        with reporter.track("kernels", None):
            return {path.stem: _kernels(OnnxRuntimeCudaEngine(path, launched)) for path in self.files(folder)}


@dataclass(frozen=True)
class TensorRt:
    """TensorRT plans.

    Args:
        target: what this TensorRT takes.
        low_rank: what becomes of low-rank branches.
        placement: which layers run in INT8.
        options: of the builder, but for the timing cache.
        timings: folder of the timing cache, "none", or None for that in the user's cache directory.
        refit: output directory of another job, whose refittable plans get this job's weights instead of a build.
        unmeasured: why no measured placement is known; empty where one is, or where the job has its own.
    """

    target: TensorRtTarget
    low_rank: Branch = "branch"
    placement: Placement = EVERYWHERE
    options: BuildOptions = field(default_factory=BuildOptions)
    timings: str | None = None
    refit: Path | None = None
    unmeasured: str = ""
    baseline: str = "FP16 plans, lowered and built the same way"
    float_arithmetic: str = "FP16"
    graphs: int = 2 * len(PARTS)

    @property
    def folder(self) -> str:
        return self.target.name

    def executes(self, recipe: Recipe) -> str:
        """As `Target.executes`; the rules are those of `samq.export.lower_tensorrt`."""
        if recipe.ipts is not None:
            fits = recipe.ipts.mode == "static" and recipe.ipts.dtype == "sint8"
            return INT8_GEMM if fits else "refused: TensorRT's INT8 inputs are static and symmetric"
        if recipe.wgts.dtype == "sint4" and self.target.int4_blocks:
            return INT4_GEMM
        return f"{FLOAT_GEMM}, weights dequantized"

    def require(self) -> None:
        """As `Target.require`; the TensorRT at hand must be the target's.

        Raises:
            UsageError: it is another one.
        """
        here = target_at_hand()
        if here != self.target:
            raise UsageError(f"the TensorRT here is for --target {here.name}, not {self.target.name}; build with that")

    def lower(self, onnx: Path, folder: Path, step: Step) -> list[Path]:
        """As `Target.lower`; checks each graph against the target's rules, and notes what each layer became.

        Queries, keys and values get a GEMM each, which saves TensorRT the copies of a split.

        Raises:
            UsageError: a layer cannot be expressed for this target.
        """

        def lower(graph: ir.Model) -> tuple[ir.Model, dict[str, Any]]:
            lowered = lower_for_tensorrt(graph, self.target, self.low_rank, placement=self.placement, rewrites=REWRITES)
            require_clean(lowered.model, self.target)
            return lowered.model, {"layers": _as_json(lowered.layers), "float32": lowered.float32}

        return _lower_all(onnx, folder, lower, step)

    def build(self, folder: Path, step: Step, reporter: Reporter) -> list[Path]:
        """As `Target.build`; says how far each plan is.

        Raises:
            MachineLacks: the folder of the timing cache that was asked for cannot be written.
        """
        notes = _notes(folder)
        options = self.options if self.refit is not None else with_timings(self.options, self.timings, reporter)
        paths = []
        for place in (folder, folder / BASELINE):
            for part in PARTS:
                onnx, plan, key = place / f"{part}.onnx", place / f"{part}.plan", _key(place, folder, part)
                told = _Told(f"{key}.plan", reporter)
                with every(SECONDS_BETWEEN_LOOKS, told.still):
                    if self.refit is None:
                        float32 = tuple(notes[key]["float32"])
                        tensorrt.build_engine(onnx, plan, replace(options, float32=float32), told)
                    else:
                        old = self.refit / ENGINES / self.folder / plan.relative_to(folder)
                        tensorrt.refit_engine(old, onnx, plan, told)
                paths += [plan, sidecar_of(plan), log_of(plan)]
                step()
        return paths

    def misfit(self, folder: Path, placed: Mapping[str, Form] | None) -> str | None:
        """Why plans that were built once do not serve here as well as new ones, or None where they do.

        Args:
            placed: how their layers were placed, None where that was not noted.

        Raises:
            MachineLacks: no TensorRT or no GPU is at hand.
        """
        version, gpu = tensorrt.about()
        for plan in (*self.files(folder), *self.files(folder / BASELINE)):
            try:
                info = plan_info(plan)
            except BadInput as error:
                return str(error)
            misfit = info.misfit(gpu, version)
            if misfit is None and info.gpu != gpu.name and not info.options.hardware_compatible:
                misfit = f"it was tuned on {info.gpu}, and this is {gpu.name}"
            if misfit is not None:
                return f"{plan.name}: {misfit}"
        return None if placed in (None, self.placement.layers) else "samq places layers otherwise by now"

    def branches(self, folder: Path) -> Branch | None:
        """What became of the branches that neither placement nor format decides about; None where there are none."""
        open_to_choice = (
            layer.branch and layer.compute == INT8_GEMM and self.placement.form(name) == "int8"
            for name, layer in self.lowered(folder).items()
        )
        return self.low_rank if any(open_to_choice) else None

    def open(self, onnx: Path, folder: Path) -> tuple[Predictor, Predictor]:
        open_engine = tensorrt.open_engine
        return _predictor(self.files(folder / BASELINE), open_engine), _predictor(self.files(folder), open_engine)

    def executed(self, folder: Path) -> dict[str, Executed]:
        return _together(tensorrt_layers(path) for path in self.files(folder))

    def kernels(self, folder: Path, reporter: Reporter) -> dict[str, tuple[Kernel, ...]]:
        found = {}
        with reporter.track("kernels", None):
            for path in self.files(folder):
                engine = tensorrt.open_engine(path, cuda_graph=False)
                try:
                    found[path.stem] = _kernels(engine)
                finally:
                    engine.close()
        return found

    def lowered(self, folder: Path) -> dict[str, LoweredLayer]:
        return _lowered_layers(folder)

    def told(self, folder: Path) -> list[str]:
        """As `Target.told`, and why INT8 is everywhere."""
        layers = self.lowered(folder)
        lines = _told_of(self.folder, layers)
        if self.unmeasured and any(layer.compute == INT8_GEMM for layer in layers.values()):
            lines.append(f"INT8 wherever it can be: {self.unmeasured}")
        return lines

    def remarks(self, folder: Path) -> list[Remarks]:
        """As `Target.remarks`; the baseline's plans come last."""
        plans = [*self.files(folder), *self.files(folder / BASELINE)]
        return [
            Remarks(plan, tuple(dict.fromkeys(map(plain, plan_info(plan).warnings))), log_of(plan)) for plan in plans
        ]

    def files(self, folder: Path) -> list[Path]:
        return _of_parts(folder, "plan")


def target_of(job: Job) -> Target:
    """The target that a job's engine runs on.

    Raises:
        UsageError: the builder's options are wrong.
        MachineLacks: as `tensorrt_target`.
    """
    if job.engine == "tensorrt":
        return tensorrt_target(job)
    return OnnxRuntimeCuda() if job.device == "cuda" else OnnxRuntimeCpu()


def tensorrt_target(job: Job) -> TensorRt:
    """The TensorRT target that a job names, or that of the TensorRT at hand.

    Raises:
        UsageError: the builder's options or the placement are wrong.
        MachineLacks: none is named, and there is no TensorRT at hand or one that no target stands for.
    """
    target = target_at_hand() if job.target is None else TARGETS[job.target]
    low_rank: Branch = "fold" if job.low_rank == AUTO else job.low_rank  # the faster one first
    options = {name: value for name, value in job.build_options.items() if name not in (REFIT, TIMING_CACHE)}
    timings, refit = (job.build_options.get(name) for name in (TIMING_CACHE, REFIT))
    refitted = None if refit is None else Path(refit)
    placement, why = _placement(job)
    return TensorRt(target, low_rank, placement, BuildOptions.from_json(options), timings, refitted, why)


def with_timings(options: BuildOptions, folder: str | None, reporter: Reporter) -> BuildOptions:
    """The builder's options with a timing cache, seen to be writable before the minutes that a build takes.

    Args:
        folder: of the cache, "none", or None for that in the user's cache directory, which may be out of reach.

    Raises:
        MachineLacks: the folder that was asked for cannot be written.
    """
    if folder == NO_TIMINGS:
        return replace(options, timing_cache=None)
    try:
        chosen = _usual_timings() if folder is None else Path(folder)
        chosen.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=chosen).close()
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home
        if folder is not None:
            raise MachineLacks(f"--timing-cache cannot be written ({error}); name another folder, or none") from error
        reporter.warn(f"TensorRT's timings are not kept ({error}); --timing-cache names another folder")
        return replace(options, timing_cache=None)
    return replace(options, timing_cache=str(chosen))


def _usual_timings() -> Path:
    """Folder of the timing cache where none is named."""
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (named if named.is_absolute() else Path.home() / ".cache") / "samq" / "tensorrt-timings"


def placement_of(job: Job) -> Placement:
    """The job's own, none, or the one that samq ships for the GPU and the TensorRT at hand.

    Raises:
        UsageError: the job's own cannot be read.
    """
    return _placement(job)[0]


def _placement(job: Job) -> tuple[Placement, str]:
    """A job's placement, and why no measured one is known where it would be taken."""
    if job.placement == NO_PLACEMENT:
        return EVERYWHERE, ""
    if job.placement not in (None, SHIPPED):
        return load_placement(Path(str(job.placement))), ""
    try:
        version, gpu = tensorrt.about()
    except MachineLacks:
        why = "no GPU with TensorRT is here; `build` on one places layers as measured there, where samq knows that"
        return EVERYWHERE, why
    if job.target not in (None, _name_of(version)):
        return EVERYWHERE, f"the TensorRT here is {version}, and nothing is known of {job.target}"
    shipped = shipped_for(gpu.name, version)
    if shipped != EVERYWHERE:
        return shipped, ""
    return shipped, f"no placement was measured for {gpu.name} with TensorRT {version}; `samq-export place` does so"


def target_at_hand() -> TensorRtTarget:
    """What the TensorRT of this machine takes.

    Raises:
        MachineLacks: there is no TensorRT or no GPU, or a version that no target stands for.
    """
    return target_for(tensorrt.about()[0])


def target_for(version: str) -> TensorRtTarget:
    """What a version of TensorRT takes.

    Raises:
        MachineLacks: no target stands for it.
    """
    name = _name_of(version)
    if name not in TARGETS:
        raise MachineLacks(f"TensorRT {version} is none of {', '.join(TARGETS)}; install one of these")
    target = TARGETS[name]
    if tuple(map(int, version.split(".")[:2])) < target.least:
        major, minor = target.least
        raise MachineLacks(f"TensorRT {version} is too old for {name}; install {major}.{minor} or a later {major}.x")
    return target


def _name_of(version: str) -> str:
    """Of the target that a version of TensorRT takes, whether there is one or not."""
    return f"trt{version.partition('.')[0]}"


class _Told:
    """How far a plan's build is, in lines: each phase, and now and then the steps of TensorRT's own monitor or, where
    none tells of any (8.6 has none), how long the phase has taken.

    Args:
        plan: its name.
        clock: seconds.
    """

    def __init__(self, plan: str, reporter: Reporter, clock: Callable[[], float] = time.monotonic) -> None:
        self._plan, self._reporter, self._clock = plan, reporter, clock
        self._phase, self._monitored = "", False
        self._began = self._said = clock()
        self._lock = Lock()  # `still` is called from another thread

    def __call__(self, phase: str, step: int, steps: int) -> None:
        with self._lock:
            self._monitored = phase not in PHASES
            if not self._monitored:
                self._phase, self._began = phase, self._clock()
                self._say(phase)
            elif step and self._is_due():
                self._say(f"{phase}, step {step} of {steps}")

    def still(self) -> None:
        """Say how long the phase has taken, where a line is due, no monitor tells of steps and no bar is drawn."""
        with self._lock:
            if self._phase and not self._monitored and not self._reporter.draws and self._is_due():
                self._say(f"{self._phase}, {self._clock() - self._began:.0f} s so far")

    def _is_due(self) -> bool:
        return self._clock() - self._said >= SECONDS_BETWEEN

    def _say(self, text: str) -> None:
        self._reporter.say(f"{self._plan}: {text}")
        self._said = self._clock()


def _lower_all(
    onnx: Path, folder: Path, lower: Callable[[ir.Model], tuple[ir.Model, dict[str, Any]]], step: Step
) -> list[Path]:
    """Lower the quantized parts and the baseline's, and note what became of each; returns the files.

    Args:
        lower: gives the lowered graph, and what is noted of it.
    """
    paths, notes = [], {}
    for source, target in ((onnx, folder), (onnx / "fp32", folder / BASELINE)):
        for part in PARTS:
            model, notes[_key(target, folder, part)] = lower(ir.load(source / f"{part}.onnx"))
            paths += save_part(model, target / f"{part}.onnx")
            step()
    write_json(folder / LOWERING, notes)
    return [*paths, folder / LOWERING]


def _notes(folder: Path) -> dict[str, Any]:
    """What `lower` noted about each graph."""
    notes: dict[str, Any] = json.loads((folder / LOWERING).read_text(encoding="utf-8"))
    return notes


def _as_json(layers: Mapping[str, LoweredLayer]) -> dict[str, Any]:
    return {name: asdict(layer) for name, layer in layers.items()}


def _lowered_layers(folder: Path) -> dict[str, LoweredLayer]:
    """What `lower` noted about the layers of the quantized parts, if it did: those for the CPU have no notes."""
    if not (folder / LOWERING).is_file():
        return {}
    notes = _notes(folder)
    return {name: LoweredLayer(**layer) for part in PARTS for name, layer in notes[part]["layers"].items()}


def _told_of(target: str, layers: Mapping[str, LoweredLayer]) -> list[str]:
    """How many quantized layers became what, and the commonest reason, in lines for the user; none without layers."""
    if not layers:
        return []
    quantized = [layer for layer in layers.values() if layer.reason or layer.compute != FLOAT_GEMM]
    kinds = Counter(layer.compute for layer in quantized)
    lines = [f"{target}: {len(quantized)} layers: {'; '.join(f'{count} × {kind}' for kind, count in kinds.items())}"]
    reasons = [layer.reason.partition("; FP16 rounds")[0] for layer in quantized if layer.reason]
    if reasons:
        alike = Counter(_NUMBER.sub("", reason) for reason in reasons).most_common(1)[0][0]
        why = next(reason for reason in reasons if _NUMBER.sub("", reason) == alike)
        lines.append(f"{len(reasons)} of them not as asked, each told in {LOWERING}; most often: {why}")
    return lines


def _key(place: Path, folder: Path, part: str) -> str:
    return (place.relative_to(folder) / part).as_posix()


def _of_parts(folder: Path, suffix: str) -> list[Path]:
    return [folder / f"{part}.{suffix}" for part in PARTS]


def _predictor(parts: Iterable[Path], make: Callable[[Path], Engine]) -> Predictor:
    encoder, decoder = map(make, parts)
    return Predictor(encoder, decoder)


def _kernels(engine: TracedEngine) -> tuple[Kernel, ...]:
    """The kernels of a run on zeros, dynamic sides 1."""
    sides = {name: [side if isinstance(side, int) else 1 for side in shape] for name, shape in engine.shapes.items()}
    return tuple(engine.kernels({name: np.zeros(shape, np.float32) for name, shape in sides.items()}))


def _together(parts: Iterable[Mapping[str, Executed]]) -> dict[str, Executed]:
    return {layer: executed for part in parts for layer, executed in part.items()}
