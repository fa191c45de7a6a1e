"""Parts on the real stack: several views, triggers from Kafka, a changeover, a worker that dies with a part open."""

from __future__ import annotations

import json
import os
import signal
from datetime import UTC, datetime, timedelta
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import cv2
import numpy as np
import pytest
from kafka import KafkaConsumer
from kafka.structs import TopicPartition
from line_process import LineProcess, received, wait_until

from pipeline.servers import Kafka
from pipeline.tail import VerdictReader

pytestmark = pytest.mark.stack
STATION = "here"
TRIGGERS = "inspection.trigger.v1"


def write_pictures(folder: Path, *numbers: int) -> str:
    """Write one soft random picture a number, `part-<number>.png`: its name is the part's id."""
    folder.mkdir(parents=True)
    for number in numbers:
        grain = np.random.default_rng(number).integers(0, 255, (12, 16, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / f"part-{number}.png"), cv2.resize(grain, (640, 480)))
    return str(folder)


def by_part(verdicts) -> dict[str, dict[str, Any]]:
    return {event["data"]["partId"]: event["data"] for event in verdicts.events}


def audited(kafka: str, line: str) -> list[tuple[str, str, str, bool]]:
    """Reason, camera, part and lateness of each audit event of a line."""
    with VerdictReader(Kafka(bootstrap=[kafka]), topic="audit.v1", start="first") as reader:
        found = [event["data"] for event in reader.read_to_end() if (event["key"] or "").startswith(f"{line}/")]
    return [(data["reason"], data["cameraId"], data["partId"], data["late"]) for data in found]


def dead_letters(kafka: str, key: str) -> list[dict[str, bytes]]:
    """Value and headers of what lies on the dead-letter topic under a key."""
    consumer = KafkaConsumer(bootstrap_servers=[kafka], enable_auto_commit=False)
    topic = "inspection.dlq.v1"
    partitions = [TopicPartition(topic, number) for number in consumer.partitions_for_topic(topic)]
    consumer.assign(partitions)
    consumer.seek_to_beginning()
    ends, found = consumer.end_offsets(partitions), []
    while any(consumer.position(partition) < end for partition, end in ends.items()):
        records = chain.from_iterable(consumer.poll(timeout_ms=250).values())
        found += [{"value": each.value, **dict(each.headers)} for each in records if each.key == key.encode()]
    consumer.close()
    return found


def started(line: LineProcess) -> None:
    wait_until(lambda: "line started" in line.log(), 60, "a started line")


@pytest.mark.usefixtures("lenient")
def test_two_cameras_make_one_part_and_a_late_frame_changes_nothing(stack, line_file, products, tmp_path):
    """Same id, one verdict with both views; a view that comes after the deadline is named missing, then audited."""
    made = line_file(stack, budget_ms=5000)
    quick, slow = write_pictures(tmp_path / "a", 1, 2, 3), write_pictures(tmp_path / "b", 1, 2)
    made.camera(type="folder", path=quick, product=products[0], station=STATION)
    made.camera(type="folder", path=slow, product=products[0], station=STATION, rate=0.14)
    made.settings["stations"] = [{"name": STATION, "views": [{"camera": "cam-1"}, {"camera": "cam-2"}]}]
    with LineProcess(made.write()) as line:
        summary = line.wait()
    verdicts = received(stack.endpoints["kafka"], made.name, at_least=3)
    assert (verdicts.parts, verdicts.duplicates, verdicts.in_order()) == (
        ["part-1.png", "part-2.png", "part-3.png"],
        0,
        True,
    )
    whole, *halves = by_part(verdicts).values()
    assert (whole["verdict"], [view["cameraId"] for view in whole["views"]]) == ("OK", ["cam-1", "cam-2"])
    for half in halves:
        assert (half["verdict"], half["reasonCodes"]) == ("UNINSPECTED", ["deadline"])
        assert half["missingViews"] == [{"cameraId": "cam-2", "required": True, "cause": "deadline"}]
        assert half["views"][0]["verdict"] == "OK"
        assert 5000 <= half["timing"]["decidedMs"] < 10_000
    assert audited(stack.endpoints["kafka"], made.name) == [("late_frame", "cam-2", "part-2.png", True)]
    (station,) = summary["stations"]
    assert station["triggered"] == sum(station["judgements"].values()) == 3


