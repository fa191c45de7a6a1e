"""The line file's JSON Schema, as editors and charts read it: committed, and held equal to the code."""

import json
import re
from pathlib import Path

import jsonschema
import pytest
import yaml

from pipeline import config

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "deploy/config"
COMMITTED = CONFIG / "config.schema.json"
AGAIN = "write it anew: `logicrd config schema > deploy/config/config.schema.json`"


@pytest.fixture(scope="module")
def validator():
    document = json.loads(COMMITTED.read_text())
    jsonschema.Draft7Validator.check_schema(document)
    return jsonschema.Draft7Validator(document)


def test_the_committed_schema_is_the_codes():
    """deploy/config/config.schema.json is what `logicrd config schema` prints, byte by byte."""
    assert COMMITTED.read_text() == json.dumps(config.schema(), indent=2) + "\n", AGAIN


def test_the_schema_is_draft_07(validator):
    """The schema names draft-07, is valid as such, and uses none of the words that draft-07 would pass over."""
    text = json.dumps(validator.schema)
    assert validator.schema["$schema"] == "http://json-schema.org/draft-07/schema#"
    assert not re.search(r'"(\$defs|prefixItems|unevaluatedProperties|dependentRequired)"', text)
    references = set(re.findall(r'"\$ref": "#/definitions/(\w+)"', text))
    assert references == set(re.findall(r'"\$ref": "[^"]*?(\w+)"', text))
    assert references <= set(validator.schema["definitions"])


@pytest.mark.parametrize("path", sorted(CONFIG.glob("*.yaml")), ids=lambda path: path.name)
def test_a_shipped_line_file_is_good(validator, path):
    """Every line file that is shipped fits the schema, loads, and tells editors where the schema is."""
    validator.validate(yaml.safe_load(path.read_text()))
    assert config.load(path).cameras
    modeline = path.read_text().splitlines()[0]
    assert modeline.startswith(config.MODELINE)
    assert (path.parent / modeline.removeprefix(config.MODELINE)).resolve() == COMMITTED.resolve()


def test_there_is_an_example():
    """A newcomer finds a line file to start from."""
    assert (CONFIG / "line.yaml").is_file()


LINE = {"line": "l1", "cameras": [{"id": "c1", "type": "rtsp", "product": "tray", "url": "rtsp://camera/1"}]}


@pytest.mark.parametrize(
    ("change", "good"),
    [
        ({}, True),
        ({"bugdet_ms": 1}, False),
        ({"budget_ms": "fast"}, False),
        ({"budget_ms": 0}, False),
        ({"cameras": []}, False),
        ({"cameras": [LINE["cameras"][0] | {"type": "rtps"}]}, False),
        ({"cameras": [LINE["cameras"][0] | {"path": "x"}]}, False),
        ({"cameras": [LINE["cameras"][0] | {"url": "http://camera/1"}]}, False),
        ({"kafka": {"content_mode": "structured"}}, True),
        ({"kafka": {"content_mode": "avro"}}, False),
        ({"redis": {"snapshot": None}}, True),
    ],
)
def test_schema_and_code_agree(validator, tmp_path, change, good):
    """What the schema refuses the code refuses, and the other way round."""
    document = LINE | change
    path = tmp_path / "line.yaml"
    path.write_text(yaml.safe_dump(document))
    assert validator.is_valid(document) is good
    if good:
        assert config.load(path).line == "l1"
    else:
        with pytest.raises(config.ConfigError):
            config.load(path)


def test_every_key_is_explained(validator):
    """Each key of the line file has a description, its own or its block's, which editors show."""
    definitions = validator.schema["definitions"]
    silent = [
        f"{block['title']}.{key}"
        for block in [validator.schema, *definitions.values()]
        for key, entry in block.get("properties", {}).items()
        if not ({"description", "const"} & (entry | definitions.get(entry.get("$ref", "")[14:], {})).keys())
    ]
    assert silent == []
