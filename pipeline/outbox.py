"""The one way out of the line: an event is on disk before its part counts as done, and stays until Kafka has it.

`put` only queues. The outbox's own thread writes what has come in one durable append (group commit), hands events over
to the sink in the order in which they came, replays of earlier runs first, and lets go of what Kafka acknowledges. No
other thread ever waits for the disk. Owns the journal and the sink; owned by `app`.

**When the disk does not take a verdict** (full, read-only, broken, or a bound of the outbox is reached), the line
fails safe, because a verdict that exists in memory alone is lost with the worker, and nobody would know:

- A verdict that could not be stored never leaves as OK. `otherwise` makes it UNINSPECTED with cause
  `outbox_unavailable`, for good; an NG stands, as it does beside a missing view. So it is for every verdict until the
  disk takes events again.
- Those events are held in memory, as many as `kafka.max_unacknowledged`, behind what is stored. With Kafka up they go
  there at once: the MES is told in time, by a verdict that lets no part pass. With Kafka away too they wait, and are
  written as soon as the disk allows; what goes beyond the bound is refused, counted and logged as lost. A trigger whose
  verdict was refused is not settled, so that the next run gives its part a verdict.
- Nothing that is stored is ever thrown away to make room, however old or large the outbox becomes.
- Readiness says `outbox`, `inspection_outbox_up` is 0, and the disk is tried again every second.

Without a folder (`outbox.dir: null`) events go straight to the sink, and are lost with the worker.
"""

from __future__ import annotations

import errno
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

import structlog

from pipeline.config import Outbox as OutboxSettings
from pipeline.errors import ConfigError
from pipeline.events import Event, packed, unpacked
from pipeline.health import Health
from pipeline.journal import SEGMENT_BYTES, Journal, stored
from pipeline.metrics import Metrics
from pipeline.sink import Sink

_STAGE = "outbox"
_TICK_S = 0.05
_REST_S = 0.2
_RETRY_S = 1.0
_SHOW_EVERY_S = 0.5
_LAST_TURN_S = 5.0
_ALARM = 0.5
_ALARM_OVER = 0.4
# So many events are under way to Kafka at once: it keeps the client busy, and is what a restart may send twice.
_WINDOW = 2_000
_EVENT, _PART = 1, 2

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Left:
    """What a run leaves: in the outbox for the next one, and lost with this one. `parts` are part verdicts."""

    events: int = 0
    parts: int = 0
    lost_parts: int = 0


@dataclass(frozen=True, slots=True)
class _Group:
    """Events that are stored together or not at all; one of the two is called, once."""

    events: tuple[Event, ...]
    payloads: tuple[bytes, ...]
    final: Callable[[], None] | None
    otherwise: Callable[[], tuple[Event, ...]] | None


@dataclass(slots=True, eq=False)
class _Entry:
    """An event on its way: `number` is the journal's, None while it is in memory alone."""

    event: Event
    at_ms: int
    number: int | None = None
    handed: bool = False

    @property
    def kind(self) -> int:
        return _PART if self.event.is_part else _EVENT


