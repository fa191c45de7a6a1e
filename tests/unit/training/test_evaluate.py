"""The whole report on pictures whose answers are known, by a detector that scores what it sees in the red channel."""

import json
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import tifffile

from training.data import open_data
from training.detector import Scores
from training.errors import DataError
from training.evaluate import enlarged, evaluate, score_files, write_maps
from training.metrics import image_auroc
from training.spro import LIMITS, LabelledMap, au_spro

HEIGHT, WIDTH, SIDE = 48, 64, 16
CONFIG = [
    {"defect_name": "extra", "pixel_value": 255, "saturation_threshold": 64, "relative_saturation": False},
    {"defect_name": "dent", "pixel_value": 7, "saturation_threshold": 1.0, "relative_saturation": True},
]


def red_scores(images: np.ndarray) -> Scores:
    """Map: red at 16 x 16, so that every map cell is 4 x 3 original pixels; branches: its maximum, and mean green."""
    cell = images.shape[1] // SIDE
    blocks = images.reshape(len(images), SIDE, cell, SIDE, cell, 3).astype(np.float64).mean(axis=(2, 4))
    maps = (blocks[..., 0] / 255).astype(np.float32)
    peaks, green = maps.max(axis=(1, 2)).astype(np.float64), blocks[..., 1].mean(axis=(1, 2))
    return Scores(peaks + green, peaks, green, maps)


@pytest.fixture
def red():
    """All of a detector that an evaluation asks for."""
    about = SimpleNamespace(product="red-part", method="red", image_size=64, data_sha256="0" * 64, region=None)
    return SimpleNamespace(score=red_scores, description=about)


def draw(path: Path, index: int, defect: bool) -> None:
    """Dark noise; a defect is a bright red rectangle of whole map cells, at rows 12 to 24 and columns 16 to 32."""
    picture = np.random.default_rng(index).integers(0, 60, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    if defect:
        picture[12:24, 16:32] = (60, 60, 255)  # OpenCV's order: blue, green, red
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), picture)


def draw_mask(path: Path, value: int) -> None:
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    mask[12:24, 16:32] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), mask)


@pytest.fixture
def data(tmp_path):
    """Two good, two logical and one structural picture; the last logical one shows nothing where its mask is."""
    root = tmp_path / "red-part"
    splits = {"train/good": 2, "validation/good": 2, "test/good": 2}
    for split, count in splits.items():
        for index in range(count):
            draw(root / split / f"{index:03d}.png", index, defect=False)
    draw(root / "test/logical_anomalies/000.png", 7, defect=True)
    draw(root / "test/logical_anomalies/001.png", 8, defect=False)
    draw(root / "test/structural_anomalies/000.png", 9, defect=True)
    for folder, value in (("logical_anomalies/000", 255), ("logical_anomalies/001", 255)):
        draw_mask(root / "ground_truth" / folder / "000.png", value)
    draw_mask(root / "ground_truth/structural_anomalies/000/000.png", 7)
    draw_mask(root / "ground_truth/structural_anomalies/000/001.png", 255)
    (root / "defects_config.json").write_text(json.dumps(CONFIG))
    return root


def test_report_holds_every_figure(red, data):
    """Counts, fused score, branches, AU-sPRO of both splits and by type, against the same measures called by hand."""
    found = evaluate(red, open_data(data, need_test=True))
    report = found.report
    assert report.layout == "loco"
    assert report.image.test_images.model_dump() == {"good": 2, "logical": 2, "structural": 1}
    for name, values in (("score", report.image.image_auroc), *report.branches.items()):
        columns = {k: np.array([getattr(r, name) for r in found.records if r.kind == k]) for k in found.data.test}
        assert values == image_auroc(columns)
    assert report.branches["map_score"].structural == 1.0
    assert report.image.intervals is not None
    assert [(d.defect, d.images, d.channels) for d in report.defects] == [("dent", 1, 1), ("extra", 3, 3)]
    images = [
        LabelledMap(r.file, str(r.kind), enlarged(m, HEIGHT, WIDTH), found.truth.channels(Path(r.file)))
        for r, m in zip(found.records, found.maps, strict=True)
    ]
    areas = au_spro(lambda: images)
    assert report.au_spro.logical == areas.kinds["logical"]
    assert report.au_spro.structural == areas.kinds["structural"]
    assert list(report.au_spro.mean) == [f"{limit:g}" for limit in LIMITS]
    assert {d.defect: d.au_spro for d in report.defects} == areas.defects


def test_image_figures_are_of_the_fused_score(red, data):
    """A fused score against its own map branch: the report follows the fused one, by kind and by defect type."""

    def against(images: np.ndarray) -> Scores:
        scores = red_scores(images)
        return Scores(-scores.map_score, scores.map_score, scores.mahalanobis, scores.anomaly_map)

    report = evaluate(SimpleNamespace(score=against, description=red.description), open_data(data)).report
    assert (report.image.image_auroc.structural, report.branches["map_score"].structural) == (0.0, 1.0)
    assert report.defects[0].image_auroc == 0.0


def test_what_is_drawn_is_found(red, data):
    """One of two logical defects is lit whole: half the area and what luck gives; the structural one wholly."""
    areas = evaluate(red, open_data(data)).report.au_spro
    assert areas.structural["0.3"] > 0.97
    assert 0.5 <= areas.logical["0.3"] < 0.8
    assert areas.mean["0.3"] == pytest.approx((areas.structural["0.3"] + areas.logical["0.3"]) / 2)


