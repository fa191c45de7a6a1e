"""How views make a part's verdict: the worst one decides, and what was not seen is never OK."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pipeline.fusion import fuse, unstored
from pipeline.types import Cause, Judgement, MissingView, Verdict

REASONS = {
    Judgement.OK: (),
    Judgement.NG: ("score_above_ng", "anomaly_map"),
    Judgement.REVIEW: ("score_above_review", "global_statistics"),
    Judgement.UNINSPECTED: ("frame_corrupt",),
}


@pytest.fixture(scope="session")
def views(make_view):
    """Give views of cameras c1, c2, ... that say this."""
    return lambda *said: [
        replace(make_view({"camera_id": f"c{n}"}), verdict=Verdict(judgement, REASONS[judgement]))
        for n, judgement in enumerate(said, start=1)
    ]


def absent(camera="c9", *, required=True, cause=Cause.DEADLINE):
    return MissingView(camera, required, cause)


@pytest.mark.parametrize("said", list(itertools.combinations_with_replacement(Judgement, 3)))
def test_the_worst_view_decides(views, said):
    """NG before UNINSPECTED before REVIEW before OK, with the reasons of the views that decided, each once."""
    worst = next(kind for kind in ("NG", "UNINSPECTED", "REVIEW", "OK") if kind in said)
    assert fuse(views(*said), [], ()) == (worst, REASONS[Judgement(worst)])


@pytest.mark.parametrize("said", [Judgement.OK, Judgement.REVIEW])
def test_a_required_view_that_is_missing_makes_the_part_uninspected(views, said):
    """Whatever else was seen, and the cause is that of the missing view."""
    assert fuse(views(said), [absent(cause=Cause.CAMERA_LOST)], ()) == ("UNINSPECTED", ("camera_lost",))


def test_an_ng_stands_whatever_is_missing(views):
    """The part is bad, whatever the rest would have shown; an optional view may say so as well."""
    assert fuse(views(Judgement.NG), [absent()], ())[0] == "NG"
    assert fuse(views(Judgement.OK, Judgement.NG), [], {"c2"})[0] == "NG"


def test_an_optional_view_may_be_missing_or_unseen(views):
    """The required ones decide; a REVIEW of an optional view counts."""
    assert fuse(views(Judgement.OK), [absent(required=False)], {"c9"}) == ("OK", ())
    assert fuse(views(Judgement.OK, Judgement.UNINSPECTED), [], {"c2"}) == ("OK", ())
    assert fuse(views(Judgement.OK, Judgement.REVIEW), [], {"c2"})[0] == "REVIEW"


@given(
    seen=st.lists(st.tuples(st.sampled_from(Judgement), st.booleans()), max_size=5),
    unseen=st.lists(st.tuples(st.sampled_from(Cause), st.booleans()), max_size=3),
)
def test_ok_needs_every_required_view(views, seen, unseen):
    """Over all parts: OK only if a view was seen, all required ones are there and OK, and none says NG or REVIEW."""
    assume(seen or unseen)  # a part has views
    optional = {f"c{n}" for n, (_, required) in enumerate(seen, start=1) if not required}
    missing = [absent(f"m{n}", required=required, cause=cause) for n, (cause, required) in enumerate(unseen)]
    judgement, reasons = fuse(views(*(said for said, _ in seen)), missing, optional)
    said = [kind for kind, _ in seen]
    clean = all(kind is Judgement.OK or (kind is Judgement.UNINSPECTED and not needed) for kind, needed in seen)
    is_ok = clean and Judgement.OK in said and not any(required for _, required in unseen)
    assert (judgement is Judgement.OK) is is_ok
    assert (judgement is Judgement.NG) is (Judgement.NG in said)
    assert bool(reasons) is not is_ok


def test_a_part_of_which_nothing_was_seen_is_never_ok(views):
    """Also when no view is required."""
    assert fuse([], [absent(required=False)], {"c9"}) == ("UNINSPECTED", ("deadline",))
    unseen = fuse(views(Judgement.UNINSPECTED), [absent(required=False)], {"c1", "c9"})
    assert unseen == ("UNINSPECTED", ("frame_corrupt", "deadline"))


@pytest.mark.parametrize("said", list(itertools.combinations_with_replacement(Judgement, 2)))
def test_a_verdict_that_was_not_stored_lets_no_part_pass(make_part, views, said):
    """No view and no part stays OK or REVIEW; an NG stands, and so does the cause of an UNINSPECTED."""
    seen = views(*said)
    judgement, reasons = fuse(seen, [], ())
    left = unstored(make_part(judgement=judgement, reasons=reasons, views=tuple(seen)))
    kept = {Judgement.NG, Judgement.UNINSPECTED}
    expected = (judgement, reasons) if judgement in kept else (Judgement.UNINSPECTED, ("outbox_unavailable",))
    assert (left.judgement, left.reasons) == expected
    assert {view.verdict.judgement for view in left.views} <= kept
