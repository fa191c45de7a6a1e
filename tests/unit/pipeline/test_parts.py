"""Parts of one frame: whose a frame is, one verdict a part, in order at each station; time is what the test says."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parts_bench import BOTH, Bench

from pipeline.events import inspection_id
from pipeline.stations import Station


def test_a_part_that_is_open_holds_back_the_later_ones(bench):
    """Verdicts of a station leave in the order of capture, all that are ready at once."""
    line = bench()
    one, two, three = (line.frame(at=n / 10).frames[0] for n in range(3))
    assert line.judge(three) == []
    assert [verdict.sequence for verdict in line.judge(one)] == [1]
    assert [verdict.sequence for verdict in line.judge(two)] == [2, 3]
    assert len(line.parts) == 0


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
