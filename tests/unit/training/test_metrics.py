"""Image AUROC against scikit-learn."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from training.metrics import auroc, image_metrics


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
