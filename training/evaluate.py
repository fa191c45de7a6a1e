"""Scores a test split or a folder of pictures with an exported model or a bundle.

Reports; picks nothing. Called by `cli` and, for the bundle's own report, after `fit`.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pydantic import BaseModel

from training.data import LocoFolder, load_at_model_size
from training.detector import Detector
from training.metrics import ImageMetrics, image_metrics

# Pictures held in memory at a time.
CHUNK = 32


class ScoreRecord(BaseModel):
    """The scores of one picture file; `kind` is its test folder, or None outside a test split."""

    file: str
    kind: str | None
    score: float
    map_score: float
    mahalanobis: float


def score_files(detector: Detector, files: Sequence[Path], kind: str | None = None) -> list[ScoreRecord]:
    """Scores picture files in order; raises DataError that names the first one that cannot be read."""
    records: list[ScoreRecord] = []
    for start in range(0, len(files), CHUNK):
        chunk = files[start : start + CHUNK]
        scores = detector.score(load_at_model_size(chunk, detector.description.image_size))
        columns = zip(chunk, scores.score, scores.map_score, scores.mahalanobis, strict=True)
        records += [ScoreRecord(file=str(f), kind=kind, score=s, map_score=m, mahalanobis=d) for f, s, m, d in columns]
    return records


def evaluate(detector: Detector, data: LocoFolder) -> tuple[ImageMetrics, list[ScoreRecord]]:
    """Scores the whole test split of a LOCO folder."""
    records = [record for kind, files in data.test.items() for record in score_files(detector, files, kind)]
    return metrics_of(records, "score"), records


def metrics_of(records: Sequence[ScoreRecord], column: str) -> ImageMetrics:
    """AUROC of one score column: 'score', 'map_score' or 'mahalanobis'."""
    kinds = ("good", "logical", "structural")
    return image_metrics({k: np.array([getattr(r, column) for r in records if r.kind == k]) for k in kinds})
