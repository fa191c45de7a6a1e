"""Triggers from Kafka: which part is in front of a station's cameras, told by the MES or the PLC.

One thread reads `<prefix>.trigger.v1` from where the last run had come to: the place of a trigger is committed once its
part's verdict is on disk (without an outbox: in Kafka), so a part that was open when a worker died is told again to the
next one, which gives it its verdict under the same id. A record that is no trigger is counted, logged and put on
`<prefix>.dlq.v1`; it never stops the reading. Knows no frame and never judges. Owned by `app`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

import structlog
from kafka import KafkaConsumer
from kafka.errors import KafkaError
from kafka.structs import OffsetAndMetadata, TopicPartition

from pipeline.brokers import Unreadable, client_options, no_topic, poll, unreachable
from pipeline.events import Encoder, Event
from pipeline.health import Health
from pipeline.metrics import Metrics
from pipeline.servers import Kafka as KafkaSettings
from pipeline.stations import Station
from pipeline.types import Trigger
from pipeline.wire import TriggerData, decode_trigger

_TOPIC = "trigger.v1"
_STAGE = "triggers"
_POLL_MS = 100
_PAUSE_S = 1.0
_COMMIT_MS = 2_000

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Places:
    """How far each partition is done with: everything before `next`, but for the offsets that are pending."""

    next: dict[int, int] = field(default_factory=dict)
    pending: dict[int, dict[int, None]] = field(default_factory=dict)

    def take(self, partition: int, offset: int, *, pending: bool) -> None:
        """Note a record that was read, in the order of offsets; a pending one holds the place until it is settled."""
        self.next[partition] = offset + 1
        if pending:
            self.pending.setdefault(partition, {})[offset] = None

    def settle(self, partition: int, offset: int) -> None:
        """Note that a pending record is done with."""
        self.pending.get(partition, {}).pop(offset, None)

    def reached(self) -> dict[int, int]:
        """Give the offset of each partition from which a next run has to read."""
        return {
            partition: next(iter(self.pending.get(partition) or ()), position)
            for partition, position in self.next.items()
        }


class TriggerReader:
    """Reads the triggers of this line's stations in mode `message`; `take` gets each on the reader's thread."""

    def __init__(
        self,
        settings: KafkaSettings,
        stations: Mapping[str, Station],
        *,
        line: str,
        take: Callable[[Trigger], None],
        refuse: Callable[[Event], None],
        encoder: Encoder,
        metrics: Metrics,
        health: Health,
    ) -> None:
        self._settings = settings
        self._stations = {name: station for name, station in stations.items() if station.trigger == "message"}
        self._line = line
        self._take = take
        self._refuse = refuse
        self._encoder = encoder
        self._metrics = metrics
        self._health = health
        self._topic = f"{settings.topic_prefix}.{_TOPIC}"
        self._lock = threading.Lock()
        self._places = Places()
        self._committed: dict[int, int] = {}
        self._backlog: dict[int, int] = {}
        self._consumer: KafkaConsumer | None = None
        self._quiet = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=_STAGE, daemon=True)

    def connect(self) -> None:
        """Find the place to read from; nothing is connected where no station asks for triggers.

        Raises DependencyError. A first run begins with what is sent from now on.
        """
        if not self._stations:
            return
        try:
            self._find_place()
        except KafkaError as error:
            raise unreachable(self._settings, error) from None

    def start(self) -> None:
        """Begin to hand triggers over."""
        if self._consumer is not None:
            self._health.beat(_STAGE)
            self._thread.start()

    def settled(self, receipt: tuple[int, int]) -> None:
        """Note that a trigger's verdict can no longer be lost; from any thread."""
        with self._lock:
            self._places.settle(*receipt)

    def stop(self) -> None:
        """Hand over nothing more; what was read and has no verdict yet may still be settled."""
        self._quiet.set()

    def close(self) -> None:
        """Commit the last place and disconnect."""
        self._quiet.set()
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(5.0)
        elif self._consumer is not None:
            self._consumer.close()

    def _find_place(self) -> None:
        # No group protocol: this worker reads every partition and takes what is for its stations. The group's name only
        # keeps the place; it holds the stations, so that workers of one line keep places of their own.
        group = f"logicrd.{self._line}.{'+'.join(sorted(self._stations))}"
        consumer = self._consumer = KafkaConsumer(
            **client_options(self._settings),
            client_id="logicrd-triggers",
            group_id=group,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
        )
        partitions = [
            TopicPartition(self._topic, number) for number in consumer.partitions_for_topic(self._topic) or ()
        ]
        if not partitions:
            raise no_topic(self._settings, self._topic)
        consumer.assign(partitions)
        ends = consumer.end_offsets(partitions)
        for partition in partitions:
            place = consumer.committed(partition)
            consumer.seek(partition, ends[partition] if place is None else place)
            self._places.next[partition.partition] = ends[partition] if place is None else place
            self._backlog[partition.partition] = ends[partition]
        self._commit()

    def _run(self) -> None:
        assert self._consumer is not None  # noqa: S101 (set by connect)
        while not self._stop.is_set():
            self._health.beat(_STAGE)
            try:
                self._read()
                self._commit()
            except KafkaError as error:
                log.warning("triggers cannot be read", error=str(error))
                self._stop.wait(_PAUSE_S)
            except Exception:  # the thread's top frame: reading goes on, and the fault is seen
                log.exception("reading triggers failed")
                self._stop.wait(_PAUSE_S)
        try:
            self._commit()
        except KafkaError as error:
            log.warning("place of the last triggers not kept: the next run reads them again", error=str(error))
        self._consumer.close()
        self._health.retire(_STAGE)

    def _read(self) -> None:
        assert self._consumer is not None  # noqa: S101 (set by connect)
        if self._quiet.is_set():
            self._stop.wait(_POLL_MS / 1e3)
            return
        for record in poll(self._consumer, _POLL_MS):
            self._handle(record)

    def _handle(self, record: Any) -> None:  # noqa: ANN401 (the library's record has no public type)
        if isinstance(record, Unreadable):
            self._dead_letter(record, record.error)
            return
        try:
            data = decode_trigger(record.value, dict(record.headers))
            trigger = self._trigger(data, record)
        except ValueError as error:
            self._dead_letter(record, str(error))
            return
        with self._lock:
            self._places.take(record.partition, record.offset, pending=trigger is not None)
        if trigger is not None:
            self._take(trigger)

    def _dead_letter(self, record: Any, error: str) -> None:  # noqa: ANN401 (as above)
        receipt = (record.partition, record.offset)
        with self._lock:
            self._places.take(*receipt, pending=True)
        self._metrics.trigger("refused")
        place = f"{record.topic}/{record.partition}/{record.offset}"
        log.warning("trigger refused: it lies on the dead-letter topic", record=place, error=error)
        event = self._encoder.dead_letter(place, record.key, record.value, record.headers, error)
        self._refuse(replace(event, done=partial(self.settled, receipt)))

    def _trigger(self, data: TriggerData, record: Any) -> Trigger | None:  # noqa: ANN401 (as above)
        """Make the trigger of a record; None for that of others. Raises ValueError for an unknown camera."""
        station = self._stations.get(data.station)
        if station is None or (data.line is not None and data.line != self._line):
            return None
        known = [view.camera for view in station.views]
        if strange := [camera for camera in data.cameras or () if camera not in known]:
            raise ValueError(f"cameras: station {station.name} has no camera {strange[0]!r}")
        now_at, now_s = datetime.now(UTC), time.monotonic()
        triggered_at = data.triggered_at or now_at
        return Trigger(
            station=station.name,
            part_id=data.part_id,
            meas_id=data.meas_id,
            product=data.recipe_id,
            cameras=tuple(data.cameras) if data.cameras is not None else None,
            triggered_at=triggered_at,
            triggered_s=now_s - believed_age_s(triggered_at, now_at, station.window_s),
            receipt=(record.partition, record.offset),
            stale=record.offset < self._backlog.get(record.partition, 0),
        )

    def _commit(self) -> None:
        """Keep the place, if it has moved."""
        assert self._consumer is not None  # noqa: S101 (set by connect)
        with self._lock:
            reached = self._places.reached()
        moved = {partition: offset for partition, offset in reached.items() if self._committed.get(partition) != offset}
        if not moved:
            return
        offsets = {
            TopicPartition(self._topic, partition): OffsetAndMetadata(offset, "", -1)
            for partition, offset in moved.items()
        }
        self._consumer.commit(offsets, timeout_ms=_COMMIT_MS)
        self._committed |= moved


def believed_age_s(triggered_at: datetime, now_at: datetime, window_s: float) -> float:
    """Tell how long ago a trigger was, by its sender's clock, as far as that is believed.

    That is as far as the station's window reaches: an older stamp, or one of the future, is that of a clock that runs
    elsewhere or has jumped, and the part counts from its record's arrival.
    """
    age_s = (now_at - triggered_at).total_seconds()
    return age_s if 0 <= age_s <= window_s else 0.0
