"""ModelOpt as the quantizer, against what ModelOpt itself computes; refusals need no ModelOpt."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import re
import sys
import warnings
from collections.abc import Collection
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from exported import float_model, skeleton
from small_model import outputs, pixels, relative
from torch import Tensor, nn
from transformers import Sam2Model

import samq.quant.modelopt_quantizer as quantizer
from samq.calib.calibrate import run_images
from samq.calib.parts import IMAGE_ENCODER, PARTS, part_of
from samq.errors import BadInput, MachineLacks, UsageError
from samq.export.canonical import read_gemms
from samq.export.graph import constant_of, producer
from samq.export.parts import quantized_part
from samq.quant.config import Recipe
from samq.quant.layers import LayerCodes
from samq.quant.modelopt_quantizer import Decided, Format, config_for, format_of, shared_multiplier
from samq.quant.quantize import Quantized, quantize
from samq.quant.sites import fold_sites

INSTALLED = importlib.util.find_spec("modelopt") is not None
with_modelopt = pytest.mark.skipif(not INSTALLED, reason="ModelOpt is not installed (extra modelopt)")

INT8 = {"dtype": "sint8", "group_shapes": [[1, -1]]}
INT4 = {"dtype": "sint4", "group_shapes": [[1, 128]]}
CONFIGS: dict[str, dict[str, Any]] = {
    "INT8_DEFAULT_CFG": {"wgts": INT8, "ipts": {}},
    "INT8_WEIGHT_ONLY_CFG": {"wgts": INT8},
    "INT4_BLOCKWISE_WEIGHT_ONLY_CFG": {"wgts": INT4},
    "INT8_SMOOTHQUANT_CFG": {"wgts": INT8, "ipts": {}},
    "INT4_AWQ_CFG": {"wgts": INT4},
}
BATCHES = [pixels(2, seed) for seed in range(2)]


def recipe_for(name: str, **changes: Any) -> Recipe:
    """A recipe by a config of ModelOpt, which quantizes the decoder too."""
    sections = CONFIGS[name]
    wgts = {"skip_decoder": False, **sections["wgts"]}
    return Recipe.model_validate({"quantizer": "modelopt", "modelopt": name, **sections, "wgts": wgts, **changes})


@cache
def ours(name: str) -> Quantized:
    """The small model quantized through samq; not to be changed."""
    return quantize(float_model(), recipe_for(name), iter(BATCHES))


@cache
def theirs(name: str) -> Sam2Model:
    """What ModelOpt makes of the small model, all else rounded as samq does; not to be changed."""
    return quantized_by_modelopt(float_model(), name, list(ours(name).codes))


def quantized_by_modelopt(model: Sam2Model, name: str, layers: Collection[str]) -> Sam2Model:
    """ModelOpt's simulation; nothing but these layers is quantized."""
    import modelopt.torch.quantization as mtq

    config = quantizer.shipped_config(name)
    asked = {"quant_cfg": quantizer.formats_of_layers(layers, config), "algorithm": config["algorithm"]}
    copied = copy.deepcopy(model)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        mtq.quantize(copied, asked, lambda calibrated: run_images(calibrated, BATCHES, with_decoder=True))
        for key, parameter in copied.named_parameters():
            if parameter.ndim >= 2 and key.removesuffix(".weight") not in layers:
                parameter.copy_(parameter.half().float())
    return copied


def pairs(name: str) -> list[tuple[str, LayerCodes, Any]]:
    """Every quantized layer: its name, what samq holds of it, and ModelOpt's module."""
    return [(layer, codes, theirs(name).get_submodule(layer)) for layer, codes in ours(name).codes.items()]


def divisors(name: str, layer: str) -> Tensor:
    """[N, 1] by which folds divide the rows of a layer."""
    found = torch.ones(ours(name).codes[layer].weight.codes.shape[0], 1)
    for site in fold_sites(float_model()):
        if site.source == layer and layer in ours(name).folds.scales:
            found[slice(*site.rows)] = ours(name).folds.scales[layer][:, None]
    return found


def folded_multiplier(name: str, layer: str) -> Tensor | None:
    """p [K], by which something before a layer multiplies its inputs, or None."""
    scales = ours(name).folds.scales
    found = [scales[s.source] for s in fold_sites(float_model()) if layer in s.layers and s.source in scales]
    return 1 / found[0] if found else None


def spread(scale: Tensor, codes: LayerCodes) -> Tensor:
    """Scales [N, groups], each repeated for the weights of its group, [N, K]."""
    return scale.repeat_interleave(codes.weight.scales.group_size, dim=1)[:, : codes.weight.codes.shape[1]]


