"""Hiera, SAM 2's backbone (arXiv 2306.00989, 2408.00714), written for engines: the function of transformers' module.

transformers splits the tokens into windows before each attention and joins them behind it. Whatever works on single
tokens (normalization, linear layers, residuals) does not care about their order, so here they stay in the order that
the next attention wants, and are moved only where that order changes. Exact:

    join(f(split(x))) = f(x)                    for f on single tokens, so join ∘ split between equal windows vanishes
    split(pool(x)) = pool(split(x))             where pooling cells lie within windows
    proj(join(x)) = join(proj(x))               for the projection behind the attention, which then skips the filling
    softmax(s·(q kᵀ)) v = softmax((s·q) kᵀ) v

A window that reaches over the edge of the grid is filled up with tokens that are zero behind the first normalization,
as transformers does. Such windows are split and joined for each attention, or their filling is carried along from block
to block (`carry_padding`), which saves the moves and pays with work on the filling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.sam2.modeling_sam2 import (
    Sam2HieraDetModel,
    Sam2HieraDetModelOutput,
    Sam2MultiScaleAttention,
    Sam2MultiScaleBlock,
)

Stride = tuple[int, int]


@dataclass(frozen=True)
class Layout:
    """The order of the tokens [B, N, C] of a grid: by rows, or window after window and by rows in each.

    Args:
        height, width: of the grid.
        window: side of the windows, 0 for none.
    """

    height: int
    width: int
    window: int = 0

    @property
    def rows(self) -> int:
        """Windows from top to bottom."""
        return -(-self.height // self.window)

    @property
    def columns(self) -> int:
        """Windows from left to right."""
        return -(-self.width // self.window)

    @property
    def is_padded(self) -> bool:
        """Some windows reach over the edge."""
        return self.window > 0 and (self.height % self.window > 0 or self.width % self.window > 0)

    @property
    def blocks(self) -> tuple[int, int, int]:
        """How many blocks attend within themselves, and the height and width of each."""
        return (self.rows * self.columns, self.window, self.window) if self.window else (1, self.height, self.width)

    def pooled(self, stride: Stride) -> Layout:
        """The layout after pooling cells of `stride` within the blocks."""
        down, across = stride
        return Layout(self.height // down, self.width // across, self.window // down)

    def inside(self) -> Tensor:
        """1 for tokens of the grid and 0 for filling: float [N, 1]."""
        return split(torch.ones(1, self.height * self.width, 1), self)[0]


def split(tokens: Tensor, layout: Layout) -> Tensor:
    """Tokens [B, H·W, C] in order of rows, brought to a layout: [B, N, C], filled up with zeros."""
    if not layout.window:
        return tokens
    batch, _, channels = tokens.shape
    side, rows, columns = layout.window, layout.rows, layout.columns
    grid = tokens.reshape(batch, layout.height, layout.width, channels)
    if layout.is_padded:
        grid = F.pad(grid, (0, 0, 0, columns * side - layout.width, 0, rows * side - layout.height))
    windows = grid.reshape(batch, rows, side, columns, side, channels).transpose(2, 3)
    return windows.reshape(batch, rows * columns * side * side, channels)


def join(tokens: Tensor, layout: Layout) -> Tensor:
    """Inverse of `split`, which drops the filling: [B, N, C] → [B, H·W, C]."""
    if not layout.window:
        return tokens
    batch, _, channels = tokens.shape
    side, rows, columns = layout.window, layout.rows, layout.columns
    grid = tokens.reshape(batch, rows, columns, side, side, channels).transpose(2, 3)
    grid = grid.reshape(batch, rows * side, columns * side, channels)[:, : layout.height, : layout.width]
    return grid.reshape(batch, layout.height * layout.width, channels)


def moved(tokens: Tensor, old: Layout, new: Layout) -> Tensor:
    """Tokens [B, N, C] of one layout in another one of the same grid."""
    return tokens if old == new else split(join(tokens, old), new)


def on_grid(tokens: Tensor, layout: Layout) -> Tensor:
    """Tokens [B, N, C] of a layout as a grid [B, H, W, C]."""
    return join(tokens, layout).reshape(-1, layout.height, layout.width, tokens.shape[-1])


def pool(tokens: Tensor, layout: Layout, stride: Stride) -> Tensor:
    """Maximum of each cell of `stride`, which divides the blocks: [B, N, C] → [B, N / cell, C]."""
    down, across = stride
    batch, _, channels = tokens.shape
    count, height, width = layout.blocks
    cells = tokens.reshape(batch * count, height // down, down, width // across, across, channels)
    return cells.amax(dim=(2, 4)).reshape(batch, count * (height // down) * (width // across), channels)


class EngineHiera(nn.Module):
    """`Sam2HieraDetModel` with its own modules and another order of the tokens.

    Args:
        backbone: the module that it stands for; parameters are shared and keep their names.
        carry_padding: see the module's docstring.
        mark: called with the tokens behind each block and the block's number; its answer stands for them.
    """

    def __init__(
        self,
        backbone: Sam2HieraDetModel,
        *,
        carry_padding: bool = False,
        mark: Callable[[Tensor, int], Tensor] = lambda tokens, _: tokens,
    ) -> None:
        super().__init__()
        self._mark = mark
        self.patch_embed: nn.Module = backbone.patch_embed
        self.blocks: Iterable[Sam2MultiScaleBlock] = backbone.blocks  # type: ignore[assignment]
        self.pos_embed, self.pos_embed_window = backbone.pos_embed, backbone.pos_embed_window
        self._stage_ends = frozenset(backbone.stage_ends)
        self._carries_padding = carry_padding

    def forward(self, pixel_values: Tensor, **_: Any) -> Sam2HieraDetModelOutput:
        """Pixels [B, 3, S, S] → the tokens [B, H, W, C] at the end of each stage."""
        ends = tuple(on_grid(tokens, layout) for tokens, layout in self.stages(pixel_values))
        return Sam2HieraDetModelOutput(last_hidden_state=ends[-1], intermediate_hidden_states=ends)

    def stages(self, pixel_values: Tensor) -> list[tuple[Tensor, Layout]]:
        """Pixels [B, 3, S, S] → the tokens [B, N, C] at the end of each stage, in the layout of its last block."""
        patches = self.patch_embed(pixel_values)
        layout = Layout(*patches.shape[1:3])
        home = self._home(next(iter(self.blocks)), layout)
        position = Sam2HieraDetModel._get_pos_embed(cast(Sam2HieraDetModel, self), (layout.height, layout.width))
        tokens = split(patches.flatten(1, 2), home) + split(position.flatten(1, 2), home)
        layout, ends = home, []
        for index, block in enumerate(self.blocks):
            home = self._home(block, layout)
            tokens, layout = self._block(block, moved(tokens, layout, home), home)
            tokens = self._mark(tokens, index)
            if index in self._stage_ends:
                ends.append((tokens, layout))
        return ends

    def _home(self, block: Sam2MultiScaleBlock, layout: Layout) -> Layout:
        """The layout in which a block takes its tokens."""
        windows = Layout(layout.height, layout.width, block.window_size)
        return Layout(layout.height, layout.width) if windows.is_padded and not self._carries_padding else windows

    def _block(self, block: Sam2MultiScaleBlock, tokens: Tensor, home: Layout) -> tuple[Tensor, Layout]:
        """`Sam2MultiScaleBlock.forward`: tokens [B, N, C] in their layout → [B, N', C'] in theirs."""
        stride = _stride(block.query_stride)
        windows = Layout(home.height, home.width, block.window_size)
        normed = block.layer_norm1(tokens)
        residual = tokens
        if block.dim != block.dim_out:
            residual = block.proj(normed)
            residual = pool(residual, home, stride) if stride else residual
        if home == windows and home.is_padded:
            normed = normed * home.inside()
        attended = _attend(block.attn, moved(normed, home, windows), windows)
        if stride:
            home, windows = home.pooled(stride), windows.pooled(stride)
        tokens = residual + block.attn.proj(moved(attended, windows, home))
        return tokens + block.mlp(block.layer_norm2(tokens)), home


def _stride(configured: Any) -> Stride | None:
    """Configurations read from JSON hold a list."""
    return None if configured is None else (int(configured[0]), int(configured[1]))


def _attend(attention: Sam2MultiScaleAttention, tokens: Tensor, layout: Layout) -> Tensor:
    """`Sam2MultiScaleAttention.forward` within each block of the layout, but for `proj`: [B, N, C] → [B, N', C']."""
    batch, width, stride = tokens.shape[0], attention.dim_out, _stride(attention.query_stride)
    heads, blocks = attention.num_attention_heads, batch * layout.blocks[0]
    query, key, value = attention.qkv(tokens).split(width, dim=-1)
    query = query * attention.scale
    if stride:
        query = pool(query, layout, stride)
    count = query.shape[1]
    query, key, value = (
        part.reshape(blocks, -1, heads, width // heads).transpose(1, 2) for part in (query, key, value)
    )
    weights = (query @ key.transpose(2, 3)).softmax(dim=-1)
    attended: Tensor = (weights @ value).transpose(1, 2).reshape(batch, count, width)
    return attended
