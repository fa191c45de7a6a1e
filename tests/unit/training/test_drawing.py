"""Drawn pictures: the truth that comes with a picture is what it shows, and the seed decides all of it."""

import numpy as np
import pytest

from training import drawing
from training.drawing import (
    COLOURS,
    FORMULAS,
    GROUNDS,
    KINDS,
    PHOTOGRAPHS,
    RADIUS,
    SURFACES,
    Drawing,
    Shape,
    draw,
    draw_ground,
    draw_grounds,
    photograph,
    place_shapes,
    shape_mask,
)
from training.errors import DataError

SIZE = 64


def draw_only(monkeypatch: pytest.MonkeyPatch, shapes: list[Shape], seed: int = 0) -> Drawing:
    """A picture with exactly these shapes."""
    monkeypatch.setattr(drawing, "place_shapes", lambda *_: shapes)
    return draw(SIZE, np.random.default_rng(seed))


def test_the_seed_decides() -> None:
    """Same seed, same picture and truth; another seed, another picture."""
    first, again, other = (draw(SIZE, np.random.default_rng((7, n))) for n in (1, 1, 2))
    for layer in ("photograph", "clean", "surface", "colour", "damage"):
        assert np.array_equal(getattr(first, layer), getattr(again, layer))
    assert first.shapes == again.shapes
    assert not np.array_equal(first.photograph, other.photograph)


def test_layers_have_the_promised_types() -> None:
    for seed in range(20):
        d = draw(SIZE, np.random.default_rng(seed))
        assert d.photograph.shape == d.clean.shape == (SIZE, SIZE, 3)
        assert d.photograph.dtype == d.clean.dtype == d.surface.dtype == d.colour.dtype == np.uint8
        assert d.surface.max() < SURFACES
        assert d.colour.max() <= len(COLOURS)
        assert d.damage.dtype == np.float32
        assert 0 <= d.damage.min() <= d.damage.max() <= 1


def test_maps_agree_with_each_other() -> None:
    """A pixel has a colour label where and only where it shows a shape, and only labels of shapes that were laid."""
    for seed in range(30):
        d = draw(SIZE, np.random.default_rng(seed))
        assert np.array_equal(d.colour > 0, d.surface >= len(GROUNDS))
        seen = {(int(s) - len(GROUNDS), int(c) - 1) for s, c in zip(d.surface.flat, d.colour.flat, strict=True) if c}
        assert seen <= {(s.kind, s.colour) for s in d.shapes}


@pytest.mark.parametrize("colour", range(len(COLOURS)))
def test_a_lone_shape_is_where_and_what_the_labels_say(monkeypatch: pytest.MonkeyPatch, colour: int) -> None:
    """The pixels labelled as a square of a colour are near that colour; nothing else is labelled."""
    monkeypatch.setattr(drawing, "DAMAGED_SHARE", 0.0)
    kind = KINDS.index("square")
    d = draw_only(monkeypatch, [Shape(kind, colour, 32.0, 30.0, 12.0, 0.4)], seed=colour)
    labelled = d.surface == len(GROUNDS) + kind
    rows, columns = np.nonzero(labelled)
    assert labelled.sum() == pytest.approx(2 * 12**2, rel=0.2)
    assert (columns.mean(), rows.mean()) == pytest.approx((32, 30), abs=1)
    assert np.array_equal(labelled, d.colour == 1 + colour)
    assert np.abs(np.median(d.clean[labelled], axis=0) - COLOURS[colour]).max() < 80


def test_no_shapes_no_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    d = draw_only(monkeypatch, [])
    assert d.shapes == []
    assert d.colour.max() == 0
    assert d.surface.max() < len(GROUNDS)