def test_hash_names_pictures_masks_and_config(red, data):
    """Another mask is another test."""
    before = evaluate(red, open_data(data)).report.test_sha256
    assert before == evaluate(red, open_data(data)).report.test_sha256
    draw_mask(data / "ground_truth/logical_anomalies/001/000.png", 7)
    assert evaluate(red, open_data(data)).report.test_sha256 != before


def test_mvtec_ad_has_structural_figures_alone(red, tmp_path):
    for index in range(4):
        draw(tmp_path / f"train/good/{index:03d}.png", index, defect=False)
    draw(tmp_path / "test/good/000.png", 5, defect=False)
    draw(tmp_path / "test/red_spot/000.png", 6, defect=True)
    draw_mask(tmp_path / "ground_truth/red_spot/000_mask.png", 255)
    report = evaluate(red, open_data(tmp_path)).report
    assert report.layout == "mvtec-ad"
    assert report.image.image_auroc.logical is report.image.image_auroc.mean is None
    assert report.au_spro.logical is report.au_spro.mean is None
    assert report.au_spro.structural["0.3"] > 0.97
    assert [(d.defect, d.image_auroc) for d in report.defects] == [("red_spot", 1.0)]


def test_plain_folder_has_no_localisation(red, tmp_path):
    """Without masks the image figures stand alone; good pictures of the root are written as the good ones."""
    for index in range(8):
        draw(tmp_path / f"{index:03d}.png", index, defect=False)
    draw(tmp_path / "bad/000.png", 9, defect=True)
    evaluation = evaluate(red, open_data(tmp_path))
    assert evaluation.report.au_spro is None
    assert [(d.defect, d.channels, d.au_spro) for d in evaluation.report.defects] == [("bad", 0, None)]
    write_maps(tmp_path / "maps", evaluation)
    assert len(list((tmp_path / "maps" / tmp_path.name / "test/good").glob("*.tiff"))) == 2


def test_broken_mask_is_found_before_the_first_picture_is_scored(red, data):
    def never(_: np.ndarray) -> Scores:
        raise AssertionError

    (data / "ground_truth/structural_anomalies/000/001.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"000/001\.png"):
        evaluate(SimpleNamespace(score=never, description=red.description), open_data(data))


@pytest.mark.parametrize("field", ["score", "map_score", "mahalanobis"])
def test_score_that_is_not_finite_is_named(red, data, field):
    """NaN compares false: it must not become an OK."""

    def broken(images: np.ndarray) -> Scores:
        scores = red_scores(images)
        getattr(scores, field)[-1] = np.nan
        return scores

    stub = SimpleNamespace(score=broken, description=red.description)
    with pytest.raises(DataError, match=r"good/001\.png.*finite"):
        evaluate(stub, open_data(data))


def test_map_that_is_not_finite_is_named(red, data):
    def broken(images: np.ndarray) -> Scores:
        scores = red_scores(images)
        scores.anomaly_map[0, 3, 3] = np.inf
        return scores

    with pytest.raises(DataError, match=r"good/000\.png.*infinity"):
        evaluate(SimpleNamespace(score=broken, description=red.description), open_data(data))


def test_no_test_split_is_an_error(red, tmp_path):
    for index in range(4):
        draw(tmp_path / f"{index:03d}.png", index, defect=False)
    with pytest.raises(DataError, match="no test split"):
        evaluate(red, open_data(tmp_path))


def test_maps_lie_as_the_official_script_reads_them(red, data, tmp_path):
    """One float32 TIFF a test picture at its size; a map for every ground-truth folder, the others under good/."""
    evaluation = evaluate(red, open_data(data))
    root = write_maps(tmp_path / "maps", evaluation)
    assert root == tmp_path / "maps/red-part/test"
    written = {path.relative_to(root).with_suffix("") for path in root.rglob("*.tiff")}
    truths = {path.relative_to(data / "ground_truth") for path in (data / "ground_truth").glob("*/*")}
    assert truths <= written
    assert {path.parent.name for path in written - truths} == {"good"}
    for record, anomaly_map in zip(evaluation.records, evaluation.maps, strict=True):
        file = Path(record.file)
        content = tifffile.imread(root / file.parent.name / f"{file.stem}.tiff")
        assert content.dtype == np.float32
        assert np.array_equal(content, enlarged(anomaly_map, HEIGHT, WIDTH))


def test_enlarging_keeps_centres_and_range():
    """A ramp stays a ramp between the cells' centres; nothing overshoots."""
    ramp = np.tile(np.arange(8, dtype=np.float32), (4, 1))
    large = enlarged(ramp, 16, 32)
    assert large.shape == (16, 32)
    assert large[5, 2:30] == pytest.approx((np.arange(2, 30) + 0.5) / 4 - 0.5)
    assert (large.min(), large.max()) == (0, 7)


def test_score_files_without_a_split(red, data):
    """A folder of pictures has scores and no kind."""
    files = sorted((data / "test/good").iterdir())
    records = score_files(red, files)
    assert [record.file for record in records] == [str(file) for file in files]
    assert {record.kind for record in records} == {None}
