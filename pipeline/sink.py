"""Events to Kafka: idempotent, acknowledged by all replicas, in order of `put` within a key, and never silently gone.

`put` only queues; one publisher thread talks to the client library, whose `send` may block. Everything that the broker
has not acknowledged stays in memory, counts towards one bound, and is sent again when the library gives it up: the
first refusal ends the library's producer before it sends anything later, and a new one begins with the oldest event
that is not acknowledged. What Kafka will never take (too large, invalid) goes to the dead-letter topic in its place.
While the worker lives nothing else expires, for as long as the brokers are away. Owned by `outbox`.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import replace
from functools import partial

import structlog
from kafka import KafkaProducer
from kafka import errors as kafka_errors
from kafka.errors import KafkaError, KafkaTimeoutError

from pipeline.brokers import client_options, unreachable
from pipeline.events import Encoder, Event
from pipeline.health import Health
from pipeline.metrics import Metrics
from pipeline.servers import Kafka as KafkaSettings
from pipeline.tracing import Tracing

# The library gives a record up after this time and would then send later ones ahead of it: the order of a key is worth
# more than a bound that ours (`max_unacknowledged`) already sets. Largest value it takes, 24 days.
_DELIVERY_TIMEOUT_MS = 2**31 - 1
_MAX_BLOCK_MS = 2_000
# One batch a partition is under way at a time: the library's 16 KiB would be ten verdicts a round trip.
_BATCH_BYTES = 128 * 1024
_PAUSE_S = 1.0
_STAGE = "publisher"
_UNDELIVERABLE = (
    kafka_errors.InvalidRecordError,
    kafka_errors.InvalidTimestampError,
    kafka_errors.MessageSizeTooLargeError,
    kafka_errors.PolicyViolationError,
    kafka_errors.RecordListTooLargeError,
    kafka_errors.UnsupportedForMessageFormatError,
    TypeError,
)

log = structlog.get_logger(__name__)


class Sink:
    """The way to Kafka; `put` from any thread, never blocking."""

    def __init__(
        self,
        settings: KafkaSettings,
        *,
        encoder: Encoder,
        metrics: Metrics,
        health: Health,
        tracing: Tracing | None = None,
    ) -> None:
        self._settings = settings
        self._encoder = encoder
        self._metrics = metrics
        self._health = health
        self._tracing = tracing
        lock = threading.Lock()
        self._changed = threading.Condition(lock)  # for the publisher
        self._settled = threading.Condition(lock)  # for whoever waits for the end
        self._waiting: deque[Event] = deque()
        self._sent: dict[int, Event] = {}  # by number, in order
        self._last_number = 0
        self._alone = 0  # so many events go one at a time, to find the one that is refused
        self._fault: tuple[int, BaseException] | None = None
        self._refusing = False
        self._troubled = False
        self._found = False  # Kafka was there once, and had the topics
        self._absence = ""
        self._stop = threading.Event()
        self._producer: KafkaProducer | None = None
        self._thread = threading.Thread(target=self._run, name=_STAGE, daemon=True)

    def start(self) -> None:
        """Connect and see that the topics are there. Raises DependencyError naming what is not.

        Where Kafka is not required at the start, that is a line in the log, and the thread goes on looking for it.
        """
        try:
            self._find(self._settings.startup_timeout_s)
        except KafkaError as error:
            fault = unreachable(self._settings, error)
            if self._settings.required_at_start:
                raise fault from None
            log.error("begins without Kafka: events wait in the outbox", error=str(fault), hint=fault.hint)
            self._absence = str(error)
            self._health.ready("kafka", False)
        self._health.beat(_STAGE)
        self._thread.start()

    @property
    def room(self) -> int:
        """How many events may be put before one is refused."""
        return max(0, self._settings.max_unacknowledged - self._unacknowledged)

    def put(self, *events: Event) -> None:
        """Queue events; those beyond the bound are refused, counted and logged once a spell."""
        with self._changed:
            room = self.room
            taken, refused = events[:room], events[room:]
            self._waiting.extend(taken)
            self._changed.notify_all()
        self._metrics.unacknowledged.set(self._unacknowledged)
        if refused:
            self._metrics.undelivered(len(refused), parts=sum(event.is_part for event in refused))
            _tell(refused)
        if bool(refused) is not self._refusing:
            self._refusing = bool(refused)
            self._say_refusing()

    def close(self, until_s: float) -> list[Event]:
        """Send what is left, until then on the monotonic clock; gives the events that Kafka never confirmed."""
        with self._settled:
            self._settled.wait_for(lambda: self._unacknowledged == 0, max(0.0, until_s - time.monotonic()))
        self._stop.set()
        with self._changed:
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(_MAX_BLOCK_MS / 1e3 + 1)
        self._abandon()
        with self._changed:
            return [*self._sent.values(), *self._waiting]

    @property
    def _unacknowledged(self) -> int:
        return len(self._waiting) + len(self._sent)

    def _connect(self, timeout_s: float) -> KafkaProducer:
        options = client_options(self._settings) | {"bootstrap_timeout_ms": int(timeout_s * 1e3)}
        return KafkaProducer(
            **options,
            client_id="logicrd",
            acks="all",
            enable_idempotence=True,
            linger_ms=5,
            batch_size=_BATCH_BYTES,
            max_block_ms=_MAX_BLOCK_MS,
            delivery_timeout_ms=_DELIVERY_TIMEOUT_MS,
            reconnect_backoff_max_ms=2_000,
            request_timeout_ms=10_000,
        )

    def _find(self, timeout_s: float) -> None:
        """Connect and see that the topics are there. Raises KafkaError, and then holds no producer."""
        try:
            self._producer = producer = self._connect(timeout_s)
            for kind in ("verdict.v1", "view.v1", "status.v1", "audit.v1", "dlq.v1"):
                _require(producer, self._topic(kind))
        except KafkaError:
            self._abandon()
            raise
        self._found = True
        self._health.ready("kafka", True)

    # Publisher thread

    def _run(self) -> None:
        while not self._stop.is_set():
            self._health.beat(_STAGE)
            try:
                self._turn()
            except Exception:  # the thread's top frame: publishing goes on, and the fault is seen
                log.exception("publishing failed")
                self._stop.wait(_PAUSE_S)
        self._health.retire(_STAGE)

    def _turn(self) -> None:
        with self._changed:
            fault = self._fault
            held_back = bool(self._alone and self._sent)
            if fault is None and self._found and (held_back or not self._waiting):
                self._changed.wait(0.5)
                return
        if fault is not None:
            self._begin_anew(*fault)
        elif self._producer is None:
            self._reconnect()
        else:
            self._send(self._waiting[0])  # only this thread takes from the left

    def _send(self, event: Event) -> None:
        assert self._producer is not None  # noqa: S101 (seen by _turn)
        self._last_number += 1
        number = self._last_number
        try:
            future = self._producer.send(
                self._topic(event.topic), key=event.key, value=event.value, headers=list(event.headers)
            )
        except KafkaTimeoutError:
            return  # no metadata yet: the event stays at the head of the queue
        except _UNDELIVERABLE as error:
            self._bury(error)
            return
        except KafkaError as error:  # the producer has ended meanwhile
            with self._changed:
                self._fault = self._fault or (number, error)
            return
        with self._changed:
            self._waiting.popleft()
            self._sent[number] = event
        future.add_callback(partial(self._acknowledged, number, time.monotonic()))
        future.add_errback(partial(self._fail, number))

    def _begin_anew(self, number: int, error: BaseException) -> None:
        """After a refusal: put everything unacknowledged back in line, and find which event it was."""
        with self._changed:
            found = self._sent.keys() == {number} and isinstance(error, _UNDELIVERABLE)
            self._alone = 0 if found else len(self._sent)
            self._waiting.extendleft(reversed(self._sent.values()))
            self._sent.clear()
            self._fault = None
        self._abandon()
        if found:
            self._bury(error)
        elif not isinstance(error, _UNDELIVERABLE):
            if not self._troubled:
                log.error("Kafka refuses events: they are sent again until it takes them", error=str(error))
            self._troubled = True
            self._stop.wait(_PAUSE_S)

    def _reconnect(self) -> None:
        try:
            if self._found:
                self._producer = self._connect(_MAX_BLOCK_MS / 1e3)
                return
            self._find(_MAX_BLOCK_MS / 1e3)
            log.info("Kafka is there: what waited in the outbox goes out")
        except KafkaError as error:
            if not self._found and str(error) != self._absence:  # it is there now, and something else is wrong
                self._absence = str(error)
                log.error("Kafka cannot be used yet", error=self._absence)
            self._stop.wait(_PAUSE_S)

    def _bury(self, error: BaseException) -> None:
        """Put a dead letter in the place of the first waiting event, so that it does not block its key."""
        event = self._waiting[0]
        log.error(
            "event cannot be delivered", topic=event.topic, key=event.key.decode(errors="replace"), error=str(error)
        )
        self._metrics.undelivered(1, parts=int(event.is_part))
        letter = None
        if event.topic != "dlq.v1":
            reason = f"{type(error).__name__}: {error}"
            letter = self._encoder.dead_letter(self._topic(event.topic), event.key, event.value, event.headers, reason)
        with self._changed:
            if letter is None:
                self._waiting.popleft()
                self._settled.notify_all()
            else:
                self._waiting[0] = replace(letter, done=event.done)
        if letter is None:
            _tell((event,))

    # The client library's thread

    def _acknowledged(self, number: int, sent_s: float, _: object) -> None:
        with self._changed:
            event = self._sent.pop(number, None)
            if event is None:
                return  # of a producer that was given up: it is sent again
            self._troubled = False
            if self._alone:
                self._alone -= 1
                self._changed.notify_all()
            if not self._unacknowledged:
                self._settled.notify_all()
        self._metrics.unacknowledged.set(self._unacknowledged)
        self._metrics.acknowledged(is_part=event.is_part)
        _tell((event,))
        if self._tracing is not None:
            self._tracing.acknowledged(event, sent_s)

    def _fail(self, number: int, error: BaseException) -> None:
        """End the producer before it sends anything later."""
        with self._changed:
            if self._fault is not None or self._stop.is_set() or number not in self._sent:
                return
            self._fault = (number, error)
            self._changed.notify_all()
        if self._producer is not None:
            self._producer._sender.force_close()  # its `close` waits first for what is under way

    def _say_refusing(self) -> None:
        if self._refusing:
            bound = self._settings.max_unacknowledged
            log.error("verdicts are refused: Kafka has not acknowledged the last ones", unacknowledged=bound)
        else:
            log.info("verdicts are taken again")

    def _topic(self, kind: str) -> str:
        return f"{self._settings.topic_prefix}.{kind}"

    def _abandon(self) -> None:
        """End the producer, and whatever it still holds."""
        producer, self._producer = self._producer, None
        if producer is None:
            return
        producer._sender.force_close()  # as above
        with contextlib.suppress(KafkaError):
            producer.close(timeout=1)


def _require(producer: KafkaProducer, topic: str) -> None:
    """See that a topic is there; the library tells a missing one only by not answering. Raises KafkaError."""
    with contextlib.suppress(KafkaTimeoutError):
        if producer.partitions_for(topic):
            return
    raise KafkaTimeoutError(f"topic {topic} does not exist, or the brokers do not tell within 2 s")


def _tell(events: Iterable[Event]) -> None:
    """Tell whoever asked that an event's fate is known; what is left at the end of a run is never told."""
    for event in events:
        if event.done is not None:
            event.done()
