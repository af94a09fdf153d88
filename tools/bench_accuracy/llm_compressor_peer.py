"""llm-compressor's rows: its GPTQ on samq's layers, behind its SmoothQuant where the title says so.

Its pipeline for GPTQ, `sequential`, cannot trace SAM2, which a row shows; the others run its `basic` one, which gathers
what GPTQ needs from the float model, as samq's presets do. Modifiers run one after the other, each by its own call.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Sam2Model

from samq.quant.plan import LayerPlan
from samq.quant.sites import fold_sites
from samq.tools.bench_accuracy.method import (
    FLOAT,
    PEER_SCALE_BITS,
    STATIC,
    TOKEN,
    W4,
    W4A8,
    W8A8,
    Made,
    Method,
    Subject,
    bits_per_weight,
    group_of,
    layers_to_quantize,
)

PACKAGE = "llmcompressor"
NO_PROCESSOR = "it insists on one, and images are processed already"

Settings = Mapping[str, Any]

INPUTS: Mapping[str, Settings | None] = {
    STATIC: {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False},
    TOKEN: {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True},
    FLOAT: None,
}


@dataclass(frozen=True)
class Setup:
    """What llm-compressor is asked for.

    Args:
        inputs: one of `INPUTS`; a scheme has its own.
        form: decides the groups of 4-bit weights, None with a scheme.
        scheme: name of a shipped scheme.
        symmetric: weights without zero-points.
        alpha: strength of SmoothQuant, which comes first, on the inputs that come from a LayerNorm; None for none.
        pipeline: how images go through the model.
    """

    inputs: str
    form: str | None = None
    scheme: str | None = None
    symmetric: bool = True
    alpha: float | None = None
    pipeline: str = "basic"


def _run(subject: Subject, setup: Setup) -> Made:
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    model, plans = copy.deepcopy(subject.model), layers_to_quantize(subject.model)
    names = {plan.name for plan in plans}
    left_out = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in names]
    if setup.alpha is not None:
        smoothing = SmoothQuantModifier(smoothing_strength=setup.alpha, mappings=_mappings(model))
        _apply(model, smoothing, subject.pixels, setup.pipeline)
    if setup.form is None:
        rounding = GPTQModifier(targets="Linear", scheme=setup.scheme, ignore=left_out)
    else:
        rounding = GPTQModifier(config_groups=_config_groups(plans, setup.form, setup))
    _apply(model, rounding, subject.pixels, setup.pipeline)
    return Made(model, bits_per_weight(plans, sum(_stored_bits(model, plan) for plan in plans)))


def _apply(model: Sam2Model, modifier: Any, pixels: Sequence[Tensor], pipeline: str) -> None:
    from llmcompressor import oneshot

    images: Any = DataLoader(list(pixels), batch_size=None, collate_fn=_as_arguments)  # type: ignore[arg-type]
    oneshot(
        model=model,
        dataset=images,
        recipe=[modifier],
        processor=lambda: NO_PROCESSOR,
        num_calibration_samples=len(pixels),
        shuffle_calibration_samples=False,
        pipeline=pipeline,
    )


def _as_arguments(pixels: Tensor) -> dict[str, Tensor]:
    return {"pixel_values": pixels}


def _mappings(model: Sam2Model) -> list[tuple[list[str], str]]:
    """(layers, the LayerNorm whose outputs they read)."""
    sites = [site for site in fold_sites(model) if isinstance(site.source_in(model), nn.LayerNorm)]
    return [(list(site.layers), site.source) for site in sites]


def _config_groups(plans: Sequence[LayerPlan], form: str, setup: Setup) -> dict[str, dict[str, Any]]:
    """A group of layers for each group size that occurs."""
    of_size: dict[int, list[str]] = defaultdict(list)
    for plan in plans:
        of_size[group_of(plan, form)].append(plan.name)
    weights = {"num_bits": 4, "type": "int", "symmetric": setup.symmetric, "strategy": "group"}
    return {
        f"groups_of_{size}": {
            "targets": names,
            "weights": weights | {"group_size": size},
            "input_activations": INPUTS[setup.inputs],
        }
        for size, names in of_size.items()
    }


def _stored_bits(model: Sam2Model, plan: LayerPlan) -> float:
    """Bits of codes, scales and zero-points.

    Raises:
        RuntimeError: llm-compressor did not quantize the layer.
    """
    layer: Any = model.get_submodule(plan.name)
    if getattr(layer, "weight_scale", None) is None:
        raise RuntimeError(f"{plan.name} was left in floating point")
    weights = layer.quantization_scheme.weights
    of_a_group = PEER_SCALE_BITS + (0 if weights.symmetric else weights.num_bits)
    return float(weights.num_bits * plan.in_features * plan.out_features + of_a_group * layer.weight_scale.numel())


def _method(key: str, title: str, form: str, setup: Setup, against: str | None = None) -> Method:
    make = partial(_run, setup=setup)
    return Method(f"llmcompressor-{key}", f"llm-compressor {title}", form, PACKAGE, make, setup.inputs, against)


METHODS = (
    _method("w4a8", "GPTQ", W4A8, Setup(STATIC, W4A8)),
    _method("w4a8-smooth", "SmoothQuant, GPTQ", W4A8, Setup(STATIC, W4A8, alpha=0.5)),
    _method("w4-asym", "GPTQ, zero-points", W4, Setup(FLOAT, W4, symmetric=False)),
    _method("w4a16", "GPTQ, scheme `W4A16`", W4, Setup(FLOAT, scheme="W4A16")),
    _method("w4a8-scheme", "GPTQ, scheme `W4A8`", W4A8, Setup(TOKEN, scheme="W4A8"), "w4a8-token"),
    _method("sequential", "GPTQ, `sequential`", W4A8, Setup(STATIC, W4A8, pipeline="sequential")),
    _method("w4", "GPTQ", W4, Setup(FLOAT, W4)),
    _method("w4a8-token", "GPTQ", W4A8, Setup(TOKEN, W4A8), "w4a8-token"),
    _method("w8a8", "GPTQ, scheme `W8A8`", W8A8, Setup(TOKEN, scheme="W8A8")),
    _method("w8a8-smooth", "SmoothQuant, GPTQ, `W8A8`", W8A8, Setup(TOKEN, scheme="W8A8", alpha=0.8)),
)
