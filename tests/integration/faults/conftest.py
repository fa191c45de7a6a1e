"""The fault suite's servers, its seed, the order of its cases and its table."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
import redis
from integration.faults.disk import enter_namespace
from integration.faults.pictures import LIMIT, write_pictures, write_video
from integration.faults.run import Bench
from integration.faults.servers import MODELS, PRODUCT, Servers
from integration.faults.table import Row, write

from pipeline.manifest import read_manifest


@pytest.fixture(scope="session")
def seed(pytestconfig: pytest.Config) -> int:
    """The number from which the order of the cases and every time in them is drawn."""
    return pytestconfig.getoption("fault_seed")


@pytest.fixture(scope="session")
def can_mount() -> bool:
    """Whether there may be a small disk; the mounts of this process are its own from now on."""
    return enter_namespace()


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
def bench(servers: Servers, can_mount: bool, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Pictures whose scores are known, and the limit between the good and the bad ones."""
    folder = tmp_path_factory.mktemp("pictures")
    film = folder / "film.mkv"
    write_video(film)
    sha = read_manifest(MODELS, PRODUCT).model_sha256
    fields = {"ng": str(LIMIT), "review": str(LIMIT), "version": "1", "model_sha256": sha}
    with redis.Redis.from_url(servers.redis_url) as client:
        client.hset(f"logicrd:threshold:{PRODUCT}", mapping=fields)
    return Bench(servers, film, write_pictures(folder), can_mount, _compiled_clock(folder))


@pytest.fixture(scope="session")
def note(request: pytest.FixtureRequest, pytestconfig: pytest.Config, seed: int) -> Callable[[Row], None]:
    """Note a case's result; where a table was asked for, it is written anew with each."""
    rows: list[Row] = []
    planned = sum("note" in getattr(item, "fixturenames", ()) for item in request.session.items)
    path, at = pytestconfig.getoption("fault_table"), datetime.now(UTC)

    def note(row: Row) -> None:
        rows.append(row)
        if path is not None:
            write(Path(path), rows, planned=planned, seed=seed, at=at)

    return note


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


def _compiled_clock(folder: Path) -> Path | None:
    if shutil.which("cc") is None:
        return None
    path = folder / "moved_clock.so"
    source = Path(__file__).with_name("moved_clock.c")
    subprocess.run(["cc", "-O2", "-Wall", "-Werror", "-shared", "-fPIC", "-o", path, source, "-ldl"], check=True)
    return path
