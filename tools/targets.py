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
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Protocol

import onnx_ir as ir

from samq.calib.parts import PARTS
from samq.engines import tensorrt
from samq.engines.base import Engine, Executed, sidecar_of
from samq.engines.lint import require_clean
from samq.engines.onnxruntime import VERSION, OnnxRuntimeEngine, executed_layers, open_engine
from samq.engines.onnxruntime_cuda import OnnxRuntimeCudaEngine, executed_on_gpu, require_cuda
from samq.engines.onnxruntime_options import CpuEngineInfo, load_info
from samq.engines.predictor import Predictor
from samq.engines.tensorrt_plan import BuildOptions, log_of
from samq.engines.tensorrt_plan import executed_layers as tensorrt_layers
from samq.errors import MachineLacks, UsageError
from samq.export.lower_onnxruntime import lower_for_onnxruntime, requested_layers
from samq.export.lower_onnxruntime_cuda import lower_for_onnxruntime_cuda
from samq.export.lower_tensorrt import FLOAT_GEMM, INT4_GEMM, INT8_GEMM, Branch, lower_for_tensorrt
from samq.export.parts import save_part
from samq.export.placement import EVERYWHERE, Placement, load_placement, shipped_for
from samq.export.tensorrt_rewrites import REWRITES
from samq.export.tensorrt_targets import TARGETS, TensorRtTarget
from samq.files import write_json
from samq.quant.config import AUTO, Recipe
from samq.tools.job import NO_PLACEMENT, REFIT, Job

ENGINES = "engines"  # folder of an output directory
BASELINE = "fp16"  # folder of a GPU target's baseline
LOWERING = "lowering.json"

Step = Callable[[], None]


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

    def build(self, folder: Path, step: Step) -> list[Path]:
        """Make engines of the lowered graphs, or see that they run; returns the new files."""
        ...

    def open(self, onnx: Path, folder: Path) -> tuple[Predictor, Predictor]:
        """The baseline and the quantized engines."""
        ...

    def executed(self, folder: Path) -> dict[str, Executed]:
        """What the runtime made of each layer."""
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


@dataclass(frozen=True)
class OnnxRuntimeCpu:
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

    def build(self, folder: Path, step: Step) -> list[Path]:
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

    def files(self, folder: Path) -> list[Path]:
        return _of_parts(folder, "onnx")


@dataclass(frozen=True)
class OnnxRuntimeCuda:
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
        paths = []
        for source, target in ((onnx, folder), (onnx / "fp32", folder / BASELINE)):
            for part in PARTS:
                lowered = lower_for_onnxruntime_cuda(ir.load(source / f"{part}.onnx"))
                paths += save_part(lowered.model, target / f"{part}.onnx")
                step()
        return paths

    def build(self, folder: Path, step: Step) -> list[Path]:
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

    def files(self, folder: Path) -> list[Path]:
        return _of_parts(folder, "onnx")


@dataclass(frozen=True)
class TensorRt:
    """TensorRT plans.

    Args:
        target: what this TensorRT takes.
        low_rank: what becomes of low-rank branches.
        placement: which layers run in INT8.
        options: of the builder.
        refit: output directory of another job, whose refittable plans get this job's weights instead of a build.
    """

    target: TensorRtTarget
    low_rank: Branch = "branch"
    placement: Placement = EVERYWHERE
    options: BuildOptions = field(default_factory=BuildOptions)
    refit: Path | None = None
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
        paths, notes = [], {}
        for source, target in ((onnx, folder), (onnx / "fp32", folder / BASELINE)):
            for part in PARTS:
                graph = ir.load(source / f"{part}.onnx")
                lowered = lower_for_tensorrt(
                    graph, self.target, self.low_rank, placement=self.placement, rewrites=REWRITES
                )
                require_clean(lowered.model, self.target)
                paths += save_part(lowered.model, target / f"{part}.onnx")
                layers = {name: asdict(layer) for name, layer in lowered.layers.items()}
                notes[_key(target, folder, part)] = {"layers": layers, "float32": lowered.float32}
                step()
        write_json(folder / LOWERING, notes)
        return [*paths, folder / LOWERING]

    def build(self, folder: Path, step: Step) -> list[Path]:
        notes = json.loads((folder / LOWERING).read_text(encoding="utf-8"))
        paths = []
        for place in (folder, folder / BASELINE):
            for part in PARTS:
                onnx, plan = place / f"{part}.onnx", place / f"{part}.plan"
                if self.refit is None:
                    float32 = tuple(notes[_key(place, folder, part)]["float32"])
                    tensorrt.build_engine(onnx, plan, replace(self.options, float32=float32))
                else:
                    old = self.refit / ENGINES / self.folder / plan.relative_to(folder)
                    tensorrt.refit_engine(old, onnx, plan)
                paths += [plan, sidecar_of(plan), log_of(plan)]
                step()
        return paths

    def branches(self, folder: Path) -> Branch | None:
        """What became of the branches that neither placement nor format decides about; None where there are none."""
        notes = json.loads((folder / LOWERING).read_text(encoding="utf-8"))
        open_to_choice = (
            layer["branch"] and layer["compute"] == INT8_GEMM and self.placement.form(name) == "int8"
            for part in PARTS
            for name, layer in notes[part]["layers"].items()
        )
        return self.low_rank if any(open_to_choice) else None

    def open(self, onnx: Path, folder: Path) -> tuple[Predictor, Predictor]:
        open_engine = tensorrt.open_engine
        return _predictor(self.files(folder / BASELINE), open_engine), _predictor(self.files(folder), open_engine)

    def executed(self, folder: Path) -> dict[str, Executed]:
        return _together(tensorrt_layers(path) for path in self.files(folder))

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
    options = {name: value for name, value in job.build_options.items() if name != REFIT}
    refit = job.build_options.get(REFIT)
    refitted = None if refit is None else Path(refit)
    return TensorRt(target, low_rank, _placement(job), BuildOptions.from_json(options), refitted)


def _placement(job: Job) -> Placement:
    """The job's own, none, or the one that samq ships for the GPU at hand."""
    if job.placement == NO_PLACEMENT:
        return EVERYWHERE
    if job.placement is not None:
        return load_placement(Path(job.placement))
    try:
        version, gpu = tensorrt.about()
    except MachineLacks:
        return EVERYWHERE
    return shipped_for(gpu.name, version)


def target_at_hand() -> TensorRtTarget:
    """What the TensorRT of this machine takes.

    Raises:
        MachineLacks: there is no TensorRT or no GPU, or no target stands for this version.
    """
    version, _ = tensorrt.about()
    name = f"trt{version.partition('.')[0]}"
    if name not in TARGETS:
        raise MachineLacks(f"TensorRT {version} is none of {', '.join(TARGETS)}; install one of these")
    return TARGETS[name]


def _key(place: Path, folder: Path, part: str) -> str:
    return (place.relative_to(folder) / part).as_posix()


def _of_parts(folder: Path, suffix: str) -> list[Path]:
    return [folder / f"{part}.{suffix}" for part in PARTS]


def _predictor(parts: Iterable[Path], make: Callable[[Path], Engine]) -> Predictor:
    encoder, decoder = map(make, parts)
    return Predictor(encoder, decoder)


def _together(parts: Iterable[Mapping[str, Executed]]) -> dict[str, Executed]:
    return {layer: executed for part in parts for layer, executed in part.items()}
