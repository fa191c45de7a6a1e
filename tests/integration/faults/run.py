"""One run: a line at work on a load of numbered parts, what a case does to it meanwhile, and what it comes to.

A run heals everything at its end, lets the line show that it judges again, ends the load, waits for the verdict of
every part, drains the worker, and hands parts and verdicts to the checker.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from integration.faults.checker import Account, Part, Verdict, check, verdict_of
from integration.faults.disk import Disk
from integration.faults.load import TRIGGERS, VERDICTS, Load, Topic, triggers
from integration.faults.pictures import VIDEO_LEVELS, level_of
from integration.faults.servers import MODELS, PRODUCT, Servers
from integration.faults.worker import PARTS_A_LIFE, Worker
from line_process import wait_until

from pipeline.events import decode

Shape = Literal["triggered", "two views", "two stations", "free run"]
Fault = Callable[["Run"], None]

RATE = 6.0
"""Parts a second."""
_FILM_RATE = 10.0
_STATIONS: dict[Shape, list[str]] = {
    "triggered": ["trays"],
    "two views": ["trays"],
    "two stations": ["trays", "trays-2"],
    "free run": ["trays"],
}
_JUDGED_AGAIN = 3
_RECOVER_TIMEOUT_S = 180.0
_SETTLE_TIMEOUT_S = 120.0
# What the servers and the two clocks of a span need to agree that it has begun.
_DARK_MARGIN_S = 0.3


@dataclass(frozen=True)
class Case:
    """A named run: what is done to the line, in words and in deeds."""

    name: str
    tells: str
    faults: tuple[Fault, ...]
    shape: Shape = "triggered"
    settings: dict[str, Any] = field(default_factory=dict)
    clock: bool = False
    """Whether the worker runs under a clock that can be moved."""
    disk: bool = False
    """Whether it needs a small disk."""


@dataclass(frozen=True)
class Bench:
    """What all runs share: the servers, the film of triggered cameras, the pictures of free-running ones."""

    servers: Servers
    film: Path
    pictures: list[Path]
    can_mount: bool
    """Whether there may be a small disk."""
    clock: Path | None
    """`moved_clock.c`, compiled; None where there is no C compiler."""


class Run:
    """One run of a case; what a fault does, it does through the attributes and `pause`."""

    def __init__(
        self, bench: Bench, case: Case, folder: Path, seed: str, *, line: str = "", outbox: bool = True
    ) -> None:
        """`line` is the line's name, if not the case's: no two runs on the same servers have the same."""
        self.case = case
        self.rng = random.Random(seed)
        self.servers = bench.servers.by_name
        self.disk = Disk(folder / "disk", mounted=bench.can_mount)
        self.dark: list[tuple[float, float]] = []
        self.exit_code: int | None = None
        self._bench = bench
        self._outbox = outbox
        self._line = line or case.name
        self._folder = folder
        self._stations = _STATIONS[case.shape]
        self.worker = Worker(
            folder, self._document(), pictures=bench.pictures, clock=bench.clock if case.clock else None
        )

    @property
    def is_free_run(self) -> bool:
        """Whether the parts come from the pictures alone, without triggers."""
        return self.case.shape == "free run"

    def go(self) -> Account:
        """The whole run."""
        with self.disk.there(), self._topics() as (sent, told):
            load = Load(self._bench.servers.kafka_address, self._line, self._stations, rate=RATE)
            try:
                self.worker.start()
                self.worker.wait()
                if not self.is_free_run:
                    load.start()
                self._until_judged(told, "a line that judges")
                for fault in self.case.faults:
                    fault(self)
                    self.pause(0.3, 1.0)
                self._heal()
                self._until_judged(told, "a line that judges again")
                acknowledged = set() if self.is_free_run else load.finish()
                if not self.is_free_run:
                    self._until_all_told(sent, told)
                self.exit_code = self.worker.drain()
                return self._account(acknowledged, sent, told)
            finally:
                self.worker.end()

    def pause(self, shortest_s: float, longest_s: float) -> None:
        """Let the line live with it for a time between these, drawn from the seed."""
        until = time.monotonic() + self.rng.uniform(shortest_s, longest_s)
        while time.monotonic() < until:
            if not self.worker.is_down:
                self.worker.tend()
            time.sleep(0.05)

    @contextmanager
    def nothing_judged(self) -> Iterator[None]:
        """Note that nothing can be judged inside the block: no part of this time may be OK."""
        begin = time.time() + _DARK_MARGIN_S
        try:
            yield
        finally:
            self.dark.append((begin, time.time()))

    def _heal(self) -> None:
        self.disk.heal()
        self._bench.servers.heal()
        if self.worker.is_down:
            self.worker.start()
        self.worker.wait()

    @contextmanager
    def _topics(self) -> Iterator[tuple[Topic, Topic]]:
        sent, told = (
            Topic(self._bench.servers.kafka_address, topic, lambda key: key.startswith(f"{self._line}/"))
            for topic in (TRIGGERS, VERDICTS)
        )
        try:
            yield sent, told
        finally:
            sent.close()
            told.close()

    def _until_judged(self, told: Topic, what: str) -> None:
        """Wait until the line judges parts that come from now on: a few of each station, one after the other."""
        seen = len(self._verdicts(told))

        def judged() -> bool:
            time.sleep(0.2)
            self.worker.tend()
            new = self._verdicts(told)[seen:]
            last = {key: [each.verdict for each in new if each.key == key][-_JUDGED_AGAIN:] for key in self._keys}
            return all(len(few) == _JUDGED_AGAIN and "UNINSPECTED" not in few for few in last.values())

        wait_until(judged, _RECOVER_TIMEOUT_S, what)

    def _until_all_told(self, sent: Topic, told: Topic) -> None:
        """Give every part the time to be told of; what is missing then is for the checker to say."""
        parts = {(key, number) for key, number, _ in triggers(sent.read())}
        until = time.monotonic() + _SETTLE_TIMEOUT_S
        while parts - {(each.key, each.number) for each in self._verdicts(told)} and time.monotonic() < until:
            self.worker.tend()
            time.sleep(0.2)

    def _account(self, acknowledged: set[tuple[str, int]], sent: Topic, told: Topic) -> Account:
        verdicts, words = self._verdicts(told), self._words()
        # What the disk did not take is in memory alone: after the worker's death it may be told otherwise.
        known = {} if self.disk.was_full else words
        if self.is_free_run:
            return check(self._parts_that_were_seen(verdicts, words), verdicts, words=known)
        parts = [Part(key, number, scores=VIDEO_LEVELS, triggered_at=at) for key, number, at in triggers(sent.read())]
        assert acknowledged == {(part.key, part.number) for part in parts}, "the load does not know its own parts"
        dark = () if self.case.clock else tuple(self.dark)
        return check(parts, verdicts, words=known, dark=dark)

    def _words(self) -> dict[tuple[str, int], str]:
        """What the workers said of which part: the first word on each.

        A later life's UNINSPECTED is no first word: an earlier one may have found the part OK, of which it does not
        speak, and the trigger was read again before its place was kept.
        """
        words: dict[tuple[str, int], str] = {}
        for life, station, part, verdict in self.worker.words():
            if life == 1 or self.is_free_run or verdict != "UNINSPECTED":
                words.setdefault((f"{self._line}/{station}", _number(part)), verdict)
        return words

    def _parts_that_were_seen(self, verdicts: list[Verdict], words: Collection[tuple[str, int]]) -> list[Part]:
        """Parts of a free-running camera, by the worker's own word, in the order of their capture.

        A life's parts are certain up to the last one of which it spoke: it speaks of a verdict once it is on disk, and
        verdicts of a station leave in order. Later ones that it had opened when it was killed were in its memory alone.
        """
        (key,) = self._keys
        parts = []
        for life in range(1, self.worker.lives + 1):
            said = [number for _, number in words if number // PARTS_A_LIFE == life]
            told = [each.number for each in verdicts if each.number // PARTS_A_LIFE == life]
            opened = life * PARTS_A_LIFE + self.worker.opened.get(life, 0) - 1
            parts += [
                Part(key, number, certain=number <= max(said, default=0), scores=(level_of(number),))
                for number in range(life * PARTS_A_LIFE, max([*said, *told, opened]) + 1)
            ]
        return parts

    def _verdicts(self, told: Topic) -> list[Verdict]:
        events = ({**decode(record.value, dict(record.headers)), "key": record.key.decode()} for record in told.read())
        if self.is_free_run:
            return [verdict_of(event, _number(event["data"]["partId"])) for event in events]
        return [verdict_of(event, int(event["data"]["measId"])) for event in events]

    @property
    def _keys(self) -> list[str]:
        return [f"{self._line}/{station}" for station in self._stations]

    def _document(self) -> dict[str, Any]:
        endpoints = self._bench.servers.endpoints()
        camera: dict[str, Any] = {"type": "folder", "product": PRODUCT, "overflow": "drop_oldest", "rate": RATE}
        if not self.is_free_run:
            camera |= {"type": "video", "path": str(self._bench.film), "rate": _FILM_RATE, "loop": True}
        cameras = [
            {"id": f"{station}-{number}", "station": station, **camera}
            for station in self._stations
            for number in range(2 if self.case.shape == "two views" else 1)
        ]
        triggered = [{"name": station, "trigger": "message", "window_ms": 1_000} for station in self._stations]
        document: dict[str, Any] = {
            "line": self._line,
            "budget_ms": 4_000,
            "cameras": cameras,
            "stations": [] if self.is_free_run else triggered,
            "triton": {
                "address": endpoints["triton"],
                "models_repo": str(MODELS),
                "startup_timeout_s": 60,
                "resolve_interval_s": 1,
            },
            "kafka": {"bootstrap": [endpoints["kafka"]], "startup_timeout_s": 60},
            "redis": {"url": endpoints["redis"], "refresh_s": 1, "snapshot": str(self.disk.path / "thresholds.json")},
            "monitoring": {"port": 0},
            "outbox": {"dir": str(self.disk.path / "outbox") if self._outbox else None},
        }
        for key, value in self.case.settings.items():
            document[key] = {**document[key], **value} if isinstance(document.get(key), dict) else value
        return document


def _number(part_id: str) -> int:
    """The number in `part-<number>` and `part-<number>.png`."""
    return int(part_id.removeprefix("part-").removesuffix(".png"))
