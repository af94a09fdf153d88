"""What a TensorRT network or engine says about itself, and the profiles of its dynamic inputs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from samq.engines.tensorrt_layers import nodes_in
from samq.engines.tensorrt_plan import PlanTensor, Range
from samq.errors import BadInput, UsageError

if TYPE_CHECKING:
    import tensorrt as trt

DTYPES: Mapping[str, Any] = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "INT64": np.int64,
    "INT32": np.int32,
    "INT8": np.int8,
    "UINT8": np.uint8,
    "BOOL": np.bool_,
}


def profile_shapes(
    name: str, shape: Sequence[int | str], ranges: Mapping[str, Range]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Smallest, usual and largest shape of an input.

    Raises:
        UsageError: a dynamic side has no range.
    """
    for side in shape:
        if isinstance(side, str) and side not in ranges:
            fix = "give its smallest, usual and largest size, or export static shapes"
            raise UsageError(f"input {name} has a dynamic side {side!r} without a range; {fix}")
    smallest, usual, largest = (tuple(ranges[s][i] if isinstance(s, str) else s for s in shape) for i in range(3))
    return smallest, usual, largest


def describe_tensors(api: Any, engine: trt.ICudaEngine) -> tuple[tuple[PlanTensor, ...], tuple[PlanTensor, ...]]:
    """Inputs and outputs of an engine; a dynamic side is called by the tensor's name and the side's number.

    Raises:
        BadInput: a number type that numpy has not.
    """
    tensors: dict[bool, list[PlanTensor]] = {True: [], False: []}
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        dtype: trt.DataType = engine.get_tensor_dtype(name)
        if dtype.name not in DTYPES:
            raise BadInput(
                f"{name} is {dtype.name}, which numpy has not; export it with FP32 or FP16 inputs and outputs"
            )
        shape = tuple(s if s >= 0 else f"{name}_{i}" for i, s in enumerate(engine.get_tensor_shape(name)))
        is_input = engine.get_tensor_mode(name) == api.TensorIOMode.INPUT
        tensors[is_input].append(PlanTensor(name, shape, np.dtype(DTYPES[dtype.name]).name))
    return tuple(tensors[True]), tuple(tensors[False])


