"""Image-level measures of a test split, from scores alone.

Never picks a threshold and never sees a picture. Called by `evaluate`.
"""

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from scipy.stats import rankdata


class ImageAuroc(BaseModel):
    """Good against logical, good against structural, the mean of both (LOCO's headline), and all in one pool."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    logical: float
    structural: float
    mean: float
    pooled: float


class TestImages(BaseModel):
    """How many test pictures of each kind the figures rest on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    good: int
    logical: int
    structural: int


class ImageMetrics(BaseModel):
    """The image-level report that goes into bundle.json and manifest.json."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    image_auroc: ImageAuroc
    test_images: TestImages


def auroc(good: NDArray[np.float64], bad: NDArray[np.float64]) -> float:
    """Probability that a bad score lies above a good one, ties counted half; NaN in, NaN out."""
    ranks = rankdata(np.concatenate([good, bad]))
    wins = ranks[len(good) :].sum() - len(bad) * (len(bad) + 1) / 2
    return float(wins / (len(good) * len(bad)))


def image_metrics(scores: dict[str, NDArray[np.float64]]) -> ImageMetrics:
    """`scores` holds the fused scores under 'good', 'logical' and 'structural', none of them empty."""
    good, logical, structural = scores["good"], scores["logical"], scores["structural"]
    split = (auroc(good, logical), auroc(good, structural))
    pooled = auroc(good, np.concatenate([logical, structural]))
    return ImageMetrics(
        image_auroc=ImageAuroc(logical=split[0], structural=split[1], mean=sum(split) / 2, pooled=pooled),
        test_images=TestImages(good=len(good), logical=len(logical), structural=len(structural)),
    )
