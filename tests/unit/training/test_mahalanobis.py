"""The distance branch against scikit-learn, on normals of several modes, in the server's form, and what it refuses."""

import importlib.util
import sys
import types

import numpy as np
import pytest
from sklearn.covariance import LedoitWolf
from sklearn.metrics import roc_auc_score

from training.errors import DataError
from training.export import BACKEND
from training.mahalanobis import Statistics, choose_modes, distance, fit_statistics

CENTRES = 12 * np.eye(3, 24)


def normals(n: int = 60, size: int = 24) -> np.ndarray:
    generator = np.random.default_rng(0)
    return generator.standard_normal((n, size)) @ generator.standard_normal((size, size)) + 3


def modes(count: int, n: int, seed: int = 0) -> np.ndarray:
    """n descriptors around the first `count` centres, twelve deviations from the origin each."""
    generator = np.random.default_rng(seed)
    return CENTRES[np.arange(n) % count] + generator.standard_normal((n, 24))


def dense(statistics: Statistics, values: np.ndarray) -> np.ndarray:
    """The distance by the whole (D, D) precision matrix."""
    within = statistics.directions.T @ np.diag(statistics.weights) @ statistics.directions
    outside = np.eye(statistics.size) - statistics.directions.T @ statistics.directions
    scale = np.diag(statistics.scale)
    precision = scale @ (within + statistics.outer * outside) @ scale
    centred = values[:, None, :] - statistics.means
    return np.sqrt(np.einsum("nki,ij,nkj->nk", centred, precision, centred).min(axis=1))


@pytest.mark.parametrize(("n", "size"), [(60, 24), (40, 64)])
def test_distance_equals_sklearn(n, size):
    """On values of deviation 1 one mode's distance is scikit-learn's own, also with more channels than pictures."""
    x = normals(n, size)
    x = (x - x.mean(0)) / x.std(0)
    expected = np.sqrt(LedoitWolf().fit(x).mahalanobis(x))
    assert distance(fit_statistics(x, max_modes=1), x) == pytest.approx(expected, rel=1e-7)


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


@pytest.mark.parametrize(("n", "size"), [(60, 24), (30, 64)])
def test_low_rank_form_equals_the_dense_one(n, size):
    """Few directions and one number for the rest are the whole precision matrix, and the directions orthonormal."""
    x = normals(n, size)
    statistics = fit_statistics(x)
    rank = len(statistics.weights)
    assert rank <= min(n, size)
    assert statistics.directions @ statistics.directions.T == pytest.approx(np.eye(rank), abs=1e-10)
    probe = normals(200, size)[100:]
    assert distance(statistics, probe) == pytest.approx(dense(statistics, probe), rel=1e-6)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_separate_modes_are_counted(count):
    """The number of modes comes from the likelihood of held-out normals, whatever the seed of the folds."""
    assert [choose_modes(modes(count, 120), seed) for seed in range(3)] == [count] * 3
    assert len(fit_statistics(modes(count, 120)).means) == count


def test_anomalies_between_modes():
    """Half-way between two of three modes: one Gaussian is worse than chance there, the nearest mode tells them."""
    train, good = modes(3, 150), modes(3, 90, seed=1)
    between = (modes(3, 90, seed=2) - CENTRES[np.arange(90) % 3]) + (CENTRES[0] + CENTRES[1]) / 2
    labels = np.repeat([0, 1], 90)
    area = [
        roc_auc_score(labels, distance(fit_statistics(train, max_modes=most), np.concatenate([good, between])))
        for most in (1, 6)
    ]
    assert area[0] < 0.5
    assert area[1] > 0.95


def test_modes_cost_nothing_where_there_is_one():
    """On one correlated Gaussian the fit is that of one mode: k is not raised by chance."""
    x = normals(150)
    assert len(fit_statistics(x).means) == 1


def test_few_normals_are_one_mode():
    """Under twelve normals a mode nothing can be said of several."""
    assert choose_modes(modes(2, 20), 0) == 1


def test_server_computes_the_same_distance(monkeypatch):
    """The template repeats `distance` in numpy: equal but for FP32 in and out, several modes included."""
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", types.ModuleType("triton_python_backend_utils"))
    spec = importlib.util.spec_from_file_location("served_model", BACKEND)
    assert spec is not None
    assert spec.loader is not None
    served = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(served)
    statistics = fit_statistics(modes(3, 120))
    model = served.TritonPythonModel()
    for name in ("means", "scale", "directions", "weights", "outer"):
        setattr(model, name, getattr(statistics, name))
    model.fusion = np.array([0.5, 0.1, 4.0, 2.0, 1.5])
    probe = modes(3, 30, seed=3).astype(np.float32)
    maps = np.random.default_rng(0).random((30, 1), dtype=np.float32)
    found, score = model.measure(probe, maps)
    expected = distance(statistics, probe)
    assert found[:, 0] == pytest.approx(expected, rel=1e-6)
    assert score[:, 0] == pytest.approx((maps[:, 0] - 0.5) / 0.1 + 1.5 * (expected - 4) / 2, rel=1e-5, abs=1e-5)


def test_dead_channel_does_not_explode():
    """A channel that never moves on the normals gets a floor, not a division by zero."""
    x = normals()
    x[:, 3] = 0.0
    assert np.isfinite(distance(fit_statistics(x), x + 1e-6)).all()


def test_same_normals_same_statistics():
    """k-means and folds are seeded: two fits are equal bit for bit."""
    first, second = (fit_statistics(modes(3, 120), seed=4) for _ in range(2))
    assert np.array_equal(first.means, second.means)
    assert np.array_equal(first.weights, second.weights)


def test_nan_stays_nan():
    x = normals()
    bad = x[:2].copy()
    bad[1, 0] = np.nan
    assert np.isnan(distance(fit_statistics(x), bad)).tolist() == [False, True]


@pytest.mark.parametrize("bad", [np.zeros((1, 4)), np.full((5, 4), np.nan), np.zeros(4), np.ones((5, 4))])
def test_unusable_normals_are_refused(bad):
    with pytest.raises(DataError, match="normals"):
        fit_statistics(bad)
