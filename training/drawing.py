"""Draws the pictures that pre-train the teacher, each with the truth about every pixel and every shape of it.

Formula-driven: shapes of sixteen kinds and ten colours, possibly damaged, on one or two grounds, then photographed.
Pure and seeded: the generator decides everything. Knows no product and no network. Called by `pretrain`.

The photographs of grounds come with scikit-image's wheel, and its documentation names their licences: brick, grass,
gravel, camera, chelsea and coffee are CC0, rocket (SpaceX) and astronaut and hubble (NASA) are public domain.
"""

import math
from functools import cache
from importlib.resources import files
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from training.errors import DataError

Array = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Points = NDArray[np.float64]

KINDS = (
    *("disc", "ring", "square", "triangle", "bar", "cross", "nut", "crescent"),
    *("star", "screw", "cable", "glyph", "capsule", "frame", "bracket", "vessel"),
)
# RGB, far enough apart to survive tint, shade and noise.
_CODES = ("c82828", "28a03c", "3250c8", "e1c332", "963caa", "28b4be", "282828", "e1e1e1", "e1781e", "828287")
COLOURS = tuple(tuple(bytes.fromhex(code)) for code in _CODES)
PHOTOGRAPHS = (
    *("brick.png", "grass.png", "gravel.png", "camera.png", "chelsea.png", "coffee.png"),
    *("rocket.jpg", "astronaut.png", "hubble_deep_field.jpg"),
)
FORMULAS = ("flat", "blobs", "stripes", "checker", "dots", "brushed", "cloud", "weave")
GROUNDS = FORMULAS + PHOTOGRAPHS
# What a pixel can show: a ground or a kind of shape.
SURFACES = len(GROUNDS) + len(KINDS)
# Half the width of a shape in pixels of the model's input: models look at 128 to 256, parts measure 5 to 60 there.
RADIUS = (2.5, 18.0)
MAX_SHAPES = 14
DAMAGED_SHARE = 0.6
# Room for the shadow of a shape and its soft edge.
WINDOW_MARGIN = 8


class Shape(NamedTuple):
    """One shape: indices of kind and colour, centre and radius in pixels, angle in radians."""

    kind: int
    colour: int
    x: float
    y: float
    radius: float
    angle: float


class Drawing(NamedTuple):
    """One picture of s × s and its truth.

    photograph and clean (s, s, 3) uint8 RGB, with and without what a camera adds; surface (s, s) uint8, the index of
    the ground, or len(GROUNDS) + the kind of the shape on top; colour (s, s) uint8, 0 on grounds, else 1 + colour;
    damage (s, s) float32, coverage 0..1; shapes in the order they were laid down.
    """

    photograph: Bytes
    clean: Bytes
    surface: Bytes
    colour: Bytes
    damage: Array
    shapes: list[Shape]


class _Canvas(NamedTuple):
    picture: Array
    surface: Bytes
    colour: Bytes
    damage: Array


def draw(size: int, generator: np.random.Generator) -> Drawing:
    """One picture of `size` × `size`, decided by the generator alone."""
    picture, surface = draw_grounds(size, generator)
    canvas = _Canvas(picture, surface, np.zeros((size, size), np.uint8), np.zeros((size, size), np.float32))
    damaged = generator.random() < DAMAGED_SHARE
    if damaged:
        _blemish(canvas, generator)
    shapes = place_shapes(size, generator)
    for shape in shapes:
        _paint(canvas, shape, generator, cut=damaged and generator.random() < 0.25)
    while damaged and generator.random() < 0.5:
        _blemish(canvas, generator)
    clean = np.asarray(np.clip(picture, 0, 255), dtype=np.uint8)
    return Drawing(_photograph(picture, generator), clean, surface, canvas.colour, canvas.damage, shapes)