@pytest.mark.usefixtures("lenient")
def test_triggers_make_the_parts(stack, line_file, products, tmp_path, send):
    """Each trigger is one verdict, whatever comes with it.

    Two views; one of them missing; sent twice; measured twice; by a clock an hour wrong either way; without a frame. A
    frame without a trigger makes none, and records that are no triggers lie on the dead-letter topic.
    """
    made = line_file(stack, budget_ms=10_000)
    first, second = write_pictures(tmp_path / "a", 1, 2, 3, 4), write_pictures(tmp_path / "b", 1, 2, 4)
    for pictures in (first, second):
        made.camera(type="folder", path=pictures, product=products[0], station=STATION)
    made.settings["stations"] = [{"name": STATION, "trigger": "message", "window_ms": 30_000}]
    hour = timedelta(hours=1)
    with LineProcess(made.write(), "--no-until-end") as line:
        started(line)
        send(made.name, "part-1.png", measId="m1", triggeredAt=(datetime.now(UTC) - hour).isoformat())
        send(made.name, "part-1.png", measId="m1")
        for nonsense in (b"{", b"[]", b'{"station": "here"}'):
            send(made.name, raw=nonsense)
        send(made.name, "part-5.png", cameras=["no-such-camera"])
        send(made.name, "part-2.png", measId="m1", triggeredAt=(datetime.now(UTC) + hour).isoformat())
        send(made.name, "part-3.png", measId="m1")
        send(made.name, "part-9.png", measId="m1")
        send(made.name, "part-1.png", measId="m2")
        received(stack.endpoints["kafka"], made.name, at_least=5, timeout_s=60)
        summary = line.stop()
    verdicts = received(stack.endpoints["kafka"], made.name)
    told = [(data["partId"], data["measId"], data["verdict"]) for data in (event["data"] for event in verdicts.events)]
    assert told == [
        ("part-1.png", "m1", "OK"),
        ("part-2.png", "m1", "OK"),
        ("part-3.png", "m1", "UNINSPECTED"),
        ("part-9.png", "m1", "UNINSPECTED"),
        ("part-1.png", "m2", "UNINSPECTED"),
    ]
    assert (verdicts.duplicates, verdicts.in_order()) == (0, True)
    data = [event["data"] for event in verdicts.events]
    assert {each["partIdSource"] for each in data} == {"trigger"}
    assert [[view["cameraId"] for view in each["missingViews"]] for each in data] == [
        [],
        [],
        ["cam-2"],
        ["cam-1", "cam-2"],
        ["cam-1", "cam-2"],
    ]
    assert all(each["timing"]["decidedMs"] < 15_000 for each in data)
    stray = [("no_trigger", camera, "part-4.png", False) for camera in ("cam-1", "cam-2")]
    assert sorted(audited(stack.endpoints["kafka"], made.name)) == stray
    letters = dead_letters(stack.endpoints["kafka"], f"{made.name}/{STATION}")
    assert [letter["value"] for letter in letters][:3] == [b"{", b"[]", b'{"station": "here"}']
    assert b"partId" in letters[2]["logicrd_error"]
    assert b"no-such-camera" in letters[3]["logicrd_error"]
    assert len(letters) == 4
    (station,) = summary["stations"]
    assert station["triggered"] == sum(station["judgements"].values()) == 5


