"""Parts by the camera's trigger counter: a gap is a missed part, a counter that jumps is aligned anew."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parts_bench import BOTH, Bench, missing, told

from pipeline.stations import Station, StationView
from pipeline.types import Cause, StrayReason


def test_a_gap_of_the_counter_is_a_missed_part(bench):
    """Counts 5, 6, 9: parts 7 and 8 are UNINSPECTED at once with their cause, in their places; ids are the counts."""
    line = bench(trigger="counter", views=[StationView(camera="c1")])
    verdicts = []
    for count in (5, 6, 9):
        for frame in line.frame(at=count / 10, trigger_count=count).frames:
            verdicts += line.judge(frame)
    gone = ("UNINSPECTED", ("trigger_missed",))
    assert told(verdicts) == [
        ("s1-R-5", "OK", ()),
        ("s1-R-6", "OK", ()),
        ("s1-R-7", *gone),
        ("s1-R-8", *gone),
        ("s1-R-9", "OK", ()),
    ]
    assert {verdict.part.part_id_source for verdict in verdicts} == {"counter"}


@pytest.mark.parametrize("count", [0, 3, 2**32 - 1], ids=["reset", "back", "jump"])
def test_a_counter_that_was_reset_makes_no_parts(bench, count):
    """A count that went back, or far ahead, is a counter aligned anew: one part, with a number of its own."""
    line = bench(trigger="counter", views=[StationView(camera="c1")], max_missed=10)
    line.frame(at=0.0, trigger_count=7)
    arrival = line.frame(at=1.0, trigger_count=count)
    assert (arrival.opened, arrival.reset, arrival.frames[0].part_id) == (1, True, "s1-R-8")
    assert line.frame(at=2.0, trigger_count=count + 2).opened == 2


def test_the_same_count_again_is_a_duplicate(bench):
    """A repeated count opens nothing; a picture without one is the next part, as a damaged one is."""
    line = bench(trigger="counter", views=[StationView(camera="c1")])
    line.frame(trigger_count=7)
    assert [stray.reason for stray in line.frame(trigger_count=7).strays] == [StrayReason.DUPLICATE_FRAME]
    assert line.frame(trigger_count=None, cause=Cause.FRAME_CORRUPT, image=None).frames[0].part_id == "s1-R-8"


def test_the_same_count_of_a_camera_that_was_lost_is_the_next_part(bench):
    """Its counter has started anew: the part is judged, and only a repeat without a loss is a duplicate."""
    line = bench(trigger="counter", views=[StationView(camera="c1")])
    line.frame(at=1.0, trigger_count=0)
    line.parts.reopen("c1")
    arrival = line.frame(at=5.0, trigger_count=0)
    assert (arrival.reset, arrival.frames[0].part_id) == (True, "s1-R-1")
    assert [stray.reason for stray in line.frame(at=6.0, trigger_count=0).strays] == [StrayReason.DUPLICATE_FRAME]


def test_counters_of_two_cameras_are_aligned_by_their_first_frames(bench):
    """Cameras that have counted differently show the same parts; a gap of one is a missing view, not a missing part."""
    line = bench(trigger="counter", views=BOTH)
    verdicts = []
    for at, camera, count in [(0, "c1", 100), (0.1, "c2", 7), (1, "c1", 101), (2, "c1", 102), (2.1, "c2", 9)]:
        for frame in line.frame(camera, at=at, trigger_count=count).frames:
            verdicts += line.judge(frame)
    assert told(verdicts) == [
        ("s1-R-100", "OK", ()),
        ("s1-R-101", "UNINSPECTED", ("trigger_missed",)),
        ("s1-R-102", "OK", ()),
    ]
    assert missing(verdicts[1]) == {"c2": "trigger_missed"}


def test_a_camera_that_missed_a_trigger_without_counting_it_is_aligned_anew(bench):
    """Its next picture, of a part a second later, is never taken for that of the part it missed."""
    line = bench(trigger="counter", views=BOTH)
    for at, camera, count in [(0, "c1", 1), (0.1, "c2", 1), (1, "c1", 2)]:
        line.frame(camera, at=at, trigger_count=count)
    (mine,) = line.frame("c1", at=2.0, trigger_count=3).frames
    arrival = line.frame("c2", at=2.1, trigger_count=2)
    assert arrival.reset
    assert arrival.frames[0].part_id == mine.part_id == "s1-R-3"


@settings(max_examples=150)
@given(counts=st.lists(st.integers(0, 60), max_size=25), max_missed=st.integers(0, 8))
def test_counted_parts_are_conserved_and_bounded(make_frame, make_view, counts, max_missed):
    """Whatever a counter does: one verdict a part, in order, and no more than `max_missed` missed ones a frame."""
    plan = Station(name="s1", trigger="counter", views=[StationView(camera="c1")], max_missed=max_missed)
    line = Bench(make_frame, make_view, plan)
    opened, verdicts = 0, []
    for number, count in enumerate(counts):
        arrival = line.frame(at=float(number), trigger_count=count)
        assert len(arrival.frames) + len(arrival.strays) == 1
        assert arrival.opened <= max_missed + 1
        opened += arrival.opened
        for frame in arrival.frames:
            verdicts += line.judge(frame)
    assert [verdict.sequence for verdict in verdicts] == list(range(1, opened + 1))
    assert len({verdict.part.part_id for verdict in verdicts}) == opened
