"""Local damage that any product can suffer: scratches, cracks, stains, fibres. Lengths in pixels.

Each function changes the canvas and returns where it shows, (H, W) coverage 0..1. Used by `products`.
"""

import math

import cv2
import numpy as np
import numpy.typing as npt

from training.studio import Canvas, Field, Generator, Stamp, blotch, field

Place = tuple[float, float]


def scratch(canvas: Canvas, place: Place, generator: Generator) -> Field:
    """A bright, rough groove that runs over a part and on into its ground, wide enough to show in a small picture."""
    angle, half = float(generator.uniform(0, 2 * math.pi)), float(generator.uniform(42, 74))
    steps = np.linspace(-1, 1, 9)
    points = np.stack([place[0] + steps * half * math.cos(angle), place[1] + steps * half * math.sin(angle)], axis=1)
    points += generator.normal(0, 1.5, size=points.shape)
    groove = _stroke(canvas, [points], 5)
    canvas.height -= 2.5 * groove
    canvas.colour += groove[..., None] * (np.float32(205) - canvas.colour) * 0.6
    return _grown(groove)


def crack(canvas: Canvas, place: Place, generator: Generator) -> Field:
    """A dark jagged line with two side branches, broken through the surface; its edge catches the light."""
    angle, half = float(generator.uniform(0, 2 * math.pi)), float(generator.uniform(32, 52))
    trunk = _jagged(place, angle, half, generator)
    branches = [
        _jagged((float(x), float(y)), angle + float(side * generator.uniform(0.5, 1.0)), half * 0.45, generator)
        for side, (x, y) in zip((-1, 1), trunk[[4, 8]], strict=True)
    ]
    line = _stroke(canvas, [trunk, *branches], 2)
    canvas.height -= 6 * line
    canvas.colour *= (1 - 0.75 * line)[..., None]
    return _grown(line)


def stain(
    canvas: Canvas, place: Place, generator: Generator, colour: tuple[float, float, float] = (52, 40, 24)
) -> Field:
    """A ragged spot of something that has soaked in or dried, about 50 to 80 wide."""
    spot = blotch(int(generator.uniform(56, 86)), generator)
    tint = np.broadcast_to(np.array(colour, dtype=np.float32), (*spot.shape, 3))
    stamp = Stamp(field(0.85 * spot), tint, field(0 * spot), 0.4, solid=False)
    return field(canvas.lay(stamp, place, lift=0.0) / 0.85)


def fibre(canvas: Canvas, place: Place, generator: Generator) -> Field:
    """A thick curled thread that has fallen in."""
    angle, half = float(generator.uniform(0, 2 * math.pi)), float(generator.uniform(38, 58))
    steps = np.linspace(-1, 1, 60)
    bend, phase = float(generator.uniform(14, 24)), float(generator.uniform(0, 6))
    across = bend * np.sin(steps * float(generator.uniform(2.5, 4.5)) + phase)
    c, s = math.cos(angle), math.sin(angle)
    along = steps * half
    points = np.stack([place[0] + along * c - across * s, place[1] + along * s + across * c], axis=1)
    thread = _stroke(canvas, [points], 7)
    shadow = cv2.GaussianBlur(np.roll(thread, (3, 3), axis=(0, 1)), (0, 0), 1.5)
    canvas.colour *= (1 - 0.4 * shadow)[..., None]
    colour = np.array(((38, 34, 40), (196, 40, 120), (40, 130, 60))[int(generator.integers(3))], dtype=np.float32)
    canvas.colour += thread[..., None] * (colour - canvas.colour)
    canvas.height += 2 * thread
    return _grown(thread)


def _jagged(place: Place, angle: float, half: float, generator: Generator) -> npt.NDArray[np.float64]:
    steps = np.linspace(-1, 1, 13)
    across = np.cumsum(generator.normal(0, half / 11, size=13))
    across -= across.mean()
    c, s = math.cos(angle), math.sin(angle)
    return np.stack([place[0] + steps * half * c - across * s, place[1] + steps * half * s + across * c], axis=1)


def _stroke(canvas: Canvas, lines: list[npt.NDArray[np.float64]], width: int) -> Field:
    """Coverage of lines of points (n, 2)."""
    drawn = np.zeros(canvas.height.shape, dtype=np.uint8)
    whole = [np.round(points * 16).astype(np.int32) for points in lines]
    cv2.polylines(drawn, whole, False, 255, width, cv2.LINE_AA, 4)
    return field(drawn / 255)


def _grown(cover: Field) -> Field:
    return field(cv2.dilate(cover, np.ones((5, 5), dtype=np.uint8)))
