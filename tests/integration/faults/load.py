"""The load and the truth about it: numbered triggers into Kafka, and what the topics hold at the end.

A part exists when its trigger lies in the trigger topic, whether or not a worker was alive to see it. Producer and
consumer go straight to the broker, past the proxy, and outlast its death.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

from kafka import KafkaConsumer, KafkaProducer
from kafka.errors import KafkaError
from kafka.structs import TopicPartition

TRIGGERS = "inspection.trigger.v1"
VERDICTS = "inspection.verdict.v1"
_ACK_TIMEOUT_S = 120.0


class Topic:
    """What a topic holds from the moment this was made; reads on from where it was, over a broker's death."""

    def __init__(self, address: str, topic: str, wanted: Callable[[str], bool]) -> None:
        """`wanted` says of a key whether its records are kept."""
        self._address = address
        self._topic = topic
        self._wanted = wanted
        self.records: list[Any] = []
        self._consumer = self._connect()
        partitions = [TopicPartition(topic, number) for number in sorted(self._consumer.partitions_for_topic(topic))]
        self._next: dict[TopicPartition, int] = self._consumer.end_offsets(partitions)
        self._seek()

    def read(self) -> list[Any]:
        """Read on to the present end; gives all records so far, in the order of each partition."""
        for attempt in range(3):
            try:
                self._read()
                break
            except KafkaError:
                if attempt == 2:
                    raise
                self._consumer.close()
                self._consumer = self._connect()
                self._seek()
        return self.records

    def close(self) -> None:
        """Disconnect."""
        self._consumer.close()

    def _connect(self) -> KafkaConsumer:
        return KafkaConsumer(
            bootstrap_servers=[self._address], group_id=None, enable_auto_commit=False, bootstrap_timeout_ms=60_000
        )

    def _seek(self) -> None:
        self._consumer.assign(list(self._next))
        for partition, offset in self._next.items():
            self._consumer.seek(partition, offset)

    def _read(self) -> None:
        ends = self._consumer.end_offsets(list(self._next))
        while any(self._next[partition] < end for partition, end in ends.items()):
            for partition, records in self._consumer.poll(timeout_ms=250).items():
                for record in records:
                    self._next[partition] = record.offset + 1
                    if record.key is not None and self._wanted(record.key.decode()):
                        self.records.append(record)


class Load:
    """Sends triggers from `start` to `finish`, one after the other to each station in turn."""

    def __init__(self, address: str, line: str, stations: list[str], *, rate: float) -> None:
        """`rate` is triggers a second, over all stations."""
        self._address = address
        self._line = line
        self._stations = stations
        self._rate = rate
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="load", daemon=True)
        self._futures: list[Any] = []
        self.failure: Exception | None = None

    def start(self) -> None:
        """Begin to send."""
        self._producer = KafkaProducer(
            bootstrap_servers=[self._address],
            acks="all",
            linger_ms=0,
            max_block_ms=int(_ACK_TIMEOUT_S * 1e3),
            delivery_timeout_ms=int(_ACK_TIMEOUT_S * 1e3),
            request_timeout_ms=10_000,
            reconnect_backoff_max_ms=1_000,
            bootstrap_timeout_ms=60_000,
        )
        self._thread.start()

    def finish(self) -> set[tuple[str, int]]:
        """Send no more; gives key and number of the parts whose trigger the broker has acknowledged: all of them.

        Raises what the producer met.
        """
        self._stop.set()
        self._thread.join(_ACK_TIMEOUT_S)
        if self.failure is not None:
            raise self.failure
        for future in self._futures:
            future.get(timeout=_ACK_TIMEOUT_S)
        self._producer.close()
        return {(self._key(number), number) for number in range(len(self._futures))}

    def _run(self) -> None:
        due_s = time.monotonic()
        try:
            while not self._stop.wait(max(0.0, due_s - time.monotonic())):
                self._send(len(self._futures))
                due_s = max(due_s + 1 / self._rate, time.monotonic() - 1.0)
        except KafkaError as error:
            self.failure = error

    def _send(self, number: int) -> None:
        data = {
            "partId": f"part-{number}",
            "measId": str(number),
            "station": self._stations[number % len(self._stations)],
            "line": self._line,
            "triggeredAt": datetime.now(UTC).isoformat(),
        }
        key = self._key(number).encode()
        self._futures.append(self._producer.send(TRIGGERS, key=key, value=json.dumps(data).encode()))

    def _key(self, number: int) -> str:
        return f"{self._line}/{self._stations[number % len(self._stations)]}"


def triggers(records: list[Any]) -> Iterator[tuple[str, int, float]]:
    """Key, number and time (seconds since the epoch) of each trigger, in the order of each partition."""
    for record in records:
        data = json.loads(record.value)
        yield record.key.decode(), int(data["measId"]), datetime.fromisoformat(data["triggeredAt"]).timestamp()
