"""What the model is asked in one training step, drawn on the device without a loop over samples.

Each image gets `CLICKS` single clicks and `BOXES` boxes on random objects. A few ask for the background: a
click on it, or a box within it, where the right answer is that there is no object.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from samq.tools.demo.scenes import MAX_OBJECTS, MIN_VISIBLE_AREA

CLICKS, BOXES = 4, 4
BACKGROUND_SHARE = 0.06
CENTRAL_SHARE = 0.6
JITTERED_SHARE = 0.5
ZOOMED_SHARE, MAX_ZOOM = 0.5, 2.2
CELL = 4
"""Pixels of a cell of the grid on which depth inside a mask is measured."""
DEPTHS = 12


class Prompts(NamedTuple):
    """Prompts for B images, with K = CLICKS + BOXES objects each, the clicks' objects first.

    Attributes:
        clicks: float32 [B, CLICKS, 2], (x, y) in pixels.
        boxes: float32 [B, BOXES, 4], (x1, y1, x2, y2) in pixels.
        masks: bool [B, K, H, W], what was asked for.
        present: bool [B, K], false where that is the background.
    """

    clicks: Tensor
    boxes: Tensor
    masks: Tensor
    present: Tensor


def turned(images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Each scene in one of its eight orientations, chosen at random: images [B, H, W, 3], ids [B, H, W]."""
    mirror, flip, transpose = torch.rand(3, len(ids), 1, 1, device=ids.device) < 0.5
    planes = torch.cat([images, ids[..., None]], dim=3)
    planes = torch.where(mirror[..., None], planes.flip(2), planes)
    planes = torch.where(flip[..., None], planes.flip(1), planes)
    planes = torch.where(transpose[..., None], planes.transpose(1, 2), planes)
    return planes[..., :3], planes[..., 3]


def zoomed(images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Some scenes magnified, each about a random place: images [B, H, W, 3], ids [B, H, W], both uint8."""
    count, device = len(ids), ids.device
    chosen = torch.rand(count, device=device) < ZOOMED_SHARE
    side = torch.where(chosen, 1 / torch.empty(count, device=device).uniform_(1, MAX_ZOOM), 1.0)
    shift = (1 - side[:, None]) * torch.empty(count, 2, device=device).uniform_(-1, 1)
    transform = torch.cat([torch.diag_embed(side[:, None].expand(-1, 2)), shift[..., None]], dim=2)
    grid = F.affine_grid(transform, [count, 1, *ids.shape[1:]], align_corners=False)
    planes = F.grid_sample(images.permute(0, 3, 1, 2).float(), grid, padding_mode="border", align_corners=False)
    numbers = F.grid_sample(ids[:, None].float(), grid, mode="nearest", padding_mode="border", align_corners=False)
    return planes.round().to(images.dtype).permute(0, 2, 3, 1), numbers[:, 0].round().to(ids.dtype)


def sample_prompts(ids: Tensor) -> Prompts:
    """Random prompts for scenes given as object numbers, uint8 [B, H, W]."""
    numbers = _choose_objects(ids, CLICKS + BOXES)
    background = (torch.rand(numbers.shape, device=ids.device) < BACKGROUND_SHARE) | (numbers == 0)
    numbers = torch.where(background, 0, numbers).to(ids.dtype)
    masks = ids[:, None] == numbers[..., None, None]
    points, depths = _points_inside(masks)
    box_masks, box_points, box_depths = masks[:, CLICKS:], points[:, CLICKS:], depths[:, CLICKS:]
    within = _boxes_around(box_points, box_depths)
    boxes = torch.where(background[:, CLICKS:, None], within, _jittered(bounding_boxes(box_masks)))
    return Prompts(points[:, :CLICKS], boxes.clamp(0, ids.shape[-1] - 1), masks, ~background)


def _choose_objects(ids: Tensor, count: int) -> Tensor:
    """Numbers [B, count] of random objects, all different while there are enough; 0 where there are none.

    What a magnified scene shows less of than `MIN_VISIBLE_AREA` is not chosen.
    """
    numbers = torch.arange(1, MAX_OBJECTS + 1, device=ids.device)
    exists = (ids[:, None] == numbers[:, None, None]).sum(dim=(2, 3)) >= MIN_VISIBLE_AREA
    order = (torch.rand(exists.shape, device=ids.device) + exists).argsort(dim=1, descending=True)
    repeated = torch.arange(count, device=ids.device) % exists.sum(dim=1, keepdim=True).clamp(min=1)
    chosen = order.gather(1, repeated)
    return numbers[chosen] * exists.gather(1, chosen)


def _points_inside(masks: Tensor) -> tuple[Tensor, Tensor]:
    """A point in each mask [B, K, H, W], mostly a central one, and the distance to the mask's edge there.

    Returns:
        Points float32 [B, K, 2], (x, y) in pixels, and depths [B, K] in pixels, to within a cell or two.
    """
    height, width = masks.shape[-2:]
    depth = _depth(masks)
    central = torch.rand(masks.shape[:2], device=masks.device) < CENTRAL_SHARE
    score = torch.rand(masks.shape, device=masks.device) + 1
    preference = F.interpolate(depth * central[..., None, None], size=(height, width), mode="bilinear")
    position = ((score + 4 * preference) * masks).flatten(2).argmax(dim=2)
    x, y = position % width, position // width
    cell = (y // CELL) * (width // CELL) + x // CELL
    reached = depth.flatten(2).gather(2, cell[..., None])[..., 0] * CELL
    return torch.stack([x, y], dim=-1).float(), reached


def _depth(masks: Tensor) -> Tensor:
    """About how many cells deep [B, K, H/CELL, W/CELL] each cell lies inside its mask and the image."""
    layer = F.avg_pool2d(masks.float(), CELL)
    depth = layer
    for _ in range(DEPTHS):
        layer = -F.max_pool2d(-F.pad(layer, (1, 1, 1, 1)), kernel_size=3, stride=1)
        depth = depth + layer
    return depth


def bounding_boxes(masks: Tensor) -> Tensor:
    """Boxes float32 [..., 4], (x1, y1, x2, y2) in pixels, the last inclusive, of masks [..., H, W]."""
    columns, rows = masks.any(dim=-2).int(), masks.any(dim=-1).int()
    first = [columns.argmax(dim=-1), rows.argmax(dim=-1)]
    last = [line.shape[-1] - 1 - line.flip(-1).argmax(dim=-1) for line in (columns, rows)]
    return torch.stack(first + last, dim=-1).float()


def _boxes_around(points: Tensor, depths: Tensor) -> Tensor:
    """Boxes [..., 4] around points [..., 2] that stay within the depth there, but are not below 7 pixels."""
    reach = (depths * torch.empty_like(depths).uniform_(0.3, 0.8)).clamp(min=3)[..., None]
    return torch.cat([points - reach, points + reach], dim=-1)


def _jittered(boxes: Tensor) -> Tensor:
    """Boxes [..., 4], some with each side moved by about a twentieth of the box's size."""
    size = (boxes[..., 2:] - boxes[..., :2]).repeat(*[1] * (boxes.ndim - 1), 2)
    share = (torch.rand_like(boxes[..., :1]) < JITTERED_SHARE) * 0.05
    return boxes + torch.randn_like(boxes).clamp(-2, 2) * share * size
