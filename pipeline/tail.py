"""Verdicts as a MES reads them: a plain consumer on the verdict topic, decoded and filtered.

Used by `logicrd verdicts tail`, `cameras list`, `reconcile`, and tests that must not trust the worker's own account.
Commits no offsets.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from types import TracebackType
from typing import Any, Literal

from kafka import KafkaConsumer
from kafka.errors import KafkaError
from kafka.structs import TopicPartition

from pipeline.errors import DependencyError
from pipeline.events import decode
from pipeline.servers import Kafka as KafkaSettings

_SILENT_S = 30.0
_UNHEARD = timedelta(minutes=5)
"""How long a worker that Kafka cannot reach may go on speaking of cameras that are another's."""


class VerdictReader:
    """Reads one of the line's topics, from its start, from a time (of the records, with a zone) or from now on."""

    def __init__(
        self, settings: KafkaSettings, *, topic: str = "verdict.v1", start: Literal["first", "now"] | datetime
    ) -> None:
        self._settings = settings
        self._topic = f"{settings.topic_prefix}.{topic}"
        self._start = start
        self._consumer: KafkaConsumer | None = None

    def __enter__(self) -> VerdictReader:
        """Connect, and fix where reading begins. Raises DependencyError."""
        try:
            consumer = KafkaConsumer(
                bootstrap_servers=self._settings.bootstrap,
                group_id=None,
                enable_auto_commit=False,
                bootstrap_timeout_ms=int(self._settings.startup_timeout_s * 1e3),
                allow_auto_create_topics=False,
            )
            partitions = consumer.partitions_for_topic(self._topic)
            if not partitions:
                consumer.close()
                raise DependencyError(f"Kafka has no topic {self._topic}", hint="`logicrd stack up` makes it")
            consumer.assign([TopicPartition(self._topic, partition) for partition in sorted(partitions)])
            if self._start == "first":
                consumer.seek_to_beginning()
            elif self._start == "now":
                consumer.seek_to_end()
            else:
                for partition, offset in _offsets_at(consumer, self._start).items():
                    consumer.seek(partition, offset)
            for partition in consumer.assignment():
                consumer.position(partition)
        except KafkaError as error:
            servers = ", ".join(self._settings.bootstrap)
            raise DependencyError(f"Kafka at {servers}: {error}", hint="start it: `logicrd stack up`") from None
        self._consumer = consumer
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._consumer is not None:
            self._consumer.close()

    def read(self, *, idle_s: float | None = None) -> Iterator[dict[str, Any]]:
        """Yield events as `{"attributes", "data", "key", "partition", "offset"}` until none came for `idle_s`.

        What is no event of ours comes as `{"error": ...}`: shown, never skipped in silence.
        """
        last_s = time.monotonic()
        while idle_s is None or time.monotonic() - last_s < idle_s:
            for record in self._poll():
                last_s = time.monotonic()
                yield event_of(record)

    def read_to_end(self) -> Iterator[dict[str, Any]]:
        """Yield the events that are in the topic now, however many are still coming in."""
        yield from map(event_of, self.records_to_end())

    def records_to_end(self) -> Iterator[Any]:
        """Yield the client library's records that are in the topic now, as they are.

        Raises DependencyError when Kafka no longer answers.
        """
        assert self._consumer is not None  # noqa: S101 (set by __enter__)
        try:
            ends = self._consumer.end_offsets(list(self._consumer.assignment()))
        except KafkaError as error:
            raise DependencyError(f"Kafka no longer answers: {error}", hint="try again") from None
        silent_s = time.monotonic()
        while any(self._consumer.position(partition) < end for partition, end in ends.items()):
            for record in self._poll():
                silent_s = time.monotonic()
                if record.offset < ends[TopicPartition(record.topic, record.partition)]:
                    yield record
            if time.monotonic() - silent_s > _SILENT_S:
                raise DependencyError(f"Kafka gave no record of {self._topic} for {_SILENT_S:.0f} s", hint="try again")

    def _poll(self) -> Iterator[Any]:
        assert self._consumer is not None  # noqa: S101 (set by __enter__)
        for records in self._consumer.poll(timeout_ms=250).values():
            yield from records


def camera_states(settings: KafkaSettings, source: str) -> dict[str, dict[str, str]]:
    """Give each camera's last status event of the highest epoch as `{"state", "reason", "since", "worker"}`, by camera.

    `source` is the line's, `/site/area/line`. Raises DependencyError.
    """
    with VerdictReader(settings, topic="status.v1", start="first") as reader:
        events = [event for event in reader.read_to_end() if _is_of_camera(event, source)]
    last: dict[str, dict[str, Any]] = {}
    for event in sorted(events, key=_time):
        camera = str(event["data"].get("cameraId"))
        if camera not in last or not _is_outdated(event, last[camera]):
            last[camera] = event
    return {camera: _state(event) for camera, event in last.items()}


def _is_of_camera(event: dict[str, Any], source: str) -> bool:
    """Tell a camera's change of state from a worker's heartbeat, which lies on the same topic."""
    return event.get("attributes", {}).get("source") == source and "cameraId" in event["data"]


def _state(event: dict[str, Any]) -> dict[str, str]:
    shown = {key: str(event["data"].get(key, "")) for key in ("state", "reason", "worker")}
    return {**shown, "since": _time(event)}


def _time(event: dict[str, Any]) -> str:
    return str(event["attributes"].get("time", ""))


def _is_outdated(event: dict[str, Any], other: dict[str, Any]) -> bool:
    """Say whether a later event is that of a worker that has lost the camera to the `other` one's, and not heard of it.

    That is so for a short while only: Kafka counts the epochs of a pool anew when it has had no worker for long.
    """
    epoch, known = event["data"].get("epoch"), other["data"].get("epoch")
    if epoch is None or known is None or epoch >= known:
        return False
    try:
        return datetime.fromisoformat(_time(event)) - datetime.fromisoformat(_time(other)) < _UNHEARD
    except ValueError:
        return False


def _offsets_at(consumer: KafkaConsumer, at: datetime) -> dict[TopicPartition, int]:
    """Find the first record of each partition at or after a time; the end where there is none."""
    partitions = list(consumer.assignment())
    ends = consumer.end_offsets(partitions)
    found = consumer.offsets_for_times(dict.fromkeys(partitions, int(at.timestamp() * 1e3)))
    return {
        partition: ends[partition] if (place := found.get(partition)) is None else place.offset
        for partition in partitions
    }


def event_of(record: Any) -> dict[str, Any]:  # noqa: ANN401 (the library's record has no public type)
    """Decode a record as `VerdictReader.read` does."""
    place = {
        "key": record.key.decode("utf-8", "replace") if record.key else None,
        "partition": record.partition,
        "offset": record.offset,
    }
    try:
        return {**decode(record.value or b"", dict(record.headers)), **place}
    except ValueError as error:
        return {"error": f"not an event of this line: {error}", **place}
