"""Verdicts as a MES reads them: a plain consumer on the verdict topic, decoded and filtered.

Used by `logicrd verdicts tail`, `cameras list`, `thresholds` and `reconcile`, and by tests that must not trust the
worker's own account.
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

from pipeline.brokers import Unreadable, client_options, no_topic, poll, unreachable
from pipeline.errors import DependencyError
from pipeline.events import decode
from pipeline.servers import Kafka as KafkaSettings
from pipeline.wire import CANDIDATE_FIGURES

_SILENT_S = 30.0
_UNHEARD = timedelta(minutes=5)
"""How long a worker that Kafka cannot reach may go on speaking of cameras that are another's."""

_FARTHEST = 1_000_000
"""How many records of a partition are searched at least before a product counts as rare."""


class VerdictReader:
    """Reads one of the line's topics: from its start, from now on, from this many records before the end on, or from a
    time on (of the records, with a zone)."""

    def __init__(
        self, settings: KafkaSettings, *, topic: str = "verdict.v1", start: Literal["first", "now"] | int | datetime
    ) -> None:
        self._settings = settings
        self._topic = f"{settings.topic_prefix}.{topic}"
        self._start = start
        self._consumer: KafkaConsumer | None = None

    def __enter__(self) -> VerdictReader:
        """Connect, and fix where reading begins. Raises DependencyError."""
        try:
            consumer = KafkaConsumer(**client_options(self._settings), group_id=None, enable_auto_commit=False)
            partitions = consumer.partitions_for_topic(self._topic)
            if not partitions:
                consumer.close()
                raise no_topic(self._settings, self._topic)
            consumer.assign([TopicPartition(self._topic, partition) for partition in sorted(partitions)])
            if self._start == "first":
                consumer.seek_to_beginning()
            elif not isinstance(self._start, datetime):
                consumer.seek_to_end()
            else:
                for partition, offset in _offsets_at(consumer, self._start).items():
                    consumer.seek(partition, offset)
            for partition in consumer.assignment():
                end = consumer.position(partition)
                if isinstance(self._start, int):
                    first = consumer.beginning_offsets([partition])[partition]
                    consumer.seek(partition, max(first, end - self._start))
        except KafkaError as error:
            raise unreachable(self._settings, error) from None
        self._consumer = consumer
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._consumer is not None:
            self._consumer.close()

    def read(self, *, idle_s: float | None = None) -> Iterator[dict[str, Any]]:
        """Yield events as `{"attributes", "data", "key", "partition", "offset"}` until none came for `idle_s`.

        What is no event of ours comes as `{"error": ...}`: shown, never skipped in silence. Raises DependencyError when
        Kafka refuses.
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
            raise unreachable(self._settings, error) from None
        silent_s = time.monotonic()
        while any(self._consumer.position(partition) < end for partition, end in ends.items()):
            for record in self._poll():
                silent_s = time.monotonic()
                if record.offset < ends[TopicPartition(record.topic, record.partition)]:
                    yield record
            if time.monotonic() - silent_s > _SILENT_S:
                raise DependencyError(f"Kafka gave no record of {self._topic} for {_SILENT_S:.0f} s", hint="try again")

    def is_whole(self) -> bool:
        """Say whether everything that the topic still holds is read, or has yet to be."""
        assert self._consumer is not None  # noqa: S101 (set by __enter__)
        firsts = self._consumer.beginning_offsets(list(self._consumer.assignment()))
        return all(self._consumer.position(partition) <= first for partition, first in firsts.items())

    def _poll(self) -> Iterator[Any]:
        assert self._consumer is not None  # noqa: S101 (set by __enter__)
        try:
            yield from poll(self._consumer, 250)
        except KafkaError as error:
            raise unreachable(self._settings, error) from None


def last_verdicts(settings: KafkaSettings, source: str, product: str, count: int) -> list[dict[str, Any]]:
    """Give the last `count` verdicts on parts of a product, each part's first, oldest first. Raises DependencyError.

    `source` is the line's, `/site/area/line`. Looks further and further back, for other products share the partitions.
    """
    back = count
    while True:
        with VerdictReader(settings, start=back) as reader:
            whole = reader.is_whole()
            found: dict[str, dict[str, Any]] = {}
            for event in reader.read_to_end():
                attributes, data = event.get("attributes", {}), event.get("data", {})
                if attributes.get("source") == source and data.get("productId") == product:
                    found.setdefault(str(attributes.get("id")), event)
        if whole or len(found) >= count or back > _FARTHEST:
            return sorted(found.values(), key=_time)[-count:]
        back *= 8


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


def candidate_figures(settings: KafkaSettings, source: str, product: str, model_sha256: str) -> list[dict[str, Any]]:
    """Give what each worker of a line told last of a version on trial.

    A row has `worker`, each of `CANDIDATE_FIGURES`, `refused` and `told`. `source` is the line's, `/site/area/line`.
    Raises DependencyError.
    """
    with VerdictReader(settings, topic="status.v1", start="first") as reader:
        events = [event for event in reader.read_to_end() if "models" in event.get("data", {})]
    last: dict[str, dict[str, Any]] = {}
    for event in sorted(events, key=_time):
        if event["attributes"].get("source") == source:
            last[str(event["key"])] = event
    rows = []
    for event in last.values():
        models: dict[str, Any] = {model.get("productId"): model for model in event["data"]["models"]}
        tried = models.get(product, {}).get("candidate") or {}
        if tried.get("sha256") == model_sha256:
            told = {"worker": event["data"]["worker"], "refused": tried["refused"], "told": _time(event)}
            rows.append(told | {name: tried[name] for name in CANDIDATE_FIGURES})
    return rows


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

    That is so for a short while only: Kafka counts the epochs of a pool anew when it has had no worker for long. Pools
    count each for itself: of a camera that went to another pool, the later event holds.
    """
    epoch, known = event["data"].get("epoch"), other["data"].get("epoch")
    if epoch is None or known is None or epoch >= known or event["data"].get("pool") != other["data"].get("pool"):
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
    if isinstance(record, Unreadable):
        return {"error": record.error, **place}
    try:
        return {**decode(record.value or b"", dict(record.headers)), **place}
    except ValueError as error:
        return {"error": f"not an event of this line: {error}", **place}
