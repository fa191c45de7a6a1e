"""One way of delivery under measure, in a process of its own: run by `delivery.py`, prints one JSON document.

`outbox` is the line's own: events through the outbox and the sink. `plain` is kafka-python with the same settings and
nothing in front: `send` on the caller's thread. Both send what the line sends of a part with one view.
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np

from pipeline import logs
from pipeline.config import Outbox as OutboxSettings
from pipeline.events import Encoder, Event, Place
from pipeline.health import Health
from pipeline.metrics import Metrics
from pipeline.outbox import Outbox
from pipeline.parts import Parts
from pipeline.servers import Kafka
from pipeline.sink import Sink
from pipeline.types import (
    Frame,
    Inference,
    Judgement,
    Model,
    PartVerdict,
    Scores,
    Threshold,
    ThresholdSource,
    Verdict,
    ViewVerdict,
)

STATIONS = 4
END_S = 300.0
HELD = 20_000
SENT_AT = "logicrd_bench_sent_ns"


class Way(Protocol):
    """How events leave."""

    def put(self, events: tuple[Event, ...], done: Callable[[], None] | None) -> None: ...

    def end(self) -> int: ...


class Closed:
    """A sink that takes nothing, as while Kafka is away."""

    room = 0

    def start(self) -> None:
        """Reach nobody."""

    def put(self, *events: Event) -> None:
        """Never called: there is no room."""

    def close(self, until_s: float) -> list[Event]:
        """Nothing is under way."""
        del until_s
        return []


class ByOutbox:
    """Events by way of the outbox."""

    def __init__(self, kafka: Kafka, folder: Path, sink: Closed | None = None) -> None:
        self.metrics, health = Metrics(), Health()
        way = sink or Sink(kafka, encoder=encoder(), metrics=self.metrics, health=health)
        settings = OutboxSettings(dir=folder)
        self.outbox = Outbox(settings, cast(Sink, way), max_held=HELD, metrics=self.metrics, health=health)
        self.outbox.start()

    def put(self, events: tuple[Event, ...], done: Callable[[], None] | None) -> None:
        """Leave them to the outbox."""
        self.outbox.put(*events[:-1], replace(events[-1], done=done))

    def end(self) -> int:
        """Wait until Kafka has everything; gives how many parts it has not."""
        left = self.outbox.close(time.monotonic() + END_S)
        return left.parts + left.lost_parts


class ByClient:
    """Events by the client alone, made as the sink makes it."""

    def __init__(self, kafka: Kafka) -> None:
        self._prefix = kafka.topic_prefix
        self._producer: Any = Sink(kafka, encoder=encoder(), metrics=Metrics(), health=Health())._connect(60.0)
        self._unacknowledged = 0
        self._lock = threading.Lock()

    def put(self, events: tuple[Event, ...], done: Callable[[], None] | None) -> None:
        """Send them."""
        for event in events:
            future = self._producer.send(
                f"{self._prefix}.{event.topic}", key=event.key, value=event.value, headers=list(event.headers)
            )
            with self._lock:
                self._unacknowledged += 1
            future.add_callback(partial(self._acknowledged, done if event.is_part else None))

    def _acknowledged(self, done: Callable[[], None] | None, _: object) -> None:
        with self._lock:
            self._unacknowledged -= 1
        if done is not None:
            done()

    def end(self) -> int:
        """Wait until Kafka has everything; gives how many events it has not."""
        until = time.monotonic() + END_S
        while self._unacknowledged and time.monotonic() < until:
            time.sleep(0.005)
        self._producer.close(timeout=5)
        return self._unacknowledged


def encoder() -> Encoder:
    """Make the line's encoder."""
    return Encoder(Place("site", "area", "bench", "bench-worker", 2_000.0), "binary")


def verdicts(count: int, first: int = 0) -> Iterator[PartVerdict]:
    """Make verdicts of parts with one view, station after station."""
    parts = Parts({}, {}, budget_s=1e9, run="bench")
    at, model = datetime.now(UTC), Model("tray", "1", "ab" * 32)
    threshold = Threshold(3.0, 2.0, 7, ThresholdSource.REDIS, "ab" * 32)
    for number in range(first, first + count):
        station = f"station-{number % STATIONS}"
        name = f"part-{number:08d}"
        frame = Frame("c1", station, "tray", number, name, "sei", at, 0.0, 1e9, None)
        for taken in parts.arrive(frame, 0.0).frames:
            inference = Inference(taken, Scores(0.5, 0.4, 12.1), model=model, sent_s=0.02, received_s=0.1)
            view = ViewVerdict(taken, inference, Verdict(Judgement.OK, (), threshold), 0.12)
            yield from parts.settle(view)


