"""Liveness and readiness: from the stages' own progress."""

import json
import time
import urllib.error
import urllib.request

import pytest

from pipeline import health as module
from pipeline.health import Health, HealthPage
from pipeline.metrics import Metrics


def get(page, path):
    """Give status and body of a page on this machine."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{page.port}{path}", timeout=5) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def test_a_stage_that_stops_coming_round_is_named(monkeypatch):
    """A stage without a heartbeat for `STALL_S` is stalled; one that ended on purpose is not."""
    health = Health()
    for stage in ("judge", "publisher", "camera c1"):
        health.beat(stage)
    assert health.stalled() == []
    now = time.monotonic()
    monkeypatch.setattr(module.time, "monotonic", lambda: now + module.STALL_S + 1)
    health.beat("publisher")
    health.retire("camera c1")
    assert health.stalled() == ["judge"]


def test_readiness_names_what_is_missing():
    """Readiness waits for every fact that was noted as false."""
    health = Health()
    health.ready("triton", state=False)
    health.ready("thresholds", state=True)
    assert health.missing() == ["triton"]
    health.ready("triton", state=True)
    assert health.missing() == []


def test_the_page_tells_what_is_wrong():
    """503 with the names while something is wrong, 200 otherwise; metrics are on the same port."""
    health, metrics = Health(), Metrics()
    with HealthPage(health, metrics.registry, "127.0.0.1", 0) as page:
        assert get(page, "/livez") == (200, b'{"stalled": []}')
        health.ready("triton", state=False)
        status, body = get(page, "/readyz")
        assert (status, json.loads(body)) == (503, {"missing": ["triton"]})
        status, body = get(page, "/metrics")
        assert status == 200
        assert b"inspection_verdict_latency_seconds" in body
        assert get(page, "/secrets")[0] == 404


def test_a_port_in_use_is_an_os_error():
    """Two pages cannot share a port: the second one says so instead of serving nothing."""
    health, metrics = Health(), Metrics()
    with HealthPage(health, metrics.registry, "127.0.0.1", 0) as page:
        second = HealthPage(health, metrics.registry, "127.0.0.1", page.port)
        with pytest.raises(OSError, match="in use"):
            second.__enter__()
