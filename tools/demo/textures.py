"""Procedural surfaces: a scalar pattern in [0, 1] over pixel coordinates mixes two colours.

Patterns take the coordinate grids `x` and `y` ([h, w], pixels) and a length `unit` in pixels, which sets how
coarse they are.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

Floats = npt.NDArray[np.floating[Any]]
Pattern = Callable[[np.random.Generator, Floats, Floats, float], Floats]


def smooth_noise(rng: np.random.Generator, shape: tuple[int, ...], cell: float) -> Floats:
    """Bicubic noise of shape [h, w] in [0, 1], with features of about `cell` pixels."""
    height, width = shape
    cells = (max(2, math.ceil(height / cell) + 1), max(2, math.ceil(width / cell) + 1))
    coarse = Image.fromarray(rng.random(cells, dtype=np.float32))
    fine = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
    return np.clip(fine, 0, 1)


def _binary(region: npt.NDArray[np.bool_]) -> Floats:
    return np.asarray(region, dtype=np.float32)


def _turned(rng: np.random.Generator, x: Floats, y: Floats) -> Floats:
    """The coordinate along a random direction, in pixels."""
    angle = rng.uniform(0, 2 * math.pi)
    return x * math.cos(angle) + y * math.sin(angle)


def _wave(rng: np.random.Generator, phase: Floats) -> Floats:
    """A wave over a phase in radians: a sine, or hard-edged one time in two."""
    wave = np.sin(phase)
    return _binary(wave > 0) if rng.random() < 0.5 else 0.5 + 0.5 * wave


def flat(rng: np.random.Generator, x: Floats, y: Floats, unit: float) -> Floats:
    return np.zeros_like(x)


def gradient(rng: np.random.Generator, x: Floats, y: Floats, unit: float) -> Floats:
    along = _turned(rng, x, y)
    along -= along.min()
    return along / max(float(along.max()), 1.0)


def radial(rng: np.random.Generator, x: Floats, y: Floats, unit: float) -> Floats:
    x0, y0 = rng.uniform(x.min(), x.max() + 1), rng.uniform(y.min(), y.max() + 1)
    radius: Floats = np.hypot(x - x0, y - y0)
    return radius / max(float(radius.max()), 1.0)


def stripes(rng: np.random.Generator, x: Floats, y: Floats, unit: float) -> Floats:
    return _wave(rng, _turned(rng, x, y) * (2 * math.pi / unit))


def waves(rng: np.random.Generator, x: Floats, y: Floats, unit: float) -> Floats:
    """Stripes bent by smooth noise, as of wood or marble."""
    bend = smooth_noise(rng, x.shape, cell=2 * unit) * rng.uniform(3, 8)
    return _wave(rng, _turned(rng, x, y) * (2 * math.pi / unit) + bend)


def checks(rng: np.random.Generator, x: Floats, y: Floats, unit: float) -> Floats:
    angle, step = rng.uniform(0, math.pi), math.pi / unit
    cos, sin = math.cos(angle), math.sin(angle)
    return _binary(np.sin((x * cos + y * sin) * step) * np.sin((y * cos - x * sin) * step) > 0)


def dots(rng: np.random.Generator, x: Floats, y: Floats, unit: float) -> Floats:
    angle, step = rng.uniform(0, math.pi), 2 * math.pi / unit
    cos, sin = math.cos(angle), math.sin(angle)
    wave = np.cos((x * cos + y * sin) * step) + np.cos((y * cos - x * sin) * step)
    return _binary(wave > rng.uniform(0.2, 1))


def clouds(rng: np.random.Generator, x: Floats, y: Floats, unit: float) -> Floats:
    return smooth_noise(rng, x.shape, cell=unit)


def spots(rng: np.random.Generator, x: Floats, y: Floats, unit: float) -> Floats:
    """Smooth noise with a hard threshold."""
    return _binary(smooth_noise(rng, x.shape, cell=unit) > rng.uniform(0.4, 0.65))


def halves(rng: np.random.Generator, x: Floats, y: Floats, unit: float) -> Floats:
    """Two plain regions: an edge inside one object, or a horizon."""
    along = _turned(rng, x, y)
    cut = rng.uniform(0.3, 0.7)
    return _binary(along > along.min() * (1 - cut) + along.max() * cut)


def tiles(rng: np.random.Generator, x: Floats, y: Floats, unit: float) -> Floats:
    """Tiles, planks or bricks: plain, with thin joints."""
    aspect = rng.uniform(1, 4)
    row = np.floor(y / unit)
    shifted = x + (row % 2) * (unit * aspect * rng.integers(0, 2) / 2)
    joint = max(1.0, unit * 0.08)
    return _binary((y % unit < joint) | (shifted % (unit * aspect) < joint))


PATTERNS: tuple[Pattern, ...] = (
    flat, flat, gradient, gradient, radial, stripes, waves, checks, dots, clouds, clouds, spots, halves,
    tiles,
)  # fmt: skip


def random_color(rng: np.random.Generator) -> Floats:
    """An RGB colour [3] in [0, 255], vivid or greyish, rarely near black or white."""
    hue = rng.uniform(0, 2 * math.pi)
    wheel = 0.5 + 0.5 * np.cos(hue - np.array([0, 2 * math.pi / 3, 4 * math.pi / 3]))
    saturation = rng.beta(1.2, 1.2)
    value = rng.uniform(30, 245)
    return (value * (1 - saturation * (1 - wheel))).astype(np.float32)


def surface(rng: np.random.Generator, x: Floats, y: Floats, color: Floats, contrast: float, unit: float) -> Floats:
    """A textured surface.

    Args:
        rng: the source of every choice.
        x: [h, w], column of each pixel.
        y: [h, w], row of each pixel.
        color: [3], RGB in [0, 255], the colour that dominates.
        contrast: how far the second colour may lie from it, as a share of the way to a random colour.
        unit: the pattern's length in pixels.

    Returns:
        [h, w, 3], RGB in about [0, 255].
    """
    pattern = PATTERNS[int(rng.integers(len(PATTERNS)))](rng, x, y, unit)
    other = color + (random_color(rng) - color) * contrast
    rgb = color + (other - color) * pattern[..., None]
    if rng.random() < 0.4:
        mottle = smooth_noise(rng, x.shape, cell=rng.uniform(1.5, 6)) - 0.5
        rgb += mottle[..., None] * rng.uniform(10, 50)
    return rgb
