"""One run: a line at work on a load of numbered parts, what a case does to it meanwhile, and what it comes to.

A run heals everything at its end, lets the line show that it judges again, ends the load, waits for the verdict of
every part, drains the worker, and hands parts and verdicts to the checker.
"""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from integration.faults.checker import Account, Part, Verdict, check, verdict_of
from integration.faults.load import TRIGGERS, VERDICTS, Load, Topic, triggers
from integration.faults.servers import MODELS, PRODUCT, Servers
from integration.faults.worker import PARTS_A_LIFE, Worker
from line_process import wait_until

from pipeline.events import decode

Shape = Literal["triggered", "two views", "two stations", "free run"]
Fault = Callable[["Run"], None]

RATE = 5.0
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
# A verdict is on disk this much after the worker has spoken of it, at the latest; generous, for a busy machine.
_DURABLE_AFTER_S = 3.0
_DISK_MB = 16


@dataclass(frozen=True)
class Case:
    """A named run: what is done to the line, in words and in deeds."""

    name: str
    tells: str
    faults: tuple[Fault, ...]
    shape: Shape = "triggered"
    settings: dict[str, Any] = field(default_factory=dict)
    clock: bool = False


@dataclass(frozen=True)
class Bench:
    """What all runs share: the servers, and pictures of known scores between two limits."""

    servers: Servers
    pictures: dict[str, Path]
    scores: dict[str, float]


