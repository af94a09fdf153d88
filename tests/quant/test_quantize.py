"""The runner on the small model: every preset, and every way in which it refuses."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_model import outputs, pixels, recipe_of, relative
from torch import Tensor, nn
from transformers import Sam2Model

import samq.quant.quantize as runner
from samq.calib.checkpoint import load_checkpoint
from samq.calib.parts import IMAGE_ENCODER, MASK_DECODER, ImageEncoder
from samq.calib.sources import open_source
from samq.calib.statistics import InputStatistics
from samq.errors import BadInput, UsageError
from samq.quant.config import Recipe, load_recipe, preset_names
from samq.quant.inputs import input_grid
from samq.quant.layers import QuantizedLinear
from samq.quant.passes import (
    Pass,
    Quantize,
    RotateInputs,
    RotateStreams,
    RotateValues,
    Smooth,
    Work,
    passes_for,
)
from samq.quant.plan import make_plan
from samq.quant.quantize import quantize
from samq.quant.sites import linear_at
from samq.tools.demo.dataset import CHECKPOINT, IMAGES
from samq.tools.demo.hostile import make_hostile

LOOSE = {  # relative error of the image embedding that a format may cost on random weights
    "int4_w4a8": 0.12,
    "int4_svdquant": 0.12,
    "int4_w4only": 0.12,
    "int4_w4a8_rtn": 0.35,
    "int4_w4only_rtn": 0.35,
    "int4_w4only_sym": 0.12,
    "int8_w8a8": 0.04,
}


def images(count: int = 2) -> Iterator[Tensor]:
    return (pixels(2, seed) for seed in range(count))


def state_of(model: Sam2Model) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("preset", preset_names())
@pytest.mark.parametrize("skip_decoder", [True, False])
def test_presets(small_model: Sam2Model, preset: str, skip_decoder: bool) -> None:
    recipe = recipe_of(preset, wgts={"skip_decoder": skip_decoder})
    before, hooks, ticks = state_of(small_model), count_hooks(small_model), []
    result = quantize(small_model, recipe, images(), tick=ticks.append)

    after = state_of(small_model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before), "the input model changed"
    assert count_hooks(small_model) == hooks == count_hooks(result.model) == 0

    chosen = [plan.name for plan in result.plans if plan.skip is None]
    assert list(result.codes) == chosen
    assert any(name.startswith("mask_decoder") for name in chosen) == (not skip_decoder)
    assert [name for name, m in result.model.named_modules() if isinstance(m, QuantizedLinear)] == chosen
    assert ticks == ["calibrate"] * (2 if recipe.needs_calibration else 0) + chosen
    for plan in result.plans:
        if plan.skip is None:
            assert result.codes[plan.name].stored_bytes() == plan.planned_bytes
    for new, old in zip(outputs(result.model), outputs(small_model), strict=True):
        assert torch.isfinite(new).all()
        assert not torch.equal(new, old)
    assert relative(outputs(result.model)[0] - outputs(small_model)[0], outputs(small_model)[0]) < LOOSE[preset]
    assert not result.model.training


def count_hooks(model: Sam2Model) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


@pytest.mark.parametrize("preset", ["int4_w4a8", "int4_w4a8_rtn"])
@pytest.mark.parametrize("rotate", [False, True])
def test_it_is_deterministic(small_model: Sam2Model, preset: str, rotate: bool) -> None:
    recipe = recipe_of(preset, rotation={"enabled": rotate}, wgts={"skip_decoder": rotate})
    torch.manual_seed(1)
    first = quantize(small_model, recipe, images())
    torch.manual_seed(2)
    second = quantize(small_model, recipe, images())
    assert list(first.notes) == list(second.notes)
    assert first.notes == second.notes
    assert all(torch.equal(a, b) for a, b in zip(outputs(first.model), outputs(second.model), strict=True))


def test_gptq_beats_rounding_and_smoothing_keeps_it(small_model: Sam2Model) -> None:
    reference, errors = outputs(small_model)[0], {}
    for preset in ("int4_w4only", "int4_w4only_rtn", "int4_w4a8", "int4_w4a8_rtn"):
        result = outputs(quantize(small_model, load_recipe(preset), images()).model)[0]
        errors[preset] = relative(result - reference, reference)
    assert errors["int4_w4only"] < 0.7 * errors["int4_w4only_rtn"]
    assert errors["int4_w4a8"] < 0.7 * errors["int4_w4a8_rtn"]


@pytest.mark.parametrize("preset", ["int4_w4a8", "int4_w4only", "int4_svdquant", "int8_w8a8"])
@pytest.mark.parametrize("rotation", [{}, {"enabled": True}, {"enabled": True, "online": True}], ids=str)
def test_outlier_channels_cost_nothing(small_model: Sam2Model, preset: str, rotation: dict[str, bool]) -> None:
    """Shifting and smoothing undo what a hostile variant of the model adds, and leave a rotation nothing to spread."""
    recipe = recipe_of(preset, rotation=rotation, wgts={"skip_decoder": True})
    reference = outputs(small_model)[0]
    errors = [
        relative(outputs(quantize(model, recipe, images()).model)[0] - reference, reference)
        for model in (small_model, make_hostile(small_model))
    ]
    assert errors[1] < 1.05 * errors[0]


SEQUENTIAL = {"mode": "sequential"}


@pytest.mark.parametrize("preset", ["int4_w4a8", "int4_svdquant", "int8_w8a8", "int4_w4a8_rtn"])
@pytest.mark.parametrize("skip_decoder", [True, False])
def test_in_sequence_every_block_sees_the_quantized_ones_before_it(
    small_model: Sam2Model, preset: str, skip_decoder: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "passes_for", lambda recipe: passes_for(recipe)[:-1])  # the rest stays as it was seen
    wgts: dict[str, Any] = {"skip_decoder": skip_decoder, "bias_correction": False}
    if preset == "int4_svdquant":  # ranks that are chosen together depend on the inputs of all layers
        wgts["low_rank"] = {"rank": 8, "weighting": "full"}
    plain = quantize(small_model, recipe_of(preset, wgts=wgts), images())
    ticks: list[str] = []
    result = quantize(small_model, recipe_of(preset, wgts=wgts, calib=SEQUENTIAL), images(), tick=ticks.append)
    assert list(result.codes) == list(plain.codes)
    assert sorted(ticks) == sorted(["calibrate"] * 2 + list(result.codes))
    changed = []
    for name, codes in result.codes.items():
        other = plain.codes[name]
        same = codes.inputs == other.inputs and torch.equal(codes.effective_weight(), other.effective_weight())
        assert same or "blocks.0." not in name, name
        changed += [] if same else [name]
    assert len(changed) > 0.7 * len(result.codes)
    # The first block is as in one pass; the grid of the last block's inputs is that of the quantized model's.
    name = "vision_encoder.backbone.blocks.4.attn.qkv"
    layer, entry = result.model.get_submodule(name), InputStatistics.empty(96, False, torch.device("cpu"))
    handle = layer.register_forward_pre_hook(lambda _, args: entry.add(args[0]))
    with torch.no_grad():
        for batch in images():
            ImageEncoder(result.model)(batch)
    handle.remove()
    twin = copy.deepcopy(small_model)
    result.folds.apply(twin)
    expected = input_grid(recipe_of(preset).ipts, linear_at(twin, name).weight.detach(), entry)
    assert result.codes[name].inputs == expected


def test_in_sequence_hooks_and_files_are_gone_when_a_batch_fails(
    small_model: Sam2Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def batches() -> Iterator[Tensor]:
        yield pixels(1)
        assert list(tmp_path.rglob("*.pt")), "nothing was spilled, so nothing is tested"
        raise OSError("the disk went away")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(runner, "CPU_BUDGET", 0)
    with pytest.raises(OSError, match="the disk went away"):
        quantize(small_model, recipe_of(calib=SEQUENTIAL), batches())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("measure", [True, False])
def test_in_sequence_without_a_need_for_images(small_model: Sam2Model, measure: bool) -> None:
    recipe = recipe_of("int4_w4only_rtn", calib=SEQUENTIAL)
    result = quantize(small_model, recipe, images() if measure else None, measure=measure)
    plain = quantize(small_model, recipe_of("int4_w4only_rtn"), None)
    assert all(torch.equal(a, b) for a, b in zip(outputs(result.model), outputs(plain.model), strict=True))
    assert all((note.output_error is not None) == measure for note in result.notes.values())


def test_rounding_weights_needs_no_images(small_model: Sam2Model) -> None:
    without = quantize(small_model, load_recipe("int4_w4only_rtn"), None)
    with_images = quantize(small_model, load_recipe("int4_w4only_rtn"), images())
    assert all(torch.equal(a, b) for a, b in zip(outputs(without.model), outputs(with_images.model), strict=True))


@pytest.mark.parametrize("preset", sorted(set(preset_names()) - {"int4_w4only_rtn"}))
def test_the_others_ask_for_images(small_model: Sam2Model, preset: str) -> None:
    with pytest.raises(UsageError, match="--calib-data"):
        quantize(small_model, load_recipe(preset), None)


@pytest.mark.parametrize("part", [IMAGE_ENCODER, MASK_DECODER])
def test_one_part_only(small_model: Sam2Model, part: str) -> None:
    result = quantize(small_model, recipe_of("int4_w4a8"), images(1), parts=[part])
    assert {plan.part for plan in result.plans if plan.skip is None} == {part}
    assert all(name.startswith("mask_decoder.") == (part == MASK_DECODER) for name in result.codes)


def test_nothing_to_quantize(small_model: Sam2Model) -> None:
    with pytest.raises(UsageError, match="no layer to quantize"):
        quantize(small_model, recipe_of(wgts={"skip_decoder": True}), images(), parts=[MASK_DECODER])


def run_with(monkeypatch: pytest.MonkeyPatch, model: Sam2Model, *passes: Pass, recipe: Recipe | None = None) -> None:
    recipe = recipe_of("int4_w4only_rtn") if recipe is None else recipe
    monkeypatch.setattr(runner, "passes_for", lambda _: list(passes))
    quantize(model, recipe, images(1))


class Idle(Pass):
    exact = True

    def apply(self, work: Work) -> list[str]:
        return []


class Lying(Pass):
    """Says that it is exact, and scales one weight."""

    exact = True

    def __init__(self, layer: str, factor: float) -> None:
        self.layer, self.factor = layer, factor

    def apply(self, work: Work) -> list[str]:
        with torch.no_grad():
            work.model.get_parameter(f"{self.layer}.weight").mul_(self.factor)
        return [self.layer]


def test_a_pass_that_matches_no_layer_is_refused(small_model: Sam2Model, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="Idle found no layer to work on"):
        run_with(monkeypatch, small_model, Idle())


@pytest.mark.parametrize(
    ("layer", "part"),
    [
        ("vision_encoder.backbone.blocks.1.mlp.proj_in", "encoder"),
        ("mask_decoder.transformer.layers.1.mlp.proj_out", "decoder"),
    ],
)
@pytest.mark.parametrize("factor", [1.5, torch.nan])
def test_a_pass_that_lies_is_caught(
    small_model: Sam2Model, monkeypatch: pytest.MonkeyPatch, layer: str, part: str, factor: float
) -> None:
    with pytest.raises(RuntimeError, match=f"Lying declares itself exact, but changed the {part}"):
        run_with(monkeypatch, small_model, Lying(layer, factor))
    run_with(monkeypatch, small_model, Lying(layer, 1.0), Quantize(recipe_of("int4_w4only_rtn")))


DRIFTING = "vision_encoder.backbone.blocks.1.mlp.proj_in"


def drifting(model: Sam2Model, step: Pass, change: float) -> Pass:
    """A pass that also scales one weight, which changes the embedding of the probe by so much."""
    scaled = copy.deepcopy(model)
    Lying(DRIFTING, 1.01).apply(Work(scaled, recipe_of(), {}, {}))
    before, after = (runner._probe(each)[0] for each in (model, scaled))
    drift, apply = Lying(DRIFTING, 1 + 0.01 * change / relative(after - before, before)), step.apply
    step.apply = lambda work: apply(work) + drift.apply(work)  # type: ignore[method-assign]
    return step


def test_a_rotation_is_held_to_less_than_other_exact_passes(
    small_model: Sam2Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All are let through with 3e-5 of the embedding, rotations alone are refused with 3e-4."""
    for step in (Smooth(0.5), RotateValues(), RotateStreams(), RotateInputs()):
        run_with(monkeypatch, small_model, drifting(small_model, step, 3e-5), recipe=recipe_of())
    run_with(monkeypatch, small_model, drifting(small_model, Smooth(0.5), 3e-4), recipe=recipe_of())
    for step in (RotateValues(), RotateStreams(), RotateInputs()):
        told = rf"{type(step).__name__} declares itself exact, but changed the encoder's output by (2\.9|3\.0).e-04"
        with pytest.raises(RuntimeError, match=told):
            run_with(monkeypatch, small_model, drifting(small_model, step, 3e-4), recipe=recipe_of())


