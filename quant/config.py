"""The recipe: what is quantized, to which format and by which method. Presets are in `presets/*.yaml`.

A recipe is frozen. What one section may hold is checked by its model, what sections may hold together by
`Recipe`. `load_recipe` reads a file; its errors name the line, the key and the fix.
"""

from __future__ import annotations

import difflib
import os
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    TypeAdapter,
    ValidationError,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from samq.errors import UsageError
from samq.quant.config_file import impossible, load_yaml

PRESETS = Path(__file__).with_name("presets")
AUTO: Final = "auto"
Alpha = float | Literal["auto"]
Rank = int | Literal["auto"]
Number = TypeVar("Number", int, float)
USUAL_PERCENTILE = 99.99
WEIGHT_ONLY_INT4_GROUPS = (-1, 16, 32, 64, 128, 256)


class _Section(BaseModel):
    """Strict: true is not 1 and "128" is not 128; an int may stand for a float."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


_RANK = TypeAdapter[int](Annotated[int, Field(ge=1, le=1024)], config=ConfigDict(strict=True))
_SHARE = TypeAdapter[float](Annotated[float, Field(ge=0, le=1)], config=ConfigDict(strict=True, allow_inf_nan=False))


def _number_or_auto(value: object, numbers: TypeAdapter[Number], span: str) -> Number | Literal["auto"]:
    """Of a union, pydantic would tell what is wrong with each member; that of numbers is enough."""
    if value == AUTO:
        return AUTO
    if isinstance(value, str) and value.isalpha():
        raise impossible(f"{value!r} is neither {AUTO} nor a number {span}")
    return numbers.validate_python(value)


class GptqConfig(_Section):
    """Second-order rounding of the weights (GPTQ, arXiv 2210.17323)."""

    block_size: int = Field(default=128, ge=1, description="columns rounded between two updates of the rest")
    damp_percentage: float = Field(
        default=0.01,
        gt=0,
        lt=1,
        description="fraction, not percent, of the mean Hessian diagonal that is added to it (section 3.3)",
    )


class ScalesConfig(_Section):
    """How the scale of a group of weights is chosen: its range as it is, or clipped where that costs less."""

    method: Literal["max", "mse", "p_norm"] = "mse"
    p: float = Field(default=3.0, gt=0, le=16, description="power of the rounding errors that p_norm adds up")
    weighted: bool = False
    """By the second moments of the inputs, so that weights count as their outputs do."""

    @model_validator(mode="after")
    def _max_weighs_nothing(self) -> ScalesConfig:
        if self.method == "max" and self.weighted:
            raise impossible("max adds up no errors that could be weighted; use mse or p_norm", key="method")
        return self

    @property
    def norm(self) -> float | None:
        """Power of the errors that are added up, None for max."""
        return {"max": None, "mse": 2.0, "p_norm": self.p}[self.method]


class LowRankConfig(_Section):
    """A 16-bit branch of low rank beside the quantized weights (SVDQuant, arXiv 2411.05007)."""

    rank: Rank = Field(
        default=32,
        description="a branch of higher rank stores more than the largest layer of SAM ViT-H, 1280 x 5120",
    )
    """From 1 to 1024, or "auto": chosen for each layer, all of them together within max_overhead."""
    weighting: Literal["none", "diagonal", "full"] = Field(
        default="none",
        description="refit the branch to what the codes leave of the output, by the inputs' second moments",
    )
    compensate: bool = Field(
        default=False,
        description="alternate SVD and quantizer while the layer's output error falls",
    )
    max_rounds: int = Field(default=10, ge=1, le=100, description="with compensate: quantizations of a layer at most")
    shared_down: bool = False
    """One down-projection for layers that read the same tokens (`samq.quant.sites.same_inputs`), and their form."""
    max_overhead: float | None = Field(
        default=0.027,
        gt=0,
        le=1,
        description="caps the rank: the branch stores at most this fraction of the layer's FP16 bytes",
    )
    """With rank: auto, of all these layers' bytes or FLOPs together, for all their branches."""
    budget: Literal["bytes", "flops"] = Field(
        default="bytes",
        description="what rank: auto spends: stored bytes, or multiplications and additions for the calibration images",
    )

    @field_validator("rank", mode="wrap")
    @classmethod
    def _rank_or_auto(cls, rank: object, _: ValidatorFunctionWrapHandler) -> Rank:
        return _number_or_auto(rank, _RANK, "from 1 to 1024")

    @model_validator(mode="after")
    def _budget_is_known(self) -> LowRankConfig:
        if self.rank == AUTO and self.max_overhead is None:
            raise impossible(
                "null leaves rank: auto without a budget; give a fraction of the FP16 bytes", key="max_overhead"
            )
        return self

    @property
    def needs_hessian(self) -> bool:
        """The branch depends on the second moments of the inputs."""
        return self.compensate or self.weighting != "none"


