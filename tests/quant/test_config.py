"""Recipes: presets load and round-trip, and every error names the line, the key and the fix."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from samq.errors import UsageError
from samq.quant.config import (
    CalibConfig,
    GptqConfig,
    InputsConfig,
    LowRankConfig,
    Recipe,
    RotationConfig,
    ScalesConfig,
    ShiftConfig,
    SmoothConfig,
    WeightsConfig,
    load_recipe,
    preset_names,
)
from samq.quant.yaml_lines import MAX_BYTES

SINT4 = "wgts:\n  dtype: sint4\n"  # two lines to which a case adds its own
PRESETS = "int4_svdquant, int4_w4a8, int4_w4a8_rtn, int4_w4only, int4_w4only_rtn, int4_w4only_sym, int8_w8a8"


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def load(content: str | bytes) -> Recipe:
    Path("my.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    return load_recipe("my.yaml")


def error_of(content: str | bytes) -> str:
    with pytest.raises(UsageError) as caught:
        load(content)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


@pytest.mark.parametrize(
    ("name", "bits", "signed", "group_size", "two_level", "weight_only", "needs_calibration"),
    [
        ("int4_w4a8", 4, True, 128, True, False, True),
        ("int4_w4a8_rtn", 4, True, 128, True, False, True),
        ("int4_w4only", 4, False, 64, False, True, True),
        ("int4_w4only_rtn", 4, False, 64, False, True, False),
        ("int4_w4only_sym", 4, True, 64, False, True, True),
        ("int4_svdquant", 4, True, 128, True, False, True),
        ("int8_w8a8", 8, True, -1, False, False, True),
    ],
)
def test_preset(
    name: str,
    bits: int,
    signed: bool,
    group_size: int,
    two_level: bool,
    weight_only: bool,
    needs_calibration: bool,
) -> None:
    recipe = load_recipe(name)
    weights = recipe.wgts
    assert (weights.bits, weights.signed, weights.group_size) == (bits, signed, group_size)
    assert (recipe.two_level, recipe.weight_only) == (two_level, weight_only)
    assert recipe.needs_calibration is needs_calibration
    assert load_recipe(f"{name}.yaml") == recipe
    assert load(recipe.to_yaml()) == recipe


def test_presets_are_the_documented_ones() -> None:
    assert ", ".join(preset_names()) == PRESETS
    rtn, gptq = load_recipe("int4_w4a8_rtn"), load_recipe("int4_w4a8")
    assert rtn.wgts.kernel_gptq is None
    assert gptq.wgts.kernel_gptq == GptqConfig(block_size=128, damp_percentage=0.01)
    assert gptq.wgts.scales == ScalesConfig(method="p_norm", p=3.0, weighted=True)
    assert (gptq.wgts.bias_correction, rtn.wgts.bias_correction) == (True, False)
    assert rtn.wgts.scales == ScalesConfig(method="mse", weighted=False) == ScalesConfig()
    without = {"kernel_gptq": None, "scales": ScalesConfig(), "bias_correction": False}
    assert gptq.wgts.model_copy(update=without) == rtn.wgts
    assert load_recipe("int4_svdquant").wgts.low_rank == LowRankConfig(rank="auto", weighting="full")
    usual, symmetric = load_recipe("int4_w4only"), load_recipe("int4_w4only_sym")
    assert symmetric == usual.model_copy(update={"wgts": usual.wgts.model_copy(update={"dtype": "sint4"})})


def test_defaults_and_shorthands() -> None:
    recipe = load(SINT4 + "  kernel_gptq: {}\n  low_rank: {max_overhead: null}\nipts: null\nsmooth: {alpha: 1}\n")
    assert recipe == Recipe(
        wgts=WeightsConfig(dtype="sint4", kernel_gptq=GptqConfig(), low_rank=LowRankConfig(max_overhead=None)),
        smooth=SmoothConfig(alpha=1.0),
    )
    assert load(SINT4 + "ipts: {}\n").ipts == InputsConfig(
        dtype="sint8", granularity="per_tensor", mode="static", calibrator="output", percentile=None
    )
    for usual in ("", ", percentile: null"):
        percentile = load(SINT4 + f"ipts: {{calibrator: percentile{usual}}}\n").ipts
        assert percentile == InputsConfig(calibrator="percentile", percentile=99.99)


def test_to_yaml_has_every_key() -> None:
    resolved = """\
