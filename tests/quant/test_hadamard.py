"""Hadamard matrices by construction: entries of one size, orthogonal rows, and which orders there are."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from samq.quant.hadamard import hadamard

WIDTHS = [base << shift for base in (96, 112, 144) for shift in range(4)]


@given(st.integers(1, 600))
@settings(max_examples=80)
def test_rows_are_orthogonal_where_there_is_one(order: int) -> None:
    matrix = hadamard(order)
    if matrix is None:
        assert order & (order - 1), "Sylvester has every power of two"
        return
    assert matrix.shape == (order, order)
    assert bool((matrix.abs() == 1).all())
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize("order", [1, 2, 4, 12, 20, 24, 28, 36, 44, 48, 56, 60, 68, 72, 80, 84, 256, *WIDTHS])
def test_orders_that_must_be_there(order: int) -> None:
    assert hadamard(order) is not None


@pytest.mark.parametrize("order", [3, 6, 10, 18, 30, 92])
def test_orders_that_no_matrix_or_none_of_these_constructions_has(order: int) -> None:
    assert hadamard(order) is None


def test_widths_are_kronecker_products_of_a_small_matrix() -> None:
    """96 = 2 · 2 · 2 · 12: the same signs in every block of 12."""
    for width, core in ((96, 12), (112, 28), (144, 36)):
        matrix, small = hadamard(width), hadamard(core)
        assert matrix is not None
        assert small is not None
        for i in range(0, width, core):
            for j in range(0, width, core):
                block = matrix[i : i + core, j : j + core]
                assert torch.equal(block, small) or torch.equal(block, -small)
