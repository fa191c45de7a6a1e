"""Open parts: one verdict a part, in the order of capture at each station."""

import itertools
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.parts import OpenParts


def open_all(make_frame, stations):
    parts = OpenParts()
    frames = [make_frame(camera_id=f"cam-{s}", station=s, number=n) for n, s in enumerate(stations, start=1)]
    return parts, frames, [parts.open(frame) for frame in frames]


def verdict_of(make_part, frame, sequence):
    part = make_part()
    return replace(part, frame=frame, inference=replace(part.inference, frame=frame), sequence=sequence)


def test_a_part_that_is_open_holds_back_the_later_ones(make_frame, make_part):
    """Verdicts of a station leave in the order of capture, all that are ready at once."""
    parts, frames, sequences = open_all(make_frame, ["s1", "s1", "s1"])
    assert sequences == [1, 2, 3]
    late = [verdict_of(make_part, frame, number) for frame, number in zip(frames, sequences, strict=True)]
    assert parts.close(late[2]) == []
    assert parts.close(late[0]) == [late[0]]
    assert parts.close(late[1]) == [late[1], late[2]]
    assert len(parts) == 0


def test_stations_do_not_wait_for_each_other(make_frame, make_part):
    """An open part of one station holds back no other station."""
    parts, frames, sequences = open_all(make_frame, ["s1", "s2"])
    assert sequences == [1, 1]
    verdict = verdict_of(make_part, frames[1], 1)
    assert parts.close(verdict) == [verdict]


def test_a_closed_part_has_no_sequence_left(make_frame, make_part):
    """The first closing wins: after it the part is not open, so that a late answer is recognised."""
    parts, frames, _ = open_all(make_frame, ["s1", "s1"])
    parts.close(verdict_of(make_part, frames[1], 2))
    assert parts.sequence(frames[0]) == 1
    assert parts.sequence(frames[1]) is None


def test_overdue_parts_are_those_past_their_deadline(make_frame, make_part):
    """Only open parts whose deadline has come are overdue, oldest first."""
    parts = OpenParts()
    frames = [make_frame(number=n, captured_s=float(n), deadline_s=n + 2.0) for n in (1, 2, 3)]
    for frame in frames:
        parts.open(frame)
    parts.close(verdict_of(make_part, frames[0], 1))
    assert parts.overdue(4.0) == [frames[1]]
    assert parts.overdue(5.0) == frames[1:]


@settings(max_examples=80)
@given(data=st.data(), stations=st.lists(st.sampled_from(["s1", "s2", "s3"]), max_size=12))
def test_every_part_leaves_once_and_in_order(make_frame, make_part, data, stations):
    """Whatever the order of the answers, each station gives 1, 2, 3, ... without a gap, and no part leaves twice."""
    parts, frames, sequences = open_all(make_frame, stations)
    opened = list(zip(frames, sequences, strict=True))
    released = [parts.close(verdict_of(make_part, *item)) for item in data.draw(st.permutations(opened))]
    for station in set(stations):
        left = [part.sequence for part in itertools.chain(*released) if part.frame.station == station]
        assert left == list(range(1, stations.count(station) + 1))
    assert len(parts) == 0
