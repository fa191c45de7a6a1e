"""The wire changes by addition alone: the schemas of today against those of the last release."""

import copy
import json
from pathlib import Path

import pytest
from schema_changes import breaking

SCHEMAS = Path(__file__).resolve().parents[2] / "pipeline/schemas"
RELEASED = max((SCHEMAS / "released").iterdir(), key=lambda folder: [int(step) for step in folder.name.split(".")])
TAKEN = {"trigger.v1.json", "cameras.v1.json"}
NAMES = sorted(path.name for path in RELEASED.glob("*.json"))


def read(folder, name):
    return json.loads((folder / name).read_text())


def direction(name):
    return "taken" if name in TAKEN else "sent"


@pytest.mark.parametrize("name", NAMES)
def test_nothing_that_was_released_is_broken(name):
    """Whoever reads or writes by the released schema can go on; `released/` has a folder a release."""
    assert (SCHEMAS / name).is_file(), f"{name} was released and is gone"
    assert breaking(read(RELEASED, name), read(SCHEMAS, name), direction(name)) == []


def changed(name, change):
    old = read(RELEASED, name)
    new = copy.deepcopy(old)
    change(new)
    assert new != old
    return breaking(old, new, direction(name))


def drop(mapping, key):
    del mapping[key]


BREAKS = {
    "a field of a verdict is gone": ("verdict.v1.json", lambda s: drop(s["properties"], "partId"), "$.partId: removed"),
    "a field of a view is gone": (
        "verdict.v1.json",
        lambda s: drop(s["$defs"]["ViewData"]["properties"], "frameId"),
        "$.views[].frameId: removed",
    ),
    "a field is no longer always there": (
        "verdict.v1.json",
        lambda s: s["required"].remove("sequence"),
        "$.sequence: no longer always there",
    ),
    "a number became text": (
        "verdict.v1.json",
        lambda s: s["properties"]["sequence"].update(type="string"),
        "$.sequence: type",
    ),
    "a field may be null": (
        "status.v1.json",
        lambda s: s["properties"].update(worker={"anyOf": [{"type": "string"}, {"type": "null"}]}),
        "$.worker: null is new",
    ),
    "a field can no longer be null": (
        "verdict.v1.json",
        lambda s: s["properties"].update(measId={"type": "string"}),
        "$.measId: null is gone",
    ),
    "a time is no time": (
        "verdict.v1.json",
        lambda s: drop(s["$defs"]["ViewData"]["properties"]["capturedAt"], "format"),
        "$.views[].capturedAt: format",
    ),
    "a trigger needs more": ("trigger.v1.json", lambda s: s["required"].append("measId"), "$.measId: newly required"),
    "a trigger may be shorter only": (
        "trigger.v1.json",
        lambda s: s["properties"]["partId"].update(maxLength=64),
        "$.partId: maxLength 128 became 64",
    ),
    "a trigger's letters are fewer": (
        "trigger.v1.json",
        lambda s: s["properties"]["partId"].update(pattern="^[0-9]+$"),
        "$.partId: pattern",
    ),
    "a trigger takes no other keys": (
        "trigger.v1.json",
        lambda s: s.update(additionalProperties=False),
        "other keys are no longer taken",
    ),
    "a kind of camera is gone": ("cameras.v1.json", lambda s: s["oneOf"].pop(), "is gone, or not what it was"),
    "a choice of a camera is gone": (
        "cameras.v1.json",
        lambda s: s["$defs"]["RtspCamera"]["properties"]["overflow"]["enum"].remove("wait"),
        "RtspCamera is gone, or not what it was",
    ),
}


@pytest.mark.parametrize(("name", "change", "told"), BREAKS.values(), ids=BREAKS)
def test_what_breaks_somebody_is_found(name, change, told):
    """The check can fail: each kind of breaking change is told with its place."""
    found = changed(name, change)
    assert len(found) == 1
    assert told in found[0]


ADDITIONS = {
    "a field more": ("verdict.v1.json", lambda s: s["properties"].update(shift={"type": "string"})),
    "a field more, always": (
        "verdict.v1.json",
        lambda s: (s["properties"].update(shift={"type": "string"}), s["required"].append("shift")),
    ),
    "a state more": ("status.v1.json", lambda s: s["properties"]["state"]["enum"].append("asleep")),
    "other words": ("status.v1.json", lambda s: s.update(description="Otherwise said.")),
    "a key more to send": ("trigger.v1.json", lambda s: s["properties"].update(shift={"type": "string"})),
    "a key less to send": ("trigger.v1.json", lambda s: s["required"].remove("station")),
    "longer names": ("trigger.v1.json", lambda s: s["properties"]["partId"].update(maxLength=256)),
    "a kind of camera more": ("cameras.v1.json", lambda s: s["oneOf"].append({"title": "New", "type": "object"})),
}


@pytest.mark.parametrize(("name", "change"), ADDITIONS.values(), ids=ADDITIONS)
def test_an_addition_breaks_nobody(name, change):
    """What only adds is allowed."""
    assert changed(name, change) == []
