"""A worker that may begin without Kafka, started before the real broker."""

from __future__ import annotations

import json
import os
import signal
import urllib.error
import urllib.request
from pathlib import Path

import cv2
import numpy as np
import pytest
from line_process import LineProcess, received, wait_until
from processes import LOOPBACK, free_ports

from pipeline.outbox import read_stored

pytestmark = pytest.mark.stack
LONG_S = 120.0


def missing(port: int) -> list[str]:
    """Say what the worker waits for, by its own page; `no page` where none answers."""
    try:
        with urllib.request.urlopen(f"http://{LOOPBACK}:{port}/readyz", timeout=5) as answer:
            return json.load(answer)["missing"]
    except urllib.error.HTTPError as error:
        return json.load(error)["missing"]
    except OSError:
        return ["no page"]


def verdicts_in(folder: Path) -> int:
    """Count the part verdicts that wait on disk; a file may be removed while it is looked for."""
    try:
        return sum(event.is_part for event in read_stored(folder))
    except OSError:
        return 0


def test_two_runs_without_a_broker_deliver_everything_when_it_comes(make_stack, stack, line_file, products, tmp_path):
    """The first run is killed with -9, the second begins on what it left, then the broker starts: every verdict of
    both arrives once, in order. Until then the worker judges, is alive, and waits for `kafka` alone to be ready."""
    kafka_port, page = free_ports(2)
    cv2.imwrite(str(tmp_path / "part.png"), np.zeros((64, 64, 3), np.uint8))
    settings = {"bootstrap": [f"{LOOPBACK}:{kafka_port}"], "required_at_start": False, "startup_timeout_s": 0.5}
    made = line_file(stack, kafka=settings, monitoring={"port": page})
    path = made.camera(type="folder", path=str(tmp_path), product=products[0], rate=4, loop=True).write()
    outbox = tmp_path / "outbox"
    with LineProcess(path) as line:
        wait_until(lambda: verdicts_in(outbox) >= 4, LONG_S, "verdicts on disk")
        assert missing(page) == ["kafka"]
        os.kill(line.pid, signal.SIGKILL)
        line.wait()
    first = verdicts_in(outbox)
    with LineProcess(path) as line:
        wait_until(lambda: verdicts_in(outbox) >= first + 4, LONG_S, "verdicts of the second run")
        assert "begins without Kafka" in line.log()
        broker = make_stack("--only", "kafka", "--free-ports", "--kafka-port", str(kafka_port))
        wait_until(lambda: missing(page) == [], LONG_S, "readiness")
        summary = line.stop()
    assert (line.exit_code, summary["stored"], summary["undelivered"]) == (0, 0, 0), line.log()
    found = received(broker.endpoints["kafka"], made.name)
    second = summary["triggered"]
    # Not `distinct`: a file that is read again is the same part, with the same id.
    assert [event["data"]["sequence"] for event in found.events] == [*range(1, first + 1), *range(1, second + 1)]
    assert second >= 4
