"""Blocks of an image encoder alone: what they compute on the CPU, and how long they take on TensorRT.

A block is built as it stands in the whole engine: with the tokens before and behind it in FP16, the same nodes in
float32, static shapes and a CUDA graph.
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort  # type: ignore[import-untyped]
from numpy.typing import NDArray

from samq.calib.parts import IMAGE_ENCODER
from samq.engines import tensorrt
from samq.engines.tensorrt_plan import BuildOptions, PlanInfo
from samq.export.lower_tensorrt import lower_for_tensorrt
from samq.export.parts import save_part
from samq.export.placement import Form, Placement
from samq.export.regions import TOKENS, cut_blocks, structure
from samq.export.tensorrt_targets import TensorRtTarget

REPEATS = 100
Values = Mapping[str, NDArray[Any]]
Builder = Callable[[Path, Path, BuildOptions], PlanInfo]


@dataclass(frozen=True)
class Block:
    """One block, lowered in one form, or a whole encoder.

    Args:
        name: of the block.
        graph: from its inputs to the tokens behind it; of an encoder, to all its outputs.
        options: to build it with.
        digest: equal for blocks that take the same time.
    """

    name: str
    graph: ir.Model
    options: BuildOptions
    digest: str

    @property
    def output(self) -> str:
        """Name of the tokens behind it; of an encoder, its first output."""
        return str(self.graph.graph.outputs[0].name)


@dataclass(frozen=True)
class Run:
    """What an engine did.

    Args:
        milliseconds: of each run.
        output: the block's tokens.
    """

    milliseconds: list[float]
    output: NDArray[Any]

    @property
    def median(self) -> float:
        return statistics.median(self.milliseconds)

    @property
    def spread(self) -> float:
        """Interquartile range."""
        quarters = statistics.quantiles(self.milliseconds, n=4)
        return quarters[2] - quarters[0]


def lowered_blocks(
    onnx: Path, target: TensorRtTarget, form: Form, rewrites: Collection[str], options: BuildOptions
) -> Iterator[Block]:
    """The blocks of the quantized encoder, all in one form.

    Args:
        onnx: folder of the canonical parts, with static shapes.
        options: of the builder.
    """
    placement = Placement(layers={"*": form})
    lowered = lower_for_tensorrt(
        ir.load(onnx / f"{IMAGE_ENCODER}.onnx"), target, placement=placement, rewrites=rewrites
    )
    for name, graph in cut_blocks(lowered.model):
        nodes = {str(node.name) for node in graph.graph}
        ends = [str(value.name) for value in (*graph.graph.inputs, *graph.graph.outputs)]
        own = replace(
            options,
            float32=tuple(node for node in lowered.float32 if node in nodes),
            half_io=tuple(end for end in ends if end.endswith(TOKENS)),
        )
        yield Block(name, graph, own, _digest(graph, own))


def lowered_encoder(
    onnx: Path, target: TensorRtTarget, placement: Placement, rewrites: Collection[str], options: BuildOptions
) -> Block:
    """The whole quantized encoder, placed as an engine has it.

    Args:
        onnx: folder of the canonical parts, with static shapes.
        options: of the builder.
    """
    lowered = lower_for_tensorrt(
        ir.load(onnx / f"{IMAGE_ENCODER}.onnx"), target, placement=placement, rewrites=rewrites
    )
    own = replace(options, float32=lowered.float32)
    return Block(IMAGE_ENCODER, lowered.model, own, _digest(lowered.model, own))


def _digest(graph: ir.Model, options: BuildOptions) -> str:
    told = f"{structure(graph)} {options.optimization_level} {options.workspace_mib} {options.tactics_off}"
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def float_tokens(onnx: Path, pixels: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
    """The float encoder's input and the tokens behind each of its blocks, by the names of the values.

    Args:
        onnx: folder of the canonical parts.
        pixels: [1, 3, S, S].
    """
    values: dict[str, NDArray[Any]] = {"pixel_values": pixels}
    for _, graph in cut_blocks(ir.load(onnx / "fp32" / f"{IMAGE_ENCODER}.onnx")):
        values[str(graph.graph.outputs[0].name)] = on_cpu(graph, values)
    return values


def on_cpu(graph: ir.Model, values: Values) -> NDArray[Any]:
    """What a block's graph says its one output is: ONNX Runtime on the CPU, without optimizations."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(ir.to_proto(graph).SerializeToString(), options, providers=["CPUExecutionProvider"])
    (output,) = session.run(None, feeds_of(graph, values))
    found: NDArray[Any] = output
    return found


def build_block(block: Block, folder: Path, builder: Builder) -> Path:
    """The plan of a block.

    Args:
        builder: `samq.engines.tensorrt.build_engine`, or `build_apart` for builds at the same time.

    Raises:
        SamqError: it cannot be built.
    """
    path = folder / f"{block.name}.onnx"
    plan = path.with_suffix(".plan")
    save_part(block.graph, path)
    builder(path, plan, block.options)
    return plan


def run_block(block: Block, plan: Path, values: Values) -> Run:
    """Run the plan of a block on the GPU at hand.

    Raises:
        SamqError: it cannot be run.
    """
    engine = tensorrt.open_engine(plan)
    try:
        feeds = feeds_of(block.graph, values)
        output = engine.run(feeds)[block.output]
        return Run(engine.time(feeds, REPEATS), output)
    finally:
        engine.close()


def feeds_of(graph: ir.Model, values: Values) -> dict[str, NDArray[Any]]:
    """The inputs of a block's graph in its types."""
    feeds = {}
    for value in graph.graph.inputs:
        assert value.dtype is not None
        feeds[str(value.name)] = values[str(value.name)].astype(value.dtype.numpy())
    return feeds
