"""The wire form: what goes in comes out, in both modes, and it is always JSON."""

import json
import math
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.events import Encoder, Place, decode, inspection_id
from pipeline.types import (
    CameraState,
    Cause,
    Inference,
    Judgement,
    MissingView,
    Region,
    Scores,
    Stray,
    StrayReason,
    Verdict,
)

PLACE = Place("site", "area", "l1", worker="w1", budget_ms=2000.0)
AT = datetime(2026, 11, 23, 12, 0, 1, 500_000, tzinfo=UTC)
MODES = ("binary", "structured")
FLOATS = st.floats(allow_nan=True, allow_infinity=True)


def read_back(event):
    return decode(event.value, dict(event.headers))


@pytest.mark.parametrize("mode", MODES)
def test_a_part_gives_a_view_and_a_verdict(make_part, mode):
    """One part is one event on each topic, with the station's key, the part as subject, and an id of its own."""
    view, verdict = Encoder(PLACE, mode).part(make_part(), decided_at=AT)
    assert (view.topic, verdict.topic) == ("view.v1", "verdict.v1")
    assert (view.is_part, verdict.is_part) == (False, True)
    assert view.key == verdict.key == b"l1/s1"
    seen, judged = read_back(view), read_back(verdict)
    identity = judged["attributes"]["id"]
    assert identity == judged["data"]["inspectionId"] == inspection_id("/site/area/l1", "s1", "part-1", "c1")
    assert seen["attributes"]["id"] == f"{identity}/c1"
    assert judged["attributes"] == {
        "specversion": "1.0",
        "id": identity,
        "source": "/site/area/l1",
        "type": "io.logicrd.inspection.verdict.v1",
        "subject": "part-1",
        "time": "2026-11-23T12:00:01.500Z",
        "partitionkey": "l1/s1",
    } | ({"datacontenttype": "application/json"} if mode == "structured" else {})


def test_the_data_say_what_was_decided_and_why(make_part, make_view):
    """Verdict, reasons, scores, limits, model and times of the part are in the event, under the wire's names."""
    view = make_view(regions=(Region((0.1, 0.2, 0.3, 0.4), 5.0),), image_ref="c1/part-1.NG.jpg")
    part = make_part(view, sequence=42)
    data = read_back(Encoder(PLACE, "binary").part(part, decided_at=AT)[1])["data"]
    assert (data["verdict"], data["reasonCodes"], data["sequence"]) == ("NG", ["score_above_ng", "anomaly_map"], 42)
    assert data["threshold"] == {"ng": 3.0, "review": 2.0, "version": 7, "source": "redis"}
    assert data["model"] == {"name": "tray", "version": "1", "sha256": "ab" * 32}
    (view,) = data["views"]
    assert view["scores"] == {"map": 2.0, "mahalanobis": 11.0, "fused": 3.5}
    assert view["regions"] == [{"bbox": [0.1, 0.2, 0.3, 0.4], "peak": 5.0}]
    assert view["imageRef"] == "c1/part-1.NG.jpg"
    timing = {"queuedMs": 20.0, "inferredMs": 140.0, "decidedMs": 150.0, "budgetMs": 2000.0, "late": False}
    assert data["timing"] == timing


def test_an_uninspected_part_has_an_event_like_any_other(make_part, make_view, make_frame):
    """A part without scores, model or limits is told with nulls, and late when its budget is over."""
    frame = make_frame(image=None)
    view = make_view(
        frame=frame,
        inference=Inference(frame),
        verdict=Verdict(Judgement.UNINSPECTED, ("deadline",)),
        decided_s=frame.captured_s + 2.001,
    )
    data = read_back(Encoder(PLACE, "binary").part(make_part(view), decided_at=AT)[1])["data"]
    assert (data["verdict"], data["reasonCodes"]) == ("UNINSPECTED", ["deadline"])
    assert data["threshold"] is None
    assert data["model"] is None
    assert data["views"][0]["scores"] is None
    assert (data["timing"]["queuedMs"], data["timing"]["inferredMs"], data["timing"]["late"]) == (None, None, True)


