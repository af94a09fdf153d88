"""The prompt encoder's points, written for engines: the function of transformers' module in fewer nodes.

transformers divides the coordinates in place, one after the other, and fills up points and labels with one that is no
point before it embeds them. Traced, that becomes scatters, paddings and shapes computed while running. The embedding of
what is no point is a constant, so here it goes behind the others, and the coordinates are divided at once. Exact.
"""

from __future__ import annotations

import copy
import math
from types import MethodType
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers.models.sam2.modeling_sam2 import Sam2PromptEncoder

NOT_A_POINT, PADDING = -1, -10  # labels


def for_engines(encoder: Sam2PromptEncoder) -> Sam2PromptEncoder:
    """A view of a prompt encoder that embeds points in this form; weights are shared and keep their names."""
    view = copy.copy(encoder)
    view._embed_points = MethodType(_embed_points, view)  # type: ignore[method-assign]
    return view


def _embed_points(self: Sam2PromptEncoder, points: Tensor, labels: Tensor, pad: bool) -> Tensor:
    """`Sam2PromptEncoder._embed_points`: points [B, P, N, 2], labels [B, P, N] → [B, P, N (+ 1), C]."""
    size = cast(int, self.input_image_size)
    centres = 2 * ((points + 0.5) / size) - 1
    angles = 2 * math.pi * (centres @ self.shared_embedding.positional_embedding)
    places = torch.cat([torch.sin(angles), torch.cos(angles)], dim=-1)
    kind = labels.unsqueeze(-1)
    no_point = self.not_a_point_embed.weight
    places = torch.where(kind == NOT_A_POINT, no_point, places)
    places = torch.where(kind == PADDING, 0.0, places)
    embedded: Tensor = places + self.point_embed(labels.clamp(min=0)) * (kind >= 0)
    if not pad:
        return embedded
    last = no_point.expand(*embedded.shape[:2], 1, -1)
    return torch.cat([embedded, last], dim=2)
