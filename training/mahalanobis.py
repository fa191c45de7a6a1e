"""The distance branch: how far a descriptor lies from the nearest mode of the normals, by a shrunk covariance.

Normals may have several modes (colours, kits, variants): k-means finds them, one covariance is shared by all (the view
of linear discriminant analysis), and k is chosen by the likelihood of held-out normals. Float64 numpy; statistics are
plain arrays, never a pickle. The server repeats `distance` in templates/mahalanobis_model.py from the same arrays.
Called by `fit`, `detector` and `export`.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.covariance import ledoit_wolf_shrinkage

from training.errors import DataError

Array = NDArray[np.float64]
MAX_MODES = 6
FOLDS = 5
# Fewer normals than this a mode say nothing of its mean.
MIN_PER_MODE = 12
# Channels that hardly move on the normals (dead ReLUs) get this share of the median deviation as their own.
DEVIATION_FLOOR = 1e-3
# The share of variance that shrinkage leaves outside the seen directions is never nothing.
MIN_OUTER = 1e-6


@dataclass(frozen=True, slots=True)
class Statistics:
    """What the distance needs: `means` (k, D); `scale` (D,) multiplies a centred descriptor; `directions` (r, D) are
    orthonormal, with `weights` (r,) along them and `outer` on all that lies outside.

    distance^2 = sum(weights * p^2) + outer * |y - p directions|^2 for y = scale * (x - mean), p = directions y.
    """

    means: Array
    scale: Array
    directions: Array
    weights: Array
    outer: float

    @property
    def size(self) -> int:
        """Numbers in a descriptor."""
        return int(self.means.shape[1])


def fit_statistics(descriptors: NDArray[np.floating], seed: int = 0, max_modes: int = MAX_MODES) -> Statistics:
    """Fits (n, D) descriptors of normals, n >= 2. Each channel is scaled to deviation 1 before Ledoit-Wolf shrinks.

    Without the scaling the shrinkage target, a multiple of the identity, would drown the channels of small variance,
    which carry most of the signal (Rippel 2020). Raises DataError for values that are not finite or do not vary.
    """
    values = np.asarray(descriptors, dtype=np.float64)
    if values.ndim != 2 or len(values) < 2 or not np.isfinite(values).all():
        raise DataError(f"descriptors {values.shape}: need at least two finite rows of normals")
    if float(np.median(values.std(axis=0))) == 0.0:
        raise DataError("descriptors: the normals hardly differ from each other; are the pictures copies of one?")
    return _fit_modes(values, choose_modes(values, seed, max_modes), seed)


def choose_modes(values: Array, seed: int, max_modes: int = MAX_MODES) -> int:
    """The number of modes with the best held-out likelihood, the smallest within one standard error of it."""
    most = min(max_modes, len(values) // MIN_PER_MODE)
    if most < 2:
        return 1
    folds = np.random.default_rng(seed).permutation(len(values)) % FOLDS
    gains: list[Array] = []
    for modes in range(1, most + 1):
        found = [_log_likelihood(_fit_modes(values[folds != f], modes, seed), values[folds == f]) for f in range(FOLDS)]
        gains.append(np.concatenate(found))
    means = np.array([gain.mean() for gain in gains])
    best = int(means.argmax())
    # Paired over pictures: what one picture likes in all models does not blur the comparison.
    within = [(gains[best] - gain).mean() <= _standard_error(gains[best] - gain) for gain in gains]
    return within.index(True) + 1


def distance(statistics: Statistics, descriptors: NDArray[np.floating]) -> Array:
    """(n, D) to (n,): Mahalanobis distance to the nearest mode of the normals; NaN stays NaN."""
    return np.asarray(np.sqrt(_squared(statistics, descriptors).min(axis=1)), dtype=np.float64)


def _squared(statistics: Statistics, descriptors: NDArray[np.floating]) -> Array:
    """(n, D) to (n, k): squared distance to each mode."""
    values = np.asarray(descriptors, dtype=np.float64)
    columns: list[Array] = []
    for mean in statistics.means:
        scaled = (values - mean) * statistics.scale
        inner = scaled @ statistics.directions.T
        rest = scaled - inner @ statistics.directions
        columns.append(inner**2 @ statistics.weights + statistics.outer * (rest**2).sum(axis=1))
    return np.stack(columns, axis=1)


def _fit_modes(values: Array, modes: int, seed: int) -> Statistics:
    labels = np.zeros(len(values), dtype=np.intp)
    if modes > 1:
        spread = np.maximum(values.std(axis=0), 1e-12)
        labels = KMeans(modes, n_init=10, random_state=seed).fit_predict((values - values.mean(axis=0)) / spread)
    means = np.stack([values[labels == mode].mean(axis=0) for mode in range(modes)])
    centred = values - means[labels]
    deviation = centred.std(axis=0)
    deviation = np.maximum(deviation, max(DEVIATION_FLOOR * float(np.median(deviation)), 1e-12))
    scaled = centred / deviation
    shrinkage = float(ledoit_wolf_shrinkage(scaled, assume_centered=True))
    variances, directions = _principal(scaled)
    level = max(shrinkage * float(variances.sum()) / scaled.shape[1], MIN_OUTER)
    weights = 1 / ((1 - shrinkage) * variances + level)
    return Statistics(means, 1 / deviation, directions, weights, 1 / level)


def _principal(rows: Array) -> tuple[Array, Array]:
    """Variances (r,) and orthonormal directions (r, D) of centred rows (n, D), through the smaller Gram matrix."""
    wide = len(rows) < rows.shape[1]
    values, vectors = np.linalg.eigh(rows @ rows.T if wide else rows.T @ rows)
    kept = values > 1e-9 * values[-1]
    values, vectors = values[kept], vectors[:, kept]
    directions = (vectors.T @ rows) / np.sqrt(values)[:, None] if wide else vectors.T
    return values / len(rows), directions


def _log_likelihood(statistics: Statistics, values: Array) -> Array:
    """(n,) log density of each row under equal modes with the tied covariance, up to a constant of D."""
    rank = len(statistics.weights)
    log_det = -np.log(statistics.weights).sum() - (statistics.size - rank) * np.log(statistics.outer)
    log_det -= 2 * np.log(statistics.scale).sum()
    exponents = -0.5 * _squared(statistics, values)
    highest = exponents.max(axis=1)
    total = np.exp(exponents - highest[:, None]).sum(axis=1) / len(statistics.means)
    return np.asarray(highest + np.log(total) - 0.5 * log_det, dtype=np.float64)


def _standard_error(values: Array) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values)))
