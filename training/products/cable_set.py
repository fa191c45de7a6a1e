"""Product `cable-set`: two cables of one colour between two terminal blocks, held by a clamp.

The colour, free from set to set, decides how many black rings the white sleeve at each end bears; cables leave and
enter at ports of the same number. So good sets have several modes, and what is wrong is a relation. Called by `scenes`.
"""

from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import NDArray

from training.products.rendered import Defect, Rendered, Saturation
from training.studio import Canvas, Field, Generator, Lamp, Stamp, blotch, covered, field, grid, metal, rounded_box
from training.textures import relief

Offset = NDArray[np.float64]
NAME = "cable-set"
BASE = (640, 480)
# Colour of the insulation and the rings it asks for.
COLOURS = {"yellow": ((206, 172, 44), 1), "blue": ((44, 84, 168), 2), "red": ((178, 46, 40), 3)}
PORTS_Y = (140.0, 240.0, 340.0)
LEFT_X, RIGHT_X = 132.0, 508.0
RADIUS = 11.0
SLEEVE, RING, RING_PITCH = 84.0, 12.0, 23.0
CLAMP = (46.0, 30.0)
LOGICAL = ("marks_differ", "marks_wrong", "wrong_pair", "missing_clamp", "extra_cable")
STRUCTURAL = ("cut_insulation", "burn", "dent")
SATURATION = {
    "marks_differ": Saturation(1700, relative=False),
    "marks_wrong": Saturation(1700, relative=False),
    "wrong_pair": Saturation(0.5, relative=True),
    "missing_clamp": Saturation(4000, relative=False),
    "extra_cable": Saturation(0.33, relative=True),
    **{name: Saturation(1.0, relative=True) for name in STRUCTURAL},
}


@dataclass(frozen=True, slots=True)
class _Cable:
    port: int
    colour: str
    marks: tuple[int, int]
    sag: tuple[float, float]


@dataclass(frozen=True, slots=True)
class _Block:
    middle: tuple[float, float]
    cover: Field


def render(defect: str | None, generator: Generator) -> Rendered:
    """One picture of 640 x 480, good or with one defect by name."""
    lamp = Lamp.draw(generator)
    canvas = _bench(lamp, generator)
    offset = generator.normal(0, 3.0, size=2)
    cables, wrong = _wiring(defect, generator)
    covers = [_lay_cable(canvas, cable, offset) for cable in cables]
    blocks = [_lay_block(canvas, side, offset, generator) for side in (0, 1)]
    covers = [cover * (1 - blocks[0].cover) * (1 - blocks[1].cover) for cover in covers]
    clamp_x = float(generator.uniform(270, 370))
    if defect != "missing_clamp":
        _lay_clamp(canvas, cables, clamp_x, offset, generator)
    mask = _damage(canvas, defect, covers, blocks, clamp_x, generator)
    if mask is None:
        mask = _logical_mask(defect, cables, covers, wrong, offset)
    picture = canvas.photograph(generator)
    return Rendered(picture) if defect is None else Rendered(picture, (Defect(defect, mask > 0.5),))


def _bench(lamp: Lamp, generator: Generator) -> Canvas:
    width, height = BASE
    grain = relief("gravel", (height, width), 0.22, generator)
    wear = cv2.GaussianBlur(relief("grass", (height, width), 1.6, generator), (0, 0), 2.0)
    tone = (1 + 0.05 * grain + 0.05 * wear) * float(generator.normal(1.0, 0.04))
    colour = np.array((112, 122, 116), dtype=np.float32)
    return Canvas(field(tone[..., None] * colour), field(0.18 * grain), 0.12, lamp)


def _wiring(defect: str | None, generator: Generator) -> tuple[list[_Cable], int]:
    """The cables of a set and the index of the one that bears the defect."""
    names = list(COLOURS)
    colour = str(generator.choice(names))
    ports = sorted(int(p) for p in generator.choice(3, size=2, replace=False))
    cables = [_cable(port, colour, generator) for port in ports]
    wrong = int(generator.integers(2))
    marks = COLOURS[colour][1]
    others = [n for n in (1, 2, 3) if n != marks]
    if defect == "marks_differ":
        other = int(generator.choice(others))
        ends = (marks, other) if generator.random() < 0.5 else (other, marks)
        cables[wrong] = replace(cables[wrong], marks=ends)
    elif defect == "marks_wrong":
        cables[wrong] = replace(cables[wrong], marks=(int(generator.choice(others)),) * 2)
    elif defect == "wrong_pair":
        different = str(generator.choice([name for name in names if name != colour]))
        cables[wrong] = _cable(cables[wrong].port, different, generator)
    elif defect == "extra_cable":
        free = next(port for port in range(3) if port not in ports)
        cables.append(_cable(free, colour, generator))
    return cables, wrong


