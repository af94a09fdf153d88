"""Seeded procedural scenes with exact instance masks: the only data that the demo model ever sees.

A scene is drawn back to front: a textured background, clutter that belongs to no object (scratches, specks,
stains), then 3 to 12 objects with texture, shading and cast shadows that may hide parts of earlier ones, then
the camera (lighting, tone, blur, noise). A mask holds the pixels that an object covers by half or more and no
later one does. Train and held-out scenes use disjoint ranges of seeds. Training scenes alone have, besides, objects
of several parts in several colours, as photographs do.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

from samq.tools.demo.shapes import SHAPES, SOLID_SHAPES, Patch, rasterize
from samq.tools.demo.textures import Floats, random_color, smooth_noise, surface

HELD_OUT_SCENES = 1_000_000
"""Seeds below this number are held out; every seed from it upwards is for training."""

MIN_OBJECTS, MAX_OBJECTS = 3, 12
MIN_DIAMETER, MAX_DIAMETER = 9.0, 140.0
MIN_PIERCED_DIAMETER = 20.0
"""Below it, a hole or a stroke would be lost between pixels, so that smaller objects are compact."""
MIN_VISIBLE_AREA = 36
"""Pixels at 256×256 that an object keeps when later ones are drawn over it."""
MIN_VISIBLE_SHARE = 0.35
CAMOUFLAGE_SHARE = 0.1
TRAIN_COMPOUND_SHARE = 0.25
"""The objects of a training scene that are made of several parts."""
MIN_COMPOUND_DIAMETER = 30.0
MAX_ADDED_PARTS = 5


@dataclass(frozen=True)
class Scene:
    """An image and its objects.

    Attributes:
        image: uint8 [H, W, 3], RGB.
        masks: bool [n, H, W], the visible part of each object; disjoint, none empty, back to front.
    """

    image: npt.NDArray[np.uint8]
    masks: npt.NDArray[np.bool_]


@dataclass
class _Canvas:
    """A scene while it is drawn.

    Attributes:
        rgb: [H, W, 3], colours in about [0, 255].
        ids: [H, W], the number of the object at each pixel, from 1 in the order of drawing; 0 for none.
        drawn: pixels of each object when it was drawn, by its number.
        visible: pixels of each object that no later one hides, by its number.
        light: [2], unit vector (x, y) towards the light.
    """

    rgb: Floats
    ids: npt.NDArray[np.uint8]
    drawn: list[int]
    visible: list[int]
    light: npt.NDArray[np.float64]

    @property
    def size(self) -> int:
        return len(self.ids)

    @property
    def scale(self) -> float:
        """Pixels of this canvas per pixel of a 256×256 one."""
        return self.size / 256


def held_out_scene(index: int, size: int = 256) -> Scene:
    """The scene with this index among those never trained on.

    Raises:
        ValueError: the index is not in [0, HELD_OUT_SCENES).
    """
    if not 0 <= index < HELD_OUT_SCENES:
        raise ValueError(f"held-out scenes are numbered 0 to {HELD_OUT_SCENES - 1}; got {index}")
    return draw_scene(index, size)


def train_scene(index: int, size: int = 256) -> Scene:
    """The training scene with this index, which is 0 or more.

    Raises:
        ValueError: the index is negative.
    """
    if index < 0:
        raise ValueError(f"training scenes are numbered from 0; got {index}")
    return draw_scene(HELD_OUT_SCENES + index, size, TRAIN_COMPOUND_SHARE)


def draw_scene(seed: int, size: int = 256, compound_share: float = 0.0) -> Scene:
    """Draw the scene of a seed; the same arguments give the same scene.

    Args:
        seed: any non-negative integer; use `train_scene` and `held_out_scene` to keep the two apart.
        size: height and width in pixels.
        compound_share: how many of the larger objects are made of several parts, 0 to 1.
    """
    rng = np.random.default_rng(seed)
    angle = rng.uniform(0, 2 * math.pi)
    canvas = _Canvas(
        rgb=_background(rng, size),
        ids=np.zeros((size, size), dtype=np.uint8),
        drawn=[0],
        visible=[0],
        light=np.array([math.cos(angle), math.sin(angle)]),
    )
    _add_objects(rng, canvas, compound_share)
    numbers = np.arange(1, len(canvas.drawn), dtype=np.uint8)
    return Scene(_photograph(rng, canvas), canvas.ids == numbers[:, None, None])


def _background(rng: np.random.Generator, size: int) -> Floats:
    y, x = np.mgrid[:size, :size].astype(np.float32)
    unit = rng.uniform(8, 64) * size / 256
    rgb = surface(rng, x, y, random_color(rng), contrast=rng.uniform(0.1, 0.5), unit=unit)
    _stain(rng, rgb)
    return _scratch(rng, rgb)


def _stain(rng: np.random.Generator, rgb: Floats) -> None:
    """Blend in up to three soft, faint blotches without an edge, in place."""
    size = len(rgb)
    for _ in range(int(rng.integers(0, 4))):
        cell = size / rng.uniform(2, 6)
        strength = smooth_noise(rng, (size, size), cell) * rng.uniform(0, 0.4)
        rgb += (random_color(rng) - rgb) * strength[..., None] ** 2


def _scratch(rng: np.random.Generator, rgb: Floats) -> Floats:
    """The image with thin lines and specks of at most three pixels, which are no objects."""
    size = len(rgb)
    image = Image.fromarray(np.clip(rgb, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(0, 2) * rng.integers(1, 8))):
        ends = rng.uniform(-0.2, 1.2, 4) * size
        draw.line(ends.tolist(), fill=_ink(rng), width=1)
    for _ in range(int(rng.integers(0, 2) * rng.integers(5, 60))):
        x, y = rng.uniform(0, size, 2)
        radius = rng.uniform(0.3, 1.4)
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=_ink(rng))
    return np.array(image, dtype=np.float32)


def _ink(rng: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = random_color(rng).astype(int).tolist()
    return red, green, blue


def _add_objects(rng: np.random.Generator, canvas: _Canvas, compound_share: float) -> None:
    """Add objects, the larger ones mostly first; a try that would hide an earlier object is dropped."""
    count = int(rng.integers(MIN_OBJECTS, MAX_OBJECTS + 1))
    diameters = MIN_DIAMETER * (MAX_DIAMETER / MIN_DIAMETER) ** rng.beta(1.3, 1, count)
    order = np.argsort(-diameters * np.exp(rng.normal(0, 0.5, count)))
    for diameter in diameters[order].tolist():
        patch = _try_object(rng, canvas, diameter)
        if patch and compound_share and diameter >= MIN_COMPOUND_DIAMETER and rng.random() < compound_share:
            _add_parts(rng, canvas, patch, diameter)
    while len(canvas.drawn) <= MIN_OBJECTS:
        _try_object(rng, canvas, MIN_DIAMETER * 1.5)


def _try_object(rng: np.random.Generator, canvas: _Canvas, diameter: float, tries: int = 4) -> Patch | None:
    for _ in range(tries):
        patch = _place(rng, canvas, diameter)
        if patch is not None and _claim(canvas, patch, len(canvas.drawn)):
            _paint(rng, canvas, patch, diameter * canvas.scale)
            return patch
    return None


def _add_parts(rng: np.random.Generator, canvas: _Canvas, body: Patch, diameter: float) -> None:
    """Add parts to the newest object, whose first is `body`: markings within it, and limbs that stick out of it."""
    inside = np.argwhere(body.coverage >= 0.5)
    for _ in range(int(rng.integers(1, MAX_ADDED_PARTS + 1))):
        row, column = inside[int(rng.integers(len(inside)))]
        size = diameter * rng.uniform(0.2, 0.7)
        part = _place(rng, canvas, size, np.array([body.left + column, body.top + row], dtype=float))
        if part is not None and rng.random() < 0.5:
            part = _within(part, body)
        if part is not None and _claim(canvas, part, len(canvas.drawn) - 1):
            _paint(rng, canvas, part, size * canvas.scale)


def _within(part: Patch, body: Patch) -> Patch | None:
    """What of a part lies on the body."""
    (height, width), (body_height, body_width) = part.coverage.shape, body.coverage.shape
    top, left = max(part.top, body.top), max(part.left, body.left)
    bottom, right = min(part.top + height, body.top + body_height), min(part.left + width, body.left + body_width)
    if bottom <= top or right <= left:
        return None
    pieces = (p.coverage[top - p.top : bottom - p.top, left - p.left : right - p.left] for p in (part, body))
    return Patch(np.minimum(*pieces), top, left)


def _place(
    rng: np.random.Generator, canvas: _Canvas, diameter: float, center: npt.NDArray[np.float64] | None = None
) -> Patch | None:
    """A random shape of about this diameter (pixels at 256×256), turned and stretched, at `center` or anywhere."""
    shapes = SHAPES if diameter >= MIN_PIERCED_DIAMETER else SOLID_SHAPES
    outline = shapes[int(rng.integers(len(shapes)))](rng)
    angle = rng.uniform(0, 2 * math.pi) if rng.random() < 0.8 else 0.0
    stretch = math.exp(rng.uniform(-0.45, 0.45))
    radius = diameter * canvas.scale / 2
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    axes = np.diag([radius * stretch, radius / stretch]) @ turn
    center = rng.uniform(0, 1, 2) * canvas.size if center is None else center
    return rasterize(outline, axes, center, canvas.size)


def _claim(canvas: _Canvas, patch: Patch, number: int) -> bool:
    """Give the patch's pixels to an object, the newest or a new one, which must be large enough to be seen.

    Returns:
        Whether that was done; it is not where another object would be left too little to see.
    """
    least = MIN_VISIBLE_AREA * canvas.scale**2
    mask = patch.coverage >= 0.5
    area = int(mask.sum())
    is_new = number == len(canvas.drawn)
    if is_new and area < least:
        return False
    height, width = mask.shape
    window = canvas.ids[patch.top : patch.top + height, patch.left : patch.left + width]
    hidden = np.bincount(window[mask], minlength=len(canvas.drawn) + is_new).tolist()
    for other in range(1, number):
        left = canvas.visible[other] - hidden[other]
        if hidden[other] and left < max(least, MIN_VISIBLE_SHARE * canvas.drawn[other]):
            return False
    if is_new:
        canvas.drawn.append(0)
        canvas.visible.append(0)
    canvas.visible = [before - lost for before, lost in zip(canvas.visible, hidden, strict=True)]
    canvas.visible[number] += area
    canvas.drawn[number] += area - hidden[number]
    window[mask] = number
    return True


def _paint(rng: np.random.Generator, canvas: _Canvas, patch: Patch, diameter: float) -> None:
    """Paint an object of this diameter (pixels) and the shadow it casts."""
    height, width = patch.coverage.shape
    if rng.random() < 0.6:
        _cast_shadow(rng, canvas, patch, diameter)
    window = canvas.rgb[patch.top : patch.top + height, patch.left : patch.left + width]
    y, x = np.mgrid[patch.top : patch.top + height, patch.left : patch.left + width].astype(np.float32)
    color = _object_color(rng, window.mean(axis=(0, 1)))
    unit = max(3.0, diameter * rng.uniform(0.12, 0.5))
    rgb = surface(rng, x, y, color, contrast=rng.uniform(0.1, 0.8), unit=unit)
    rgb *= _shading(rng, canvas, patch, diameter)[..., None]
    window += (rgb - window) * patch.coverage[..., None]


def _object_color(rng: np.random.Generator, around: Floats) -> Floats:
    """A colour that stands out from the mean of what lies behind or, now and then, hardly does."""
    color = random_color(rng)
    if rng.random() < CAMOUFLAGE_SHARE:
        return around + (color - around) * rng.uniform(0.15, 0.35)
    for _ in range(8):
        if np.abs(color - around).sum() > 110:
            break
        color = random_color(rng)
    return color


def _cast_shadow(rng: np.random.Generator, canvas: _Canvas, patch: Patch, diameter: float) -> None:
    """Darken the canvas behind the object, away from the light."""
    softness = max(1.0, diameter * rng.uniform(0.02, 0.1))
    margin = math.ceil(2 * softness)
    shadow = _blurred(np.pad(patch.coverage, margin), softness)
    shift = np.rint(-canvas.light * diameter * rng.uniform(0.05, 0.2)).astype(int)
    left, top = patch.left - margin + shift[0], patch.top - margin + shift[1]
    rows, columns = (
        slice(*np.clip((start, start + length), 0, canvas.size))
        for start, length in zip((top, left), shadow.shape, strict=True)
    )
    part = shadow[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    canvas.rgb[rows, columns] *= 1 - rng.uniform(0.2, 0.6) * part[..., None]


def _shading(rng: np.random.Generator, canvas: _Canvas, patch: Patch, diameter: float) -> Floats:
    """Brightness factors [h, w] of a lit solid: flat, tilted or rounded, at times with a dark rim."""
    factor = np.full(patch.coverage.shape, rng.uniform(0.85, 1.1), dtype=np.float32)
    light_x, light_y = canvas.light.astype(np.float32)
    kind = rng.random()
    if kind < 0.35:
        height, width = patch.coverage.shape
        tilt_y = np.linspace(-0.5, 0.5, height, dtype=np.float32)[:, None]
        tilt_x = np.linspace(-0.5, 0.5, width, dtype=np.float32)
        factor += (tilt_x * light_x + tilt_y * light_y) * rng.uniform(0.2, 0.8)
    elif kind < 0.75 and min(patch.coverage.shape) > 2:
        relief = _blurred(patch.coverage, max(1.0, diameter * rng.uniform(0.08, 0.2)))
        slope_y, slope_x = np.gradient(relief, axis=0), np.gradient(relief, axis=1)
        depth = diameter * rng.uniform(0.1, 0.35)
        factor -= np.clip((slope_x * light_x + slope_y * light_y) * depth, -0.5, 0.5)
    if rng.random() < 0.2:
        inner = Image.fromarray((patch.coverage * 255).astype(np.uint8)).filter(ImageFilter.MinFilter(3))
        factor *= 1 - rng.uniform(0.3, 0.8) * (1 - np.asarray(inner, dtype=np.float32) / 255)
    return factor


def _blurred(coverage: Floats, radius: float) -> Floats:
    image = Image.fromarray((coverage * 255).astype(np.uint8))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(radius)), dtype=np.float32) / 255


def _photograph(rng: np.random.Generator, canvas: _Canvas) -> npt.NDArray[np.uint8]:
    """Light the scene unevenly, tone it, blur it by up to about a pixel and add sensor noise."""
    rgb = canvas.rgb
    if rng.random() < 0.5:
        ramp = np.arange(canvas.size, dtype=np.float32) / canvas.size - 0.5
        light_x, light_y = canvas.light.astype(np.float32) * rng.uniform(0.1, 0.7)
        rgb = rgb * (1 + ramp * light_x + ramp[:, None] * light_y)[..., None]
    contrast, middle = rng.uniform(0.7, 1.15), rng.uniform(100, 150)
    cast = rng.uniform(0.9, 1.1, 3)
    rgb = (rgb - 128) * (contrast * cast).astype(np.float32) + middle
    if rng.random() < 0.7:
        image = Image.fromarray(np.clip(rgb, 0, 255).astype(np.uint8))
        blur = ImageFilter.GaussianBlur(rng.uniform(0.3, 1.1) * canvas.scale)
        rgb = np.asarray(image.filter(blur), dtype=np.float32)
    noise = rng.standard_normal(rgb.shape, dtype=np.float32) * rng.gamma(1.5, 3)
    return np.clip(rgb + noise, 0, 255).astype(np.uint8)
