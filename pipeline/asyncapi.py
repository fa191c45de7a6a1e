"""The contract on Kafka as one AsyncAPI 3.0 document: topics, directions, keys, headers, both content modes, logins.

Made of the JSON Schemas of `wire`; `pipeline/schemas/asyncapi.json` is what this gives, and a test holds them equal.
Pure. Called by the command line.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal

from pipeline.wire import schemas

_STATION_KEY = "<line>/<station>, so that the verdicts of a station stay in order"
_CAMERA_KEY = "id of the camera"
_ATTRIBUTES = {
    "specversion": {"const": "1.0", "description": "Version of CloudEvents."},
    "id": {"description": "Deterministic; `source` and `id` together are what consumers deduplicate by."},
    "source": {"description": "`/<site>/<area>/<line>`."},
    "subject": {"description": "Id of the part; of the camera for its state."},
    "time": {"format": "date-time", "description": "When it was decided."},
    "partitionkey": {"description": "The record's key."},
}
# Of a part that is traced; for the line's own spans, and for whoever goes on with the trace.
_TRACE = {"type": "string", "description": "W3C trace context of a part that is traced; not there for the others."}
_DEAD_LETTER_HEADERS = {
    "logicrd_error": "What was wrong with the record.",
    "logicrd_record": "Where it lay: `<topic>/<partition>/<offset>`.",
    "logicrd_worker": "Who refused it.",
    "logicrd_cut_from": "Length of the value in bytes, where it was cut.",
}


@dataclass(frozen=True, slots=True)
class _Kind:
    """One kind of record: its event type and the schema of its data; None for records as they came."""

    name: str
    schema: str | None
    key: str
    text: str


@dataclass(frozen=True, slots=True)
class _Topic:
    """One topic: whether the line sends or receives, and what lies in it."""

    name: str
    action: Literal["send", "receive"]
    text: str
    kinds: tuple[_Kind, ...]


def _topic(name: str, action: Literal["send", "receive"], schema: str | None, key: str, text: str) -> _Topic:
    return _Topic(name, action, text, (_Kind(name, schema, key, text),))


_STATUS = _Kind("status", "status", _CAMERA_KEY, "A camera changed its state.")
_HEARTBEAT = _Kind("heartbeat", "heartbeat", "worker/<line>/<host>", "A worker says how it is, every few seconds.")
_TOPICS = (
    _topic("verdict", "send", "verdict", _STATION_KEY, "One event a part: what a MES reads."),
    _topic("view", "send", "verdict", _STATION_KEY, "One event a frame: what that view alone says."),
    _Topic("status", "send", "How cameras and workers are.", (_STATUS, _HEARTBEAT)),
    _topic("audit", "send", "audit", _STATION_KEY, "A frame, or scores, that count for no verdict."),
    _topic("dlq", "send", None, "as it came", "A record that could not be used, as it came, with the reason."),
    _topic("trigger", "receive", "trigger", "any; <line>/<station> keeps order", "A part is in front of the cameras."),
    _topic(
        "cameras", "receive", "cameras", _CAMERA_KEY, "Compacted: the cameras that workers share; null removes one."
    ),
)


def document() -> dict[str, Any]:
    """Give the AsyncAPI document."""
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "LogicRD inspection line",
            "version": version("logicrd"),
            "description": "Verdicts, states and audit events of a line, and the triggers and cameras that it takes.",
        },
        "defaultContentType": "application/json",
        "servers": _servers(),
        "channels": {topic.name: _channel(topic) for topic in _TOPICS},
        "operations": {f"{topic.action}-{topic.name}": _operation(topic) for topic in _TOPICS},
        "components": {
            "schemas": _components(),
            "messages": {name: message for topic in _TOPICS for name, message in _messages(topic).items()},
            "securitySchemes": {
                "scramSha512": {"type": "scramSha512"},
                "scramSha256": {"type": "scramSha256"},
                "plain": {"type": "plain", "description": "User and password; over TLS only."},
                "certificate": {"type": "X509", "description": "Certificate of the client."},
            },
        },
    }


def _servers() -> dict[str, Any]:
    bootstrap = {"bootstrap": {"default": "127.0.0.1:19092", "description": "`kafka.bootstrap` of the line file."}}
    logins = [{"$ref": f"#/components/securitySchemes/{name}"} for name in ("scramSha512", "scramSha256")]
    tls = [*logins, *({"$ref": f"#/components/securitySchemes/{name}"} for name in ("plain", "certificate"))]
    return {
        "tls": {"host": "{bootstrap}", "protocol": "kafka-secure", "variables": bootstrap, "security": tls},
        "plain": {"host": "{bootstrap}", "protocol": "kafka", "variables": bootstrap, "security": logins},
    }


def _channel(topic: _Topic) -> dict[str, Any]:
    return {
        "address": f"{{prefix}}.{topic.name}.v1",
        "description": topic.text,
        "parameters": {"prefix": {"default": "inspection", "description": "`kafka.topic_prefix` of the line file."}},
        "messages": {name: {"$ref": f"#/components/messages/{name}"} for name in _messages(topic)},
        **(
            {"bindings": {"kafka": {"topicConfiguration": {"cleanup.policy": ["compact"]}}}} if _is_table(topic) else {}
        ),
    }


def _operation(topic: _Topic) -> dict[str, Any]:
    return {
        "action": topic.action,
        "channel": {"$ref": f"#/channels/{topic.name}"},
        "summary": topic.text,
        "messages": [{"$ref": f"#/channels/{topic.name}/messages/{name}"} for name in _messages(topic)],
    }


def _messages(topic: _Topic) -> dict[str, Any]:
    """Give the forms of a topic's records: CloudEvents of both modes, and plain JSON where that is taken or written."""
    return {name: form for kind in topic.kinds for name, form in _forms(kind, sent=topic.action == "send").items()}