class WeightsConfig(_Section):
    """Format of the weights, which layers keep theirs, and the method (neither GPTQ nor low rank: RTN)."""

    dtype: Literal["uint4", "sint4", "uint8", "sint8"]
    group_shapes: list[list[int]] = [[1, 128]]
    """One [1, n]: n weights of an output channel share a scale; -1 is the whole channel."""
    skip_patch_embed: bool = True
    skip_first_block: bool = False
    skip_last_block: bool = False
    skip_decoder: bool = True
    scales: ScalesConfig = ScalesConfig()
    bias_correction: bool = False
    """Biases make up for what rounding the weights does to the mean output (Nagel et al., arXiv 1906.04721)."""
    kernel_gptq: GptqConfig | None = None
    low_rank: LowRankConfig | None = None

    @field_validator("group_shapes")
    @classmethod
    def _one_row_group(cls, shapes: list[list[int]]) -> list[list[int]]:
        if len(shapes) != 1:
            raise impossible(f"exactly one entry such as [[1, 128]] is supported, not {len(shapes)}")
        if len(shapes[0]) != 2 or shapes[0][0] != 1:
            raise impossible(f"{shapes[0]} is not [1, n]: a group lies within one output channel")
        size = shapes[0][1]
        if size != -1 and (size < 1 or size % 16):
            raise impossible(f"n of [1, n] is -1 (per channel) or a positive multiple of 16, not {size}")
        return shapes

    @field_validator("skip_patch_embed")
    @classmethod
    def _patch_embedding_stays_float(cls, skip: bool) -> bool:
        if not skip:
            raise impossible(
                "false is not supported: the patch embedding is a convolution on 3 channels with under 0.1 % of the "
                "weights, which no engine runs in 4 or 8 bits; set it to true"
            )
        return skip

    @property
    def bits(self) -> int:
        """Bits of a stored weight: 4 or 8."""
        return int(self.dtype[-1])

    @property
    def signed(self) -> bool:
        """Symmetric codes around zero; otherwise each group has a zero point."""
        return self.dtype.startswith("s")

    @property
    def needs_hessian(self) -> bool:
        """The method looks at the second moments of the inputs."""
        return self.kernel_gptq is not None or (self.low_rank is not None and self.low_rank.needs_hessian)

    @property
    def group_size(self) -> int:
        """Weights that share a scale; -1 for a whole output channel."""
        return self.group_shapes[0][1]


class LayerConfig(_Section):
    """What some layers have instead of the keys of `wgts`; a key that is not given is as there, a null one is off."""

    dtype: Literal["float", "uint4", "sint4", "uint8", "sint8"] | None = None
    """With "float", the layer is not quantized."""
    group_shapes: list[list[int]] | None = None
    kernel_gptq: GptqConfig | None = None
    low_rank: LowRankConfig | None = None

    @model_validator(mode="after")
    def _says_one_thing(self) -> LayerConfig:
        for key in ("dtype", "group_shapes"):
            if key in self.model_fields_set and getattr(self, key) is None:
                raise impossible("null is none; leave the key out to have that of wgts", key=key)
        if not self.model_fields_set:
            raise impossible(f"says nothing; give one of {', '.join(type(self).model_fields)}")
        if self.stays_float and len(self.model_fields_set) > 1:
            raise impossible("a layer that stays float has no other key; leave them out", key="dtype")
        return self

    @model_serializer(mode="wrap")
    def _keys_given(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in dump(self).items() if key in self.model_fields_set}

    @property
    def stays_float(self) -> bool:
        """The layer is not quantized."""
        return self.dtype == "float"


