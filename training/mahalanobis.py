"""The distance branch: how far a picture's descriptor lies from the normals, by a shrunk covariance.

Float64 numpy throughout; statistics are plain arrays, never a pickle. The server repeats `distance` in
models_repo/*.mahalanobis/1/model.py from the same file. Called by `fit`, `detector` and `export`.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve_triangular
from sklearn.covariance import LedoitWolf

from training.errors import DataError

Array = NDArray[np.float64]
# Channels that hardly move on the normals (dead ReLUs) get this share of the median deviation as their own.
DEVIATION_FLOOR = 1e-3


@dataclass(frozen=True, slots=True)
class Statistics:
    """Mean (D,) and lower-triangular whitening (D, D) of the training normals: distance = |whitening (x - mean)|."""

    mean: Array
    whitening: Array


def fit_statistics(descriptors: NDArray[np.floating]) -> Statistics:
    """Fits (n, D) descriptors of normals, n >= 2. Each channel is scaled to deviation 1 before Ledoit-Wolf shrinks.

    Without the scaling the shrinkage target, a multiple of the identity, would drown the channels of small variance,
    which carry most of the signal (Rippel 2020).
    """
    values = np.asarray(descriptors, dtype=np.float64)
    if values.ndim != 2 or len(values) < 2 or not np.isfinite(values).all():
        raise DataError(f"descriptors {values.shape}: need at least two finite rows of normals")
    mean, deviation = values.mean(axis=0), values.std(axis=0)
    floor = DEVIATION_FLOOR * float(np.median(deviation))
    if floor == 0.0:
        raise DataError("descriptors: the normals hardly differ from each other; are the pictures copies of one?")
    deviation = np.maximum(deviation, floor)
    covariance = LedoitWolf(assume_centered=True).fit((values - mean) / deviation).covariance_
    lower = np.linalg.cholesky(covariance)
    whitening = solve_triangular(lower, np.diag(1.0 / deviation), lower=True)
    return Statistics(mean, np.tril(whitening))


def distance(statistics: Statistics, descriptors: NDArray[np.floating]) -> Array:
    """(n, D) to (n,): Mahalanobis distance to the mean of the normals; NaN stays NaN."""
    centred = np.asarray(descriptors, dtype=np.float64) - statistics.mean
    return np.asarray(np.linalg.norm(centred @ statistics.whitening.T, axis=1), dtype=np.float64)
