"""Compares what was due with what a consumer sees: reads the topics of a period into a ledger, to their present end.

Triggers, views and audit events say which parts were there; the verdict topic says what became of them; the outbox and
the dead-letter topic say where a verdict is that is not there. Writes nothing and commits nothing. Used by the command
line.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pipeline.brokers import Unreadable
from pipeline.config import LineConfig
from pipeline.events import decode, inspection_id
from pipeline.ledger import Account, Due, Ledger, PartKey, Told, Witness
from pipeline.tail import VerdictReader, event_of
from pipeline.wire import decode_trigger

_MARGIN_S = 5.0
"""How long after its budget a part's verdict may take to reach Kafka before it counts as missing."""


@dataclass(frozen=True, slots=True)
class Reconciliation:
    """An account, and what could not be read: records that are no events of ours, triggers that were refused."""

    account: Account
    unreadable: int
    refused_triggers: int


class Reconciler:
    """One line's topics over one period, `start` to `end` by the records' times, both with a zone.

    `stored` gives the inspection ids of the verdicts that wait in the outbox of this machine.
    """

    def __init__(self, config: LineConfig, start: datetime, end: datetime, *, stored: Iterable[str] = ()) -> None:
        self._config = config
        self._start = start
        self._end_ms = end.timestamp() * 1e3
        self._stored = stored
        self._source = f"/{config.site}/{config.area}/{config.line}"
        self._stations = {station.name for station in config.stations if station.trigger == "message"}
        self._ledger = Ledger()
        self._unreadable = 0
        self._refused = 0
        self._dead: set[str] = set()

    def run(self) -> Reconciliation:
        """Read and compare. Blocks as long as the topics are long; raises DependencyError."""
        began = datetime.now(UTC)
        if self._stations:
            self._take_triggers()
        self._take_witnesses("view.v1", Witness.VIEW)
        self._take_witnesses("audit.v1", Witness.AUDIT)
        stored = list(self._stored)  # before the verdicts: what leaves the outbox meanwhile is found there
        self._take_verdicts()
        self._take_dead_letters()
        open_after_s = began.timestamp() - self._config.budget_ms / 1e3 - _MARGIN_S
        account = self._ledger.account(open_after_ms=int(open_after_s * 1e3), stored=stored, dead=self._dead)
        return Reconciliation(account, self._unreadable, self._refused)

    def _records(self, topic: str, *, later: bool = False) -> Iterator[Any]:
        """Give the records of the period, and with `later` those after it; clocks differ, so times are in no order."""
        start_ms, end_ms = self._start.timestamp() * 1e3, self._end_ms
        with VerdictReader(self._config.kafka, topic=topic, start=self._start) as reader:
            for record in reader.records_to_end():
                if isinstance(record, Unreadable):
                    self._unreadable += 1
                elif start_ms <= record.timestamp and (later or record.timestamp < end_ms):
                    yield record

    def _data(self, topic: str, *, later: bool = False) -> Iterator[tuple[Any, Mapping[str, Any]]]:
        """Give each of this line's events on a topic with its record."""
        for record in self._records(topic, later=later):
            event = event_of(record)
            if "error" in event:
                self._unreadable += 1
            elif event["attributes"].get("source") == self._source:
                yield record, event["data"]

    def _take_triggers(self) -> None:
        for record in self._records("trigger.v1"):
            try:
                data = decode_trigger(record.value, dict(record.headers))
            except ValueError:
                continue  # the line has put it on the dead-letter topic, where it is counted
            if data.station in self._stations and data.line in (None, self._config.line):
                part = PartKey(sys.intern(data.station), data.part_id, data.meas_id)
                inspection = inspection_id(self._source, data.station, data.part_id, None, data.meas_id)
                self._ledger.due(part, Due(inspection, Witness.TRIGGER, record.timestamp))

    def _take_witnesses(self, topic: str, witness: Witness) -> None:
        for record, data in self._data(topic):
            try:
                camera = data["cameraId"] if witness is Witness.AUDIT else data["views"][0]["cameraId"]
                if (inspection := data["inspectionId"]) is not None:  # null: a frame of no part
                    self._ledger.due(self._part(data, camera), Due(inspection, witness, record.timestamp))
            except (KeyError, IndexError, TypeError):
                self._unreadable += 1

    def _take_verdicts(self) -> None:
        for record, data in self._data("verdict.v1", later=True):
            try:
                told = self._told(data, record.timestamp)
            except (KeyError, IndexError, TypeError):
                self._unreadable += 1
                continue
            self._ledger.told(told, within=record.timestamp < self._end_ms)

    def _take_dead_letters(self) -> None:
        for record in self._records("dlq.v1", later=True):
            headers = dict(record.headers)
            if (headers.get("logicrd_record") or b"").startswith(
                f"{self._config.kafka.topic_prefix}.trigger.".encode()
            ):
                self._refused += 1
                continue
            try:
                self._dead.add(str(decode(record.value or b"", headers)["attributes"]["id"]))
            except ValueError:
                self._unreadable += 1

    def _told(self, data: Mapping[str, Any], at_ms: int) -> Told:
        camera = data["views"][0]["cameraId"] if data["views"] else None
        return Told(
            self._part(data, camera),
            data["inspectionId"],
            sys.intern(data["verdict"]),
            data.get("epoch"),
            sys.intern(data["worker"]),
            data["sequence"],
            at_ms,
        )

    def _part(self, data: Mapping[str, Any], camera_id: str | None) -> PartKey:
        """Name the part of an event; the camera is part of the name where the inspection's id says so."""
        station, part_id, meas_id = sys.intern(data["station"]), data["partId"], data.get("measId")
        if camera_id is not None and data["inspectionId"] == inspection_id(self._source, station, part_id, camera_id):
            return PartKey(station, part_id, None, camera_id)
        return PartKey(station, part_id, meas_id)
