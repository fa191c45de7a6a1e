"""The region of interest: which pixels it shows, where a place of the cut lies, and when the line says something."""

import base64

import cv2
import numpy as np
import pytest

from pipeline import config
from pipeline.cameras import FolderCamera, RtspCamera
from pipeline.errors import ConfigError
from pipeline.manifest import region_doubts, with_models_region
from pipeline.region import GREY, RegionOfInterest, box_in_picture, cut_region, in_picture
from pipeline.types import View
from pipeline.verdict import regions

SIZE = (640, 480)
CROP = {"picture_size": list(SIZE), "crop": [100, 80, 300, 200]}


@pytest.fixture
def noise():
    return np.random.default_rng(1).integers(0, 256, (*SIZE[::-1], 3), dtype=np.uint8)


def test_a_crop_is_the_pixels_themselves(noise):
    """Without a turn no pixel is changed: the cut is that part of the picture."""
    assert np.array_equal(cut_region(noise, (100, 80, 300, 200), 0.0, None), noise[80:280, 100:400])


@pytest.mark.parametrize(("rotate", "turned"), [(90, -1), (180, 2), (270, 1), (-90, 1), (360, 0), (-270, -1)])
def test_a_quarter_turn_moves_pixels_and_changes_none(noise, rotate, turned):
    """Clockwise by 90 degrees is what a viewer calls it, with width and height exchanged."""
    assert np.array_equal(
        cut_region(noise, (100, 80, 300, 200), rotate, None), np.rot90(noise[80:280, 100:400], turned)
    )


@pytest.mark.parametrize("rotate", [0.0, 10.0, -33.0, 45.0, 90.0, 101.5, 180.0, 200.0, -80.0, 359.0])
@pytest.mark.parametrize("place", [(250, 180), (180, 150), (320, 210)])
def test_a_mark_in_the_cut_is_found_where_it_is_in_the_picture(place, rotate):
    """`in_picture` is the way back of `cut_region`: a mark seen in the cut leads to its own place within a pixel."""
    picture = np.zeros((*SIZE[::-1], 3), np.uint8)
    cv2.circle(picture, place, 4, (255, 255, 255), -1)
    cut = cut_region(picture, (100, 80, 300, 200), rotate, None)[..., 0].astype(float)
    height, width = cut.shape
    ys, xs = np.mgrid[:height, :width] + 0.5
    u, v = (xs * cut).sum() / cut.sum() / width, (ys * cut).sum() / cut.sum() / height
    found = in_picture(u, v, (100, 80, 300, 200), rotate)
    assert found == pytest.approx((place[0] + 0.5, place[1] + 0.5), abs=0.3)


def test_the_corners_of_a_turned_crop_show_the_picture_and_grey_beyond_it():
    """A crop amid the picture has real pixels in its corners; one at the edge has grey where there are none."""
    white = np.full((*SIZE[::-1], 3), 255, np.uint8)
    assert cut_region(white, (200, 150, 200, 150), 20.0, None).min() == 255
    at_edge = cut_region(white, (0, 0, 200, 150), 20.0, None)
    assert (at_edge[0, 0].tolist(), at_edge[75, 100].tolist()) == ([GREY] * 3, [255] * 3)


def test_what_the_mask_leaves_out_cannot_be_seen(noise):
    """Two pictures that differ outside of the mask alone are the same to the model; its inside is untouched."""
    region = RegionOfInterest(**CROP, mask=[[[120, 100], [350, 100], [350, 260]]])
    inside = region.inside()
    other = np.where(inside[..., None] > 0, noise, 255 - noise)
    cuts = [cut_region(image, region.rectangle, 0.0, inside) for image in (noise, other)]
    assert np.array_equal(*cuts)
    shown = inside[80:280, 100:400] > 0
    assert np.array_equal(cuts[0][shown], noise[80:280, 100:400][shown])
    assert (cuts[0][~shown] == GREY).all()
    assert 0.3 < shown.mean() < 0.5


@pytest.mark.parametrize(
    ("rotate", "bbox", "expected"),
    [
        (0.0, (0.0, 0.0, 1.0, 1.0), (100, 80, 300, 200)),
        (0.0, (0.5, 0.25, 0.1, 0.5), (250, 130, 30, 100)),
        (90.0, (0.0, 0.0, 0.5, 0.1), (100, 180, 30, 100)),
        (180.0, (0.0, 0.0, 0.1, 0.1), (370, 260, 30, 20)),
        (-90.0, (0.0, 0.0, 0.5, 0.1), (370, 80, 30, 100)),
    ],
)
def test_a_box_of_the_cut_is_a_box_of_the_picture(rotate, bbox, expected):
    """Boxes in a verdict are fractions of the camera's picture, whatever the region is."""
    found = box_in_picture(bbox, View(SIZE, (100, 80, 300, 200), rotate))
    pixels = [value * size for value, size in zip(found, (*SIZE, *SIZE), strict=True)]
    assert pixels == pytest.approx(expected, abs=0.1)


def test_a_box_that_leaves_the_picture_ends_at_its_edge():
    """A defect in the grey corner of a turned crop is told within the picture."""
    x, y, width, height = box_in_picture((0.0, 0.0, 1.0, 1.0), View(SIZE, (0, 0, 640, 480), 30.0))
    assert (x, y, x + width, y + height) == (0.0, 0.0, 1.0, 1.0)