def place_shapes(size: int, generator: np.random.Generator) -> list[Shape]:
    """Up to MAX_SHAPES shapes that overlap a little at most; half of the pictures repeat few kinds, as products do."""
    shapes: list[Shape] = []
    kinds = generator.integers(len(KINDS), size=int(generator.integers(1, 4)))
    repeats = generator.random() < 0.5
    for _ in range(generator.integers(0, MAX_SHAPES + 1)):
        radius = float(np.exp(generator.uniform(*np.log(RADIUS))))
        x, y = (float(v) for v in generator.uniform(radius, size - radius, size=2))
        if any(math.hypot(x - s.x, y - s.y) < 0.75 * (radius + s.radius) for s in shapes):
            continue
        kind = int(generator.choice(kinds)) if repeats else int(generator.integers(len(KINDS)))
        colour = int(generator.integers(len(COLOURS)))
        shapes.append(Shape(kind, colour, x, y, radius, float(generator.uniform(0, 2 * math.pi))))
    return shapes


def draw_grounds(size: int, generator: np.random.Generator) -> tuple[Array, Bytes]:
    """One ground, or two that meet at a line or in compartments: picture (s, s, 3) in 0..255, surface (s, s)."""
    first = int(generator.integers(len(GROUNDS)))
    picture, surface = draw_ground(first, size, generator), np.full((size, size), first, dtype=np.uint8)
    if generator.random() < 0.5:
        second = int(generator.integers(len(GROUNDS)))
        region = _region(size, generator)
        picture = np.where(region[..., None], draw_ground(second, size, generator), picture)
        surface[region] = second
        if generator.random() < 0.5:
            edge = cv2.GaussianBlur(region.astype(np.float32), (0, 0), float(generator.uniform(0.7, 2)))
            picture *= (1 - generator.uniform(0.5, 2.5) * edge * (1 - edge))[..., None].astype(np.float32)
    return picture, surface


def _region(size: int, generator: np.random.Generator) -> NDArray[np.bool_]:
    """Where the second ground lies: one side of a line, a box or a grid of compartments."""
    form = generator.random()
    mask = np.zeros((size, size), dtype=np.uint8)
    if form < 0.4:
        angle, offset = generator.uniform(0, 2 * math.pi), generator.uniform(-0.3, 0.3) * size
        rows, columns = np.mgrid[0:size, 0:size] - size / 2
        return np.asarray(rows * math.sin(angle) + columns * math.cos(angle) > offset)
    if form < 0.7:
        x0, y0, x1, y1 = (int(v) for v in generator.uniform(0, size, size=4))
        cv2.rectangle(mask, (x0, y0), (x1, y1), 1, -1)
    else:
        xs, ys = (np.sort(generator.integers(0, size, size=3)) for _ in range(2))
        wall = int(generator.integers(1, 5))
        for x, y in zip(xs.tolist(), ys.tolist(), strict=True):
            cv2.line(mask, (x, 0), (x, size), 1, wall)
            cv2.line(mask, (0, y), (size, y), 1, wall)
    return mask.astype(bool)


def draw_ground(index: int, size: int, generator: np.random.Generator) -> Array:
    """The ground GROUNDS[index], (size, size, 3) float32, not yet clipped to 0..255."""
    # Half of the grounds are nearly grey, as trays and metal are.
    chroma = generator.uniform(-80, 80, size=3) * (1.0 if generator.random() < 0.5 else 0.15)
    colour = np.clip(generator.uniform(20, 225) + chroma, 5, 250).astype(np.float32)
    strength = generator.uniform(5, 45) * (np.ones(3) if generator.random() < 0.6 else generator.uniform(0, 1.5, 3))
    if index < len(FORMULAS):
        pattern = _formula(FORMULAS[index], size, generator)[..., None]
    else:
        pattern = _crop(PHOTOGRAPHS[index - len(FORMULAS)], size, generator)
    return np.asarray(colour + pattern * strength.astype(np.float32), dtype=np.float32)


