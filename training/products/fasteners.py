"""Screws, nuts, washers and pins as stamps, sound or broken. Lengths in pixels of a 640 x 480 picture.

Used by `fastener_tray` and `parts_bag`.
"""

import math
from dataclasses import dataclass

import cv2
import numpy as np

from training.studio import Field, Generator, Stamp, covered, field, grid, metal

ZINC = (168.0, 172.0, 176.0)
STEEL = (126.0, 128.0, 132.0)
BRASS = (186.0, 152.0, 84.0)
KINDS = ("screw", "nut", "washer", "pin")
# Window sides; a part of a kind covers about AREA pixels.
SIDE = {"screw": 104, "nut": 54, "washer": 52, "pin": 76}
AREA = {"screw": 1430, "nut": 1050, "washer": 1175, "pin": 1050}


@dataclass(frozen=True, slots=True)
class Look:
    """How a part departs from the plain one: size, colour 0..255 RGB (None: its metal), pixels added to a screw."""

    scale: float = 1.0
    base: tuple[float, float, float] | None = None
    reach: float = 0.0
    gloss: float = 0.9


PLAIN = Look()


def part(
    kind: str, angle: float, generator: Generator, *, bent: float = 0.0, broken: bool = False, look: Look = PLAIN
) -> Stamp:
    """A part turned by `angle` radians; `bent` is the sag of a screw or pin in pixels, `broken` cuts a piece off."""
    long = SIDE[kind] + look.reach
    u, v = (field(axis / look.scale) for axis in grid(round(long * look.scale), angle))
    if bent:
        v = field(v - bent * (u / (long / 2)) ** 2)
    distance, height = _shape(kind, u, v, look.reach)
    if broken:
        cut = u - 0.05 * long + 2.5 * np.sin(v * 0.7) + 1.5 * np.sin(v * 1.9)
        distance = field(np.maximum(distance, cut))
    base = look.base or {"screw": ZINC, "nut": STEEL, "washer": ZINC, "pin": BRASS}[kind]
    colour = metal(base, distance.shape, angle, generator)
    colour *= _ambient(height)[..., None]
    return Stamp(covered(field(distance * look.scale)), colour, field(height * look.scale), look.gloss)


def _shape(kind: str, u: Field, v: Field, reach: float) -> tuple[Field, Field]:
    if kind == "screw":
        return _screw(u, v, reach)
    return {"nut": _nut, "washer": _washer, "pin": _pin}[kind](u, v)


def _ambient(height: Field) -> Field:
    """Recesses get less light from all around."""
    around = cv2.GaussianBlur(height, (0, 0), 3.0)
    return field(np.clip(1 + 0.06 * (height - around), 0.5, 1.1))


def _screw(u: Field, v: Field, reach: float) -> tuple[Field, Field]:
    u = field(u + reach / 2)
    head_u = u + 34
    head = np.hypot(head_u, v) - 14.5
    taper = 6.5 - np.clip(u - 34 - reach, 0, None) * 0.6
    shaft = np.maximum(np.abs(v) - taper, np.maximum(-34 - u, u - 44 - reach))
    thread = 1.1 * np.sin(2 * math.pi * (u + 0.35 * v) / 4.5)
    body = np.sqrt(np.clip(taper**2 - v**2, 0, None)) + np.where(u > -14, thread, 0)
    dome = 4 + 9 * np.sqrt(np.clip(1 - (np.hypot(head_u, v) / 16) ** 2, 0, None))
    recess = np.minimum(
        np.maximum(np.abs(head_u) - 8, np.abs(v) - 2.0), np.maximum(np.abs(v) - 8, np.abs(head_u) - 2.0)
    )
    dome -= 5.0 * np.clip(0.5 - recess, 0, 1)
    height = np.where(head < 0, dome, body)
    return field(np.minimum(head, shaft)), field(height)


def _nut(u: Field, v: Field) -> tuple[Field, Field]:
    a, b = np.abs(u), np.abs(v)
    hexagon = np.maximum(a * 0.866 + b * 0.5, b) - 19.5
    radius = np.hypot(u, v)
    distance = np.maximum(hexagon, 10.0 - radius)
    chamfer = np.clip(21.5 - radius, 0, 3) + np.clip(radius - 10, 0, 2.5)
    height = 5 + chamfer + np.where(radius < 12.5, 0.7 * np.sin(radius * 2.2), 0)
    return field(distance), field(height)


def _washer(u: Field, v: Field) -> tuple[Field, Field]:
    radius = np.hypot(u, v)
    distance = np.maximum(radius - 22.0, 10.5 - radius)
    height = 1.5 + np.clip(-distance, 0, 2.5)
    return field(distance), field(height)


def _pin(u: Field, v: Field) -> tuple[Field, Field]:
    r = 8.0 - np.clip(np.abs(u) - 28, 0, None) * 0.8
    distance = np.maximum(np.abs(v) - r, np.abs(u) - 33)
    height = np.sqrt(np.clip(r**2 - v**2, 0, None))
    return field(distance), field(height)
