"""New weights for a plan that was built refittable: in seconds, without another search for kernels.

| version    | weights go in by                                    |
|------------|-----------------------------------------------------|
| 8.6        | `Refitter.set_weights`, read from the parsed graph  |
| 10.x, 11.x | `OnnxParserRefitter.refit_from_file`                |

The graph must be the plan's but for its weights. What the builder has folded into kernels cannot be replaced; a weight
that is another one now and among them is a refusal, for the plan would silently keep the old one.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samq.engines.cuda import find_device
from samq.engines.tensorrt_log import (
    WARNING,
    Log,
    captured,
    failure,
    load_tensorrt,
    new_builder,
    new_refitter,
    new_runtime,
    plain,
    version_of,
)
from samq.engines.tensorrt_network import network_flags
from samq.engines.tensorrt_parse import parse_into
from samq.engines.tensorrt_plan import PlanInfo, Refittable, load_info, log_of, save_info
from samq.engines.tensorrt_progress import Progress, silent
from samq.engines.tensorrt_weights import network_weights, refittable_parts, weight_key
from samq.errors import BadInput, MachineLacks
from samq.files import sha256_of, write_text, written_whole

if TYPE_CHECKING:
    import tensorrt as trt

ANEW = "build a plan of this graph instead (without --refit)"


def refit_engine(plan_path: Path, onnx_path: Path, new_path: Path, progress: Progress = silent) -> PlanInfo:
    """Write a plan with the kernels of one and the weights of a graph, its sidecar and its log.

    Args:
        plan_path: built with `BuildOptions.refittable`; may be `new_path`.
        onnx_path: a graph of the same structure.

    Raises:
        MachineLacks: no TensorRT, no GPU, not enough of its memory, or the plan does not fit GPU or version.
        BadInput: a file is missing, the plan is not refittable, the graph is another one, or a weight that is new
            cannot be replaced; the message names one.
    """
    if not onnx_path.is_file():
        raise BadInput(f"{onnx_path} is missing; run `samq-export export` first")
    info = load_info(plan_path)
    if info.refittable is None:
        raise BadInput(f"{plan_path}: was not built refittable; build it again with --refittable")
    api, device = load_tensorrt(), find_device()
    misfit = info.misfit(device, version_of(api))
    if misfit is not None:
        raise MachineLacks(f"{plan_path}: {misfit}")
    started = time.perf_counter()
    with captured() as (logger, log):
        try:
            plan, parts = _refitted(api, logger, log, plan_path, info, onnx_path, progress)
        finally:
            write_text(log_of(new_path), str(log))
    with written_whole(new_path) as temporary:
        temporary.write_bytes(plan)
    new = replace(
        info,
        onnx=onnx_path.name,
        onnx_sha256=sha256_of(onnx_path),
        seconds=round(time.perf_counter() - started, 3),
        plan_bytes=len(plan),
        warnings=tuple(log.of(WARNING)),
        refittable=parts,
    )
    save_info(new_path, new)
    return new


def _refitted(
    api: Any,
    logger: trt.ILogger,
    log: Log,
    plan_path: Path,
    info: PlanInfo,
    onnx_path: Path,
    progress: Progress,
) -> tuple[bytes, Refittable]:
    progress("parse", 0, 0)
    builder: trt.Builder = new_builder(api, logger, log, onnx_path)
    network: trt.INetworkDefinition = builder.create_network(network_flags(api))
    parse_into(api, network, logger, log, onnx_path)
    parts = refittable_parts(api, network)
    assert info.refittable is not None
    if parts.structure != info.refittable.structure:
        raise BadInput(f"{onnx_path.name} has other layers or shapes than the plan {plan_path.name}; {ANEW}")
    changed = parts.other_than(info.refittable)
    progress("refit", 0, 0)
    runtime: trt.Runtime = new_runtime(api, logger, log, plan_path)
    runtime.engine_host_code_allowed = info.options.version_compatible
    engine: trt.ICudaEngine | None = runtime.deserialize_cuda_engine(plan_path.read_bytes())
    if engine is None:
        raise failure(plan_path, log)
    refitter: trt.Refitter = new_refitter(api, engine, logger, log, plan_path)
    takes = _keys(refitter.get_all())
    fixed = sorted(changed - takes.keys())
    if fixed:
        raise BadInput(
            f"{plan_path.name}: TensorRT {info.tensorrt} has folded {len(fixed)} weights that are other ones in "
            f"{onnx_path.name} into its kernels, {fixed[0]} among them (quantized weights and scales are such); {ANEW}"
        )
    if not _set_from_file(api, refitter, logger, log, onnx_path):
        _set_by_layer(refitter, {key: takes[key] for key in changed}, network_weights(api, network), onnx_path)
    if not refitter.refit_cuda_engine():
        raise failure(onnx_path, log)
    plan: trt.IHostMemory | None = engine.serialize()
    if plan is None:
        raise failure(plan_path, log)
    return bytes(plan), parts


def _keys(told: tuple[Any, Any]) -> dict[str, tuple[str, Any]]:
    """Layers and roles, as the refitter tells them, by key."""
    keys = {}
    for layer, found in zip(*told, strict=True):
        role: trt.WeightsRole = found
        keys[weight_key(layer, role.name)] = (layer, role)
    return keys


def _set_from_file(api: Any, refitter: trt.Refitter, logger: trt.ILogger, log: Log, onnx_path: Path) -> bool:
    """Hand over everything that can be replaced; False where this version cannot read it from a file (8.6)."""
    if not hasattr(api, "OnnxParserRefitter"):
        return False
    reader: trt.OnnxParserRefitter = api.OnnxParserRefitter(refitter, logger)
    if reader.refit_from_file(str(onnx_path)):
        return True
    reason = next(iter(log.of("error")), "no reason given")
    if reader.num_errors:
        error: trt.ParserError = reader.get_error(0)
        reason = error.desc()
    raise BadInput(f"{onnx_path.name}: TensorRT does not take its weights ({plain(reason)}); {ANEW}")


def _set_by_layer(
    refitter: trt.Refitter, changed: Mapping[str, tuple[str, Any]], weights: Mapping[str, Any], onnx_path: Path
) -> None:
    """Hand over what is new, and what TensorRT has merged with it (8.6)."""
    for key, (layer, role) in changed.items():
        if not refitter.set_weights(layer, role, weights[key]):
            raise BadInput(f"{onnx_path.name}: TensorRT does not take the weights {key}; {ANEW}")
    missing = _keys(refitter.get_missing())
    for key, (layer, role) in missing.items():
        if key not in weights or not refitter.set_weights(layer, role, weights[key]):
            raise BadInput(f"{onnx_path.name}: TensorRT wants the weights {key} too, and does not take them; {ANEW}")