@pytest.mark.usefixtures("lenient")
def test_frames_belong_to_their_triggers_product_across_a_changeover(stack, line_file, products, tmp_path, send):
    """The old product's frame comes after the new one's trigger; a product that is not loaded has a named verdict."""
    old, new = products[:2]
    made = line_file(stack)
    pictures = write_pictures(tmp_path / "p", 1, 2, 3, 4)
    made.camera(type="folder", path=pictures, product=old, station=STATION, rate=0.4)
    made.settings["stations"] = [{"name": STATION, "trigger": "message", "recipes": [new], "window_ms": 30_000}]
    with LineProcess(made.write()) as line:
        started(line)
        for part_id, recipe in [("part-2.png", old), ("part-3.png", new), ("part-4.png", "not-loaded")]:
            send(made.name, part_id, recipeId=recipe)
        line.wait()
        said = line.log()
    verdicts = received(stack.endpoints["kafka"], made.name, at_least=3)
    told = [(part, data["productId"], data["verdict"], data["reasonCodes"]) for part, data in by_part(verdicts).items()]
    assert told == [
        ("part-2.png", old, "OK", []),
        ("part-3.png", new, "OK", []),
        ("part-4.png", "not-loaded", "UNINSPECTED", ["product_not_ready"]),
    ]
    models = [event["data"]["views"][0]["model"] for event in verdicts.events]
    assert [model and model["name"] for model in models] == [old, new, None]
    assert [f'"product": "{product}"' in said for product in (old, new)] == [True, True]
    assert said.index("Triton replica is up") < said.index("line started")


@pytest.mark.usefixtures("lenient")
def test_a_part_that_was_open_when_its_worker_died_gets_its_verdict_from_the_next(
    stack, line_file, products, tmp_path, send
):
    """After kill -9 with one part judged, one open, and one triggered meanwhile: each trigger has a verdict of its own.

    None is told twice with two ids, and what was judged before stays the first word on it. A verdict that Kafka had but
    whose acknowledgement was not on disk yet comes again with the same id.
    """
    made = line_file(stack, budget_ms=60_000, monitoring={"port": 0})
    pictures = write_pictures(tmp_path / "p", 1, 4)
    made.camera(type="folder", path=pictures, product=products[0], station=STATION)
    made.settings["stations"] = [{"name": STATION, "trigger": "message", "window_ms": 30_000}]
    kafka = stack.endpoints["kafka"]
    with LineProcess(made.write(), "--no-until-end") as line:
        started(line)
        send(made.name, "part-1.png")
        wait_until(lambda: received(kafka, made.name).parts, 60, "a first verdict")
        send(made.name, "part-2.png")
        wait_until(lambda: opened(line) == 2, 30, "an open part")
        wait_until(lambda: place_of(kafka, made.name) == 1, 30, "a place kept before the open part")
        os.kill(line.pid, signal.SIGKILL)
        line.wait()
    send(made.name, "part-3.png")
    with LineProcess(made.write(), "--no-until-end") as line:
        started(line)
        send(made.name, "part-4.png")
        received(kafka, made.name, at_least=4, timeout_s=60)
        line.stop()
    verdicts = received(kafka, made.name)
    workers = {event["data"]["partId"]: event["data"]["worker"] for event in verdicts.distinct}
    told = [(event["data"]["partId"], event["data"]["verdict"]) for event in verdicts.distinct]
    assert told == [("part-1.png", "OK"), *((f"part-{n}.png", "UNINSPECTED") for n in (2, 3)), ("part-4.png", "OK")]
    assert len(set(workers.values())) == 2
    assert verdicts.causes == {"deadline": 2}


def opened(line: LineProcess) -> float:
    """How many parts the line has opened, as it tells Prometheus."""
    said = next(json.loads(text) for text in line.log().splitlines() if '"event": "monitoring"' in text)
    with urlopen(said["address"], timeout=10) as page:  # noqa: S310 (an address of this test's own line)
        samples = [text.split() for text in page.read().decode().splitlines()]
    return sum(float(sample[1]) for sample in samples if sample[0].startswith("inspection_parts_triggered_total"))


def place_of(kafka: str, line: str) -> int:
    """How many triggers a line is done with, by the place that it keeps in Kafka."""
    consumer = KafkaConsumer(bootstrap_servers=[kafka], group_id=f"logicrd.{line}.{STATION}", enable_auto_commit=False)
    partitions = [TopicPartition(TRIGGERS, number) for number in consumer.partitions_for_topic(TRIGGERS)]
    places = {partition: consumer.committed(partition) or 0 for partition in partitions}
    consumer.assign(partitions)
    consumer.seek_to_beginning()
    done = 0
    while any(consumer.position(partition) < place for partition, place in places.items()):
        for partition, records in consumer.poll(timeout_ms=250).items():
            done += sum(
                record.offset < places[partition] and record.key == f"{line}/{STATION}".encode() for record in records
            )
    consumer.close()
    return done