@cache
def photograph(name: str) -> Array:
    """One photograph as (h, w, 3) float32 RGB, mean 0 and deviation 1."""
    raw = (files("skimage") / "data" / name).read_bytes()
    image = cv2.imdecode(np.frombuffer(raw, dtype=np.uint8), cv2.IMREAD_COLOR)
    if image is None:
        raise DataError(f"photograph '{name}': scikit-image's copy cannot be decoded; install scikit-image again")
    values = cv2.cvtColor(image, cv2.COLOR_BGR2RGB).astype(np.float32)
    return np.asarray((values - values.mean()) / values.std(), dtype=np.float32)


def _crop(name: str, size: int, generator: np.random.Generator) -> Array:
    """A turned and zoomed crop, (size, size, 3), mirrored at the photograph's edges; half of them grey."""
    source = photograph(name)
    centre = generator.uniform(0, 1, size=2) * (source.shape[1], source.shape[0])
    scale = float(np.exp(generator.uniform(math.log(0.4), math.log(1.6))))
    matrix = cv2.getRotationMatrix2D((float(centre[0]), float(centre[1])), float(generator.uniform(0, 360)), scale)
    matrix[:, 2] = matrix[:, 2] + size / 2 - centre
    crop = cv2.warpAffine(source, matrix, (size, size), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
    if generator.random() < 0.5:
        crop = np.repeat(crop.mean(axis=2, keepdims=True), 3, axis=2)
    return np.asarray(crop, dtype=np.float32)


def _formula(name: str, size: int, generator: np.random.Generator) -> Array:
    """A pattern of about mean 0 and deviation 1, (size, size) float32."""
    angle, period = float(generator.uniform(0, math.pi)), float(np.exp(generator.uniform(math.log(3), math.log(40))))
    if name == "flat":
        return np.zeros((size, size), dtype=np.float32)
    if name in ("blobs", "cloud"):
        return _clouds(size, 1 if name == "blobs" else 4, generator)
    if name == "brushed":
        noise = generator.standard_normal((size, size), dtype=np.float32)
        brushed = cv2.GaussianBlur(noise, (0, 0), sigmaX=float(generator.uniform(4, 15)), sigmaY=0.5)
        turned = brushed if generator.random() < 0.5 else brushed.T
        return np.asarray(turned / turned.std(), dtype=np.float32)
    rows, columns = (np.mgrid[0:size, 0:size] + generator.uniform(0, 40)) * (2 * math.pi / period)
    along = np.sin(rows * math.sin(angle) + columns * math.cos(angle))
    across = np.sin(columns * math.sin(angle) - rows * math.cos(angle))
    if name == "stripes":
        waves = np.sign(along) if generator.random() < 0.5 else along
    elif name == "checker":
        waves = np.sign(along * across)
    elif name == "dots":
        waves = np.where(along + across > generator.uniform(0.6, 1.4), 1.5, -0.5)
    else:
        waves = np.where(np.sin(rows / 2) * np.sin(columns / 2) > 0, along, across)
    return np.asarray(waves, dtype=np.float32)


def _clouds(size: int, octaves: int, generator: np.random.Generator) -> Array:
    """Smoothed noise; several octaves, each half as strong as the coarser one, make clouds or stone."""
    total = np.zeros((size, size), dtype=np.float32)
    cells = int(generator.integers(2, 20 if octaves == 1 else 6))
    for octave in range(octaves):
        noise = generator.standard_normal((min(cells << octave, size),) * 2, dtype=np.float32)
        total += cv2.resize(noise, (size, size), interpolation=cv2.INTER_CUBIC) * 0.6**octave
    return np.asarray(total / max(float(total.std()), 1e-3), dtype=np.float32)


def _paint(canvas: _Canvas, shape: Shape, generator: np.random.Generator, *, cut: bool) -> None:
    """Shadow, tint, light and texture of one shape, in its window only: a third of the time of whole pictures."""
    left, top = (max(0, int(v - shape.radius) - WINDOW_MARGIN) for v in (shape.x, shape.y))
    right, bottom = (int(v + shape.radius) + WINDOW_MARGIN for v in (shape.x, shape.y))
    picture, surface, colours, damage = (layer[top:bottom, left:right] for layer in canvas)
    shape = shape._replace(x=shape.x - left, y=shape.y - top)
    mask = shape_mask(picture.shape[:2], shape, generator)
    missing = mask * _bite(mask.shape, shape, generator) if cut else np.zeros_like(mask)
    mask = mask - missing
    if generator.random() < 0.6:
        shift = generator.integers(-3, 4, size=2)
        shadow = np.roll(cv2.GaussianBlur(mask, (0, 0), float(generator.uniform(0.8, 2))), tuple(shift), axis=(0, 1))
        picture *= 1 - generator.uniform(0.2, 0.6) * shadow[..., None]
    picture += mask[..., None] * (_material(shape, mask, generator) - picture)
    covered = mask > 0.5
    surface[covered], colours[covered], damage[covered] = len(GROUNDS) + shape.kind, 1 + shape.colour, 0
    np.maximum(damage, missing, out=damage)


def _material(shape: Shape, mask: Array, generator: np.random.Generator) -> Array:
    """Colour of the shape at every pixel of its window, (h, w, 3): tint, rounded edges, grain, a highlight."""
    tint = np.array(COLOURS[shape.colour]) * generator.uniform(0.8, 1.15) + generator.normal(0, 8, size=3)
    light = np.ones_like(mask)
    if generator.random() < 0.7:
        soft = cv2.GaussianBlur(mask, (0, 0), float(generator.uniform(0.8, 3)))
        angle = generator.uniform(0, 2 * math.pi)
        slope = cv2.Sobel(soft, cv2.CV_32F, 1, 0) * math.cos(angle)
        slope += cv2.Sobel(soft, cv2.CV_32F, 0, 1) * math.sin(angle)
        light += slope * float(generator.uniform(0.1, 0.5))
    if generator.random() < 0.3:
        light += generator.standard_normal(mask.shape, dtype=np.float32) * float(generator.uniform(0.02, 0.12))
    values = tint * light[..., None]
    if generator.random() < 0.25:
        x, y = shape.x + generator.normal(0, 0.3) * shape.radius, shape.y + generator.normal(0, 0.3) * shape.radius
        rows, columns = np.ogrid[0 : mask.shape[0], 0 : mask.shape[1]]
        spot = np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / (0.2 * shape.radius + 1) ** 2)
        values = values + spot[..., None] * generator.uniform(30, 110)
    return np.asarray(values, dtype=np.float32)