class Outbox:
    """Events of one worker, on their way to Kafka; `put` from any thread, never blocking."""

    def __init__(
        self, settings: OutboxSettings, sink: Sink, *, max_held: int, metrics: Metrics, health: Health
    ) -> None:
        self._settings = settings
        self._sink = sink
        self._max_held = max_held
        self._metrics = metrics
        self._health = health
        self._journal: Journal | None = None
        self._changed = threading.Condition()
        self._waiting: deque[_Group] = deque()
        self._done: list[_Entry] = []
        self._in_memory = 0  # events that are not on disk yet
        self._behind = False
        self._refusing = False
        # Of the outbox's thread alone:
        self._pending: deque[_Group] = deque()
        self._held: dict[_Entry, None] = {}  # in memory alone, oldest first
        self._out: dict[_Entry, None] = {}  # handed to the sink, oldest first
        self._failing = ""
        self._retry_s = 0.0
        self._stored_s = 0.0
        self._alarmed = False
        self._began_ms, self._began_s = time.time() * 1e3, time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=_STAGE, daemon=True)

    def start(self) -> None:
        """Take the folder, reach Kafka, go on with what an earlier run left. Raises ConfigError, DependencyError."""
        if self._settings.dir is not None:
            journal = Journal(self._settings.dir, segment_bytes=min(SEGMENT_BYTES, self._settings.max_bytes // 8))
            try:
                journal.open()
            except OSError as error:
                raise ConfigError(
                    f"outbox.dir {self._settings.dir}: {error.strerror}",
                    hint="name a folder on a local disk that this worker may write to, or null to go without an outbox",
                ) from None
            self._journal = journal
        self._sink.start()
        if self._journal is not None:
            found = self._journal.counts
            if self._journal.left:
                log.info("outbox: events of an earlier run go first", events=self._journal.left, parts=found[_PART])
            self._metrics.outbox_found(found[_PART])
            self._thread.start()

    def put(
        self,
        *events: Event,
        final: Callable[[], None] | None = None,
        otherwise: Callable[[], tuple[Event, ...]] | None = None,
    ) -> None:
        """Queue events that belong together; those that find no room in memory are refused, counted and logged.

        Exactly one of the two is called, once, on any thread: `final` when the events go out as they are, `otherwise`
        when they could not be stored, for those that go instead. An event's `done` is called once it is durable, on
        disk or in Kafka.
        """
        if self._journal is None:
            if final is not None:
                final()
            if self._stop.is_set():
                self._lose(list(events))  # after the end of the run: of readers that outlast it
            else:
                self._sink.put(*events)
            return
        payloads = tuple(packed(event) for event in events)  # here, so that a bad event is its caller's fault
        with self._changed:
            refused = self._in_memory + len(events) > self._max_held
            if not refused:
                self._waiting.append(_Group(events, payloads, final, otherwise))
                self._in_memory += len(events)
                self._changed.notify_all()
        if refused:
            if final is not None:
                final()
            self._metrics.undelivered(len(events), parts=sum(event.is_part for event in events))
        if refused and not self._refusing:
            log.error("verdicts are lost: neither the disk nor Kafka takes them", in_memory=self._max_held)
        self._refusing = refused

    def close(self, until_s: float) -> Left:
        """Deliver what is left, until then on the monotonic clock; what Kafka has not got by then stays on disk."""
        if self._thread.is_alive():
            while time.monotonic() < until_s and not self._empty():
                time.sleep(_TICK_S)
            self._stop.set()
            with self._changed:
                self._changed.notify_all()
            self._thread.join(_LAST_TURN_S)
        unconfirmed = self._sink.close(until_s)
        self._stop.set()
        return self._lose(unconfirmed) if self._journal is None else self._leave(self._journal)

    def _empty(self) -> bool:
        return not self._in_memory and (self._journal is None or not self._journal.left)  # on disk, then no longer here

    def _leave(self, journal: Journal) -> Left:
        """Note the last acknowledgements and let go of the folder, unless the disk still holds the outbox's thread."""
        if self._thread.is_alive():
            log.error("the disk does not answer: the next run sends some events again")
            return Left(journal.left, journal.counts[_PART], self._in_memory)
        self._take_acknowledged(journal)
        waiting = [event for group in (*self._pending, *self._waiting) for event in group.events]
        lost = self._lose([*(entry.event for entry in self._held), *waiting])
        left = replace(lost, events=journal.left, parts=journal.counts[_PART])
        try:
            journal.clear()
            if journal.unwritten:
                journal.append((), self._now_ms())
        except OSError as error:
            log.warning("acknowledgements not kept: the next run sends some events again", error=error.strerror)
        self._metrics.outbox(events=left.events, parts=left.parts, size=journal.size, age_s=0.0, fill=0.0)
        journal.close()
        self._journal = None
        if left.events:
            log.warning("events left in the outbox: the next run delivers them", events=left.events, parts=left.parts)
        return left

    def _lose(self, events: list[Event]) -> Left:
        parts = sum(event.is_part for event in events)
        if events:
            self._metrics.undelivered(len(events), parts=parts)
            log.error("events lost: neither stored nor confirmed by Kafka", events=len(events), parts=parts)
        return Left(lost_parts=parts)

    # The outbox's thread

    def _run(self) -> None:
        assert self._journal is not None  # noqa: S101 (set by start)
        shown_s, last = 0.0, False
        while not last:
            self._health.beat(_STAGE)
            last = self._stop.is_set()  # one more turn then, for what was put before
            try:
                self._turn(self._journal)
                if time.monotonic() - shown_s >= _SHOW_EVERY_S:
                    self._show(self._journal)
                    shown_s = time.monotonic()
            except Exception:  # the thread's top frame: the next turn goes on, and the fault is seen
                log.exception("a turn of the outbox failed")
                self._stop.wait(_RETRY_S)
        self._health.retire(_STAGE)

    def _turn(self, journal: Journal) -> None:
        with self._changed:
            if not self._waiting and not self._stop.is_set():
                self._changed.wait(_TICK_S)
            self._pending.extend(self._waiting)
            self._waiting.clear()
        self._take_acknowledged(journal)
        if not self._failing or time.monotonic() >= self._retry_s:
            self._store(journal)
        if self._failing:
            self._hold()
        self._feed(journal)

    def _take_acknowledged(self, journal: Journal) -> None:
        with self._changed:
            done, self._done = self._done, []
        stored = []
        for entry in done:
            self._out.pop(entry, None)
            if entry.number is not None:
                stored.append((entry.number, entry.kind))
            else:
                del self._held[entry]
                self._durable([entry])
        journal.acknowledge(stored)

    def _store(self, journal: Journal) -> None:
        """Write what came in, and what is held; at rest the acknowledgements."""
        try:
            if self._failing:
                self._require_room(journal)
                journal.probe()
                self._store_held(journal)
            if self._pending:
                self._require_room(journal)
                self._store_pending(journal)
            elif journal.unwritten and time.monotonic() - self._stored_s > _REST_S:
                journal.append((), self._now_ms())
                self._stored_s = time.monotonic()
        except OSError as error:
            self._metrics.outbox_failures.inc()
            self._retry_s = time.monotonic() + _RETRY_S
            if not self._failing:
                log.error("outbox cannot store: no verdict is OK until it can", error=error.strerror)
            self._failing = error.strerror or type(error).__name__
        else:
            if self._failing:
                log.info("outbox stores again")
            self._failing = ""
        self._health.ready(_STAGE, not self._failing)
        self._metrics.outbox_up.set(not self._failing)

    def _require_room(self, journal: Journal) -> None:
        """Raise OSError when one of the outbox's own bounds is reached."""
        if journal.size >= self._settings.max_bytes:
            raise OSError(errno.ENOSPC, "outbox.max_mb is reached")
        if self._age_s() >= self._settings.max_age_s:
            raise OSError(errno.ENOSPC, "the oldest event is outbox.max_age_h old")

    def _store_held(self, journal: Journal) -> None:
        """Write the events of a spell without a disk; those that are on their way to Kafka are not read again."""
        for handed in (True, False):
            entries = [entry for entry in self._held if entry.handed is handed]
            if entries:
                self._append(journal, entries, [packed(entry.event) for entry in entries])
            if entries and handed:
                journal.skip()
            for entry in entries:
                del self._held[entry]

    def _store_pending(self, journal: Journal) -> None:
        entries = [_Entry(event, self._now_ms()) for group in self._pending for event in group.events]
        self._append(journal, entries, [payload for group in self._pending for payload in group.payloads])
        groups, self._pending = self._pending, deque()
        for group in groups:
            if group.final is not None:
                group.final()

    def _append(self, journal: Journal, entries: list[_Entry], payloads: list[bytes]) -> None:
        records = zip((entry.kind for entry in entries), payloads, strict=True)
        numbers = journal.append(list(records), self._now_ms())
        for entry, number in zip(entries, numbers, strict=True):
            entry.number = number
        self._stored_s = time.monotonic()
        self._durable(entries)

    def _durable(self, entries: list[_Entry]) -> None:
        with self._changed:
            self._in_memory -= len(entries)
        for entry in entries:
            if entry.event.done is not None:
                entry.event.done()

    def _hold(self) -> None:
        """Keep in memory what could not be stored, no longer as it was."""
        while self._pending:
            group = self._pending.popleft()
            events = group.events if group.otherwise is None else group.otherwise()
            if group.otherwise is None and group.final is not None:
                group.final()
            for event in events:
                self._held[_Entry(event, self._now_ms())] = None
            with self._changed:
                self._in_memory += len(events) - len(group.events)

    def _feed(self, journal: Journal) -> None:
        """Hand over as much as may be under way, first what is stored."""
        room = min(_WINDOW - len(self._out), self._sink.room)
        if room > 0 and journal.behind:
            for record in journal.read(room):
                try:
                    self._hand(_Entry(unpacked(record.payload), record.at_ms, record.number))
                except ValueError as error:  # written by another version of this program
                    log.error("an event in the outbox makes no sense: left out", number=record.number, error=str(error))
                    self._metrics.undelivered(1, parts=int(record.kind == _PART))
                    journal.acknowledge([(record.number, record.kind)])
            room = min(_WINDOW - len(self._out), self._sink.room)
        if not journal.behind and self._held:
            for entry in list(islice((entry for entry in self._held if not entry.handed), max(0, room))):
                self._hand(entry)
        self._behind = journal.behind

    def _hand(self, entry: _Entry) -> None:
        entry.handed = True
        self._out[entry] = None
        self._sink.put(replace(entry.event, done=partial(self._acknowledged, entry)))

    def _show(self, journal: Journal) -> None:
        """Tell the metrics, and the log when half of a bound is reached."""
        counts, size, age_s = journal.counts, journal.size, self._age_s()
        fill = max(size / self._settings.max_bytes, age_s / self._settings.max_age_s)
        events = journal.left + len(self._held)
        self._metrics.outbox(events=events, parts=counts[_PART], size=size, age_s=age_s, fill=fill)
        if fill >= _ALARM and not self._alarmed:
            log.error("outbox half full: Kafka does not take events", events=events, bytes=size, oldest_s=round(age_s))
        elif self._alarmed and fill < _ALARM_OVER:
            log.info("outbox below half again", events=events)
        self._alarmed = fill >= (_ALARM_OVER if self._alarmed else _ALARM)

    def _age_s(self) -> float:
        oldest = next(iter(self._out), None) or next(iter(self._held), None)
        return 0.0 if oldest is None else max(0.0, (self._now_ms() - oldest.at_ms) / 1e3)

    def _now_ms(self) -> int:
        """Tell the time by the clock as it was at the start: one that is set anew makes nothing old."""
        return int(self._began_ms + (time.monotonic() - self._began_s) * 1e3)

    # The client library's thread

    def _acknowledged(self, entry: _Entry) -> None:
        with self._changed:
            self._done.append(entry)
            if self._behind and len(self._done) >= _WINDOW // 4:
                self._changed.notify_all()


def read_stored(folder: Path) -> Iterator[Event]:
    """Read the events that a folder holds for Kafka, oldest first; also while a worker uses it. Raises OSError."""
    return (unpacked(record.payload) for record in stored(folder))
