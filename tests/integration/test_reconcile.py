"""`logicrd reconcile` on the real broker: what a consumer sees, compared with what was due."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from kafka import KafkaProducer
from line_process import stopped, wait_until
from outbox_process import make

from pipeline.events import Encoder, Event, Place
from pipeline.outbox import Outbox
from pipeline.servers import Kafka
from pipeline.types import Cause, Judgement, MissingView, Part, PartVerdict

pytestmark = pytest.mark.stack
AT = datetime(2026, 11, 25, 6, 0, tzinfo=UTC)
ENDED_S = 3600.0  # how long ago the period of these tests lay


@pytest.fixture
def line(line_file, stack, products, tmp_path) -> Any:
    """A line with one station in mode `message`, never run: its topics are filled by the test."""
    made = line_file(stack, budget_ms=300_000)
    made.camera(type="folder", path=str(tmp_path), product=products[0], station="here")
    made.settings["stations"] = [{"name": "here", "trigger": "message"}]
    made.name = f"line-{uuid4().hex[:12]}"
    made.path = made.write()
    return made


class Topics:
    """Fills the topics of one line, at times of the test's choice."""

    def __init__(self, kafka: str, line: str) -> None:
        self._line = line
        self._producer = KafkaProducer(bootstrap_servers=[kafka], acks="all", linger_ms=5)
        self._at_s = time.time() - ENDED_S

    def event(self, number: int, judgement: Judgement = Judgement.OK, *, worker: str = "w1", **part: Any) -> Event:
        fields = {"part_id": f"part-{number}", "meas_id": "", "part_id_source": "trigger", **part}
        whole = Part("here", product="p", opened_at=AT, opened_s=0.0, deadline_s=1.0, **fields)
        missing = (MissingView("cam-1", required=True, cause=Cause.DEADLINE),)
        verdict = PartVerdict(whole, number, judgement, (), (), missing, 1.0)
        place = Place("site", "area", self._line, worker=worker, budget_ms=1000)
        *_, event = Encoder(place, "binary").part(verdict, decided_at=AT)
        return event

    def put(self, event: Event, after_s: float = 0.0) -> None:
        at_ms = int((self._at_s + after_s) * 1e3)
        self._producer.send(
            f"inspection.{event.topic}",
            key=event.key,
            value=event.value,
            headers=list(event.headers),
            timestamp_ms=at_ms,
        )

    def trigger(self, part_id: str, after_s: float = 0.0) -> None:
        value = json.dumps({"partId": part_id, "station": "here", "line": self._line}).encode()
        self.put(Event("trigger.v1", f"{self._line}/here".encode(), value, ()), after_s)

    def close(self) -> None:
        self._producer.flush(timeout=60)
        self._producer.close()