def shape_mask(window: tuple[int, ...], shape: Shape, generator: np.random.Generator) -> Array:
    """Coverage of one shape, (h, w) float32 in 0..1; proportions vary with the generator."""
    mask = np.zeros(window, dtype=np.uint8)
    kind = KINDS[shape.kind]
    if kind in ("disc", "ring", "crescent"):
        _round(mask, shape, kind, generator)
    elif kind == "glyph":
        _glyph(mask, shape, generator)
    elif kind in ("cable", "bracket"):
        width = shape.radius * (generator.uniform(0.12, 0.25) if kind == "cable" else generator.uniform(0.25, 0.5))
        points = _placed(_course(kind, generator), shape)
        cv2.polylines(mask, [points], False, 255, max(1, round(width)), cv2.LINE_AA, 4)
    else:
        for corners, value in _outlines(kind, generator):
            cv2.fillPoly(mask, [_placed(corners, shape)], value, cv2.LINE_AA, 4)
    return np.asarray(mask / np.float32(255), dtype=np.float32)


def _placed(points: Points, shape: Shape) -> NDArray[np.int32]:
    """Points of the unit circle turned, scaled and moved, in sixteenths of a pixel."""
    cosine, sine = math.cos(shape.angle), math.sin(shape.angle)
    turned = points @ np.array([[cosine, sine], [-sine, cosine]]) * shape.radius + (shape.x, shape.y)
    return np.asarray(np.round(turned * 16), dtype=np.int32)