class Run:
    """One run of a case; what a fault does, it does through the attributes and `pause`."""

    def __init__(self, bench: Bench, case: Case, folder: Path, seed: str, *, outbox: bool = True) -> None:
        self.case = case
        self.rng = random.Random(seed)
        self.servers = bench.servers.by_name
        self.disk = folder / "disk"
        self.dark: list[tuple[float, float]] = []
        self.exit_code: int | None = None
        self._bench = bench
        self._outbox = outbox
        self._line = f"{case.name}-{seed.partition(':')[0]}"[:60]
        self._names = sorted(bench.pictures)
        self._folder = folder
        self._stations = _STATIONS[case.shape]
        self.worker = Worker(
            folder, self._document(), pictures=[bench.pictures[name] for name in self._names], clock=case.clock
        )

    @property
    def is_free_run(self) -> bool:
        """Whether the parts come from the pictures alone, without triggers."""
        return self.case.shape == "free run"

    def go(self) -> Account:
        """The whole run."""
        with self._disk_mounted(), self._topics() as (sent, told):
            load = Load(
                self._bench.servers.kafka_address, self._line, self._stations, rate=RATE, names=self._names
            )
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

    def fill_disk(self) -> None:
        """Leave no byte on the worker's disk."""
        with (self.disk / "full").open("ab", buffering=0) as file:
            for size in (1 << 20, 1 << 12, 1):
                try:
                    while True:
                        file.write(b"\0" * size)
                except OSError:
                    continue

    def free_disk(self) -> None:
        """Make room again."""
        (self.disk / "full").unlink(missing_ok=True)

    def remount_disk(self, mode: Literal["ro", "rw"]) -> None:
        """Make the worker's disk read-only, while nobody writes to it, or good again."""
        subprocess.run(["mount", "-o", f"remount,{mode}", str(self.disk)], check=True)

    def _heal(self) -> None:
        self.remount_disk("rw")
        self.free_disk()
        self._bench.servers.heal()
        if self.worker.is_down:
            self.worker.start()
        self.worker.wait()

    @contextmanager
    def _disk_mounted(self) -> Iterator[None]:
        self.disk.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={_DISK_MB}m", "tmpfs", str(self.disk)], check=True)
        try:
            yield
        finally:
            subprocess.run(["umount", "--lazy", str(self.disk)], check=True)

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
            self.worker.tend()
            new = self._verdicts(told)[seen:]
            last = {key: [each for each in new if each.key == key][-_JUDGED_AGAIN:] for key in self._keys}
            return all(
                len(few) == _JUDGED_AGAIN and all(each.verdict != "UNINSPECTED" for each in few)
                for few in last.values()
            )

        wait_until(judged, _RECOVER_TIMEOUT_S, what)

    def _until_all_told(self, sent: Topic, told: Topic) -> None:
        """Give every part the time to be told of; what is missing then is for the checker to say."""
        parts = {(key, number) for key, number, _ in triggers(sent.read())}
        until = time.monotonic() + _SETTLE_TIMEOUT_S
        while parts - {(each.key, each.number) for each in self._verdicts(told)} and time.monotonic() < until:
            self.worker.tend()
            time.sleep(0.2)

    def _account(self, acknowledged: set[tuple[str, int]], sent: Topic, told: Topic) -> Account:
        verdicts = self._verdicts(told)
        if self.is_free_run:
            return check(self._parts_that_were_seen(verdicts), verdicts)
        parts = [
            Part(key, number, score=self._bench.scores[self._name(number)], triggered_at=at)
            for key, number, at in triggers(sent.read())
        ]
        assert acknowledged == {(part.key, part.number) for part in parts}, "the load does not know its own parts"
        dark = () if self.case.clock else tuple(self.dark)
        return check(parts, verdicts, dark=dark)

    def _parts_that_were_seen(self, verdicts: list[Verdict]) -> list[Part]:
        """Parts of a free-running camera, by the worker's own word, in the order of their capture.

        Those of which a worker spoke well before it was killed are certain; those that it may have had in its memory
        alone are not. A worker that ended by itself has spoken of all.
        """
        (key,) = self._keys
        said = {_number(part): at for at, _, part in self.worker.words()}
        parts = []
        for number in sorted(said.keys() | {each.number for each in verdicts}):
            killed_at = self.worker.killed_at.get(number // PARTS_A_LIFE)
            certain = killed_at is None or said.get(number, killed_at) < killed_at - _DURABLE_AFTER_S
            parts.append(Part(key, number, certain=certain))
        return parts

    def _verdicts(self, told: Topic) -> list[Verdict]:
        events = (
            {**decode(record.value, dict(record.headers)), "key": record.key.decode()} for record in told.read()
        )
        if self.is_free_run:
            return [verdict_of(event, _number(event["data"]["partId"])) for event in events]
        return [verdict_of(event, int(event["data"]["measId"])) for event in events]

    def _name(self, number: int) -> str:
        return self._names[number % len(self._names)]

    @property
    def _keys(self) -> list[str]:
        return [f"{self._line}/{station}" for station in self._stations]

    def _document(self) -> dict[str, Any]:
        endpoints = self._bench.servers.endpoints()
        camera: dict[str, Any] = {"type": "folder", "product": PRODUCT, "overflow": "drop_oldest"}
        camera |= {"rate": RATE} if self.is_free_run else {"path": str(self._loop()), "rate": 2 * RATE, "loop": True}
        cameras = [
            {"id": f"{station}-{number}", "station": station, **camera}
            for station in self._stations
            for number in range(2 if self.case.shape == "two views" else 1)
        ]
        triggered = [{"name": station, "trigger": "message", "window_ms": 60_000} for station in self._stations]
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
            "redis": {"url": endpoints["redis"], "refresh_s": 1, "snapshot": str(self.disk / "thresholds.json")},
        }
        for key, value in self.case.settings.items():
            document[key] = {**document[key], **value} if isinstance(document.get(key), dict) else value
        return document

    def _loop(self) -> Path:
        """Make the folder that a camera goes round: a trigger's picture comes by again and again."""
        folder = self._folder / "loop"
        if not folder.exists():
            folder.mkdir()
            for name, path in self._bench.pictures.items():
                (folder / name).symlink_to(path)
        return folder


def _number(part_id: str) -> int:
    """The number in `part-<number>.jpg`."""
    return int(part_id.removeprefix("part-").removesuffix(".jpg"))
