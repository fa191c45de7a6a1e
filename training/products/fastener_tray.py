"""Product `fastener-tray`: a moulded tray with four compartments and a given count of one kind of part in each.

Parts lie anywhere and at any angle within their compartment, so that only counting and sorting tells good from bad.
Called by `scenes`.
"""

import math
from dataclasses import dataclass

import cv2
import numpy as np

from training.products.damage import scratch, stain
from training.products.fasteners import AREA, KINDS, SIDE, Look, part
from training.products.rendered import Defect, Rendered, Saturation
from training.studio import Canvas, Field, Generator, Lamp, field, rounded_box
from training.textures import relief

NAME = "fastener-tray"
BASE = (640, 480)
COUNTS = {"screw": 2, "nut": 3, "washer": 4, "pin": 2}
SCALE = 1.35
LOOKS = {
    "screw": Look(SCALE),
    "nut": Look(SCALE, (206.0, 160.0, 60.0)),
    "washer": Look(SCALE, (178.0, 66.0, 40.0), gloss=0.5),
    "pin": Look(SCALE, (44.0, 104.0, 186.0), gloss=0.5),
}
# Compartments as (left, top, right, bottom).
CELLS = {
    "screw": (36, 34, 330, 248),
    "nut": (350, 34, 604, 248),
    "washer": (36, 268, 372, 446),
    "pin": (392, 268, 604, 446),
}
LOGICAL = (
    "missing_screw",
    "missing_washer",
    *(f"extra_{kind}" for kind in KINDS),
    "wrong_kind",
    "wrong_compartment",
    "swapped_compartments",
)
# Kinds whose compartments may be confused: any of the pair fits into the other's.
CONFUSED = (("nut", "washer"), ("screw", "washer"), ("nut", "pin"))
STRUCTURAL = ("scratch", "broken_part", "stain", "bent")
SATURATION = {
    **{name: Saturation(round(SCALE**2 * AREA[name.split("_")[1]]), relative=False) for name in LOGICAL[:6]},
    **{name: Saturation(1.0, relative=True) for name in (*LOGICAL[6:], *STRUCTURAL)},
}


@dataclass(slots=True)
class _Piece:
    kind: str
    cell: str
    x: float
    y: float
    angle: float
    bent: float = 0.0
    broken: bool = False


def render(defect: str | None, generator: Generator) -> Rendered:
    """One picture of 640 x 480, good or with one defect by name."""
    lamp = Lamp.draw(generator)
    canvas = _tray(lamp, generator)
    pieces = _contents(defect, generator)
    marked = _damage(defect, pieces, generator)
    covers = [_lay(canvas, piece, generator) for piece in pieces]
    mask = _surface_damage(canvas, defect, pieces, generator)
    if mask is None:
        mask = _logical_mask(defect, pieces, covers, marked)
    picture = canvas.photograph(generator)
    return Rendered(picture) if defect is None else Rendered(picture, (Defect(defect, mask > 0.5),))


def _tray(lamp: Lamp, generator: Generator) -> Canvas:
    width, height = BASE
    x = np.arange(width, dtype=np.float32)[None, :]
    y = np.arange(height, dtype=np.float32)[:, None]
    walls = np.ones((height, width), dtype=np.float32)
    for left, top, right, bottom in CELLS.values():
        middle = ((left + right) / 2, (top + bottom) / 2)
        box = rounded_box(x - middle[0], y - middle[1], (right - left) / 2, (bottom - top) / 2, 18)
        walls = field(walls * np.clip((box + 5) / 6, 0, 1))
    turn = cv2.getRotationMatrix2D((width / 2, height / 2), float(generator.normal(0, 0.5)), 1.0)
    turn = turn + np.pad(generator.normal(0, 2.0, size=(2, 1)), ((0, 0), (2, 0)))
    walls = field(cv2.warpAffine(walls, turn, BASE, borderMode=cv2.BORDER_REPLICATE))
    grain = relief("gravel", (height, width), 0.35, generator)
    shade = cv2.GaussianBlur(walls, (0, 0), 9)
    colour = np.array((66, 74, 86), dtype=np.float32) * float(generator.normal(1.0, 0.04))
    tone = (1 + 0.03 * grain) * (1.05 - 0.3 * shade * (1 - walls)) * (1 + 0.12 * walls)
    return Canvas(field(tone[..., None] * colour), field(9 * walls + 0.14 * grain), 0.22, lamp)


