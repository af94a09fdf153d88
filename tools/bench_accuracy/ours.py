"""samq's rows: its presets, what they are without some of their methods, and configs from files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from samq.errors import UsageError
from samq.quant.config import Recipe, load_recipe
from samq.quant.quantize import quantize
from samq.tools.bench_accuracy.method import (
    BRANCH,
    FLOAT,
    OURS,
    W4,
    W4A8,
    W8A8,
    Made,
    Method,
    Subject,
    bits_per_weight,
    layers_to_quantize,
)

Changes = Mapping[str, Mapping[str, Any]]
"""Section of a recipe → keys that differ."""

OFF = {"enabled": False}
PLAIN: Changes = {"shift": OFF, "smooth": OFF}
ROUNDED: Changes = {"wgts": {"kernel_gptq": None}}
GPTQ: Changes = {"wgts": {"kernel_gptq": {}}}
MSE: Changes = {"wgts": {"scales": {"method": "mse"}, "bias_correction": False}}
P3_BIAS: Changes = {"wgts": {"scales": {"method": "p_norm", "p": 3.0}, "bias_correction": True}}
UNCLIPPED: Changes = {"wgts": {"scales": {"method": "max", "weighted": False}}}
MULTIPLIED: Changes = {"smooth": {"multiply": True}}
DECODER: Changes = {"wgts": {"skip_decoder": False}}


def with_changes(preset: str, changes: Changes) -> Recipe:
    """A preset in which some keys differ, those of sections within sections too."""
    return Recipe.model_validate(_merged(load_recipe(preset).model_dump(), changes))


def _merged(values: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(values)
    for key, change in changes.items():
        inner = values.get(key)
        merged[key] = _merged(inner, change) if isinstance(inner, dict) and isinstance(change, Mapping) else change
    return merged


def form_of(recipe: Recipe) -> str:
    """The form of a recipe's layers, those with rules of their own apart.

    Raises:
        UsageError: the table has no such form.
    """
    if recipe.weight_only and recipe.wgts.bits == 4:
        return W4
    if recipe.weight_only:
        raise UsageError("8-bit weights with float activations have no place in the table; give another --config")
    if recipe.wgts.bits == 8:
        return W8A8
    return W4A8 if recipe.wgts.low_rank is None else BRANCH


def inputs_of(recipe: Recipe) -> str:
    """How activations are quantized."""
    if recipe.ipts is None:
        return FLOAT
    return f"{recipe.ipts.mode}, {recipe.ipts.granularity.replace('_', ' ')}"


def method_of(key: str, title: str, recipe: Recipe) -> Method:
    """The row of a recipe."""

    def make(subject: Subject) -> Made:
        torch.manual_seed(0)
        result = quantize(subject.model, recipe, subject.pixels if recipe.needs_calibration else None)
        usual = {plan.name for plan in layers_to_quantize(subject.model)}
        plans = [plan for plan in result.plans if plan.skip is None or plan.name in usual]
        stored = sum(codes.stored_bytes() for codes in result.codes.values())
        stored += sum(plan.fp16_bytes for plan in plans if plan.skip is not None)
        return Made(result.model, bits_per_weight(plans, 8 * stored))

    return Method(key, title, form_of(recipe), OURS, make, inputs_of(recipe), recipe=recipe.to_yaml())


def config_method(path: str) -> Method:
    """The row of a config file, e.g. of `search/best.yaml`.

    Raises:
        UsageError: it is no config, or of a form that the table does not have.
    """
    recipe, name = load_recipe(path), Path(path).stem
    return method_of(f"config:{name}", f"`{name}`", recipe)


_ROWS: tuple[tuple[str, str, str, Changes], ...] = (
    ("w4a8", "`int4_w4a8`: GPTQ, shift, SmoothQuant", "int4_w4a8", {}),
    ("svdquant", "`int4_svdquant`", "int4_svdquant", {}),
    ("w4only", "`int4_w4only`: GPTQ, shift, smoothing", "int4_w4only", {}),
    ("w8a8", "`int8_w8a8`: shift, SmoothQuant", "int8_w8a8", {}),
    ("w4a8-rtn", "`int4_w4a8_rtn`: round to nearest", "int4_w4a8_rtn", {}),
    ("w4a8-gptq", "GPTQ alone", "int4_w4a8", PLAIN),
    ("w4a8-smooth", "shift and SmoothQuant alone", "int4_w4a8", ROUNDED),
    ("w4a8-rotation", "`int4_w4a8` with rotation", "int4_w4a8", {"rotation": {"enabled": True}}),
    (
        "w4a8-token",
        "`int4_w4a8` with a scale for each token",
        "int4_w4a8",
        {"ipts": {"granularity": "per_token", "mode": "dynamic"}},
    ),
    ("w4a8-asymmetric", "`int4_w4a8` with zero-points for inputs", "int4_w4a8", {"ipts": {"dtype": "uint8"}}),
    ("w4a8-sequential", "`int4_w4a8`, sequential", "int4_w4a8", {"calib": {"mode": "sequential"}}),
    (
        "w4a8-rotation-alone",
        "rotation alone, of values and residual streams, and GPTQ",
        "int4_w4a8",
        {**PLAIN, "rotation": {"enabled": True, "residual": True}},
    ),
    (
        "svdquant-compensate",
        "`int4_svdquant` with `compensate`",
        "int4_svdquant",
        {"wgts": {"low_rank": {"compensate": True}}},
    ),
    (
        "svdquant-plain",
        "`int4_svdquant` with plain SVD",
        "int4_svdquant",
        {"wgts": {"low_rank": {"weighting": "none"}}},
    ),
    ("w4a8-mse", "`int4_w4a8`, clipped by MSE, biases as they are", "int4_w4a8", MSE),
    (
        "w4a8-alpha",
        "`int4_w4a8`, alpha searched",
        "int4_w4a8",
        {"smooth": {"alpha": "auto"}},
    ),
    ("w4a8-decoder", "`int4_w4a8`, mask decoder too", "int4_w4a8", DECODER),
    (
        "svdquant-flops",
        "`int4_svdquant`, ranks by FLOPs",
        "int4_svdquant",
        {"wgts": {"low_rank": {"budget": "flops"}}},
    ),
    ("svdquant-p3", "`int4_svdquant`, clipped by p = 3, biases corrected", "int4_svdquant", P3_BIAS),
    (
        "svdquant-32",
        "rank 32 at most in each layer, plain SVD",
        "int4_svdquant",
        {"wgts": {"low_rank": {"rank": 32, "weighting": "none"}}},
    ),
    ("w4only-rtn", "`int4_w4only_rtn`: round to nearest", "int4_w4only_rtn", {}),
    ("w4only-sym", "`int4_w4only_sym`: without zero-points", "int4_w4only_sym", {}),
    ("w4only-gptq", "GPTQ alone", "int4_w4only", PLAIN),
    ("w4only-gptq-max", "GPTQ alone, unclipped", "int4_w4only", {**PLAIN, **UNCLIPPED}),
    ("w4only-max", "`int4_w4only`, unclipped", "int4_w4only", UNCLIPPED),
    ("w4only-p3", "`int4_w4only`, clipped by p = 3, biases corrected", "int4_w4only", P3_BIAS),
    ("w4only-smooth", "shift and smoothing alone", "int4_w4only", ROUNDED),
    ("w4only-rotation", "`int4_w4only` with rotation", "int4_w4only", {"rotation": {"enabled": True}}),
    ("w8a8-rtn", "round to nearest", "int8_w8a8", PLAIN),
    ("w8a8-gptq", "GPTQ alone", "int8_w8a8", {**PLAIN, **GPTQ}),
    ("w8a8-smooth-gptq", "`int8_w8a8` with GPTQ", "int8_w8a8", GPTQ),
    ("w8a8-multiply", "`int8_w8a8`, inputs multiplied where nothing absorbs", "int8_w8a8", MULTIPLIED),
    (
        "w8a8-multiply-max",
        "`int8_w8a8`, inputs multiplied, nothing clipped",
        "int8_w8a8",
        {**MULTIPLIED, **UNCLIPPED, "ipts": {"calibrator": "max"}},
    ),
    ("w8a8-decoder", "`int8_w8a8`, mask decoder too", "int8_w8a8", DECODER),
    ("w8a8-rotation", "`int8_w8a8` with rotation", "int8_w8a8", {"rotation": {"enabled": True}}),
)

METHODS = tuple(method_of(key, title, with_changes(preset, changes)) for key, title, preset, changes in _ROWS)
