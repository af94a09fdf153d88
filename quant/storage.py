"""`weights/`: the quantized model on disk, from which it loads back bit for bit.

quantized.safetensors holds, for each quantized layer,
    <layer>.codes           4-bit codes two a byte, or int8/uint8 codes [N, K]
    <layer>.scale           [N, groups]: int8 group scales (two levels) or FP16
    <layer>.channel_scale   [N] FP16 (two levels only)
    <layer>.zero_point      like the codes (unsigned grids only)
    <layer>.down, .up       FP16 factors of the low-rank branch; `down` only with the first of the layers that share it
    <layer>.multiplier      [K] float32, where the inputs are multiplied by it first
    <layer>.bias            float32
and every other tensor of the model under its own name, in FP16 where that is exact and in float32 otherwise. What is
no tensor (shapes, grids, the inputs' scales, whether inputs are rotated) is JSON in the file's metadata, under one
key, the format's name: with two keys, safetensors would write them in a random order. `config.json` beside it is the
model's.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import Sam2Config, Sam2Model

from samq.errors import BadInput
from samq.files import written_whole
from samq.quant.grids import Grid, QuantizedWeight, Scales, pack_int4, unpack_int4
from samq.quant.inputs import InputGrid
from samq.quant.layers import LayerCodes, QuantizedLinear, replace_module
from samq.quant.low_rank import LowRank

FILE_NAME = "quantized.safetensors"
FORMAT = "samq-1"
UNREADABLE = (SafetensorError, OSError, AttributeError, KeyError, RuntimeError, TypeError, ValueError)
"""What reading a corrupt file may raise, in safetensors, JSON, transformers and PyTorch."""


def save_quantized(directory: Path, model: Sam2Model, codes: dict[str, LayerCodes]) -> Path:
    """Write a quantized `Sam2Model`; returns the safetensors file.

    Raises:
        MachineLacks: the disk is full or not writable.
    """
    tensors, layers = {}, {}
    for name, layer in codes.items():
        stored, description = _encode(layer)
        tensors.update({f"{name}.{key}": tensor for key, tensor in stored.items()})
        layers[name] = description
    quantized = tuple(f"{name}." for name in codes)
    for name, tensor in model.state_dict().items():
        if not name.startswith(quantized):
            tensors[name] = _narrowed(tensor)
    metadata = {FORMAT: json.dumps(layers)}
    path = directory / FILE_NAME
    whole = save({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, metadata)
    with written_whole(path) as temporary:
        temporary.write_bytes(whole)  # safetensors' own writing hides a full disk in an error of its own
    with written_whole(directory / "config.json") as temporary:
        model.config.to_json_file(temporary)
    return path


def load_quantized(directory: Path) -> tuple[Sam2Model, dict[str, LayerCodes]]:
    """The simulated model that `save_quantized` wrote, on the CPU, and its layers' codes.

    Raises:
        BadInput: a file is missing or corrupt.
    """
    path, config_path = directory / FILE_NAME, directory / "config.json"
    for needed in (path, config_path):
        if not needed.is_file():
            raise BadInput(f"{needed} is missing; run `samq-export quantize` first")
    try:
        config = Sam2Config.from_json_file(config_path)
    except UNREADABLE as error:
        raise _corrupt(config_path, error) from error
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        if FORMAT not in metadata:
            raise BadInput(f"{path} is not of the format {FORMAT}; run `samq-export quantize` again")
        model, codes = _restore(config, json.loads(metadata[FORMAT]), tensors)
    except UNREADABLE as error:
        raise _corrupt(path, error) from error
    return model, codes


def _restore(
    config: Sam2Config, layers: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[Sam2Model, dict[str, LayerCodes]]:
    """Model and codes; `tensors` is emptied of what belongs to the codes."""
    model = Sam2Model(config)
    codes: dict[str, LayerCodes] = {}
    for name, description in layers.items():
        codes[name] = _decode(description, name, tensors, codes)
    for name, layer in codes.items():
        replace_module(model, name, QuantizedLinear(layer))
    rest = {name: tensor.float() for name, tensor in tensors.items()}
    biases = {f"{name}.bias": layer.bias for name, layer in codes.items() if layer.bias is not None}
    model.load_state_dict(rest | biases)
    model.train(False)
    return model, codes


def _corrupt(path: Path, error: Exception) -> BadInput:
    reason = " ".join(str(error).split())[:200]  # PyTorch's errors have many lines
    return BadInput(f"{path} is corrupt ({reason}); run `samq-export quantize` again")


def _encode(layer: LayerCodes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    weight, scales = layer.weight, layer.weight.scales
    four_bit = weight.grid.bits == 4
    stored = {"codes": pack_int4(weight.codes) if four_bit else weight.codes}
    stored["scale"] = scales.scale.to(torch.int8 if weight.grid.two_level else torch.float16)
    if scales.channel_scale is not None:
        stored["channel_scale"] = scales.channel_scale[:, 0].half()
    if scales.zero_point is not None:
        zero_point = scales.zero_point.to(torch.uint8)
        stored["zero_point"] = pack_int4(zero_point) if four_bit else zero_point
    if layer.branch is not None:
        stored["up"] = layer.branch.up.half()
        if layer.down_of is None:
            stored["down"] = layer.branch.down.half()
    if layer.multiplier is not None:
        stored["multiplier"] = layer.multiplier
    if layer.bias is not None:
        stored["bias"] = layer.bias
    return stored, {
        "shape": list(weight.codes.shape),
        "grid": asdict(weight.grid),
        "group_size": scales.group_size,
        "inputs": None if layer.inputs is None else asdict(layer.inputs),
        "branch": layer.branch is not None,
        "down_of": layer.down_of,
        "multiplier": layer.multiplier is not None,
        "rotated": layer.rotated,
        "bias": layer.bias is not None,
    }


def _decode(
    description: dict[str, Any], name: str, tensors: dict[str, Tensor], others: dict[str, LayerCodes]
) -> LayerCodes:
    """The codes of one layer, taken from `tensors`; `others` are those of the layers before it."""
    grid = Grid(**description["grid"])
    shape = tuple(description["shape"])

    def codes_of(key: str, shape: tuple[int, ...]) -> Tensor:
        stored = tensors.pop(f"{name}.{key}")
        return unpack_int4(stored, shape, grid.signed) if grid.bits == 4 else stored

    codes = codes_of("codes", shape)
    scale = tensors.pop(f"{name}.scale").float()
    channel_scale = tensors.pop(f"{name}.channel_scale").float()[:, None] if grid.two_level else None
    zero_point = None if grid.signed else codes_of("zero_point", tuple(scale.shape)).float()
    scales = Scales(scale, zero_point, channel_scale, description["group_size"])
    branch, down_of = None, description.get("down_of")
    if description["branch"]:
        shared = None if down_of is None else others[down_of].branch
        down = tensors.pop(f"{name}.down").float() if shared is None else shared.down
        branch = LowRank(down, tensors.pop(f"{name}.up").float())
    inputs = description["inputs"]
    multiplier = tensors.pop(f"{name}.multiplier") if description.get("multiplier") else None
    bias = tensors.pop(f"{name}.bias") if description["bias"] else None
    return LayerCodes(
        QuantizedWeight(codes, scales, grid),
        None if inputs is None else InputGrid(**inputs),
        branch,
        bias,
        multiplier,
        down_of,
        description.get("rotated", False),
    )


def _narrowed(tensor: Tensor) -> Tensor:
    """The tensor in FP16 where that loses nothing."""
    if not tensor.is_floating_point():
        return tensor
    half = tensor.half()
    return half if torch.equal(half.to(tensor.dtype), tensor) else tensor
