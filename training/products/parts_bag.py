"""Product `parts-bag`: a clear zip bag with a kit of screws, nuts, washers and wall plugs, lying anyhow in two pockets.

There are two kits, one with long and one with short screws, else alike: both screws of a kit have one length. Screws
and plugs belong in the left pocket, nuts and washers in the right one. Only what is in the bag as a whole tells good
from bad. Called by `scenes`.
"""

import math
from dataclasses import dataclass, replace

import cv2
import numpy as np

from training.products.damage import fibre, stain
from training.products.fasteners import SIDE, Look, part
from training.products.rendered import Defect, Rendered, Saturation
from training.studio import Canvas, Field, Generator, Lamp, Stamp, blotch, covered, field
from training.textures import relief

NAME = "parts-bag"
BASE = (640, 480)
SCALE = 1.75
LOOKS = {
    "long": Look(SCALE, (178.0, 182.0, 186.0), 26.0),
    "short": Look(SCALE, (178.0, 182.0, 186.0), -20.0),
    "nut": Look(SCALE, (206.0, 160.0, 60.0)),
    "washer": Look(SCALE, (178.0, 66.0, 40.0), gloss=0.5),
    "plug": Look(SCALE, (44.0, 104.0, 186.0), gloss=0.5),
}
SHAPES = {"long": "screw", "short": "screw", "nut": "nut", "washer": "washer", "plug": "pin"}
KIT = {"nut": 2, "washer": 2, "plug": 1}
SCREWS = 2
# Which pocket a kind belongs in: -1 is left, 1 is right.
POCKETS = {"long": -1, "short": -1, "plug": -1, "nut": 1, "washer": 1}
# Half sizes of the bag and of the room for parts in each pocket, whose middle lies `ROOM` beside and below the bag's.
HALF_BAG, HALF_ROOM, ROOM = (250.0, 212.0), (116.0, 164.0), (120.0, 22.0)
FOIL = np.array((206, 212, 218), dtype=np.float32)
ZIP_LINES = (-182.0, -168.0)
ZIP = (206.0, 60.0, 56.0)
LOGICAL = (
    "missing_screw",
    *(f"extra_{kind}" for kind in ("screw", "nut", "washer", "plug")),
    "wrong_kind",
    "mixed_kits",
    "doubled_group",
    "two_kits",
    "wrong_pocket",
    "swapped_pockets",
)
STRUCTURAL = ("torn_bag", "stain", "broken_part", "bent_screw", "contamination")
# What a part of a kind covers; of the two screws, the short one.
AREAS = {"screw": 3590, "nut": 3070, "washer": 3590, "plug": 3110}
SATURATION = {
    **{name: Saturation(AREAS[name.split("_")[1]], relative=False) for name in LOGICAL[:5]},
    "wrong_kind": Saturation(AREAS["nut"], relative=False),
    "mixed_kits": Saturation(AREAS["screw"], relative=False),
    **{name: Saturation(2 * AREAS["nut"], relative=False) for name in ("doubled_group", "two_kits")},
    "wrong_pocket": Saturation(1.0, relative=True),
    "swapped_pockets": Saturation(2 * AREAS["nut"], relative=False),
    **{name: Saturation(1.0, relative=True) for name in STRUCTURAL},
}


@dataclass(frozen=True, slots=True)
class _Piece:
    kind: str
    x: float
    y: float
    angle: float
    pocket: int
    bent: float = 0.0
    broken: bool = False


@dataclass(frozen=True, slots=True)
class _Bag:
    middle: tuple[float, float]
    angle: float

    def at(self, u: float, v: float) -> tuple[float, float]:
        """Where a point of the bag lies in the picture."""
        c, s = math.cos(self.angle), math.sin(self.angle)
        return self.middle[0] + u * c - v * s, self.middle[1] + u * s + v * c


def render(defect: str | None, generator: Generator) -> Rendered:
    """One picture of 640 x 480, good or with one defect by name."""
    lamp = Lamp.draw(generator)
    canvas = _ground(lamp, generator)
    place = (320 + float(generator.uniform(-10, 10)), 240 + float(generator.uniform(-6, 6)))
    bag = _Bag(place, float(np.clip(generator.normal(0, 0.015), -0.04, 0.04)))
    kinds, wrong = _contents(defect, generator)
    pieces = _damaged(_scatter(_pocketed(kinds, defect, generator), bag, generator), defect, generator)
    covers = [_lay(canvas, piece, generator) for piece in pieces]
    dirt = _dirt(canvas, pieces, defect, generator)
    film = _lay_film(canvas, bag, generator)
    masks = [_tear(canvas, bag, film, generator)] if defect == "torn_bag" else dirt
    if defect and not masks:
        masks = _masks(defect, pieces, covers, film, wrong)
    picture = canvas.photograph(generator)
    return Rendered(picture, tuple(Defect(defect, mask > 0.5) for mask in masks) if defect else ())