def _cable(port: int, colour: str, generator: Generator) -> _Cable:
    sag = generator.normal(0, 24, size=2)
    return _Cable(port, colour, (COLOURS[colour][1],) * 2, (float(sag[0]), float(sag[1])))


def _centre_line(cable: _Cable, offset: Offset) -> Field:
    """Points (n, 2) of the cable's axis: straight at both ends, sagging in between."""
    y = PORTS_Y[cable.port]
    t = np.linspace(0, 1, 80)[:, None]
    inner = ((LEFT_X + 190, y + cable.sag[0]), (RIGHT_X - 190, y + cable.sag[1]))
    control = np.array([(LEFT_X - 30, y), *inner, (RIGHT_X + 30, y)])
    weights = np.concatenate([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3], axis=1)
    return field(weights @ control + offset)


def _lay_cable(canvas: Canvas, cable: _Cable, offset: Offset) -> Field:
    scale = 2
    points = _centre_line(cable, offset)
    # Only the rows that the cable crosses are drawn.
    top, bottom = int(points[:, 1].min()) - 16, int(points[:, 1].max()) + 17
    line = np.full(((bottom - top) * scale, BASE[0] * scale), 255, dtype=np.uint8)
    shifted = np.round((points - (0, top)) * scale * 16).astype(np.int32)
    cv2.polylines(line, [shifted], False, 0, 1, cv2.LINE_8, 4)
    distance = cv2.distanceTransform(line, cv2.DIST_L2, 5)
    away = cv2.resize(distance, (BASE[0], bottom - top), interpolation=cv2.INTER_AREA) / scale
    x = np.arange(BASE[0], dtype=np.float32)[None, :] - np.float32(offset[0])
    sleeve, ring = _sleeves(cable, x)
    radius = RADIUS + 2.5 * sleeve
    colour = np.broadcast_to(np.array(COLOURS[cable.colour][0], dtype=np.float32), (*away.shape, 3))
    colour = colour + sleeve[..., None] * (np.float32(214) - colour)
    colour = colour + ring[..., None] * (np.float32(30) - colour)
    height = np.sqrt(np.clip(radius**2 - away**2, 0, None))
    stamp = Stamp(covered(away - radius), colour.astype(np.float32), height.astype(np.float32), 0.35)
    return canvas.lay(stamp, (BASE[0] / 2, (top + bottom) / 2), lift=4.0)


def _sleeves(cable: _Cable, x: Field) -> tuple[Field, Field]:
    """Coverage of sleeves and rings along x (1, W), each end counted from its block outwards."""
    sleeve, ring = np.zeros_like(x), np.zeros_like(x)
    for along, marks in ((x - (LEFT_X + 12), cable.marks[0]), ((RIGHT_X - 12) - x, cable.marks[1])):
        sleeve = np.maximum(sleeve, covered(np.abs(along - SLEEVE / 2) - SLEEVE / 2))
        for index in range(marks):
            centre = SLEEVE / 2 + RING_PITCH * (index - (marks - 1) / 2)
            ring = np.maximum(ring, covered(np.abs(along - centre) - RING / 2))
    return sleeve, ring


def _lay_block(canvas: Canvas, side: int, offset: Offset, generator: Generator) -> _Block:
    """A terminal block with three ports and three screws."""
    u, v = (field[:, 114:226] for field in grid(340, float(generator.normal(0, 0.008))))
    body = rounded_box(u, v, 44, 152, 7)
    inward = 1.0 if side == 0 else -1.0
    height = 16 + np.clip(-body, 0, 4)
    colour = np.broadcast_to(np.array((72, 112, 92), dtype=np.float32), (*body.shape, 3)).copy()
    steel = metal((150, 152, 154), body.shape, 0.3, generator)
    for port in PORTS_Y:
        slot = rounded_box(u - inward * 30, v - (port - 240), 16, 15, 5)
        height = height - 9 * covered(slot * 0.7)
        colour *= (1 - 0.45 * covered(slot))[..., None]
        head = np.hypot(u + inward * 12, v - (port - 240)) - 14
        groove = rounded_box(u + inward * 12, v - (port - 240), 11, 2, 1)
        height = height + covered(head) * np.clip(-head, 0, 3) - 3 * covered(groove)
        colour += covered(head)[..., None] * (steel - colour)
        colour *= (1 - 0.5 * covered(groove))[..., None]
    stamp = Stamp(covered(body), colour.astype(np.float32), field(height), 0.3)
    middle = ((LEFT_X - 34 if side == 0 else RIGHT_X + 34) + float(offset[0]), 240 + float(offset[1]))
    return _Block(middle, canvas.lay(stamp, middle, lift=7.0))


