"""Measures the way from a verdict to Kafka: what the outbox adds, what it sustains, how fast it drains.

Run by `logicrd bench delivery`, or by hand against a running stack. The line's outbox and kafka-python with the same
settings and nothing in front take turns, each in a process of its own; what arrived, and when, is told by a consumer
here. Topics are made for the run and removed. It starts no server and judges nothing: it prints.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from delivery_worker import SENT_AT, STATIONS
from kafka import KafkaConsumer, TopicPartition
from kafka.admin import KafkaAdminClient
from kafka.errors import KafkaError
from serving import BenchmarkError, endpoints, machine

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("delivery_worker.py")
WAYS = ("outbox", "plain")
TOPICS = ("verdict.v1", "view.v1", "status.v1", "audit.v1", "dlq.v1")
PARTITIONS = 6


class Reader:
    """A consumer of the verdict topic: every part's ids, order by key, and how long each took, from now to `close`."""

    def __init__(self, address: str, prefix: str) -> None:
        self._consumer = KafkaConsumer(bootstrap_servers=address, enable_auto_commit=False)
        partitions = [TopicPartition(f"{prefix}.verdict.v1", number) for number in range(PARTITIONS)]
        self._consumer.assign(partitions)
        self._consumer.seek_to_end(*partitions)
        self._partitions = partitions
        for partition in partitions:
            self._consumer.position(partition)  # now, not at the first poll
        self.ids: Counter[bytes] = Counter()
        self.took_ms: list[float] = []
        self.in_order = True
        self._last: dict[bytes, bytes] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Read to the end of the topic, then stop."""
        self._over.set()
        self._thread.join()
        self._consumer.close()

    def _read(self) -> None:
        ends: dict[TopicPartition, int] | None = None
        while ends is None or any(self._consumer.position(each) < end for each, end in ends.items()):
            if self._over.is_set() and ends is None:
                ends = self._consumer.end_offsets(self._partitions)
            for records in self._consumer.poll(timeout_ms=100).values():
                for record in records:
                    self._take(record.key, dict(record.headers), time.monotonic_ns())

    def _take(self, key: bytes, headers: dict[str, bytes], now_ns: int) -> None:
        self.ids[headers["ce_id"]] += 1
        if SENT_AT in headers:
            self.took_ms.append((now_ns - int(headers[SENT_AT])) / 1e6)
        part = headers["ce_subject"]
        self.in_order = self.in_order and self._last.get(key, b"") < part
        self._last[key] = part


def run(way: str, what: str, address: str, prefix: str, folder: Path, *numbers: float) -> dict[str, Any]:
    """Measure one way once. Raises BenchmarkError when its process fails."""
    reader = Reader(address, prefix)
    try:
        command = [sys.executable, str(WORKER), way, what, address, prefix, str(folder)]
        worker = subprocess.run(
            [*command, *(f"{number:g}" for number in numbers)],
            stdout=subprocess.PIPE,
            text=True,
            timeout=1200,
            check=False,
        )
    finally:
        reader.close()
    if worker.returncode != 0:
        raise BenchmarkError(f"{what} by way of {way} ended with exit code {worker.returncode}; its error is above")
    figures: dict[str, Any] = json.loads(worker.stdout)
    figures["lost"] = figures["parts"] - len(reader.ids)
    figures["duplicated"] = sum(reader.ids.values()) - len(reader.ids)
    figures["in_order"] = reader.in_order
    if reader.took_ms:
        figures["arrived_p50_ms"] = round(float(np.quantile(reader.took_ms, 0.5)), 2)
        figures["arrived_p99_ms"] = round(float(np.quantile(reader.took_ms, 0.99)), 2)
    return figures


@contextmanager
def topics(address: str) -> Iterator[str]:
    """Make topics for this run; gives their prefix."""
    prefix = f"bench-delivery-{os.getpid()}"
    with KafkaAdminClient(bootstrap_servers=address) as admin:
        names = [f"{prefix}.{topic}" for topic in TOPICS]
        admin.create_topics(
            {name: {"num_partitions": PARTITIONS, "replication_factor": 1, "configs": {}} for name in names},
            timeout_ms=30_000,
            wait_for_metadata=True,
        )
        try:
            yield prefix
        finally:
            admin.delete_topics(names, timeout_ms=30_000)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Take the two ways in turn; latencies are medians over rounds, the rest is one run each."""
    address = arguments.kafka or endpoints(arguments.state_dir)["kafka"]
    arguments.folder.mkdir(parents=True, exist_ok=True)
    document: dict[str, Any] = {"machine": machine(), "events_per_part": 2, "stations": STATIONS}
    with topics(address) as prefix:

        def turn(what: str, *numbers: float) -> dict[str, dict[str, Any]]:
            return {way: run(way, what, address, prefix, arguments.folder, *numbers) for way in WAYS}

        rounds = [turn("paced", arguments.rate, arguments.seconds) for _ in range(arguments.rounds)]
        slow = {way: _medians([each[way] for each in rounds]) for way in WAYS}
        slow["added_p50_ms"] = round(slow["outbox"]["arrived_p50_ms"] - slow["plain"]["arrived_p50_ms"], 2)
        slow["added_p99_ms"] = round(slow["outbox"]["arrived_p99_ms"] - slow["plain"]["arrived_p99_ms"], 2)
        slow["p99_ratio"] = round(slow["outbox"]["arrived_p99_ms"] / slow["plain"]["arrived_p99_ms"], 2)
        document["latency"] = {"parts_per_s": arguments.rate, "seconds": arguments.seconds, **slow}
        document["latency"]["rounds"] = rounds
        fast = turn("paced", arguments.sustained_rate, arguments.sustained_seconds)
        ratio = round(fast["outbox"]["cpu_ms_per_part"] / fast["plain"]["cpu_ms_per_part"], 2)
        document["sustained"] = {"parts_per_s": arguments.sustained_rate, **fast, "cpu_ratio": ratio}
        full = turn("drain", arguments.backlog)
        ratio = round(full["outbox"]["parts_per_s"] / full["plain"]["parts_per_s"], 2)
        document["drain"] = {"parts": arguments.backlog, **full, "rate_ratio": ratio}
    return document


