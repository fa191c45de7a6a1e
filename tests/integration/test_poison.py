"""Records that nobody should send, against the running readers and the real broker: counted, put aside, no crash."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from kafka import KafkaConsumer, KafkaProducer
from kafka.structs import TopicPartition
from line_process import wait_until
from secure_broker import SecureBroker

from pipeline.config import Pool
from pipeline.events import Encoder, Place
from pipeline.health import Health
from pipeline.metrics import Metrics
from pipeline.pool import CameraPool
from pipeline.servers import Kafka
from pipeline.sink import Sink
from pipeline.stations import Station, StationView
from pipeline.tail import VerdictReader
from pipeline.triggers import TriggerReader
from pipeline.types import Trigger
from pipeline.wire import decode_trigger

pytestmark = [pytest.mark.stack, pytest.mark.timeout(400)]
TRIGGERS, CAMERAS, VERDICTS, DEAD = (f"inspection.{name}.v1" for name in ("trigger", "cameras", "verdict", "dlq"))
PLACE = Place("site", "area", "l1", worker="w1", budget_ms=2000.0)


class RawName(str):
    """A header's name whose bytes are no UTF-8."""

    __slots__ = ()

    def encode(self, encoding: str = "utf-8", errors: str = "strict") -> bytes:
        del encoding, errors
        return b"\xff\xfe"


def trigger(part_id: Any, **more: Any) -> bytes:
    return json.dumps({"partId": part_id, "station": "s1", **more}).encode()


# Values that are no trigger, each with what the dead letter says of it.
POISON: dict[str, tuple[bytes | None, str]] = {
    "nothing": (b"", "Expecting value"),
    "null": (None, "no value"),
    "random bytes": (random.Random(1).randbytes(2000), ""),
    "no UTF-8": (b'{"partId": "\xff", "station": "s1"}', "decode"),
    "UTF-16": (trigger("p").decode().encode("utf-16")[1:], ""),
    "deep": (b"[" * 200_000, "nested"),
    "deep in a field": (b'{"partId": ' + b'{"a":' * 50_000, "nested"),
    "2 MB": (b'{"partId": "' + b"x" * (2 << 20) + b'"}', ""),
    "2 MB of nothing": (b" " * (2 << 20), "Expecting value"),
    "a list": (b"[1, 2]", "no JSON object"),
    "a huge number": (b'{"partId": ' + b"9" * 100_000 + b', "station": "s1"}', "digits"),
    "a number without end": (trigger("p", triggeredAt=1e300), "triggeredAt"),
    "infinity": (b'{"partId": "p", "station": "s1", "triggeredAt": Infinity}', "triggeredAt"),
    "half a character": (b'{"partId": "\\ud800", "station": "s1"}', "partId"),
    "a control character": (trigger("p\x00q"), "partId"),
    "wrong types": (trigger({"a": 1}, cameras="c1"), ""),
    "a strange camera": (trigger("p", cameras=["\u202e evil"]), "has no camera"),
    "another CloudEvent": (b'{"specversion": "1.0", "data": null}', "data"),
}


@pytest.fixture
def produce(secure: SecureBroker) -> Iterator[Callable[..., int]]:
    """Write records into partition 0 of a topic; gives the offset of the last."""
    producers = {
        kind: KafkaProducer(
            bootstrap_servers=secure.addresses["PLAINTEXT"], max_request_size=4 << 20, compression_type=kind
        )
        for kind in (None, "gzip", "lz4", "snappy", "zstd")
    }

    def produce(topic: str, *values: bytes | None, packed: str | None = None, **more: Any) -> int:
        sent = [producers[packed].send(topic, value=value, partition=0, **more) for value in values]
        return [future.get(timeout=20).offset for future in sent][-1]

    yield produce
    for producer in producers.values():
        producer.close()


class Readings:
    """A running reader of triggers on the broker, and what it took."""

    def __init__(self, settings: Kafka, line: str) -> None:
        self.metrics, self.health = Metrics(), Health()
        self.taken: list[Trigger] = []
        encoder = Encoder(PLACE, "binary")
        self.sink = Sink(settings, encoder=encoder, metrics=self.metrics, health=self.health)
        station = Station(name="s1", trigger="message", views=[StationView(camera="c1")])
        self.reader = TriggerReader(
            settings,
            {"s1": station},
            line=line,
            take=self._take,
            refuse=self.sink.put,
            encoder=encoder,
            metrics=self.metrics,
            health=self.health,
        )

    def _take(self, trigger: Trigger) -> None:
        self.taken.append(trigger)
        self.reader.settled(trigger.receipt)

    def __enter__(self) -> Readings:
        self.sink.start()
        self.reader.connect()
        self.reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        assert self.sink.close(time.monotonic() + 30.0) == []
        self.reader.close()

    def names(self) -> list[str]:
        return [trigger.part_id for trigger in self.taken]

    @property
    def refused(self) -> int:
        return int(self.metrics.registry.get_sample_value("inspection_triggers_total", {"fate": "refused"}) or 0)