def _round(mask: Bytes, shape: Shape, kind: str, generator: np.random.Generator) -> None:
    centre, radius = (round(shape.x * 16), round(shape.y * 16)), shape.radius
    cv2.circle(mask, centre, round(radius * 16), 255, -1, cv2.LINE_AA, 4)
    if kind == "ring":
        cv2.circle(mask, centre, round(radius * generator.uniform(0.4, 0.7) * 16), 0, -1, cv2.LINE_AA, 4)
    if kind == "crescent":
        aside = (
            round((v + 0.55 * radius * f(shape.angle)) * 16) for v, f in ((shape.x, math.cos), (shape.y, math.sin))
        )
        cv2.circle(mask, tuple(aside), round(radius * 0.8 * 16), 0, -1, cv2.LINE_AA, 4)


def _glyph(mask: Bytes, shape: Shape, generator: np.random.Generator) -> None:
    """A letter or digit of a line font, about two radii high, turned by the shape's angle."""
    letter = "ABEFGHKLMNPRSTUVXYZ23456789"[int(generator.integers(27))]
    plain = np.zeros((48, 48), dtype=np.uint8)
    cv2.putText(plain, letter, (8, 39), cv2.FONT_HERSHEY_SIMPLEX, 1.4, 255, int(generator.integers(3, 7)), cv2.LINE_AA)
    matrix = cv2.getRotationMatrix2D((23.0, 24.0), math.degrees(shape.angle), shape.radius / 18)
    matrix[:, 2] = matrix[:, 2] + (shape.x - 23.0, shape.y - 24.0)
    mask[:] = cv2.warpAffine(plain, matrix, (mask.shape[1], mask.shape[0]), flags=cv2.INTER_LINEAR)


def _course(kind: str, generator: np.random.Generator) -> Points:
    """Corners of a bent line in the unit circle, (n, 2): an L, or a cable that swings."""
    if kind == "bracket":
        return np.array([(-0.6, -0.7), (-0.6, 0.6), (0.7, 0.6)])
    t = np.linspace(-1, 1, 12)
    swing = generator.uniform(-0.4, 0.4, size=2)
    return np.stack([t, swing[0] * np.cos(t * 1.6) + swing[1] * np.sin(t * 3.1)], axis=1)


def _outlines(kind: str, generator: np.random.Generator) -> list[tuple[Points, int]]:
    """Polygons in the unit circle, painted in turn with 255 (matter) or 0 (hole)."""
    u = float(generator.uniform())
    if kind == "bar":
        return [(_box(1, 0.12 + 0.13 * u), 255)]
    if kind == "frame":
        return [(_box(0.85, 0.55 + 0.15 * u), 255), (_box(0.6, 0.3 + 0.15 * u), 0)]
    if kind == "cross":
        return [(_box(1, 0.15 + 0.2 * u), 255), (_box(0.15 + 0.2 * u, 1), 255)]
    if kind == "vessel":
        # An open box, filled up to a level that varies.
        return [(_box(0.6, 0.9), 255), (_box(0.42, 0.3 + 0.5 * u) - (0, 0.7 - 0.5 * u), 0)]
    if kind == "screw":
        a = 0.1 + 0.08 * u
        half = np.array([(-1.0, -0.42), (-0.6, -0.42), (-0.6, -a), (0.85, -a), (1.0, 0.0)])
        return [(np.concatenate([half, half[::-1] * (1, -1)]), 255)]
    if kind == "capsule":
        a = 0.3 + 0.2 * u
        half = _ring_of([a] * 14)[:8] @ np.array([(0, 1), (-1, 0)]) * (-1, 1) + (1 - a, 0)
        return [(np.concatenate([half, -half]), 255)]
    if kind == "star":
        return [(_ring_of([1.0, 0.45 + 0.3 * u] * int(generator.integers(5, 9))), 255)]
    if kind == "nut":
        return [(_ring_of([1.0] * 6), 255), (_ring_of([0.35 + 0.2 * u] * 16), 0)]
    return [(_ring_of([1.0] * {"square": 4, "triangle": 3}[kind]), 255)]