def their_scale(codes: LayerCodes, module: Any) -> Tensor:
    """[N, groups] in float32."""
    scale: Tensor = module.weight_quantizer.amax.reshape(codes.weight.scales.scale.shape) / codes.weight.grid.qmax
    return scale


def their_codes(codes: LayerCodes, module: Any) -> Tensor:
    """[N, K] integers, which ModelOpt's fake-quantized weights are times their scales."""
    exact: Tensor = module.weight_quantizer(module.weight) / spread(their_scale(codes, module), codes)
    torch.testing.assert_close(exact, exact.round(), rtol=0, atol=1e-3)
    return exact.round()


@with_modelopt
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_codes_and_scales_are_modelopts(name: str) -> None:
    """The codes; the scales to half a unit of FP16; and the model's answers to what that makes of them."""
    for layer, codes, module in pairs(name):
        assert torch.equal(codes.weight.codes.float(), their_codes(codes, module)), layer
        weight = module.weight_quantizer(module.weight) / divisors(name, layer)
        torch.testing.assert_close(codes.weight.dequantize(), weight, rtol=2**-11 + 1e-6, atol=0)
        assert (codes.inputs is not None) == ("ipts" in CONFIGS[name])
        if codes.inputs is not None:
            assert codes.inputs.scale == pytest.approx(float(module.input_quantizer.amax) / 127, rel=2**-11)
    found, expected, exact = (outputs(model)[0] for model in (ours(name).model, theirs(name), float_model()))
    assert relative(found - expected, expected) < (1 if "ipts" in CONFIGS[name] else 0.1) * relative(
        expected - exact, exact
    )


@with_modelopt
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_each_layer_answers_as_modelopts_does(name: str) -> None:
    """To the same inputs, by the same scales, up to float rounding.

    Inputs stand off the borders between two codes, and reach beyond the grid.
    """
    generator = torch.Generator().manual_seed(0)
    for layer, codes, untouched in pairs(name):
        module, rows = copy.deepcopy(untouched), divisors(name, layer)
        largest = codes.weight.scales.scale * rows * codes.weight.grid.qmax
        module.weight_quantizer.amax = largest.reshape(module.weight_quantizer.amax.shape)
        module.weight.copy_(codes.weight.dequantize() * rows)
        shape = (64, module.in_features)
        inputs = torch.randint(-140, 141, shape, generator=generator) + 0.8 * torch.rand(shape, generator=generator)
        inputs -= 0.4
        if codes.inputs is not None:
            assert codes.inputs.scale is not None
            module.input_quantizer.amax = torch.tensor(codes.inputs.scale * 127)
            inputs *= codes.inputs.scale
        folded, whole = folded_multiplier(name, layer), module.input_quantizer.pre_quant_scale
        raw = inputs if whole is None else inputs / whole
        found = ours(name).model.get_submodule(layer)(raw if folded is None else raw * folded)
        expected = module(raw) / rows[:, 0]
        assert relative(found - expected, expected) < 1e-5, layer


@with_modelopt
@pytest.mark.parametrize("name", ["INT8_DEFAULT_CFG", "INT8_WEIGHT_ONLY_CFG", "INT4_BLOCKWISE_WEIGHT_ONLY_CFG"])
def test_configs_without_multipliers_change_nothing_else(name: str) -> None:
    assert not ours(name).folds.scales
    assert all(codes.multiplier is None for codes in ours(name).codes.values())


@with_modelopt
@pytest.mark.parametrize("name", ["INT8_SMOOTHQUANT_CFG", "INT4_AWQ_CFG"])
def test_multipliers_stay_where_nothing_absorbs_them(name: str) -> None:
    """Behind GELU, for one; and in front of layers that read the same inputs, but were given different ones.

    SmoothQuant gives these the same ones, for with ModelOpt's alpha of 1 they depend on the inputs alone.
    """
    found = ours(name)
    sites = [site for site in fold_sites(float_model()) if not found.codes.keys().isdisjoint(site.layers)]
    read_by_two = {layer for site in sites if len(site.layers) > 1 for layer in site.layers}
    placeless = found.codes.keys() - {layer for site in sites for layer in site.layers}
    kept = {layer for layer, codes in found.codes.items() if codes.multiplier is not None}
    assert len([layer for layer in placeless if layer.endswith(".mlp.proj_out")]) == 5
    assert len(read_by_two) == 2 * 3
    assert kept == (placeless | read_by_two if name == "INT4_AWQ_CFG" else placeless)
    assert found.folds.scales.keys() == {site.source for site in sites if kept.isdisjoint(site.layers)}
    assert {found.notes[layer].remarks[-1] for layer in kept} == {
        "inputs multiplied by ModelOpt's pre_quant_scale, which nothing before this layer absorbs"
    }


