"""Fold sites: all are found, and each is exact for any positive scale."""

from __future__ import annotations

import copy

import pytest
import torch
from small_model import outputs, relative, small_sam2
from torch import nn
from transformers import Sam2Model

from samq.quant.sites import FoldSite, fold_sites

SITES = fold_sites(small_sam2())
TOLERANCE = 2e-5  # FP32 through the whole model


def test_every_site_of_the_model_is_found() -> None:
    blocks, attentions = 5, 2 * 3 + 1
    relu_pairs = 2 * 1 + (4 + 1 + 1) * 2  # two MLPs of two layers; hypernetworks and two heads of three
    assert len(SITES) == 3 * blocks + attentions + relu_pairs
    assert len({site.layers for site in SITES}) == len(SITES)
    assert len([site for site in SITES if site.heads is not None]) == blocks + attentions


def test_a_block_that_widens_shares_its_norm_with_the_skip_connection() -> None:
    by_source = {site.source: site for site in SITES}
    backbone = "vision_encoder.backbone.blocks"
    assert by_source[f"{backbone}.1.layer_norm1"].layers == (f"{backbone}.1.proj", f"{backbone}.1.attn.qkv")
    assert by_source[f"{backbone}.3.layer_norm1"].layers == (f"{backbone}.3.attn.qkv",)
    assert by_source[f"{backbone}.1.attn.qkv"].rows == (128, 192)


def scale(model: Sam2Model, site: FoldSite, *, source: bool, layers: bool) -> None:
    """Fold random positive factors, into both sides or one only."""
    width = site.rows[1] - site.rows[0]
    factors = 4 ** (2 * torch.rand(width, generator=torch.Generator().manual_seed(width)) - 1)
    with torch.no_grad():
        if source:
            module, rows = site.source_in(model), slice(*site.rows)
            module.weight[rows] /= factors if isinstance(module, nn.LayerNorm) else factors[:, None]
            module.bias[rows] /= factors
        if layers:
            for layer in site.layers_in(model):
                layer.weight *= factors


@pytest.mark.parametrize("site", SITES, ids=lambda site: site.source)
def test_each_fold_is_exact(small_model: Sam2Model, site: FoldSite) -> None:
    before = outputs(small_model)
    folded, broken = copy.deepcopy(small_model), copy.deepcopy(small_model)
    scale(folded, site, source=True, layers=True)
    scale(broken, site, source=False, layers=True)
    after, wrong = outputs(folded), outputs(broken)
    assert max(relative(a - b, b) for a, b in zip(after, before, strict=True)) < TOLERANCE
    # The layer matters to some output, so that the line above could have failed.
    assert max(relative(a - b, b) for a, b in zip(wrong, before, strict=True)) > 20 * TOLERANCE
