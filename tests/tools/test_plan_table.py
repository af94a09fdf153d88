"""What `--dry-run` says of ranks and rotations that shapes alone do not decide."""

from __future__ import annotations

import pytest
from small_model import recipe_of
from transformers import Sam2Model

from samq.calib.parts import PARTS
from samq.quant.streams import POOLED
from samq.tools.plan_table import plan_as_json, print_plan


def test_an_open_rank_is_called_auto(small_model: Sam2Model, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = recipe_of(wgts={"low_rank": {"rank": "auto"}})
    print_plan(small_model, recipe, PARTS)
    line = next(line for line in capsys.readouterr().out.splitlines() if "blocks.0.attn.qkv" in line)
    assert "W4A8, groups of 32 + rank auto" in line
    assert "rank chosen when quantizing" in line
    rows = plan_as_json(small_model, recipe, PARTS)["layers"]
    assert "rank chosen when quantizing (wgts.low_rank.max_overhead)" in {row["ranking"] for row in rows}
    assert {row["rank"] for row in rows} == {0}
    assert any(row["becomes"].endswith(" + rank auto") for row in rows)


def test_streams_that_are_not_rotated_say_why(small_model: Sam2Model, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = recipe_of(rotation={"enabled": True, "residual": True})
    print_plan(small_model, recipe, PARTS)
    lines = capsys.readouterr().out.splitlines()[-4:]
    assert lines[0] == "residual stream of stage 1 (width 32) rotated"
    assert lines[1] == f"residual stream of stage 2 (width 64) not rotated: {POOLED}"
    streams = plan_as_json(small_model, recipe, PARTS)["residual_streams"]
    assert streams[0] == {"stage": 1, "width": 32, "kept_because": None}
    assert [stream["kept_because"] for stream in streams[1:]] == [POOLED] * 3


def test_without_rotation_nothing_is_said_of_streams(
    small_model: Sam2Model, capsys: pytest.CaptureFixture[str]
) -> None:
    print_plan(small_model, recipe_of(), PARTS)
    assert "residual stream of stage" not in capsys.readouterr().out
    assert plan_as_json(small_model, recipe_of(), PARTS)["residual_streams"] == []


def test_what_nothing_smooths_is_told_with_its_reason(
    small_model: Sam2Model, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(**smooth: bool) -> dict[str, str]:
        recipe = recipe_of(smooth={"enabled": True, **smooth})
        rows = plan_as_json(small_model, recipe, PARTS)["layers"]
        print_plan(small_model, recipe, PARTS)
        return {row["name"]: row["not_smoothed_because"] for row in rows if row["not_smoothed_because"]}

    reasons = told()
    layer = "vision_encoder.backbone.blocks.0.mlp.proj_out"
    assert "GELU" in reasons[layer]
    assert f"{layer[:-9]}.proj_in" not in reasons
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith(layer))
    assert line.rstrip().endswith(f"inputs not smoothed: {reasons[layer]}")
    assert told(multiply=True) == told(enabled=False) == {}
