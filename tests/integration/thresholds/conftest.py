"""A real Redis with the documented users, opened as each of them: by the store, a line's cache and the commands."""

from __future__ import annotations

import json
from contextlib import closing, contextmanager
from functools import partial

import commands
import pytest
import structlog
from integration.thresholds.watched import MODELS, USERS
from redis_server import RedisServer, make_certificates

from pipeline.health import Health
from pipeline.manifest import Manifest, read_manifest
from pipeline.metrics import Metrics
from pipeline.servers import Redis as RedisSettings
from pipeline.threshold_store import ThresholdStore
from pipeline.thresholds import ThresholdCache


@pytest.fixture(autouse=True)
def _logs_as_before():
    before = structlog.get_config()
    structlog.configure(processors=[structlog.testing.LogCapture()])
    yield
    structlog.configure(**before)


@pytest.fixture(scope="session")
def certificates(tmp_path_factory):
    return make_certificates(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="session")
def shared_server(tmp_path_factory, certificates):
    with RedisServer(tmp_path_factory.mktemp("redis"), certificates=certificates, users=USERS) as server:
        yield server


@pytest.fixture
def server(shared_server):
    """The server, empty."""
    with shared_server.admin() as admin:
        admin.flushall()
        admin.acl_log_reset()
    return shared_server


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    return read_manifest(MODELS, "cable-set")


@pytest.fixture
def store_of(server):
    """Open the store as one of the users; closed after the test."""
    stores = []

    def make(user, **more):
        store = ThresholdStore(RedisSettings.model_validate_json(json.dumps(server.settings(user, **more))))
        stores.append(store)
        return store

    yield make
    for store in stores:
        store.client.close()


@pytest.fixture
def watching(server, manifest, tmp_path):
    """Run the line's cache as the user `line`; gives it with its metrics."""

    @contextmanager
    def run(**more):
        values = server.settings("line", snapshot=str(tmp_path / "snapshot.json"), **more)
        settings = RedisSettings.model_validate_json(json.dumps(values))
        metrics = Metrics()
        cache = ThresholdCache(
            ThresholdStore(settings), {manifest.product: manifest}, settings, metrics=metrics, health=Health()
        )
        with closing(cache):
            cache.start()
            cache.metrics = metrics
            yield cache

    return run


@pytest.fixture
def logicrd(monkeypatch, capsys):
    """Run the command, in this process, as a shell would; gives exit code, stdout and stderr."""
    return partial(commands.run, monkeypatch, capsys)


@pytest.fixture
def answered(logicrd):
    """Run the command, which has to succeed; gives its JSON."""

    def run(*arguments):
        code, out, err = logicrd(*arguments, "--json")
        assert code == 0, err
        return json.loads(out)

    return run


@pytest.fixture
def line_of(server, line_file):
    """Write the line file of an engineer, on this file's Redis."""

    def write(user, stack=None, product="cable-set", **settings):
        made = line_file(stack, redis=server.settings(user), **settings)
        return made.camera(type="folder", path=".", product=product).write().rename(made.folder / f"{user}.yaml")

    return write
