"""From the scores of validation normals to the constants of the fused score, suggested limits and the colour scale.

Decides on arrays alone: never sees a picture, a network, an anomaly or the test split. Called by `fit`.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from training.config import CalibrationConfig
from training.errors import DataError

Array = NDArray[np.float64]
QUANTILES = ("0.50", "0.90", "0.95", "0.99", "1.00")
# Under two normals there is no spread; a deviation below this is a constant score.
MIN_DEVIATION = 1e-12


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Fusion(_Part):
    """score = (map - map_mean) / map_std + weight * (mahalanobis - mahalanobis_mean) / mahalanobis_std."""

    map_mean: float
    map_std: float
    mahalanobis_mean: float
    mahalanobis_std: float
    weight: float

    def score(self, map_score: Array, mahalanobis: Array) -> Array:
        """Fused score, same shape as both inputs; never clamped, NaN stays NaN."""
        z_map = (map_score - self.map_mean) / self.map_std
        return z_map + self.weight * (mahalanobis - self.mahalanobis_mean) / self.mahalanobis_std


class Quantiles(_Part):
    """Quantiles of the validation normals, keyed by their level as written, for each score."""

    score: dict[str, float]
    map_score: dict[str, float]
    mahalanobis: dict[str, float]


class Thresholds(_Part):
    """Suggested limits of the fused score: above `ng` reject, above `review` look again; review <= ng."""

    ng: float
    review: float


class HeatMap(_Part):
    """`limit`: map value above which a pixel counts as anomalous; `low` to `high`: the fixed colour scale."""

    limit: float
    low: float
    high: float


class Calibration(_Part):
    """What `images` validation normals say about the scores; written into the manifest as it is."""

    images: int
    fusion: Fusion
    quantiles: Quantiles
    thresholds: Thresholds
    heatmap: HeatMap


@dataclass(frozen=True, slots=True)
class NormalScores:
    """Raw scores of n validation normals: map_score (n,), mahalanobis (n,), anomaly_map (n, h, w)."""

    map_score: Array
    mahalanobis: Array
    anomaly_map: NDArray[np.floating]


def calibrate(normals: NormalScores, config: CalibrationConfig) -> Calibration:
    """Raises DataError for fewer than two normals, scores that are not finite, or scores that do not vary."""
    fusion = _fusion(normals, config.mahalanobis_weight)
    fused = fusion.score(normals.map_score, normals.mahalanobis)
    quantiles = Quantiles(
        score=_quantiles(fused), map_score=_quantiles(normals.map_score), mahalanobis=_quantiles(normals.mahalanobis)
    )
    thresholds = Thresholds(ng=upper_limit(fused, config.ng_sigma), review=_review_limit(fused, config))
    return Calibration(
        images=len(fused), fusion=fusion, quantiles=quantiles, thresholds=thresholds, heatmap=_heat_map(normals, config)
    )


def upper_limit(scores: Array, sigmas: float) -> float:
    """The limit normals should stay below: mean + sigmas x deviation, and never below the largest one seen.

    With n normals no quantile beyond 1 - 1/n can be read off; the spread extrapolates, the maximum guards the tail.
    """
    return max(float(scores.mean() + sigmas * scores.std(ddof=1)), float(scores.max()))


def _review_limit(fused: Array, config: CalibrationConfig) -> float:
    spread = float(fused.mean() + config.review_sigma * fused.std(ddof=1))
    return min(spread, upper_limit(fused, config.ng_sigma))


def _fusion(normals: NormalScores, weight: float) -> Fusion:
    for name, scores in (("map_score", normals.map_score), ("mahalanobis", normals.mahalanobis)):
        if len(scores) < 2 or not np.isfinite(scores).all():
            raise DataError(f"calibration: '{name}' needs at least two finite validation scores, got {len(scores)}")
        if float(scores.std(ddof=1)) < MIN_DEVIATION:
            raise DataError(f"calibration: '{name}' is the same for all validation normals; are they copies of one?")
    return Fusion(
        map_mean=float(normals.map_score.mean()),
        map_std=float(normals.map_score.std(ddof=1)),
        mahalanobis_mean=float(normals.mahalanobis.mean()),
        mahalanobis_std=float(normals.mahalanobis.std(ddof=1)),
        weight=weight,
    )


def _quantiles(scores: Array) -> dict[str, float]:
    return {level: float(np.quantile(scores, float(level))) for level in QUANTILES}


def _heat_map(normals: NormalScores, config: CalibrationConfig) -> HeatMap:
    limit = upper_limit(normals.map_score, config.ng_sigma)
    low = float(np.median(normals.anomaly_map))
    # The limit sits in the middle of the scale, so that a colour means the same on every picture.
    return HeatMap(limit=limit, low=low, high=limit + (limit - low))
