"""The log's one line a part."""

import json
import threading
from datetime import UTC, datetime

import pytest
from line_process import wait_until

from pipeline.events import Encoder, Place
from pipeline.metrics import Metrics
from pipeline.part_log import _MAX_WAITING, PartLog, line
from pipeline.types import Cause, Judgement, MissingView

PLACE = Place("site", "area", "l1", worker="w1", budget_ms=2000.0)
AT = datetime(2026, 11, 23, 12, 0, 1, 500_000, tzinfo=UTC)


def event_of(part, mode="binary"):
    return Encoder(PLACE, mode).part(part, decided_at=AT)[-1]


@pytest.mark.parametrize("mode", ["binary", "structured"])
def test_a_line_says_what_the_event_says(make_part, mode):
    """Who, what, why, how long, and judged by which versions."""
    event = event_of(make_part(sequence=42), mode)
    said = line(event)
    assert datetime.fromisoformat(said.pop("timestamp")).tzinfo is not None
    assert said.pop("inspectionId")
    assert said == {
        "event": "part",
        "level": "info",
        "traceId": None,
        "partId": "part-1",
        "partIdSource": "sei",
        "serial": "part-1",
        "measId": None,
        "line": "l1",
        "station": "s1",
        "productId": "tray",
        "sequence": 42,
        "verdict": "NG",
        "causes": ["score_above_ng", "anomaly_map"],
        "missing": {},
        "score": 3.5,
        "scores": {"c1": 3.5},
        "latencyMs": 150.0,
        "late": False,
        "modelVersion": "1",
        "modelSha256": "ab" * 32,
        "thresholdVersion": 7,
        "thresholdSource": "redis",
    }


def test_a_part_that_nobody_saw_has_a_line(make_part):
    """Without views there is no score, model or limit, and the camera is named with its cause."""
    missing = (MissingView("c1", True, Cause.CAMERA_LOST),)
    part = make_part(views=(), missing=missing, judgement=Judgement.UNINSPECTED, reasons=("camera_lost",))
    said = line(event_of(part))
    assert (said["verdict"], said["causes"], said["missing"]) == ("UNINSPECTED", ["camera_lost"], {"c1": "camera_lost"})
    assert [said[key] for key in ("score", "modelVersion", "thresholdVersion")] == [None, None, None]


def test_every_part_is_written_and_none_after_the_end(make_part, capsys):
    """OK parts too; `close` writes what is queued."""
    log = PartLog(Metrics())
    log.start()
    for number in range(3):
        log.put(event_of(make_part(sequence=number)))
    log.close(10.0)
    assert [json.loads(text)["sequence"] for text in capsys.readouterr().err.splitlines()] == [0, 1, 2]


def test_a_log_that_stands_still_costs_lines_and_holds_nobody(make_part, monkeypatch):
    """While a write hangs, `put` comes back at once; lines beyond the bound are counted."""
    free, written = threading.Event(), []
    monkeypatch.setattr("pipeline.part_log.write_line", lambda text: (free.wait(60), written.append(text)))
    metrics, event = Metrics(), event_of(make_part())
    log = PartLog(metrics)
    log.start()
    log.put(event)
    wait_until(lambda: log._waiting.empty(), 30, "the thread to write")
    for _ in range(_MAX_WAITING + 2):
        log.put(event)
    assert metrics.registry.get_sample_value("inspection_part_lines_dropped_total") == 2
    log.close(0.05)
    free.set()
    wait_until(lambda: len(written) == _MAX_WAITING + 1, 60, "the rest")