@pytest.mark.parametrize(
    "step", [RotateValues(), RotateStreams(), RotateInputs()], ids=["values", "residual", "inputs"]
)
def test_a_rotation_leaves_the_embedding_of_the_demo_model(step: Pass) -> None:
    """‖E' − E‖ / ‖E‖ < 1e-4 on one of its images."""
    checkpoint = load_checkpoint(str(CHECKPOINT))
    pixel_values = torch.from_numpy(checkpoint.processor(open_source(IMAGES)[0].image).pixel_values)[None]
    plans = {plan.name: plan for plan in make_plan(checkpoint.model, recipe_of()) if plan.skip is None}
    work = Work(copy.deepcopy(checkpoint.model), recipe_of(), plans, {})
    assert step.tolerance == 1e-4
    touched = step.apply(work)
    for name in touched:
        assert not torch.equal(linear_at(work.model, name).weight, linear_at(checkpoint.model, name).weight)
    with torch.no_grad():
        after, before = (ImageEncoder(model)(pixel_values)[0] for model in (work.model, checkpoint.model))
    assert relative(after - before, before) < step.tolerance


def test_convolutions_are_probed_without_tf32(small_model: Sam2Model) -> None:
    """Its rounding changes with the basis, by more than a rotation may."""
    seen, model = [], copy.deepcopy(small_model)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(lambda *_: seen.append(torch.backends.cudnn.allow_tf32))
    before = torch.backends.cudnn.allow_tf32
    runner._probe(model)
    assert seen
    assert not any(seen)
    assert torch.backends.cudnn.allow_tf32 == before


