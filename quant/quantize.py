"""From a float model to a quantized one: calibrate, run the passes, hold each to what it declares."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import Sam2Model

from samq.calib.block_walk import BlockWalk
from samq.calib.calibrate import calibrate, histograms
from samq.calib.float32 import without_tf32
from samq.calib.parts import MASK_DECODER, PARTS, ImageEncoder, MaskDecoder
from samq.calib.prompts import clicks, grid
from samq.calib.spool import CPU_BUDGET, Spool
from samq.calib.statistics import InputStatistics
from samq.errors import BadInput, UsageError
from samq.quant.config import Recipe
from samq.quant.folds import Folds
from samq.quant.layers import LayerCodes
from samq.quant.passes import HESSIAN, HISTOGRAM, IMAGES, LayerNotes, Pass, Quantize, Work, passes_for
from samq.quant.plan import LayerPlan, make_plan, require_layers
from samq.quant.sites import linear_at


@dataclass(frozen=True)
class Quantized:
    """A quantized model.

    Args:
        model: the `Sam2Model` with `QuantizedLinear` in the place of the quantized layers.
        codes: what the quantized layers store, by name.
        plans: the decision for every layer, skipped ones too.
        notes: what happened to the quantized layers.
        folds: the exact changes of basis that the model has, and the float one has not.
    """

    model: Sam2Model
    codes: dict[str, LayerCodes]
    plans: list[LayerPlan]
    notes: dict[str, LayerNotes]
    folds: Folds


def quantize(
    model: Sam2Model,
    recipe: Recipe,
    calibration: Iterable[Tensor] | None,
    parts: Collection[str] = PARTS,
    tick: Callable[[str], None] = lambda _: None,
    measure: bool = False,
) -> Quantized:
    """Quantize a copy of `model`.

    Args:
        model: a float `Sam2Model` in eval mode; not changed.
        recipe: formats and methods.
        calibration: pixel values [B, 3, S, S], read once; may be None for a recipe that needs no images.
        parts: the parts whose layers are quantized.
        tick: called with "calibrate" after each batch and with a layer's name after each layer.
        measure: gather Hessians even when no pass needs them, so that every layer's output error is known;
            ModelOpt's layers tell none.

    Raises:
        UsageError: the recipe needs calibration images and there are none, or a pass matched no layer.
        BadInput: the model or what calibration met is not finite.
        RuntimeError: a pass did not keep what it declares (a bug).
    """
    plans = make_plan(model, recipe, parts)
    require_layers(plans)
    chosen = {plan.name: plan for plan in plans if plan.skip is None}
    passes = passes_for(recipe)
    needs = frozenset[str]({HESSIAN} if measure else ()).union(*(step.needs for step in passes))
    if needs and calibration is None:
        raise UsageError("this config needs calibration images; give a folder as --calib-data")
    for name, tensor in model.state_dict().items():
        if not bool(torch.isfinite(tensor).all()):
            raise BadInput(f"{name} holds values that are not finite; check the checkpoint")
    work = Work(copy.deepcopy(model), recipe, chosen, {}, tick=tick)
    with_hessian, in_sequence = HESSIAN in needs, recipe.calib.mode == "sequential"
    with Spool(CPU_BUDGET) as pixels:
        if IMAGES in needs and calibration is not None:
            for batch in calibration:
                pixels.append(batch)
                tick("calibrate")
            work.images, calibration = pixels, None
        if needs and calibration is not None and (in_sequence or HISTOGRAM in needs):
            calibration = _kept(calibration, pixels)
        if needs and calibration is not None and in_sequence:
            work.walk = BlockWalk(work.model, pixels, with_hessian, HISTOGRAM in needs)
            with_hessian = any(HESSIAN in step.needs for step in passes if not isinstance(step, Quantize))
        for step in passes:
            looks = step.needs or not step.exact  # what changes nothing and asks for nothing comes before calibration
            if needs and looks and not work.statistics and calibration is not None:
                work.statistics = _gather(work, calibration, with_hessian, HISTOGRAM in step.needs)
            if HISTOGRAM in step.needs and work.walk is None:
                _count_again(work, pixels)
            _run(step, work)
    decided = [work.plans.get(plan.name, plan) for plan in plans]
    return Quantized(work.model, work.codes, decided, work.notes, work.folds)


def _kept(batches: Iterable[Tensor], pixels: Spool) -> Iterator[Tensor]:
    """The batches, each of which is kept as it passes."""
    for batch in batches:
        pixels.append(batch)
        yield batch


def _gather(
    work: Work, calibration: Iterable[Tensor], with_hessian: bool, with_histogram: bool
) -> dict[str, InputStatistics]:
    layers, with_decoder = _observed(work)
    return calibrate(work.model, layers, calibration, with_hessian, with_decoder, work.tick, with_histogram)


def _count_again(work: Work, pixels: Iterable[Tensor]) -> None:
    """Run the images once more where what was folded since they first ran has made histograms invalid."""
    if all(entry.histogram is not None for entry in work.statistics.values()):
        return
    layers, with_decoder = _observed(work)
    for name, histogram in histograms(work.model, layers, pixels, with_decoder).items():
        work.statistics[name].histogram = histogram


def _observed(work: Work) -> tuple[dict[str, nn.Linear], bool]:
    """The layers to be quantized, and whether one of them is the decoder's."""
    layers = {name: linear_at(work.model, name) for name in work.plans}
    return layers, any(plan.part == MASK_DECODER for plan in work.plans.values())


def _run(step: Pass, work: Work) -> None:
    name = type(step).__name__
    probe = _probe(work.model) if step.exact else None
    touched = step.apply(work)
    if not touched:
        raise UsageError(f"{name} found no layer to work on in this model; disable it in the config")
    if probe is None:
        return
    for output, before, after in zip(("encoder", "decoder"), probe, _probe(work.model), strict=True):
        change = float((after - before).norm() / before.norm())
        if not change <= step.tolerance:
            raise RuntimeError(f"{name} declares itself exact, but changed the {output}'s output by {change:.2e}")


@torch.no_grad()
@without_tf32()
def _probe(model: Sam2Model) -> tuple[Tensor, Tensor]:
    """The encoder's embedding [1, C, h, w] of fixed noise, and the decoder's masks [1, 1, M, 4h, 4w] at its middle.

    Without TF32, whose rounding is another one in another basis: on a GPU, convolutions would differ by more than a
    rotation may (5e-4 with operands rounded so on a CPU).
    """
    size = model.prompt_encoder.input_image_size
    assert isinstance(size, int)
    device = next(model.parameters()).device
    noise = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    features = ImageEncoder(model)(noise.to(device))
    middle = clicks(grid(size, 1))
    coords, labels = (torch.from_numpy(array)[None].to(device) for array in (middle.coords, middle.labels))
    no_mask = torch.zeros(1, 1, 1, *features[1].shape[-2:], device=device)
    masks = MaskDecoder(model)(*features, coords, labels, no_mask, torch.zeros(1, 1, device=device))[0]
    return features[0], masks[:, :, 1:]  # without the answer that jumps to another mask when it is unstable
