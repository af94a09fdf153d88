"""`--dry-run`: what each layer will become, in bytes, and what is skipped and why."""

from __future__ import annotations

import sys
from collections.abc import Collection
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import Sam2Model

from samq.quant.config import AUTO, Recipe
from samq.quant.plan import RANK_IS_OPEN, LayerPlan, describe_request, make_plan
from samq.quant.sites import obstacles
from samq.quant.streams import residual_streams

PIPED_WIDTH = 400  # characters; a file or pager does not wrap, so no cell should


def plan_as_json(model: Sam2Model, recipe: Recipe, parts: Collection[str]) -> dict[str, Any]:
    """The plan as JSON values."""
    plans = make_plan(model, recipe, parts)
    unsmoothed = _unsmoothed(model, recipe)
    rows = [
        asdict(plan) | {"becomes": _becomes(plan, recipe), "not_smoothed_because": unsmoothed.get(plan.name)}
        for plan in plans
    ]
    return {"layers": rows, "total": _totals(plans), "residual_streams": _streams(model, recipe)}


def print_plan(model: Sam2Model, recipe: Recipe, parts: Collection[str]) -> None:
    """The plan as a table on stdout."""
    plans = make_plan(model, recipe, parts)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for title, justify in (
        ("layer", "left"),
        ("K → N", "right"),
        ("becomes", "left"),
        ("bytes", "right"),
        ("", "left"),
    ):
        table.add_column(title, justify=justify, overflow="fold")  # type: ignore[arg-type]
    unsmoothed = _unsmoothed(model, recipe)
    for plan in plans:
        size = f"{plan.fp16_bytes:,} → {plan.planned_bytes:,}" if plan.skip is None else f"{plan.fp16_bytes:,}"
        smoothing = f"inputs not smoothed: {unsmoothed[plan.name]}" if plan.name in unsmoothed else None
        remark = plan.skip or "; ".join(filter(None, (plan.grouping, plan.ranking, smoothing)))
        shape = f"{plan.in_features} → {plan.out_features}"
        table.add_row(plan.name, shape, _becomes(plan, recipe), size, remark)
    console = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=PIPED_WIDTH)
    console.print(table, crop=False)
    totals = _totals(plans)
    console.print(
        f"\n{totals['quantized']} layers quantized, {totals['kept']} kept; "
        f"{totals['fp16_bytes']:,} → {totals['planned_bytes']:,} bytes of weights against FP16"
    )
    for stream in _streams(model, recipe):
        done = f"not rotated: {stream['kept_because']}" if stream["kept_because"] else "rotated"
        console.print(f"residual stream of stage {stream['stage']} (width {stream['width']}) {done}")


def _unsmoothed(model: Sam2Model, recipe: Recipe) -> dict[str, str]:
    """Why nothing absorbs the scales of some layers' inputs, where inputs are smoothed by what absorbs them alone."""
    return obstacles(model) if recipe.smooth.enabled and not recipe.smooth.multiply else {}


def _streams(model: Sam2Model, recipe: Recipe) -> list[dict[str, Any]]:
    """What becomes of each residual stream, when they are to be rotated."""
    if not recipe.rotation.residual:
        return []
    return [
        {"stage": stream.level + 1, "width": stream.width, "kept_because": stream.obstacle}
        for stream in residual_streams(model)
    ]


def _becomes(plan: LayerPlan, recipe: Recipe) -> str:
    if plan.skip is not None:
        return "float"
    rank = AUTO if plan.ranking == RANK_IS_OPEN else plan.rank
    branch = f" + rank {rank}" if rank else ""
    return f"{describe_request(recipe.of_layer(plan.name))}, groups of {plan.group_size}{branch}"


def _totals(plans: list[LayerPlan]) -> dict[str, int]:
    return {
        "quantized": sum(plan.skip is None for plan in plans),
        "kept": sum(plan.skip is not None for plan in plans),
        "fp16_bytes": sum(plan.fp16_bytes for plan in plans),
        "planned_bytes": sum(plan.planned_bytes for plan in plans),
    }
