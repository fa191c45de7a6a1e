"""Parts of several views: which views belong together, and what becomes of one that is missing or late."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parts_bench import BOTH, BUDGET_S, Bench, missing, told

from pipeline.stations import Station, StationView
from pipeline.types import Judgement, StrayReason


def test_two_views_with_one_id_are_one_part(bench):
    """The part waits for both, its verdict has both, and it leaves once."""
    line = bench(views=BOTH)
    (one,), (two,) = line.frame("c1", part_id="p").frames, line.frame("c2", at=0.3, part_id="p").frames
    assert line.judge(two) == []
    (verdict,) = line.judge(one)
    assert told([verdict]) == [("p", "OK", ())]
    assert [view.frame.camera_id for view in verdict.views] == ["c1", "c2"]
    assert verdict.part.camera_id is None


def test_views_without_an_id_belong_together_by_their_time(bench):
    """Within the window it is the same part, beyond it the next one."""
    line = bench(views=BOTH, window_ms=200)
    (one,) = line.frame("c1", at=1.0).frames
    assert line.frame("c2", at=1.15).frames[0].part_id == one.part_id
    assert line.frame("c2", at=2.0).frames[0].part_id == "c2-R-2"
    assert line.frame("c1", at=1.95).frames[0].part_id == "c2-R-2"


@pytest.mark.parametrize(("lost", "cause"), [((), "deadline"), (("c2",), "camera_lost")])
def test_a_missing_view_makes_the_part_uninspected_at_its_deadline(bench, lost, cause):
    """Not before, and the verdict names the camera and why its view is missing."""
    line = bench(views=BOTH)
    line.judge(line.frame("c1", part_id="p").frames[0])
    assert line.end(BUDGET_S - 0.01, lost) == ([], [])
    ((verdict,), _) = line.end(BUDGET_S, lost)
    assert told([verdict]) == [("p", "UNINSPECTED", (cause,))]
    assert missing(verdict) == {"c2": cause}
    assert len(line.parts) == 0


def test_a_view_of_a_camera_that_was_removed_is_camera_lost(bench):
    """The part does not wait any shorter for it: it may come again; the epoch of its first frame is the part's."""
    line = bench(views=BOTH)
    line.judge(line.frame("c1", part_id="p", epoch=7).frames[0])
    line.parts.remove_camera("c2")
    assert line.end(BUDGET_S - 0.01) == ([], [])
    ((verdict,), _) = line.end(BUDGET_S)
    assert missing(verdict) == {"c2": "camera_lost"}
    assert verdict.part.epoch == 7
    line.parts.add_camera("c2", "tray")
    line.judge(line.frame("c1", part_id="q", at=10.0).frames[0], at=10.1)
    ((verdict,), _) = line.end(10.0 + BUDGET_S)
    assert missing(verdict) == {"c2": "deadline"}


def test_an_optional_view_may_be_missing(bench):
    """The part is what its required views say, and the missing one is named all the same."""
    line = bench(views=[StationView(camera="c1"), StationView(camera="c2", required=False)])
    line.judge(line.frame("c1", part_id="p").frames[0])
    ((verdict,), _) = line.end(BUDGET_S)
    assert told([verdict]) == [("p", "OK", ())]
    assert missing(verdict) == {"c2": "deadline"}


def test_a_frame_after_the_verdict_is_a_stray(bench):
    """It never opens the part again: it is late when its view was missing, a duplicate when the view was there."""
    line = bench(views=BOTH)
    line.judge(line.frame("c1", part_id="p").frames[0])
    line.end(BUDGET_S)
    for camera, reason in (("c2", StrayReason.LATE_FRAME), ("c1", StrayReason.DUPLICATE_FRAME)):
        arrival = line.frame(camera, at=2.5, part_id="p")
        assert (arrival.frames, arrival.opened) == ((), 0)
        assert [(stray.reason, stray.part.part_id) for stray in arrival.strays] == [(reason, "p")]


@settings(max_examples=150)
@given(
    events=st.lists(
        st.tuples(st.sampled_from(["c1", "c2", "c3"]), st.sampled_from("abcd"), st.sampled_from(Judgement)), max_size=20
    ),
    gap_s=st.floats(0, 1.5),
)
def test_parts_of_several_views_are_conserved(make_frame, make_view, events, gap_s):
    """Over all orders of frames and answers: opened = verdicts, each part once, in order; every frame is used or stray.

    An OK part has both required views, OK.
    """
    plan = Station(name="s1", views=[*BOTH, StationView(camera="c3", required=False)])
    line = Bench(make_frame, make_view, plan)
    opened, used, strays, verdicts = 0, 0, 0, []
    for number, (camera, part_id, judgement) in enumerate(events):
        arrival = line.frame(camera, at=number * gap_s, part_id=part_id)
        opened, used, strays = opened + arrival.opened, used + len(arrival.frames), strays + len(arrival.strays)
        for frame in arrival.frames:
            verdicts += line.judge(frame, judgement, ("deadline",) if judgement is Judgement.UNINSPECTED else ())
        verdicts += line.end(number * gap_s)[0]
    verdicts += line.parts.expire(0.0, (), last=True)[0]
    assert used + strays == len(events)
    assert [verdict.sequence for verdict in verdicts] == list(range(1, opened + 1))
    assert len(line.parts) == 0
    for verdict in verdicts:
        seen = {view.frame.camera_id: view.verdict.judgement for view in verdict.views}
        if verdict.judgement is Judgement.OK:
            assert seen["c1"] is seen["c2"] is Judgement.OK
        assert (verdict.judgement is Judgement.NG) == (Judgement.NG in seen.values())
        assert len(seen) + len(verdict.missing) == 3
