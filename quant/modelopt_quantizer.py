"""NVIDIA ModelOpt (an extra) as the quantizer: its weights, scales and channel scales in samq's own forms.

ModelOpt simulates; what it decided is read from its quantizers after it has calibrated:
    weights             W' / s rounds to codes; its scale s = max|W'| / qmax is rounded to FP16 here, as all scales of
                        samq are, which changes a weight by 2⁻¹¹ of itself at most where s ≥ 2⁻¹⁴
    inputs              max|x| / 127, rounded to FP16 too
    pre_quant_scale     p of AWQ and SmoothQuant, x → x · p before anything else: folded like samq's own smoothing with
                        1 / p (`samq.quant.sites`); where nothing absorbs it, or where two layers that read the same
                        inputs have different ones, it stays as a product in front of the layer. W' is W / p already

What samq cannot express is refused: FP8 and FP4, dynamic blocks, and two formats one behind the other.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import importlib
import importlib.metadata
import io
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Sam2Model

from samq.calib.calibrate import run_images
from samq.errors import BadInput, MachineLacks, UsageError
from samq.quant.config import Recipe
from samq.quant.grids import QuantizedWeight, Scales
from samq.quant.inputs import InputGrid
from samq.quant.plan import LayerPlan, grid_of
from samq.quant.scales import as_fp16

PACKAGE = "modelopt.torch.quantization"
INPUT_CODES = 127
QUANTIZERS = ("*weight_quantizer", "*input_quantizer")


@dataclass(frozen=True)
class Format:
    """What a ModelOpt config makes of a layer.

    Args:
        bits: of a weight.
        group_size: weights that share a scale, -1 for an output channel.
        int8_inputs: static per-tensor INT8 inputs; otherwise float ones.
    """

    bits: int
    group_size: int
    int8_inputs: bool

    def as_keys(self) -> str:
        """The keys of a recipe with this format."""
        inputs = "ipts: {dtype: sint8, granularity: per_tensor, mode: static}" if self.int8_inputs else "ipts: null"
        return f"wgts.dtype: sint{self.bits}, wgts.group_shapes: [[1, {self.group_size}]] and {inputs}"


@dataclass(frozen=True)
class Decided:
    """What ModelOpt decided for one layer.

    Args:
        codes: [N, K] of W'.
        scale: [N, groups] of W' in float32, not rounded yet.
        inputs: grid of the inputs, or None.
        multiplier: p [K], by which inputs are to be multiplied before that, or None.
    """

    codes: Tensor
    scale: Tensor
    inputs: InputGrid | None
    multiplier: Tensor | None

    def weight(self, plan: LayerPlan, recipe: Recipe, divisors: Tensor) -> QuantizedWeight:
        """W' with its rows divided by `divisors` [N, 1]: the codes stay, the scales are rounded to FP16."""
        return QuantizedWeight(
            self.codes, Scales(as_fp16(self.scale / divisors), None, None, plan.group_size), grid_of(recipe)
        )


def shipped_config(name: str) -> dict[str, Any]:
    """A config of the installed ModelOpt.

    Raises:
        MachineLacks: ModelOpt is not there.
        UsageError: it has no config of this name.
    """
    shipped = {key: value for key, value in vars(_modelopt()).items() if key.endswith("_CFG") and type(value) is dict}
    if name not in shipped:
        near = difflib.get_close_matches(name, shipped, n=1, cutoff=0.0)[0]
        raise UsageError(f"modelopt: {name} is no config of ModelOpt {version()}; did you mean {near}?")
    return copy.deepcopy(shipped[name])


def format_of(name: str, config: Mapping[str, Any]) -> Format:
    """The format that a config gives to linear layers.

    Raises:
        UsageError: samq cannot express it; the message says what.
    """
    formats = {
        entry["quantizer_name"]: entry.get("cfg") for entry in config["quant_cfg"] if entry.get("enable") is not False
    }
    weights, inputs = (formats.pop(key, None) for key in QUANTIZERS)
    if formats:
        raise _refused(name, f"a format for {next(iter(formats))}")
    if weights is None:
        raise _refused(name, "float weights")
    for what, found in (("weights", weights), ("inputs", inputs)):
        _require_integers(name, what, found)
    blocks = dict(weights.get("block_sizes") or {})
    blocks.pop("type", None)
    group_size = blocks.pop(-1, -1)
    if blocks or (group_size == -1 and weights.get("axis") != 0):
        raise _refused(name, "weights whose scales are neither per channel nor per group of inputs")
    if inputs is not None and (inputs["num_bits"] != 8 or inputs.get("axis") is not None or inputs.get("block_sizes")):
        raise _refused(name, "inputs that are not INT8 with one scale")
    return Format(weights["num_bits"], group_size, inputs is not None)


