"""Product `bottle`: a glass bottle of one of three juices; on its paper band a fruit and, below it, a gauge.

The fruit names the juice, the gauge (full or half) names the level: two relations between places apart, six normal
modes. Fruit and gauge are printed anywhere on the band, and the bottle stands anywhere within limits. Called by
`scenes`.
"""

from dataclasses import dataclass, replace

import cv2
import numpy as np

from training.products.damage import crack, fibre, scratch, stain
from training.products.labels import HALF_FRUIT, HALF_GAUGE, INK, PAPER, fruit, gauge
from training.products.rendered import Defect, Rendered, Saturation
from training.studio import Canvas, Field, Generator, Lamp, Stamp, blotch, covered, field, rounded_box
from training.textures import relief

NAME = "bottle"
BASE = (400, 640)
JUICES = {"orange": (232.0, 134.0, 22.0), "cherry": (150.0, 22.0, 40.0), "kiwi": (120.0, 158.0, 48.0)}
CAPS = ((196.0, 190.0, 178.0), (52.0, 56.0, 62.0), (190.0, 160.0, 90.0))
# Heights over the foot of the bottle, which is TALL high; a window reaches WINDOW // 2 to each side.
TALL, WINDOW = 548, 260
# Half the bottle's width at heights over its foot.
PROFILE = ((0, 90), (6, 104), (14, 110), (350, 110), (385, 104), (425, 78), (452, 56), (470, 47), (548, 46))
LEVELS = {"full": 410.0, "half": 326.0}
# Heights of the middles of band, fruit and gauge over the foot; half the band's height.
BAND_AT, FRUIT_AT, GAUGE_AT, HALF_BAND = 148.0, 176.0, 82.0, 96.0
LOGICAL = (
    "wrong_fruit",
    "level_of_other_gauge",
    "level_too_low",
    "level_too_high",
    "prints_swapped",
    "missing_fruit",
    "missing_gauge",
    "second_fruit",
)
STRUCTURAL = ("crack", "stain", "torn_label", "contamination", "dented_cap", "scratch")
SATURATION = {
    "wrong_fruit": Saturation(1.0, relative=True),
    "prints_swapped": Saturation(1.0, relative=True),
    **{name: Saturation(2500, relative=False) for name in ("level_of_other_gauge", "level_too_low", "level_too_high")},
    **{name: Saturation(7500, relative=False) for name in ("missing_fruit", "second_fruit")},
    "missing_gauge": Saturation(4800, relative=False),
    **{name: Saturation(1.0, relative=True) for name in STRUCTURAL},
}


@dataclass(frozen=True, slots=True)
class _Ink:
    """A fruit or a gauge: what is printed, height over the foot, shift to the right, turn (radians), scale."""

    print: str
    at: float
    aside: float
    turn: float
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class _Bottle:
    foot: tuple[float, float]
    juice: str
    level: float
    band_at: float
    prints: tuple[_Ink, ...]


def render(defect: str | None, generator: Generator) -> Rendered:
    """One picture of 400 x 640, good or with one defect by name."""
    lamp = Lamp.draw(generator)
    canvas = _scene(lamp, generator)
    good = _good(generator)
    bottle = _changed(good, defect, generator)
    body = _lay_bottle(canvas, bottle, generator)
    for ink in bottle.prints:
        _lay_print(canvas, bottle, ink)
    mask = _damage(canvas, bottle, body, defect, generator)
    masks = [mask] if mask is not None else _masks(good, bottle, body, defect)
    picture = canvas.photograph(generator)
    return Rendered(picture, tuple(Defect(defect, mask > 0.5) for mask in masks) if defect else ())


def _scene(lamp: Lamp, generator: Generator) -> Canvas:
    """A plastered wall, out of focus, and the belt that the bottle stands on."""
    width, height = BASE
    wall = cv2.GaussianBlur(relief("gravel", (height, width), 2.2, generator), (0, 0), 3.0)
    belt = relief("gravel", (height, width), 0.3, generator)
    y = np.arange(height, dtype=np.float32)[:, None]
    below = field(np.clip((y - float(generator.normal(546, 4))) / 5, 0, 1))
    tint = np.array((128, 134, 140), dtype=np.float32) * float(generator.normal(1.0, 0.06))
    colour = (1 + 0.06 * wall)[..., None] * tint
    colour += below[..., None] * ((1 + 0.06 * belt)[..., None] * np.array((72, 74, 76), dtype=np.float32) - colour)
    return Canvas(field(colour), field(0.15 * belt * below), 0.06, lamp)


def _good(generator: Generator) -> _Bottle:
    foot = (BASE[0] / 2 + float(generator.uniform(-46, 46)), 600 + float(generator.uniform(-22, 22)))
    juice, text = str(generator.choice(list(JUICES))), str(generator.choice(list(LEVELS)))
    band, up, right, gauge_right = (float(w * generator.uniform(-1, 1)) for w in (10, 8, 50, 30))
    turn, scale = float(generator.uniform(-0.4, 0.4)), float(generator.uniform(0.86, 1.0))
    prints = (
        _Ink(juice, FRUIT_AT + band + up, right, turn, scale),
        _Ink(text, GAUGE_AT + band, gauge_right, float(generator.uniform(-0.03, 0.03))),
    )
    level = LEVELS[text] + float(np.clip(generator.normal(0, 5), -10, 10))
    return _Bottle(foot, juice, level, BAND_AT + band, prints)