class InputsConfig(_Section):
    """Format of the activations that enter a quantized layer."""

    dtype: Literal["sint8", "uint8"] = "sint8"
    granularity: Literal["per_tensor", "per_token"] = "per_tensor"
    mode: Literal["static", "dynamic"] = "static"
    calibrator: Literal["output", "max", "percentile", "mse", "entropy"] = "output"
    """How static scales are found: "output" looks at the layer's output, the others at its inputs alone."""
    percentile: float | None = Field(
        default=None, gt=50, le=100, description="percent of all inputs that are not clipped, 99.99 unless given"
    )

    @model_validator(mode="before")
    @classmethod
    def _usual_percentile(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("calibrator") == "percentile" and values.get("percentile") is None:
            return values | {"percentile": USUAL_PERCENTILE}
        return values

    @model_validator(mode="after")
    def _calibrator_fits(self) -> InputsConfig:
        if self.calibrator != "output" and self.mode == "dynamic":
            raise impossible(
                f"{self.calibrator} needs mode: static, for dynamic scales come from each input itself",
                key="calibrator",
            )
        if self.percentile is not None and self.calibrator != "percentile":
            raise impossible(f"needs calibrator: percentile, not {self.calibrator}", key="percentile")
        return self

    @property
    def reads_histogram(self) -> bool:
        """The calibrator looks at how often inputs of which size are seen."""
        return self.calibrator in ("percentile", "mse", "entropy")

    @model_validator(mode="after")
    def _mode_fits(self) -> InputsConfig:
        if self.granularity == "per_token" and self.mode == "static":
            raise impossible(
                "per_token needs mode: dynamic, for a token's scale is not known before it is there",
                key="granularity",
            )
        if self.dtype == "uint8" and self.mode == "dynamic":
            raise impossible("uint8 needs mode: static, for dynamic scales are symmetric; use sint8", key="dtype")
        return self


class ShiftConfig(_Section):
    """The middle of each activation channel taken away, biases adjusted (Outlier Suppression+, arXiv 2304.09145)."""

    enabled: bool = False


class SmoothConfig(_Section):
    """Outliers of the activations moved into the weights (SmoothQuant, arXiv 2211.10438)."""

    enabled: bool = False
    alpha: Alpha = Field(default=0.5, description="share of the range that moves to the weights")
    """From 0 to 1, or "auto": searched for each layer on its output error."""
    multiply: bool = Field(
        default=False, description="also where nothing absorbs the scale: inputs are multiplied by it"
    )

    @model_validator(mode="after")
    def _multiplies_by_something(self) -> SmoothConfig:
        if self.multiply and not self.enabled:
            raise impossible("true needs enabled: true", key="multiply")
        return self

    @field_validator("alpha", mode="wrap")
    @classmethod
    def _alpha_or_auto(cls, alpha: object, _: ValidatorFunctionWrapHandler) -> Alpha:
        return _number_or_auto(alpha, _SHARE, "from 0 to 1")


class RotationConfig(_Section):
    """Orthogonal rotation of the activations and its inverse on the weights (QuaRot, arXiv 2404.00456).

    That of attention values comes after shifting and smoothing. Without these, channels that are far larger than the
    rest, or far from zero, spoil all of a head. That of residual streams comes first of all, that at run time last.
    """

    enabled: bool = False
    residual: bool = Field(
        default=False, description="also the residual streams that can be rotated exactly, those without pooling"
    )
    online: bool = Field(
        default=False,
        description="also all inputs whose rotation nothing absorbs: a product by a [K, K] matrix before the layer",
    )

    @model_validator(mode="after")
    def _is_a_rotation(self) -> RotationConfig:
        for key in ("residual", "online"):
            if getattr(self, key) and not self.enabled:
                raise impossible("true needs enabled: true", key=key)
        return self


class CalibConfig(_Section):
    """Images on which the activations are observed."""

    num_samples: int = Field(default=128, ge=1, description="images")
    batch_size: int = Field(default=1, ge=1, description="images per forward pass")
    mode: Literal["one_pass", "sequential"] = "one_pass"
    """Each block sees the inputs that it has in the float model, or behind the quantized blocks before it."""
    path: str | None = None


class Recipe(_Section):
    """Everything that decides the quantized weights, apart from the checkpoint and the images."""

    quantizer: Literal["samq", "modelopt"] = "samq"
    modelopt: str | None = None
    """The config that ModelOpt quantizes by, such as INT8_SMOOTHQUANT_CFG; `wgts` and `ipts` have its format."""
    wgts: WeightsConfig
    layers: dict[str, LayerConfig] = {}
    """Pattern of layer names (`*` is any text) → what these layers have; the first pattern that matches decides."""
    ipts: InputsConfig | None = None
    shift: ShiftConfig = ShiftConfig()
    smooth: SmoothConfig = SmoothConfig()
    rotation: RotationConfig = RotationConfig()
    calib: CalibConfig = CalibConfig()

    @model_validator(mode="after")
    def _one_quantizer(self) -> Recipe:
        if (self.quantizer == "modelopt") != (self.modelopt is not None):
            raise impossible(
                "a config's name, such as INT8_SMOOTHQUANT_CFG, goes with quantizer: modelopt, and with it alone",
                key="modelopt",
            )
        if self.quantizer == "samq":
            return self
        asked = {
            "wgts.kernel_gptq": self.wgts.kernel_gptq is not None,
            "wgts.low_rank": self.wgts.low_rank is not None,
            "wgts.bias_correction": self.wgts.bias_correction,
            "wgts.scales": self.wgts.scales != ScalesConfig(),
            "ipts.calibrator": self.ipts is not None and self.ipts.calibrator != "output",
            "shift": self.shift.enabled,
            "smooth": self.smooth.enabled,
            "rotation": self.rotation.enabled,
            "calib.mode": self.calib.mode != "one_pass",
            "layers": any(not rule.stays_float for rule in self.layers.values()),
        }
        for key in (key for key, is_asked in asked.items() if is_asked):
            raise impossible("is samq's own method, and does not go with quantizer: modelopt; leave it out", key=key)
        return self

    @model_validator(mode="after")
    def _runs_on_an_engine(self) -> Recipe:
        dtype, group = self.wgts.dtype, self.wgts.group_size
        if self.weight_only and self.wgts.bits == 4 and group not in WEIGHT_ONLY_INT4_GROUPS:
            sizes = ", ".join(map(str, WEIGHT_ONLY_INT4_GROUPS))
            raise impossible(
                f"4-bit weights without ipts take groups of {sizes}, not {group}: "
                "weight-only kernels of the engines know powers of two only",
                key="wgts.group_shapes",
            )
        if not self.weight_only and dtype == "uint8":
            raise impossible(
                "uint8 does not go with ipts, for INT8 engines take symmetric weights only; use sint8",
                key="wgts.dtype",
            )
        if not self.weight_only and self.wgts.bits == 8 and group != -1:
            raise impossible(
                f"{dtype} weights with ipts need [[1, -1]], not [[1, {group}]]: "
                "an INT8 GEMM takes one weight scale per output channel",
                key="wgts.group_shapes",
            )
        for pattern, rule in self.layers.items():
            self._require_form(pattern, rule)
        return self

    @model_validator(mode="after")
    def _one_budget(self) -> Recipe:
        asked = {"": self.wgts.low_rank, **{pattern: rule.low_rank for pattern, rule in self.layers.items()}}
        budgets = {pattern: one.budget for pattern, one in asked.items() if one is not None and one.rank == AUTO}
        first = next(iter(budgets.values()), "bytes")
        for pattern, budget in budgets.items():
            if budget != first:
                raise impossible(
                    f"{budget} does not go with {first}: layers with rank: auto share one budget; give all the same",
                    key=("layers", pattern, "low_rank"),
                )
        return self

    def _require_form(self, pattern: str, rule: LayerConfig) -> None:
        """Insist that what a rule makes of `wgts` is a form that engines run."""
        try:
            self._with(rule)
        except ValidationError as error:
            (details,) = error.errors()[:1]
            context = details.get("ctx", {})
            steps = (*details["loc"], *context.get("place", ()))
            at_fault = [str(step) for step in steps if step in rule.model_fields_set][:1]
            raise impossible(context.get("reason", details["msg"]), key=("layers", pattern, *at_fault)) from error

    def _with(self, rule: LayerConfig | None) -> Recipe:
        """This recipe with a rule in `wgts`, and no rules."""
        values = self.model_dump(exclude={"layers"})
        if rule is not None and not rule.stays_float:
            values["wgts"] |= rule.model_dump()
        return Recipe.model_validate(values)

    def pattern_for(self, layer: str) -> str | None:
        """The first pattern of `layers` that matches a layer's name, None where none does."""
        return next((pattern for pattern in self.layers if fnmatchcase(layer, pattern)), None)

    def stays_float(self, layer: str) -> bool:
        """`layers` says that this layer is not quantized."""
        pattern = self.pattern_for(layer)
        return pattern is not None and self.layers[pattern].stays_float

    def of_layer(self, layer: str) -> Recipe:
        """The recipe as it is for one quantized layer: `wgts` with what `layers` says, and no `layers`."""
        pattern = self.pattern_for(layer)
        return self._with(None if pattern is None else self.layers[pattern])

    def variants(self) -> list[Recipe]:
        """What `of_layer` can return, that of layers without a rule first."""
        rules = [rule for rule in self.layers.values() if not rule.stays_float]
        return [self._with(rule) for rule in (None, *rules)]

    @property
    def weight_only(self) -> bool:
        """The activations stay in floating point."""
        return self.ipts is None

    @property
    def two_level(self) -> bool:
        """4-bit weights with 8-bit activations: two levels of scales (QServe, arXiv 2405.04532)."""
        return self.wgts.bits == 4 and not self.weight_only

    @property
    def auto_rank(self) -> bool:
        """The ranks of low-rank branches are chosen together."""
        return self.wgts.low_rank is not None and self.wgts.low_rank.rank == AUTO

    @property
    def needs_histograms(self) -> bool:
        """Static scales come from histograms; or from largest inputs, of which a rotation leaves those of a sample."""
        if self.ipts is None:
            return False
        return self.ipts.reads_histogram or (self.ipts.calibrator == "max" and self.rotation.enabled)

    @property
    def needs_calibration(self) -> bool:
        """RTN, one SVD and rotation look at no activation; static scales and all other methods do."""
        static = self.ipts is not None and self.ipts.mode == "static"
        changes_basis = self.shift.enabled or self.smooth.enabled
        weighs = self.wgts.scales.weighted or self.wgts.bias_correction
        looks = static or changes_basis or weighs or self.quantizer == "modelopt"
        return looks or any(variant.wgts.needs_hessian for variant in self.variants())

    def to_yaml(self) -> str:
        """Every key, defaults too, in the order of the models; `load_recipe` reads it back equal."""
        text: str = yaml.safe_dump(self.model_dump(), sort_keys=False)
        return text


def preset_names() -> list[str]:
    """Names that `load_recipe` takes, sorted."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def load_recipe(name_or_path: str) -> Recipe:
    """The recipe of a preset ("int4_w4a8", "int4_w4a8.yaml") or of a YAML file.

    An existing file wins over a preset of its name, unless given without suffix and separator.

    Raises:
        UsageError: there is no such preset or file, or its content is not a recipe.
    """
    path, presets = Path(name_or_path), preset_names()
    is_plain_name = path.name == name_or_path and not path.suffix
    if os.path.exists(name_or_path) and not (is_plain_name and name_or_path in presets):
        return load_yaml(path, Recipe)
    name = name_or_path.removesuffix(".yaml")
    if name in presets:
        return load_yaml(PRESETS / f"{name}.yaml", Recipe)
    near = difflib.get_close_matches(path.stem, presets, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise UsageError(f"no preset or file {name_or_path!r}; presets: {', '.join(presets)}{hint}")
