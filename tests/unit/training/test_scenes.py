"""Rendered products: the same seed gives the same pictures, and masks lie where something is wrong."""

import json

import cv2
import numpy as np
import pytest

from training.data import TEST_KINDS, list_images, open_loco, read_image
from training.errors import ConfigError, DataError
from training.products import cable_set, fastener_tray
from training.products.fasteners import AREA, part
from training.scenes import PRODUCTS, Amounts, pixel_value, render_scenes

SMALL = Amounts(train=3, validation=2, test=3)
EVERY = [(p, d) for p in (fastener_tray, cable_set) for d in (*p.LOGICAL, *p.STRUCTURAL)]


@pytest.fixture(scope="module", params=list(PRODUCTS))
def rendered(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes") / request.param
    render_scenes(root, request.param, SMALL, 7, lambda _: None, workers=1)
    return root


def test_layout_is_mvtec_locos(rendered):
    """All splits are there, in the wanted numbers, as 640 x 480 RGB."""
    folder = open_loco(rendered, need_test=True)
    assert (len(folder.train), len(folder.validation)) == (3, 2)
    assert {kind: len(files) for kind, files in folder.test.items()} == dict.fromkeys(TEST_KINDS, 3)
    assert read_image(folder.train[0]).shape == (480, 640, 3)


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
    assert [p["defect"] for p in parts if p["kind"] == "good"] == [None] * 3
    assert not (rendered / "ground_truth" / "good").exists()


def test_same_seed_same_bytes_on_any_number_of_processes(rendered, tmp_path):
    """More pictures and two processes change nothing in those that were there."""
    more = Amounts(train=4, validation=2, test=3)
    render_scenes(tmp_path / "again", rendered.name, more, 7, lambda _: None, workers=2)
    for path in rendered.rglob("*.png"):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(rendered)).read_bytes()


def test_another_seed_is_another_picture():
    """No two pictures of a set are alike."""
    pictures = [fastener_tray.render(None, np.random.default_rng(seed)).picture for seed in (1, 2)]
    assert not np.array_equal(*pictures)


@pytest.mark.parametrize(("product", "defect"), EVERY, ids=[f"{p.NAME}-{d}" for p, d in EVERY])
def test_defects_change_the_picture_where_the_mask_is(product, defect):
    """Each type gives one mask of sane size; its name has a saturation that its area can meet."""
    (found,) = product.render(defect, np.random.default_rng(11)).defects
    saturation = product.SATURATION[defect]
    assert found.name == defect
    assert 100 < found.mask.sum() < 0.75 * found.mask.size
    assert saturation.relative or found.mask.sum() >= saturation.threshold
    assert 0 < pixel_value(product.NAME, defect) <= 255


@pytest.mark.parametrize("kind", ["screw", "nut", "washer", "pin"])
def test_nominal_areas_are_those_of_the_stamps(kind):
    """The saturation of a missing part is the area that the part would cover."""
    area = part(kind, 0.7, np.random.default_rng(0)).cover.sum()
    assert area == pytest.approx(AREA[kind], rel=0.05)


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
