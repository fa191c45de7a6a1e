"""Rendered products: the same seed gives the same pictures, and masks lie where something is wrong."""

import json

import cv2
import numpy as np
import pytest

from training.data import TEST_KINDS, list_images, open_data, read_image
from training.errors import ConfigError, DataError
from training.products import bottle, cable_set, fastener_tray, parts_bag, pin_grid
from training.products.fasteners import AREA, Look, part
from training.scenes import PRODUCTS, SPLITS, Amounts, parse_size, pixel_value, render_scenes

SMALL = Amounts(train=2, validation=2, test=2)
EVERY = [(p, d) for p in PRODUCTS.values() for d in (*p.LOGICAL, *p.STRUCTURAL)]
# What is added last: up to there, the good picture of the same seed is the same scene.
ADDED = [
    *((fastener_tray, d) for d in ("stain", "scratch")),
    *((cable_set, d) for d in ("burn", "cut_insulation")),
    *((pin_grid, d) for d in ("stain", "crack", "scratch", "contamination", "broken_pin")),
    *((bottle, d) for d in ("stain", "crack", "contamination", "torn_label", "dented_cap", "missing_fruit")),
    (parts_bag, "torn_bag"),
]


@pytest.fixture(scope="module", params=list(PRODUCTS))
def rendered(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes") / request.param
    render_scenes(root, request.param, SMALL, 7, lambda _: None, workers=1)
    return root


@pytest.fixture(scope="module")
def rendered_bottles(tmp_path_factory):
    root = tmp_path_factory.mktemp("sizes") / "bottle"
    render_scenes(root, "bottle", Amounts(train=2, validation=2, test=1), 7, lambda _: None, workers=1)
    return root


def test_layout_is_mvtec_locos(rendered):
    """All splits are there, in the wanted numbers, as RGB of the product's size."""
    folder = open_data(rendered, need_test=True)
    assert (len(folder.train), len(folder.validation)) == (2, 2)
    assert {kind: len(files) for kind, files in folder.test.items()} == dict.fromkeys(TEST_KINDS, 2)
    width, height = PRODUCTS[rendered.name].BASE
    assert read_image(folder.train[0]).shape == (height, width, 3)


def test_every_anomaly_has_masks_of_its_defect(rendered):
    """Each mask holds one grey value, which the config gives to the defect that parts.json tells."""
    config = {c["pixel_value"]: c for c in json.loads((rendered / "defects_config.json").read_text())}
    truth = {p["file"]: p for p in json.loads((rendered / "parts.json").read_text())}
    for kind in ("logical", "structural"):
        for file in list_images(rendered / "test" / TEST_KINDS[kind]):
            part = truth[file.relative_to(rendered).as_posix()]
            for path in list_images(rendered / "ground_truth" / TEST_KINDS[kind] / file.stem):
                values = np.unique(cv2.imread(str(path), cv2.IMREAD_UNCHANGED))
                assert len(values) == 2
                assert values[0] == 0
                assert config[int(values[1])]["defect_name"] == part["defect"]
                assert part["kind"] == kind


def test_good_parts_have_no_defect(rendered):
    parts = json.loads((rendered / "parts.json").read_text())
    assert [p["defect"] for p in parts if p["kind"] == "good"] == [None] * 2
    assert not (rendered / "ground_truth" / "good").exists()


def test_a_picture_depends_on_seed_product_split_and_index_alone(rendered):
    """The seed is the place in the table of products, so the table may grow but never change its order."""
    assert list(PRODUCTS) == ["fastener-tray", "cable-set", "pin-grid", "bottle", "parts-bag"]
    place = (7, list(PRODUCTS).index(rendered.name), SPLITS.index("train"), 1)
    picture = PRODUCTS[rendered.name].render(None, np.random.default_rng(place)).picture
    assert np.array_equal(read_image(rendered / "train" / "good" / "001.png"), picture)


def test_same_seed_same_bytes_on_any_number_of_processes(tmp_path):
    """More pictures and two processes change nothing in those that were there."""
    less, more = Amounts(train=2, validation=2, test=1), Amounts(train=3, validation=2, test=1)
    render_scenes(tmp_path / "one", "cable-set", less, 7, lambda _: None, workers=1)
    render_scenes(tmp_path / "two", "cable-set", more, 7, lambda _: None, workers=2)
    for path in (tmp_path / "one").rglob("*.png"):
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()


@pytest.mark.parametrize("product", PRODUCTS.values(), ids=list(PRODUCTS))
def test_another_seed_is_another_picture(product):
    """No two pictures of a set are alike."""
    pictures = [product.render(None, np.random.default_rng(seed)).picture for seed in (1, 2)]
    assert not np.array_equal(*pictures)


@pytest.mark.parametrize(("product", "defect"), EVERY, ids=[f"{p.NAME}-{d}" for p, d in EVERY])
def test_every_defect_has_masks_that_its_saturation_fits(product, defect):
    """Each type gives masks of sane size; its name has a saturation that each of them can meet."""
    rendered = product.render(defect, np.random.default_rng(11))
    saturation = product.SATURATION[defect]
    assert rendered.defects
    assert rendered.picture.shape == (*product.BASE[::-1], 3)
    for found in rendered.defects:
        assert found.name == defect
        assert found.mask.shape == product.BASE[::-1]
        assert 100 < found.mask.sum() < 0.75 * found.mask.size
        assert saturation.relative or found.mask.sum() >= saturation.threshold
    assert 0 < pixel_value(product.NAME, defect) <= 255


@pytest.mark.parametrize(("product", "defect"), ADDED, ids=[f"{p.NAME}-{d}" for p, d in ADDED])
def test_the_picture_differs_from_its_good_twin_where_the_mask_is(product, defect):
    """Inside the mask the two pictures differ far more than by camera noise; outside they do not."""
    good, bad = (product.render(d, np.random.default_rng(3)) for d in (None, defect))
    difference = cv2.absdiff(good.picture, bad.picture).mean(axis=2)
    mask = bad.defects[0].mask
    around = cv2.dilate(mask.astype(np.uint8), np.ones((31, 31))) > 0
    assert difference[mask].mean() > 1.5 * difference[~around].mean()
    assert difference[~around].mean() < 8


@pytest.mark.parametrize(
    ("product", "defect", "masks"),
    [
        (pin_grid, "two_in_cell", 1),
        (pin_grid, "moved_pin", 2),
        (bottle, "prints_swapped", 2),
        (parts_bag, "wrong_kind", 2),
    ],
)
def test_each_wrong_place_has_a_mask_of_its_own(product, defect, masks):
    """A part in the wrong place is two faults: one where it is, one where it is not."""
    found = product.render(defect, np.random.default_rng(5)).defects
    assert len({defect.mask.tobytes() for defect in found}) == masks


@pytest.mark.parametrize("kind", ["screw", "nut", "washer", "pin"])
def test_nominal_areas_are_those_of_the_stamps(kind):
    """The saturation of a missing part is the area that the part would cover."""
    area = part(kind, 0.7, np.random.default_rng(0)).cover.sum()
    assert area == pytest.approx(AREA[kind], rel=0.05)


@pytest.mark.parametrize("kind", ["long", "short"])
def test_a_screws_length_is_free(kind):
    """The two screws of the bag's kits are told apart by length alone."""
    looks = {"long": Look(reach=26.0), "short": Look(reach=-20.0)}
    cover = part("screw", 0.0, np.random.default_rng(0), look=looks[kind]).cover
    assert np.flatnonzero(cover.max(axis=0) > 0.5).size == pytest.approx(92.5 + looks[kind].reach, abs=2)


@pytest.mark.parametrize("size", [(320, 240), (150, 600)])
def test_any_size(rendered_bottles, tmp_path, size):
    """Pictures, masks and areas of saturation follow the size; shares stay."""
    root = tmp_path / "other"
    render_scenes(root, "bottle", Amounts(train=2, validation=2, test=1), 7, lambda _: None, workers=1, size=size)
    for path in root.rglob("*.png"):
        files = (rendered_bottles / path.relative_to(root), path)
        own, other = (cv2.imread(str(file), cv2.IMREAD_UNCHANGED) for file in files)
        assert other.shape[1::-1] == size
        if path.is_relative_to(root / "ground_truth"):
            assert np.array_equal(np.unique(own), np.unique(other))
            assert (own > 0).mean() == pytest.approx((other > 0).mean(), rel=0.05)
    own, other = (json.loads((r / "defects_config.json").read_text()) for r in (rendered_bottles, root))
    for a, b in zip(own, other, strict=True):
        area = 1 if a["relative_saturation"] else size[0] * size[1] / (400 * 640)
        assert b["saturation_threshold"] == pytest.approx(a["saturation_threshold"] * area)


@pytest.mark.parametrize("text", ["640", "640x", "-1x480", "640 x 480", "1e3x480"])
def test_a_size_that_is_none_says_how_to_write_it(text):
    with pytest.raises(ConfigError, match="640x480"):
        parse_size(text)


def test_a_size_out_of_range_writes_nothing(tmp_path):
    with pytest.raises(ConfigError, match="128"):
        render_scenes(tmp_path / "x", "pin-grid", SMALL, 7, lambda _: None, workers=1, size=parse_size("64x480"))
    assert list(tmp_path.iterdir()) == []


def test_unknown_product_lists_those_there(tmp_path):
    with pytest.raises(ConfigError, match="fastener-tray"):
        render_scenes(tmp_path / "x", "tray", SMALL, 7, lambda _: None)


def test_existing_folder_is_kept(tmp_path):
    """Nothing is written over; the message says what to do."""
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match="exists already"):
        render_scenes(tmp_path, "cable-set", SMALL, 7, lambda _: None)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_interrupted_rendering_leaves_nothing(tmp_path):
    """A half-written product never looks like a whole one."""

    def stop(_: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        render_scenes(tmp_path / "x", "cable-set", SMALL, 7, stop, workers=1)
    assert list(tmp_path.iterdir()) == []
