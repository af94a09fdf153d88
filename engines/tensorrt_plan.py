"""What belongs to a plan: how it was asked for, and a sidecar that says what it is and where it runs.

Needs the standard library alone, so that a plan can be judged before anything of TensorRT is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from samq.engines.base import Executed, sidecar_of
from samq.engines.cuda import Device
from samq.engines.tensorrt_layers import EngineLayer, executed
from samq.errors import BadInput, UsageError
from samq.files import write_json

HIGHEST_LEVEL = 5
AMPERE = (8, 0)  # compute capability from which hardware-compatible plans run

Range = tuple[int, int, int]

# Smallest, usual and largest size of a part's dynamic sides, where nothing else is asked for. A plan is fastest at the
# usual ones: one image with one box. More prompts than that come 16 at a time (`samq.engines.predictor`), and more
# points from people who correct a mask.
USUAL_RANGES: Mapping[str, Range] = {"batch": (1, 1, 4), "prompts": (1, 1, 16), "points": (1, 2, 16)}


@dataclass(frozen=True)
class BuildOptions:
    """How to build a plan.

    Args:
        fp16: let a weakly typed TensorRT (8.6) use FP16; a strongly typed one reads all types from the graph.
        float32: names of ONNX nodes that a weakly typed TensorRT must keep in float32.
        half_io: names of float32 inputs and outputs that a weakly typed TensorRT takes and gives in FP16, as values
            within an engine are.
        optimization_level: 0 (quick) to 5 (thorough); TensorRT's own default is 3.
        workspace_mib: limit of the scratch memory, or None for all of the GPU's.
        timing_cache: folder of measured kernel timings, one file for each version and GPU, or None.
        ranges: smallest, usual and largest size of each dynamic side, by its name in the graph.
        version_compatible: runs with later versions of the same major one too.
        hardware_compatible: runs on every GPU from compute capability 8.0 on, more slowly.
        refittable: the weights can be replaced later.
        tactics_off: libraries that kernels are not taken from, where this version knows them.

    Raises:
        UsageError: a value is out of its range.
    """

    fp16: bool = True
    float32: tuple[str, ...] = ()
    half_io: tuple[str, ...] = ()
    optimization_level: int = 3
    workspace_mib: int | None = None
    timing_cache: str | None = None
    ranges: Mapping[str, Range] = field(default_factory=lambda: USUAL_RANGES)
    version_compatible: bool = False
    hardware_compatible: bool = False
    refittable: bool = False
    tactics_off: tuple[str, ...] = ("CUBLAS", "CUBLAS_LT", "CUDNN")

    def __post_init__(self) -> None:
        if not 0 <= self.optimization_level <= HIGHEST_LEVEL:
            raise UsageError(f"optimization level {self.optimization_level}: choose 0 to {HIGHEST_LEVEL}")
        if self.workspace_mib is not None and self.workspace_mib < 1:
            raise UsageError(f"workspace of {self.workspace_mib} MiB: choose 1 or more")
        for name, sizes in self.ranges.items():
            if len(sizes) != 3 or not 1 <= sizes[0] <= sizes[1] <= sizes[2]:
                raise UsageError(f"range of {name}: give smallest ≤ usual ≤ largest size, not {list(sizes)}")

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> BuildOptions:
        """From what `dataclasses.asdict` and JSON make of one, or of a part of one.

        Raises:
            UsageError: a key or a value is wrong.
        """
        names = ("float32", "half_io", "tactics_off")
        try:
            read: dict[str, Any] = {name: tuple(values[name]) for name in names if name in values}
            read["ranges"] = {name: tuple(sizes) for name, sizes in values.get("ranges", USUAL_RANGES).items()}
            return cls(**{**values, **read})
        except (AttributeError, TypeError) as error:
            raise UsageError(f"build options: {error}") from error


@dataclass(frozen=True)
class PlanTensor:
    """An input or output; a dynamic side has a name instead of a number. `dtype` is numpy's name of it."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str


@dataclass(frozen=True)
class Refittable:
    """What a plan whose weights can be replaced was built from.

    Args:
        structure: digest of its graph without the weights.
        weights: name → digest of each of the weights; empty where they cannot be compared.
    """

    structure: str
    weights: Mapping[str, str]

    def other_than(self, old: Refittable) -> set[str]:
        """Names of weights that are not the same as in another one, or cannot be compared."""
        return {name for name, digest in self.weights.items() if not digest or digest != old.weights.get(name)}