def _lay_clamp(
    canvas: Canvas,
    cables: list[_Cable],
    x: float,
    offset: Offset,
    generator: Generator,
) -> None:
    """A bent sheet-metal strap over all cables at x, screwed down at both ends."""
    heights = [float(np.interp(x, line[:, 0], line[:, 1])) for line in (_centre_line(c, offset) for c in cables)]
    top, bottom = min(heights) - CLAMP[1], max(heights) + CLAMP[1]
    side = int(bottom - top) + 24
    u, v = grid(side, float(generator.normal(0, 0.03)))
    strap = rounded_box(u, v, CLAMP[0] / 2, (bottom - top) / 2, 6)
    height = 2.0 + np.clip(-strap, 0, 2)
    for y in heights:
        height = height + 13 * np.exp(-(((v + (top + bottom) / 2 - y) / 13) ** 2))
    for end in (-1, 1):
        screw = np.hypot(u, v - end * ((bottom - top) / 2 - 12)) - 8
        height = height + covered(screw) * np.clip(-screw, 0, 4)
    colour = metal((158, 160, 162), strap.shape, 0.0, generator)
    stamp = Stamp(covered(strap), colour, field(height), 0.8)
    canvas.lay(stamp, (x, (top + bottom) / 2), lift=5.0)


def _logical_mask(
    defect: str | None,
    cables: list[_Cable],
    covers: list[Field],
    wrong: int,
    offset: Offset,
) -> Field:
    """Both sleeves of a cable marked wrongly, all cables of a wrong set, the span where a clamp is wanted."""
    everywhere = np.max(covers, axis=0)
    x = np.arange(BASE[0], dtype=np.float32)[None, :] - np.float32(offset[0])
    if defect in ("marks_differ", "marks_wrong"):
        return field(covers[wrong] * _sleeves(cables[wrong], x)[0])
    if defect == "missing_clamp":
        span = (x > 247) & (x < 393)
        grown = cv2.dilate(field(everywhere), np.ones((61, 1), dtype=np.uint8))
        return field(grown * span)
    return field(everywhere)


def _damage(
    canvas: Canvas,
    defect: str | None,
    covers: list[Field],
    blocks: list[_Block],
    clamp_x: float,
    generator: Generator,
) -> Field | None:
    if defect == "dent":
        return _dent(canvas, blocks[int(generator.integers(2))], generator)
    if defect not in ("cut_insulation", "burn"):
        return None
    cover = covers[int(generator.integers(len(covers)))]
    free = [c for c in range(244, 397) if abs(c - clamp_x) > CLAMP[0] / 2 + 18]
    x = int(generator.choice(free))
    y = float(np.flatnonzero(cover[:, x] > 0.5).mean())
    if defect == "burn":
        spot = field(cv2.GaussianBlur(blotch(int(generator.uniform(56, 84)), generator), (0, 0), 2.5))
        colour = np.broadcast_to(np.array((34, 24, 18), dtype=np.float32), (*spot.shape, 3))
        return canvas.lay(Stamp(spot * np.float32(0.9), colour, field(spot * 0), 0.05, solid=False), (x, y), lift=0.0)
    return _cut(canvas, cover, (x, y), generator)


def _cut(canvas: Canvas, cover: Field, place: tuple[float, float], generator: Generator) -> Field:
    """Insulation torn off over a length, strands of copper showing."""
    side = 48
    u, v = grid(side, 0.0)
    tear = np.abs(u) - float(generator.uniform(9, 15)) + 2.5 * np.sin(v * 0.9 + float(generator.uniform(0, 6)))
    strands = 0.75 + 0.35 * np.sin(v * 2.2 + 0.25 * u)
    top, left = round(place[1]) - side // 2, round(place[0]) - side // 2
    inside = covered(field(tear)) * cover[top : top + side, left : left + side]
    colour = strands[..., None] * np.array((176, 104, 62), dtype=np.float32)
    height = -1.5 + 0.8 * np.sin(v * 2.2 + 0.25 * u)
    stamp = Stamp(inside, colour.astype(np.float32), field(height), 0.8, solid=False)
    return canvas.lay(stamp, (left + side / 2, top + side / 2), lift=0.0)


def _dent(canvas: Canvas, block: _Block, generator: Generator) -> Field:
    """A crushed spot in a block's face."""
    spot = blotch(int(generator.uniform(40, 62)), generator)
    soft = cv2.GaussianBlur(spot, (0, 0), 2.0)
    colour = np.broadcast_to(np.array((134, 158, 146), dtype=np.float32), (*spot.shape, 3))
    x, y = generator.uniform(-16, 16), generator.choice([-100.0, -50.0, 50.0, 100.0])
    place = (block.middle[0] + float(x), block.middle[1] + float(y))
    cover = canvas.lay(Stamp(spot * np.float32(0.45), colour, field(-20 * soft), 0.1, solid=False), place, lift=0.0)
    return field(cover / np.float32(0.45))