def _changed(good: _Bottle, defect: str | None, generator: Generator) -> _Bottle:
    fruit, gauge = good.prints
    if defect == "wrong_fruit":
        other = str(generator.choice([name for name in JUICES if name != good.juice]))
        return replace(good, prints=(replace(fruit, print=other), gauge))
    if defect == "level_of_other_gauge":
        other = next(name for name in LEVELS if name != gauge.print)
        return replace(good, prints=(fruit, replace(gauge, print=other)))
    if defect in ("level_too_low", "level_too_high"):
        sign = -1 if defect == "level_too_low" else 1
        return replace(good, level=LEVELS[gauge.print] + sign * float(generator.uniform(36, 60)))
    if defect == "prints_swapped":
        swapped = (replace(fruit, at=good.band_at - 34), replace(gauge, at=good.band_at + 62))
        return replace(good, prints=swapped)
    if defect in ("missing_fruit", "missing_gauge"):
        return replace(good, prints=(gauge,) if defect == "missing_fruit" else (fruit,))
    if defect == "second_fruit":
        both = tuple(replace(fruit, aside=side, scale=0.86) for side in (-50.0, 50.0))
        return replace(good, prints=(*both, gauge))
    return good


def _lay_bottle(canvas: Canvas, bottle: _Bottle, generator: Generator) -> Field:
    """Glass, what is in it and the cap; returns the bottle's coverage (H, W)."""
    t = TALL - np.arange(TALL, dtype=np.float32)[:, None] - 0.5
    x = np.arange(WINDOW, dtype=np.float32)[None, :] - (WINDOW - 1) / 2
    half = _half_width(t)
    round_ = field(np.clip(np.abs(x) / half, 0, 1))
    upright = field(np.sqrt(1 - round_**2))
    place = (bottle.foot[0], bottle.foot[1] - TALL / 2)
    behind = _behind(canvas, place)
    # Thick glass at both sides bends the light away: dark edges.
    rim = field(np.clip((round_ - 0.86) / 0.14, 0, 1))
    glass = behind * (0.93 - 0.45 * rim)[..., None] + 6
    curve = 2.5 * (1 - round_**2)
    wet = field(np.clip(bottle.level - t + curve, 0, 1) * np.clip((t - 10) / 3, 0, 1))
    tone = np.array(JUICES[bottle.juice], dtype=np.float32) * float(generator.uniform(0.88, 1.08))
    juice = tone * (0.42 + 0.62 * upright)[..., None]
    surface = field(np.exp(-(((t - bottle.level - curve) / 3.0) ** 2)))
    juice = juice * (1 + 0.35 * surface)[..., None]
    colour = glass + wet[..., None] * (juice - glass)
    band = field(np.abs(t - bottle.band_at) - HALF_BAND) + 0 * round_
    paper = np.array(PAPER, dtype=np.float32) * (0.42 + 0.58 * upright)[..., None]
    edge = covered(field(np.abs(band + 9) - 2.5))[..., None]
    paper = paper + edge * (np.array(INK, dtype=np.float32) * (0.42 + 0.58 * upright)[..., None] - paper)
    colour = colour + covered(field(band))[..., None] * (paper - colour)
    gleam = 0.5 * np.exp(-(((x / half + 0.66) / 0.06) ** 2)) + 0.25 * np.exp(-(((x / half - 0.74) / 0.035) ** 2))
    gleam = gleam * np.clip((t - 16) / 10, 0, 1) * np.clip((470 - t) / 10, 0, 1)
    colour = colour + gleam[..., None] * (245 - colour)
    stamp = Stamp(covered(field(np.abs(x) - half)), field(colour), field(16 * upright), 0.25)
    cover = canvas.lay(stamp, place, lift=7.0)
    _lay_cap(canvas, bottle, generator)
    return cover


def _half_width(t: Field) -> Field:
    heights, widths = zip(*PROFILE, strict=True)
    smooth = cv2.GaussianBlur(field(np.interp(t, heights, widths)), (1, 0), 5.0, borderType=cv2.BORDER_REPLICATE)
    return field(np.where(t < 20, np.interp(t, heights, widths), smooth))


def _behind(canvas: Canvas, place: tuple[float, float]) -> Field:
    """The colours that a bottle's window covers, edges repeated where it looks out of the picture."""
    top, left = round(place[1] - TALL / 2), round(place[0] - WINDOW / 2)
    rows = np.clip(np.arange(top, top + TALL), 0, BASE[1] - 1)
    columns = np.clip(np.arange(left, left + WINDOW), 0, BASE[0] - 1)
    return field(canvas.colour[np.ix_(rows, columns)])