def _ground(lamp: Lamp, generator: Generator) -> Canvas:
    """A worktop of wood, painted grey."""
    width, height = BASE
    # Grass drawn out to twelve times its length is the grain of wood.
    drawn_out = relief("grass", (height, width // 12), 0.5, generator)
    fibres = cv2.resize(drawn_out, BASE, interpolation=cv2.INTER_CUBIC)
    colour = np.array((100, 104, 106), dtype=np.float32) * float(generator.normal(1.0, 0.04))
    tone = 1 + 0.03 * fibres
    return Canvas(field(tone[..., None] * colour), field(0.06 * fibres), 0.1, lamp)


def _contents(defect: str | None, generator: Generator) -> tuple[list[str], tuple[str, ...]]:
    """The kinds in the bag, and those of which there are too many (or that do not belong together)."""
    length = str(generator.choice(["long", "short"]))
    kinds = [length] * SCREWS + [kind for kind, count in KIT.items() for _ in range(count)]
    fault, _, name = (defect or "").partition("_")
    kind = length if name == "screw" else name
    if defect == "mixed_kits":
        kinds[0] = "short" if length == "long" else "long"
        return kinds, ("long", "short")
    if defect == "two_kits":
        return kinds * 2, tuple(set(kinds))
    if defect == "doubled_group":
        twice = str(generator.choice(["nut", "washer"]))
        return kinds + [twice] * KIT[twice], (twice,)
    if defect == "wrong_kind":
        gone, more = (str(k) for k in generator.choice(["nut", "washer", "plug", length], size=2, replace=False))
        kinds[kinds.index(gone)] = more
        return kinds, (more,)
    if fault == "missing":
        kinds.remove(kind)
    elif fault == "extra":
        return [*kinds, kind], (kind,)
    return kinds, ()


def _pocketed(kinds: list[str], defect: str | None, generator: Generator) -> list[tuple[str, int]]:
    """Every part with the pocket that it goes into."""
    pockets = [POCKETS[kind] for kind in kinds]
    if defect == "swapped_pockets":
        pockets = [-pocket for pocket in pockets]
    elif defect == "wrong_pocket":
        # Long screws would hardly fit beside the rest.
        astray = int(generator.choice([at for at, kind in enumerate(kinds) if kind not in ("long", "short")]))
        pockets[astray] = -pockets[astray]
    return list(zip(kinds, pockets, strict=True))


def _scatter(kinds: list[tuple[str, int]], bag: _Bag, generator: Generator) -> list[_Piece]:
    """Places parts anywhere in their pockets; they may touch and lie on each other a little."""
    # A bag that is too full holds its parts closer together.
    near = 47 if len(kinds) < 10 else 30
    while True:
        pieces: list[_Piece] = []
        for kind, pocket in kinds:
            for _ in range(40):
                piece = _drop(kind, pocket, bag, generator)
                if all(_apart(piece, other, near) for other in pieces):
                    pieces.append(piece)
                    break
        if len(pieces) == len(kinds):
            return pieces


def _drop(kind: str, pocket: int, bag: _Bag, generator: Generator) -> _Piece:
    reach = _reach(kind)
    while True:
        turn = float(generator.uniform(0, 2 * math.pi))
        free = (HALF_ROOM[0] - reach * abs(math.cos(turn)) - 18, HALF_ROOM[1] - reach * abs(math.sin(turn)) - 18)
        if min(free) > 0:
            break
    u, v = (float(generator.uniform(-room, room)) for room in free)
    x, y = bag.at(u + pocket * ROOM[0], v + ROOM[1])
    return _Piece(kind, x, y, turn + bag.angle, pocket)


def _reach(kind: str) -> float:
    """Half a part's length."""
    shape, look = SHAPES[kind], LOOKS[kind]
    return look.scale * (SIDE[shape] + look.reach) / 2 - 6


def _apart(a: _Piece, b: _Piece, near: float) -> bool:
    return all(math.dist(p, q) > near for p in _spine(a) for q in _spine(b))


def _spine(piece: _Piece) -> list[tuple[float, float]]:
    reach = _reach(piece.kind) - 16
    steps = np.linspace(-1, 1, 5) if piece.kind not in ("nut", "washer") else (-0.6, 0.6)
    c, s = math.cos(piece.angle), math.sin(piece.angle)
    return [(piece.x + reach * float(t) * c, piece.y + reach * float(t) * s) for t in steps]


def _damaged(pieces: list[_Piece], defect: str | None, generator: Generator) -> list[_Piece]:
    """One piece bent or broken; it comes first."""
    if defect == "bent_screw":
        bent = float(generator.choice([-1, 1]) * generator.uniform(24, 32))
        return [replace(pieces[0], bent=bent), *pieces[1:]]
    if defect == "broken_part":
        at = int(generator.integers(len(pieces)))
        return [replace(pieces[at], broken=True), *pieces[:at], *pieces[at + 1 :]]
    return pieces


def _lay(canvas: Canvas, piece: _Piece, generator: Generator) -> Field:
    stamp = part(
        SHAPES[piece.kind],
        piece.angle,
        generator,
        bent=piece.bent,
        broken=piece.broken,
        look=LOOKS[piece.kind],
    )
    return canvas.lay(stamp, (piece.x, piece.y), lift=2.5 if piece.kind == "washer" else 5.0)


def _lay_film(canvas: Canvas, bag: _Bag, generator: Generator) -> Field:
    """The clear foil over the parts: a veil, creases that gleam, welded seams and the zip; returns its coverage."""
    here, u, v = _window(bag)
    outline = field(np.maximum(np.abs(u) - HALF_BAG[0], np.abs(v) - HALF_BAG[1]))
    cover = covered(outline)
    # Welded along the outline and down the middle, below the zip.
    middle = field(np.maximum(np.abs(u) - 4, ZIP_LINES[1] - v))
    seam = field(cover * np.maximum(np.clip((outline + 9) / 2, 0, 1), covered(middle)))
    share = 0.1 * cover + 0.22 * seam
    height = cover * _creases(u.shape, generator) + 0.8 * seam
    for line in ZIP_LINES:
        ridge = covered(field(np.maximum(np.abs(u) - HALF_BAG[0] + 6, np.abs(v - line) - 3.5)))
        share = np.maximum(share, 0.85 * ridge)
        height += 2.5 * ridge
    ink = np.array(ZIP, dtype=np.float32)
    veil = np.where((np.abs(v - np.mean(ZIP_LINES)) < 12)[..., None] & (share > 0.4)[..., None], ink, FOIL)
    canvas.colour[here] += share[..., None] * (veil - canvas.colour[here])
    canvas.height[here] += height
    canvas.gloss[here] = np.maximum(canvas.gloss[here], 0.4 * cover)
    whole = np.zeros_like(canvas.height)
    whole[here] = cover
    return whole


def _window(bag: _Bag) -> tuple[tuple[slice, slice], Field, Field]:
    """The part of the picture that the bag lies in, and coordinates (u, v) there about its middle."""
    c, s = math.cos(bag.angle), math.sin(bag.angle)
    across = round(HALF_BAG[0] * c + HALF_BAG[1] * abs(s)) + 2
    down = round(HALF_BAG[1] * c + HALF_BAG[0] * abs(s)) + 2
    column, row = round(bag.middle[0]), round(bag.middle[1])
    here = (
        slice(max(row - down, 0), min(row + down, BASE[1])),
        slice(max(column - across, 0), min(column + across, BASE[0])),
    )
    x = np.arange(here[1].start, here[1].stop, dtype=np.float32)[None, :] - bag.middle[0]
    y = np.arange(here[0].start, here[0].stop, dtype=np.float32)[:, None] - bag.middle[1]
    return here, field(x * c + y * s), field(y * c - x * s)


def _creases(shape: tuple[int, ...], generator: Generator) -> Field:
    """Soft folds of the foil as heights, most of them across the bag."""
    coarse = generator.standard_normal((11, 6)).astype(np.float32)
    folds = cv2.resize(coarse, (shape[1], shape[0]), interpolation=cv2.INTER_CUBIC)
    return field(0.7 * np.sqrt(folds**2 + 0.02))


def _tear(canvas: Canvas, bag: _Bag, film: Field, generator: Generator) -> Field:
    """A slit in the foil, its edges curled up and white."""
    side = int(generator.uniform(110, 150))
    hole = cv2.resize(blotch(side, generator), (side, round(side * 0.6)), interpolation=cv2.INTER_AREA)
    edge = field(np.clip(cv2.dilate(hole, np.ones((7, 7), dtype=np.uint8)) - hole, 0, 1))
    u, v = float(generator.uniform(-190, 190)), float(generator.uniform(-120, 150))
    white = np.broadcast_to(np.float32(232), (*edge.shape, 3))
    rim = canvas.lay(Stamp(field(0.7 * edge), field(white), field(5 * edge), 0.8, solid=False), bag.at(u, v), lift=3.0)
    dark = np.broadcast_to(np.float32(30), (*edge.shape, 3))
    inside = canvas.lay(
        Stamp(field(0.3 * hole), field(dark), field(0 * hole), 0.1, solid=False), bag.at(u, v), lift=0.0
    )
    return field(np.maximum(rim / 0.7, inside / 0.3) * (film > 0.5))


def _dirt(canvas: Canvas, pieces: list[_Piece], defect: str | None, generator: Generator) -> list[Field]:
    piece = pieces[int(generator.integers(len(pieces)))]
    place = (piece.x + float(generator.normal(0, 14)), piece.y + float(generator.normal(0, 14)))
    kinds = {"stain": stain, "contamination": fibre}
    return [kinds[defect](canvas, place, generator)] if defect in kinds else []


def _masks(defect: str, pieces: list[_Piece], covers: list[Field], film: Field, wrong: tuple[str, ...]) -> list[Field]:
    """All parts of a kind of which there is one too many; the whole bag for a part that is not there."""
    if defect in ("broken_part", "bent_screw"):
        return [covers[0]]
    astray = defect in ("wrong_pocket", "swapped_pockets")
    shown = [
        cover
        for piece, cover in zip(pieces, covers, strict=True)
        if piece.kind in wrong or (astray and piece.pocket != POCKETS[piece.kind])
    ]
    masks = [field(np.max(shown, axis=0))] if shown else []
    return [*masks, film] if defect == "wrong_kind" or not shown else masks
