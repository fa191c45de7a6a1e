"""Events to Kafka: idempotent, acknowledged by all replicas, in order, and never silently gone.

`put` only queues; one publisher thread talks to the client library, whose `send` may block. Everything that the broker
has not acknowledged counts towards one bound; an event beyond it is refused, counted and logged. While the worker lives
nothing expires: the library retries for as long as the brokers are away.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Iterable

import structlog
from kafka import KafkaProducer
from kafka.errors import KafkaError, KafkaTimeoutError

from pipeline.errors import DependencyError
from pipeline.events import Event
from pipeline.health import Health
from pipeline.metrics import Metrics
from pipeline.servers import Kafka as KafkaSettings

# The library gives a record up after this time and would then send later ones ahead of it: the order of a key is worth
# more than a bound that ours (`max_unacknowledged`) already sets. Largest value it takes, 24 days.
_DELIVERY_TIMEOUT_MS = 2**31 - 1
_MAX_BLOCK_MS = 2_000
_STAGE = "publisher"

log = structlog.get_logger(__name__)


class Sink:
    """The way to Kafka; `put` from any thread, never blocking."""

    def __init__(self, settings: KafkaSettings, *, metrics: Metrics, health: Health) -> None:
        self._settings = settings
        self._metrics = metrics
        self._health = health
        self._changed = threading.Condition()
        self._waiting: deque[Event] = deque()
        self._unacknowledged = 0
        self._parts_unacknowledged = 0
        self._refusing = False
        self._stop = threading.Event()
        self._producer: KafkaProducer | None = None
        self._thread = threading.Thread(target=self._run, name=_STAGE, daemon=True)

    def start(self) -> None:
        """Connect and see that the topics are there. Raises DependencyError naming what is not."""
        servers = ", ".join(self._settings.bootstrap)
        try:
            self._producer = KafkaProducer(
                bootstrap_servers=self._settings.bootstrap,
                client_id="logicrd",
                acks="all",
                enable_idempotence=True,
                linger_ms=5,
                max_block_ms=_MAX_BLOCK_MS,
                delivery_timeout_ms=_DELIVERY_TIMEOUT_MS,
                reconnect_backoff_max_ms=2_000,
                request_timeout_ms=10_000,
                bootstrap_timeout_ms=int(self._settings.startup_timeout_s * 1e3),
                allow_auto_create_topics=False,
            )
            for kind in ("verdict.v1", "view.v1", "status.v1", "audit.v1", "dlq.v1"):
                self._require(self._topic(kind))
        except KafkaError as error:
            self._abandon()
            raise DependencyError(
                f"Kafka at {servers}: {error}",
                hint="start it (`logicrd stack up` makes the topics too), or correct kafka.bootstrap in the line file",
            ) from None
        self._health.beat(_STAGE)
        self._thread.start()

    def _require(self, topic: str) -> None:
        """See that a topic is there; the library tells a missing one only by not answering."""
        assert self._producer is not None  # noqa: S101 (set by start)
        with contextlib.suppress(KafkaTimeoutError):
            if self._producer.partitions_for(topic):
                return
        raise KafkaTimeoutError(f"topic {topic} does not exist, or the brokers do not tell within 2 s")

    def put(self, *events: Event) -> None:
        """Queue events; those beyond the bound are refused, counted and logged once a spell."""
        with self._changed:
            room = self._settings.max_unacknowledged - self._unacknowledged
            taken, refused = events[: max(room, 0)], events[max(room, 0) :]
            self._waiting.extend(taken)
            self._unacknowledged += len(taken)
            self._parts_unacknowledged += sum(event.is_part for event in taken)
            self._changed.notify_all()
        self._metrics.unacknowledged.set(self._unacknowledged)
        if refused:
            self._metrics.undelivered(len(refused), parts=sum(event.is_part for event in refused))
            _tell(refused)
        if bool(refused) is not self._refusing:
            self._refusing = bool(refused)
            self._say_refusing()

    def close(self) -> int:
        """Send what is left, within `drain_timeout_s`; gives the number of part verdicts that Kafka never confirmed."""
        until = time.monotonic() + self._settings.drain_timeout_s
        with self._changed:
            self._changed.wait_for(lambda: self._unacknowledged == 0, max(0.0, until - time.monotonic()))
            left, parts_left = self._unacknowledged, self._parts_unacknowledged
        self._stop.set()
        with self._changed:
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(_MAX_BLOCK_MS / 1e3 + 1)
        self._abandon()
        if left:
            self._metrics.undelivered(left, parts=parts_left)
            log.error("events never confirmed by Kafka", events=left, parts=parts_left)
        return parts_left

    def _run(self) -> None:
        while not self._stop.is_set():
            self._health.beat(_STAGE)
            with self._changed:
                if not self._waiting:
                    self._changed.wait(0.5)
                    continue
                event = self._waiting[0]
            try:
                self._send(event)
            except Exception:  # the thread's top frame: one event must not stop the others
                log.exception("event cannot be sent", topic=event.topic)
                self._settle(event, delivered=False)
                self._drop_head(event)
        self._health.retire(_STAGE)

    def _send(self, event: Event) -> None:
        assert self._producer is not None  # noqa: S101 (set by start)
        try:
            future = self._producer.send(
                self._topic(event.topic), key=event.key, value=event.value, headers=list(event.headers)
            )
        except KafkaTimeoutError:
            return  # no metadata yet: the event stays at the head of the queue
        self._drop_head(event)
        future.add_callback(lambda _: self._settle(event, delivered=True))
        future.add_errback(lambda error: self._fail(event, error))

    def _drop_head(self, event: Event) -> None:
        with self._changed:
            if self._waiting and self._waiting[0] is event:
                self._waiting.popleft()

    def _fail(self, event: Event, error: BaseException) -> None:
        if not self._stop.is_set():  # at the end `close` reports what is left
            log.error("Kafka refused an event", topic=event.topic, error=str(error))
            self._settle(event, delivered=False)

    def _settle(self, event: Event, *, delivered: bool) -> None:
        with self._changed:
            self._unacknowledged -= 1
            self._parts_unacknowledged -= event.is_part
            self._changed.notify_all()
        self._metrics.unacknowledged.set(self._unacknowledged)
        if delivered:
            self._metrics.acknowledged(is_part=event.is_part)
        else:
            self._metrics.undelivered(1, parts=int(event.is_part))
        _tell((event,))

    def _say_refusing(self) -> None:
        if self._refusing:
            bound = self._settings.max_unacknowledged
            log.error("verdicts are refused: Kafka has not acknowledged the last ones", unacknowledged=bound)
        else:
            log.info("verdicts are taken again")

    def _topic(self, kind: str) -> str:
        return f"{self._settings.topic_prefix}.{kind}"

    def _abandon(self) -> None:
        if self._producer is not None:
            self._producer.close(timeout=0 if self._unacknowledged else 5)
            self._producer = None


def _tell(events: Iterable[Event]) -> None:
    """Tell whoever asked that an event's fate is known; what is left at the end of a run is never told."""
    for event in events:
        if event.done is not None:
            event.done()
