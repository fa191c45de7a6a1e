"""A worker that only puts numbered parts: `outbox_process.py <kafka> <prefix> <folder> <first> <count>`.

Prints a number once its part is done, which is once it is durable, and then waits to be killed. SIGTERM ends it as a
line ends: what is left goes out within 20 s; it then prints what is left in the outbox.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path

from pipeline.config import Outbox as OutboxSettings
from pipeline.events import Encoder, Event, Place
from pipeline.health import Health
from pipeline.metrics import Metrics
from pipeline.outbox import Outbox
from pipeline.servers import Kafka
from pipeline.sink import Sink

KEYS = 3


def part(number: int, *, value: bytes = b"{}") -> Event:
    """Make a part's event: its number is its id, and its key follows from it."""
    headers = (("ce_id", b"%d" % number), ("ce_source", b"/numbered"))
    return Event("verdict.v1", b"numbered/s%d" % (number % KEYS), value, headers, is_part=True)


def make(kafka: Kafka, folder: Path | None, metrics: Metrics | None = None) -> Outbox:
    """Build the way out of a line, without the line."""
    metrics, health = metrics or Metrics(), Health()
    encoder = Encoder(Place("site", "area", "numbered", "worker", 1000.0), "binary")
    sink = Sink(kafka, encoder=encoder, metrics=metrics, health=health)
    return Outbox(OutboxSettings(dir=folder), sink, max_held=10_000, metrics=metrics, health=health)


def say(text: object) -> None:
    """Print a line whole, from any thread."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main(kafka: str, prefix: str, folder: str, first: str, count: str) -> None:
    """Put the parts, then wait."""
    over = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: over.set())
    outbox = make(Kafka(bootstrap=[kafka], topic_prefix=prefix, startup_timeout_s=60), Path(folder))
    outbox.start()
    say("started")
    for number in range(int(first), int(first) + int(count)):
        event = part(number)
        outbox.put(Event(event.topic, event.key, event.value, event.headers, is_part=True, done=partial(say, number)))
        time.sleep(0.001)
    over.wait()
    say(f"left {outbox.close(time.monotonic() + 20).parts}")


if __name__ == "__main__":
    main(*sys.argv[1:])
