"""Open parts: whose a frame is, one verdict a part, in order at each station; time is what the test says it is."""

import itertools
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.events import inspection_id
from pipeline.parts import Parts
from pipeline.stations import Station, StationView
from pipeline.types import Cause, Judgement, StrayReason, Trigger, Verdict

BUDGET_S = 2.0
PRODUCTS = {"c1": "tray", "c2": "tray", "c3": "tray"}
BOTH = [StationView(camera="c1"), StationView(camera="c2")]


class Bench:
    """Parts of station s1, with short words for what happens to them."""

    def __init__(self, make_frame, make_view, station=None, run="R"):
        self.run = run
        self.parts = Parts({} if station is None else {"s1": station}, PRODUCTS, budget_s=BUDGET_S, run=run)
        self._make_frame, self._make_view = make_frame, make_view
        self._numbers = Counter()

    def frame(self, camera="c1", at=0.0, part_id=None, **fields):
        """Let a frame arrive the moment it is captured; gives what that led to."""
        self._numbers[camera] += 1
        number = self._numbers[camera]
        stamp = (part_id, "sei") if part_id is not None else (f"{camera}-{self.run}-{number}", "generated")
        frame = self._make_frame(
            camera_id=camera,
            number=number,
            captured_s=at,
            deadline_s=at + BUDGET_S,
            **({"part_id": stamp[0], "part_id_source": stamp[1]} | fields),
        )
        return self.parts.arrive(frame, at)

    def trigger(self, part_id, at=0.0, **fields):
        values = {"meas_id": "", "product": None, "cameras": None, "triggered_at": None, "receipt": (0, 0)} | fields
        return self.parts.trigger(Trigger("s1", part_id, triggered_s=at, **values))

    def judge(self, frame, judgement=Judgement.OK, reasons=(), at=0.1):
        view = self._make_view()
        inference = replace(view.inference, frame=frame)
        verdict = Verdict(judgement, reasons)
        return self.parts.settle(replace(view, frame=frame, inference=inference, verdict=verdict, decided_s=at))

    def end(self, at, lost=()):
        return self.parts.expire(at, lost)


@pytest.fixture
def bench(make_frame, make_view):
    return lambda **plan: Bench(make_frame, make_view, Station(name="s1", **plan) if plan else None)


def told(verdicts):
    """Part id, verdict and reasons of each verdict, in the order in which they leave."""
    return [(verdict.part.part_id, verdict.judgement.value, verdict.reasons) for verdict in verdicts]


def missing(verdict):
    return {view.camera_id: view.cause.value for view in verdict.missing}


# One frame is a part


def test_a_part_that_is_open_holds_back_the_later_ones(bench):
    """Verdicts of a station leave in the order of capture, all that are ready at once."""
    line = bench()
    one, two, three = (line.frame(at=n / 10).frames[0] for n in range(3))
    assert line.judge(three) == []
    assert [verdict.sequence for verdict in line.judge(one)] == [1]
    assert [verdict.sequence for verdict in line.judge(two)] == [2, 3]
    assert len(line.parts) == 0


def test_open_parts_are_counted_until_they_leave(bench):
    """A part is open from its first frame until its verdict is released, decided or not."""
    line = bench()
    (first,), (second,) = line.frame("c1").frames, line.frame("c2").frames
    assert line.parts.open_by_station() == {"s1": 2}
    line.judge(second)
    assert line.parts.open_by_station() == {"s1": 2}
    line.judge(first)
    assert line.parts.open_by_station() == {"s1": 0}


def test_stations_do_not_wait_for_each_other(bench):
    """An open part of one station holds back no other station, and each numbers its own parts."""
    line = bench()
    line.frame("c1")
    (other,) = line.frame("c2", station="s2").frames
    assert [verdict.sequence for verdict in line.judge(other)] == [1]


def test_the_part_of_one_frame_keeps_its_cameras_identity(bench):
    """Without a station in the line file a frame is a part: its own id, product, deadline, and its camera's name."""
    line = bench()
    arrival = line.frame(at=5.0, part_id="p-7")
    part = line.parts.awaits(arrival.frames[0])
    assert (part.part_id, part.part_id_source, part.camera_id, part.product) == ("p-7", "sei", "c1", "tray")
    assert (part.opened_s, part.deadline_s, arrival.opened) == (5.0, 7.0, 1)


def test_a_settled_part_awaits_no_frame(bench):
    """The first verdict wins: after it the frame is not awaited, so that a late answer is recognised."""
    line = bench()
    one, two = line.frame().frames[0], line.frame().frames[0]
    line.judge(two)
    assert line.parts.awaits(one) is not None
    assert line.parts.awaits(two) is None


def test_overdue_frames_are_those_past_their_deadline(bench):
    """Only frames of open parts whose deadline has come are overdue, oldest first."""
    line = bench()
    frames = [line.frame(at=float(n)).frames[0] for n in (1, 2, 3)]
    line.judge(frames[0])
    assert line.parts.overdue(4.0) == [frames[1]]
    assert line.parts.overdue(5.0) == frames[1:]