def reconcile(path: Path, *arguments: str) -> tuple[int, Any, str]:
    """Run the command; gives its exit code, its document and what it said on stderr."""
    command = [sys.executable, "-m", "pipeline.cli", "reconcile", "-c", str(path), "--json", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, json.loads(done.stdout) if done.stdout else None, done.stderr


def test_every_fault_of_an_hour_is_named_and_nothing_else(line, stack):
    """One part lost, one in conflict, one dead-lettered, one told twice, one triggered just now, one refused trigger:
    each is named for what it is with exit code 5, and the hour before, which was good, ends with 0."""
    topics = Topics(stack.endpoints["kafka"], line.name)
    for number in range(1, 101):
        topics.trigger(f"part-{number}", number)
        if number not in (50, 60):
            topics.put(topics.event(number), number + 0.5)
    topics.put(topics.event(70), 100)
    topics.put(topics.event(80, Judgement.NG), 100)
    dead = topics.event(60)
    topics.put(replace(dead, topic="dlq.v1", headers=(*dead.headers, ("logicrd_record", b"inspection.verdict.v1"))), 60)
    topics.put(Event("dlq.v1", b"", b"rubbish", (("logicrd_record", b"inspection.trigger.v1/0/1"),)), 61)
    topics.put(Event("verdict.v1", f"{line.name}/here".encode(), b"rubbish", ()), 62)
    topics.trigger("part-just-now", ENDED_S)
    topics.close()
    code, found, said = reconcile(line.path, "--from", "70m")
    assert (code, "2 parts without a verdict, 1 with two, 2 gaps" in said) == (5, True)
    assert [(each["part_id"], each["seen_as"], each["why"]) for each in found["missing"]] == [
        ("part-50", "trigger", ""),
        ("part-60", "trigger", "on the dead-letter topic"),
    ]
    (conflict,) = found["conflicts"]
    assert (conflict["part_id"], [each["verdict"] for each in conflict["verdicts"]]) == ("part-80", ["OK", "NG"])
    assert [(gap["first"], gap["last"]) for gap in found["gaps"]] == [(50, 50), (60, 60)]
    (row,) = found["stations"]
    assert (row["due"], row["OK"], row["open"], row["missing"], row["repeated"]) == (101, 98, 1, 2, 1)
    assert found["unreadable"] >= 1
    assert found["refused_triggers"] >= 1
    assert reconcile(line.path, "--from", "2h", "--to", "61m")[0] == 0


def test_a_period_is_that_of_the_records(line, stack):
    """A verdict told after the end answers a trigger within it; a trigger before the start is none of its business."""
    topics = Topics(stack.endpoints["kafka"], line.name)
    topics.trigger("part-before", -600)
    topics.trigger("part-1", 0)
    topics.put(topics.event(1), 1800)
    topics.put(topics.event(5), 1900)
    topics.close()
    code, found, _ = reconcile(line.path, "--from", "65m", "--to", "50m")
    assert (code, found["missing"], [row["due"] for row in found["stations"]]) == (0, [], [1])


def test_a_verdict_that_waits_in_the_outbox_is_not_missing(line, stack):
    """Kafka hung, and the worker ended with verdicts on disk: they are told as such, also while the next worker has the
    folder. With another folder in the line file they are missing; once delivered, the account closes without them."""
    address, pid = stack.endpoints["kafka"], stack.pid("kafka")
    topics = Topics(address, line.name)
    for number in range(1, 11):
        topics.trigger(f"part-{number}", number)
    topics.put(topics.event(1), 1.5)
    topics.close()
    kafka = Kafka(bootstrap=[address], startup_timeout_s=60)
    worker = make(kafka, line.folder / "outbox")
    worker.start()
    with stopped(pid):
        put_durably(worker, [topics.event(number) for number in range(2, 7)])
        put_durably(worker, [topics.event(number) for number in range(7, 11)])  # behind those that are under way
        assert worker.close(time.monotonic()).parts == 9
    code, found, said = reconcile(line.path, "--from", "70m")
    (row,) = found["stations"]
    assert (code, row["due"], row["missing"], row["OK"] + row["in outbox"]) == (0, 10, 0, 10), said
    assert row["in outbox"] >= 4
    line.settings["outbox"] = {"dir": "elsewhere"}
    code, found, _ = reconcile(line.write(), "--from", "70m")
    assert (code, len(found["missing"])) == (5, row["in outbox"])
    line.settings["outbox"] = {"dir": "outbox"}
    again = make(kafka, line.folder / "outbox")
    again.start()
    code, found, said = reconcile(line.write(), "--from", "70m")
    (row,) = found["stations"]
    assert (code, row["missing"], row["OK"] + row["in outbox"]) == (0, 0, 10), said
    assert again.close(time.monotonic() + 60).parts == 0
    code, found, said = reconcile(line.path, "--from", "70m")
    (row,) = found["stations"]
    assert (code, row["OK"], row["in outbox"], row["missing"]) == (0, 10, 0, 0), said


def put_durably(outbox: Outbox, events: list[Event]) -> None:
    """Put events and wait until the disk has them."""
    done: list[Event] = []
    for event in events:
        outbox.put(replace(event, done=partial(done.append, event)))
    wait_until(lambda: len(done) == len(events), 60, "the events on disk")


def test_a_topic_that_still_grows_ends(line, stack):
    """The command reads to the end that it found, while records go on coming."""
    topics = Topics(stack.endpoints["kafka"], line.name)
    for number in range(1, 501):
        topics.put(topics.event(number), number / 100)
    command = [sys.executable, "-m", "pipeline.cli", "reconcile", "-c", str(line.path), "--from", "2h"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    number = 500
    while process.poll() is None:
        number += 1
        topics.put(topics.event(number), number / 100)
        time.sleep(0.01)
    topics.close()
    assert process.returncode == 0
    process.communicate()


def test_what_is_down_is_exit_4(line_file, products, tmp_path):
    """Without a broker the answer is a refusal, not an empty account."""
    made = line_file(None, kafka={"startup_timeout_s": 0.5})
    made.camera(type="folder", path=str(tmp_path), product=products[0])
    code, found, said = reconcile(made.write(), "--from", "1h")
    assert (code, found) == (4, None)
    assert "Kafka" in said
