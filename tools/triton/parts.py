"""The engine of an output directory as two models of a server, described by its ONNX files or its plans' sidecars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx

from samq.calib.parts import IMAGE_ENCODER, MASK_DECODER, PARTS
from samq.engines.base import sidecar_of
from samq.engines.onnxruntime_options import load_info as load_cpu_info
from samq.engines.predictor import MOST_PROMPTS_AT_ONCE
from samq.engines.tensorrt_plan import PlanInfo, PlanTensor, load_info
from samq.errors import UsageError
from samq.tools.outdir import OutputDir
from samq.tools.targets import OnnxRuntimeCuda
from samq.tools.triton.config import PLAN, SAM, Part, Serving, Tensor

MODELS = {IMAGE_ENCODER: "sam_image_encoder", MASK_DECODER: "sam_mask_decoder"}
ONNX = "model.onnx"


@dataclass(frozen=True)
class ServedPart:
    """One part as a model.

    Args:
        config: what its config.pbtxt says.
        files: source → name in the model's folder.
    """

    config: Part
    files: Mapping[Path, str]


@dataclass(frozen=True)
class ServedEngine:
    """An engine as two models.

    Args:
        folder: its name under `engines/`.
        encoder, decoder: its parts.
        gpu: it runs on GPUs.
        prompts_at_once: the most that one run of the decoder takes.
        points: the most that a prompt may have.
    """

    folder: str
    encoder: ServedPart
    decoder: ServedPart
    gpu: bool
    prompts_at_once: int
    points: int

    @property
    def models(self) -> list[str]:
        """Names of all models that the server will have."""
        return [self.encoder.config.name, self.decoder.config.name, SAM]

    @property
    def has_plans(self) -> bool:
        """It runs on TensorRT."""
        return bool(self.encoder.config.plans)


def served_engine(out: OutputDir, others: Sequence[OutputDir], serving: Serving) -> ServedEngine:
    """The engine that the last `build` of an output directory made.

    Args:
        others: output directories with plans of the same graphs, for other GPUs.
        serving: limits.

    Raises:
        BadInput: there is no engine, or a file of it was changed.
        UsageError: the plans of `others` do not belong to these.
    """
    folder = _engine_folder(out)
    with_plans = (folder / f"{IMAGE_ENCODER}.plan").is_file()
    if others and not with_plans:
        raise UsageError(f"{folder} holds no TensorRT plans that those of other GPUs could join; leave out --plans-of")
    gpu = with_plans or folder.name == OnnxRuntimeCuda().folder
    folders = [folder, *map(_engine_folder, others)]
    described = {part: _plans(folders, part) if with_plans else _onnx(folder, part, gpu) for part in PARTS}
    encoder, decoder = described[IMAGE_ENCODER], described[MASK_DECODER]
    prompts = decoder.most("prompts", MOST_PROMPTS_AT_ONCE)
    points = min(decoder.most("points", serving.max_points), serving.max_points)
    limits = {} if with_plans else {"max_prompts": serving.max_prompts, "max_points": points}
    return ServedEngine(
        folder.name,
        encoder.served(MODELS[IMAGE_ENCODER], gpu, serving, {}),
        decoder.served(MODELS[MASK_DECODER], gpu, serving, limits),
        gpu,
        prompts,
        points,
    )


@dataclass(frozen=True)
class _Described:
    """What is known of one part's files. `ranges` holds the largest sizes of dynamic sides, where the files say."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    ranges: Mapping[str, int]
    files: Mapping[Path, str]
    plans: Mapping[str, str]

    def most(self, side: str, otherwise: int) -> int:
        """The largest size of a side of `point_coords`, which is [batch, prompts, points, 2]."""
        (coords,) = (tensor for tensor in self.inputs if tensor.name == "point_coords")
        size = coords.shape[("batch", "prompts", "points").index(side)]
        return size if isinstance(size, int) else self.ranges.get(side, otherwise)

    def served(self, name: str, gpu: bool, serving: Serving, limits: Mapping[str, int]) -> ServedPart:
        dynamic = isinstance(self.inputs[0].shape[0], str)
        batch = self.ranges.get("batch", serving.max_batch) if dynamic else 0
        return ServedPart(Part(name, self.inputs, self.outputs, batch, gpu, limits, self.plans), self.files)


def _engine_folder(out: OutputDir) -> Path:
    """Where the last `build` of an output directory left its engine."""
    out.require("build")
    (folder,) = {Path(name).parts[1] for name in out.stages["build"]["artifacts"]}
    return out.path / "engines" / folder


def _onnx(folder: Path, part: str, gpu: bool) -> _Described:
    path = folder / f"{part}.onnx"
    graph = onnx.load(path, load_external_data=False).graph
    weights = path.with_name(f"{path.name}.data")
    files = {path: ONNX} | ({weights: weights.name} if weights.is_file() else {})
    if not gpu:
        load_cpu_info(path)  # what cannot be run is not served
        files[sidecar_of(path)] = sidecar_of(Path(ONNX)).name
    return _Described(_tensors(graph.input), _tensors(graph.output), {}, files, {})


def _tensors(values: Sequence[onnx.ValueInfoProto]) -> tuple[Tensor, ...]:
    found = []
    for value in values:
        kind = value.type.tensor_type
        shape = tuple(side.dim_param or side.dim_value for side in kind.shape.dim)
        found.append(Tensor(value.name, shape, onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name))
    return tuple(found)


def _plans(folders: Sequence[Path], part: str) -> _Described:
    """The plans of one part for several GPUs; that of the first folder is also for GPUs that none is for."""
    paths = [folder / f"{part}.plan" for folder in folders]
    infos = [load_info(path) for path in paths]
    plans: dict[str, str] = {}
    files: dict[Path, str] = {}
    for path, info in zip(paths, infos, strict=True):
        capability = ".".join(map(str, info.capability))
        _require_kin(path, info, infos[0])
        if capability in plans:
            raise UsageError(f"{path}: there is a plan for compute capability {capability} already; leave out one")
        files[path] = plans[capability] = f"{Path(PLAN).stem}_cc{capability}.plan" if plans else PLAN
    first = infos[0]
    ranges = {side: largest for side, (_, _, largest) in first.options.ranges.items()}
    return _Described(_from_plan(first.inputs), _from_plan(first.outputs), ranges, files, plans)


def _require_kin(path: Path, info: PlanInfo, first: PlanInfo) -> None:
    for what, one, other in (
        ("another graph", info.onnx_sha256, first.onnx_sha256),
        ("other inputs or outputs", (info.inputs, info.outputs), (first.inputs, first.outputs)),
        ("other ranges of dynamic sides", info.options.ranges, first.options.ranges),
        ("another TensorRT", info.tensorrt, first.tensorrt),
    ):
        if one != other:
            raise UsageError(f"{path} was built from or for {what}; build it from the same onnx/ with the same options")


def _from_plan(tensors: Sequence[PlanTensor]) -> tuple[Tensor, ...]:
    return tuple(Tensor(tensor.name, tensor.shape, tensor.dtype) for tensor in tensors)