def test_a_part_of_two_views_tells_each_and_the_missing_one(make_part, make_view):
    """One event a view with that view's own verdict, one for the part with both views and the name of the third."""
    one = make_view({"captured_s": 100.0})
    two = make_view({"camera_id": "c2", "captured_s": 100.5, "product": "lid"}, verdict=Verdict(Judgement.OK, ()))
    missing = (MissingView("c3", required=True, cause=Cause.CAMERA_LOST),)
    part = make_part(one, views=(one, two), missing=missing, optional=frozenset({"c2"}), decided_s=100.7)
    part = replace(part, part=replace(part.part, camera_id=None, meas_id="m1", part_id_source="trigger"))
    first, second, whole = Encoder(PLACE, "binary").part(part, decided_at=AT)
    identity = inspection_id("/site/area/l1", "s1", "part-1", meas_id="m1")
    ids = [read_back(event)["attributes"]["id"] for event in (first, second, whole)]
    assert ids == [f"{identity}/c1", f"{identity}/c2", identity]
    assert [event.is_part for event in (first, second, whole)] == [False, False, True]
    own, data = read_back(second)["data"], read_back(whole)["data"]
    assert (own["verdict"], own["productId"], len(own["views"]), own["missingViews"]) == ("OK", "lid", 1, [])
    assert own["timing"]["decidedMs"] == 150.0
    assert [(view["cameraId"], view["verdict"], view["required"]) for view in data["views"]] == [
        ("c1", "NG", True),
        ("c2", "OK", False),
    ]
    assert data["missingViews"] == [{"cameraId": "c3", "required": True, "cause": "camera_lost"}]
    assert (data["verdict"], data["productId"], data["measId"]) == ("NG", "tray", "m1")
    assert data["triggeredAt"] is not None
    assert (data["timing"]["queuedMs"], data["timing"]["decidedMs"]) == (520.0, 700.0)


def test_a_late_frame_names_the_verdict_that_stands(make_part, make_frame):
    """An audit event has the station's key, says that it is late, and carries the id of the part's inspection."""
    part = replace(make_part().part, camera_id=None)
    event = Encoder(PLACE, "binary").audit(Stray(make_frame(number=9), StrayReason.LATE_FRAME, part), AT)
    assert (event.topic, event.key, event.is_part) == ("audit.v1", b"l1/s1", False)
    data = read_back(event)["data"]
    assert (data["late"], data["reason"], data["frameId"]) == (True, "late_frame", 9)
    assert (data["partId"], data["inspectionId"]) == ("part-1", inspection_id("/site/area/l1", "s1", "part-1"))
    unknown = read_back(Encoder(PLACE, "binary").audit(Stray(make_frame(), StrayReason.NO_TRIGGER), AT))["data"]
    assert (unknown["late"], unknown["inspectionId"]) == (False, None)


def test_a_dead_letter_is_the_record_as_it_came():
    """Value, key and headers stay; what was wrong and where it lay is beside them; a huge value is cut and says so."""
    encoder = Encoder(PLACE, "binary")
    event = encoder.dead_letter("t/0/7", None, b"{", [("h", b"1")], "not JSON")
    assert (event.topic, event.key, event.value, event.is_part) == ("dlq.v1", b"", b"{", False)
    told = {"h": b"1", "logicrd_error": b"not JSON", "logicrd_record": b"t/0/7", "logicrd_worker": b"w1"}
    assert dict(event.headers) == told
    huge = encoder.dead_letter("t/0/8", b"k", b"x" * 100_000, [], "too long")
    assert (len(huge.value), dict(huge.headers)["logicrd_cut_from"]) == (65536, b"100000")


@given(
    key=st.none() | st.binary(max_size=3000),
    value=st.none() | st.binary(max_size=100),
    headers=st.lists(st.tuples(st.text(st.characters(exclude_categories=["Cs"])), st.none() | st.binary())),
    more=st.integers(0, 200),
)
def test_a_dead_letter_always_fits(key, value, headers, more):
    """Over all records: what the client library takes (no null), and far below the largest record of Kafka."""
    headers = [*headers, *[("h" * 500, b"x" * 5000)] * more]
    letter = Encoder(PLACE, "binary").dead_letter("t/0/7", key, value, headers, "e" * 5000)
    assert all(isinstance(name, str) and isinstance(text, bytes) for name, text in letter.headers)
    names = sum(len(name.encode()) + len(text) for name, text in letter.headers)
    assert len(letter.key) + len(letter.value) + names < 200_000
    assert dict(letter.headers)["logicrd_record"] == b"t/0/7"


