"""The events as others read them: against the committed JSON Schemas, and with the CloudEvents SDK."""

import json
import re
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from cloudevents.core.bindings.kafka import KafkaMessage, from_kafka
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent

from pipeline.events import Encoder, Place
from pipeline.types import (
    CameraState,
    Cause,
    Frame,
    Inference,
    Judgement,
    MissingView,
    Model,
    Part,
    PartVerdict,
    Region,
    Scores,
    Stray,
    StrayReason,
    Threshold,
    ThresholdSource,
    Verdict,
    ViewVerdict,
)
from pipeline.wire import HeartbeatData, WorkerCameraData, WorkerModelData, WorkerStageData, schemas

ROOT = Path(__file__).resolve().parents[2]
SCHEMAS = ROOT / "pipeline/schemas"
AGAIN = """write them anew:
python -c 'import json, pathlib, pipeline.events as e; [pathlib.Path("pipeline/schemas", name).write_text(
    json.dumps(schema, indent=2) + "\\n") for name, schema in e.schemas().items()]'"""
PLACE = Place("site", "area", "l1", worker="host-20261123T120000", budget_ms=2000.0)
AT = datetime(2026, 11, 23, 12, 0, 1, 500_000, tzinfo=UTC)


def frame_of(part_id="Gehäuse-7", cause=None):
    image = None if cause else np.zeros((4, 4, 3), np.uint8)
    return Frame("c1", "s1", "tray", 3, part_id, "sei", AT, 10.0, 12.0, image, cause)


def part_of(view, **fields):
    frame, verdict = view.frame, view.verdict
    part = Part(frame.station, frame.part_id, frame.part_id_source, frame.product, AT, 10.0, 12.0, frame.camera_id)
    made = PartVerdict(part, 3, verdict.judgement, verdict.reasons, (view,), (), view.decided_s)
    return replace(made, **fields)


def judged(judgement, reasons, scores=None, source=ThresholdSource.REDIS):
    frame = frame_of()
    inference = Inference(frame, scores, None, Model("tray", "1", "ab" * 32), sent_s=10.02, received_s=10.14)
    threshold = Threshold(3.0, 2.0, 7, source, "ab" * 32)
    marks = (Region((0.1, 0.2, 0.3, 0.4), 5.0),)
    return part_of(ViewVerdict(frame, inference, Verdict(judgement, reasons, threshold), 10.15, marks, "c1/x.NG.jpg"))


def uninspected(cause):
    frame = frame_of(cause=cause)
    verdict = Verdict(Judgement.UNINSPECTED, (cause.value,))
    return part_of(ViewVerdict(frame, Inference(frame, cause=cause), verdict, 12.5))


def triggered(views=()):
    """Give a part of a trigger of which some views, at least one, are missing."""
    missing = tuple(MissingView(f"c{n}", required=n == 7, cause=cause) for n, cause in enumerate(Cause))
    part = Part("s1", "Gehäuse-7", "trigger", "tray", AT, 10.0, 12.0, meas_id="m-1", receipt=(0, 1))
    return PartVerdict(part, 3, Judgement.UNINSPECTED, ("deadline",), tuple(views), missing, 12.0, frozenset({"c1"}))


PARTS = {
    "ok": judged(Judgement.OK, (), Scores(0.5, 1.0, 9.0)),
    "ng": judged(Judgement.NG, ("score_above_ng", "anomaly_map"), Scores(3.5, 2.0, 11.0)),
    "review": judged(Judgement.REVIEW, ("score_above_review", "global_statistics"), Scores(2.5, 1.0, 19.0)),
    "nan": judged(Judgement.UNINSPECTED, ("score_not_finite",), Scores(float("nan"), float("inf"), 1.0)),
    **{f"limits from {source.value}": judged(Judgement.OK, (), Scores(0, 0, 0), source) for source in ThresholdSource},
    **{cause.value: uninspected(cause) for cause in Cause},
    "no view": triggered(),
    "some views": triggered(judged(Judgement.OK, (), Scores(0.5, 1.0, 9.0)).views),
}


def heartbeat(state="running", **fields):
    """Give what a worker says of itself; keywords replace fields."""
    said = {
        "worker": PLACE.worker,
        "host": "host",
        "line": "l1",
        "state": state,
        "interval_s": 10.0,
        "uptime_s": 99.5,
        "stages": [WorkerStageData(name="judge", age_s=0.03)],
        "stalled": [],
        "not_ready": ["triton"],
        "cameras": [WorkerCameraData(camera_id="c1", station="s1", state=state, reason="") for state in CameraState],
        "parts_open": 1,
        "parts_undelivered": 0,
        "unacknowledged": 7,
        "models": [
            WorkerModelData(
                product_id="tray", version="1", sha256="ab" * 32, threshold_version=7, threshold_source=source.value
            )
            for source in ThresholdSource
        ],
    }
    return HeartbeatData(**(said | fields))