def network_flags(api: Any) -> int:
    """Strongly typed where the version can; explicit batch where it must be told."""
    if hasattr(api.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):
        return 1 << int(api.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    if hasattr(api.NetworkDefinitionCreationFlag, "EXPLICIT_BATCH"):
        return 1 << int(api.NetworkDefinitionCreationFlag.EXPLICIT_BATCH)
    return 0


def is_quantized(api: Any, network: trt.INetworkDefinition) -> bool:
    """The graph has Q/DQ."""
    for index in range(network.num_layers):
        layer: trt.ILayer = network.get_layer(index)
        if layer.type == api.LayerType.QUANTIZE:
            return True
    return False


def layer_names(api: Any, network: trt.INetworkDefinition) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of all layers, and of those that multiply matrices; a parsed layer is called as its ONNX node."""
    names, gemms = [], []
    for index in range(network.num_layers):
        layer: trt.ILayer = network.get_layer(index)
        names.append(layer.name)
        if layer.type == api.LayerType.MATRIX_MULTIPLY:
            gemms.append(layer.name)
    return tuple(names), tuple(gemms)


def ask_for_types(
    api: Any, network: trt.INetworkDefinition, float32: Collection[str], *, half: bool
) -> tuple[str, ...]:
    """Ask for float32 arithmetic and outputs in the layers of some ONNX nodes, and for FP16 in the others.

    Constants, casts, Q/DQ and the network's outputs say their type themselves. Products of what Q/DQ give are asked for
    FP16 results, and not for how they compute: asked for that too, 8.6 obeys, and runs no INT8 kernel. A version
    without such requests is strongly typed.

    Args:
        float32: names of ONNX nodes.
        half: ask for FP16 at all; otherwise the other layers are left to TensorRT. 8.6 runs a fused region that holds
            Q/DQ in float32 throughout, unless it is asked.

    Returns:
        the names that are not found.
    """
    typed = {getattr(api.LayerType, name) for name in ("CONSTANT", "CAST", "QUANTIZE", "DEQUANTIZE")}
    missing = set(float32)
    products, their_operands = _of_integers(api, network)
    for index in range(network.num_layers):
        layer: trt.ILayer = network.get_layer(index)
        exact = {layer.name, *nodes_in(layer.metadata)} & set(float32)
        missing -= exact
        floats = [i for i in range(layer.num_outputs) if _is_float(api, layer, i)]
        if layer.type in typed or not floats or not (exact or (half and layer.name not in their_operands)):
            continue
        if hasattr(layer, "precision") and hasattr(layer, "set_output_type"):
            wanted = api.DataType.FLOAT if exact else api.DataType.HALF
            if exact or layer.name not in products:
                layer.precision = wanted
            for output in floats:
                tensor: trt.ITensor = layer.get_output(output)
                if exact or not tensor.is_network_output:
                    layer.set_output_type(output, wanted)
    return tuple(sorted(missing))


def _of_integers(api: Any, network: trt.INetworkDefinition) -> tuple[set[str], set[str]]:
    """Names of the matrix products whose operands both are dequantized, and of layers that move such operands."""
    dequantized, products, moves = set[str](), set[str](), set[str]()
    for index in range(network.num_layers):
        layer: trt.ILayer = network.get_layer(index)
        operands: list[trt.ITensor] = [layer.get_input(i) for i in range(layer.num_inputs)]
        all_are = bool(operands) and all(operand.name in dequantized for operand in operands)
        if layer.type == api.LayerType.MATRIX_MULTIPLY and all_are:
            products.add(layer.name)
        if layer.type == api.LayerType.SHUFFLE and all_are:
            moves.add(layer.name)
        if layer.type == api.LayerType.DEQUANTIZE or layer.name in moves:
            result: trt.ITensor = layer.get_output(0)
            dequantized.add(result.name)
    return products, moves


def _is_float(api: Any, layer: trt.ILayer, index: int) -> bool:
    tensor: trt.ITensor = layer.get_output(index)
    return bool(tensor.dtype == api.DataType.FLOAT)


def halve_io(api: Any, network: trt.INetworkDefinition, names: Collection[str]) -> None:
    """Take and give some float32 inputs and outputs in FP16; to be called when all layers have their types."""
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    for found in (*inputs, *(network.get_output(index) for index in range(network.num_outputs))):
        tensor: trt.ITensor = found
        if tensor.name in names and tensor.dtype == api.DataType.FLOAT:
            tensor.dtype = api.DataType.HALF


def side_names(network: trt.INetworkDefinition) -> dict[str, tuple[int | str, ...]]:
    """Shapes of the inputs by name; dynamic sides are called as in the graph."""
    shapes: dict[str, tuple[int | str, ...]] = {}
    for index in range(network.num_inputs):
        tensor: trt.ITensor = network.get_input(index)
        sides = enumerate(tensor.shape)
        shapes[tensor.name] = tuple(
            s if s >= 0 else tensor.get_dimension_name(i) or f"{tensor.name}_{i}" for i, s in sides
        )
    return shapes


def add_profile(
    builder: trt.Builder,
    config: trt.IBuilderConfig,
    shapes: Mapping[str, Sequence[int | str]],
    ranges: Mapping[str, Range],
) -> None:
    """One profile over all dynamic inputs; none where there are none.

    Raises:
        UsageError: a dynamic side has no range.
    """
    dynamic = {name: shape for name, shape in shapes.items() if any(isinstance(side, str) for side in shape)}
    if not dynamic:
        return
    profile: trt.IOptimizationProfile = builder.create_optimization_profile()
    for name, shape in dynamic.items():
        profile.set_shape(name, *profile_shapes(name, shape, ranges))
    config.add_optimization_profile(profile)
