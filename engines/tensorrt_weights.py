"""What a network is apart from its weights, and digests of these: two graphs of one structure can share a plan.

Weights are told as TensorRT's refitter does, by layer and role: `<layer>/KERNEL`. A constant layer is called like the
initializer that it was parsed from (onnx-tensorrt, `convertToTensor`), any other one like its ONNX node.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from samq.engines.tensorrt_plan import Refittable

if TYPE_CHECKING:
    import tensorrt as trt


def weight_key(layer: str, role: str) -> str:
    """What a layer's weights are called here; `role` is a name of TensorRT's `WeightsRole`."""
    return f"{layer}/{role}"


def refittable_parts(api: Any, network: trt.INetworkDefinition) -> Refittable:
    """What has to stay as it is in a graph whose weights are to go into the network's plan, and the weights now."""
    weights = {key: digest_of(values) for key, values in network_weights(api, network).items()}
    return Refittable(_structure(network), weights)


def network_weights(api: Any, network: trt.INetworkDefinition) -> dict[str, Any]:
    """The weights of a parsed network, each an array where numpy has its type; they live as long as the network."""
    return dict(_weights(api, network))


def _weights(api: Any, network: trt.INetworkDefinition) -> Iterator[tuple[str, Any]]:
    for index in range(network.num_layers):
        layer: trt.ILayer = network.get_layer(index)
        name = layer.name
        if layer.type == api.LayerType.CONSTANT:
            layer.__class__ = api.IConstantLayer  # how the bindings are told what a layer is
            constant: trt.IConstantLayer = layer
            yield weight_key(name, "CONSTANT"), constant.weights
        elif layer.type == api.LayerType.CONVOLUTION:
            layer.__class__ = api.IConvolutionLayer
            convolution: trt.IConvolutionLayer = layer
            yield weight_key(name, "KERNEL"), convolution.kernel
            yield weight_key(name, "BIAS"), convolution.bias
        elif layer.type == api.LayerType.DECONVOLUTION:
            layer.__class__ = api.IDeconvolutionLayer
            deconvolution: trt.IDeconvolutionLayer = layer
            yield weight_key(name, "KERNEL"), deconvolution.kernel
            yield weight_key(name, "BIAS"), deconvolution.bias


def digest_of(weights: Any) -> str:
    """Digest of an array; empty, and so equal to none, where numpy has not its type (INT4)."""
    if not isinstance(weights, np.ndarray):
        return ""
    digest = hashlib.sha256(f"{weights.dtype}{weights.shape}".encode())
    digest.update(np.ascontiguousarray(weights).data)
    return digest.hexdigest()[:32]


def _structure(network: trt.INetworkDefinition) -> str:
    """Digest of all layers with their types, and of the types and shapes of what they give."""
    digest = hashlib.sha256()
    for index in range(network.num_layers):
        layer: trt.ILayer = network.get_layer(index)
        kind: trt.LayerType = layer.type
        outputs = [_described(layer.get_output(output)) for output in range(layer.num_outputs)]
        digest.update(repr((layer.name, kind.name, outputs)).encode())
    return digest.hexdigest()[:32]


def _described(tensor: trt.ITensor) -> tuple[str, tuple[int, ...]]:
    dtype: trt.DataType = tensor.dtype
    return dtype.name, tuple(tensor.shape)
