"""The distance branch against scikit-learn, and what it refuses."""

import numpy as np
import pytest
from sklearn.covariance import LedoitWolf

from training.errors import DataError
from training.mahalanobis import distance, fit_statistics


def normals(n: int = 60, size: int = 24) -> np.ndarray:
    generator = np.random.default_rng(0)
    return generator.standard_normal((n, size)) @ generator.standard_normal((size, size)) + 3


def test_distance_equals_sklearn():
    """On values of deviation 1 the distance is scikit-learn's own, to rounding."""
    x = normals()
    x = (x - x.mean(0)) / x.std(0)
    expected = np.sqrt(LedoitWolf().fit(x).mahalanobis(x))
    assert distance(fit_statistics(x), x) == pytest.approx(expected, rel=1e-9)


def test_distance_ignores_units():
    """Scaling a channel changes nothing: no channel drowns because it is small."""
    x, scale = normals(), np.geomspace(0.1, 10, 24)
    assert distance(fit_statistics(x * scale), x * scale) == pytest.approx(distance(fit_statistics(x), x), rel=1e-6)


def test_more_channels_than_pictures():
    """Shrinkage keeps held-out normals near and a shifted one far."""
    x = normals(100, 64)
    statistics = fit_statistics(x[:40])
    held_out = distance(statistics, x[40:])
    assert np.isfinite(held_out).all()
    assert distance(statistics, x[40:] + 6 * x.std(0)).min() > np.median(held_out)


def test_whitening_is_lower_triangular_float64():
    statistics = fit_statistics(normals())
    assert statistics.whitening.dtype == np.float64
    assert np.array_equal(statistics.whitening, np.tril(statistics.whitening))


def test_dead_channel_does_not_explode():
    """A channel that never moves on the normals gets a floor, not a division by zero."""
    x = normals()
    x[:, 3] = 0.0
    assert np.isfinite(distance(fit_statistics(x), x + 1e-6)).all()


def test_nan_stays_nan():
    x = normals()
    bad = x[:2].copy()
    bad[1, 0] = np.nan
    assert np.isnan(distance(fit_statistics(x), bad)).tolist() == [False, True]


@pytest.mark.parametrize("bad", [np.zeros((1, 4)), np.full((5, 4), np.nan), np.zeros(4), np.ones((5, 4))])
def test_unusable_normals_are_refused(bad):
    with pytest.raises(DataError, match="normals"):
        fit_statistics(bad)
