"""Image AUROC against scikit-learn; intervals against plain resampling and a known truth."""

import numpy as np
import pytest
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from training.errors import DataError
from training.metrics import auroc, auroc_intervals, image_metrics


@pytest.mark.parametrize("levels", [1000, 4, 1])
def test_auroc_equals_sklearn_with_and_without_ties(levels):
    generator = np.random.default_rng(0)
    good, bad = generator.integers(0, levels, 50).astype(float), generator.integers(0, levels + 1, 70).astype(float)
    expected = roc_auc_score([0] * 50 + [1] * 70, np.concatenate([good, bad]))
    assert auroc(good, bad) == pytest.approx(expected)


def test_splits_and_pool():
    """Mean is the half sum of the splits; pooled puts all anomalies together."""
    scores = {"good": np.array([0.0, 1.0]), "logical": np.array([2.0]), "structural": np.array([-1.0, -2.0, 3.0])}
    found = image_metrics(scores)
    assert found.image_auroc.logical == 1
    assert found.image_auroc.structural == pytest.approx(1 / 3)
    assert found.image_auroc.mean == pytest.approx(2 / 3)
    assert found.image_auroc.pooled == pytest.approx(0.5)
    assert found.test_images.structural == 3


def test_missing_kind_is_none():
    """MVTec AD has no logical anomalies: then there is no mean of both, and pooled is structural."""
    scores = {"good": np.array([0.0, 1.0]), "structural": np.array([0.5, 3.0])}
    found = image_metrics(scores)
    assert found.image_auroc.model_dump() == {"logical": None, "structural": 0.75, "mean": None, "pooled": 0.75}
    assert found.intervals is not None
    assert found.intervals.logical is None
    assert found.intervals.mean is None
    assert found.intervals.structural == found.intervals.pooled
    assert found.test_images.logical == 0


@pytest.mark.parametrize("missing", ["good", "logical"])
def test_nothing_to_compare_is_an_error(missing):
    scores = {"good": np.array([0.0]), "logical": np.array([1.0])}
    with pytest.raises(DataError, match="good pictures and of anomalies"):
        image_metrics({kind: values for kind, values in scores.items() if kind != missing})


def test_nan_score_is_an_error():
    with pytest.raises(DataError, match="NaN"):
        image_metrics({"good": np.array([0.0, np.nan]), "logical": np.array([1.0])})


def gaussians(seed: int, count: int = 60) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    shifts = {"good": 0.0, "logical": 0.8, "structural": 1.5}
    return {kind: generator.normal(shift, 1, count) for kind, shift in shifts.items()}


def test_bootstrap_equals_resampling_written_out():
    """The counts at ranks are the AUROC of the resampled scores themselves, ties included, in the same draws."""
    scores = {kind: values.round(1) for kind, values in gaussians(1).items()}
    found = auroc_intervals(scores, resamples=200, seed=5)
    generator = np.random.default_rng(5)
    levels = np.unique(np.concatenate(list(scores.values())))
    draws: dict[str, list[float]] = {"logical": [], "structural": [], "mean": [], "pooled": []}
    for _ in range(200):
        drawn = {k: levels[generator.choice(np.searchsorted(levels, v), len(v))] for k, v in scores.items()}
        logical, structural = (auroc(drawn["good"], drawn[kind]) for kind in ("logical", "structural"))
        pooled = auroc(drawn["good"], np.concatenate([drawn["logical"], drawn["structural"]]))
        for kind, value in zip(draws, (logical, structural, (logical + structural) / 2, pooled), strict=True):
            draws[kind].append(value)
    for kind, values in draws.items():
        assert getattr(found, kind) == pytest.approx(np.quantile(values, [0.025, 0.975]))


def test_intervals_cover_the_truth():
    """Two Gaussians one sigma apart: the known AUROC lies in about 95 of 100 intervals."""
    truth = norm.cdf(0.8 / np.sqrt(2))
    intervals = [auroc_intervals(gaussians(seed), resamples=300).logical or (0, 0) for seed in range(100)]
    assert 88 <= sum(low <= truth <= high for low, high in intervals) <= 99


def test_intervals_are_seeded_and_hold_the_figure():
    scores = gaussians(0)
    first, again = auroc_intervals(scores), auroc_intervals(scores)
    assert first == again != auroc_intervals(scores, seed=1)
    figures = image_metrics(scores).image_auroc
    for kind in ("logical", "structural", "mean", "pooled"):
        low, high = getattr(first, kind)
        assert low < getattr(figures, kind) < high
