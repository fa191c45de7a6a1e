"""Liveness comes from each stage's own progress: one that hangs is named on /livez, whichever it is.

The hang is put in by hand, at what the stage waits for: no real server leads to one, for every wait has an end. Where
the world can do it (a picture that is a pipe without a writer), it does.
"""

from __future__ import annotations

import gc
import json
import os
import threading
import urllib.error
import urllib.request
from contextlib import suppress
from types import SimpleNamespace

import pytest
from line_process import wait_until

from pipeline import config, health
from pipeline.app import Line
from pipeline.cameras import FolderCamera
from pipeline.events import Event
from pipeline.health import HealthPage
from pipeline.heartbeat import Heartbeat
from pipeline.rollouts import Rollout


@pytest.fixture
def line(line_file, models_repo):
    """A line that was not started: its stages are there, its servers are not."""
    keys = {"cameras": [], "pool": {}, "triton": {"models_repo": str(models_repo), "address": "127.0.0.1:9"}}
    return Line(config.load(line_file(**keys)))


def hang_publisher(line):
    sink = line._outbox._sink
    sink._producer = SimpleNamespace()
    sink._waiting.append(Event("verdict.v1", b"k", b"v", ()))
    return sink, "_send", sink._thread


def hang_outbox(line):
    line._outbox._journal = SimpleNamespace()
    return line._outbox, "_turn", line._outbox._thread


def hang_probes(line):
    pool = line._inference._pool
    pool._ask_names()
    return pool, "_probe", pool._threads[1]


STAGES = {
    "judge": lambda line: (line._judge, "_turn", line._judge._thread),
    "dispatcher": lambda line: (line._batcher, "take", line._dispatcher),  # stopped by the line
    "outbox": hang_outbox,
    "publisher": hang_publisher,
    "thresholds": lambda line: (line._thresholds, "_follow", line._thresholds._thread),
    "triggers": lambda line: (line._triggers, "_read", line._triggers._thread),
    "camera pool": lambda line: (line._pool, "_turn", line._pool._thread),
    "triton-probes": hang_probes,
    "heartbeat": lambda line: (line._heartbeat, "_tell", line._heartbeat._thread),
}


def alive(line):
    """Ask /livez; gives the stages that it names."""
    with HealthPage(line.health, line.metrics.registry, "127.0.0.1", 0) as page:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{page.port}/livez", timeout=10).close()
        except urllib.error.HTTPError as error:
            with error:
                return json.loads(error.read())["stalled"] if error.code == 503 else [str(error)]
    return []


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_that_hangs_is_named(stage, line, monkeypatch):
    """/livez turns to 503 and names the stage, and no other."""
    monkeypatch.setattr(health, "STALL_S", 1.0)
    line._triggers._consumer = SimpleNamespace(commit=lambda *_, **__: None, close=lambda: None)
    owner, call, thread = STAGES[stage](line)
    gate = threading.Event()

    monkeypatch.setattr(owner, call, lambda *_, **__: gate.wait(60) and None)
    line.health.beat(stage)  # as the start of the stage does
    thread.start()
    try:
        wait_until(lambda: alive(line) == [stage], 30, f"{stage} on /livez")
    finally:
        for stop in (getattr(owner, "_stop", None), line._stop_dispatch):
            if stop is not None:
                stop.set()
        gate.set()
        thread.join(10)
    assert not thread.is_alive()


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # Pillow leaves the pipe to the collector
def test_a_camera_whose_read_hangs_is_named(line, tmp_path, monkeypatch):
    """A folder's picture that is a pipe without a writer blocks the reader for ever: /livez names the camera."""
    monkeypatch.setattr(health, "STALL_S", 1.0)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    os.mkfifo(pictures / "0.png")
    line.cameras.prepare(FolderCamera(id="c1", type="folder", product="tray", station="s1", path=pictures))
    line.cameras.start()
    try:
        wait_until(lambda: alive(line) == ["camera c1"], 30, "camera c1 on /livez")
    finally:
        line.cameras.stop()
        with suppress(OSError):
            os.close(os.open(pictures / "0.png", os.O_WRONLY | os.O_NONBLOCK))
        line.cameras.join(0.0)
        gc.collect()


def test_a_stage_that_never_comes_round_is_named(line, monkeypatch):
    """A thread that dies before its first turn has beaten once, at its start, and is missed like another."""
    monkeypatch.setattr(health, "STALL_S", 0.0)
    monkeypatch.setattr(line._judge, "_run", lambda: None)
    line._judge._thread = threading.Thread(target=line._judge._run)
    line._judge.start()
    line._judge._thread.join(10)
    wait_until(lambda: alive(line) == ["judge"], 30, "the judge on /livez")


ROLLOUT = Rollout(mode="shadow", version=2, model_sha256="cd" * 32, percent=10, at="now", by="anna")


@pytest.fixture
def told(line):
    """A heartbeat whose events are kept, oldest first, and confirmed by the test."""
    events = []
    beat = Heartbeat(
        0.1,
        line._manifests,
        line._thresholds,
        epoch=lambda: 3,
        refused=lambda product: "not served" if product == "tray" else "",
        candidate=lambda product: (ROLLOUT, "given up") if product == "tray" else None,
        encoder=line._encoder,
        put=events.append,
        metrics=line.metrics,
        health=line.health,
    )
    return SimpleNamespace(events=events, beat=beat)


def test_a_heartbeat_waits_for_the_last_one(told):
    """While Kafka confirms nothing there is one heartbeat; then they go on, and the last one says `stopping`."""
    told.beat.start()
    wait_until(lambda: told.events, 10, "a heartbeat")
    threading.Event().wait(1.0)
    assert len(told.events) == 1
    told.events[0].done()
    wait_until(lambda: len(told.events) == 2, 10, "another one")
    told.beat.close()
    states = [json.loads(event.value)["state"] for event in told.events]
    assert states == ["running", "running", "stopping"]
    assert {event.key for event in told.events} == {f"worker/l1/{json.loads(told.events[0].value)['host']}".encode()}


def test_a_heartbeat_says_how_the_worker_is(line, told):
    """Stages with their ages, those that hang, cameras with their state, open parts, models and limits, the epoch; of
    a product what was refused, and how the version on trial does."""
    line.health.beat("judge")
    line.health.ready("triton", state=False)
    line.metrics.camera("c1", product="tray", station="s1")
    line.metrics.triggered("s1", 2)
    line.metrics.parts_open({"s1": 2})
    line.metrics.unacknowledged.set(5)
    line.metrics.candidates.labels("tray", "2", "agreed").inc(7)
    line.metrics.candidates.labels("tray", "2", "disagreed").inc(2)
    said = told.beat._look("running").model_dump(by_alias=True)
    assert [stage["name"] for stage in said["stages"]] == ["judge"]
    assert 0 <= said["stages"][0]["ageS"] < 60
    assert said["notReady"] == ["triton"]
    assert said["cameras"] == [{"cameraId": "c1", "station": "s1", "state": "connecting", "reason": ""}]
    assert (said["partsOpen"], said["unacknowledged"], said["epoch"]) == (2, 5, 3)
    assert [model["productId"] for model in said["models"]] == sorted(line._manifests)
    models = {model["productId"]: model for model in said["models"]}
    assert models["tray"]["refused"] == "not served"
    tried = models["tray"]["candidate"]
    assert (tried["version"], tried["mode"], tried["refused"]) == ("2", "shadow", "given up")
    assert (tried["agreed"], tried["disagreed"], tried["dropped"]) == (7, 2, 0)
    assert all(model["candidate"] is None for product, model in models.items() if product != "tray")
