"""Suggested limits, what they do, and their uncertainty: against exact values, and against simulated lines."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import tuning
from pipeline.errors import ConfigError
from pipeline.manifest import Calibration
from pipeline.tuning import Limits, clopper_pearson, flips, from_normals, from_reviewed, read_reviewed, suggest
from pipeline.types import Judgement

SHA = "ab" * 32


@pytest.mark.parametrize(
    ("count", "of", "low", "high"),
    [
        (0, 1, 0.0, 0.975),
        (1, 1, 0.025, 1.0),
        (0, 60, 0.0, 0.0596294923),
        (1, 60, 0.0004218745, 0.0893990501),
        (3, 100, 0.0062299715, 0.0851760530),
        (37, 1000, 0.0261827088, 0.0506411231),
        (500, 100_000, 0.0045722442, 0.0054568412),
    ],
)
def test_the_interval_is_clopper_and_pearsons(count, of, low, high):
    """To ten digits what quantiles of the beta distribution give (scipy 1.17)."""
    assert clopper_pearson(count, of) == pytest.approx((low, high), abs=1e-9)


def test_the_interval_of_a_chosen_limit_holds_as_often_as_it_says():
    """Limits laid on the sample itself: in 95 % of 400 samples or more the true rate of false alarms is inside.

    The scores are log-normal, which no part of the method knows.
    """
    rng = np.random.default_rng(7)
    held = 0
    for _ in range(400):
        scores = rng.lognormal(0.0, 0.7, 150)
        limits = suggest([(True, score) for score in scores.tolist()], ng_rate=0.02, review_rate=0.1)
        forecast = from_reviewed([(True, score) for score in scores.tolist()], limits)
        true = 0.5 * math.erfc(math.log(limits.ng) / 0.7 / math.sqrt(2))
        held += forecast.false_alarms.low <= true <= forecast.false_alarms.high
    assert held >= 0.94 * 400


@given(
    st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60),
    st.lists(st.floats(-1e6, 1e6), max_size=20),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_a_suggestion_keeps_to_its_rates(good, bad, one, other):
    """Over all scores: no more good parts than asked for reach a limit, review is not above NG, both are finite."""
    ng_rate, review_rate = sorted((one, other))
    parts = [(True, score) for score in good] + [(False, score) for score in bad]
    limits = suggest(parts, ng_rate=ng_rate, review_rate=review_rate)
    assert limits.review <= limits.ng
    assert math.isfinite(limits.ng)
    assert sum(score >= limits.ng for score in good) <= ng_rate * len(good) + 1e-6
    assert sum(score >= limits.review for score in good) <= review_rate * len(good) + 1e-6


def test_the_limits_lie_as_low_as_they_may():
    """With 2 of 100 good parts allowed, the limit is half way between the third and the second highest."""
    parts = [(True, float(score)) for score in range(100)]
    assert suggest(parts, ng_rate=0.02, review_rate=0.05) == Limits(97.5, 94.5)
    assert suggest(parts, ng_rate=0.0, review_rate=0.0).ng == pytest.approx(99.0, abs=3e-4)
    assert suggest(parts, ng_rate=0.0, review_rate=0.0).ng > 99.0


def test_a_forecast_counts_what_the_limits_do():
    """Good and bad parts by what the limits make of them."""
    parts = [(True, 1.0), (True, 2.5), (True, 4.0), (True, 0.5), (False, 1.0), (False, 3.0), (False, 9.0)]
    told = from_reviewed(parts, Limits(ng=3.0, review=2.0))
    counts = {name: (getattr(told, name).count, getattr(told, name).of) for name in told.__dataclass_fields__}
    assert counts == {"false_alarms": (1, 4), "needless_reviews": (1, 4), "misses": (1, 3), "bad_in_review": (0, 3)}
    assert told.misses.expected == pytest.approx(1.5 / 4)
    assert from_reviewed(parts[:4], Limits(3.0, 2.0)).misses is None


@pytest.fixture(scope="session")
def calibration(manifest_document):
    """Make the calibration of n normals with these scores, its limits at these."""

    def make(scores, ng, review, levels=("0.50", "0.90", "0.95", "0.99", "1.00")):
        document = manifest_document()["calibration"] | {
            "images": len(scores),
            "quantiles": {"score": {level: float(np.quantile(scores, float(level))) for level in levels}},
            "thresholds": {"ng": ng, "review": review},
        }
        return Calibration.model_validate_json(json.dumps(document))

    return make


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=80), st.floats(-120, 120))
def test_quantiles_bound_the_count_of_normals(calibration, scores, limit):
    """Over all scores and limits: the number of normals above a limit lies in the range read from the quantiles."""
    quantiles = calibration(scores, limit, limit).quantiles.score
    fewest, most = tuning._reaching(limit, quantiles, len(scores))
    assert 0 <= fewest <= sum(score > limit for score in scores) <= most <= len(scores)


def test_normals_below_the_limit_still_leave_a_rate(calibration):
    """60 normals, none above: up to 6 % of good parts may be rejected, and the expectation is not nothing."""
    scores = np.arange(60.0)
    told = from_normals(calibration(scores, 59.0, 56.05))
    assert (told.false_alarms.count, told.false_alarms.of) == (0, 60)
    assert told.false_alarms.high == pytest.approx(0.0596294923)
    assert told.false_alarms.expected == pytest.approx(0.5 / 61)
    assert told.needless_reviews.count == 3
    assert told.misses is None


def test_an_old_manifest_gives_no_forecast(make_manifest):
    """Exports without counts and quantiles are read, and tell nothing of rates."""
    assert from_normals(make_manifest().calibration) is None


def view(score, verdict="OK", *, camera="c1", sha=SHA, product="tray", required=True):
    return {
        "cameraId": camera,
        "scores": None if score is None else {"fused": score, "map": 1.0, "mahalanobis": 1.0},
        "productId": product,
        "verdict": verdict,
        "required": required,
        "model": {"name": product, "version": "1", "sha256": sha},
    }


def event(part, *views, missing=()):
    data = {"partId": part, "station": "s1", "productId": "tray", "views": list(views), "missingViews": list(missing)}
    return {"attributes": {"id": part, "time": "2026-11-25T00:00:00.000Z"}, "data": data}


def test_parts_flip_as_the_line_would_judge_them():
    """Views are fused as the line does: the worst decides, what was not inspected stays so, another model's stays."""
    lost = {"cameraId": "c3", "required": True, "cause": "camera_lost"}
    events = [
        event("ok-to-ng", view(3.5)),
        event("ng-stays", view(9.0, "NG")),
        event("other-view-decides", view(3.5), view(9.0, "NG", camera="c2")),
        event("uninspected-to-ng", view(3.5), missing=[lost]),
        event("optional-view-lost", view(3.5), view(None, "UNINSPECTED", camera="c2", required=False)),
        event("other-product-view-stays", view(1.0), view(3.5, "REVIEW", camera="c2", product="side")),
        event("other-model", view(3.5, sha="0" * 64)),
        event("not-inspected", view(None, "UNINSPECTED")),
        event("to-review", view(2.5)),
    ]
    found, ways, incomparable = flips(events, "tray", SHA, Limits(4.0, 4.0), Limits(3.0, 2.0))
    assert {flip.part_id: (flip.before, flip.after) for flip in found} == {
        "ok-to-ng": (Judgement.OK, Judgement.NG),
        "uninspected-to-ng": (Judgement.UNINSPECTED, Judgement.NG),
        "optional-view-lost": (Judgement.OK, Judgement.NG),
        "to-review": (Judgement.OK, Judgement.REVIEW),
    }
    assert ways == {"OK>NG": 2, "NG>NG": 2, "UNINSPECTED>NG": 1, "REVIEW>REVIEW": 1, "OK>REVIEW": 1}
    assert incomparable == 2


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"views": None},
        {"views": [None, 5, {}, {"verdict": "MAYBE"}, {"verdict": "OK", "scores": [1]}]},
        {"views": [view("high")], "missingViews": []},
        {"views": [view(math.nan)]},
        {"views": [view(1.0)], "missingViews": None},
        {"views": [view(1.0)], "missingViews": [None]},
    ],
)
def test_a_foreign_record_is_no_part_to_compare(data):
    """Whatever somebody else puts on the topic is counted or ignored, and never ends the look at the others."""
    foreign = {"attributes": {}, "data": data}
    found, ways, incomparable = flips([foreign, event("p", view(3.5))], "tray", SHA, Limits(4, 4), Limits(3, 3))
    assert [flip.part_id for flip in found][-1] == "p"
    assert sum(ways.values()) + incomparable == 2
    assert "p" in tuning.part_scores([foreign, event("p", view(3.5))], "tray", SHA)


