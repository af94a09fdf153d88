"""The implementations that the benchmark times do the same work."""

from __future__ import annotations

import pytest
import torch

from samq.quant.config import load_recipe
from samq.quant.plan import LayerPlan
from samq.tools.bench_gptq import Subject, _error, _one_by_one, _plain_loop, _samq, _second_moments


@pytest.fixture(scope="module")
def subject() -> Subject:
    generator = torch.Generator().manual_seed(0)
    sizes = {"a": (24, 160, 80), "b": (16, 32, 32), "c": (24, 160, 80)}
    plans = {name: LayerPlan(name, "image_encoder", k, n, group_size=group) for name, (n, k, group) in sizes.items()}
    weights = {name: torch.randn(n, k, generator=generator) for name, (n, k, _) in sizes.items()}
    return Subject(plans, weights, {name: _second_moments(k, generator) for name, (_, k, _) in sizes.items()})


def test_all_of_them_round_alike(subject: Subject) -> None:
    rows = [
        _samq(subject, load_recipe("int4_w4a8"), torch.device("cpu")),
        _one_by_one(subject),
        _plain_loop(subject),
    ]
    errors = [_error(subject, rounded) for rounded in rows]
    assert errors[0] == errors[1]
    assert errors[2] == pytest.approx(errors[0], rel=0.02)
    for name, weight in subject.weights.items():
        assert torch.equal(rows[0][name], rows[1][name])
        assert (rows[2][name] != rows[0][name]).float().mean() < 0.02
        assert 0 < float((weight - rows[0][name]).norm() / weight.norm()) < 0.2


def test_the_warm_up_takes_the_first_layers(subject: Subject) -> None:
    few = subject.first(2)
    assert list(few.plans) == list(few.weights) == list(few.hessians) == ["a", "b"]
    assert few.weights["b"] is subject.weights["b"]
