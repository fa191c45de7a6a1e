"""The outbox against the real broker: every part arrives once, in order, whoever is killed or away."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from kafka import KafkaConsumer, TopicPartition
from kafka.admin import KafkaAdminClient
from line_process import stopped, wait_until
from outbox_process import KEYS, make, part

from pipeline.metrics import Metrics
from pipeline.outbox import read_stored
from pipeline.servers import Kafka

pytestmark = pytest.mark.stack
TOPICS = ("verdict.v1", "view.v1", "status.v1", "audit.v1", "dlq.v1")
SMALL_BYTES = 4_000
LONG_S = 150.0


@pytest.fixture(scope="module")
def broker(make_stack):
    """A stack that is Kafka alone."""
    return make_stack("--only", "kafka")


@pytest.fixture
def make_topics(broker, request):
    """Make topics of this test's own, verdicts with these configurations; gives the settings to reach them."""

    def make(**configs):
        prefix = f"{request.function.__name__}-{time.time_ns()}"
        address = broker.endpoints["kafka"]
        wanted = {
            f"{prefix}.{topic}": {
                "num_partitions": 2,
                "replication_factor": 1,
                "configs": configs if topic == "verdict.v1" else {},
            }
            for topic in TOPICS
        }
        with KafkaAdminClient(bootstrap_servers=address) as admin:
            admin.create_topics(wanted, timeout_ms=30_000, wait_for_metadata=True)
        return Kafka(bootstrap=[address], topic_prefix=prefix, startup_timeout_s=60)

    return make


@pytest.fixture
def topics(make_topics):
    """Topics with the broker's own limits."""
    return make_topics()


def records(settings: Kafka, topic: str = "verdict.v1"):
    """Read a topic from its beginning to its end, in order within each key."""
    consumer = KafkaConsumer(bootstrap_servers=settings.bootstrap, enable_auto_commit=False)
    try:
        partitions = [
            TopicPartition(f"{settings.topic_prefix}.{topic}", number)
            for number in consumer.partitions_for_topic(f"{settings.topic_prefix}.{topic}")
        ]
        consumer.assign(partitions)
        consumer.seek_to_beginning(*partitions)
        ends = consumer.end_offsets(partitions)
        found = []
        while any(consumer.position(partition) < ends[partition] for partition in partitions):
            for batch in consumer.poll(timeout_ms=500).values():
                found += batch
        return found
    finally:
        consumer.close()


def numbers_by_key(settings: Kafka) -> dict[bytes, list[int]]:
    """Read the numbers of the parts as a consumer takes them: each id once, where it came first."""
    by_key: dict[bytes, list[int]] = {}
    seen: set[bytes] = set()
    for record in records(settings):
        identity = dict(record.headers)["ce_id"]
        if identity not in seen:
            seen.add(identity)
            by_key.setdefault(record.key, []).append(int(identity))
    return by_key


def due(count: int) -> dict[bytes, list[int]]:
    """Say what `numbers_by_key` has to give."""
    return {b"numbered/s%d" % key: list(range(key, count, KEYS)) for key in range(KEYS)}


class Worker:
    """`outbox_process` as a process of its own."""

    def __init__(self, settings: Kafka, folder: Path, first: int, count: int) -> None:
        self._out = folder.parent / f"worker-{first}.txt"
        command = [sys.executable, str(Path(__file__).parents[1] / "outbox_process.py")]
        command += [settings.bootstrap[0], settings.topic_prefix, str(folder), str(first), str(count)]
        with self._out.open("wb") as out:
            self._process = subprocess.Popen(command, stdout=out)

    def said(self) -> list[str]:
        """Give the lines that it has printed whole."""
        return self._out.read_text().rpartition("\n")[0].splitlines()

    def wait_for_done(self, count: int) -> None:
        """Wait until so many parts are durable."""
        wait_until(lambda: sum(line.isdigit() for line in self.said()) >= count, LONG_S, f"{count} parts done")

    def kill(self) -> set[int]:
        """Kill it with -9; gives the parts that were done."""
        self._process.kill()
        self._process.wait()
        return {int(line) for line in self.said() if line.isdigit()}

    def end(self) -> str:
        """Let it end as a line ends; gives its last line."""
        self._process.terminate()
        self._process.wait(timeout=LONG_S)
        return self.said()[-1]


