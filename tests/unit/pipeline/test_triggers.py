"""Triggers, as far as they go without a broker: what is read as one, whose clock is believed, and the place kept."""

import json
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.triggers import Places, believed_age_s
from pipeline.wire import decode_trigger

NOW = datetime(2026, 11, 23, 12, 0, 0, tzinfo=UTC)
DATA = {"partId": "p-1", "station": "s1", "measId": "m", "recipeId": "tray", "cameras": ["c1"], "more": 1}
CLOUD = {"content-type": b"application/cloudevents+json"}
ENVELOPE = {"specversion": "1.0", "id": "1", "source": "/mes", "type": "t"}


@pytest.mark.parametrize(
    ("document", "headers"),
    [(DATA, {}), (DATA, {"ce_id": b"1"}), (ENVELOPE | {"data": DATA}, CLOUD), (ENVELOPE | {"data": DATA}, {})],
    ids=["plain", "binary", "structured", "structured without its content type"],
)
def test_a_trigger_is_read_in_each_form(document, headers):
    """Plain JSON and CloudEvents of both modes give the same words; keys that nobody knows are left alone."""
    data = decode_trigger(json.dumps(document).encode(), headers)
    assert (data.part_id, data.station, data.meas_id, data.recipe_id) == ("p-1", "s1", "m", "tray")
    assert (data.cameras, data.triggered_at) == (["c1"], None)


def test_a_serial_number_may_be_a_number():
    """What a PLC sends as a number is the same text."""
    assert decode_trigger(b'{"partId": 4711, "station": "s1"}', {}).part_id == "4711"


@pytest.mark.parametrize(
    ("value", "word"),
    [
        (None, "no value"),
        (b"", "Expecting"),
        (b"\xff\xfe\x00", "decode"),
        (b"[]", "no JSON object"),
        (b"[" * 100_000, "nested"),
        (b'{"station": "s1"}', "partId"),
        (b'{"partId": "", "station": "s1"}', "partId"),
        (b'{"partId": "a\\u0000b", "station": "s1"}', "partId"),
        (b'{"partId": "' + b"x" * 129 + b'", "station": "s1"}', "partId"),
        (b'{"partId": "p"}', "station"),
        (b'{"partId": "p", "station": "s1", "cameras": []}', "cameras"),
        (b'{"partId": "p", "station": "s1", "triggeredAt": "2026-11-23T12:00:00"}', "triggeredAt"),
        (b'{"specversion": "1.0", "id": "1"}', "data"),
    ],
)
def test_what_is_no_trigger_is_a_value_error_that_says_why(value, word):
    """The reader can put such a record aside with a reason."""
    with pytest.raises(ValueError, match=word):
        decode_trigger(value, {})


@settings(max_examples=200)
@given(value=st.binary(max_size=60) | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(json.dumps))
def test_no_record_breaks_the_reader(value):
    """Over all records: a trigger, or ValueError."""
    try:
        data = decode_trigger(value if isinstance(value, bytes) else value.encode(), {})
    except ValueError:
        return
    assert data.part_id


@pytest.mark.parametrize(
    ("age_s", "believed"),
    [(0.0, 0.0), (0.3, 0.3), (0.5, 0.5), (0.6, 0.0), (3600.0, 0.0), (-0.001, 0.0), (-3600.0, 0.0)],
)
def test_a_senders_clock_is_believed_within_the_window(age_s, believed):
    """A clock that has jumped, or runs an hour beside ours, neither makes a part late nor gives it more time."""
    assert believed_age_s(NOW - timedelta(seconds=age_s), NOW, 0.5) == pytest.approx(believed)


@settings(max_examples=200)
@given(data=st.data(), kinds=st.lists(st.tuples(st.integers(0, 2), st.booleans()), max_size=20))
def test_the_place_never_passes_a_part_without_a_verdict(data, kinds):
    """Over all orders of settling: what a next run would read again is exactly what is not settled, or later."""
    places, open_ones, ends = Places(), set(), {}
    for partition, ours in kinds:
        offset = ends.get(partition, 0)
        ends[partition] = offset + 1
        places.take(partition, offset, pending=ours)
        if ours:
            open_ones.add((partition, offset))
    for receipt in data.draw(st.permutations(sorted(open_ones))):
        first = {p: min((o for q, o in open_ones if q == p), default=end) for p, end in ends.items()}
        assert places.reached() == first
        places.settle(*receipt)
        open_ones.discard(receipt)
    assert places.reached() == ends