def _box(w: float, h: float) -> Points:
    """Corners of a box of half width `w` and half height `h`, (4, 2)."""
    return np.array([(-w, -h), (w, -h), (w, h), (-w, h)])


def _ring_of(radii: list[float]) -> Points:
    """Corners at even angles around the centre, one a radius: (n, 2)."""
    angles = np.arange(len(radii)) * 2 * math.pi / len(radii)
    return np.stack([np.cos(angles) * radii, np.sin(angles) * radii], axis=1)


def _bite(window: tuple[int, ...], shape: Shape, generator: np.random.Generator) -> Array:
    """What is missing from a cut shape, (h, w) in 0..1: everything beyond a straight break."""
    angle, offset = generator.uniform(0, 2 * math.pi), generator.uniform(0.0, 0.5) * shape.radius
    rows, columns = np.ogrid[0 : window[0], 0 : window[1]]
    beyond = (rows - shape.y) * math.sin(angle) + (columns - shape.x) * math.cos(angle) - offset
    return np.asarray(np.clip(beyond + 0.5, 0, 1), dtype=np.float32)


def _blemish(canvas: _Canvas, generator: np.random.Generator) -> None:
    """A scratch, a stain or a speck anywhere in the picture."""
    size = len(canvas.damage)
    mask = np.zeros((size, size), dtype=np.uint8)
    points = generator.uniform(0, size, size=2) + generator.normal(0, 1, size=(8, 2)).cumsum(axis=0)
    form = int(generator.integers(3))
    spread = float(generator.uniform(1.0, 4.0))
    turns = points.mean(axis=0) + (points - points.mean(axis=0)) * spread
    if form == 0:
        cv2.polylines(mask, [np.round(turns * 16).astype(np.int32)], False, 255, 1, cv2.LINE_AA, 4)
    else:
        hull = cv2.convexHull(turns.astype(np.float32)) * 16
        cv2.fillPoly(mask, [np.round(hull).astype(np.int32)], 255, cv2.LINE_AA, 4)
    cover = np.asarray(mask / np.float32(255), dtype=np.float32)
    if form == 1:
        cover = np.asarray(cv2.GaussianBlur(cover, (0, 0), spread), dtype=np.float32)
    local = canvas.picture[mask > 0].mean(axis=0) if mask.any() else np.zeros(3)
    shift = generator.choice([-1, 1]) * generator.uniform(25, 110) + generator.normal(0, 25, size=3)
    grain = 1 + generator.normal(0, 0.25, size=(size, size, 1)) if form == 2 else np.ones((1, 1, 1))
    strength = cover[..., None] * (generator.uniform(0.3, 0.9) if form == 1 else 0.9)
    canvas.picture[:] += strength * ((local + shift) * grain - canvas.picture)
    np.maximum(canvas.damage, cover, out=canvas.damage)


def _photograph(picture: Array, generator: np.random.Generator) -> Bytes:
    """What a camera adds: uneven light, blur, noise, exposure, sometimes JPEG."""
    corners = generator.uniform(0.75, 1.2, size=(2, 2)).astype(np.float32)
    picture = picture * cv2.resize(corners, picture.shape[:2], interpolation=cv2.INTER_LINEAR)[..., None]
    if generator.random() < 0.5:
        picture = np.asarray(cv2.GaussianBlur(picture, (0, 0), float(generator.uniform(0.3, 1.1))), dtype=np.float32)
    noise = generator.standard_normal(picture.shape, dtype=np.float32) * float(generator.uniform(0, 8))
    taken = np.asarray(np.clip(picture + noise, 0, 255), dtype=np.uint8)
    if generator.random() < 0.2:
        _, coded = cv2.imencode(".jpg", taken, [cv2.IMWRITE_JPEG_QUALITY, int(generator.integers(60, 96))])
        taken = np.asarray(cv2.imdecode(coded, cv2.IMREAD_COLOR), dtype=np.uint8)
    return taken