@settings(max_examples=80)
@given(data=st.data(), stations=st.lists(st.sampled_from(["s1", "s2", "s3"]), max_size=12))
def test_every_part_leaves_once_and_in_order(make_frame, make_view, data, stations):
    """Whatever the order of the answers, each station gives 1, 2, 3, ... without a gap, and no part leaves twice."""
    line = Bench(make_frame, make_view)
    frames = [line.frame(f"cam-{station}", station=station).frames[0] for station in stations]
    released = [line.judge(frame) for frame in data.draw(st.permutations(frames))]
    for station in set(stations):
        left = [verdict.sequence for verdict in itertools.chain(*released) if verdict.part.station == station]
        assert left == list(range(1, stations.count(station) + 1))
    assert len(line.parts) == 0


# Several views


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


# The camera's trigger counter


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


# Trigger messages


def test_a_trigger_opens_the_part_and_names_it(bench):
    """The frame takes the trigger's part, product and deadline, which counts from the trigger."""
    line = bench(trigger="message", views=[StationView(camera="c1")])
    assert line.trigger("p", at=10.0, product="lid", meas_id="m", receipt=(3, 9)).opened == 1
    (frame,) = line.frame(at=10.3).frames
    assert (frame.part_id, frame.part_id_source, frame.product, frame.deadline_s) == ("p", "trigger", "lid", 12.0)
    (verdict,) = line.judge(frame)
    assert (verdict.part.product, verdict.part.meas_id, verdict.part.receipt) == ("lid", "m", (3, 9))


def test_a_trigger_without_a_frame_ends_on_time(bench):
    """UNINSPECTED at the deadline, with both cameras named; one of them is known to be away."""
    line = bench(trigger="message", views=BOTH)
    line.trigger("p", at=10.0)
    assert line.end(11.9) == ([], [])
    ((verdict,), _) = line.end(12.0, lost=["c2"])
    assert told([verdict]) == [("p", "UNINSPECTED", ("deadline", "camera_lost"))]
    assert missing(verdict) == {"c1": "deadline", "c2": "camera_lost"}


def test_a_frame_without_a_trigger_makes_no_part(bench):
    """No part was due: the frame is a stray once the window is over, and nothing was opened."""
    line = bench(trigger="message", views=BOTH, window_ms=500)
    arrival = line.frame("c1", at=1.0)
    assert (arrival.frames, arrival.opened, len(line.parts)) == ((), 0, 0)
    assert line.end(1.5) == ([], [])
    (_, (stray,)) = line.end(1.6)
    assert (stray.reason, stray.part) == (StrayReason.NO_TRIGGER, None)


def test_a_frame_may_come_before_its_trigger(bench):
    """It is held for the window, then claimed by the trigger."""
    line = bench(trigger="message", views=[StationView(camera="c1")], window_ms=500)
    line.frame("c1", at=1.0)
    (frame,) = line.trigger("p", at=1.4).frames
    assert frame.part_id == "p"
    assert line.end(9.0)[1] == []


def test_a_repeated_trigger_is_one_part_and_another_measurement_is_two(bench):
    """partId and measId together are the inspection."""
    line = bench(trigger="message", views=BOTH)
    assert line.trigger("p", meas_id="1").opened == 1
    assert line.trigger("p", meas_id="1") is None
    assert line.trigger("p", meas_id="2").opened == 1


def test_frames_belong_to_the_product_by_trigger_time(bench):
    """A frame of the old product that arrives after the first trigger of the new one is still the old one's."""
    line = bench(trigger="message", views=BOTH, window_ms=400)
    line.trigger("old", at=1.0, product="tray")
    line.trigger("new", at=1.5, product="lid")
    late, stamped = line.frame("c1", at=1.3).frames[0], line.frame("c2", at=1.7, part_id="old").frames[0]
    assert (late.part_id, late.product) == (stamped.part_id, stamped.product) == ("old", "tray")
    assert line.frame("c1", at=1.7).frames[0].product == "lid"


def test_a_lost_frame_shifts_no_other(bench):
    """A frame is the latest trigger's before it, not an earlier one's whose own was lost, nor beyond the window."""
    line = bench(trigger="message", views=[StationView(camera="c1")], window_ms=400)
    line.trigger("a", at=1.0)
    line.trigger("b", at=1.3)
    assert line.frame(at=1.35).frames[0].part_id == "b"
    assert line.frame(at=1.41).frames == ()
    assert line.frame(at=1.39).frames[0].part_id == "a"


def test_a_stamped_frame_is_matched_by_its_id_alone(bench):
    """A frame that carries another part's id is not the triggered part's, however near in time."""
    line = bench(trigger="message", views=[StationView(camera="c1")])
    line.trigger("a", at=1.0)
    assert line.frame(at=1.1, part_id="b").frames == ()
    assert line.frame(at=1.2, part_id="a").frames[0].part_id == "a"