@with_modelopt
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_the_file_holds_modelopts_weights(name: str) -> None:
    """Bit for bit: its codes, its scales as FP16 numbers, divided by what was folded, and its multipliers."""
    layers = {layer: (codes, module) for layer, codes, module in pairs(name)}
    for part in PARTS:
        for gemm in read_gemms(quantized_part(skeleton(part), ours(name).model, ours(name).codes)):
            codes, module = layers.pop(gemm.layer)
            scale = (their_scale(codes, module) / divisors(name, gemm.layer)).half().float()
            expected = their_codes(codes, module) * spread(scale, codes)
            np.testing.assert_array_equal(gemm.weight.dequantized(), expected.T.numpy(), err_msg=gemm.layer)
            source = gemm.node.inputs[0] if gemm.inputs is None else gemm.inputs.source
            multiplied = producer(source, "Mul")
            if codes.multiplier is not None:
                assert multiplied is not None
                whole = module.input_quantizer.pre_quant_scale
                np.testing.assert_array_equal(constant_of(multiplied.inputs[1]), whole.numpy(), err_msg=gemm.layer)
    assert not layers


def on_the_grid(model: Sam2Model, bits: int, group_size: int) -> Sam2Model:
    """The model with the largest weight of every group 127 or 7 times a power of two, so that its scale is that."""
    changed, most = copy.deepcopy(model), 2 ** (bits - 1) - 1
    for module in changed.modules():
        if isinstance(module, nn.Linear):
            size = module.in_features if group_size == -1 else group_size
            for group in module.weight.data.split(size, dim=1):
                largest, where = group.abs().max(dim=1, keepdim=True)
                scale = torch.exp2(torch.ceil(torch.log2(largest / most)))
                group.scatter_(1, where, most * scale * group.gather(1, where).sign())
    return changed


@with_modelopt
@pytest.mark.parametrize("name", ["INT8_DEFAULT_CFG", "INT8_WEIGHT_ONLY_CFG", "INT4_BLOCKWISE_WEIGHT_ONLY_CFG"])
@torch.no_grad()
def test_where_no_scale_is_rounded_the_file_holds_what_modelopt_computes(name: str) -> None:
    recipe = recipe_for(name)
    model = on_the_grid(float_model(), recipe.wgts.bits, recipe.wgts.group_size)
    result = quantize(model, recipe, iter(BATCHES))
    other = quantized_by_modelopt(model, name, list(result.codes))
    for part in PARTS:
        gemms = list(read_gemms(quantized_part(skeleton(part), result.model, result.codes)))
        assert {gemm.layer for gemm in gemms} == {layer for layer in result.codes if part_of(layer) == part}
        for gemm in gemms:
            module: Any = other.get_submodule(gemm.layer)
            expected = module.weight_quantizer(module.weight).T.numpy()
            np.testing.assert_array_equal(gemm.weight.dequantized(), expected, err_msg=gemm.layer)


@with_modelopt
def test_every_batch_and_every_layer_is_told() -> None:
    recipe, ticks = recipe_for("INT8_DEFAULT_CFG", layers={"mask_decoder.*": {"dtype": "float"}}), list[str]()
    result = quantize(float_model(), recipe, iter(BATCHES), tick=ticks.append)
    assert ticks == ["calibrate"] * 2 + list(result.codes)
    assert {part_of(layer) for layer in result.codes} == {IMAGE_ENCODER}


@with_modelopt
@pytest.mark.parametrize("name", ["INT8_DEFAULT_CFG", "INT4_AWQ_CFG"])
def test_inputs_that_overflow_are_told_of(name: str) -> None:
    model = copy.deepcopy(float_model())
    model.vision_encoder.backbone.blocks[1].mlp.proj_in.weight.data *= 1e30
    with pytest.raises(BadInput, match=r"blocks\.2\..*: its inputs are not finite on the calibration images"):
        quantize(model, recipe_for(name), iter(BATCHES))


@with_modelopt
@pytest.mark.parametrize("name", ["INT8_WEIGHT_ONLY_CFG", "INT4_AWQ_CFG"])
def test_without_an_image_there_is_no_calibration(name: str) -> None:
    with pytest.raises(BadInput, match="calibration saw no image"):
        quantize(float_model(), recipe_for(name), iter([]))


