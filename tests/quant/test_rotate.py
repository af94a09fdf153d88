"""Rotation of attention values: orthogonal, spreading, exact."""

from __future__ import annotations

import copy

import pytest
import torch
from small_model import outputs, pixels, relative, small_sam2
from torch import Tensor, nn
from transformers import Sam2Model

from samq.calib.parts import ImageEncoder
from samq.quant.rotate import mean_keeping_rotation, rotate_values, spreading_rotation
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
