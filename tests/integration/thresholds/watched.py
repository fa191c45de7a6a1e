"""What the tests of thresholds share besides fixtures: changes, and how one sees what a line makes of them."""

from __future__ import annotations

import json
import time
from contextlib import closing
from pathlib import Path

from pipeline.limits import Change
from pipeline.servers import Redis as RedisSettings
from pipeline.threshold_store import CHANNEL, ThresholdStore

MODELS = Path(__file__).resolve().parents[3] / "models_repo"
USERS = {"line": "line", "anna": "engineer", "ben": "engineer", "shared": "engineer", "quinn": "quality"}


def until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def unused(cache, product):
    """The reasons for which the record is not used, as the metrics say."""
    (family,) = (each for each in cache.metrics.registry.collect() if each.name == "inspection_threshold_unused")
    return {each.labels["reason"] for each in family.samples if each.labels["product"] == product and each.value == 1}


def change(manifest, ng, review=None, **more):
    return Change(manifest.product, ng, ng if review is None else review, manifest.model_sha256, **more)


def spoil(server, key, fields):
    """Write by hand, as redis-cli does; None takes a field away."""
    with server.admin() as admin:
        for name, value in fields.items():
            admin.hset(key, name, value) if value is not None else admin.hdel(key, name)
        admin.publish(CHANNEL, b"\xff" * 100)


def tls(server, certificates, **more):
    url = f"rediss://127.0.0.1:{server.tls_port}/0"
    return server.settings("anna", url=url, ca_file=str(certificates.ca_crt)) | more


def asked(values):
    store = ThresholdStore(RedisSettings.model_validate_json(json.dumps(values)))
    with closing(store.client):
        return store.get("cable-set")
