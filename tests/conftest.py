"""What tests share: a real stack on free ports, a line in a process of its own, and a consumer that trusts neither."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import structlog
import yaml

ROOT = Path(__file__).resolve().parents[1]
MODELS = ROOT / "models_repo"
STACK = ROOT / "deploy/local/stack.py"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of the fault suite; they are known here because this file is read first."""
    parser.addoption("--fault-seed", type=int, default=6, help="order and times of the fault suite (default: 6)")
    parser.addoption("--fault-table", help="write the fault suite's results to this file, as Markdown")


@dataclass
class Stack:
    """A running stack: where its servers are, and how to reach its processes."""

    state_dir: Path

    def state(self) -> dict[str, Any]:
        return json.loads((self.state_dir / "state.json").read_text())

    @property
    def endpoints(self) -> dict[str, str]:
        return self.state()["endpoints"]

    def pid(self, component: str) -> int:
        return self.state()["components"][component]["pid"]


@pytest.fixture(autouse=True)
def _logs_as_before() -> Iterator[None]:
    """The commands set up logging for a process of their own: put it back."""
    before = structlog.get_config()
    yield
    structlog.configure(**before)


@pytest.fixture(scope="session")
def make_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Stack]]:
    """Start stacks on free ports; all are stopped at the end, whatever happened."""
    started: list[Path] = []

    def make(*arguments: str) -> Stack:
        folder = tmp_path_factory.mktemp("stack")
        command = [sys.executable, str(STACK), "up", "--state-dir", str(folder), "--free-ports", "--json", *arguments]
        started.append(folder)
        subprocess.run(command, check=True, timeout=300, stdout=subprocess.DEVNULL)
        return Stack(folder)

    yield make
    for folder in started:
        subprocess.run([sys.executable, str(STACK), "down", "--state-dir", str(folder)], check=True, timeout=60)


@pytest.fixture(scope="session")
def stack(make_stack: Callable[..., Stack]) -> Stack:
    """The stack that most tests share, serving the repository's own models."""
    return make_stack("--models", str(MODELS))


@pytest.fixture(scope="session")
def products() -> list[str]:
    """The products that the repository ships."""
    return sorted(path.parent.name for path in MODELS.glob("*/manifest.json"))


@dataclass
class LineFile:
    """A line file in the making; `write` gives its path."""

    folder: Path
    endpoints: dict[str, str]
    name: str
    cameras: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    def camera(self, **values: Any) -> LineFile:
        self.cameras.append({"id": f"cam-{len(self.cameras) + 1}", **values})
        return self

    def write(self) -> Path:
        document: dict[str, Any] = {
            "line": self.name,
            "budget_ms": 20_000,
            "drain_timeout_s": 60,
            "cameras": self.cameras,
            "triton": {"address": self.endpoints.get("triton", "127.0.0.1:9"), "models_repo": str(MODELS)},
            "kafka": {"bootstrap": [self.endpoints.get("kafka", "127.0.0.1:9")]},
            "redis": {"url": self.endpoints.get("redis", "redis://127.0.0.1:9/0")},
        }
        for key, value in self.settings.items():
            document[key] = {**document[key], **value} if isinstance(document.get(key), dict) else value
        path = self.folder / "line.yaml"
        path.write_text(yaml.safe_dump(document))
        return path


@pytest.fixture
def line_file(tmp_path: Path, request: pytest.FixtureRequest) -> Callable[..., LineFile]:
    """Make a line file on a stack; the line is named after the test, so that its verdicts are told apart."""

    def make(stack: Stack | None, **settings: Any) -> LineFile:
        name = re.sub(r"[^A-Za-z0-9]+", "-", request.node.name).strip("-")[-60:].lstrip("-")
        return LineFile(tmp_path, stack.endpoints if stack is not None else {}, name, settings=settings)

    return make
