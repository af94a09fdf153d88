"""ONNX file → TensorRT plan and its sidecar, with TensorRT 8.6, 10.x or 11.x.

| what          | 8.6                                                  | 10.x, 11.x                         |
|---------------|------------------------------------------------------|------------------------------------|
| number types  | FP32 graph; FP16 flag as asked, INT8 flag with Q/DQ  | strongly typed: those of the graph |
|               | and FP16 for all around it, float32 for named nodes  |                                    |
| progress      | the phases of this module                            | IProgressMonitor's                 |

Whatever else differs between versions is looked up by name; tests hold every name against the versions' API lists.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samq.engines.base import sidecar_of
from samq.engines.cuda import Device, find_device
from samq.engines.tensorrt_layers import EngineLayer, read_layers, with_regions
from samq.engines.tensorrt_log import (
    WARNING,
    Log,
    captured,
    failure,
    load_tensorrt,
    new_builder,
    new_runtime,
    version_of,
)
from samq.engines.tensorrt_network import (
    add_profile,
    ask_for_types,
    describe_tensors,
    halve_io,
    is_quantized,
    layer_names,
    network_flags,
    side_names,
)
from samq.engines.tensorrt_parse import parse_into
from samq.engines.tensorrt_plan import BuildOptions, PlanInfo, log_of, save_info
from samq.engines.tensorrt_progress import Progress, Watch, silent
from samq.engines.tensorrt_timings import Timings, keep_timings, timings_file, use_timings
from samq.engines.tensorrt_weights import refittable_parts
from samq.errors import BadInput, MachineLacks
from samq.files import sha256_of, write_text, written_whole

if TYPE_CHECKING:
    import tensorrt as trt

OBEY = "OBEY_PRECISION_CONSTRAINTS"


def build_engine(
    onnx_path: Path, plan_path: Path, options: BuildOptions | None = None, progress: Progress = silent
) -> PlanInfo:
    """Build a plan; beside it stand `<plan>.json` (what it is) and `<plan>.log` (what TensorRT said).

    Args:
        onnx_path: a graph lowered for the TensorRT at hand.

    Raises:
        MachineLacks: no TensorRT, no GPU, not enough of its memory, or an option that this version has not.
        BadInput: the file is missing, or TensorRT does not take it; the message names the node.
        UsageError: a dynamic side has no range.
    """
    if not onnx_path.is_file():
        raise BadInput(f"{onnx_path} is missing; run `samq-export export` first")
    api, device, options = load_tensorrt(), find_device(), options or BuildOptions()
    for stale in (sidecar_of(plan_path), log_of(plan_path)):
        stale.unlink(missing_ok=True)
    with captured() as (logger, log):
        try:
            return _Build(api, device, logger, log, onnx_path, plan_path, options, progress).run()
        finally:
            write_text(log_of(plan_path), str(log))


class _Build:
    """One run of the builder."""

    def __init__(
        self,
        api: Any,
        device: Device,
        logger: trt.ILogger,
        log: Log,
        onnx_path: Path,
        plan_path: Path,
        options: BuildOptions,
        progress: Progress,
    ) -> None:
        self.api, self.device, self.log, self.options, self.progress = api, device, log, options, progress
        self.onnx_path, self.plan_path = onnx_path, plan_path
        self.version = version_of(api)
        self.logger, self.watch = logger, Watch(progress)

    def run(self) -> PlanInfo:
        started = time.perf_counter()
        api = self.api
        builder: trt.Builder = new_builder(api, self.logger, self.log, self.onnx_path)
        strong = hasattr(api.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")
        network: trt.INetworkDefinition = builder.create_network(network_flags(api))
        plan: trt.IHostMemory | None = None
        with self.watch.heeding_interrupts():
            self.progress("parse", 0, 0)
            parse_into(api, network, self.logger, self.log, self.onnx_path)
            config = self._config(builder, network, strong)
            timings = self._timings(config)
            self.progress("build", 0, 0)
            if self.watch.raised is None:
                plan = builder.build_serialized_network(network, config)
        if self.watch.raised is not None:
            raise self.watch.raised
        if plan is None:
            raise failure(self.onnx_path, self.log)
        with written_whole(self.plan_path) as temporary:
            temporary.write_bytes(plan)
        if timings is not None:
            try:
                keep_timings(config, timings, self.log)
            except MachineLacks as error:  # a plan took minutes, and is worth more than its timings
                self.log.messages.append((WARNING, f"timings are not kept: {error}"))
        info = self._describe(network, plan, strong, time.perf_counter() - started)
        save_info(self.plan_path, info)
        return info

    def _config(self, builder: trt.Builder, network: trt.INetworkDefinition, strong: bool) -> trt.IBuilderConfig:
        api, options = self.api, self.options
        config: trt.IBuilderConfig = builder.create_builder_config()
        flags = wanted_flags(options, strongly_typed=strong, quantized=is_quantized(api, network))
        for name in flags:
            if not hasattr(api.BuilderFlag, name):
                raise MachineLacks(f"TensorRT {self.version} has no {name}; build without that option")
            config.set_flag(getattr(api.BuilderFlag, name))
        if OBEY in flags:
            for name in ask_for_types(api, network, options.float32, half="INT8" in flags and "FP16" in flags):
                self.log.messages.append((WARNING, f"{name}: no layer to keep in float32"))
        if not strong:
            halve_io(api, network, options.half_io)
        config.builder_optimization_level = options.optimization_level
        config.profiling_verbosity = api.ProfilingVerbosity.DETAILED
        if options.workspace_mib is not None:
            config.set_memory_pool_limit(api.MemoryPoolType.WORKSPACE, options.workspace_mib << 20)
        if options.hardware_compatible:
            config.hardware_compatibility_level = api.HardwareCompatibilityLevel.AMPERE_PLUS
        config.set_tactic_sources(tactic_sources(api, config, options.tactics_off))
        add_profile(builder, config, side_names(network), options.ranges)
        if hasattr(config, "progress_monitor"):
            config.progress_monitor = self.watch.monitor(api)
        return config

    def _timings(self, config: trt.IBuilderConfig) -> Timings | None:
        """Let the builder use earlier timings; told now, not after the build, where they cannot be written."""
        if self.options.timing_cache is None:
            return None
        path = timings_file(Path(self.options.timing_cache), self.version, self.device)
        return use_timings(config, path, self.log)

    def _describe(
        self, network: trt.INetworkDefinition, plan: trt.IHostMemory, strong: bool, seconds: float
    ) -> PlanInfo:
        api = self.api
        self.progress("inspect", 0, 0)
        runtime: trt.Runtime = new_runtime(api, self.logger, self.log, self.plan_path)
        runtime.engine_host_code_allowed = self.options.version_compatible
        engine: trt.ICudaEngine | None = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise failure(self.plan_path, self.log)
        inputs, outputs = describe_tensors(api, engine)
        sides = side_names(network)
        inspector: trt.EngineInspector = engine.create_engine_inspector()
        order, gemms = layer_names(api, network)
        layers = self._layers(inspector.get_engine_information(api.LayerInformationFormat.JSON))
        return PlanInfo(
            gpu=self.device.name,
            capability=self.device.capability,
            tensorrt=self.version,
            onnx=self.onnx_path.name,
            onnx_sha256=sha256_of(self.onnx_path),
            strongly_typed=strong,
            inputs=tuple(replace(tensor, shape=sides[tensor.name]) for tensor in inputs),
            outputs=outputs,
            options=self.options,
            seconds=round(seconds, 3),
            plan_bytes=plan.nbytes,
            gemms=gemms,
            layers=with_regions(layers, order, gemms),
            warnings=tuple(self.log.of(WARNING)),
            refittable=refittable_parts(api, network) if self.options.refittable else None,
        )

    def _layers(self, text: str) -> tuple[EngineLayer, ...]:
        """Layers as the inspector tells them; a plan is not lost for an account that cannot be read."""
        try:
            return read_layers(text)
        except ValueError:
            self.log.messages.append((WARNING, "the engine inspector's account cannot be read: no layer is known"))
            return ()


def wanted_flags(options: BuildOptions, *, strongly_typed: bool, quantized: bool) -> tuple[str, ...]:
    """Names of the builder flags to set.

    Args:
        quantized: the graph has Q/DQ; 8.6 asks for a calibrator when INT8 is set without.
    """
    wanted = {
        "FP16": options.fp16 and not strongly_typed,
        "INT8": quantized and not strongly_typed,
        OBEY: (bool(options.float32) or (options.fp16 and quantized)) and not strongly_typed,
        "VERSION_COMPATIBLE": options.version_compatible,
        "REFIT": options.refittable,
    }
    return tuple(name for name, is_wanted in wanted.items() if is_wanted)


def tactic_sources(api: Any, config: trt.IBuilderConfig, off: Sequence[str]) -> int:
    """The sources in use, without those to be off; a version that has lost one uses it no more."""
    sources = int(config.get_tactic_sources())
    for name in off:
        if hasattr(api.TacticSource, name):
            sources &= ~(1 << int(getattr(api.TacticSource, name)))
    return sources
