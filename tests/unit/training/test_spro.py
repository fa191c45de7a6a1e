"""AU-sPRO against the golden values of the official evaluation, closed forms, and its steps written out literally."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest

from training.errors import DataError
from training.spro import LIMITS, Channel, LabelledMap, area_under, au_spro, mean_areas

SIZE, SIDE = 256, 64


def square(side: int = SIDE, at: tuple[int, int] = (100, 120), size: int = SIZE) -> np.ndarray:
    mask = np.zeros((size, size), dtype=bool)
    mask[at[0] : at[0] + side, at[1] : at[1] + side] = True
    return mask


def areas_of(images: Sequence[LabelledMap], kind: str = "logical") -> list[float]:
    areas = au_spro(lambda: images).kinds[kind]
    assert areas is not None
    return [areas[f"{limit:g}"] for limit in LIMITS]


def golden_set(signal: np.ndarray, saturated: int, jitter: float = 1e-3) -> list[LabelledMap]:
    """One 64 x 64 defect scored by `signal` plus jitter, and two good images of jitter alone."""
    generator = np.random.default_rng(5)
    maps = [signal * scale + generator.uniform(0, jitter, (SIZE, SIZE)) for scale in (1, 0, 0)]
    bad = LabelledMap("bad", "logical", maps[0], (Channel("d", square(), saturated),))
    return [bad, *(LabelledMap("good", "good", anomaly_map) for anomaly_map in maps[1:])]


def test_perfect_map():
    assert areas_of(golden_set(square().astype(float), SIDE**2)) == pytest.approx([1.0] * 5)


def test_inverted_map():
    """The defect scores below everything else: all of the background comes first."""
    images = [
        LabelledMap(i.name, i.kind, 1 - square() + i.anomaly_map if i.channels else 1 + i.anomaly_map, i.channels)
        for i in golden_set(np.zeros((SIZE, SIZE)), SIDE**2)
    ]
    assert areas_of(images) == pytest.approx([0.0] * 5, abs=1e-3)


@pytest.mark.parametrize(
    ("relative", "expected"),
    [(0.5, [1, 1, 1, 1, 1]), (1.0, [0.502, 0.514, 0.527, 0.574, 0.746])],
)
def test_half_the_defect_found(relative, expected):
    """A map that finds the upper half; the official code's values hold another jitter: both lucks are about 0.003."""
    half = square()
    half[100 + SIDE // 2 :] = False
    found = areas_of(golden_set(half.astype(float), int(relative * SIDE**2)))
    assert found == pytest.approx(expected, abs=8e-3)


@pytest.mark.parametrize(
    ("saturated", "expected"),
    [
        (4096, [0.005, 0.025, 0.05, 0.15, 0.5]),
        (2048, [0.01, 0.05, 0.1, 0.3, 0.75]),
        (400, [0.051, 0.256, 0.512, 0.837, 0.951]),
    ],
)
def test_uniform_random_map_has_a_closed_form(saturated, expected):
    """L/(2s) up to the saturated fraction s, then (s/2 + L - s)/L; averaged, as one map has luck of its own."""
    runs = []
    for seed in range(12):
        generator = np.random.default_rng(seed)
        maps = generator.uniform(0, 1, (3, SIZE, SIZE))
        channel = Channel("d", square(), saturated)
        images = [LabelledMap("b", "logical", maps[0], (channel,))]
        runs.append(areas_of([*images, *(LabelledMap("g", "good", m) for m in maps[1:])]))
    luck = np.std(runs, axis=0) / np.sqrt(len(runs))
    assert (np.abs(np.mean(runs, axis=0) - expected) < 1e-3 + 2.5 * luck).all()
    assert luck.max() < 0.01


def test_closed_form_is_met_within_a_thousandth_without_luck():
    """Evenly spread ranks instead of random ones: what is left is the error of the method."""
    order = (np.arange(SIZE * SIZE) * 40503) % (SIZE * SIZE)  # a permutation: 40503 is odd
    even = ((order + 0.5) / (SIZE * SIZE)).reshape(SIZE, SIZE)
    mask = square()
    bad = np.empty((SIZE, SIZE))
    inside = int(mask.sum())
    bad[mask] = (np.arange(inside) + 0.5) / inside
    bad[~mask] = (np.arange(SIZE * SIZE - inside) + 0.25) / (SIZE * SIZE - inside)
    good = LabelledMap("g", "good", even)
    for saturated in (4096, 2048, 400):
        s = saturated / inside
        expected = [limit / (2 * s) if limit <= s else (s / 2 + limit - s) / limit for limit in LIMITS]
        bad_image = LabelledMap("b", "logical", bad, (Channel("d", mask, saturated),))
        assert areas_of([bad_image, good]) == pytest.approx(expected, abs=1e-3)
    found = bad.copy()
    found[mask & (bad > 0.5)] += 1
    found[mask & (bad <= 0.5)] *= 2
    half = LabelledMap("b", "logical", found, (Channel("d", mask, inside),))
    assert areas_of([half, good]) == pytest.approx([0.5 + limit / 4 for limit in LIMITS], abs=1e-3)


def literal(images: Sequence[LabelledMap], kind: str, defect: str | None = None) -> list[float]:
    """The official steps one by one: every distinct threshold, binary maps, plain loops."""
    chosen = [i for i in images if i.kind in ("good", kind)]
    if defect is not None:
        chosen = [i for i in chosen if i.kind == "good" or any(c.defect == defect for c in i.channels)]
    values = sorted({float(v) for i in images for v in i.anomaly_map.ravel()}, reverse=True)
    curve = []
    for threshold in [values[0] + 1, *values, values[-1] - 1]:
        false, true_negative, spros = 0, 0, []
        for image in chosen:
            positive = image.anomaly_map > threshold
            union = np.zeros(positive.shape, dtype=bool)
            for channel in image.channels:
                union |= channel.mask
                if defect in (None, channel.defect):
                    spros.append(min(int((positive & channel.mask).sum()) / channel.saturated_area, 1.0))
            false += int((positive & ~union).sum())
            true_negative += int((~positive & ~union).sum())
        curve.append((false / (false + true_negative), sum(spros) / len(spros)))
    found = []
    for limit in LIMITS:
        area = 0.0
        for (x0, y0), (x1, y1) in pairwise(curve):
            if x0 >= limit or x1 == x0:
                continue
            end = min(x1, limit)
            y_end = y0 + (y1 - y0) * (end - x0) / (x1 - x0)
            area += (end - x0) * (y0 + y_end) / 2
        found.append(area / limit)
    return found


def small_set(seed: int, levels: int | None, dtype: type) -> list[LabelledMap]:
    """Images of 12 x 15 with up to three channels each, that overlap, saturate early, and share defect types."""
    generator = np.random.default_rng(seed)
    images = []
    for index, kind in enumerate(["good", "logical", "structural", "logical", "good", "structural", "logical"]):
        anomaly_map = generator.uniform(0, 1, (12, 15))
        channels = []
        for _ in range(0 if kind == "good" else int(generator.integers(1, 4))):
            top, left = generator.integers(0, 8, 2)
            mask = np.zeros((12, 15), dtype=bool)
            mask[top : top + 4, left : left + 5] = True
            anomaly_map[mask] += generator.uniform(0, 0.5)
            saturated = int(generator.integers(1, mask.sum() + 1))
            channels.append(Channel(str(generator.choice(["a", "b"])), mask, saturated))
        if levels is not None:
            anomaly_map = np.floor(anomaly_map * levels) / levels
        images.append(LabelledMap(f"{index}", kind, anomaly_map.astype(dtype), tuple(channels)))
    return images


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("levels", [None, 16, 2])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_equals_the_official_steps_written_out(seed, levels, dtype):
    """Several masks an image, overlaps, both splits, defect types; with ties too, where the official code gives up."""
    images = small_set(seed, levels, dtype)
    found = au_spro(lambda: images)
    for kind in ("logical", "structural"):
        assert list((found.kinds[kind] or {}).values()) == pytest.approx(literal(images, kind), abs=1e-12)
    only_logical = [i for i in images if i.kind != "structural"]
    for defect, areas in au_spro(lambda: only_logical).defects.items():
        assert list((areas or {}).values()) == pytest.approx(literal(only_logical, "logical", defect), abs=1e-12)


def test_chosen_ranks_give_the_area_of_all_values(monkeypatch):
    """A set with far more values than thresholds: within 1e-3 of the curve over every one of them, small limits too."""
    generator = np.random.default_rng(0)
    images = []
    for index in range(6):
        blurred = generator.normal(size=(32, 32)).repeat(12, 0).repeat(12, 1) + generator.normal(0, 0.3, (384, 384))
        small, large = square(6, (50, 60), 384), square(80, (200, 200), 384)
        blurred += 3.0 * small + 1.5 * large
        channels = (Channel("small", small, 36), Channel("large", large, 400)) if index % 2 else ()
        images.append(LabelledMap(f"{index}", "structural" if index % 2 else "good", blurred, channels))
    ranks = au_spro(lambda: images)
    monkeypatch.setattr("training.spro.MAX_THRESHOLDS", 10**7)
    monkeypatch.setattr("training.spro._OFFERED", 10**7)
    every = au_spro(lambda: images)
    for name in ("small", "large"):
        assert ranks.defects[name] == pytest.approx(every.defects[name], abs=1e-4)
    assert ranks.kinds["structural"] == pytest.approx(every.kinds["structural"], abs=1e-4)


def test_overlap_is_a_hit_in_both_channels_and_never_false():
    """A map that lights exactly the overlap of two masks: no false positive, half of either mask."""
    left, right = np.zeros((2, 4, 8), dtype=bool)
    left[:, 0:4] = right[:, 2:6] = True
    channels = (Channel("l", left, 16), Channel("r", right, 16))
    images = [LabelledMap("x", "logical", (left & right).astype(float), channels)]
    found = au_spro(lambda: images).defects
    for name in ("l", "r"):  # from (0, 0.5) straight to (1, 1)
        assert (found[name] or {})["1"] == pytest.approx(0.75)


def test_an_image_with_many_channels_counts_that_often():
    """The mean is over channels, not over images: one found channel against three missed ones is a quarter."""
    hit, missed = np.zeros((8, 8)), np.zeros((8, 8))
    hit[0, 0] = 1
    dots = [np.zeros((8, 8), dtype=bool) for _ in range(4)]
    for index, dot in enumerate(dots):
        dot[index, 0] = True
    images = [
        LabelledMap("one", "logical", hit, (Channel("d", dots[0], 1),)),
        LabelledMap("three", "logical", missed, tuple(Channel("d", dot, 1) for dot in dots[1:])),
        LabelledMap("good", "good", np.zeros((8, 8))),
    ]
    # Straight from (0, 1/4) to (1, 1).
    assert areas_of(images)[-1] == pytest.approx(0.625)


def test_saturation_counts_no_more_than_full():
    """400 of 4096 pixels are enough; the rest of the defect brings nothing more."""
    part = np.zeros((SIZE, SIZE))
    part[100:120, 120:140] = 1
    assert areas_of(golden_set(part, 400)) == pytest.approx([1.0] * 5)


def test_large_offset_and_negative_maps_pass():
    """Where 1e-6 vanishes in float32 the official code stops; the curve does not depend on the offset."""
    values = [areas_of([_shifted(i, offset) for i in small_set(3, 64, np.float64)]) for offset in (0, 1024, -1024)]
    assert values[0] == values[1] == values[2]


def _shifted(image: LabelledMap, offset: float) -> LabelledMap:
    return LabelledMap(image.name, image.kind, (image.anomaly_map + offset).astype(np.float32), image.channels)


def test_a_constant_map_knows_nothing():
    """Above its one value lies nothing, below it everything: the diagonal, half of every limit."""
    flat = np.full((8, 8), 3.0)
    images = [
        LabelledMap("x", "logical", flat, (Channel("d", square(3, (0, 0), 8), 9),)),
        LabelledMap("g", "good", flat),
    ]
    assert areas_of(images) == pytest.approx([limit / 2 for limit in LIMITS])


def test_no_defect_free_pixel_has_no_answer():
    """Every image fully defective: the false positive rate is undefined, as in the official evaluation."""
    whole = np.ones((4, 4), dtype=bool)
    images = [LabelledMap("x", "logical", np.arange(16.0).reshape(4, 4), (Channel("d", whole, 16),))]
    found = au_spro(lambda: images)
    assert found.kinds == {"logical": None}
    assert found.defects == {"d": None}


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_map_that_is_not_finite_is_named(value):
    bad = np.zeros((4, 4))
    bad[1, 2] = value
    with pytest.raises(DataError, match=r"012\.png.*NaN"):
        au_spro(lambda: [LabelledMap("012.png", "good", bad)])


def test_mask_of_another_size_is_named():
    image = LabelledMap("7.png", "logical", np.zeros((4, 4)), (Channel("d", np.ones((5, 4), dtype=bool), 3),))
    with pytest.raises(DataError, match=r"7\.png.*mask of 'd'"):
        au_spro(lambda: [image])


def test_zero_saturation_is_named():
    image = LabelledMap("7.png", "logical", np.zeros((4, 4)), (Channel("dot", np.eye(4, dtype=bool), 0),))
    with pytest.raises(DataError, match=r"7\.png.*'dot' saturates at 0"):
        au_spro(lambda: [image])


def test_end_piece_is_interpolated():
    """Between the samples 0 and 1 the limit 0.5 takes the lower part of the ramp."""
    assert area_under(np.array([0.0, 1.0]), np.array([0.0, 1.0]), 0.5) == pytest.approx(0.25)
    assert area_under(np.array([0.0, 0.5, 0.5, 1.0]), np.array([0.0, 0.5, 0.8, 1.0]), 0.5) == pytest.approx(0.25)


def test_mean_needs_every_part():
    assert mean_areas([{"1": 0.5}, {"1": 1.0}]) == {"1": 0.75}
    assert mean_areas([{"1": 0.5}, None]) is None
