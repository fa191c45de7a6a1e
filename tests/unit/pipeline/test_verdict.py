"""The decision: scores, limits, and what may never pass."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.types import Cause, Inference, Judgement, Scores, Threshold, ThresholdSource
from pipeline.verdict import MAX_REGIONS, decide, regions

LIMITS = Threshold(ng=3.0, review=2.0, version=7, source=ThresholdSource.REDIS)


@pytest.mark.parametrize(
    ("fused", "judgement", "reasons"),
    [
        (1.999, Judgement.OK, ()),
        (2.0, Judgement.REVIEW, ("score_above_review", "anomaly_map")),
        (2.999, Judgement.REVIEW, ("score_above_review", "anomaly_map")),
        (3.0, Judgement.NG, ("score_above_ng", "anomaly_map")),
        (1e30, Judgement.NG, ("score_above_ng", "anomaly_map")),
        (-1e30, Judgement.OK, ()),
    ],
)
def test_a_limit_belongs_to_what_it_limits(make_frame, make_manifest, fused, judgement, reasons):
    """A score on a limit is past it: `review` is REVIEW, `ng` is NG."""
    inference = Inference(make_frame(), scores=Scores(fused, map=2.0, mahalanobis=10.0))
    verdict = decide(inference, LIMITS, make_manifest().calibration)
    assert (verdict.judgement, verdict.reasons, verdict.threshold) == (judgement, reasons, LIMITS)


def test_a_limit_of_zero_is_a_limit(make_frame, make_manifest):
    """Zero is a number: a threshold of 0.0 judges, and a score of 0.0 meets it."""
    zero = Threshold(0.0, 0.0, 1, ThresholdSource.REDIS)
    inference = Inference(make_frame(), scores=Scores(0.0, 0.0, 0.0))
    assert decide(inference, zero, make_manifest().calibration).judgement is Judgement.NG


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", ["fused", "map", "mahalanobis"])
def test_a_score_that_is_not_finite_is_never_ok(make_frame, make_manifest, which, bad):
    """One score that is not finite makes the part UNINSPECTED, whatever the others say."""
    scores = {"fused": 0.0, "map": 0.0, "mahalanobis": 0.0} | {which: bad}
    verdict = decide(Inference(make_frame(), scores=Scores(**scores)), LIMITS, make_manifest().calibration)
    assert (verdict.judgement, verdict.reasons) == (Judgement.UNINSPECTED, ("score_not_finite",))


def test_no_threshold_is_never_ok(make_frame, make_manifest):
    """Without limits nothing can be judged, and the reason says so."""
    verdict = decide(Inference(make_frame(), scores=Scores(0.0, 0.0, 0.0)), None, make_manifest().calibration)
    assert (verdict.judgement, verdict.reasons) == (Judgement.UNINSPECTED, ("threshold_missing",))


@pytest.mark.parametrize("cause", list(Cause))
def test_a_cause_is_the_reason(make_frame, make_manifest, cause):
    """What stopped a frame on its way is its reason, also when scores or limits are missing."""
    for inference in (Inference(make_frame(), cause=cause), Inference(make_frame(image=None, cause=cause))):
        verdict = decide(inference, None, make_manifest().calibration)
        assert (verdict.judgement, verdict.reasons) == (Judgement.UNINSPECTED, (cause.value,))


def test_the_reason_names_the_branch_that_says_more(make_frame, make_manifest):
    """The branch further from its normals, in deviations, is the one named."""
    calibration = make_manifest().calibration  # map 1.0 ± 0.5, distance 10 ± 2

    def branch(map_score, distance):
        scores = Scores(9.0, map_score, distance)
        return decide(Inference(make_frame(), scores=scores), LIMITS, calibration).reasons[1]

    assert branch(2.0, 11.0) == "anomaly_map"
    assert branch(1.5, 20.0) == "global_statistics"


@given(st.builds(Scores, *[st.floats()] * 3))
def test_only_a_finite_low_score_is_ok(make_frame, make_manifest, scores):
    """Over all floats: OK means every score is finite and the fused one lies below `review`."""
    verdict = decide(Inference(make_frame(), scores=scores), LIMITS, make_manifest().calibration)
    finite = all(map(math.isfinite, (scores.fused, scores.map, scores.mahalanobis)))
    assert (verdict.judgement is Judgement.OK) == (finite and scores.fused < LIMITS.review)


def test_regions_are_fractions_of_the_picture_strongest_first():
    """A connected area above the limit becomes one region with its peak; a corner touch connects."""
    anomaly_map = np.zeros((8, 16), np.float32)
    anomaly_map[0, 0], anomaly_map[1, 1] = 2.0, 3.0
    anomaly_map[6:8, 12:16] = 5.0
    anomaly_map[4, 4] = 1.0  # on the limit, not above it
    first, second = regions(anomaly_map, 1.0)
    assert (first.bbox, first.peak) == ((0.75, 0.75, 0.25, 0.25), 5.0)
    assert (second.bbox, second.peak) == ((0.0, 0.0, 0.125, 0.25), 3.0)


def test_regions_are_few():
    """A map full of specks gives no more than `MAX_REGIONS`, and a quiet one gives none."""
    anomaly_map = np.zeros((64, 64), np.float32)
    assert regions(anomaly_map, 0.5) == ()
    anomaly_map[::4, ::4] = 1.0
    assert len(regions(anomaly_map, 0.5)) == MAX_REGIONS


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_the_peak_of_a_region_is_a_number(bad):
    """A map with a value that is not finite marks no area whose peak would not fit into an event."""
    anomaly_map = np.zeros((8, 8), np.float32)
    anomaly_map[2, 2] = bad
    assert all(math.isfinite(region.peak) for region in regions(anomaly_map, 1.0))
