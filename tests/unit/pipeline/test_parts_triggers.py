"""Parts by trigger messages: one verdict a trigger, and which frames are its part's."""

from hypothesis import given, settings
from hypothesis import strategies as st
from parts_bench import BOTH, Bench, missing, told

from pipeline.stations import Station, StationView
from pipeline.types import StrayReason


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
