"""Ranks under a budget: against the best of all choices, and what layers get that cannot have one."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from samq.quant.ranks import RANK_STEP, Candidate, share_out


def candidate(steps: list[float], channels: int) -> Candidate:
    """A layer whose steps remove so much, spread evenly over their directions."""
    gains = torch.tensor(sorted(steps, reverse=True), dtype=torch.float64).repeat_interleave(RANK_STEP) / RANK_STEP
    return Candidate(gains, channels)


def removed(candidates: list[Candidate], ranks: list[int]) -> float:
    return sum(float(layer.gains[:rank].sum()) for layer, rank in zip(candidates, ranks, strict=True))


def spent(candidates: list[Candidate], ranks: list[int]) -> int:
    return sum(layer.price(rank) for layer, rank in zip(candidates, ranks, strict=True))


def best_of_all(candidates: list[Candidate], budget: int) -> float:
    choices = [range(0, len(layer.gains) + 1, RANK_STEP) for layer in candidates]
    within = [list(ranks) for ranks in product(*choices) if spent(candidates, list(ranks)) <= budget]
    return max(removed(candidates, ranks) for ranks in within)


LAYERS = st.lists(
    st.tuples(st.lists(st.floats(0.01, 100), min_size=0, max_size=3), st.integers(1, 40)), min_size=1, max_size=4
)


@given(LAYERS, st.integers(0, 4000))
@settings(max_examples=100)
def test_within_the_budget_and_at_most_one_step_from_the_best(
    layers: list[tuple[list[float], int]], budget: int
) -> None:
    candidates = [candidate(steps, channels) for steps, channels in layers]
    ranks = share_out(candidates, budget)
    assert all(
        rank % RANK_STEP == 0 and rank <= len(layer.gains) for rank, layer in zip(ranks, candidates, strict=True)
    )
    assert spent(candidates, ranks) <= budget
    best = best_of_all(candidates, budget)
    largest = max((steps for steps, _ in layers), key=lambda steps: max(steps, default=0))
    assert removed(candidates, ranks) >= best - max(largest, default=0) - 1e-9


@given(st.lists(st.lists(st.floats(0.01, 100), max_size=3), min_size=1, max_size=4), st.integers(0, 12))
@settings(max_examples=100)
def test_layers_of_one_size_get_the_best_of_all_choices(layers: list[list[float]], steps: int) -> None:
    candidates = [candidate(gains, 24) for gains in layers]
    budget = steps * candidates[0].price(RANK_STEP)
    assert removed(candidates, share_out(candidates, budget)) == pytest.approx(best_of_all(candidates, budget))


def test_a_layer_narrower_than_a_step_gets_none() -> None:
    narrow = Candidate(torch.full((RANK_STEP - 1,), 1e6, dtype=torch.float64), 20)
    assert share_out([narrow, candidate([1.0], 20)], 10**6) == [0, RANK_STEP]


def test_cheaper_layers_go_on_where_a_dear_one_stops() -> None:
    dear, cheap = candidate([100.0], 1000), candidate([0.1, 0.05], 10)
    assert share_out([dear, cheap], dear.price(RANK_STEP) - 1) == [0, 2 * RANK_STEP]


def test_of_equal_layers_the_first_is_served_first() -> None:
    equal = [candidate([1.0, 1.0], 16) for _ in range(3)]
    assert share_out(equal, 4 * equal[0].price(RANK_STEP)) == [16, 16, 0]