@dataclass(frozen=True)
class PlanInfo:
    """The sidecar of a plan.

    Args:
        gpu, capability: where it was built.
        tensorrt: version that built it.
        onnx, onnx_sha256: what it was built from.
        strongly_typed: types come from the graph.
        inputs, outputs: in the engine's order.
        options: how it was asked for.
        seconds: that the build took.
        plan_bytes: size of the plan.
        gemms: names of the ONNX nodes that are matrix products.
        layers: what the engine inspector tells.
        warnings: of TensorRT, while it built.
        refittable: what a graph must have that gives it new weights; None where that cannot be.
    """

    gpu: str
    capability: tuple[int, int]
    tensorrt: str
    onnx: str
    onnx_sha256: str
    strongly_typed: bool
    inputs: tuple[PlanTensor, ...]
    outputs: tuple[PlanTensor, ...]
    options: BuildOptions
    seconds: float
    plan_bytes: int
    gemms: tuple[str, ...]
    layers: tuple[EngineLayer, ...]
    warnings: tuple[str, ...]
    refittable: Refittable | None = None

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> PlanInfo:
        """From what `dataclasses.asdict` and JSON make of one.

        Raises:
            KeyError, TypeError: it is none.
        """
        return cls(
            **{
                **values,
                "capability": tuple(values["capability"]),
                "inputs": _tensors(values["inputs"]),
                "outputs": _tensors(values["outputs"]),
                "options": BuildOptions.from_json(values["options"]),
                "gemms": tuple(values["gemms"]),
                "layers": tuple(EngineLayer(**{**row, "nodes": tuple(row["nodes"])}) for row in values["layers"]),
                "warnings": tuple(values["warnings"]),
                "refittable": None if values["refittable"] is None else Refittable(**values["refittable"]),
            }
        )

    @property
    def largest(self) -> dict[str, int]:
        """Dynamic sides of the inputs → their largest sizes."""
        sides = {side for tensor in self.inputs for side in tensor.shape if isinstance(side, str)}
        return {side: largest for side, (_, _, largest) in self.options.ranges.items() if side in sides}

    def misfit(self, device: Device, version: str) -> str | None:
        """Why the plan does not run on this GPU with this TensorRT, or None where it does."""
        own, here = _numbers(self.tensorrt), _numbers(version)
        if self.options.version_compatible:
            fits, kind = own[0] == here[0] and own <= here, f"{own[0]}.x from {self.tensorrt} on"
        else:
            fits, kind = own == here, self.tensorrt
        if not fits:
            return f"it was built for TensorRT {kind}, and this is {version}; build it again with this version"
        if self.options.hardware_compatible:
            if device.capability < AMPERE:
                return f"it was built for compute capability 8.0 or newer, and this is {device}; build it again here"
        elif device.capability != self.capability:
            built = Device(self.gpu, self.capability, 0)
            return f"it was built for {built}, and this is {device}; build it again here"
        return None


def _tensors(rows: Sequence[Mapping[str, Any]]) -> tuple[PlanTensor, ...]:
    return tuple(PlanTensor(row["name"], tuple(row["shape"]), row["dtype"]) for row in rows)


def _numbers(version: str) -> tuple[int, ...]:
    """Major, minor and patch; the build number behind them does not matter."""
    return tuple(int(part) for part in version.split(".")[:3])


def log_of(plan: Path) -> Path:
    """Path of what TensorRT said while it built a plan."""
    return plan.with_name(f"{plan.name}.log")


def save_info(plan: Path, info: PlanInfo) -> None:
    """Write the sidecar."""
    write_json(sidecar_of(plan), asdict(info))


def load_info(plan: Path) -> PlanInfo:
    """Read the sidecar of a plan.

    Raises:
        BadInput: plan or sidecar is missing, or they do not belong together.
    """
    sidecar = sidecar_of(plan)
    for path in (plan, sidecar):
        if not path.is_file():
            raise BadInput(f"{path} is missing; build the engine first")
    try:
        info = PlanInfo.from_json(json.loads(sidecar.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError, UsageError) as error:
        raise BadInput(f"{sidecar}: is no sidecar of this version of samq; build the engine again") from error
    if info.plan_bytes != plan.stat().st_size:
        raise BadInput(f"{plan}: is not the plan that {sidecar.name} tells of; build the engine again")
    return info


def executed_layers(plan: Path) -> dict[str, Executed]:
    """What TensorRT executes for each layer, read from the plan's sidecar.

    Args:
        plan: built from a graph whose GEMM nodes are called `<layer>/MatMul`, those of a low-rank branch
            `<layer>/low_rank/down` (`down_8` where rank 8 is left of it) and `<layer>/low_rank/up`; the branch is told
            under the names of its nodes.

    Raises:
        BadInput: plan or sidecar is missing, or they do not belong together.
    """
    info = load_info(plan)
    return executed(info.layers, info.gemms)