def stamped(events: tuple[Event, ...]) -> tuple[Event, ...]:
    """Note in the part's event when it was put, for the consumer on the same clock."""
    sent_at = str(time.monotonic_ns()).encode()
    return *events[:-1], replace(events[-1], headers=(*events[-1].headers, (SENT_AT, sent_at)))


def paced(way: Way, rate: float, seconds: float) -> dict[str, Any]:
    """Put parts at a rate, as a judge would; how long `put` held it up, and when a part was done."""
    make, at = encoder(), datetime.now(UTC)
    held_ms: list[float] = []
    done_ms: list[float] = []
    began_s, cpu_s = time.monotonic(), time.process_time()

    def done(put_s: float) -> None:
        done_ms.append((time.monotonic() - put_s) * 1e3)

    for number, verdict in enumerate(verdicts(int(rate * seconds))):
        events = make.part(verdict, decided_at=at)
        time.sleep(max(0.0, began_s + number / rate - time.monotonic()))
        put_s = time.monotonic()
        way.put(stamped(events), partial(done, put_s))
        held_ms.append((time.monotonic() - put_s) * 1e3)
    put_s = time.monotonic() - began_s
    left = way.end()
    return {
        "parts": len(held_ms),
        "put_per_s": round(len(held_ms) / put_s, 1),
        "behind_at_the_end_s": round(time.monotonic() - began_s - put_s, 2),
        "put_p99_ms": _quantile(held_ms, 0.99),
        "done_p50_ms": _quantile(done_ms, 0.5),
        "done_p99_ms": _quantile(done_ms, 0.99),
        "cpu_ms_per_part": round((time.process_time() - cpu_s) / len(held_ms) * 1e3, 3),
        "left": left,
    }


def fill(folder: Path, kafka: Kafka, parts: int) -> float:
    """Store parts as while Kafka is away; gives the seconds that it took."""
    way = ByOutbox(kafka, folder, Closed())
    make, at, room = encoder(), datetime.now(UTC), threading.Semaphore(HELD // 4)
    began_s = time.monotonic()
    for verdict in verdicts(parts):
        room.acquire()
        way.put(make.part(verdict, decided_at=at), lambda: room.release())
    way.outbox.close(time.monotonic())
    return time.monotonic() - began_s


def drain(way_name: str, kafka: Kafka, folder: Path, parts: int) -> dict[str, Any]:
    """Deliver what an outage left: from disk, or, for the client alone, as fast as it takes them from memory."""
    figures: dict[str, Any] = {"parts": parts}
    if way_name == "outbox":
        figures["store_s"] = round(fill(folder, kafka, parts), 2)
        began_s, cpu_s = time.monotonic(), time.process_time()
        way: Way = ByOutbox(kafka, folder)
    else:
        make, at = encoder(), datetime.now(UTC)
        events = [make.part(verdict, decided_at=at) for verdict in verdicts(parts)]
        began_s, cpu_s = time.monotonic(), time.process_time()
        way = ByClient(kafka)
        for each in events:
            way.put(each, None)
    figures["left"] = way.end()
    figures["seconds"] = round(time.monotonic() - began_s, 2)
    figures["parts_per_s"] = round(parts / figures["seconds"], 1)
    figures["cpu_ms_per_part"] = round((time.process_time() - cpu_s) / parts * 1e3, 3)
    return figures


def _quantile(values: list[float], share: float) -> float | None:
    return round(float(np.quantile(values, share)), 3) if values else None


@contextmanager
def _folder(root: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=root) as folder:
        yield Path(folder) / "outbox"


def main(way_name: str, what: str, address: str, prefix: str, root: str, *numbers: str) -> None:
    """Measure once; prints the figures."""
    logs.configure(level="error")
    kafka = Kafka(bootstrap=[address], topic_prefix=prefix, startup_timeout_s=60)
    with _folder(root) as folder:
        if what == "drain":
            figures = drain(way_name, kafka, folder, int(numbers[0]))
        else:
            way: Way = ByOutbox(kafka, folder) if way_name == "outbox" else ByClient(kafka)
            figures = paced(way, float(numbers[0]), float(numbers[1]))
    json.dump(figures, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
