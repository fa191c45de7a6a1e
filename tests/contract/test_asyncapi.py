"""The AsyncAPI document: committed, what the code gives, valid, and true of the records."""

import copy
import json
from pathlib import Path

import jsonschema
import pytest
from wire_events import sent

from pipeline import asyncapi

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = ROOT / "pipeline/schemas/asyncapi.json"
AGAIN = "write it anew: `logicrd config schema --wire --out pipeline/schemas`"


@pytest.fixture(scope="module")
def document():
    return json.loads(COMMITTED.read_text())


@pytest.fixture(scope="module")
def official():
    """The AsyncAPI Initiative's own schema of AsyncAPI 3.0.0."""
    return jsonschema.Draft7Validator(json.loads((ROOT / "tests/data/asyncapi-3.0.0.schema.json").read_text()))


def test_the_committed_document_is_the_codes():
    """pipeline/schemas/asyncapi.json is what the command writes, byte by byte."""
    assert COMMITTED.read_text() == json.dumps(asyncapi.document(), indent=2) + "\n", AGAIN


def test_the_document_is_asyncapi(document, official):
    """It is valid by the official schema, which refuses a document without an action, or with an unknown login."""
    official.validate(document)
    for break_it in (
        lambda d: d["operations"]["send-verdict"].pop("action"),
        lambda d: d["components"]["securitySchemes"]["plain"].update(type="password"),
    ):
        broken = copy.deepcopy(document)
        break_it(broken)
        assert not official.is_valid(broken)


def test_every_reference_leads_somewhere(document):
    """No reference of the document is broken, and no message or schema lies there unused."""
    text = json.dumps(document)
    used = set()
    for part in text.split('"$ref": "#/')[1:]:
        steps = part.partition('"')[0].split("/")
        node = document
        for step in steps:
            node = node[step]
        used.add(tuple(steps[:3]))
    kinds = ("messages", "schemas", "securitySchemes")
    there = {("components", kind, name) for kind in kinds for name in document["components"][kind]}
    assert there - used == set()


def test_the_document_names_every_topic(document):
    """What the line sends and takes, with the direction as the line has it."""
    actions = {
        document["channels"][operation["channel"]["$ref"].rpartition("/")[2]]["address"]: operation["action"]
        for operation in document["operations"].values()
    }
    out = ("verdict", "view", "status", "audit", "dlq")
    assert actions == {
        **{f"{{prefix}}.{name}.v1": "send" for name in out},
        **{f"{{prefix}}.{name}.v1": "receive" for name in ("trigger", "cameras")},
    }


@pytest.mark.parametrize("mode", ["binary", "structured"])
def test_records_are_what_the_document_says(document, mode):
    """Headers and value of every event fit their message in that mode."""
    for _, schema, event in sent(mode):
        name = "heartbeat" if schema == "heartbeat.v1.json" else event.topic.removesuffix(".v1")
        channel = document["channels"][event.topic.removesuffix(".v1")]
        assert f"{name}.{mode}" in channel["messages"]
        message = document["components"]["messages"][f"{name}.{mode}"]
        headers = {name: text.decode() for name, text in event.headers}
        for schema, instance in ((message.get("headers", {}), headers), (message["payload"], json.loads(event.value))):
            jsonschema.Draft7Validator({**schema, "components": document["components"]}).validate(instance)
        assert headers["content-type"].partition(";")[0] == message["contentType"]
