"""Product `pin-grid`: a box of twelve compartments with one push-pin in each, all of one colour.

Pins lie at any angle and place in their compartment; the colour is free from box to box. So only counting per
compartment, and comparing across the box, tells good from bad. Called by `scenes`.
"""

import math
from dataclasses import dataclass, replace

import cv2
import numpy as np

from training.products.damage import crack, fibre, scratch, stain
from training.products.rendered import Defect, Rendered, Saturation
from training.studio import Canvas, Field, Generator, Lamp, Stamp, covered, field, grid, rounded_box
from training.textures import relief

NAME = "pin-grid"
BASE = (640, 480)
ROWS, COLUMNS = 3, 4
# A compartment with half a wall on each side; its free room; the corner of the first one.
PITCH = (148, 144)
HALF_ROOM = (67.0, 65.0)
CORNER = (24.0, 24.0)
COLOURS = {"yellow": (226.0, 178.0, 36.0), "red": (196.0, 44.0, 40.0), "blue": (40.0, 92.0, 190.0)}
# Along its axis a pin reaches this far from its middle; half its width; what it covers.
REACH, HALF_WIDTH, AREA = 46.0, 20.0, 1495
LOGICAL = ("empty_cell", "two_in_cell", "moved_pin", "odd_colour", "across_wall")
STRUCTURAL = ("broken_pin", "bent_pin", "stain", "crack", "scratch", "contamination")
SATURATION = {
    **{name: Saturation(AREA, relative=False) for name in LOGICAL[:3]},
    **{name: Saturation(1.0, relative=True) for name in (*LOGICAL[3:], *STRUCTURAL)},
}


@dataclass(frozen=True, slots=True)
class _Pin:
    cell: int
    x: float
    y: float
    angle: float
    colour: str
    bent: float = 0.0
    broken: bool = False


def render(defect: str | None, generator: Generator) -> Rendered:
    """One picture of 640 x 480, good or with one defect by name."""
    lamp = Lamp.draw(generator)
    shift = np.clip(generator.normal(0, 3, size=2), -9, 9)
    offset = (float(shift[0]), float(shift[1]))
    canvas = _box(lamp, offset, generator)
    pins, marked = _contents(defect, generator)
    covers = [_lay(canvas, pin, offset, generator) for pin in pins]
    surface = _surface_damage(canvas, defect, pins, offset, generator)
    masks = [surface] if surface is not None else _masks(defect, pins, covers, marked, offset)
    picture = canvas.photograph(generator)
    return Rendered(picture, tuple(Defect(defect, mask > 0.5) for mask in masks) if defect else ())


def _box(lamp: Lamp, offset: tuple[float, float], generator: Generator) -> Canvas:
    width, height = BASE
    # One compartment, laid as tiles: its pixels lie the same way in all of them.
    left, top = CORNER[0] + offset[0], CORNER[1] + offset[1]
    column, row = math.floor(left), math.floor(top)
    u = np.arange(PITCH[0], dtype=np.float32)[None, :] - np.float32(left - column + PITCH[0] / 2)
    v = np.arange(PITCH[1], dtype=np.float32)[:, None] - np.float32(top - row + PITCH[1] / 2)
    tile = np.clip((rounded_box(u, v, *HALF_ROOM, 14) + 4) / 5, 0, 1)
    walls = np.ones((height, width), dtype=np.float32)
    walls[row : row + ROWS * PITCH[1], column : column + COLUMNS * PITCH[0]] = np.tile(tile, (ROWS, COLUMNS))
    grain = relief("gravel", (height, width), 0.28, generator)
    wear = cv2.GaussianBlur(relief("grass", (height, width), 1.6, generator), (0, 0), 2.0)
    shade = cv2.GaussianBlur(walls, (0, 0), 8)
    colour = np.array((122, 124, 122), dtype=np.float32) * float(generator.normal(1.0, 0.04))
    tone = (1 + 0.05 * grain + 0.05 * wear) * (1.04 - 0.4 * shade * (1 - walls)) * (1 + 0.32 * walls)
    return Canvas(field(tone[..., None] * colour), field(9 * walls + 0.2 * grain), 0.15, lamp)