def _forms(kind: _Kind, *, sent: bool) -> dict[str, Any]:
    key = {"kafka": {"key": {"type": "string", "description": kind.key}}}
    if kind.schema is None:
        headers = {name: {"type": "string", "description": text} for name, text in _DEAD_LETTER_HEADERS.items()}
        return {kind.name: {"headers": _object(headers, list(headers)[:3]), "payload": {}, "bindings": key}}
    data = {"$ref": f"#/components/schemas/{kind.schema}"}
    plain = {"title": kind.text, "contentType": "application/json", "payload": data, "bindings": key}
    if kind.schema == "cameras":
        return {kind.name: plain}
    attributes = _attributes(kind, sent=sent)
    required = [name for name in attributes if sent or name in ("specversion", "id", "source", "type")]
    headers = {f"ce_{name}": entry for name, entry in attributes.items()}
    binary = _object({**headers, "content-type": {"const": "application/json"}}, [f"ce_{name}" for name in required])
    envelope = {**attributes, "datacontenttype": {"const": "application/json"}, "data": data}
    structured = {
        "title": kind.text,
        "contentType": "application/cloudevents+json",
        "payload": _object(envelope, [*required, "data"]),
        "bindings": key,
    }
    if kind.name in ("verdict", "view"):
        binary["properties"] |= {"ce_traceparent": _TRACE, "traceparent": _TRACE}
        structured["headers"] = _object({"traceparent": _TRACE}, [])
        envelope["traceparent"] = _TRACE
    forms = {f"{kind.name}.binary": {**plain, "headers": binary}, f"{kind.name}.structured": structured}
    return forms if sent else {kind.name: plain, **forms}


def _is_table(topic: _Topic) -> bool:
    return any(kind.schema == "cameras" for kind in topic.kinds)


def _attributes(kind: _Kind, *, sent: bool) -> dict[str, Any]:
    of_type = {"const": f"io.logicrd.inspection.{kind.name}.v1"} if sent else {}
    first, *rest = ({name: {"type": "string", **entry}} for name, entry in _ATTRIBUTES.items())
    return {
        name: entry for part in (first, {"type": {"type": "string", **of_type}}, *rest) for name, entry in part.items()
    }


def _object(properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required}


def _components() -> dict[str, Any]:
    """Put the schemas and their definitions side by side: an AsyncAPI document has one place for all."""
    found: dict[str, Any] = {}
    for name, schema in schemas().items():
        # AsyncAPI's schemas have no dialect to name, and another kind of discriminator.
        text = json.dumps({key: value for key, value in schema.items() if key not in ("$schema", "discriminator")})
        whole = json.loads(text.replace("#/$defs/", "#/components/schemas/"))
        found |= whole.pop("$defs", {})
        found[name.removesuffix(".v1.json")] = whole
    return found
