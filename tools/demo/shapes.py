"""Outlines of the demo's objects, in a unit frame: solid, pierced (rings, frames, handles) and composed.

An outline is an ordered list of polygons that add to the silhouette or cut out of it, so that a hole is a
later polygon that cuts. Coordinates lie in about [-1, 1]²; `rasterize` places them on a canvas.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

Points = npt.NDArray[np.float64]
Floats = npt.NDArray[np.floating[Any]]

SUPERSAMPLING = 3


class Part(NamedTuple):
    """One polygon of an outline: points [k, 2] as (x, y); `solid` adds it, otherwise it is cut out."""

    points: Points
    solid: bool = True


Outline = list[Part]


class Patch(NamedTuple):
    """The part of an object on the canvas: coverage [h, w] in [0, 1], from row `top` and column `left`."""

    coverage: Floats
    top: int
    left: int


def _arc(start: float, stop: float, radius: float = 1.0, count: int = 48) -> Points:
    angle = np.linspace(start, stop, count)
    return radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _circle(x: float = 0.0, y: float = 0.0, radius: float = 1.0) -> Points:
    return np.array([x, y]) + _arc(0, 2 * math.pi, radius)


def _box(x1: float, y1: float, x2: float, y2: float) -> Points:
    return np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2]])


def _superellipse(exponent: float) -> Points:
    unit = _arc(0, 2 * math.pi)
    return np.sign(unit) * np.abs(unit) ** (2 / exponent)


def _wavy_circle(rng: np.random.Generator, roughness: float) -> Points:
    """A circle whose radius is a random Fourier series of six harmonics."""
    angle = np.linspace(0, 2 * math.pi, 64, endpoint=False)
    order = np.arange(1, 7)
    phase = rng.uniform(0, 2 * math.pi, 6)
    weight = rng.standard_normal(6) * roughness / order
    radius = 1 + (weight * np.cos(angle[:, None] * order + phase)).sum(axis=1)
    radius = np.clip(radius / np.abs(radius).max(), 0.2, 1)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def ellipse(rng: np.random.Generator) -> Outline:
    return [Part(_circle())]


def rectangle(rng: np.random.Generator) -> Outline:
    return [Part(_box(-1, -1, 1, 1))]


def rounded(rng: np.random.Generator) -> Outline:
    return [Part(_superellipse(rng.uniform(2.5, 6)))]


def polygon(rng: np.random.Generator) -> Outline:
    corners = int(rng.integers(3, 9))
    angle = np.sort(2 * math.pi * (np.arange(corners) + rng.uniform(-0.3, 0.3, corners)) / corners)
    radius = rng.uniform(0.75, 1, corners)
    return [Part(np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1))]


def star(rng: np.random.Generator) -> Outline:
    tips = int(rng.integers(4, 9))
    angle = np.arange(2 * tips) * math.pi / tips
    radius = np.where(np.arange(2 * tips) % 2 == 0, 1.0, rng.uniform(0.4, 0.75))
    return [Part(np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1))]


def gear(rng: np.random.Generator) -> Outline:
    teeth = int(rng.integers(6, 13))
    angle = np.linspace(0, 2 * math.pi, 8 * teeth, endpoint=False)
    radius = np.where(np.sin(teeth * angle) > 0, 1.0, rng.uniform(0.72, 0.85))
    outer = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return [Part(outer), Part(_circle(radius=rng.uniform(0.2, 0.5)), solid=False)]


def blob(rng: np.random.Generator) -> Outline:
    return [Part(_wavy_circle(rng, rng.uniform(0.1, 0.5)))]


def crescent(rng: np.random.Generator) -> Outline:
    bite = _circle(x=rng.uniform(0.45, 0.8), radius=rng.uniform(0.75, 0.95))
    return [Part(_circle()), Part(bite, solid=False)]


def ring(rng: np.random.Generator) -> Outline:
    outer = _wavy_circle(rng, rng.uniform(0, 0.25))
    return [Part(outer), Part(outer * rng.uniform(0.4, 0.7), solid=False)]


def frame(rng: np.random.Generator) -> Outline:
    x, y = rng.uniform(0.45, 0.75, 2)
    return [Part(_box(-1, -1, 1, 1)), Part(_box(-x, -y, x, y), solid=False)]


def lattice(rng: np.random.Generator) -> Outline:
    columns, rows = rng.integers(1, 4, 2) + np.array([1, 0])
    bar = rng.uniform(0.12, 0.22)
    outline = [Part(_box(-1, -1, 1, 1))]
    x_edges, y_edges = np.linspace(-1, 1, columns + 1), np.linspace(-1, 1, rows + 1)
    for x1, x2 in zip(x_edges[:-1] + bar, x_edges[1:] - bar, strict=True):
        for y1, y2 in zip(y_edges[:-1] + bar, y_edges[1:] - bar, strict=True):
            outline.append(Part(_box(x1, y1, x2, y2), solid=False))
    return outline


def cross(rng: np.random.Generator) -> Outline:
    x, y = rng.uniform(0.22, 0.5, 2)
    return [Part(_box(-x, -1, x, 1)), Part(_box(-1, -y, 1, y))]


def letter(rng: np.random.Generator) -> Outline:
    """L, T, U or H, of one stroke width."""
    stroke = rng.uniform(0.4, 0.65)
    left, right = Part(_box(-1, -1, -1 + stroke, 1)), Part(_box(1 - stroke, -1, 1, 1))
    bottom, middle = Part(_box(-1, 1 - stroke, 1, 1)), Part(_box(-1, -stroke / 2, 1, stroke / 2))
    stem = Part(_box(-stroke / 2, -1, stroke / 2, 1))
    letters = [[left, bottom], [stem, bottom], [left, right, bottom], [left, right, middle]]
    return letters[int(rng.integers(len(letters)))]


def snake(rng: np.random.Generator) -> Outline:
    """A thick curve with round ends."""
    along = np.linspace(-0.8, 0.8, 24)
    sway = rng.uniform(0.2, 0.6) * np.sin(along * rng.uniform(1.5, 4) + rng.uniform(0, 2 * math.pi))
    radius = rng.uniform(0.16, 0.3)
    return [Part(_circle(x, y, radius)) for x, y in zip(along, sway, strict=True)]


def mug(rng: np.random.Generator) -> Outline:
    """A body and a handle that encloses a hole."""
    reach = rng.uniform(0.3, 0.45)
    handle, hole = _circle(0.5, 0, reach), _circle(0.5, 0, reach * rng.uniform(0.5, 0.65))
    return [Part(handle), Part(hole, solid=False), Part(_box(-1, -0.8, 0.45, 0.8))]


def dumbbell(rng: np.random.Generator) -> Outline:
    first, second, bar = rng.uniform(0.3, 0.45), rng.uniform(0.3, 0.45), rng.uniform(0.12, 0.25)
    return [
        Part(_circle(-0.6, 0, first)),
        Part(_circle(0.6, 0, second)),
        Part(_box(-0.6, -bar, 0.6, bar)),
    ]


def arrow(rng: np.random.Generator) -> Outline:
    neck, shaft = rng.uniform(-0.1, 0.3), rng.uniform(0.2, 0.4)
    return [Part(_box(-1, -shaft, neck, shaft)), Part(np.array([[neck, -0.9], [1, 0], [neck, 0.9]]))]


def teardrop(rng: np.random.Generator) -> Outline:
    body = _arc(math.pi / 3, 5 * math.pi / 3, radius=0.6) - np.array([0.3, 0])
    return [Part(np.vstack([body, [[1, 0]]]))]


Shape = Callable[[np.random.Generator], Outline]

SOLID_SHAPES: tuple[Shape, ...] = (
    ellipse,
    rectangle,
    rounded,
    polygon,
    star,
    blob,
    dumbbell,
    cross,
    teardrop,
)
SHAPES: tuple[Shape, ...] = (
    *SOLID_SHAPES, gear, crescent, ring, frame, lattice, letter, snake, mug, arrow,
)  # fmt: skip


def rasterize(outline: Outline, axes: Points, center: Points, size: int) -> Patch | None:
    """Place an outline on a size×size canvas.

    Args:
        outline: the shape, in its unit frame.
        axes: [2, 2], pixels; a unit point p lands at p @ axes + center.
        center: [2], (x, y) in pixels.
        size: height and width of the canvas.

    Returns:
        The clipped patch, or None if nothing of the outline lies on the canvas.
    """
    placed = [part.points @ axes + center for part in outline]
    corners = np.concatenate(placed)
    left, top = np.clip(np.floor(corners.min(axis=0)), 0, size).astype(int)
    right, bottom = np.clip(np.ceil(corners.max(axis=0)), 0, size).astype(int)
    if right <= left or bottom <= top:
        return None
    canvas = Image.new("L", ((right - left) * SUPERSAMPLING, (bottom - top) * SUPERSAMPLING))
    draw = ImageDraw.Draw(canvas)
    for part, points in zip(outline, placed, strict=True):
        corner_list = ((points - (left, top)) * SUPERSAMPLING).ravel().tolist()
        draw.polygon(corner_list, fill=255 if part.solid else 0)
    coverage = np.asarray(canvas.reduce(SUPERSAMPLING), dtype=np.float32) / 255
    return Patch(coverage, int(top), int(left))