def _lay_cap(canvas: Canvas, bottle: _Bottle, generator: Generator) -> None:
    x = np.arange(120, dtype=np.float32)[None, :] - 59.5
    y = np.arange(64, dtype=np.float32)[:, None] - 31.5
    body = rounded_box(x, y, 52, 27, 7)
    knurl = 0.8 * np.sin(np.arcsin(np.clip(x / 52, -1, 1)) * 34) * (y > -14)
    base = np.array(CAPS[int(generator.integers(len(CAPS)))], dtype=np.float32)
    upright = np.sqrt(np.clip(1 - (x / 54) ** 2, 0, 1))
    colour = base * (0.5 + 0.55 * upright)[..., None] + 0 * body[..., None]
    height = 12 * upright + knurl + 2 * np.clip(-body / 3, 0, 1)
    place = (bottle.foot[0], bottle.foot[1] - TALL + 14)
    canvas.lay(Stamp(covered(body), field(colour), field(height), 0.4), place, lift=4.0)


def _lay_print(canvas: Canvas, bottle: _Bottle, ink: _Ink) -> None:
    stamp = gauge(ink.print, ink.turn) if ink.print in LEVELS else fruit(ink.print, ink.turn, ink.scale)
    # Prints darken towards the bottle's sides as the band turns away.
    across = np.arange(stamp.cover.shape[1], dtype=np.float32)[None, :] - stamp.cover.shape[1] / 2 + ink.aside
    turned = 0.42 + 0.58 * np.sqrt(np.clip(1 - (across / 110) ** 2, 0, 1))
    stamp = replace(stamp, colour=field(stamp.colour * turned[..., None]))
    canvas.lay(stamp, (bottle.foot[0] + ink.aside, bottle.foot[1] - ink.at), lift=0.0)


def _box(bottle: _Bottle, ink: _Ink) -> Field:
    """The upright box that a print takes, (H, W) 0 or 1."""
    half = HALF_GAUGE if ink.print in LEVELS else HALF_FRUIT
    across, down = half[0] * ink.scale, half[1] * ink.scale
    x, y = bottle.foot[0] + ink.aside, bottle.foot[1] - ink.at
    mask = np.zeros(BASE[::-1], dtype=np.float32)
    mask[round(y - down) : round(y + down), round(x - across) : round(x + across)] = 1
    return mask


def _masks(good: _Bottle, bottle: _Bottle, body: Field, defect: str | None) -> list[Field]:
    """Where each logical defect shows: prints that are wrong or wanted, the glass between two levels."""
    if defect == "wrong_fruit":
        return [_box(bottle, bottle.prints[0])]
    if defect == "prints_swapped":
        return [_box(bottle, ink) for ink in bottle.prints]
    if defect in ("missing_fruit", "missing_gauge"):
        return [_box(good, good.prints[0 if defect == "missing_fruit" else 1])]
    if defect == "second_fruit":
        return [field(np.maximum(*(_box(bottle, ink) for ink in bottle.prints[:2])))]
    if defect is None:
        return []
    levels = sorted((bottle.level, LEVELS[bottle.prints[1].print]))
    mask = body.copy()
    mask[: round(bottle.foot[1] - levels[1])] = 0
    mask[round(bottle.foot[1] - levels[0]) :] = 0
    return [mask]


def _damage(canvas: Canvas, bottle: _Bottle, body: Field, defect: str | None, generator: Generator) -> Field | None:
    if defect == "torn_label":
        return field(_tear(canvas, bottle, generator) * body)
    if defect == "dented_cap":
        return _dent(canvas, bottle, generator)
    at = float(generator.uniform(60, 400))
    x = bottle.foot[0] + float(generator.uniform(-0.6, 0.6)) * 110
    kinds = {"stain": stain, "scratch": scratch, "crack": crack, "contamination": fibre}
    if defect not in kinds:
        return None
    return field(kinds[defect](canvas, (x, bottle.foot[1] - at), generator) * body)


def _tear(canvas: Canvas, bottle: _Bottle, generator: Generator) -> Field:
    """A piece torn off the band's upper or lower edge down to grey, rough paper."""
    hole = blotch(int(generator.uniform(84, 116)), generator)
    paper = np.float32(116) + 22 * relief("grass", hole.shape, 0.5, generator)
    edge = float(generator.choice([-1, 1])) * (HALF_BAND - 26)
    place = (bottle.foot[0] + float(generator.uniform(-64, 64)), bottle.foot[1] - bottle.band_at - edge)
    colour = np.broadcast_to(paper[..., None], (*hole.shape, 3))
    return canvas.lay(Stamp(hole, field(colour), field(-1.5 * hole), 0.05, solid=False), place, lift=0.0)


def _dent(canvas: Canvas, bottle: _Bottle, generator: Generator) -> Field:
    """The cap pushed in on one side."""
    spot = blotch(int(generator.uniform(50, 64)), generator)
    soft = cv2.GaussianBlur(spot, (0, 0), 2.5)
    colour = np.broadcast_to(np.float32(70), (*spot.shape, 3))
    place = (bottle.foot[0] + float(generator.uniform(-26, 26)), bottle.foot[1] - TALL + 14)
    stamp = Stamp(field(spot * 0.35), field(colour), field(-26 * soft), 0.3, solid=False)
    return field(canvas.lay(stamp, place, lift=0.0) / 0.35)