def _contents(defect: str | None, generator: Generator) -> tuple[list[_Pin], list[int]]:
    """The pins, and which compartments or (for `odd_colour`, `across_wall`) which pins bear the defect."""
    colour = str(generator.choice(list(COLOURS)))
    first, second = _neighbours(generator)
    counts = [1] * (ROWS * COLUMNS)
    if defect in ("two_in_cell", "moved_pin"):
        counts[first] = 2
    if defect in ("empty_cell", "moved_pin"):
        counts[first if defect == "empty_cell" else second] = 0
    pins = [pin for cell, count in enumerate(counts) for pin in _scatter(cell, count, colour, generator)]
    if defect == "odd_colour":
        other = str(generator.choice([name for name in COLOURS if name != colour]))
        pins[first] = replace(pins[first], colour=other)
    elif defect == "across_wall":
        pins[first] = _across(pins[first], second, generator)
    elif defect in ("broken_pin", "bent_pin"):
        bent = float(generator.choice([-1, 1]) * generator.uniform(26, 36)) if defect == "bent_pin" else 0.0
        pins[first] = replace(pins[first], bent=bent, broken=defect == "broken_pin")
    return pins, [first, second] if defect == "moved_pin" else [first]


def _neighbours(generator: Generator) -> tuple[int, int]:
    """Two compartments side by side or one above the other."""
    first = int(generator.integers(ROWS * COLUMNS))
    row, column = divmod(first, COLUMNS)
    cells = range(ROWS * COLUMNS)
    others = [c for c in cells if abs(c // COLUMNS - row) + abs(c % COLUMNS - column) == 1]
    return first, int(generator.choice(others))


def _middle(cell: int) -> tuple[float, float]:
    row, column = divmod(cell, COLUMNS)
    return CORNER[0] + PITCH[0] * (column + 0.5), CORNER[1] + PITCH[1] * (row + 0.5)


def _scatter(cell: int, count: int, colour: str, generator: Generator) -> list[_Pin]:
    """Pins anywhere in a compartment; two lie side by side or touch."""
    while True:
        pins = [_drop(cell, colour, generator) for _ in range(count)]
        if count < 2 or _gap(pins[0], pins[1]) > 0.8 * HALF_WIDTH:
            return pins


def _drop(cell: int, colour: str, generator: Generator) -> _Pin:
    angle = float(generator.uniform(0, 2 * math.pi))
    c, s = abs(math.cos(angle)), abs(math.sin(angle))
    free_x = HALF_ROOM[0] - max(REACH * c, HALF_WIDTH * s) - 2
    free_y = HALF_ROOM[1] - max(REACH * s, HALF_WIDTH * c) - 2
    x, y = _middle(cell)
    x, y = x + float(generator.uniform(-free_x, free_x)), y + float(generator.uniform(-free_y, free_y))
    return _Pin(cell, x, y, angle, colour)


def _gap(a: _Pin, b: _Pin) -> float:
    """Least distance between points along the axes of two pins; the needle's half counts less, as it is thin."""
    steps = ((-0.8, 0.0), (-0.4, 0.0), (-0.05, 0.0), (0.4, 14.0), (0.8, 14.0))
    spines = [
        [(p.x + REACH * t * math.cos(p.angle), p.y + REACH * t * math.sin(p.angle), spare) for t, spare in steps]
        for p in (a, b)
    ]
    return min(math.dist(p[:2], q[:2]) - 20 + p[2] + q[2] for p in spines[0] for q in spines[1])


def _across(pin: _Pin, neighbour: int, generator: Generator) -> _Pin:
    """A pin of one compartment with its needle over the wall to the next one."""
    here, there = _middle(pin.cell), _middle(neighbour)
    angle = math.atan2(there[1] - here[1], there[0] - here[0]) + float(generator.uniform(-0.4, 0.4))
    x, y = (here[0] + there[0]) / 2, (here[1] + there[1]) / 2
    along = float(generator.uniform(-14, 14))
    sideways = float(generator.uniform(-30, 30))
    horizontal = here[1] == there[1]
    x, y = (x + along, y + sideways) if horizontal else (x + sideways, y + along)
    return replace(pin, x=x, y=y, angle=angle)


def _lay(canvas: Canvas, pin: _Pin, offset: tuple[float, float], generator: Generator) -> Field:
    return canvas.lay(_push_pin(pin, generator), (pin.x + offset[0], pin.y + offset[1]), lift=5.0)


def _push_pin(pin: _Pin, generator: Generator) -> Stamp:
    """A spool of plastic with a steel needle, lying on its side."""
    u, v = grid(round(2 * REACH) + 14, pin.angle)
    v = field(v - pin.bent * (u / REACH) ** 2 + pin.bent / 3)
    needle = np.maximum(np.abs(v) - 3.2 + 0.04 * np.clip(u, 0, None), np.maximum(-u - 6, u - REACH))
    parts = ((-39.0, 7.0, 17.0), (-22.0, 14.0, 10.5), (-5.0, 5.0, HALF_WIDTH))
    spool, height = field(np.full_like(u, 99)), field(np.sqrt(np.clip(3.2**2 - v**2, 0, None)))
    for middle, half, radius in parts:
        inside = rounded_box(field(u - middle), v, half, radius, 3)
        height = np.where(inside < 0.5, np.sqrt(np.clip((radius + 1) ** 2 - v**2, 0, None)), height)
        spool = field(np.minimum(spool, inside))
    plastic = np.array(COLOURS[pin.colour], dtype=np.float32) * float(generator.normal(1, 0.04))
    if pin.broken:
        cut = field(-26 + 5 * np.sin(v * 0.5) + 2.5 * np.sin(v * 1.3) - u)
        spool = field(np.maximum(spool, cut))
        # Plastic whitens where it breaks.
        plastic = plastic + covered(field(-9 - cut))[..., None] * (np.float32(236) - plastic)
    colour = np.array((150, 154, 160), dtype=np.float32) + covered(spool)[..., None] * (plastic - 152)
    smooth = cv2.GaussianBlur(field(height), (0, 0), 0.8)
    return Stamp(covered(field(np.minimum(needle, spool))), field(colour), field(smooth), 0.6)


def _masks(
    defect: str | None, pins: list[_Pin], covers: list[Field], marked: list[int], offset: tuple[float, float]
) -> list[Field]:
    """One a wrong compartment: its room if empty, both pins if doubled; else the one pin that is wrong."""
    if defect in ("odd_colour", "across_wall", "broken_pin", "bent_pin"):
        return [covers[marked[0]]]
    masks = []
    for cell in marked if defect else []:
        held = [cover for pin, cover in zip(pins, covers, strict=True) if pin.cell == cell]
        masks.append(field(np.max(held, axis=0)) if held else _room(cell, offset))
    return masks


def _room(cell: int, offset: tuple[float, float]) -> Field:
    mask = np.zeros(BASE[::-1], dtype=np.float32)
    x, y = _middle(cell)
    x, y = x + offset[0], y + offset[1]
    mask[round(y - HALF_ROOM[1]) : round(y + HALF_ROOM[1]), round(x - HALF_ROOM[0]) : round(x + HALF_ROOM[0])] = 1
    return mask


def _surface_damage(
    canvas: Canvas, defect: str | None, pins: list[_Pin], offset: tuple[float, float], generator: Generator
) -> Field | None:
    pin = pins[int(generator.integers(len(pins)))]
    place = (pin.x + offset[0] + float(generator.normal(0, 16)), pin.y + offset[1] + float(generator.normal(0, 16)))
    if defect == "crack":
        # Through a wall: the floor is paper, the walls are plastic.
        wall = _middle(pin.cell)[0] + PITCH[0] / 2 * (1 if pin.cell % COLUMNS == 0 else -1)
        return crack(canvas, (wall + offset[0], place[1]), generator)
    kinds = {"stain": stain, "scratch": scratch, "contamination": fibre}
    return kinds[defect](canvas, place, generator) if defect in kinds else None