def test_the_regions_of_a_verdict_are_in_the_cameras_picture():
    """The map of a cut leads to boxes of the whole picture, strongest first."""
    anomaly_map = np.zeros((10, 10), np.float32)
    anomaly_map[0, 0], anomaly_map[9, 9] = 2.0, 3.0
    found = regions(anomaly_map, 1.0, View(SIZE, (320, 240, 320, 240), 0.0))
    assert [region.bbox for region in found] == [(0.95, 0.95, 0.05, 0.05), (0.5, 0.5, 0.05, 0.05)]
    assert [region.bbox for region in regions(anomaly_map, 1.0)] == [(0.9, 0.9, 0.1, 0.1), (0.0, 0.0, 0.1, 0.1)]


def folder(**keys):
    return FolderCamera(id="c1", type="folder", product="tray", path="pictures", **keys)


@pytest.fixture
def cropped(make_manifest):
    """The manifest of a model that was trained on a region."""
    return make_manifest(preprocessing="region-v1+resize-area-v1", region=CROP)


def test_a_camera_takes_the_region_of_its_model(make_manifest, cropped):
    """The region is set once, at training; a camera's own comes first, and without any the picture is whole."""
    own = RegionOfInterest(picture_size=[64, 48])
    assert with_models_region(folder(), cropped).region == RegionOfInterest(**CROP)
    assert with_models_region(folder(region=own), cropped).region == own
    assert with_models_region(folder(), make_manifest()).region is None


def test_a_camera_of_another_size_than_the_models_region_is_refused_by_name(cropped):
    """Where the settings alone show that the region cannot fit, the start says so."""
    with pytest.raises(ConfigError, match=r"'c1'.*not 640 x 480.*'tray'"):
        with_models_region(folder(picture_size=[1280, 960]), cropped)


def test_a_graph_cannot_show_its_network_a_region(cropped, make_manifest):
    """A camera whose graph asks Triton is refused for a product that sees a region, by its name."""
    about = {"product": "tray", "url": "rtsp://127.0.0.1:8554/c1", "decoder": "deepstream", "inference": "graph"}
    camera = RtspCamera(id="c7", type="rtsp", **about)
    assert with_models_region(camera, make_manifest()) is camera
    with pytest.raises(ConfigError, match=r"'c7'.*sees a region"):
        with_models_region(camera, cropped)


def test_another_region_than_the_models_is_told_by_name(make_manifest, cropped):
    """It may be meant, and nobody should have to guess: the same region in other words is no other one."""
    same = {**CROP, "mask": [[[0, 0], [640, 0], [640, 480], [0, 480]]]}
    whole = {"picture_size": list(SIZE)}
    for document, manifest, doubt in (
        (CROP, cropped, ""),
        (whole, make_manifest(), ""),
        (CROP | {"rotate": 1}, cropped, "camera 'c1': product 'tray' was trained on another region"),
        (same, cropped, ""),
        (CROP, make_manifest(), "camera 'c1': product 'tray' was trained on whole pictures"),
        (whole, cropped, "camera 'c1': product 'tray' was trained on another region"),
    ):
        camera = folder(region=RegionOfInterest(**document))
        assert region_doubts([camera], {"tray": manifest}) == ([doubt] if doubt else [])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"preprocessing": "region-v1+resize-area-v1"}, "do not fit together"),
        ({"region": CROP}, "do not fit together"),
        ({"preprocessing": "region-v1+resize-area-v1", "region": CROP | {"mask": "m.png"}}, "is a path"),
    ],
)
def test_a_manifest_says_what_it_means(make_manifest, keys, message):
    """A line that would cut otherwise than the training did does not start."""
    with pytest.raises(ValueError, match=message):
        make_manifest(**keys)


def test_a_line_file_holds_a_region_and_its_mask(line_file, tmp_path):
    """The mask's path is relative to the file; after loading the settings hold the mask itself."""
    mask = np.zeros(SIZE[::-1], np.uint8)
    mask[90:200, 150:300] = 255
    cv2.imwrite(str(tmp_path / "mask.png"), mask)
    camera = {"id": "c1", "type": "folder", "product": "tray", "path": "pictures"}
    (loaded,) = config.load(line_file(cameras=[camera | {"region": CROP | {"mask": "mask.png", "rotate": 3}}])).cameras
    assert base64.b64decode(loaded.region.mask.partition(",")[2]) == (tmp_path / "mask.png").read_bytes()
    assert np.array_equal(loaded.region.inside(), mask)


@pytest.mark.parametrize(
    ("region", "message"),
    [
        (CROP | {"crop": [600, 0, 50, 10]}, r"cameras\[0\].region: `crop` reaches to 650, 10, outside"),
        (CROP | {"croop": 1}, r"cameras\[0\].region.croop: unknown key; did you mean `crop`"),
        (CROP | {"mask": "none.png"}, r"camera 'c1': region: mask .*none.png cannot be read"),
        (CROP | {"mask": [[[0, 0]]]}, r"cameras\[0\].region.mask.polygons"),
        ({"crop": [0, 0, 1, 1]}, r"cameras\[0\].region.picture_size: Field required"),
        (CROP | {"picture_size": [1000, 1000]}, "a camera has one"),
    ],
)
def test_a_region_that_cannot_be_is_refused_with_its_place(line_file, region, message):
    """The line file is refused at start, with place and reason on one line."""
    camera = {"id": "c1", "type": "folder", "product": "tray", "path": "p", "picture_size": list(SIZE)}
    with pytest.raises(ConfigError, match=message) as caught:
        config.load(line_file(cameras=[camera | {"region": region}]))
    assert "\n" not in str(caught.value)
