"""The camera pool in Kafka: a worker's share of it, and the writing of it by `logicrd cameras apply`.

The workers of a pool are a consumer group on `<prefix>.cameras.v1`. Kafka gives each partition to one of them, which
reads it from the beginning and reads the cameras in it; a partition that goes to another worker takes its cameras
along, and they are stopped before the other one gets it. A worker that dies is missed after `SESSION_S`; the others
read its cameras within 15 s.

A worker that cannot reach Kafka goes on reading: its verdicts wait, and a line without eyes helps nobody. If the
others took its cameras over meanwhile, two workers read them until this one hears of it; the epoch in the verdicts (the
group's generation) says which of the two was in charge: the higher one. Once Kafka says that its place in the group is
lost, it stops its cameras and joins anew. Nothing of the pool is ever committed to Kafka as an offset.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import structlog
from kafka import ConsumerRebalanceListener, KafkaConsumer, KafkaProducer
from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor
from kafka.errors import KafkaError
from kafka.structs import TopicPartition

from pipeline.brokers import Unreadable, client_options, no_topic, poll, unreachable
from pipeline.cameras import Camera, read_secret
from pipeline.config import Pool as PoolSettings
from pipeline.config import rooted
from pipeline.errors import ConfigError
from pipeline.health import Health
from pipeline.metrics import Metrics
from pipeline.roster import Change, Place, Refusal, merged, plan, read_record
from pipeline.servers import Kafka as KafkaSettings

SESSION_S = 8.0
"""Silence after which Kafka takes a worker for dead. With the next heartbeat, the joining and the reading of records
its cameras are read again within 15 s."""
# How a worker hears of changes of the group: a camera that moves is unread for about this long.
_HEARTBEAT_S = 1.0
# How long the others wait for a worker that lives and does not come to a change of the group; its loop comes round in a
# quarter of a second.
_REJOIN_S = 10.0
_POLL_S = 0.25
_TIMEOUT_S = 3.0
# A worker's poll, and its wait for readers that let go.
_LET_GO_S = 3.0
# Of a record's key, which need not be a camera's id: it is told in an event, which has to fit into a record.
_LONGEST_NAME = 256
_ACKNOWLEDGED_S = 20.0
_STAGE = "camera pool"
_APPLY = "apply the camera again with `logicrd cameras apply`"

log = structlog.get_logger(__name__)


class PoolLine(Protocol):
    """What the pool needs of the line; called from one thread at a time."""

    epoch: int | None
    """The group's generation, for the verdicts."""

    @property
    def products(self) -> Collection[str]:
        """Products that this worker can judge."""

    def objection(self, camera: Camera) -> str:
        """Say why a camera of a known product cannot be read here; '' when it can."""

    def add_camera(self, camera: Camera) -> None:
        """Begin to read a camera."""

    def remove_cameras(self, camera_ids: Collection[str], reason: str | None) -> None:
        """Stop reading cameras; returns when no frame of theirs will be taken any more. None tells nobody."""

    def refuse_camera(self, camera_id: str, reason: str) -> None:
        """Tell the world that a camera is not read."""


