"""The fault suite's servers, its seed, the order of its cases and its table."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import redis
import yaml
from integration.faults.load import VERDICTS, Topic
from integration.faults.run import Bench
from integration.faults.servers import PRODUCT, ROOT, Servers
from integration.faults.table import Row, write
from line_process import LineProcess

from pipeline.events import decode
from pipeline.manifest import read_manifest

_PICTURES = 8
_LINE = "reference"


@pytest.fixture(scope="session")
def seed(pytestconfig: pytest.Config) -> int:
    """The number from which the order of the cases and every time in them is drawn."""
    return pytestconfig.getoption("fault_seed")


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """The suite's own Triton, Kafka and Redis."""
    made = Servers(tmp_path_factory.mktemp("servers"))
    try:
        made.start()
        yield made
    finally:
        made.end()


@pytest.fixture(scope="session")
def bench(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Pictures, and what each scores on a line that nobody disturbs."""
    folder = tmp_path_factory.mktemp("reference")
    found = sorted((ROOT / "deploy/local/parts" / PRODUCT).glob("*.jpg"))
    pictures = {f"part-{number}.jpg": found[number * len(found) // _PICTURES] for number in range(_PICTURES)}
    (folder / "pictures").mkdir()
    for name, path in pictures.items():
        (folder / "pictures" / name).symlink_to(path)
    told = Topic(servers.kafka_address, VERDICTS, lambda key: key.startswith(f"{_LINE}/"))
    with LineProcess(_reference_line(servers, folder)) as line:
        line.wait(240)
    assert line.exit_code == 0, line.log()
    events = [decode(record.value, dict(record.headers)) for record in told.read()]
    told.close()
    scores = {event["data"]["partId"]: event["data"]["views"][0]["scores"]["fused"] for event in events}
    assert scores.keys() == pictures.keys()
    return Bench(servers, pictures, scores)


@pytest.fixture
def limits(servers: Servers, bench: Bench) -> Any:
    """Set the limit between the pictures, so that half of them are good; or below all, so that every part is NG."""
    sha = read_manifest(ROOT / "models_repo", PRODUCT).model_sha256
    ranked = sorted(bench.scores.values())
    between = (ranked[_PICTURES // 2 - 1] + ranked[_PICTURES // 2]) / 2

    def set_limits(*, all_bad: bool) -> None:
        limit = str(-1e9 if all_bad else between)
        fields = {"ng": limit, "review": limit, "version": "1", "model_sha256": sha}
        with redis.Redis.from_url(servers.redis_url) as client:
            client.hset(f"logicrd:threshold:{PRODUCT}", mapping=fields)

    return set_limits


@pytest.fixture(scope="session")
def rows(pytestconfig: pytest.Config, seed: int) -> Iterator[list[Row]]:
    """What is known of each case; written as a table at the end, where one was asked for."""
    rows: list[Row] = []
    yield rows
    path = pytestconfig.getoption("fault_table")
    if path is not None:
        write(Path(path), rows, seed=seed, at=datetime.now(UTC))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run the cases in an order that is the seed's; everything else stays where it is."""
    seed = config.getoption("fault_seed")
    ours = [index for index, item in enumerate(items) if item.get_closest_marker("fault_case")]
    shuffled = [items[index] for index in ours]
    random.Random(seed).shuffle(shuffled)
    for index, item in zip(ours, shuffled, strict=True):
        items[index] = item
    if ours:
        sys.stderr.write(f"fault seed: {seed}\n")


def _reference_line(servers: Servers, folder: Path) -> Path:
    endpoints = servers.endpoints()
    document = {
        "line": _LINE,
        "budget_ms": 120_000,
        "cameras": [{"id": "camera", "type": "folder", "product": PRODUCT, "path": str(folder / "pictures")}],
        "triton": {
            "address": endpoints["triton"],
            "models_repo": str(ROOT / "models_repo"),
            "startup_timeout_s": 120,
        },
        "kafka": {"bootstrap": [endpoints["kafka"]], "startup_timeout_s": 60},
        "redis": {"url": endpoints["redis"]},
    }
    path = folder / "line.yaml"
    path.write_text(yaml.safe_dump(document))
    return path
