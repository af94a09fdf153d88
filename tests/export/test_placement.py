"""Placements: files, patterns, and what the lowering makes of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from exported import as_written
from lowered import FLIPPED_CODES, distance, feeds, static_form

from samq.calib.parts import IMAGE_ENCODER
from samq.errors import UsageError
from samq.export.lower_tensorrt import PLACED, lower_for_tensorrt
from samq.export.lowered_layer import FLOAT_GEMM, INT8_GEMM
from samq.export.placement import EVERYWHERE, Figure, Form, Placement, fastest, load_placement
from samq.export.tensorrt_targets import TARGETS, TRT8, TRT10, TensorRtTarget

BLOCK = "vision_encoder.backbone.blocks"


def test_the_first_pattern_decides() -> None:
    placement = Placement(layers={f"{BLOCK}.1.mlp.*": "fold", f"{BLOCK}.1.*": "fp16"})
    assert placement.form(f"{BLOCK}.1.mlp.proj_in") == "fold"
    assert placement.form(f"{BLOCK}.1.attn.qkv") == "fp16"
    assert placement.form(f"{BLOCK}.10.attn.qkv") == "int8"
    assert EVERYWHERE.form("anything") == "int8"
    mlps = Placement(layers={f"{BLOCK}.*": "mlp"})
    assert [mlps.form(f"{BLOCK}.3.{layer}") for layer in ("mlp.proj_in", "attn.qkv")] == ["int8", "fp16"]


def figures(**forms: tuple[float, float]) -> dict[Form, Figure]:
    """Milliseconds and error of each form."""
    return {form: Figure(milliseconds=taken, error=error) for form, (taken, error) in forms.items()}  # type: ignore[misc]


def test_a_file_is_read_back_equal(tmp_path: Path) -> None:
    failed = Figure(refused="no implementation", structure="a1")
    blocks = {f"{BLOCK}.0": figures(fp16=(0.2, 0.01), int8=(0.1, 0.02)), f"{BLOCK}.1": {"fp16": failed}}
    placement = fastest(blocks, "H100", "8.6.0")  # type: ignore[arg-type]
    assert placement.layers == {f"{BLOCK}.0.*": "int8", f"{BLOCK}.*": "fp16"}
    assert load_placement(placement.save(tmp_path / "placement.yaml")) == placement


@pytest.mark.parametrize(
    ("forms", "wins"),
    [
        ({"fp16": (0.20, 0.02), "int8": (0.17, 0.02)}, "int8"),
        ({"fp16": (0.20, 0.02), "int8": (0.17, 0.04)}, "fp16"),  # within the larger of the spreads
        ({"fp16": (0.20, 0.04), "int8": (0.17, 0.02)}, "fp16"),
        ({"fp16": (0.20, 0.00), "branch": (0.15, 0.00), "fold": (0.14, 0.00)}, "fold"),
        ({"fp16": (0.20, 0.00), "branch": (0.15, 0.02), "fold": (0.14, 0.02)}, "branch"),  # the more exact one
        ({"fp16": (0.20, 0.00), "branch": (0.25, 0.00), "fold": (0.19, 0.00)}, "fold"),
        ({"fold": (0.19, 0.00)}, "fold"),
    ],
)
def test_the_faster_form_wins_by_more_than_the_spread(forms: dict[Form, tuple[float, float]], wins: Form) -> None:
    """Milliseconds and spread of each form."""
    measured = {form: Figure(milliseconds=taken, spread=spread) for form, (taken, spread) in forms.items()}
    assert fastest({f"{BLOCK}.0": measured}, "", "").form(f"{BLOCK}.0.mlp") == wins


def test_refused_and_failed_forms_do_not_win() -> None:
    forms: dict[Form, Figure] = {
        "fp16": Figure(milliseconds=0.2),
        "branch": Figure(refused="no implementation"),
        "fold": Figure(milliseconds=0.1, refused="computes something else"),
    }
    assert fastest({f"{BLOCK}.0": forms}, "", "").form(f"{BLOCK}.0.mlp") == "fp16"


def test_a_budget_goes_where_it_removes_most_error_a_millisecond() -> None:
    """The branch of block 1 removes most per millisecond, then FP16 in block 2."""
    blocks = {
        f"{BLOCK}.0": figures(fp16=(1.0, 0.010), branch=(0.7, 0.020), fold=(0.5, 0.030)),
        f"{BLOCK}.1": figures(fp16=(1.0, 0.010), branch=(0.6, 0.020), fold=(0.5, 0.100)),
        f"{BLOCK}.2": figures(fp16=(1.1, 0.010), branch=(1.2, 0.010), fold=(1.0, 0.060)),
    }

    def forms(budget: float) -> list[Form]:
        placement = fastest(blocks, "", "", budget)
        return [placement.form(f"{block}.mlp") for block in blocks]

    assert forms(0.0) == ["fold", "fold", "fold"]
    assert forms(0.04) == ["fold", "fold", "fold"]
    assert forms(0.05) == ["fold", "branch", "fold"]
    assert forms(0.11) == ["fold", "branch", "fp16"]
    assert forms(0.21) == ["branch", "branch", "fp16"]
    assert forms(1.00) == ["fp16", "fp16", "fp16"]


def test_a_budget_buys_the_ranks_that_remove_most_error_a_millisecond() -> None:
    """Rank 8 removes most, 16 a fifth as much for the same time; the whole branch costs more and adds little."""
    ranks = {"branch": (0.66, 0.025), "branch-16": (0.56, 0.030), "branch-8": (0.53, 0.050), "fold": (0.50, 0.100)}
    blocks = {f"{BLOCK}.0": figures(fp16=(1.0, 0.010), **ranks)}

    def form(budget: float) -> Form:
        return fastest(blocks, "", "", budget).form(f"{BLOCK}.0.mlp")

    assert [form(budget) for budget in (0.05, 0.07, 0.13, 0.33, 1.0)] == [
        "fold",
        "branch-8",
        "branch-16",
        "branch",
        "fp16",
    ]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("layer:\n  a: fp16\n", r"line 1: layer is not a known key; did you mean layers\?"),
        (
            "layers:\n  a: fp32\n",
            r"line 2: layers.a: 'fp32' is not one of fp16, int8, branch, branch-32, branch-16, branch-8",
        ),
    ],
)
def test_a_wrong_file_is_told_by_line(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "placement.yaml").write_text(text)
    with pytest.raises(UsageError, match=told):
        load_placement(tmp_path / "placement.yaml")


@pytest.mark.parametrize("target", [TRT8, TRT10], ids=lambda target: target.name)
def test_layers_are_placed(target: TensorRtTarget) -> None:
    placement = Placement(layers={f"{BLOCK}.0.*": "fp16", f"{BLOCK}.1.*": "fold", "*": "branch"})
    everywhere = lower_for_tensorrt(static_form("int4_svdquant", IMAGE_ENCODER), target)
    lowered = lower_for_tensorrt(static_form("int4_svdquant", IMAGE_ENCODER), target, placement=placement)
    onnx.checker.check_model(ir.to_proto(lowered.model), full_check=True)
    for name, layer in lowered.layers.items():
        if everywhere.layers[name].compute == FLOAT_GEMM:
            continue
        block = name.removeprefix(f"{BLOCK}.").partition(".")[0]
        became = {"0": (FLOAT_GEMM, "folded"), "1": (INT8_GEMM, "folded")}.get(block, (INT8_GEMM, "kept"))
        assert (layer.compute, layer.branch) in (became, (became[0], ""))
        assert layer.reason.startswith(f"{PLACED}; FP16 rounds the weights by up to 0.04") == (block == "0")
        assert bool(layer.reason) == (block == "0")
    given = feeds(lowered.model)
    found, expected = (as_written(form.model, given) for form in (lowered, everywhere))
    assert max(distance(*pair) for pair in zip(found, expected, strict=True)) < FLIPPED_CODES


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda target: target.name)
def test_all_in_fp16_is_the_simulated_weights_in_float(target: TensorRtTarget) -> None:
    """Of a weights-only model, whose inputs are float anyway, nothing changes."""
    placed = lower_for_tensorrt(
        static_form("int4_w4only", IMAGE_ENCODER), target, placement=Placement(layers={"*": "fp16"})
    )
    plain = lower_for_tensorrt(static_form("int4_w4only", IMAGE_ENCODER), target)
    given = feeds(plain.model)
    for found, expected in zip(as_written(placed.model, given), as_written(plain.model, given), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", ["int8_w8a8", "int4_svdquant"])
def test_all_in_fp16_differs_from_the_baseline_in_values_alone(name: str) -> None:
    """So that a refittable plan of the one takes the weights of the other."""
    placed, baseline = (
        lower_for_tensorrt(static_form(form, IMAGE_ENCODER), TRT8, placement=Placement(layers={"*": "fp16"})).model
        for form in (name, "float")
    )
    assert written(placed) == written(baseline)
    assert placed.graph.initializers.keys() == baseline.graph.initializers.keys()


def written(model: ir.Model) -> list[tuple[str | None, str, list[str | None]]]:
    """The nodes, by name, with the names of what they read."""
    return [(n.name, n.op_type, [None if v is None else v.name for v in n.inputs]) for n in model.graph]
