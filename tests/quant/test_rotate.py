"""Rotation of attention values: orthogonal, spreading, exact."""

from __future__ import annotations

import copy

import pytest
import torch
from small_model import outputs, pixels, relative, small_sam2
from torch import Tensor, nn
from transformers import Sam2Model

from samq.calib.parts import ImageEncoder
from samq.quant.rotate import (
    mean_keeping_rotation,
    rotate_inputs,
    rotate_values,
    runtime_rotation,
    spreading_rotation,
)
from samq.quant.sites import FoldSite, fold_sites

SITES = [site for site in fold_sites(small_sam2()) if site.heads is not None]


@pytest.mark.parametrize("width", [1, 2, 3, 8, 12, 16, 24, 32, 36, 48, 56, 72, 96, 112, 144])
def test_orthogonal_with_entries_of_like_size(width: int) -> None:
    rotation = spreading_rotation(width)
    assert rotation.dtype == torch.float64
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(width, dtype=torch.float64), rtol=0, atol=1e-12)
    assert float(rotation.abs().max()) <= (2 / width) ** 0.5 + 1e-12
    if width != 3:  # all others have a Hadamard matrix
        assert float(rotation.abs().max()) == pytest.approx(width**-0.5)


@pytest.mark.parametrize("width", [8, 24, 56])
def test_one_outlier_is_spread(width: int) -> None:
    outlier = torch.zeros(width, dtype=torch.float64)
    outlier[width // 2] = 1
    assert float((spreading_rotation(width) @ outlier).abs().max()) <= (2 / width) ** 0.5 + 1e-12


@pytest.mark.parametrize("width", [1, 2, 3, 18, 32, 48, 96, 112, 144, 200])
def test_a_rotation_that_keeps_means(width: int) -> None:
    rotation, ones = mean_keeping_rotation(width), torch.ones(width, dtype=torch.float64)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(width, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(rotation @ ones, ones, rtol=0, atol=1e-11)
    if width >= 32:
        assert float(rotation.abs().max()) < 5 * width**-0.5
        assert float(rotation.pow(4).mean()) < 1.2 * 3 / width**2  # no more peaked than a random rotation


@pytest.mark.parametrize("site", SITES, ids=lambda site: site.source)
def test_each_attention_stays_exact(small_model: Sam2Model, site: FoldSite) -> None:
    rotated = copy.deepcopy(small_model)
    rotate_values(rotated, site)
    weights = [model.get_submodule(site.layers[0]).weight for model in (small_model, rotated)]
    assert relative(weights[1] - weights[0], weights[0]) > 0.5
    for after, before in zip(outputs(rotated), outputs(small_model), strict=True):
        assert relative(after - before, before) < 2e-5


def test_the_output_projection_sees_rotated_heads(small_model: Sam2Model) -> None:
    site = next(site for site in SITES if site.heads == 2)
    rotated, seen = copy.deepcopy(small_model), []
    rotate_values(rotated, site)

    def hook(module: nn.Module, args: tuple[Tensor]) -> None:
        seen.append(args[0].detach())

    for model in (small_model, rotated):
        handle = model.get_submodule(site.layers[0]).register_forward_pre_hook(hook)
        with torch.no_grad():
            ImageEncoder(model)(pixels(1))
        handle.remove()
    before, after = (x.unflatten(-1, (2, -1)).double() for x in seen)
    rotation = spreading_rotation(before.shape[-1])
    torch.testing.assert_close(after, before @ rotation.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("width", [1, 3, 12, 32, 88, 112, 200])
def test_a_rotation_at_run_time_is_made_of_fp16_numbers(width: int) -> None:
    rotation = runtime_rotation(width)
    assert rotation.dtype == torch.float32
    assert torch.equal(rotation.half().float(), rotation)
    gram, exact = rotation.double() @ rotation.double().T, torch.eye(width, dtype=torch.float64)
    torch.testing.assert_close(gram, exact, rtol=0, atol=2**-10)
    torch.testing.assert_close(rotation.double(), spreading_rotation(width), rtol=2**-11, atol=1e-7)
    assert runtime_rotation(width) is rotation  # which layers of one width share


@pytest.mark.parametrize("width", [3, 12, 32, 88, 200])
def test_a_layer_with_rotated_inputs_puts_out_the_same(width: int) -> None:
    """x Wᵀ in float64, from the definition; and by the layer itself, whose hook rotates."""
    torch.manual_seed(0)
    layer, x = nn.Linear(width, 24), torch.randn(50, width, dtype=torch.float64)
    weight, bias = layer.weight.detach().double().clone(), layer.bias.detach().double()
    rotation = rotate_inputs(layer)
    assert torch.equal(rotation, runtime_rotation(width).double())
    assert relative(layer.weight.detach() - weight, weight) > 0.5
    rotated = (x @ rotation.T) @ layer.weight.detach().double().T
    assert relative(rotated - x @ weight.T, x @ weight.T) < 1e-6
    found = layer(x.float()).detach()
    assert relative(found - (x @ weight.T + bias), found) < 1e-5
