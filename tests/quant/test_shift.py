"""Channel-wise shifting: equations 1 and 2 in NumPy, and exactness on the whole model."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_model import outputs, relative, small_sam2
from tiny_modules import Tiny, decoder_attention, hiera_attention, layer_norm, normal
from torch import nn
from transformers import Sam2Model

from samq.quant.shift import fold_offset, middle
from samq.quant.sites import FoldSite, fold_sites

SITES = [site for site in fold_sites(small_sam2()) if site.takes_offset]


def rows_of(width: int, seed: int) -> torch.Tensor:
    """Inputs whose channels have ranges and offsets of all sizes."""
    generator = torch.Generator().manual_seed(seed)
    spread, far = (10 ** (2 * torch.rand(width, generator=generator) - 1) for _ in range(2))
    return spread * torch.randn(50, width, generator=generator) + far


@given(st.integers(0, 1000))
def test_the_middle_is_equation_2_and_makes_ranges_as_small_as_any_offset_can(seed: int) -> None:
    x = rows_of(8, seed)
    z = middle(x.amin(0), x.amax(0))
    exact = x.double().numpy()
    np.testing.assert_allclose(z.numpy(), (exact.max(0) + exact.min(0)) / 2, rtol=1e-5, atol=1e-6)
    half_width = (x.amax(0) - x.amin(0)) / 2
    torch.testing.assert_close((x - z).abs().amax(0), half_width, rtol=1e-4, atol=1e-5)


@given(st.integers(0, 1000))
def test_a_fold_is_equation_1(seed: int) -> None:
    """LayerNorm, then a linear layer: (x − z) Wᵀ + (b + W z) = x Wᵀ + b, in float64."""
    torch.manual_seed(seed)
    model = nn.ModuleDict({"norm": nn.LayerNorm(8), "linear": nn.Linear(8, 5)})
    weight, bias = (p.detach().double().clone() for p in model["linear"].parameters())
    z = rows_of(8, seed)[0]
    fold_offset(model, FoldSite("norm", (0, 8), ("linear",), takes_offset=True), z)
    assert torch.equal(model["norm"].bias, -z)
    assert torch.equal(model["linear"].weight.double(), weight)
    torch.testing.assert_close(model["linear"].bias.double(), bias + weight @ z.double(), rtol=1e-6, atol=1e-6)
    x = rows_of(8, seed + 1).double().numpy()
    shifted = (x - z.double().numpy()) @ weight.numpy().T + model["linear"].bias.detach().double().numpy()
    np.testing.assert_allclose(shifted, x @ weight.numpy().T + bias.numpy(), rtol=1e-5, atol=1e-4)


KINDS: dict[str, Callable[[int, int], Tiny]] = {
    "LayerNorm": layer_norm,
    "values of the encoder": lambda width, seed: hiera_attention(width, 1 + seed % 3, seed),
    "values of the decoder": lambda width, seed: decoder_attention(width, 1 + seed % 3, seed),
}


@pytest.mark.parametrize("kind", KINDS)
@given(width=st.integers(1, 12), seed=st.integers(0, 999))
@settings(max_examples=25)
def test_a_fold_is_exact_wherever_one_is_possible(kind: str, width: int, seed: int) -> None:
    """In float64; and with the readers' biases as they were, another function."""
    for readers in (True, False):
        tiny = KINDS[kind](width, seed)
        before = tiny.run()
        sites = [site for site in tiny.sites if site.takes_offset]
        assert sites
        for index, site in enumerate(sites):
            layers = site.layers_in(tiny.model)
            before_it = [layer.bias.clone() for layer in layers]
            fold_offset(tiny.model, site, 1 + normal(site.rows[1] - site.rows[0], seed=10 * seed + index).abs())
            if not readers:
                for layer, bias in zip(layers, before_it, strict=True):
                    layer.bias.data = bias
        change = relative(tiny.run() - before, before)
        assert change < 1e-12 if readers else change > 1e-6


@pytest.mark.parametrize("far", [0.1, 10.0])
def test_every_fold_together_is_exact(small_model: Sam2Model, far: float) -> None:
    shifted = copy.deepcopy(small_model)
    for index, site in enumerate(SITES):
        generator = torch.Generator().manual_seed(index)
        fold_offset(shifted, site, far * torch.randn(site.rows[1] - site.rows[0], generator=generator))
    for after, before in zip(outputs(shifted), outputs(small_model), strict=True):
        assert relative(after - before, before) < 2e-5 * max(1, far)


def test_elsewhere_it_is_refused(small_model: Sam2Model) -> None:
    refused = [site for site in fold_sites(small_model) if not site.takes_offset]
    assert refused
    for site in refused:
        with pytest.raises(AssertionError):
            fold_offset(copy.deepcopy(small_model), site, torch.zeros(site.rows[1] - site.rows[0]))
