"""The events as others read them: against the committed JSON Schemas, and with the CloudEvents SDK."""

import json
import re
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
from cloudevents.core.bindings.kafka import KafkaMessage, from_kafka
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent
from wire_events import AT, PARTS, PLACE, frame_of, part_of, sent

from pipeline.events import Encoder
from pipeline.types import CameraState, Judgement, StrayReason
from pipeline.wire import schemas

ROOT = Path(__file__).resolve().parents[2]
SCHEMAS = ROOT / "pipeline/schemas"
AGAIN = """write them anew: `logicrd config schema --wire --out pipeline/schemas`"""

EVENTS = [
    pytest.param(schema, event, id=f"{mode} {name}")
    for mode in ("binary", "structured")
    for name, schema, event in sent(mode)
]


@pytest.fixture(scope="module")
def validators():
    """Validators of the committed schemas, by file name, formats included."""
    found = {path.name: json.loads(path.read_text()) for path in SCHEMAS.glob("*.v1.json")}
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    return {name: jsonschema.Draft202012Validator(schema, format_checker=checker) for name, schema in found.items()}


def test_the_committed_schemas_are_the_codes(validators):
    """pipeline/schemas/ holds what `logicrd config schema --wire` prints, a file each, and no other."""
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