def test_the_score_of_a_part_is_that_of_its_worst_view_at_its_last_inspection():
    """Of several views the highest, of several inspections the last; parts without a score are left out."""
    events = [
        event("a", view(1.0), view(2.0, camera="c2")),
        event("b", view(None, "UNINSPECTED")),
        event("a", view(0.5)),
    ]
    assert tuning.part_scores(events, "tray", SHA) == {"a": 0.5}


@pytest.mark.parametrize(
    "text",
    [
        "partId,truth,score\n0017,good,1.5\nx,NG,\n",
        "﻿partId;truth;score\r\n0017;OK;1.5\r\nx;bad;\r\n",
        '{"partId": "0017", "truth": "good", "score": 1.5}\n\n{"partId": "x", "truth": "bad"}\n',
    ],
    ids=["csv", "excel", "json"],
)
def test_reviewed_parts_are_read(text):
    """CSV, the CSV of a spreadsheet, and JSON lines say the same."""
    first, second = read_reviewed(text, "file")
    assert (first.part_id, first.good, first.score) == ("0017", True, 1.5)
    assert (second.part_id, second.good, second.score) == ("x", False, None)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "no columns"),
        ("partId,truth\n", "no parts"),
        ("part,truth\na,good\n", "no columns"),
        ("partId,truth\na,maybe\n", "line 2: truth 'maybe'"),
        ("partId,truth\n,good\n", "line 2: no partId"),
        ("partId,truth,score\na,good,nan\n", "line 2: score 'nan'"),
        ("partId,truth,score\na,good,high\n", "line 2: score 'high'"),
        ("partId,truth\na,good\na,bad\n", "line 3: part 'a' stands in line 2"),
        ('{"partId": "a", "truth": "good"}\n{broken', "line 2: no JSON object"),
        ('{"partId": "a", "truth": "good"}\n[1]', "line 2: no JSON object"),
        ("{" + "[" * 100_000, "line 1: no JSON object"),
    ],
)
def test_a_wrong_list_of_parts_names_its_line(text, told):
    """What cannot be read is a ConfigError with the place."""
    with pytest.raises(ConfigError, match=told.replace("(", r"\(")):
        read_reviewed(text, "file")


def test_doubts_are_told(make_manifest):
    """Only alarms reviewed, too few parts for the rate asked for, no bad part: each is said; a sound one has none."""
    manifest = make_manifest()
    told = " ".join(tuning.doubts([(True, 5.0)] * 10, manifest, 0.01))
    assert "only alarms were reviewed" in told
    assert "too few to show a rate of 0.01: 368 without" in told
    assert "no bad part" in told
    sound = [(True, 0.1)] * 400 + [(False, 9.0)]
    assert tuning.doubts(sound, manifest, 0.01) == []


def test_no_good_part_is_no_suggestion():
    """Limits are laid by good parts: without one there is nothing to lay them by."""
    with pytest.raises(ConfigError, match="no good part"):
        suggest([(False, 5.0)], ng_rate=0.01, review_rate=0.05)
