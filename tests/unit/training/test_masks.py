"""Defect masks: all of an image are read, and whatever is wrong with one is named with its file."""

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from training.data import open_data
from training.errors import DataError
from training.masks import DefectType, open_masks, read_defects_config

HEIGHT, WIDTH = 20, 30
CONFIG = [
    {"defect_name": "extra", "pixel_value": 255, "saturation_threshold": 12, "relative_saturation": False},
    {"defect_name": "missing", "pixel_value": 254, "saturation_threshold": 0.5, "relative_saturation": True},
    {"defect_name": "dent", "pixel_value": 7, "saturation_threshold": 1.0, "relative_saturation": True},
]


def write(path: Path, content: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), content)


def mask(value: int, side: int = 5, left: int = 3) -> np.ndarray:
    drawn = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    drawn[2 : 2 + side, left : left + side] = value
    return drawn


def pictures(root: Path, amounts: dict[str, int]) -> None:
    for folder, count in amounts.items():
        for index in range(count):
            write(root / folder / f"{index:03d}.png", np.full((HEIGHT, WIDTH, 3), index, dtype=np.uint8))


@pytest.fixture
def loco(tmp_path):
    """Two logical pictures, the first with three channels, and one structural picture."""
    good = {"train/good": 2, "validation/good": 2, "test/good": 1}
    pictures(tmp_path, good | {"test/logical_anomalies": 2, "test/structural_anomalies": 1})
    truth = tmp_path / "ground_truth"
    write(truth / "logical_anomalies/000/000.png", mask(255))
    write(truth / "logical_anomalies/000/001.png", mask(254, left=6))
    write(truth / "logical_anomalies/000/002.png", mask(255, side=2, left=20))
    write(truth / "logical_anomalies/001/000.png", mask(254))
    write(truth / "structural_anomalies/000/000.png", mask(7))
    (tmp_path / "defects_config.json").write_text(json.dumps(CONFIG))
    return tmp_path


@pytest.fixture
def mvtec_ad(tmp_path):
    pictures(tmp_path, {"train/good": 4, "test/good": 1, "test/scratch": 2})
    for index in range(2):
        write(tmp_path / f"ground_truth/scratch/{index:03d}_mask.png", mask(255))
    return tmp_path


def test_every_mask_of_an_image_is_a_channel(loco):
    """Not only 000.png; each has the saturation of its own grey value, and overlaps stay in both."""
    data = open_data(loco)
    truth = open_masks(data)
    assert truth is not None
    first = truth.channels(data.test["logical"][0])
    assert [(c.defect, c.saturated_area, int(c.mask.sum())) for c in first] == [
        ("extra", 12, 25),
        ("missing", 12, 25),
        ("extra", 4, 4),
    ]
    assert (first[0].mask & first[1].mask).any()
    assert truth.defects[data.test["logical"][0]] == ("extra", "missing", "extra")
    assert truth.channels(data.test["good"][0]) == ()
    assert len(truth.all_files) == 5


def test_mvtec_ad_masks_saturate_when_full(mvtec_ad):
    """The folder names the defect; sPRO with relative saturation 1 over one channel a picture."""
    data = open_data(mvtec_ad)
    truth = open_masks(data)
    assert truth is not None
    (channel,) = truth.channels(data.test["structural"][1])
    assert (channel.defect, channel.saturated_area) == ("scratch", 25)


def test_mvtec_ad_mask_edges_may_be_soft(mvtec_ad):
    """Its masks name no defect by grey value: what is not black is the defect."""
    soft = mask(255)
    soft[2, 3] = 128
    write(mvtec_ad / "ground_truth/scratch/000_mask.png", soft)
    assert open_masks(open_data(mvtec_ad)) is not None


def test_data_without_any_masks_have_none(loco):
    """Plain folders, and MVTec layouts that come without: image figures alone."""
    shutil.rmtree(loco / "ground_truth")
    (loco / "defects_config.json").unlink()
    assert open_masks(open_data(loco)) is None


def test_plain_folder_has_no_masks(tmp_path):
    pictures(tmp_path, {"good": 8, "bad": 1})
    assert open_masks(open_data(tmp_path)) is None


