"""From a float model to a quantized one: calibrate, run the passes, hold each to what it declares."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from samq.calib.calibrate import calibrate
from samq.calib.parts import MASK_DECODER, PARTS, ImageEncoder
from samq.calib.statistics import InputStatistics
from samq.errors import UsageError
from samq.quant.config import Recipe
from samq.quant.layers import LayerCodes
from samq.quant.passes import HESSIAN, LayerNotes, Pass, Work, passes_for
from samq.quant.plan import LayerPlan, make_plan

EXACT_TOLERANCE = (
    1e-3  # relative, of the encoder's output; FP32 rounding through the largest Hiera stays below
)


@dataclass(frozen=True)
class Calibration:
    """Calibration images as pixel values.

    Args:
        batches: [B, 3, S, S] each, read once.
        count: number of batches to expect.
    """

    batches: Iterable[Tensor]
    count: int


@dataclass(frozen=True)
class Quantized:
    """A quantized model.

    Args:
        model: the `Sam2Model` with `QuantizedLinear` in the place of the quantized layers.
        codes: what the quantized layers store, by name.
        plans: the decision for every layer, skipped ones too.
        notes: what happened to the quantized layers.
    """

    model: nn.Module
    codes: dict[str, LayerCodes]
    plans: list[LayerPlan]
    notes: dict[str, LayerNotes]


def quantize(
    model: nn.Module,
    recipe: Recipe,
    calibration: Calibration | None,
    parts: Collection[str] = PARTS,
    tick: Callable[[str], None] = lambda _: None,
) -> Quantized:
    """Quantize a copy of `model`.

    Args:
        model: a float `Sam2Model` in eval mode; not changed.
        recipe: formats and methods.
        calibration: images; may be None for a recipe that needs none.
        parts: the parts whose layers are quantized.
        tick: called with "calibrate" after each batch and with a layer's name after each layer.

    Raises:
        UsageError: the recipe needs calibration images and there are none, or a pass matched no layer.
        BadInput: calibration met values that are not finite.
        RuntimeError: a pass did not keep what it declares (a bug).
    """
    plans = make_plan(model, recipe, parts)
    chosen = {plan.name: plan for plan in plans if plan.skip is None}
    if not chosen:
        raise UsageError("the config and --parts leave no layer to quantize")
    passes = passes_for(recipe)
    needs = frozenset[str]().union(*(step.needs for step in passes))
    if needs and calibration is None:
        raise UsageError("this config needs calibration images; give a folder as --calib-data")
    work = Work(copy.deepcopy(model), recipe, chosen, {}, tick=tick)
    for step in passes:
        if step.needs and not work.statistics and calibration is not None:
            work.statistics = _gather(work, calibration, HESSIAN in needs)
        _run(step, work)
    return Quantized(work.model, work.codes, plans, work.notes)


def _gather(work: Work, calibration: Calibration, with_hessian: bool) -> dict[str, InputStatistics]:
    layers = {name: work.model.get_submodule(name) for name in work.plans}
    with_decoder = any(plan.part == MASK_DECODER for plan in work.plans.values())
    return calibrate(
        work.model, layers, calibration.batches, calibration.count, with_hessian, with_decoder, work.tick  # type: ignore[arg-type]
    )  # fmt: skip


def _run(step: Pass, work: Work) -> None:
    name = type(step).__name__
    probe = _probe(work.model) if step.exact else None
    touched = step.apply(work)
    if not touched:
        raise UsageError(f"{name} found no layer to work on in this model; disable it in the config")
    if probe is None:
        return
    now = _probe(work.model)
    change = float((now - probe).norm() / probe.norm())
    if not change <= EXACT_TOLERANCE:
        raise RuntimeError(f"{name} declares itself exact, but changed the encoder's output by {change:.2e}")


@torch.no_grad()
def _probe(model: nn.Module) -> Tensor:
    """The encoder's embedding of fixed noise, [1, C, h, w]."""
    size = model.config.vision_config.backbone_config.image_size[0]
    noise = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    embeddings: Tensor = ImageEncoder(model)(noise.to(next(model.parameters()).device))[0]
    return embeddings
