"""Points embedded in the form for engines are transformers' points."""

from __future__ import annotations

import copy

import pytest
import torch
from small_model import IMAGE_SIZE, small_sam2

from samq.export.prompts import for_engines

LABELS = (-10, -1, 0, 1, 2, 3)


@pytest.mark.parametrize("pad", [False, True])
def test_points_of_every_label_are_embedded_bit_for_bit(pad: bool) -> None:
    encoder = small_sam2().prompt_encoder
    generator = torch.Generator().manual_seed(0)
    points = (torch.rand(2, 3, len(LABELS), 2, generator=generator) * 1.5 - 0.25) * IMAGE_SIZE
    labels = torch.stack([torch.tensor(LABELS).roll(shift) for shift in range(6)]).reshape(2, 3, -1)
    with torch.no_grad():
        expected = encoder._embed_points(points.clone(), labels, pad)
        found = for_engines(encoder)._embed_points(points, labels, pad)
    assert torch.equal(found, expected)
    assert found.shape[2] == len(LABELS) + pad


def test_the_module_itself_stays_and_shares_its_weights() -> None:
    encoder = small_sam2().prompt_encoder
    before = copy.deepcopy(encoder.state_dict())
    view = for_engines(encoder)
    assert view.state_dict().keys() == before.keys()
    assert view.point_embed.weight is encoder.point_embed.weight
    assert type(encoder)._embed_points is encoder._embed_points.__func__  # type: ignore[attr-defined]