@contextmanager
def hung(broker):
    """Hold Kafka as a hung machine would, for the length of the block."""
    pid = broker.pid("kafka")
    with stopped(pid):
        threads = Path(f"/proc/{pid}/task")
        wait_until(
            lambda: all(stat.read_text().rpartition(")")[2].split()[0] in "Tt" for stat in threads.glob("*/stat")),
            LONG_S,
            "every thread stopped",
        )
        yield


def test_a_killed_worker_loses_no_part_that_was_done(broker, topics, tmp_path):
    """Killed with Kafka hung and everything undelivered, twice: the next runs deliver all, in order, once after dedupe.

    The second run puts parts of its own behind the replayed ones.
    """
    folder = tmp_path / "outbox"
    worker = Worker(topics, folder, 0, 300)
    worker.wait_for_done(60)
    with hung(broker):
        worker.wait_for_done(300)
        assert worker.kill() == set(range(300))
        assert len(list(read_stored(folder))) > 0
    second = Worker(topics, folder, 300, 90)
    second.wait_for_done(90)
    second.kill()
    third = Worker(topics, folder, 390, 30)
    third.wait_for_done(30)
    assert third.end() == "left 0"
    assert numbers_by_key(topics) == due(420)
    assert list(folder.iterdir()) == []


def test_parts_outlive_a_killed_broker(broker, topics, tmp_path):
    """Kafka is killed with -9 and comes back: the worker goes on, and every part arrives, in order."""
    worker = Worker(topics, tmp_path / "outbox", 0, 900)
    worker.wait_for_done(100)
    old = broker.pid("kafka")
    os.kill(old, signal.SIGKILL)
    worker.wait_for_done(900)
    wait_until(lambda: broker.pid("kafka") != old, LONG_S, "a restarted broker")
    wait_until(lambda: broker.state()["components"]["kafka"]["state"] == "ready", LONG_S, "a ready broker")
    wait_until(lambda: not list(read_stored(tmp_path / "outbox")), LONG_S, "everything delivered")
    assert worker.end() == "left 0"
    assert numbers_by_key(topics) == due(900)


def test_what_is_left_at_the_end_is_said_and_delivered_by_the_next_run(broker, topics, tmp_path):
    """SIGTERM with Kafka hung: the worker ends within its budget, says what is left, and the next run delivers it."""
    folder = tmp_path / "outbox"
    worker = Worker(topics, folder, 0, 30)
    wait_until(lambda: "started" in worker.said(), LONG_S, "a running worker")
    with hung(broker):
        worker.wait_for_done(30)
        left = worker.end()
        assert int(left.removeprefix("left ")) == sum(event.is_part for event in read_stored(folder))
    again = Worker(topics, folder, 30, 3)
    again.wait_for_done(3)
    assert again.end() == "left 0"
    assert numbers_by_key(topics) == due(33)


@pytest.mark.parametrize("size", [SMALL_BYTES * 10, 2_000_000], ids=["for the topic", "for the client"])
def test_an_event_that_is_too_large_becomes_a_dead_letter_and_blocks_nobody(make_topics, tmp_path, size):
    """It lies on the dead-letter topic with its cause, is counted, and the parts around it arrive in order."""
    topics = make_topics(**{"max.message.bytes": str(SMALL_BYTES)})
    metrics = Metrics()
    outbox = make(topics, tmp_path / "outbox", metrics)
    outbox.start()
    for number in range(60):
        outbox.put(part(number, value=bytes(size) if number in {7, 31} else b"{}"))
    assert outbox.close(time.monotonic() + LONG_S).events == 0
    expected = {key: [number for number in numbers if number not in {7, 31}] for key, numbers in due(60).items()}
    assert numbers_by_key(topics) == expected
    letters = {dict(record.headers)["ce_id"]: dict(record.headers) for record in records(topics, "dlq.v1")}
    assert set(letters) == {b"7", b"31"}
    assert b"MessageSizeTooLarge" in letters[b"7"]["logicrd_error"]
    assert letters[b"7"]["logicrd_record"] == f"{topics.topic_prefix}.verdict.v1".encode()
    assert metrics.snapshot().undelivered == 2
    assert metrics.snapshot().acknowledged == 58


def test_without_an_outbox_a_killed_worker_loses_what_kafka_has_not(broker, topics):
    """The same with `dir: null`: at the end what Kafka has not confirmed is lost and counted."""
    metrics = Metrics()
    outbox = make(topics, None, metrics)
    outbox.start()
    with hung(broker):
        outbox.put(part(0))
        assert outbox.close(time.monotonic() + 0.5).lost_parts == 1
    assert metrics.snapshot().undelivered == 1
