"""Maxima over several axes: the same, an axis at a time."""

from __future__ import annotations

import pytest
from test_fuse_attention import fused, graph

from samq.export.axis_maxima import reduce_axis_by_axis

INPUT = "float[b, 3, 2, 4, 2, 5] x"


@pytest.mark.parametrize(("axes", "result"), [("2, 4", "b, 3, 4, 5"), ("4, 2", "b, 3, 4, 5"), ("-2, -4, 1", "b, 4, 5")])
def test_each_axis_gets_a_maximum_of_its_own(axes: str, result: str) -> None:
    model = graph(
        f"axes = Constant <value_ints = [{axes}]> () y = ReduceMax <keepdims = 0> (x, axes)",
        INPUT,
        f"float[{result}] y",
    )
    done, operators = fused(model, reduce_axis_by_axis)
    assert done.count == 1
    assert operators == {"ReduceMax": axes.count(",") + 1}


@pytest.mark.parametrize(("axes", "keep", "result"), [("2", 0, "b, 3, 4, 2, 5"), ("2, 4", 1, "b, 3, 1, 4, 1, 5")])
def test_one_axis_and_axes_that_are_kept_stay(axes: str, keep: int, result: str) -> None:
    body = f"axes = Constant <value_ints = [{axes}]> () y = ReduceMax <keepdims = {keep}> (x, axes)"
    done, operators = fused(graph(body, INPUT, f"float[{result}] y"), reduce_axis_by_axis)
    assert done.count == 0
    assert operators == {"ReduceMax": 1}


def test_a_maximum_over_all_axes_stays() -> None:
    done, _ = fused(graph("y = ReduceMax <keepdims = 0> (x)", INPUT, "float y"), reduce_axis_by_axis)
    assert done.count == 0
