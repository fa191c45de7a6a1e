"""What is printed on bottles: three fruits and a gauge that is full or half full. Lengths in pixels.

Used by `bottle`.
"""

import math
from dataclasses import dataclass

import numpy as np

from training.studio import Field, Stamp, covered, field, grid, rounded_box

PAPER = (236.0, 234.0, 226.0)
LEAF = (54.0, 122.0, 52.0)
INK = (36.0, 62.0, 116.0)
# Half sizes of the box that holds a print at scale 1.
HALF_FRUIT, HALF_GAUGE = (52.0, 52.0), (68.0, 18.0)


@dataclass(frozen=True, slots=True)
class _Print:
    """Ink on paper: colour (h, w, 3) and where there is any, (h, w) 0..1."""

    colour: Field
    cover: Field

    @staticmethod
    def blank(shape: tuple[int, ...]) -> "_Print":
        paper = np.broadcast_to(np.array(PAPER, dtype=np.float32), (*shape, 3)).copy()
        return _Print(paper, np.zeros(shape, dtype=np.float32))

    def paint(self, outline: Field, ink: tuple[float, float, float], shade: Field | None = None) -> None:
        """Adds a shape, its signed distance given."""
        tone = np.array(ink, dtype=np.float32) * (1 if shade is None else shade[..., None])
        cover = covered(outline)
        self.colour[...] += cover[..., None] * (tone - self.colour)
        np.maximum(self.cover, cover, out=self.cover)


def fruit(name: str, turn: float, scale: float) -> Stamp:
    """One large fruit, turned by `turn` radians: 'orange', 'cherry' or 'kiwi'."""
    u, v = (field(axis / scale) for axis in grid(round(2.8 * HALF_FRUIT[0] * scale), turn))
    ink = _Print.blank(u.shape)
    {"orange": _orange, "cherry": _cherry, "kiwi": _kiwi}[name](ink, u, v)
    return _stamp(ink)


def gauge(level: str, turn: float) -> Stamp:
    """A frame with a bar in it, 'full' or 'half', turned by `turn` radians."""
    u, v = (field(axis[44:108]) for axis in grid(152, turn))
    ink = _Print.blank(u.shape)
    ink.paint(field(np.abs(rounded_box(u, v, 64, 14, 3)) - 1.5), INK)
    reach = 60.0 if level == "full" else 30.0
    ink.paint(rounded_box(field(u + 60 - reach), v, reach, 10, 1), INK)
    return _stamp(ink)


def _stamp(ink: _Print) -> Stamp:
    return Stamp(ink.cover, ink.colour, field(0 * ink.cover), 0.1, solid=False)


def _ball(u: Field, v: Field, radius: float) -> tuple[Field, Field]:
    """Outline and painted shading of a sphere lit from up left."""
    near = np.hypot(u + 0.35 * radius, v + 0.35 * radius) / radius
    return field(np.hypot(u, v) - radius), field(1.12 - 0.28 * near)


def _leaf(u: Field, v: Field, x: float, y: float, angle: float) -> Field:
    a = (u - x) * math.cos(angle) + (v - y) * math.sin(angle)
    b = (v - y) * math.cos(angle) - (u - x) * math.sin(angle)
    return field((np.hypot(a / 18, b / 8) - 1) * 8)


def _orange(ink: _Print, u: Field, v: Field) -> None:
    outline, shade = _ball(u, field(v - 4), 40)
    ink.paint(outline, (238, 142, 30), shade)
    ink.paint(_leaf(u, v, 16, -40, -0.5), LEAF)


def _cherry(ink: _Print, u: Field, v: Field) -> None:
    for x, y in ((-23.0, 18.0), (22.0, 24.0)):
        length = math.hypot(x - 8, y + 46)
        along = ((u - 8) * (x - 8) + (v + 46) * (y + 46)) / length
        across = ((v + 46) * (x - 8) - (u - 8) * (y + 46)) / length
        bow = across - x * 0.25 * np.sin(math.pi * np.clip(along / length, 0, 1))
        ink.paint(field(np.maximum(np.abs(bow) - 2, np.abs(along - length / 2) - length / 2)), LEAF)
        outline, shade = _ball(field(u - x), field(v - y), 22)
        ink.paint(outline, (176, 24, 44), shade)
    ink.paint(_leaf(u, v, 24, -42, 0.2), LEAF)


def _kiwi(ink: _Print, u: Field, v: Field) -> None:
    radius, angle = np.hypot(u, v), np.arctan2(v, u)
    ink.paint(field(np.hypot(u / 1.12, v) - 43), (116, 84, 48))
    rays = field(1 + 0.07 * np.sin(angle * 22))
    ink.paint(field(np.hypot(u / 1.12, v) - 38), (136, 176, 56), rays)
    ink.paint(field(np.hypot(u / 1.3, v) - 12), (224, 228, 172))
    seeds = np.hypot((radius - 19) / 3.5, np.sin(angle * 9) * 1.5) - 1
    ink.paint(field(seeds * 3), (40, 36, 28))