@with_modelopt
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("FP8_DEFAULT_CFG", r"has weights in floating-point formats \(num_bits \(4, 3\)\), which samq cannot express"),
        ("NVFP4_DEFAULT_CFG", "has weights with dynamic blocks or scales"),
        ("MXINT8_DEFAULT_CFG", "has weights with dynamic blocks or scales"),
        ("W4A8_AWQ_BETA_CFG", "has weights in two formats one behind the other"),
        ("FP8_KV_CFG", r"has a format for \*\[kv\]_bmm_quantizer"),
        ("INT8_SMOTHQUANT_CFG", "is no config of ModelOpt .*; did you mean INT8_SMOOTHQUANT_CFG"),
        ("deepcopy", "is no config of ModelOpt .*; did you mean "),
    ],
)
def test_configs_that_samq_cannot_express_are_refused(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=f"^modelopt: {name} {message}") as caught:
        config_for(recipe_for("INT8_DEFAULT_CFG", modelopt=name))
    assert len(str(caught.value).splitlines()) == 1


@with_modelopt
@pytest.mark.parametrize(
    ("name", "changes", "needed"),
    [
        ("INT4_AWQ_CFG", {"wgts": INT8}, "sint4, wgts.group_shapes: [[1, 128]] and ipts: null"),
        ("INT4_AWQ_CFG", {"ipts": {}}, "sint4, wgts.group_shapes: [[1, 128]] and ipts: null"),
        ("INT8_WEIGHT_ONLY_CFG", {"wgts": {"dtype": "uint8", "group_shapes": [[1, -1]]}}, "sint8, "),
        *(
            ("INT8_DEFAULT_CFG", changes, "sint8, wgts.group_shapes: [[1, -1]] and ipts: {dtype: sint8, granularity: ")
            for changes in ({"ipts": None}, {"ipts": {"mode": "dynamic"}}, {"ipts": {"dtype": "uint8"}})
        ),
    ],
)
def test_a_recipe_of_another_format_is_told_the_keys(name: str, changes: dict[str, Any], needed: str) -> None:
    with pytest.raises(UsageError, match=re.escape(f"modelopt: {name} needs wgts.dtype: {needed}")):
        config_for(recipe_for(name, **changes))


def test_without_modelopt_the_command_that_installs_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, quantizer.PACKAGE, None)
    with pytest.raises(MachineLacks, match=r'pip install "samq\[modelopt\]"'):
        quantize(float_model(), recipe_for("INT8_DEFAULT_CFG"), iter(BATCHES))


WEIGHTS = {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 8, "axis": 0}}
INPUTS = {"quantizer_name": "*input_quantizer", "cfg": {"num_bits": 8, "axis": None}}
KEYS = {"quantizer_name": "*[kv]_bmm_quantizer", "cfg": {"num_bits": (4, 3)}}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([INPUTS], "float weights"),
        ([WEIGHTS, INPUTS, KEYS], r"a format for \*\[kv\]_bmm_quantizer"),
        ([WEIGHTS, {**INPUTS, "cfg": {"num_bits": 8, "axis": -1}}], "inputs that are not INT8 with one scale"),
        ([WEIGHTS, {**INPUTS, "cfg": {"num_bits": 8, "axis": None, "type": "dynamic"}}], "inputs with dynamic"),
        ([{**WEIGHTS, "cfg": {"num_bits": 8, "axis": None}}], "neither per channel nor per group"),
        ([{**WEIGHTS, "cfg": {"num_bits": 8, "block_sizes": {-1: 128, -2: 128}}}], "neither per channel nor per group"),
    ],
)
def test_formats_that_samq_has_not(entries: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(UsageError, match=f"modelopt: MY_CFG has .*{message}"):
        format_of("MY_CFG", {"quant_cfg": entries})


def test_formats_that_samq_has() -> None:
    off = {"quantizer_name": "*", "enable": False}
    assert format_of("A", {"quant_cfg": [off, WEIGHTS, INPUTS]}) == Format(8, -1, int8_inputs=True)
    blocks = {**WEIGHTS, "cfg": {"num_bits": 4, "block_sizes": {-1: 64, "type": "static"}}}
    assert format_of("B", {"quant_cfg": [off, blocks]}) == Format(4, 64, int8_inputs=False)


def test_a_multiplier_is_shared_by_all_layers_of_a_site_or_by_none() -> None:
    one = Decided(torch.zeros(1, 2), torch.ones(1, 1), None, torch.tensor([1.0, 2.0]))
    same = replace(one, multiplier=torch.tensor([1.0, 2.0]))
    assert shared_multiplier([one]) is one.multiplier
    assert shared_multiplier([one, same]) is one.multiplier
    none, other = replace(one, multiplier=None), replace(one, multiplier=torch.tensor([1.0, 2.1]))
    assert all(shared_multiplier(layers) is None for layers in ([none], [one, none], [none, one], [one, same, other]))
