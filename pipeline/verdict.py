"""The decision: scores and a threshold become a verdict with its reason. No clock, no client, no state.

The only place where a score meets a limit. NaN compares false with everything, so a score that is not finite is refused
before it meets one.
"""

from __future__ import annotations

import math

import cv2
import numpy as np

from pipeline.manifest import Calibration
from pipeline.region import box_in_picture
from pipeline.types import AnomalyMap, Cause, Inference, Judgement, Region, Scores, Threshold, Verdict, View

MAX_REGIONS = 8


def decide(inference: Inference, threshold: Threshold | None, calibration: Calibration | None) -> Verdict:
    """Judge one frame. `calibration` is None for a product that this worker has not loaded.

    Reasons are codes: for UNINSPECTED its cause; for NG and REVIEW the limit that was met and the branch that says
    more (`anomaly_map`: something looks wrong in one place; `global_statistics`: the whole is not as it should be).
    """
    cause = inference.cause or inference.frame.cause
    if calibration is None:
        return Verdict(Judgement.UNINSPECTED, ((cause or Cause.PRODUCT_NOT_READY).value,), threshold)
    if cause is None and threshold is None:
        cause = Cause.THRESHOLD_MISSING
    scores = inference.scores
    if cause is None and (scores is None or not finite(scores)):
        cause = Cause.SCORE_NOT_FINITE
    if cause is not None or scores is None or threshold is None:
        return Verdict(Judgement.UNINSPECTED, ((cause or Cause.SCORE_NOT_FINITE).value,), threshold)
    judgement = judge(scores.fused, threshold.ng, threshold.review)
    if judgement is Judgement.OK:
        return Verdict(judgement, (), threshold)
    return Verdict(judgement, (f"score_above_{judgement.value.lower()}", _branch(scores, calibration)), threshold)


def judge(score: float, ng: float, review: float) -> Judgement:
    """Compare a fused score, which must be finite, with limits."""
    if score >= ng:
        return Judgement.NG
    return Judgement.REVIEW if score >= review else Judgement.OK


def regions(anomaly_map: AnomalyMap, limit: float, view: View | None = None) -> tuple[Region, ...]:
    """Find the connected areas of an (h, w) map above `limit`, strongest first, at most `MAX_REGIONS`.

    `view` says which part of the camera's picture the map covers; None is all of it.
    """
    height, width = anomaly_map.shape
    above = ((anomaly_map > limit) & np.isfinite(anomaly_map)).astype(np.uint8)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(above, connectivity=8)
    found = [
        Region(
            (round(x / width, 4), round(y / height, 4), round(w / width, 4), round(h / height, 4)),
            float(anomaly_map[labels == label].max()),
        )
        for label, (x, y, w, h, _) in zip(range(1, count), stats[1:].tolist(), strict=True)
    ]
    strongest = sorted(found, key=lambda region: -region.peak)[:MAX_REGIONS]
    if view is not None:
        strongest = [Region(box_in_picture(region.bbox, view), region.peak) for region in strongest]
    return tuple(strongest)


def finite(scores: Scores) -> bool:
    """Whether scores are numbers that a limit can be compared with."""
    return all(math.isfinite(value) for value in (scores.fused, scores.map, scores.mahalanobis))


def _branch(scores: Scores, calibration: Calibration) -> str:
    fusion = calibration.fusion
    z_map = (scores.map - fusion.map_mean) / fusion.map_std
    z_global = fusion.weight * (scores.mahalanobis - fusion.mahalanobis_mean) / fusion.mahalanobis_std
    return "anomaly_map" if z_map >= z_global else "global_statistics"