@pytest.mark.parametrize("mode", MODES)
def test_a_camera_tells_its_state(mode):
    """A status event is keyed by camera, and names the state and its reason."""
    event = Encoder(PLACE, mode).status("c1", CameraState.LOST, "timeout", AT)
    assert (event.topic, event.key, event.is_part) == ("status.v1", b"c1", False)
    data = read_back(event)["data"]
    assert (data["cameraId"], data["state"], data["reason"], data["worker"]) == ("c1", "lost", "timeout", "w1")


def test_an_inspection_has_the_same_id_whenever_it_is_computed():
    """The id depends on where and what was inspected, and on nothing else."""
    first = inspection_id("/a", "s1", "p-1", "c1")
    assert first == inspection_id("/a", "s1", "p-1", "c1") == "285c01b7-0949-5dea-bbf2-0cf6e2f1c1d4"
    others = {inspection_id("/b", "s1", "p-1", "c1"), inspection_id("/a", "s2", "p-1", "c1")}
    others |= {inspection_id("/a", "s1", "p-2", "c1"), inspection_id("/a", "s1", "p-1", "c2")}
    others |= {inspection_id("/a", "s1", "p-1"), inspection_id("/a", "s1", "p-1", meas_id="m1")}
    others |= {inspection_id("/a", "s1", "p-1", meas_id="m2")}
    assert first not in others
    assert len(others) == 7


@settings(max_examples=150)
@given(
    mode=st.sampled_from(MODES),
    part_id=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40),
    scores=st.builds(Scores, FLOATS, FLOATS, FLOATS),
    judgement=st.sampled_from(Judgement),
    peak=st.floats(allow_nan=False, allow_infinity=False, width=32),
    sequence=st.integers(1, 2**53),
)
def test_every_event_reads_back(make_part, make_view, mode, part_id, scores, judgement, peak, sequence):
    """Whatever the scores and the part's name: the value is strict JSON without NaN, and reads back as it was."""
    view = make_view({"part_id": part_id}, regions=(Region((0.0, 0.0, 1.0, 1.0), peak),))
    view = replace(
        view, inference=replace(view.inference, scores=scores), verdict=replace(view.verdict, judgement=judgement)
    )
    part = make_part(view, sequence=sequence)
    for event in Encoder(PLACE, mode).part(part, decided_at=AT):
        json.loads(event.value, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
        document = read_back(event)
        data = document["data"]
        assert document["attributes"]["subject"] == data["partId"] == part_id
        assert (data["verdict"], data["sequence"]) == (judgement.value, sequence)
        assert data["views"][0]["regions"][0]["peak"] == peak
        for name in ("map", "mahalanobis", "fused"):
            value = getattr(scores, name)
            assert data["views"][0]["scores"][name] == (value if math.isfinite(value) else None)


CLOUD = b"application/cloudevents+json; charset=UTF-8"


@pytest.mark.parametrize(
    ("value", "headers"),
    [
        (b"", {"ce_id": b"1"}),
        (b"{", {"ce_id": b"1"}),
        (b"\xff\xfe", {"ce_id": b"1"}),
        (b"{}", {}),
        (b"{}", {"ce_id": b"\xff"}),
        (b"{}", {"ce_id": None}),
        (b"{}", {"content-type": None}),
        (b"[1]", {"ce_id": b"1"}),
        (b"null", {"content-type": CLOUD}),
        (b"{}", {"content-type": CLOUD}),
        (b'{"id": "1", "data": [1]}', {"content-type": CLOUD}),
        (b"[" * 100_000, {"ce_id": b"1"}),
    ],
)
def test_what_is_no_event_of_ours_is_a_value_error(value, headers):
    """A record of somebody else on the topic is refused with ValueError, so that a reader can show it and go on."""
    with pytest.raises(ValueError):
        decode(value, headers)


@settings(max_examples=150)
@given(
    value=st.binary(max_size=40)
    | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(lambda node: json.dumps(node).encode()),
    headers=st.dictionaries(st.sampled_from(["ce_id", "content-type"]), st.none() | st.binary() | st.just(CLOUD)),
)
def test_no_record_breaks_a_reader(value, headers):
    """Over all records: decode gives attributes and data as mappings, or raises ValueError."""
    try:
        document = decode(value, headers)
    except ValueError:
        return
    assert isinstance(document["attributes"], dict)
    assert isinstance(document["data"], dict)