def test_a_trigger_may_name_some_of_the_cameras(bench):
    """The part is whole with their views; the other camera's frame is a stray."""
    line = bench(trigger="message", views=BOTH)
    line.trigger("p", at=1.0, cameras=("c2",))
    (verdict,) = line.judge(line.frame("c2", at=1.1).frames[0])
    assert (told([verdict]), verdict.missing) == ([("p", "OK", ())], ())
    line.frame("c1", at=1.1)
    assert [stray.reason for stray in line.end(9.0)[1]] == [StrayReason.NO_TRIGGER]


def test_a_view_with_a_product_of_its_own_keeps_it(bench):
    """The trigger's recipe is for the other views."""
    line = bench(trigger="message", views=[StationView(camera="c1"), StationView(camera="c2", product="cap")])
    line.trigger("p", product="lid")
    assert [line.frame(camera).frames[0].product for camera in ("c1", "c2")] == ["lid", "cap"]


def test_a_trigger_that_nobody_heard_in_time_is_uninspected_at_once(bench):
    """One that was sent while no worker listened gets its verdict, and takes no frame of a later part."""
    line = bench(trigger="message", views=[StationView(camera="c1")])
    line.trigger("old", at=1.0, stale=True)
    line.trigger("new", at=1.0)
    assert line.frame(at=1.1).frames[0].part_id == "new"
    assert told(line.end(1.1)[0]) == [("old", "UNINSPECTED", ("deadline",))]


def test_frames_that_wait_for_triggers_are_bounded(bench):
    """A camera that runs free at a station of triggers fills no memory: the oldest frame gives way, as a stray."""
    line = bench(trigger="message", views=[StationView(camera="c1")], window_ms=60_000)
    strays = [line.frame(at=n / 100).strays for n in range(70)]
    assert [len(some) for some in strays] == [0] * 64 + [1] * 6


@settings(max_examples=200)
@given(
    events=st.lists(
        st.one_of(
            st.tuples(st.just("trigger"), st.sampled_from("abc"), st.sampled_from("12")),
            st.tuples(st.just("frame"), st.sampled_from(["c1", "c2"]), st.sampled_from(["a", "b", "x", None])),
        ),
        max_size=25,
    ),
    gap_s=st.sampled_from([0.0, 0.1, 0.3, 1.0]),
)
def test_triggered_parts_are_conserved(make_frame, make_view, events, gap_s):
    """Over all orders: as many verdicts as different triggers, each once and in order; no frame is used twice."""
    line = Bench(make_frame, make_view, Station(name="s1", trigger="message", views=BOTH))
    verdicts, strays, frames, used = [], [], 0, []
    for number, (what, first, second) in enumerate(events):
        at = number * gap_s
        if what == "trigger":
            arrival = line.trigger(first, at=at, meas_id=second)
        else:
            frames, arrival = frames + 1, line.frame(first, at=at, part_id=second)
        for frame in arrival.frames if arrival is not None else ():
            used.append((frame.camera_id, frame.number))
            verdicts += line.judge(frame)
        strays += arrival.strays if arrival is not None else ()
        released, more = line.end(at)
        verdicts, strays = verdicts + released, strays + more
    released, more = line.parts.expire(0.0, (), last=True)
    verdicts, strays = verdicts + released, strays + more
    wanted = {(first, second) for what, first, second in events if what == "trigger"}
    assert sorted((verdict.part.part_id, verdict.part.meas_id) for verdict in verdicts) == sorted(wanted)
    assert [verdict.sequence for verdict in verdicts] == list(range(1, len(wanted) + 1))
    assert len(used) == len(set(used))
    assert len(used) + len(strays) == frames


STAMPED = {"part_id": "S-1", "part_id_source": "file"}


@pytest.mark.parametrize(
    ("plan", "happens", "same"),
    [
        ({"trigger": "message", "views": BOTH}, lambda bench: bench.trigger("S-1", meas_id="m"), True),
        ({}, lambda bench: bench.frame(part_id="S-1"), True),
        ({}, lambda bench: bench.frame(**STAMPED), True),
        ({"views": BOTH}, lambda bench: bench.frame(part_id="S-1"), True),
        ({}, lambda bench: bench.frame(), False),
        ({"trigger": "counter", "views": BOTH}, lambda bench: bench.frame(trigger_count=7), False),
    ],
    ids=["trigger", "sei", "file", "sei, two views", "generated", "counter"],
)
def test_ids_over_a_restart(make_frame, make_view, plan, happens, same):
    """What the world names has the same inspection id in every run; what a run names itself never has one again."""
    station = Station(name="s1", **plan) if plan else None
    ids = []
    for run in ("R1", "R1", "R2"):
        bench = Bench(make_frame, make_view, station, run)
        happens(bench)
        (part,) = (each.part for each in bench.parts._stations["s1"].waiting)
        ids.append(inspection_id("/s/a/l", part.station, part.part_id, part.camera_id, part.meas_id))
    assert ids[0] == ids[1]
    assert (ids[0] == ids[2]) is same
