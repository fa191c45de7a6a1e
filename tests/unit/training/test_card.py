"""The written report: every file is there, figures are the report's own, and pictures choose what they say they do."""

import re
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from pydantic import BaseModel
from sklearn.metrics import roc_curve

from training import metrics
from training.calibrate import Calibration, HeatMap, NormalScores, Thresholds, calibrate
from training.card import _round_numbers, model_card, overlay, pick, roc, summary, verdict, write_report
from training.config import CalibrationConfig
from training.data import read_image
from training.detector import Scores
from training.evaluate import ScoreRecord, evaluate

AUROC = metrics.ImageAuroc(logical=0.5, structural=1.0, mean=0.75, pooled=0.625)


class About(BaseModel):
    """What a card is told of a model."""

    product: str = "tiny-part"
    method: str = "rd"
    image_size: int = 64
    teacher_arch: str = "resnet18"
    teacher_sha256: str = "c" * 64
    data_sha256: str = "d" * 64
    git_revision: str = "e" * 40
    calibration: Calibration
    region: None = None


def noise_scores(images: np.ndarray) -> Scores:
    """A map of the red channel, and its largest and mean value as branches."""
    maps = images[:, ::8, ::8, 0].astype(np.float32) / 255
    peaks, means = maps.max(axis=(1, 2)).astype(np.float64), maps.mean(axis=(1, 2)).astype(np.float64)
    return Scores(peaks + means, peaks, means, maps)


@pytest.fixture(scope="module")
def about():
    generator = np.random.default_rng(0)
    normals = NormalScores(generator.random(9), generator.random(9), generator.random((9, 4, 4)))
    return About(calibration=calibrate(normals, CalibrationConfig()))


@pytest.fixture(scope="module")
def evaluation(about, folder):
    return evaluate(SimpleNamespace(score=noise_scores, description=about), folder)


@pytest.fixture(scope="module")
def written(tmp_path_factory, about, evaluation):
    out = tmp_path_factory.mktemp("report") / "deeper"
    write_report(out, about, evaluation)
    return out


def report_of(**changes) -> metrics.TestReport:
    intervals = metrics.AurocIntervals(logical=(0.4, 0.6), structural=(1.0, 1.0), mean=(0.7, 0.8), pooled=(0.6, 0.7))
    image = metrics.ImageMetrics(
        image_auroc=AUROC, test_images=metrics.TestImages(good=3, logical=2, structural=2), intervals=intervals
    )
    limits = {"0.01": 0.1, "0.05": 0.2, "0.1": 0.3, "0.3": 0.4, "1": 0.5}
    values = {
        "product": "p",
        "method": "rd",
        "layout": "loco",
        "data_sha256": "a" * 64,
        "test_sha256": "b" * 64,
        "image": image,
        "branches": {"map_score": AUROC, "mahalanobis": AUROC},
        "au_spro": metrics.AuSpro(logical=limits, structural=limits, mean=limits),
        "defects": (
            metrics.DefectMetrics(defect="a|b", images=2, channels=3, image_auroc=0.875, au_spro=limits),
            metrics.DefectMetrics(defect="c", images=12, channels=12, image_auroc=1.0, au_spro=None),
        ),
    }
    return metrics.TestReport(**(values | changes))


def test_everything_is_written_and_readable(written, evaluation):
    """report.json is the report itself; every picture decodes; nothing else lies there."""
    names = {path.name for path in written.iterdir()}
    assert names == {"report.json", "roc.png", "histogram.png", "heatmaps.jpg", "MODEL_CARD.md"}
    assert metrics.TestReport.model_validate_json((written / "report.json").read_text()) == evaluation.report
    for name in ("roc.png", "histogram.png", "heatmaps.jpg"):
        assert min(cv2.imread(str(written / name)).shape[:2]) > 300


def test_card_embeds_pictures_that_exist(written):
    """Links are relative, so that the folder can be moved."""
    links = re.findall(r"!\[[^]]+]\(([^)]+)\)", (written / "MODEL_CARD.md").read_text())
    assert len(links) == 3
    assert all((written / link).is_file() for link in links)


def test_card_says_where_the_model_comes_from(written, about, evaluation):
    """Hashes, teacher, calibration and the way to do it again; no path of the machine it was made on."""
    card = (written / "MODEL_CARD.md").read_text()
    for value in (about.product, about.teacher_arch, about.teacher_sha256, about.data_sha256, about.git_revision):
        assert str(value) in card
    assert evaluation.report.test_sha256 in card
    assert f"reject above {about.calibration.thresholds.ng:.3f}" in card
    assert "logicrd-train evaluate" in card
    assert str(evaluation.data.root.parent) not in card