def test_exact_passes_are_let_through(small_model: Sam2Model, monkeypatch: pytest.MonkeyPatch) -> None:
    run_with(monkeypatch, small_model, RotateValues(), Smooth(0.5), Smooth(0.9), RotateValues(), recipe=recipe_of())


class Remember(Pass):
    """Changes nothing, and keeps the model that it was given."""

    exact = True
    model: Sam2Model

    def apply(self, work: Work) -> list[str]:
        self.model = work.model
        return list(work.plans)


def test_hooks_are_gone_when_a_batch_fails(small_model: Sam2Model, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, counts = Remember(), []

    def batches() -> Iterator[Tensor]:
        yield pixels(1)
        counts.append(count_hooks(seen.model))
        raise OSError("the disk went away")

    monkeypatch.setattr(runner, "passes_for", lambda recipe: [seen, *passes_for(recipe)])
    with pytest.raises(OSError, match="the disk went away"):
        quantize(small_model, recipe_of(), batches())
    assert counts == [67]  # one for each layer that is quantized, while the second batch is read
    assert count_hooks(seen.model) == count_hooks(small_model) == 0


@pytest.mark.parametrize("preset", ["int4_w4a8", "int4_w4only", "int8_w8a8"])
@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite_are_bad_input(
    small_model: Sam2Model, preset: str, rotate: bool, value: float
) -> None:
    broken = pixels(1)
    broken[0, 0, 5, 5] = value
    recipe = recipe_of(preset, rotation={"enabled": rotate})
    with pytest.raises(BadInput, match="not finite") as caught:
        quantize(small_model, recipe, [broken])
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("preset", preset_names())
@pytest.mark.parametrize("rotate", [False, True])
def test_a_broken_checkpoint_is_bad_input(small_model: Sam2Model, preset: str, rotate: bool) -> None:
    broken = copy.deepcopy(small_model)
    name = "vision_encoder.backbone.blocks.2.attn.qkv.weight"
    with torch.no_grad():
        broken.get_parameter(name)[3, 3] = torch.nan
    with pytest.raises(BadInput, match=name):
        quantize(broken, recipe_of(preset, rotation={"enabled": rotate}), images(1))


def test_no_image_is_bad_input(small_model: Sam2Model) -> None:
    with pytest.raises(BadInput, match="--calib-data"):
        quantize(small_model, recipe_of(), [])


@pytest.mark.parametrize("preset", ["int4_w4a8_rtn", "int4_w4only_rtn", "int4_w4a8"])
def test_measuring_changes_no_code(small_model: Sam2Model, preset: str) -> None:
    recipe = load_recipe(preset)
    plain, measured = (quantize(small_model, recipe, images(), measure=measure) for measure in (False, True))
    for name, codes in plain.codes.items():
        assert torch.equal(codes.effective_weight(), measured.codes[name].effective_weight()), name
        assert measured.notes[name].output_error is not None