quantizer: samq
modelopt: null
wgts:
  dtype: sint4
  group_shapes:
  - - 1
    - 128
  skip_patch_embed: true
  skip_first_block: false
  skip_last_block: false
  skip_decoder: true
  scales:
    method: mse
    p: 3.0
    weighted: false
  bias_correction: false
  kernel_gptq: null
  low_rank: null
layers: {}
ipts: null
shift:
  enabled: false
smooth:
  enabled: false
  alpha: 0.5
  multiply: false
rotation:
  enabled: false
  residual: false
  online: false
calib:
  num_samples: 128
  batch_size: 1
  mode: one_pass
  path: null
"""
    assert Recipe(wgts=WeightsConfig(dtype="sint4")).to_yaml() == resolved


NO_NUMBER = "is not a number such as 0.01, without quotes (YAML takes 1e-2 for text)"

fractions = st.floats(0, 1, exclude_min=True, exclude_max=True)
recipes = st.builds(
    Recipe,
    wgts=st.builds(
        WeightsConfig,
        dtype=st.sampled_from(["uint4", "sint4"]),
        group_shapes=st.sampled_from([-1, 16, 32, 64, 128, 256]).map(lambda n: [[1, n]]),
        skip_decoder=st.booleans(),
        scales=st.builds(ScalesConfig, method=st.sampled_from(["mse", "p_norm"]), p=st.floats(0.5, 16)),
        bias_correction=st.booleans(),
        kernel_gptq=st.none() | st.builds(GptqConfig, damp_percentage=fractions),
        low_rank=st.none()
        | st.builds(LowRankConfig, max_overhead=st.none() | fractions)
        | st.builds(
            LowRankConfig,
            rank=st.just("auto"),
            weighting=st.sampled_from(["diagonal", "full"]),
            shared_down=st.booleans(),
            max_rounds=st.integers(1, 100),
            budget=st.sampled_from(["bytes", "flops"]),
        ),
    ),
    ipts=st.none()
    | st.builds(InputsConfig, dtype=st.just("sint8"), mode=st.just("dynamic"))
    | st.builds(InputsConfig, calibrator=st.sampled_from(["max", "percentile", "mse", "entropy"]))
    | st.builds(InputsConfig, calibrator=st.just("percentile"), percentile=st.floats(51, 100)),
    shift=st.builds(ShiftConfig, enabled=st.booleans()),
    smooth=st.builds(SmoothConfig, enabled=st.booleans(), alpha=fractions | st.just("auto"))
    | st.just(SmoothConfig(enabled=True, multiply=True)),
    rotation=st.builds(RotationConfig, enabled=st.just(True), residual=st.booleans(), online=st.booleans())
    | st.just(RotationConfig()),
    calib=st.builds(
        CalibConfig,
        mode=st.sampled_from(["one_pass", "sequential"]),
        path=st.none() | st.text(st.characters(codec="utf-8")),
    ),
)


@given(recipes)
def test_any_recipe_round_trips(recipe: Recipe) -> None:
    assert load(recipe.to_yaml()) == recipe


@pytest.mark.parametrize(
    ("content", "needs_calibration"),
    [
        ("  low_rank: {}\n", False),
        ("  low_rank: {compensate: true}\n", True),
        ("  low_rank: {weighting: diagonal}\n", True),
        ("  low_rank: {rank: auto}\n", False),
        ("rotation: {enabled: true, residual: true}\n", False),
        ("rotation: {enabled: true, online: true}\n", False),
        ("ipts: {mode: dynamic}\n", False),
        ("ipts: {mode: dynamic, granularity: per_token}\nrotation: {enabled: true}\n", False),
        ("ipts: {mode: static}\n", True),
        ("  kernel_gptq: {}\n", True),
        ("  bias_correction: true\n", True),
        ("  scales: {weighted: true}\n", True),
        ("  scales: {method: max}\n", False),
        ("shift: {enabled: true}\n", True),
        ("smooth: {enabled: true}\n", True),
        ("quantizer: modelopt\nmodelopt: INT4_BLOCKWISE_WEIGHT_ONLY_CFG\n", True),
    ],
)
def test_needs_calibration(content: str, needs_calibration: bool) -> None:
    assert load(SINT4 + content).needs_calibration is needs_calibration


@pytest.mark.parametrize(
    ("unknown", "line", "key", "advice"),
    [
        (SINT4 + "  kernel_gtpq: {}\n", 3, "wgts.kernel_gtpq", "did you mean wgts.kernel_gptq?"),
        (SINT4 + "\n# comment\nsmoth:\n  alpha: 0.5\n", 5, "smoth", "did you mean smooth?"),
        (
            SINT4 + "  kernel_gptq:\n    batch_size: 3\n",
            4,
            "wgts.kernel_gptq.batch_size",
            "did you mean wgts.kernel_gptq.block_size?",
        ),
        (SINT4 + "  rank: 3\n", 3, "wgts.rank", "did you mean wgts.low_rank.rank?"),
        (SINT4 + "gptq: {}\n", 3, "gptq", "did you mean wgts.kernel_gptq?"),
        (SINT4 + "calib: {Path: x}\n", 3, "calib.Path", "did you mean calib.path?"),
        (SINT4 + "calib.path: x\n", 3, "calib.path", "write calib: {path: ...}"),
        (
            SINT4 + "xyzzy: 1\n",
            3,
            "xyzzy",
            "known keys here: quantizer, modelopt, wgts, layers, ipts, shift, smooth, rotation, calib",
        ),
        (
            SINT4 + "on: 1\n",
            3,
            "on",
            "did you mean rotation.online?",
        ),
    ],
)
def test_unknown_key(unknown: str, line: int, key: str, advice: str) -> None:
    assert error_of(unknown) == f"my.yaml, line {line}: {key} is not a known key; {advice}"


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        (
            "wgts:\n  # 4 bits\n  dtype: int4\n",
            3,
            "wgts.dtype: 'int4' is not one of uint4, sint4, uint8, sint8",
        ),
        (
            SINT4 + "ipts:\n  mode: dynamc\n",
            4,
            "ipts.mode: 'dynamc' is not one of static, dynamic",
        ),
        (
            SINT4 + "calib: {num_samples: '128'}\n",
            3,
            "calib.num_samples: '128' is not a whole number such as 128, without quotes or point",
        ),
        (
            SINT4 + "calib:\n  num_samples: true\n",
            4,
            "calib.num_samples: true is not a whole number such as 128, without quotes or point",
        ),
        (
            SINT4 + "smooth:\n  alpha: 5e-1\n",
            4,
            f"smooth.alpha: '5e-1' {NO_NUMBER}",
        ),
        (
            SINT4 + "smooth:\n  alpha: atuo\n",
            4,
            "smooth.alpha: 'atuo' is neither auto nor a number from 0 to 1",
        ),
        (SINT4 + "smooth: {alpha: true}\n", 3, f"smooth.alpha: true {NO_NUMBER}"),
        (SINT4 + "smooth:\n  alpha: .nan\n", 4, "smooth.alpha: .nan is not a finite number"),
        (SINT4 + "  skip_decoder: 1\n", 3, "wgts.skip_decoder: 1 is not true or false, without quotes"),
        (SINT4 + "calib: {path: 12}\n", 3, "calib.path: 12 is not text; put it in quotes"),
        (SINT4 + "  group_shapes: 128\n", 3, "wgts.group_shapes: 128 is not a list"),
        (
            SINT4 + "  group_shapes:\n  - [1,\n     x]\n",
            5,
            "wgts.group_shapes[0][1]: 'x' is not a whole number such as 128, without quotes or point",
        ),
        (SINT4 + "smooth:\n", 3, "smooth: null is not a mapping; its keys are enabled, alpha, multiply"),
        (
            f"{SINT4}rotation: {'x' * 99}\n",
            3,
            f"rotation: '{'x' * 59}... is not a mapping; its keys are enabled, residual, online",
        ),
        (
            "# c\n- wgts\n",
            2,
            "the file: - wgts is not a mapping; its keys are quantizer, modelopt, wgts, layers, ipts, shift, smooth, "
            "rotation, calib",
        ),
        (
            "\nwgts:\n  skip_decoder: true\n",
            2,
            "wgts.dtype is missing; give one of uint4, sint4, uint8, sint8",
        ),
        ("\nsmooth: {}\n", 2, "wgts is missing"),
    ],
)
def test_wrong_type(content: str, line: int, message: str) -> None:
    assert error_of(content) == f"my.yaml, line {line}: {message}"


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        (
            SINT4 + "  kernel_gptq:\n    block_size: 0\n",
            4,
            "wgts.kernel_gptq.block_size must be at least 1, not 0 (columns rounded between two updates of the rest)",
        ),
        (
            SINT4 + "  scales:\n    p: 0\n",
            4,
            "wgts.scales.p must be more than 0, not 0 (power of the rounding errors that p_norm adds up)",
        ),
        (SINT4 + "  scales:\n    method: l2\n", 4, "wgts.scales.method: 'l2' is not one of max, mse, p_norm"),
        (SINT4 + "  scales: mse\n", 3, "wgts.scales: 'mse' is not a mapping; its keys are method, p, weighted"),
        (SINT4 + "calib: {mode: blockwise}\n", 3, "calib.mode: 'blockwise' is not one of one_pass, sequential"),
        (
            SINT4 + "  kernel_gptq:\n    damp_percentage: 1\n",
            4,
            "wgts.kernel_gptq.damp_percentage must be less than 1, not 1 "
            "(fraction, not percent, of the mean Hessian diagonal that is added to it (section 3.3))",
        ),
        (
            SINT4 + "  low_rank: {rank: 1025}\n",
            3,
            "wgts.low_rank.rank must be at most 1024, not 1025 "
            "(a branch of higher rank stores more than the largest layer of SAM ViT-H, 1280 x 5120)",
        ),
        (
            SINT4 + "  low_rank: {rank: atuo}\n",
            3,
            "wgts.low_rank.rank: 'atuo' is neither auto nor a number from 1 to 1024",
        ),
        (
            SINT4 + "  low_rank: {shared_down: all}\n",
            3,
            "wgts.low_rank.shared_down: 'all' is not true or false, without quotes",
        ),
        (
            SINT4 + "  low_rank: {rank: 8.5}\n",
            3,
            "wgts.low_rank.rank: 8.5 is not a whole number such as 128, without quotes or point",
        ),
        (
            SINT4 + "  low_rank: {rank: auto, max_overhead: null}\n",
            3,
            "wgts.low_rank.max_overhead: null leaves rank: auto without a budget; give a fraction of the FP16 bytes",
        ),
        (
            SINT4 + "  low_rank: {rank: auto, budget: flops}\nlayers:\n  '*.attn.qkv': {low_rank: {rank: auto}}\n",
            5,
            "layers.*.attn.qkv.low_rank: bytes does not go with flops: layers with rank: auto share one budget; "
            "give all the same",
        ),
        (
            SINT4 + "  low_rank: {weighting: ful}\n",
            3,
            "wgts.low_rank.weighting: 'ful' is not one of none, diagonal, full",
        ),
        (SINT4 + "rotation: {residual: true}\n", 3, "rotation.residual: true needs enabled: true"),
        (SINT4 + "rotation: {online: true}\n", 3, "rotation.online: true needs enabled: true"),
        (SINT4 + "smooth: {multiply: true}\n", 3, "smooth.multiply: true needs enabled: true"),
        *(
            (
                f"quantizer: modelopt\nmodelopt: INT4_AWQ_CFG\n{SINT4}{content}",
                5,
                f"{key}: is samq's own method, and does not go with quantizer: modelopt; leave it out",
            )
            for content, key in (
                ("  kernel_gptq: {}\n", "wgts.kernel_gptq"),
                ("  low_rank: {}\n", "wgts.low_rank"),
                ("  bias_correction: true\n", "wgts.bias_correction"),
                ("  scales: {method: max}\n", "wgts.scales"),
                ("ipts: {calibrator: max}\n", "ipts.calibrator"),
                ("shift: {enabled: true}\n", "shift"),
                ("smooth: {enabled: true}\n", "smooth"),
                ("rotation: {enabled: true}\n", "rotation"),
                ("rotation: {enabled: true, online: true}\n", "rotation"),
                ("calib: {mode: sequential}\n", "calib.mode"),
                ("layers: {a: {dtype: sint8}}\n", "layers"),
            )
        ),
        (
            SINT4 + "  low_rank: {max_overhead: 0}\n",
            3,
            "wgts.low_rank.max_overhead must be more than 0, not 0 "
            "(caps the rank: the branch stores at most this fraction of the layer's FP16 bytes)",
        ),
        (
            SINT4 + "  group_shapes: [[1, 64], [1, 128]]\n",
            3,
            "wgts.group_shapes: exactly one entry such as [[1, 128]] is supported, not 2",
        ),
        (
            SINT4 + "  group_shapes: []\n",
            3,
            "wgts.group_shapes: exactly one entry such as [[1, 128]] is supported, not 0",
        ),
        (
            SINT4 + "  group_shapes: [[16, 16]]\n",
            3,
            "wgts.group_shapes: [16, 16] is not [1, n]: a group lies within one output channel",
        ),
        *(
            (
                f"{SINT4}  group_shapes: [[1, {size}]]\nipts: {{}}\n",
                3,
                f"wgts.group_shapes: n of [1, n] is -1 (per channel) or a positive multiple of 16, not {size}",
            )
            for size in (0, -2, -16, 100)
        ),
        *(
            (
                f"{SINT4}  group_shapes: [[1, {size}]]\n",
                3,
                "wgts.group_shapes: 4-bit weights without ipts take groups of -1, 16, 32, 64, 128, 256, "
                f"not {size}: weight-only kernels of the engines know powers of two only",
            )
            for size in (48, 512)
        ),
        (
            "wgts:\n  dtype: sint8\n  group_shapes: [[1, 64]]\nipts: {}\n",
            3,
            "wgts.group_shapes: sint8 weights with ipts need [[1, -1]], not [[1, 64]]: "
            "an INT8 GEMM takes one weight scale per output channel",
        ),
        (
            "# the group size is the default\nwgts:\n  dtype: sint8\nipts: {}\n",
            2,
            "wgts.group_shapes: sint8 weights with ipts need [[1, -1]], not [[1, 128]]: "
            "an INT8 GEMM takes one weight scale per output channel",
        ),
        (
            "wgts:\n  dtype: uint8\n  group_shapes: [[1, -1]]\nipts: {}\n",
            2,
            "wgts.dtype: uint8 does not go with ipts, for INT8 engines take symmetric weights only; use sint8",
        ),
        (
            SINT4 + "ipts:\n  mode: static\n  granularity: per_token\n",
            5,
            "ipts.granularity: per_token needs mode: dynamic, for a token's scale is not known before it is there",
        ),
        (
            SINT4 + "ipts:\n  dtype: uint8\n  mode: dynamic\n",
            4,
            "ipts.dtype: uint8 needs mode: static, for dynamic scales are symmetric; use sint8",
        ),
        (
            SINT4 + "ipts:\n  mode: dynamic\n  calibrator: entropy\n",
            5,
            "ipts.calibrator: entropy needs mode: static, for dynamic scales come from each input itself",
        ),
        (
            SINT4 + "ipts:\n  mode: dynamic\n  calibrator: max\n",
            5,
            "ipts.calibrator: max needs mode: static, for dynamic scales come from each input itself",
        ),
        (
            SINT4 + "ipts:\n  calibrator: mse\n  percentile: 99.9\n",
            5,
            "ipts.percentile: needs calibrator: percentile, not mse",
        ),
        (SINT4 + "ipts:\n  percentile: 99.9\n", 4, "ipts.percentile: needs calibrator: percentile, not output"),
        (
            SINT4 + "ipts: {calibrator: percentile, percentile: 0.9999}\n",
            3,
            "ipts.percentile must be more than 50, not 0.9999 "
            "(percent of all inputs that are not clipped, 99.99 unless given)",
        ),
        (
            SINT4 + "ipts: {calibrator: minmax}\n",
            3,
            "ipts.calibrator: 'minmax' is not one of output, max, percentile, mse, entropy",
        ),
        (
            SINT4 + "  scales: {method: max, weighted: true}\n",
            3,
            "wgts.scales.method: max adds up no errors that could be weighted; use mse or p_norm",
        ),
        (
            SINT4 + "  skip_patch_embed: false\n",
            3,
            "wgts.skip_patch_embed: false is not supported: the patch embedding is a convolution on 3 channels with "
            "under 0.1 % of the weights, which no engine runs in 4 or 8 bits; set it to true",
        ),
    ],
)
def test_impossible(content: str, line: int, message: str) -> None:
    assert error_of(content) == f"my.yaml, line {line}: {message}"


@pytest.mark.parametrize(
    "content",
    [
        SINT4 + "  group_shapes: [[1, 48]]\nipts: {}\n",
        SINT4 + "  group_shapes: [[1, -1]]\n",
        SINT4.replace("sint4", "uint4") + "ipts: {dtype: uint8}\n",
        "wgts: {dtype: uint8, group_shapes: [[1, 48]]}\n",
        "wgts: {dtype: sint8, group_shapes: [[1, -1]]}\nipts: {granularity: per_token, mode: dynamic}\n",
    ],
)
def test_possible(content: str) -> None:
    recipe = load(content)
    assert load(recipe.to_yaml()) == recipe


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (SINT4 + "  dtype: uint4\n", "my.yaml, line 3: wgts.dtype is given twice, first on line 2"),
        (
            SINT4 + '"wgts": {}\n',
            "my.yaml, line 3: wgts is given twice, first on line 1; line 3: wgts.dtype is",
        ),
        (SINT4 + "calib: [\n", "my.yaml, line 4: not valid YAML: while parsing a flow node"),
        (SINT4 + "a: b: c\n", "my.yaml, line 3: not valid YAML: mapping values are not allowed here"),
        (SINT4 + "\tcalib: 1\n", "my.yaml, line 3: not valid YAML: while scanning for the next token"),
        (SINT4 + "---\n" + SINT4, "my.yaml, line 3: not valid YAML: expected a single document"),
        (
            SINT4 + "calib: {path: 2024-13-01}\n",
            "my.yaml, line 3: not valid YAML: '2024-13-01' is not a timestamp",
        ),
        (SINT4 + "calib: {[]: 1}\n", "my.yaml, line 3: not valid YAML: while constructing a mapping"),
        (SINT4 + "a: !!python/object:os.system {}\n", "my.yaml, line 3: not valid YAML: could not determine"),
        (SINT4 + "a: \0\n", "my.yaml, line 3: the character #x0000 is not allowed in YAML"),
        (SINT4.encode() + b"a: \xff\n", "my.yaml, line 3: not UTF-8 text; save the file as UTF-8"),
        ("[" * 5000, "my.yaml is nested too deeply"),
        ("#" * (MAX_BYTES + 1), "my.yaml is larger than 1 MiB; give a YAML file"),
        ("", "my.yaml is empty; copy a preset and change it"),
        ("# nothing but a comment\n", "my.yaml is empty; copy a preset and change it"),
    ],
)
def test_not_a_yaml_mapping(content: str | bytes, message: str) -> None:
    assert error_of(content).startswith(message)


def test_several_errors_are_one_line_in_the_order_of_the_file() -> None:
    content = "smoth: {}\nwgts:\n  dtype: int4\n  skip: 1\n  skip_decoder: x\ncalib: 3\n"
    first, second, third = error_of(content).split("; line ")
    assert first == "my.yaml, line 1: smoth is not a known key; did you mean smooth?"
    assert second.startswith("3: wgts.dtype: 'int4'")
    assert third.startswith("4: wgts.skip is not a known key")
    assert third.endswith("(+2 more)")


def test_merged_keys_and_byte_order_mark() -> None:
    text = "\ufeffwgts: &w\n  dtype: sint4\n  low_rank: &l {rank: 8}\n"
    assert load(text).wgts.low_rank == LowRankConfig(rank=8)
    assert "line 4: wgts.rank is not a known key" in error_of(text.replace("&w", "") + "  <<: {rank: 8}\n")


@given(st.binary(max_size=200) | st.text(st.sampled_from("wgts:dype4 \n-[]{}&*a<!?|'\"#,"), max_size=60))
def test_any_other_file_is_a_usage_error(content: bytes | str) -> None:
    error_of(content)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("int4_w4a9", "; did you mean int4_w4a8?"),
        ("int4_w4a8.yml", "; did you mean int4_w4a8?"),
        ("conf/int8_w8a8.yaml", "; did you mean int8_w8a8?"),
        ("zzz", ""),
        ("", ""),
        ("x" * 5000, ""),
    ],
)
def test_missing(name: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_recipe(name)
    assert str(caught.value) == f"no preset or file '{name}'; presets: {PRESETS}{hint}"


def test_directory() -> None:
    Path("conf").mkdir()
    with pytest.raises(UsageError, match=r"^conf is a directory; give a YAML file$"):
        load_recipe("conf")


def test_file_and_preset_of_one_name() -> None:
    for name in ("int8_w8a8", "int8_w8a8.yaml"):
        Path(name).write_text(SINT4)
    assert load_recipe("int8_w8a8").wgts.dtype == "sint8"
    for name in ("int8_w8a8.yaml", "./int8_w8a8"):
        assert load_recipe(name).wgts.dtype == "sint4"


@pytest.mark.parametrize("model", [Recipe, WeightsConfig])
def test_models_are_frozen_and_strict(model: type[BaseModel]) -> None:
    assert model.model_config.get("frozen")
    assert model.model_config.get("strict")
    with pytest.raises(ValidationError):
        model.model_validate({"unknown": 1})