class CameraPool:
    """A worker's place in its pool: one thread, from `start` to `close`."""

    def __init__(
        self, kafka: KafkaSettings, pool: PoolSettings, line: PoolLine, *, metrics: Metrics, health: Health
    ) -> None:
        self._kafka = kafka
        self._pool = pool
        self._line = line
        self._metrics = metrics
        self._health = health
        self._topic = cameras_topic(kafka)
        self._assignor = CooperativeStickyAssignor()
        self._consumer: KafkaConsumer | None = None
        # By partition: what is in it by camera id, and the offset from which on its records are news.
        self._records: dict[int, dict[str, Camera | Refusal]] = {}
        self._ends: dict[int, int] = {}
        self._complete: set[int] = set()
        self._running: dict[str, tuple[int, Camera]] = {}
        self._refused: dict[str, Refusal] = {}
        self._static: frozenset[str] = frozenset()
        self._failing = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=_STAGE, daemon=True)

    def connect(self) -> None:
        """Reach Kafka and find the topic; shares nothing yet. Raises DependencyError."""
        self._consumer = _connected(
            self._kafka,
            self._topic,
            client_id="logicrd-pool",
            group_id=f"{self._kafka.topic_prefix}.workers.{self._pool.name}",
            auto_offset_reset="earliest",
            partition_assignment_strategy=[self._assignor],
            session_timeout_ms=int(SESSION_S * 1e3),
            heartbeat_interval_ms=int(_HEARTBEAT_S * 1e3),
            max_poll_interval_ms=int(_REJOIN_S * 1e3),
            fetch_max_wait_ms=int(_POLL_S * 1e3),
            reconnect_backoff_max_ms=2_000,
            request_timeout_ms=10_000,
        )
        if len(self._consumer.partitions_for_topic(self._topic)) == 1:
            log.warning("the topic of the camera pool has one partition: one worker reads all", topic=self._topic)

    def start(self, static: Iterable[str]) -> None:
        """Join the group and begin to share; `static` are the ids of the line file's own cameras."""
        assert self._consumer is not None  # noqa: S101 (set by connect)
        self._static = frozenset(static)
        self._consumer.subscribe([self._topic], listener=_Listener(self))
        self._health.beat(_STAGE)
        self._thread.start()

    def stop(self) -> None:
        """Take and give up no more cameras; the worker stays in the group, so that nobody else reads them yet."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(_TIMEOUT_S + 1)

    def close(self) -> None:
        """Leave the group: from here on the others read the cameras of this worker, which has stopped them."""
        self._stop.set()
        if self._consumer is not None:
            self._consumer.close(autocommit=False, timeout_ms=int(_TIMEOUT_S * 1e3))
            self._consumer = None

    def _run(self) -> None:
        while not self._stop.is_set():
            self._health.beat(_STAGE)
            try:
                self._turn()
                self._failing = False
            except KafkaError as error:
                self._complain(str(error) or type(error).__name__)
            except Exception:  # the thread's top frame: cameras stay as they are, and the fault is seen
                log.exception("camera pool failed")
                self._stop.wait(1.0)
        self._health.retire(_STAGE)

    def _complain(self, error: str) -> None:
        if not self._failing:
            self._failing = True
            log.warning("camera pool: Kafka fails; the cameras stay as they are", error=error)
        self._stop.wait(1.0)

    def _turn(self) -> None:
        assert self._consumer is not None  # noqa: S101 (set by connect)
        for record in poll(self._consumer, int(_POLL_S * 1e3)):
            if isinstance(record, Unreadable):
                log.error(
                    "a record of the camera pool is skipped", offset=record.offset, error=record.error, hint=_APPLY
                )
            else:
                self._note(record.partition, record.key, record.value)
        self._catch_up(self._consumer)
        generation = self._consumer.group_metadata().generation_id
        if generation >= 0 and generation != self._line.epoch:
            self._line.epoch = generation
            self._metrics.epoch.set(generation)
        if not self._stop.is_set():
            self._reconcile()

    def _note(self, partition: int, key: bytes | None, value: bytes | None) -> None:
        """Keep what a record says; the last one of a key counts."""
        records = self._records.setdefault(partition, {})
        name = (key or b"")[:_LONGEST_NAME].decode("utf-8", "replace")
        found = read_record(key, value, self._pool.name) if value is not None else None
        if found is None:
            records.pop(name, None)
            return
        records[name] = found if isinstance(found, Refusal) else self._local(found)

    def _local(self, camera: Camera) -> Camera | Refusal:
        """Take a camera's paths from this worker's folder. A record may name no password file outside of it."""
        if camera.region is not None and camera.region.by_file:
            return Refusal("invalid", "region.mask: a path, not the mask itself", _APPLY)
        here = rooted(camera, self._pool.root)
        secret: Path | None = getattr(here, "password_file", None)
        if secret is None:
            return here
        if not secret.resolve().is_relative_to(self._pool.root.resolve()):
            outside = f"password_file {secret} lies outside of pool.root {self._pool.root}"
            return Refusal("invalid", outside, "keep the passwords of the pool's cameras in that folder")
        try:
            read_secret(secret)
        except ConfigError as error:
            return Refusal("invalid", str(error), "put the password there, and apply the camera again")
        return here

    def _catch_up(self, consumer: KafkaConsumer) -> None:
        """See which partitions have been read to their end, lest a camera be started by a record that is outdated."""
        assigned = consumer.assignment()
        if fresh := [partition for partition in assigned if partition.partition not in self._ends]:
            ends = consumer.end_offsets(fresh, timeout_ms=int(_TIMEOUT_S * 1e3))
            self._ends |= {partition.partition: end for partition, end in ends.items()}
        for partition in assigned:
            if partition.partition in self._complete:
                continue
            at = consumer.position(partition, timeout_ms=int(_POLL_S * 1e3))
            if at is None:  # the brokers do not tell yet
                return
            if at >= self._ends[partition.partition]:
                self._complete.add(partition.partition)

    def _reconcile(self) -> None:
        """Start, stop and refuse cameras until the worker reads what its partitions hold."""
        partitions = sorted(self._complete)
        wanted, invalid = merged(self._records.get(partition, {}) for partition in partitions)
        for name, camera in wanted.items():
            if camera.product in self._line.products and (text := self._line.objection(camera)):
                invalid[name] = Refusal("invalid", text, "correct the camera, or the line file's stations")
        wanted = {name: camera for name, camera in wanted.items() if name not in invalid}
        running = {name: camera for name, (_, camera) in self._running.items()}
        todo = plan(wanted, running, products=self._line.products, taken=self._static, capacity=self._pool.capacity)
        for reason, names in _why(todo.stop, wanted).items():
            self._remove(names, reason)
        homes = {name: partition for partition in reversed(partitions) for name in self._records.get(partition, {})}
        for camera in todo.start:
            self._line.add_camera(camera)
            self._running[camera.id] = homes[camera.id], camera
            log.info("camera added", camera=camera.id, product=camera.product, epoch=self._line.epoch)
        self._refuse(invalid | todo.refuse)

    def _remove(self, names: Collection[str], reason: str, *, tell: bool = True) -> None:
        self._line.remove_cameras(names, reason if tell else None)
        for name in names:
            del self._running[name]
            log.info("camera removed", camera=name, reason=reason)

    def _refuse(self, refused: dict[str, Refusal]) -> None:
        if refused == self._refused:
            return
        for name, refusal in refused.items():
            if refusal != self._refused.get(name):
                log.error("camera refused", camera=name, reason=refusal.reason, error=refusal.text, hint=refusal.hint)
                self._line.refuse_camera(name, refusal.reason)
        self._refused = refused
        self._metrics.refused(Counter(refusal.reason for refusal in refused.values()))

    # Kafka's thread, while `poll` waits for it

    def give_up(self, partitions: set[int], *, lost: bool) -> None:
        """Stop the cameras of partitions that go to another worker."""
        if self._stop.is_set():  # at the end the line has stopped them
            return
        for partition in partitions:
            self._records.pop(partition, None)
            self._ends.pop(partition, None)
            self._complete.discard(partition)
        if lost:
            # The library's assignor would go on claiming them when it joins anew. The leader takes each such partition
            # for one that its worker has to give up first; this worker does not have it, and nobody would read it.
            self._assignor.member_assignment = None
            log.warning("camera pool: this worker's place in the group is lost; it joins anew")
        if names := [name for name, (partition, _) in self._running.items() if partition in partitions]:
            # Those that are lost have been another worker's for a while: what is said of them is its to say.
            self._remove(names, "lost" if lost else "moved", tell=not lost)


class _Listener(ConsumerRebalanceListener):  # type: ignore[misc]  # the library has no types
    """Hands what the library says of partitions to the pool."""

    def __init__(self, pool: CameraPool) -> None:
        self._pool = pool

    def on_partitions_revoked(self, revoked: Iterable[TopicPartition]) -> None:
        self._pool.give_up({partition.partition for partition in revoked}, lost=False)

    def on_partitions_lost(self, lost: Iterable[TopicPartition]) -> None:
        self._pool.give_up({partition.partition for partition in lost}, lost=True)

    def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> None:
        """Nothing to do: `poll` gives the records."""


class PoolTopic:
    """The topic as a table, for commands: read all of it, write what differs."""

    def __init__(self, settings: KafkaSettings) -> None:
        self._settings = settings
        self._topic = cameras_topic(settings)

    def read(self) -> tuple[dict[Place, bytes], int]:
        """Give the records that are in force by place, and the number of partitions. Raises DependencyError."""
        consumer = _connected(self._settings, self._topic, client_id="logicrd-cameras", group_id=None)
        try:
            partitions = [TopicPartition(self._topic, n) for n in consumer.partitions_for_topic(self._topic)]
            consumer.assign(partitions)
            consumer.seek_to_beginning()
            ends = consumer.end_offsets(partitions)
            table: dict[Place, bytes] = {}
            while any(consumer.position(partition) < end for partition, end in ends.items()):
                for record in poll(consumer, 250):
                    if not isinstance(record, Unreadable):  # what no worker can read either
                        _keep(table, record)
        except KafkaError as error:
            raise unreachable(self._settings, error) from None
        finally:
            consumer.close()
        return table, len(partitions)

    def write(self, changes: Iterable[Change]) -> None:
        """Write changes: first all tombstones, so that no camera is read twice. Raises DependencyError.

        Blocks for `_LET_GO_S` between the two when a camera moves: its old worker gets the time to stop it.
        """
        changes = list(changes)
        writes = [write for change in changes for write in change.writes]
        try:
            producer = KafkaProducer(
                **client_options(self._settings),
                client_id="logicrd-cameras",
                acks="all",
                max_block_ms=int(self._settings.startup_timeout_s * 1e3),
            )
            try:
                for removing in (True, False):
                    sent = [
                        producer.send(self._topic, key=name.encode(), value=value, partition=partition)
                        for (partition, name), value in writes
                        if (value is None) is removing
                    ]
                    for future in sent:
                        future.get(timeout=_ACKNOWLEDGED_S)
                    if removing and any(change.moves for change in changes):
                        time.sleep(_LET_GO_S)
            finally:
                producer.close(timeout=5)
        except KafkaError as error:
            raise unreachable(self._settings, error) from None


def cameras_topic(settings: KafkaSettings) -> str:
    """Name the topic of the pools."""
    return f"{settings.topic_prefix}.cameras.v1"


def _keep(table: dict[Place, bytes], record: Any) -> None:  # noqa: ANN401 (the library's record has no public type)
    place = record.partition, (record.key or b"").decode("utf-8", "replace")
    if record.value is None:
        table.pop(place, None)
    else:
        table[place] = record.value


def _connected(settings: KafkaSettings, topic: str, **options: Any) -> KafkaConsumer:  # noqa: ANN401
    """Make a consumer and see that the topic is there. Raises DependencyError."""
    try:
        consumer = KafkaConsumer(**client_options(settings), enable_auto_commit=False, **options)
    except KafkaError as error:
        raise unreachable(settings, error) from None
    if not consumer.partitions_for_topic(topic):
        consumer.close()
        hint = "make it with `cleanup.policy=compact` and as many partitions as stations, or `logicrd stack up`"
        raise no_topic(settings, topic, hint=hint)
    return consumer


def _why(stopped: Iterable[str], wanted: Mapping[str, Camera]) -> dict[str, list[str]]:
    """Group cameras by the reason of their stop, which their last status event gives."""
    reasons: dict[str, list[str]] = {}
    for name in stopped:
        reasons.setdefault("changed" if name in wanted else "removed", []).append(name)
    return reasons
