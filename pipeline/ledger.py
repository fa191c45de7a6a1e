"""The account of parts: which were due, which verdicts a consumer sees, and what does not fit. Pure state, no I/O.

Of every part it keeps less than a kilobyte, whatever was said of it; names are those of the wire. Fed by `reconcile`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple


class PartKey(NamedTuple):
    """Which part, and which measurement of it; `camera_id` where a part is one frame of one camera."""

    station: str
    part_id: str
    meas_id: str | None = None
    camera_id: str | None = None


class Witness(StrEnum):
    """What said that a part was there."""

    TRIGGER = "trigger"
    VIEW = "view"
    AUDIT = "audit"


class Told(NamedTuple):
    """One verdict as it lies on the topic; `at_ms` is the record's time, milliseconds since 1970."""

    part: PartKey
    inspection: str
    verdict: str
    epoch: int | None
    worker: str
    sequence: int
    at_ms: int


class Due(NamedTuple):
    """Why a verdict is due: who said so, and when (`at_ms`); `inspection` is the id that the verdict must have."""

    inspection: str
    witness: Witness
    at_ms: int


class Missing(NamedTuple):
    """A part without a verdict. `why` is empty, or says where the verdict is instead."""

    part: PartKey
    due: Due
    why: str = ""


class Conflict(NamedTuple):
    """A part that was told in two ways: another id, or another verdict under the same id."""

    part: PartKey
    first: Told
    other: Told


class Gap(NamedTuple):
    """Sequence numbers, `first` to `last`, that a worker's run gave and no consumer sees."""

    worker: str
    station: str
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Account:
    """What was found. `told` counts verdicts by station and what they say, each part once; the other counters parts.

    `open` are parts whose time is not over; `stored` lie in the outbox and will be told; `repeated` counts deliveries
    beyond the first, `settled` those that the rule of the higher epoch decides.
    """

    due: Counter[str]
    told: Counter[tuple[str, str]]
    open: Counter[str]
    stored: Counter[str]
    repeated: Counter[str]
    settled: Counter[str]
    missing: tuple[Missing, ...]
    conflicts: tuple[Conflict, ...]
    gaps: tuple[Gap, ...]

    @property
    def good(self) -> bool:
        """Whether every part has its one verdict, or will have it."""
        return not (self.missing or self.conflicts or self.gaps)


@dataclass(slots=True)
class _Run:
    """The sequence numbers of one worker at one station: the last one, and the gaps below it, oldest first."""

    last: int
    gaps: list[tuple[int, int]] = field(default_factory=list)

    def take(self, sequence: int) -> None:
        if sequence <= self.last:
            self.fill(sequence)
            return
        if sequence > self.last + 1:
            self.gaps.append((self.last + 1, sequence - 1))
        self.last = sequence

    def fill(self, sequence: int) -> None:
        """Take a number that was told out of order, by a second delivery."""
        for place, (first, last) in enumerate(self.gaps):
            if first <= sequence <= last:
                self.gaps[place : place + 1] = [
                    piece for piece in ((first, sequence - 1), (sequence + 1, last)) if piece[0] <= piece[1]
                ]
                return


class Ledger:
    """Takes what the topics hold, in any order of topics, and gives the account."""

    def __init__(self) -> None:
        self._due: dict[PartKey, Due] = {}  # of parts that have no verdict yet
        self._told: dict[PartKey, Told] = {}
        self._conflicts: dict[PartKey, Conflict] = {}
        self._repeated: Counter[str] = Counter()
        self._settled: Counter[str] = Counter()
        self._runs: dict[tuple[str, str], _Run] = {}

    def due(self, part: PartKey, due: Due) -> None:
        """Note that a part was there; of several witnesses the first one is kept."""
        if part not in self._told:
            self._due.setdefault(part, due)

    def told(self, told: Told, *, within: bool = True) -> None:
        """Note a verdict. One that is not `within` the period counts only for a part that was due in it."""
        self._number(told, within=within)
        if not within and told.part not in self._due and told.part not in self._told:
            return
        self._due.pop(told.part, None)
        known = self._told.setdefault(told.part, told)
        if known is told:
            return
        if known.inspection != told.inspection:
            self._conflicts.setdefault(told.part, Conflict(told.part, known, told))
        elif known.verdict == told.verdict:
            self._repeated[told.part.station] += 1
        elif known.epoch is not None and told.epoch is not None and known.epoch != told.epoch:
            self._settled[told.part.station] += 1
            if told.epoch > known.epoch:
                self._told[told.part] = told
        else:
            self._conflicts.setdefault(told.part, Conflict(told.part, known, told))

    def account(self, *, open_after_ms: int, stored: Iterable[str] = (), dead: Iterable[str] = ()) -> Account:
        """Close the account.

        Parts that were due after `open_after_ms` may still be open. `stored` and `dead` are the inspection ids of the
        verdicts that lie in the outbox, and of those that were given up to the dead-letter topic.
        """
        stored, dead = set(stored), set(dead)
        open_parts, held, missing = Counter[str](), Counter[str](), list[Missing]()
        for part, due in self._due.items():
            if due.inspection in stored:
                held[part.station] += 1
            elif due.at_ms >= open_after_ms:
                open_parts[part.station] += 1
            else:
                missing.append(Missing(part, due, "on the dead-letter topic" if due.inspection in dead else ""))
        return Account(
            due=Counter(part.station for part in self._due.keys() | self._told.keys()),
            told=Counter((told.part.station, told.verdict) for told in self._told.values()),
            open=open_parts,
            stored=held,
            repeated=self._repeated,
            settled=self._settled,
            missing=tuple(sorted(missing, key=lambda each: each.due.at_ms)),
            conflicts=tuple(self._conflicts.values()),
            gaps=tuple(self._gaps()),
        )

    def _number(self, told: Told, *, within: bool) -> None:
        """Follow the numbers of a worker's run; what comes after the period can only fill its gaps."""
        run = self._runs.get((told.worker, told.part.station))
        if run is None and within:
            self._runs[told.worker, told.part.station] = _Run(told.sequence)
        elif run is not None and within:
            run.take(told.sequence)
        elif run is not None:
            run.fill(told.sequence)

    def _gaps(self) -> Iterator[Gap]:
        for (worker, station), run in self._runs.items():
            yield from (Gap(worker, station, first, last) for first, last in run.gaps)
