"""Fold sites: all are found, each is exact for any positive scale, and for any offset where it says so."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from small_model import outputs, relative, small_config, small_sam2
from torch import Tensor, nn
from transformers import Sam2Model
from transformers.models.sam2.modeling_sam2 import Sam2HieraDetModel

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


def test_sites_take_an_offset_unless_zeros_or_an_activation_lie_behind_them() -> None:
    taking = {site.source for site in SITES if site.takes_offset}
    backbone = "vision_encoder.backbone.blocks"
    values = {site.source for site in SITES if site.heads is not None}
    norms_of_mlps = {f"{backbone}.{block}.layer_norm2" for block in range(5)}
    # 32, 32, 16, 8 and 8 tokens across; windows of 8, 8, 4, none and 6, which the tokens do not fill
    norms_of_attentions = {f"{backbone}.{block}.layer_norm1" for block in range(4)}
    assert taking == values | norms_of_mlps | norms_of_attentions


@pytest.mark.parametrize(
    ("size", "windows", "padded"),
    [
        (128, [8, 4, 6, 3], {4}),
        (128, [8, 4, 2, 4], set()),
        (128, [8, 5, 6, 4], {2, 4}),
        (112, [4, 2, 7, 7], set()),
        (112, [4, 4, 4, 7], {2, 4}),
    ],
)
def test_padded_windows_are_found(size: int, windows: list[int], padded: set[int]) -> None:
    config = small_config()
    backbone = config.vision_config.backbone_config
    backbone.image_size, backbone.window_size_per_stage = [size, size], windows
    model = Sam2HieraDetModel(backbone)
    seen: set[int] = set()

    def hook(index: int) -> Callable[[nn.Module, tuple[Tensor]], None]:
        def look(module: nn.Module, args: tuple[Tensor]) -> None:
            if bool((args[0] == 0).all(-1).any()):  # tokens that are zero in all channels
                seen.add(index)

        return look

    for index, block in enumerate(model.blocks):
        block.attn.qkv.register_forward_pre_hook(hook(index))
    with torch.no_grad():
        model(torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0)))
    refused = {site.source for site in fold_sites(model) if "layer_norm1" in site.source and not site.takes_offset}
    assert refused == {f"blocks.{index}.layer_norm1" for index in seen}
    assert seen == padded


@pytest.mark.parametrize("site", SITES, ids=lambda site: site.source)
def test_an_offset_is_exact_where_it_is_taken_and_nowhere_else(small_model: Sam2Model, site: FoldSite) -> None:
    before, folded = outputs(small_model), copy.deepcopy(small_model)
    width = site.rows[1] - site.rows[0]
    offset = torch.randn(width, generator=torch.Generator().manual_seed(width))
    with torch.no_grad():
        site.source_in(folded).bias[slice(*site.rows)] -= offset
        for layer in site.layers_in(folded):
            layer.bias += layer.weight @ offset
    change = max(relative(a - b, b) for a, b in zip(outputs(folded), before, strict=True))
    assert change < TOLERANCE if site.takes_offset else change > 20 * TOLERANCE