def broken(root: Path, change: str) -> None:
    """One fault in a whole LOCO folder."""
    logical = root / "ground_truth/logical_anomalies"
    several = mask(255)
    several[2, 3] = 254
    changes = {
        "folder": lambda: shutil.rmtree(logical / "001"),
        "file": lambda: (logical / "001/000.png").unlink(),
        "all": lambda: shutil.rmtree(root / "ground_truth"),
        "config": lambda: (root / "defects_config.json").unlink(),
        "size": lambda: write(logical / "001/000.png", np.full((WIDTH, HEIGHT), 254, dtype=np.uint8)),
        "several": lambda: write(logical / "000/001.png", several),
        "zero": lambda: write(logical / "000/001.png", mask(0)),
        "unknown": lambda: write(logical / "000/002.png", mask(9)),
        "tiny": lambda: write(logical / "001/000.png", mask(254, side=1)),
        "colour": lambda: write(logical / "001/000.png", np.dstack([mask(254)] * 3)),
        "deep": lambda: write(logical / "001/000.png", mask(254).astype(np.uint16)),
        "stray": lambda: write(logical / "007/000.png", mask(254)),
        "flat": lambda: write(logical / "001.png", mask(254)),
        "cut": lambda: (logical / "001/000.png").write_bytes((logical / "001/000.png").read_bytes()[:-9]),
    }
    changes[change]()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("folder", r"logical_anomalies/001'.*missing"),
        ("file", r"logical_anomalies/001'.*missing"),
        ("all", r"logical_anomalies/000'.*missing"),
        ("config", r"defects_config\.json'.*cannot be read"),
        ("size", r"001/000\.png'.*20 x 30.*30 x 20"),
        ("several", r"000/001\.png'.*several grey values \(254, 255\)"),
        ("zero", r"000/001\.png'.*marks no pixel"),
        ("unknown", r"000/002\.png'.*grey value 9 is not in.*7, 254, 255"),
        ("tiny", r"001/000\.png'.*less than one.*'missing'"),
        ("colour", r"001/000\.png'.*8 bit grey PNG"),
        ("deep", r"001/000\.png'.*16 bit grey.*8 bit"),
        ("stray", r"logical_anomalies/007'.*no test picture"),
        ("flat", r"logical_anomalies/001\.png'.*no test picture"),
        ("cut", r"001/000\.png'.*cut"),
    ],
)
def test_fault_is_named_with_its_file(loco, change, message):
    broken(loco, change)
    with pytest.raises(DataError, match=message):
        open_masks(open_data(loco))


def test_mvtec_ad_faults_are_named(mvtec_ad):
    path = mvtec_ad / "ground_truth/scratch/001_mask.png"
    write(mvtec_ad / "ground_truth/scratch/009_mask.png", mask(255))
    with pytest.raises(DataError, match=r"009_mask\.png.*no test picture"):
        open_masks(open_data(mvtec_ad))
    path.unlink()
    with pytest.raises(DataError, match=r"001_mask\.png.*missing"):
        open_masks(open_data(mvtec_ad))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"defect_name": None}, "defect_name"),
        ({"defect_name": ""}, "defect_name"),
        ({"pixel_value": 0}, "pixel_value"),
        ({"pixel_value": 256}, "pixel_value"),
        ({"pixel_value": "255"}, "pixel_value"),
        ({"saturation_threshold": 0}, "saturation_threshold"),
        ({"saturation_threshold": -3}, "saturation_threshold"),
        ({"saturation_threshold": 12.5}, "whole number"),
        ({"saturation_threshold": 1.5, "relative_saturation": True}, r"\(0, 1\]"),
        ({"relative_saturation": "yes"}, "relative_saturation"),
        ({"pixel_value": 254}, "two entries"),
    ],
)
def test_every_field_of_the_config_is_checked(tmp_path, change, message):
    """The error names the file, the entry's number and the field."""
    path = tmp_path / "defects_config.json"
    path.write_text(json.dumps([CONFIG[0] | change, *CONFIG[1:]]))
    with pytest.raises(DataError, match=rf"defects_config\.json.*{message}"):
        read_defects_config(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '[{"defect_name": "a"}]', "[1]"])
def test_config_that_is_no_list_of_defects_is_refused(tmp_path, text):
    path = tmp_path / "defects_config.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"defects_config\.json"):
        read_defects_config(path)


@pytest.mark.parametrize(
    ("threshold", "relative", "area", "expected"),
    [(0.5, True, 9, 4), (1.0, True, 9, 9), (400, False, 25, 25), (400, False, 900, 400), (0.5, True, 1, 0)],
)
def test_saturated_area_follows_the_official_rules(threshold, relative, area, expected):
    """Floor of a share; the smaller of threshold and area. A share under one pixel is 0, refused where it is read."""
    defect = DefectType(defect_name="d", pixel_value=1, saturation_threshold=threshold, relative_saturation=relative)
    assert defect.saturated_area(area) == expected