def test_summary_is_in_percent_with_intervals():
    lines = summary(report_of())
    assert lines[2].endswith(
        "| 50.0 (40.0 to 60.0) | 100.0 (100.0 to 100.0) | 75.0 (70.0 to 80.0) | 62.5 (60.0 to 70.0) |"
    )
    assert "| AU-sPRO, false positive rate up to 0.05 | 20.0 | 20.0 | 20.0 | - |" in lines
    assert len({line.count("|") for line in lines}) == 1


def card_of(about, evaluation, report) -> str:
    stub = SimpleNamespace(report=report, records=evaluation.records, data=evaluation.data)
    return model_card(about, stub)


def test_card_names_what_was_not_measured(about, evaluation):
    """Missing kinds, missing masks and types with few pictures are limits, not silence."""
    image = report_of().image.model_copy(
        update={
            "image_auroc": metrics.ImageAuroc(logical=None, structural=1.0, mean=None, pooled=1.0),
            "test_images": metrics.TestImages(good=3, logical=0, structural=2),
        }
    )
    card = card_of(about, evaluation, report_of(image=image, au_spro=None))
    assert "No logical anomalies were there" in card
    assert "have no masks" in card
    assert "rough figures: a|b (2)." in card
    assert "No structural" not in card
    assert "have no masks" not in card_of(about, evaluation, report_of())


def test_bars_in_names_do_not_break_the_table(about, evaluation):
    assert "| a\\|b | 2 | 87.5 | 20.0 |" in card_of(about, evaluation, report_of())


def test_decisions_count_every_picture(about, evaluation):
    """OK, REVIEW and NG of a kind add up to its pictures."""
    pattern = r"^\| (good|logical|structural) \| (\d+) \| (\d+) \| (\d+) \|$"
    rows = re.findall(pattern, model_card(about, evaluation), re.MULTILINE)
    found = {kind: sum(map(int, counts)) for kind, *counts in rows}
    assert found == {"good": 3, "logical": 2, "structural": 2}


@pytest.mark.parametrize(("score", "expected"), [(1.0, "OK"), (1.01, "REVIEW"), (2.0, "REVIEW"), (2.01, "NG")])
def test_verdict_is_strictly_above_a_limit(score, expected):
    assert verdict(score, Thresholds(ng=2.0, review=1.0)) == expected


def test_roc_equals_sklearn():
    """Ties in one step; from (0, 0) to (1, 1)."""
    generator = np.random.default_rng(0)
    good, bad = generator.integers(0, 9, 40).astype(float), generator.integers(2, 12, 30).astype(float)
    false, true, _ = roc_curve([0] * 40 + [1] * 30, np.concatenate([good, bad]), drop_intermediate=False)
    found = roc(good, bad)
    assert found[0] == pytest.approx(false)
    assert found[1] == pytest.approx(true)


def test_sheet_shows_the_clearest_and_the_hardest():
    """For good parts a low score is clear, for anomalies a high one; small kinds are shown whole."""
    scores = [5.0, 1.0, 3.0, 2.0, 4.0, 6.0]
    for kind, expected in (("good", [1, 3, 0, 5]), ("logical", [5, 0, 3, 1])):
        records = [ScoreRecord(file="f", kind=kind, score=s, map_score=0, mahalanobis=0) for s in scores]
        assert pick(records, kind) == expected
        assert pick(records[:3], kind) == sorted(range(3), key=lambda i: scores[i] * (1 if kind == "good" else -1))
        assert pick(records, "structural") == []


def test_overlay_has_a_fixed_scale(folder):
    """Values up to `low` leave the picture as it is, whatever else the map holds; `high` and above look alike."""
    picture = read_image(folder.train[0])
    heat = HeatMap(limit=0.5, low=0.0, high=1.0)
    calm = np.zeros((4, 4), dtype=np.float32)
    assert np.array_equal(overlay(picture, calm - 3, heat), picture)
    assert np.array_equal(overlay(picture, calm + 1, heat), overlay(picture, calm + 50, heat))
    half = calm.copy()
    half[:, 3] = 9
    drawn = overlay(picture, half, heat)
    quarter = picture.shape[1] // 4
    assert np.array_equal(drawn[:, :quarter], picture[:, :quarter])
    assert not np.array_equal(drawn[:, -quarter:], picture[:, -quarter:])


@pytest.mark.parametrize(("low", "high"), [(-3.2, 41.0), (0.0, 900.0), (-0.01, 0.02)])
def test_ticks_are_few_round_numbers_inside(low, high):
    ticks = _round_numbers(low, high)
    assert ticks == sorted(ticks)
    assert all(low < tick < high for tick in ticks)
    assert 3 <= len(ticks) <= 14
