"""Calibration: constants, quantiles and limits from validation normals alone."""

import inspect

import numpy as np
import pytest

from training import calibrate as module
from training.calibrate import NormalScores, calibrate, upper_limit
from training.config import CalibrationConfig
from training.errors import DataError


def normals(n: int = 60) -> NormalScores:
    generator = np.random.default_rng(0)
    maps = generator.random((n, 8, 8)).astype(np.float32)
    return NormalScores(maps.max(axis=(1, 2)).astype(float), generator.normal(20, 2, n), maps)


def test_fused_score_of_normals_is_centred():
    """Both branches enter as z-scores: their sum has mean 0 on the normals it was fitted on."""
    scores = normals()
    fusion = calibrate(scores, CalibrationConfig()).fusion
    fused = fusion.score(scores.map_score, scores.mahalanobis)
    assert fused.mean() == pytest.approx(0, abs=1e-9)
    one = fusion.score(np.array([fusion.map_mean + fusion.map_std]), np.array([fusion.mahalanobis_mean]))
    assert one == pytest.approx(1)


def test_quantiles_are_numpys():
    scores = normals()
    found = calibrate(scores, CalibrationConfig()).quantiles.mahalanobis
    assert found == {key: pytest.approx(np.quantile(scores.mahalanobis, float(key))) for key in module.QUANTILES}


@pytest.mark.parametrize("sigmas", [(3.0, 2.0), (0.1, 0.1)])
def test_review_never_lies_above_ng(sigmas):
    limits = calibrate(normals(), CalibrationConfig(ng_sigma=sigmas[0], review_sigma=sigmas[1])).thresholds
    assert limits.review <= limits.ng


def test_no_validation_normal_lies_above_ng():
    """Even where one normal is an outlier that the spread does not reach."""
    scores = np.array([0.0] * 99 + [50.0])
    assert upper_limit(scores, 3.0) == 50.0


def test_heat_map_limit_lies_in_the_middle_of_its_scale():
    heat_map = calibrate(normals(), CalibrationConfig()).heatmap
    assert heat_map.low < heat_map.limit < heat_map.high
    assert heat_map.limit == pytest.approx((heat_map.low + heat_map.high) / 2)


def test_score_is_never_clamped_and_nan_passes():
    fusion = calibrate(normals(), CalibrationConfig()).fusion
    values = fusion.score(np.array([1e9, -1e9, np.nan]), np.zeros(3))
    assert values[0] > 1e6
    assert values[1] < -1e6
    assert np.isnan(values[2])


def test_weight_zero_leaves_the_map_alone():
    fusion = calibrate(normals(), CalibrationConfig(mahalanobis_weight=0)).fusion
    assert fusion.score(np.array([fusion.map_mean]), np.array([1e6])) == 0


@pytest.mark.parametrize("column", ["map_score", "mahalanobis"])
@pytest.mark.parametrize("values", [np.ones(5), np.array([1, 2, np.nan, 3, 4])])
def test_unusable_scores_are_refused_by_name(column, values):
    good = np.arange(len(values), dtype=float)
    scores = {"map_score": good, "mahalanobis": good, column: values}
    with pytest.raises(DataError, match=column):
        calibrate(NormalScores(**scores, anomaly_map=np.ones((len(values), 2, 2))), CalibrationConfig())


def test_one_normal_is_refused():
    with pytest.raises(DataError, match="at least two"):
        calibrate(normals(1), CalibrationConfig())


def test_calibration_cannot_reach_data():
    """It imports nothing that reads pictures, so no test picture can enter a threshold."""
    source = inspect.getsource(module)
    assert "training.data" not in source
    assert "Path" not in source