def place_of(settings: Kafka, group: str) -> int:
    consumer = KafkaConsumer(bootstrap_servers=settings.bootstrap, group_id=group, enable_auto_commit=False)
    place = consumer.committed(TopicPartition(TRIGGERS, 0))
    consumer.close()
    return place


def letters(settings: Kafka) -> dict[int, dict[str, Any]]:
    """Headers and value of the dead letters, by the offset of the record that they are of."""
    consumer = KafkaConsumer(bootstrap_servers=settings.bootstrap, enable_auto_commit=False)
    partitions = [TopicPartition(DEAD, number) for number in consumer.partitions_for_topic(DEAD)]
    consumer.assign(partitions)
    consumer.seek_to_beginning()
    ends, found = consumer.end_offsets(partitions), {}
    while any(consumer.position(partition) < end for partition, end in ends.items()):
        for records in consumer.poll(timeout_ms=250).values():
            for record in records:
                headers = {name: (text or b"").decode("utf-8", "replace") for name, text in record.headers}
                offset = int(headers["logicrd_record"].rpartition("/")[2])
                found[offset] = {"value": record.value, **headers}
    consumer.close()
    return found


@pytest.fixture
def settings(secure: SecureBroker) -> Kafka:
    return Kafka(bootstrap=[secure.addresses["PLAINTEXT"]])


def test_no_record_stops_the_reading_of_triggers(settings, produce):
    """Each poison lies on the dead-letter topic with its reason; the trigger after it is taken; the place moves on."""
    with Readings(settings, "poison") as line:
        sent = {}
        for number, (name, (value, _)) in enumerate(POISON.items()):
            sent[name] = produce(TRIGGERS, value, key=b"l1/s1")
            produce(TRIGGERS, trigger(f"p-{number}"))
        sent["a header's name"] = produce(TRIGGERS, trigger("lost"), headers=[(RawName("x"), b"v")])
        sent["a huge header"] = produce(TRIGGERS, b"{", headers=[("h", b"x" * 900_000)], key=b"k" * 100_000)
        last = produce(TRIGGERS, trigger("last"))
        wait_until(lambda: "last" in line.names(), 60, "the last trigger")
        assert line.names() == [*(f"p-{number}" for number in range(len(POISON))), "last"]
        assert line.refused == len(sent)
        wait_until(lambda: place_of(settings, "logicrd.poison.s1") == last + 1, 30, "the place kept")
        assert line.health.stalled() == []
    assert line.metrics.snapshot().undelivered == 0
    told = letters(settings)
    assert set(sent.values()) <= set(told)
    for name, (value, error) in POISON.items():
        letter = told[sent[name]]
        assert error in letter["logicrd_error"], name
        assert letter["value"] == (value or b"")[: 64 * 1024], name
        assert ("logicrd_cut_from" in letter) is (len(value or b"") > 64 * 1024), name
    assert told[sent["a header's name"]]["logicrd_error"].startswith("unreadable")
    assert len(told[sent["a huge header"]]["h"]) == 1024


@pytest.mark.parametrize("packed", ["gzip", "lz4", "snappy", "zstd"])
def test_a_sender_may_pack_its_records(settings, produce, packed):
    """Triggers are read however their sender compresses them."""
    with Readings(settings, f"packed-{packed}") as line:
        produce(TRIGGERS, trigger(f"{packed} " + "x" * 100), packed=packed)
        wait_until(lambda: line.taken, 30, "the trigger")
        assert line.names() == [f"{packed} " + "x" * 100]


def mutated(chance: random.Random) -> bytes:
    """A trigger in which some bytes were changed, cut out or doubled."""
    value = bytearray(trigger("p-1", measId="m", cameras=["c1"], triggeredAt="2026-11-25T12:00:00Z", line="fuzz"))
    for _ in range(chance.randint(0, 4)):
        at = chance.randrange(len(value))
        match chance.randrange(3):
            case 0:
                value[at] = chance.randrange(256)
            case 1:
                del value[at : at + chance.randint(1, 9)]
            case _:
                value[at:at] = value[at : at + chance.randint(1, 30)]
    return bytes(value)


def fate(value: bytes) -> str:
    """What has to become of a record, by the pure reading of it."""
    try:
        data = decode_trigger(value, {})
    except ValueError:
        return "refused"
    if data.station != "s1" or data.line not in (None, "fuzz"):
        return "not ours"
    return "taken" if data.cameras in (None, ["c1"]) else "refused"


