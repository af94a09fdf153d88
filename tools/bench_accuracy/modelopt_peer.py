"""NVIDIA ModelOpt's rows: its configs on samq's layers, calibrated by running the image encoder.

A config as shipped would quantize convolutions and the mask decoder too, and would leave out every `mlp.proj_out`, a
name that ModelOpt knows from other models. So each layer is named: it gets the config's formats, all else none.
4-bit weights with INT8 inputs are not among what it ships; formats and algorithms are put together from its own.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import Sam2Model

from samq.calib.parts import ImageEncoder
from samq.quant.config import load_recipe
from samq.quant.grids import groups_of
from samq.quant.plan import LayerPlan
from samq.tools.bench_accuracy.method import (
    BRANCH,
    FLOAT,
    PEER_SCALE_BITS,
    STATIC,
    W4,
    W4A8,
    W8A8,
    Made,
    Method,
    Subject,
    bits_per_weight,
    group_of,
    layers_to_quantize,
    rank_within,
)

PACKAGE = "nvidia-modelopt"
INT8 = {"num_bits": 8, "axis": None}
FP4 = "dynamic, blocks of 16"
AWQ, SMOOTHQUANT, SVDQUANT = "INT4_AWQ_CFG", "INT8_SMOOTHQUANT_CFG", "NVFP4_SVDQUANT_DEFAULT_CFG"


@dataclass(frozen=True)
class Setup:
    """What ModelOpt is asked for.

    Args:
        config: name of a shipped config.
        form: a 4-bit form; its groups of INT4 weights, instead of the config's format.
        int8_inputs: instead of the config's format of the inputs.
        gptq: instead of the config's algorithm.
        same_bytes: the branches' rank is the one at which they take as many bytes as samq's may, instead of 32.
    """

    config: str
    form: str | None = None
    int8_inputs: bool = False
    gptq: bool = False
    same_bytes: bool = False


def _run(subject: Subject, setup: Setup) -> Made:
    import modelopt.torch.quantization as mtq

    shipped = copy.deepcopy(getattr(mtq, setup.config))
    plans = layers_to_quantize(subject.model)
    algorithm = {"method": "gptq"} if setup.gptq else shipped["algorithm"]
    if setup.same_bytes:
        algorithm |= {"lowrank": rank_within(plans, _share_of_branches())}
    formats = {entry["quantizer_name"]: entry.get("cfg") for entry in shipped["quant_cfg"]}
    asked = {"quant_cfg": _formats(plans, setup, formats), "algorithm": algorithm}
    model = copy.deepcopy(subject.model)
    mtq.quantize(model, asked, partial(_calibrate, pixels=subject.pixels))
    stored = sum(_stored_bits(model.get_submodule(plan.name), plan) for plan in plans)
    return Made(model, bits_per_weight(plans, stored), f"rank {algorithm['lowrank']}" if setup.same_bytes else "")


def _formats(plans: Sequence[LayerPlan], setup: Setup, shipped: Mapping[str, Any]) -> list[dict[str, Any]]:
    """ModelOpt's list of formats: nothing but these layers is quantized.

    Args:
        shipped: the config's formats, by the pattern of quantizers that get them.
    """
    chosen: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    inputs = INT8 if setup.int8_inputs else shipped.get("*input_quantizer")
    for plan in plans:
        weights = shipped["*weight_quantizer"] if setup.form is None else _groups(group_of(plan, setup.form))
        chosen.append({"quantizer_name": f"{plan.name}.weight_quantizer", "cfg": weights})
        if inputs:
            chosen.append({"quantizer_name": f"{plan.name}.input_quantizer", "cfg": inputs})
    return chosen


def _share_of_branches() -> float:
    """Share of the FP16 bytes that samq's preset grants its branches."""
    low_rank = load_recipe("int4_svdquant").wgts.low_rank
    assert low_rank is not None
    assert low_rank.max_overhead is not None
    return low_rank.max_overhead


def _groups(size: int) -> dict[str, Any]:
    return {"num_bits": 4, "block_sizes": {-1: size, "type": "static"}}


@torch.no_grad()
def _calibrate(model: Sam2Model, pixels: Sequence[torch.Tensor]) -> None:
    encoder = ImageEncoder(model)
    for batch in pixels:
        encoder(batch)


def _stored_bits(layer: nn.Module, plan: LayerPlan) -> float:
    """Bits of codes, scales, channel scales that ModelOpt leaves at the input, and the branch.

    Raises:
        RuntimeError: ModelOpt did not quantize the layer.
    """
    quantizers: Any = layer.weight_quantizer
    first: Any = quantizers[0] if isinstance(quantizers, nn.Sequential) else quantizers
    if not first.is_enabled:
        raise RuntimeError(f"{plan.name} was left in floating point")
    inputs, outputs = plan.in_features, plan.out_features
    block = (first.block_sizes or {}).get(-1, inputs)
    bits = first.num_bits * inputs * outputs + PEER_SCALE_BITS * outputs * groups_of(inputs, block)
    if getattr(layer.input_quantizer, "pre_quant_scale", None) is not None:
        bits += PEER_SCALE_BITS * inputs
    for branch in (getattr(first, "svdquant_lora_a", None), getattr(first, "svdquant_lora_b", None)):
        bits += 0 if branch is None else PEER_SCALE_BITS * branch.numel()
    return float(bits)


def _method(key: str, title: str, form: str, inputs: str, setup: Setup) -> Method:
    return Method(f"modelopt-{key}", f"ModelOpt {title}", form, PACKAGE, partial(_run, setup=setup), inputs)


METHODS = (
    _method("w4a8-awq", "AWQ, INT8 inputs", W4A8, STATIC, Setup(AWQ, W4A8, int8_inputs=True)),
    _method("w4-awq", f"`{AWQ}`", W4, FLOAT, Setup(AWQ)),
    _method("w4-awq-groups", "AWQ, samq's groups", W4, FLOAT, Setup(AWQ, W4)),
    _method("w4a8-gptq", "GPTQ, INT8 inputs", W4A8, STATIC, Setup(AWQ, W4A8, int8_inputs=True, gptq=True)),
    _method("w4-gptq", "GPTQ, samq's groups", W4, FLOAT, Setup(AWQ, W4, gptq=True)),
    _method("w8a8-smooth", f"`{SMOOTHQUANT}`", W8A8, STATIC, Setup(SMOOTHQUANT)),
    _method("svdquant", "SVDQuant, INT8 inputs, rank 32", BRANCH, STATIC, Setup(SVDQUANT, BRANCH, int8_inputs=True)),
    _method(
        "svdquant-bytes",
        "SVDQuant, INT8 inputs, samq's bytes",
        BRANCH,
        STATIC,
        Setup(SVDQUANT, BRANCH, int8_inputs=True, same_bytes=True),
    ),
    _method("svdquant-nvfp4", f"`{SVDQUANT}`: FP4 weights and inputs", BRANCH, FP4, Setup(SVDQUANT)),
    _method("w4a8-fp8", "`W4A8_AWQ_BETA_CFG`: FP8 inputs", W4A8, STATIC, Setup("W4A8_AWQ_BETA_CFG")),
    _method("w4a8-smooth", "SmoothQuant, INT4 weights", W4A8, STATIC, Setup(SMOOTHQUANT, W4A8)),
    _method("w8a8-max", "`INT8_DEFAULT_CFG`", W8A8, STATIC, Setup("INT8_DEFAULT_CFG")),
)