def sent(mode):
    """Give every kind of event that a line sends, with the name of its schema."""
    encoder = Encoder(PLACE, mode)
    for name, part in PARTS.items():
        for event in encoder.part(part, decided_at=AT):
            yield f"{event.topic} {name}", "verdict.v1.json", event
    for reason in StrayReason:
        for part in (None, PARTS["ok"].part):
            stray = Stray(frame_of(), reason, part, Scores(0.5, float("nan"), 9.0) if part else None)
            name = f"audit.v1 {reason.value}{'' if part else ' of no known part'}"
            yield name, "audit.v1.json", encoder.audit(stray, AT)
    for state in CameraState:
        yield f"status.v1 {state.value}", "status.v1.json", encoder.status("c1", state, "timeout", AT)
    for state in ("running", "stopping"):
        yield f"heartbeat {state}", "heartbeat.v1.json", encoder.heartbeat(heartbeat(state, epoch=3), AT)


EVENTS = [
    pytest.param(schema, event, id=f"{mode} {name}")
    for mode in ("binary", "structured")
    for name, schema, event in sent(mode)
]


@pytest.fixture(scope="module")
def validators():
    """Validators of the committed schemas, by file name, formats included."""
    found = {path.name: json.loads(path.read_text()) for path in SCHEMAS.glob("*.json")}
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    return {name: jsonschema.Draft202012Validator(schema, format_checker=checker) for name, schema in found.items()}


def test_the_committed_schemas_are_the_codes(validators):
    """pipeline/schemas/ holds what `logicrd config schema --wire` prints, a file each, and nothing else."""
    assert {name: validator.schema for name, validator in validators.items()} == schemas(), AGAIN
    for validator in validators.values():
        validator.check_schema(validator.schema)


@pytest.mark.parametrize(("schema", "event"), EVENTS)
def test_every_event_is_one_to_others(validators, schema, event):
    """The CloudEvents SDK reads each event in either mode, and its data fit the committed schema."""
    message = KafkaMessage(headers=dict(event.headers), key=event.key, value=event.value)
    cloud = from_kafka(message, JSONFormat(), CloudEvent)
    assert cloud.get_specversion() == "1.0"
    assert cloud.get_source() == "/site/area/l1"
    kind = schema.removesuffix(".json")
    assert cloud.get_type() == f"io.logicrd.inspection.{event.topic if kind == 'verdict.v1' else kind}"
    assert event.topic == "status.v1" if kind == "heartbeat.v1" else event.topic in {kind, "view.v1"}
    assert cloud.get_time() == AT
    assert cloud.get_extension("partitionkey").encode() == event.key
    assert cloud.get_datacontenttype() == "application/json"
    validators[schema].validate(cloud.get_data())


@pytest.mark.parametrize(("schema", "event"), EVENTS)
def test_an_event_is_strict_json(schema, event):
    """No NaN and no infinity stands in a value: every JSON parser reads it."""
    del schema
    json.loads(event.value, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))


def test_the_mes_can_tell_every_inspection_apart():
    """Source and id together name one inspection; a part's view has an id beside it, and both name the part."""
    encoder = Encoder(PLACE, "binary")
    (view,) = PARTS["ok"].views
    parts = [part_of(replace(view, frame=frame_of(f"p-{number}"))) for number in range(50)]
    headers = [dict(event.headers) for part in parts for event in encoder.part(part, decided_at=AT)]
    assert len({(header["ce_source"], header["ce_id"]) for header in headers}) == 100
    assert {header["ce_subject"] for header in headers} == {f"p-{number}".encode() for number in range(50)}


def test_the_schema_says_what_the_line_can_say(validators):
    """Verdicts and states of the code are those of the schema; attribute names are lower-case words."""
    properties = validators["verdict.v1.json"].schema["properties"]
    assert set(properties["verdict"]["enum"]) == {judgement.value for judgement in Judgement}
    states = validators["status.v1.json"].schema["properties"]["state"]["enum"]
    assert set(states) == {state.value for state in CameraState}
    named = [name for _, _, event in sent("binary") for name, _ in event.headers]
    reasons = validators["audit.v1.json"].schema["properties"]["reason"]["enum"]
    assert set(reasons) == {reason.value for reason in StrayReason}
    assert all(re.fullmatch(r"ce_[a-z0-9]{1,20}|content-type", name) for name in named)