def test_every_mangled_trigger_is_accounted_for(settings, produce):
    """Over 400 mangled triggers (seed 7): taken, refused or not ours, as many of each as the pure reading says."""
    chance = random.Random(7)
    values = [mutated(chance) for _ in range(400)]
    fates = [fate(value) for value in values]
    assert {"taken", "refused", "not ours"} == set(fates)
    with Readings(settings, "fuzz") as line:
        produce(TRIGGERS, *values, trigger("last"))
        wait_until(lambda: "last" in line.names(), 60, "the last trigger")
        assert len(line.taken) - 1 == fates.count("taken")
        assert line.refused == fates.count("refused")
    assert line.metrics.snapshot().undelivered == 0


class StandIn:
    """What the pool needs of a line: it notes what it is asked."""

    def __init__(self) -> None:
        self.epoch: int | None = None
        self.products = ("tray",)
        self.read: set[str] = set()
        self.refused: dict[str, str] = {}
        self._lock = threading.Lock()

    def objection(self, camera: Any) -> str:
        del camera
        return ""

    def add_camera(self, camera: Any) -> None:
        self.read.add(camera.id)

    def remove_cameras(self, camera_ids: Any, reason: str | None) -> None:
        del reason
        self.read -= set(camera_ids)

    def refuse_camera(self, camera_id: str, reason: str) -> None:
        with self._lock:
            self.refused[camera_id] = reason


def camera(name: str, **more: Any) -> bytes:
    block = {"id": name, "type": "folder", "product": "tray", "path": "pictures", "pool": "poison"}
    return json.dumps(block | more).encode()


BOMB = {"picture_size": [32_766, 32_766], "mask": [[[0, 0], [32_766, 0], [32_766, 32_766], [0, 32_766]]]}


def test_no_record_stops_the_camera_pool(settings, produce, tmp_path):
    """What is no camera is refused by its key, however long that is; the cameras between are read."""
    line, health, metrics = StandIn(), Health(), Metrics()
    bad = {
        b"random": random.Random(2).randbytes(500),
        b"empty": b"",
        b"deep": b"[" * 200_000,
        b"2-mb": b'{"pool": "poison", "id": "' + b"x" * (2 << 20) + b'"}',
        b"huge": b'{"pool": "poison", "id": "huge", "rate": ' + b"9" * 5000 + b"}",
        b"nan": camera("nan", rate=float("nan")),
        b"list": b'[{"pool": "poison"}]',
        b"types": camera("types", queue_frames="many", path=7),
        b"kind": camera("kind", type="telepathy"),
        b"other": camera("one-more"),
        b"bomb": camera("bomb", region=BOMB),
        b"\xff\xfe": b"{}",
        b"k" * 900_000: b"{",
    }
    for number, (key, value) in enumerate(bad.items()):
        produce(CAMERAS, value, key=key)
        produce(CAMERAS, camera(f"good-{number}"), key=f"good-{number}".encode())
    produce(CAMERAS, camera("lost"), key=b"lost", headers=[(RawName("x"), b"v")])
    produce(CAMERAS, camera("last"), key=b"last")
    pool = CameraPool(settings, Pool(name="poison", capacity=100, root=tmp_path), line, metrics=metrics, health=health)
    pool.connect()
    pool.start([])
    try:
        wait_until(lambda: "last" in line.read, 60, "the last camera")
        assert line.read == {"last", *(f"good-{number}" for number in range(len(bad)))}
        # Those that are no JSON object name no pool: every pool's workers say so.
        assert len(line.refused) == len(bad) - 1  # `{}` under the key that is no UTF-8 is the default pool's
        assert max(map(len, line.refused)) == 256
        assert set(line.refused.values()) == {"invalid"}
        assert health.stalled() == []
    finally:
        pool.stop()
        pool.close()
        for key in (*bad, *(f"good-{number}".encode() for number in range(len(bad))), b"last", b"lost"):
            produce(CAMERAS, None, key=key)


def test_a_reader_of_verdicts_shows_what_is_none(settings, produce):
    """Foreign records on the topic are shown as such, and reading goes on behind them."""
    with VerdictReader(settings, start="now") as reader:
        for value, headers in ((b"\xff", []), (b"[" * 100_000, []), (b"{}", [(RawName("x"), b"v")])):
            produce(VERDICTS, value, headers=headers)
        produce(VERDICTS, b"{}", headers=[("ce_id", b"after")])
        seen = list(reader.read_to_end())
    assert ["error" in event for event in seen] == [True, True, True, False]
    assert seen[-1]["attributes"]["id"] == "after"
