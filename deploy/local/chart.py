"""What is generated in the chart: the table of values in its README, and the line file's blocks in its schema.

`chart.py` writes both, `chart.py --check` says whether they are as they would be written; by `make chart` and a test.
The table is made of the comments of `values.yaml` that begin with `# --`. The blocks are the definitions whose names
begin with a capital; the rest of the schema is written by hand.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from pipeline.config import schema

CHART = Path(__file__).resolve().parents[2] / "helm/logicrd"
BEGIN, END = "<!-- values: begin -->\n", "<!-- values: end -->\n"


def main(argv: list[str]) -> int:
    """Write what differs, or name it with --check; the exit code."""
    stale = {path: text for path, text in _generated().items() if not path.exists() or path.read_text() != text}
    if "--check" in argv:
        for path in stale:
            print(f"{path.name} is not what `make chart` would write", file=sys.stderr)
        return 5 if stale else 0
    for path, text in stale.items():
        path.write_text(text)
    return 0


def _generated() -> dict[Path, str]:
    readme, values_schema = CHART / "README.md", CHART / "values.schema.json"
    before, _, rest = readme.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    table = "".join(f"| {cell} |\n" for cell in rows((CHART / "values.yaml").read_text()))
    document = with_line_blocks(json.loads(values_schema.read_text()))
    return {
        readme: f"{before}{BEGIN}| value | default | what it is |\n|---|---|---|\n{table}{END}{after}",
        values_schema: json.dumps(document, indent=2) + "\n",
    }


def with_line_blocks(document: dict[str, Any]) -> dict[str, Any]:
    """Put the definitions of the line file's schema in place of those that the chart's schema has of it."""
    own = {name: block for name, block in document["definitions"].items() if not name[0].isupper()}
    return {**document, "definitions": {**own, **schema()["definitions"]}}


def rows(text: str) -> Iterator[str]:
    """Give one row of the table for each value that has a comment of its own."""
    lines = text.splitlines()
    for path, key, value in _entries(yaml.compose(text), ()):
        if said := _comment(lines, key.start_mark.line, key.start_mark.column):
            default = json.dumps(yaml.safe_load(yaml.serialize(value)), ensure_ascii=False)
            yield f"`{path}` | `{default}` | {said}"


def _entries(node: yaml.Node | None, path: tuple[str, ...]) -> Iterator[tuple[str, yaml.Node, yaml.Node]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*path, str(key.value))
            yield ".".join(here), key, value
            yield from _entries(value, here)


def _comment(lines: list[str], line: int, column: int) -> str:
    """Give the comment right above a key, if it begins with `# --`."""
    block: list[str] = []
    for above in reversed(lines[:line]):
        if not re.match(rf" {{{column}}}# ?", above):
            return ""
        block.append(above.strip().removeprefix("#").strip())
        if block[-1].startswith("-- "):
            return " ".join(reversed(block)).removeprefix("-- ").replace("|", "\\|")
    return ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
