"""The region of a data set: where it is read, what it changes, and that nothing changes without one."""

import hashlib
import json
import shutil
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import tifffile
import yaml

from training.card import _region_of_mask
from training.config import FitConfig
from training.data import check_pictures, data_sha256, load_at_model_size, open_data, read_image
from training.detector import Scores, load_bundle, save_bundle
from training.errors import ConfigError, DataError
from training.evaluate import evaluate, score_files, write_maps
from training.export import export, load_exported
from training.fit import fit
from training.normals import open_normals
from training.region import RegionOfInterest, map_in_picture
from training.repository import Serving
from training.teacher import random_teacher

CROP = {"picture_size": [96, 72], "crop": [8, 4, 64, 60], "rotate": 5.0, "mask": [[[10, 6], [70, 8], [68, 60]]]}
QUICK = FitConfig(width=8, image_size=64, batch_size=4, max_steps=1, seed=3)


@pytest.fixture
def data(loco, tmp_path):
    """The tiny product with a region.yaml in its folder."""
    root = shutil.copytree(loco, tmp_path / "tiny-part")
    (root / "region.yaml").write_text(yaml.safe_dump(CROP))
    return root


def test_without_a_region_nothing_changes(folder, tmp_path):
    """Data hash and cache key are those of before regions were known, by the same formulas; pictures are whole."""
    assert folder.region is None
    files = folder.train
    digest, key = hashlib.sha256(), hashlib.sha256(b"resize-area-v1 64")
    for path in files:
        content = hashlib.sha256(path.read_bytes()).digest()
        digest.update(path.relative_to(folder.root).as_posix().encode() + content)
        key.update(path.name.encode() + content)
    assert data_sha256(files, folder.root) == digest.hexdigest()
    open_normals(files, 64, random_teacher(0), tmp_path, cache_features=False)
    assert [path.name for path in tmp_path.iterdir()] == [key.hexdigest()[:24]]
    whole = cv2.resize(read_image(files[0]), (64, 64), interpolation=cv2.INTER_AREA)
    assert np.array_equal(load_at_model_size(files, 64)[0], whole)


def test_the_region_travels_from_the_data_to_the_served_model(data, detector, tmp_path, monkeypatch):
    """fit reads region.yaml, bundle and manifest record it, and the model is fitted on, and scores, what it shows."""
    found = open_data(data, need_test=True)
    assert found.region == RegionOfInterest(**CROP)
    fitted = fit(found, "tiny-part", random_teacher(0), QUICK, lambda _: None)
    about = fitted.description
    assert about.region == found.region
    assert about.data_sha256 != detector.description.data_sha256
    save_bundle(tmp_path / "bundle", fitted)
    assert load_bundle(tmp_path / "bundle").description.region == found.region
    monkeypatch.setattr("training.export.check_parity", lambda *_: 0.0)
    export(fitted, tmp_path / "models", Serving())
    manifest = json.loads((tmp_path / "models/tiny-part/manifest.json").read_bytes())
    assert manifest["preprocessing"] == "region-v1+resize-area-v1"
    assert manifest["region"] == CROP
    served = load_exported(tmp_path / "models", "tiny-part")
    assert served.description.region == found.region
    (record,) = score_files(fitted, found.test["good"][:1])
    cut = load_at_model_size(found.test["good"][:1], 64, found.region)
    assert record.score == fitted.score(cut).score[0]
    assert record.score != fitted.score(load_at_model_size(found.test["good"][:1], 64)).score[0]


def test_another_region_is_another_cache(folder, tmp_path):
    """Pictures that were cut otherwise are never taken for these."""
    for region in (None, RegionOfInterest(**CROP), RegionOfInterest(**CROP | {"rotate": 6.0})):
        open_normals(folder.train, 64, random_teacher(0), tmp_path, cache_features=False, region=region)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("crop: [0, 0, 5, 5]", "region.yaml': picture_size: Field required"),
        ("picture_size: [96, 72]\ncrop: [90, 0, 10, 10]", "region.yaml': region: `crop` reaches to 100, 10"),
        ("picture_size: [96, 72]\nmask: none.png", "none.png cannot be read"),
        ("a: [", "region.yaml'"),
        ("", "region.yaml'"),
    ],
)
def test_a_bad_region_file_is_named(data, text, message):
    """Before any picture is read."""
    (data / "region.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        open_data(data)


def test_a_picture_of_another_size_is_named_before_training(data):
    """The region is made for one size of picture."""
    cv2.imwrite(
        str(data / "train/good/001.png"), np.random.default_rng(0).integers(0, 255, (80, 96, 3), dtype=np.uint8)
    )
    with pytest.raises(DataError, match=r"001\.png': is 96 x 80, the region is made for 96 x 72"):
        check_pictures(open_data(data))


@pytest.mark.parametrize("rotate", [0.0, 90.0, 20.0, -110.0])
def test_a_map_lies_on_the_picture_where_the_defect_is(rotate):
    """Laid over the whole picture, the map's peak is on the mark that the cut shows; around the cut is its lowest."""
    region = RegionOfInterest(picture_size=[300, 200], crop=[60, 40, 160, 100], rotate=rotate)
    picture = np.zeros((200, 300, 3), np.uint8)
    cv2.circle(picture, (150, 80), 5, (255, 255, 255), -1)
    cut = region.cut(picture)
    anomaly_map = cv2.resize(cut[..., 0], (40, 40), interpolation=cv2.INTER_AREA).astype(np.float32) - 7
    laid = map_in_picture(anomaly_map, region)
    assert laid.shape == (200, 300)
    y, x = np.unravel_index(laid.argmax(), laid.shape)
    assert abs(x - 150) <= 3
    assert abs(y - 80) <= 3
    assert laid[0, 0] == laid[199, 299] == -7


def test_a_whole_region_lays_a_map_as_before():
    """The whole picture, not turned, is what the evaluation did without regions."""
    anomaly_map = np.random.default_rng(0).random((16, 16), dtype=np.float32)
    laid = map_in_picture(anomaly_map, RegionOfInterest(picture_size=[96, 72]))
    assert np.allclose(laid, cv2.resize(anomaly_map, (96, 72), interpolation=cv2.INTER_LINEAR), atol=1e-3)


def test_maps_of_a_region_are_written_at_the_pictures_size(data, detector, tmp_path):
    """The official script reads maps of the whole picture; the data folder's own region comes first."""
    red = SimpleNamespace(
        score=lambda images: Scores(*(np.zeros(len(images)) for _ in range(3)), images[:, ::4, ::4, 0].astype("f4")),
        description=detector.description,
    )
    evaluation = evaluate(red, open_data(data, need_test=True))
    assert evaluation.region == RegionOfInterest(**CROP)
    files = sorted(write_maps(tmp_path / "maps", evaluation).rglob("*.tiff"))
    assert len(files) == len(evaluation.records)
    assert {tifffile.imread(file).shape for file in files} == {(72, 96)}


def test_a_defect_mask_is_cut_like_its_picture():
    """On the report's pictures outlines stand where the defect is; grey is no defect."""
    mask = np.zeros((72, 96), bool)
    mask[20:40, 30:50] = True
    crop = RegionOfInterest(picture_size=[96, 72], crop=[20, 10, 60, 40])
    assert np.array_equal(_region_of_mask(mask, crop), mask[10:50, 20:80])
    assert np.array_equal(_region_of_mask(mask, None), mask)
    hidden = RegionOfInterest(picture_size=[96, 72], mask=[[[60, 0], [95, 0], [95, 70]]])
    assert not _region_of_mask(mask, hidden).any()