def test_damage_is_marked_where_the_picture_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the same picture without blemishes, the clean picture differs only where damage is marked."""
    monkeypatch.setattr(drawing, "DAMAGED_SHARE", 1.0)
    found = 0
    for seed in range(10):
        generator = np.random.default_rng(seed)
        picture, surface = draw_grounds(SIZE, generator)
        before = picture.copy()
        canvas = drawing._Canvas(picture, surface, np.zeros((SIZE, SIZE), np.uint8), np.zeros((SIZE, SIZE), np.float32))
        drawing._blemish(canvas, generator)
        changed = np.abs(picture - before).max(axis=2) > 1
        assert not changed[canvas.damage == 0].any()
        found += int(changed.any())
    assert found >= 8


def test_a_cut_shape_lacks_a_part_and_says_so() -> None:
    """What a cut takes from the labels of a shape is what the damage map gains."""
    shape = Shape(KINDS.index("disc"), 0, 32.0, 32.0, 14.0, 0.0)

    def painted(cut: bool) -> drawing._Canvas:
        layers = (np.zeros((SIZE, SIZE, 3), np.float32), np.zeros((SIZE, SIZE), np.uint8))
        canvas = drawing._Canvas(*layers, layers[1].copy(), np.zeros((SIZE, SIZE), np.float32))
        drawing._paint(canvas, shape, np.random.default_rng(1), cut=cut)
        return canvas

    whole, broken = painted(False), painted(True)
    lost = (whole.colour > 0).sum() - (broken.colour > 0).sum()
    assert whole.damage.max() == 0
    assert lost > 50
    assert broken.damage.sum() == pytest.approx(lost, rel=0.1)
    assert not (broken.damage > 0.5)[broken.colour > 0].any()


@pytest.mark.parametrize("kind", range(len(KINDS)))
def test_every_kind_covers_something_of_its_size(kind: int) -> None:
    for radius in (RADIUS[0], 6.0, 12.0):
        mask = shape_mask((40, 40), Shape(kind, 0, 20.0, 20.0, radius, 0.3), np.random.default_rng(0))
        assert 0.08 * radius**2 < mask.sum() < 3.5 * (radius + 0.6) ** 2
        rows, columns = np.nonzero(mask > 0.5)
        assert np.hypot(rows - 20, columns - 20).max() < 1.25 * radius + 1.5


def test_kinds_differ() -> None:
    """No two kinds have the same outline at the same place and angle."""
    masks = [shape_mask((40, 40), Shape(k, 0, 20.0, 20.0, 12.0, 0.3), np.random.default_rng(0)) for k in range(16)]
    assert min(np.abs(a - b).sum() for i, a in enumerate(masks) for b in masks[:i]) > 20


def test_shapes_keep_their_distance() -> None:
    """Shapes lie inside the picture, within the range of radii, and overlap a little at most."""
    for seed in range(20):
        shapes = place_shapes(96, np.random.default_rng(seed))
        for i, s in enumerate(shapes):
            assert RADIUS[0] <= s.radius <= RADIUS[1]
            assert s.radius <= s.x <= 96 - s.radius
            assert all(np.hypot(s.x - o.x, s.y - o.y) >= 0.75 * (s.radius + o.radius) for o in shapes[:i])


@pytest.mark.parametrize("index", range(len(GROUNDS)))
def test_grounds_vary(index: int) -> None:
    """Each ground is a float picture of the right size that its generator changes."""
    generator = np.random.default_rng(index)
    one, two = draw_ground(index, 48, generator), draw_ground(index, 48, generator)
    assert one.shape == (48, 48, 3)
    assert one.dtype == np.float32
    assert np.isfinite(one).all()
    assert not np.array_equal(one, two)
    assert (one.std(axis=(0, 1)).max() > 1) == (GROUNDS[index] != "flat")


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_photographs_are_normalised(name: str) -> None:
    values = photograph(name)
    assert values.ndim == 3
    assert abs(values.mean()) < 1e-2
    assert values.std() == pytest.approx(1, abs=1e-2)


def test_a_broken_photograph_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    photograph.cache_clear()
    monkeypatch.setattr("training.drawing.cv2.imdecode", lambda *_: None)
    with pytest.raises(DataError, match=r"brick\.png"):
        photograph("brick.png")


def test_grounds_are_named_once() -> None:
    assert len(set(GROUNDS)) == len(GROUNDS) == len(FORMULAS) + len(PHOTOGRAPHS)
