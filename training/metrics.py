"""Image-level measures of a test split, from scores alone, and the report that all measures of a split go into.

Never picks a threshold and never sees a picture. Called by `evaluate`.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from scipy.stats import rankdata

from training.errors import DataError

# Enough for the second digit of an interval; the seed makes a report reproducible.
RESAMPLES, BOOTSTRAP_SEED = 2000, 111
CONFIDENCE = 0.95

Interval = tuple[float, float]
ANOMALIES = ("logical", "structural")


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ImageAuroc(_Part):
    """Good against logical, good against structural, the mean of both (LOCO's headline), and all in one pool.

    A kind that the test split does not have is None, and so is the mean then; pooled is always there.
    """

    logical: float | None
    structural: float | None
    mean: float | None
    pooled: float


class AurocIntervals(_Part):
    """95 % bootstrap intervals (low, high) of the same four figures; None where the figure is.

    Good, logical and structural pictures are resampled each among themselves. An interval says what another draw of
    test pictures would change, not another training run; around a perfect separation it has no width.
    """

    logical: Interval | None
    structural: Interval | None
    mean: Interval | None
    pooled: Interval


class TestImages(_Part):
    """How many test pictures of each kind the figures rest on."""

    good: int
    logical: int
    structural: int


class ImageMetrics(_Part):
    """The image-level report that goes into bundle.json and manifest.json; older ones lack the intervals."""

    image_auroc: ImageAuroc
    test_images: TestImages
    intervals: AurocIntervals | None = None


class AuSpro(_Part):
    """AU-sPRO by limit of the false positive rate ('0.01', '0.05', '0.1', '0.3', '1'), each kind against all good ones.

    LOCO's headline is `mean` at 0.05. A kind is None where the split does not have it, or no pixel free of defects.
    """

    logical: dict[str, float] | None
    structural: dict[str, float] | None
    mean: dict[str, float] | None


class DefectMetrics(_Part):
    """One defect type against all good pictures; a picture with several types counts in each.

    `au_spro` is None where there are no masks; its false positives are those of the good pictures and of the pictures
    that show the type, as in the official per-type evaluation.
    """

    defect: str
    images: int
    channels: int
    image_auroc: float
    au_spro: dict[str, float] | None


class TestReport(_Part):
    """All that one evaluation of one model on one test split found: what report.json holds.

    `image` is of the fused score; `branches` of 'map_score' and 'mahalanobis' alone. `au_spro` is None where the data
    have no masks. `test_sha256` is the hash of the test pictures and masks, `data_sha256` of what the model was
    fitted on.
    """

    schema_version: int = 1
    product: str
    method: str
    layout: str
    data_sha256: str
    test_sha256: str
    image: ImageMetrics
    branches: dict[str, ImageAuroc]
    au_spro: AuSpro | None
    defects: tuple[DefectMetrics, ...]


def auroc(good: NDArray[np.float64], bad: NDArray[np.float64]) -> float:
    """Probability that a bad score lies above a good one, ties counted half; NaN in, NaN out."""
    ranks = rankdata(np.concatenate([good, bad]))
    wins = ranks[len(good) :].sum() - len(bad) * (len(bad) + 1) / 2
    return float(wins / (len(good) * len(bad)))


def image_metrics(scores: Mapping[str, NDArray[np.float64]]) -> ImageMetrics:
    """`scores` holds the fused scores (n,) under 'good', 'logical' and 'structural'; a missing kind may be empty.

    Raises DataError where there are no good ones, no anomalies at all, or a score is NaN.
    """
    return ImageMetrics(
        image_auroc=image_auroc(scores),
        test_images=TestImages(**{kind: len(scores.get(kind, ())) for kind in ("good", *ANOMALIES)}),
        intervals=auroc_intervals(scores),
    )


def image_auroc(scores: Mapping[str, NDArray[np.float64]]) -> ImageAuroc:
    """As `image_metrics`, the figures alone."""
    good, bad = _kinds(scores)
    split = {kind: auroc(good, values) for kind, values in bad.items()}
    pooled = auroc(good, np.concatenate(list(bad.values())))
    logical, structural = (split.get(kind) for kind in ANOMALIES)
    mean = None if logical is None or structural is None else (logical + structural) / 2
    return ImageAuroc(logical=logical, structural=structural, mean=mean, pooled=pooled)


def auroc_intervals(
    scores: Mapping[str, NDArray[np.float64]], resamples: int = RESAMPLES, seed: int = BOOTSTRAP_SEED
) -> AurocIntervals:
    """Percentile bootstrap (Efron 1979), stratified by kind, seeded; errors as `image_metrics`."""
    good, bad = _kinds(scores)
    generator = np.random.default_rng(seed)
    # Ranks are taken once; a resample is then a count at every rank, which is fast and exact with ties.
    levels, ranks = np.unique(np.concatenate([good, *bad.values()]), return_inverse=True)
    strata = np.split(ranks, np.cumsum([len(good), *(len(values) for values in bad.values())])[:-1])
    draws: dict[str, list[float]] = {kind: [] for kind in (*bad, "pooled", "mean")}
    for _ in range(resamples):
        counts = [np.bincount(generator.choice(s, len(s)), minlength=len(levels)) for s in strata]
        below = np.cumsum(counts[0]) - counts[0] / 2
        wins = [float(below @ count) / len(good) for count in counts[1:]]
        split = [won / len(values) for won, values in zip(wins, bad.values(), strict=True)]
        for kind, value in zip(bad, split, strict=True):
            draws[kind].append(value)
        draws["pooled"].append(sum(wins) / sum(len(values) for values in bad.values()))
        draws["mean"].append(sum(split) / len(split))
    found = {kind: _interval(values) for kind, values in draws.items()}
    both = len(bad) == len(ANOMALIES)
    return AurocIntervals(
        logical=found.get("logical"),
        structural=found.get("structural"),
        mean=found["mean"] if both else None,
        pooled=found["pooled"],
    )


def _interval(draws: list[float]) -> Interval:
    low, high = np.quantile(draws, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def _kinds(scores: Mapping[str, NDArray[np.float64]]) -> tuple[NDArray[np.float64], dict[str, NDArray[np.float64]]]:
    good = scores.get("good", np.empty(0))
    bad = {kind: scores[kind] for kind in ANOMALIES if len(scores.get(kind, ()))}
    if len(good) == 0 or not bad:
        raise DataError("metrics: AUROC needs scores of good pictures and of anomalies; is the test split whole?")
    if any(np.isnan(values).any() for values in (good, *bad.values())):
        raise DataError("metrics: a score is NaN; are the model's weights finite?")
    return good, bad