def _medians(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    counts = {"parts", "left", "lost", "duplicated"}
    return {
        key: all(each[key] for each in rounds)
        if key == "in_order"
        else sum(each[key] for each in rounds)
        if key in counts
        else round(statistics.median(each[key] for each in rounds), 3)
        for key in rounds[0]
    }


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="logicrd bench delivery", description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--rate", type=float, default=50.0, help="parts a second for the latency")
    parser.add_argument("--seconds", type=float, default=20.0, help="length of a round of it")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sustained-rate", type=float, default=1000.0, help="parts a second to sustain")
    parser.add_argument("--sustained-seconds", type=float, default=60.0)
    parser.add_argument("--backlog", type=int, default=100_000, help="parts stored while Kafka is away")
    parser.add_argument(
        "--folder", type=Path, default=ROOT / ".stack/bench", help="where the outbox lies: the disk under measure"
    )
    parser.add_argument("--kafka", help="the broker (default: that of the running stack)")
    parser.add_argument("--state-dir", type=Path, default=ROOT / ".stack", help="state folder of the running stack")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """0 and the figures; 4 and one line on standard error when something cannot be reached."""
    arguments = _arguments(argv)
    try:
        document = measure(arguments)
    except (BenchmarkError, KafkaError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 4
    if arguments.json:
        print(json.dumps(document, indent=2))
        return 0
    print(
        f"{document['machine']['cores']} cores, {document['machine']['cpu']}, load {document['machine']['load_before']}"
    )
    for name in ("latency", "sustained", "drain"):
        for key, value in document[name].items():
            shown = (
                "  ".join(f"{what} {figure}" for what, figure in value.items()) if isinstance(value, dict) else value
            )
            if key != "rounds":
                print(f"  {name:10} {key:14} {shown}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