def _require_integers(name: str, what: str, found: Any) -> None:
    if found is None:
        return
    if not isinstance(found, Mapping):
        raise _refused(name, f"{what} in two formats one behind the other")
    blocks = found.get("block_sizes") or {}
    if found.get("type") == "dynamic" or blocks.get("type") == "dynamic" or "scale_bits" in blocks:
        raise _refused(name, f"{what} with dynamic blocks or scales")
    if found["num_bits"] not in (4, 8):
        raise _refused(name, f"{what} in floating-point formats (num_bits {found['num_bits']})")


def _refused(name: str, what: str) -> UsageError:
    return UsageError(f"modelopt: {name} has {what}, which samq cannot express; choose a config of integer weights")


def config_for(recipe: Recipe) -> dict[str, Any]:
    """The ModelOpt config that a recipe names.

    Raises:
        MachineLacks: ModelOpt is not there.
        UsageError: the config is unknown, cannot be expressed, or is not what `wgts` and `ipts` say.
    """
    assert recipe.modelopt is not None
    config = shipped_config(recipe.modelopt)
    form = format_of(recipe.modelopt, config)
    asked = Format(recipe.wgts.bits, recipe.wgts.group_size, int8_inputs=not recipe.weight_only)
    static = recipe.ipts is None or (recipe.ipts.dtype == "sint8" and recipe.ipts.mode == "static")
    if form != asked or not recipe.wgts.signed or not static:
        raise UsageError(f"modelopt: {recipe.modelopt} needs {form.as_keys()}")
    return config


@torch.no_grad()
def decide(
    model: Sam2Model, recipe: Recipe, plans: Mapping[str, LayerPlan], images: Iterable[Tensor], with_decoder: bool
) -> dict[str, Decided]:
    """Run ModelOpt on a copy of the model and read what it decided for each planned layer.

    Args:
        model: a float `Sam2Model`; not changed.
        recipe: names the config, and has its format in `wgts` and `ipts`.
        plans: the layers to quantize, by name.
        images: pixel values [B, 3, S, S]; read as often as the algorithm runs the model.
        with_decoder: also run the decoder while calibrating.

    Raises:
        BadInput: there was no image, or a layer's inputs are not finite.
        MachineLacks, UsageError: as `config_for` raises them.
    """
    config = config_for(recipe)
    asked = {"quant_cfg": formats_of_layers(plans, config), "algorithm": config["algorithm"]}
    copied = copy.deepcopy(model)
    for name in plans:
        copied.get_submodule(name).register_forward_pre_hook(partial(_require_finite, name))
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it names every layer that it was told to leave alone
        _modelopt().quantize(copied, asked, lambda calibrated: run_images(calibrated, images, with_decoder))
    return {name: _read(copied.get_submodule(name), plan, recipe) for name, plan in plans.items()}


def _require_finite(name: str, _: nn.Module, inputs: tuple[Tensor]) -> None:
    if not bool(torch.isfinite(inputs[0]).all()):
        raise BadInput(f"{name}: its inputs are not finite on the calibration images; check the checkpoint")


def formats_of_layers(layers: Iterable[str], config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """ModelOpt's list of formats: these layers get the config's, all else none."""
    formats = {entry["quantizer_name"]: entry.get("cfg") for entry in config["quant_cfg"]}
    chosen: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for pattern in QUANTIZERS:
        if formats.get(pattern) is not None:
            chosen += [{"quantizer_name": f"{name}.{pattern[1:]}", "cfg": formats[pattern]} for name in layers]
    return chosen


def _read(layer: Any, plan: LayerPlan, recipe: Recipe) -> Decided:
    weights, inputs = layer.weight_quantizer, layer.input_quantizer
    grid, weight = grid_of(recipe), layer.weight.detach().float()
    scale = weights.amax.detach().float().reshape(plan.out_features, -1) / grid.qmax
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    exact = Scales(scale, None, None, plan.group_size)
    codes = (weights(weight) / exact.per_input(plan.in_features)[0]).round().clamp(grid.qmin, grid.qmax)
    of_inputs = None
    if not recipe.weight_only:
        largest = inputs.amax.detach().float().max() / INPUT_CODES
        of_inputs = InputGrid("sint8", "per_tensor", float(as_fp16(largest)))
    channel = inputs.pre_quant_scale
    return Decided(codes.to(grid.dtype), scale, of_inputs, None if channel is None else channel.detach().flatten())


def shared_multiplier(decided: Iterable[Decided]) -> Tensor | None:
    """The p [K] that all these layers have, None where one has none or another one."""
    first, *others = (one.multiplier for one in decided)
    if first is None:
        return None
    same = all(other is not None and torch.equal(first, other) for other in others)
    return first if same else None


def version() -> str:
    """Version of the installed ModelOpt."""
    return importlib.metadata.version("nvidia-modelopt")


def _modelopt() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of versions that ModelOpt was not tested with
            return importlib.import_module(PACKAGE)
    except ImportError as error:
        raise MachineLacks(f'ModelOpt cannot be imported ({error}); run `pip install "samq[modelopt]"`') from error