def _contents(defect: str | None, generator: Generator) -> list[_Piece]:
    wanted = {kind: [kind] * count for kind, count in COUNTS.items()}
    fault, _, kind = (defect or "").partition("_")
    if fault == "missing":
        wanted[kind].pop()
    elif fault == "extra":
        wanted[kind].append(kind)
    elif defect == "wrong_kind":
        cell, other = generator.choice(["nut", "washer", "pin"], size=2, replace=False)
        wanted[str(cell)][-1] = str(other)
    elif defect == "swapped_compartments":
        first, second = CONFUSED[int(generator.integers(len(CONFUSED)))]
        wanted[first], wanted[second] = wanted[second], wanted[first]
    elif defect == "wrong_compartment":
        cell, other = CONFUSED[int(generator.integers(len(CONFUSED)))]
        wanted[cell] = [other] * COUNTS[other]
    return [piece for cell, kinds in wanted.items() for piece in _scatter(cell, kinds, generator)]


def _scatter(cell: str, kinds: list[str], generator: Generator) -> list[_Piece]:
    """Places parts apart from each other; starts over when a cell is packed so badly that the next one does not fit."""
    left, top, right, bottom = CELLS[cell]
    while True:
        pieces: list[_Piece] = []
        for kind in kinds:
            margin = SCALE * SIDE[kind] / 2 + 2
            for _ in range(60):
                x = float(generator.uniform(left + margin, right - margin))
                y = float(generator.uniform(top + margin, bottom - margin))
                piece = _Piece(kind, cell, x, y, float(generator.uniform(0, 2 * math.pi)))
                if all(_apart(piece, other) for other in pieces):
                    pieces.append(piece)
                    break
        if len(pieces) == len(kinds):
            return pieces


def _apart(a: _Piece, b: _Piece) -> bool:
    """Whether the spines of two parts keep a distance: long parts count as three discs along their axis."""
    near = SCALE * (_thickness(a.kind) + _thickness(b.kind)) / 2 + 3
    return all(math.dist(p, q) > near for p in _spine(a) for q in _spine(b))


def _thickness(kind: str) -> float:
    return {"screw": 29.0, "nut": 44.0, "washer": 44.0, "pin": 24.0}[kind]


def _spine(piece: _Piece) -> list[tuple[float, float]]:
    reach = SCALE * {"screw": 34.0, "nut": 0.0, "washer": 0.0, "pin": 24.0}[piece.kind]
    steps = (-1.0, -0.5, 0.0, 0.5, 1.0) if reach else (0.0,)
    c, s = math.cos(piece.angle), math.sin(piece.angle)
    return [(piece.x + reach * t * c, piece.y + reach * t * s) for t in steps]


def _damage(defect: str | None, pieces: list[_Piece], generator: Generator) -> list[_Piece]:
    """Bends or breaks a piece in place; returns the pieces that bear the defect."""
    if defect == "bent":
        piece = _one_of([p for p in pieces if p.kind in ("screw", "pin")], generator)
        piece.bent = float(generator.choice([-1, 1]) * generator.uniform(18, 26))
        return [piece]
    if defect == "broken_part":
        piece = _one_of(pieces, generator)
        piece.broken = True
        return [piece]
    return [p for p in pieces if defect == "wrong_kind" and p.kind != p.cell]


def _one_of(pieces: list[_Piece], generator: Generator) -> _Piece:
    return pieces[int(generator.integers(len(pieces)))]


def _lay(canvas: Canvas, piece: _Piece, generator: Generator) -> Field:
    stamp = part(piece.kind, piece.angle, generator, bent=piece.bent, broken=piece.broken, look=LOOKS[piece.kind])
    return canvas.lay(stamp, (piece.x, piece.y), lift=2.0 if piece.kind == "washer" else 4.5)


def _logical_mask(defect: str | None, pieces: list[_Piece], covers: list[Field], marked: list[_Piece]) -> Field:
    """Where a defect of whole parts shows: the cell of a missing part, every part of a kind with one too many."""
    mask = np.zeros(BASE[::-1], dtype=np.float32)
    fault, _, kind = (defect or "").partition("_")
    if fault == "missing":
        cells = {kind}
    elif defect in ("swapped_compartments", "wrong_compartment"):
        cells = {p.cell for p in pieces if p.kind != p.cell}
    else:
        cells = set()
        shown = [p for p in pieces if p.cell == kind] if fault == "extra" else marked
        for piece, cover in zip(pieces, covers, strict=True):
            if any(piece is other for other in shown):
                mask = field(np.maximum(mask, cover))
    for cell in cells:
        left, top, right, bottom = CELLS[cell]
        mask[top:bottom, left:right] = 1
    return mask


def _surface_damage(canvas: Canvas, defect: str | None, pieces: list[_Piece], generator: Generator) -> Field | None:
    if defect not in ("stain", "scratch"):
        return None
    piece = _one_of(pieces, generator)
    if defect == "stain":
        return stain(
            canvas, (piece.x + float(generator.normal(0, 18)), piece.y + float(generator.normal(0, 18))), generator
        )
    return scratch(canvas, (piece.x, piece.y), generator)
