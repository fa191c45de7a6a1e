"""The line as a process, and its verdicts as a MES sees them: for the integration and end-to-end tests."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from pipeline.servers import Kafka
from pipeline.tail import VerdictReader


class LineProcess:
    """`logicrd run --json` on a line file; stopped by SIGTERM at the end of the block. `program` is how to start it."""

    def __init__(self, line_file: Path, *arguments: str, program: Sequence[str] = ("-m", "pipeline.cli")) -> None:
        self._log = line_file.with_suffix(".log")
        self._command = [sys.executable, *program, "run", "-c", str(line_file), "--json", *arguments]
        self.summary: dict[str, Any] = {}
        self.exit_code: int | None = None

    def __enter__(self) -> LineProcess:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, stderr=log, text=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        return self._process.pid

    def log(self) -> str:
        """What the line said on stderr so far."""
        return self._log.read_text()

    def wait(self, timeout_s: float = 90) -> dict[str, Any]:
        """Wait for the line's own end; gives its summary."""
        out, _ = self._process.communicate(timeout=timeout_s)
        self.exit_code = self._process.returncode
        self.summary = json.loads(out) if out.strip() else {}
        return self.summary

    def stop(self) -> dict[str, Any]:
        """Ask the line to drain and end."""
        if self.exit_code is None:
            self._process.send_signal(signal.SIGTERM)
            self.wait()
        return self.summary

    def memory_mb(self) -> float:
        """Resident memory."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmRSS"))


@dataclass
class Received:
    """Part verdicts of one line as a consumer received them, in order of arrival per partition."""

    events: list[dict[str, Any]]

    @property
    def parts(self) -> list[str]:
        return [event["data"]["partId"] for event in self.events]

    @property
    def duplicates(self) -> int:
        return len(self.events) - len(self.distinct)

    @property
    def distinct(self) -> list[dict[str, Any]]:
        """The first of each id, as a consumer keeps them: an unkept acknowledgement is sent again after kill -9."""
        first: dict[str, dict[str, Any]] = {}
        for event in self.events:
            first.setdefault(event["attributes"]["id"], event)
        return list(first.values())

    def count(self, verdict: str) -> int:
        return sum(event["data"]["verdict"] == verdict for event in self.events)

    @property
    def causes(self) -> Counter[str]:
        """Causes of the parts that were not judged."""
        unjudged = (event["data"] for event in self.events if event["data"]["verdict"] == "UNINSPECTED")
        return Counter(data["reasonCodes"][0] for data in unjudged)

    def sequences(self) -> dict[str, list[int]]:
        """Sequence numbers by key, in the order in which they came."""
        by_key: dict[str, list[int]] = {}
        for event in self.events:
            by_key.setdefault(event["key"], []).append(event["data"]["sequence"])
        return by_key

    def in_order(self) -> bool:
        """Whether each key's sequence runs from 1 without a gap, a repeat or a step back."""
        return all(numbers == list(range(1, len(numbers) + 1)) for numbers in self.sequences().values())


def received(
    kafka: str, line: str, *, at_least: int = 0, timeout_s: float = 10, prefix: str = "inspection"
) -> Received:
    """Read all part verdicts of a line from the start of the topic; waits for `at_least` with ids of their own."""
    until = time.monotonic() + timeout_s
    while True:
        with VerdictReader(Kafka(bootstrap=[kafka], topic_prefix=prefix), start="first") as reader:
            events = [event for event in reader.read_to_end() if (event["key"] or "").startswith(f"{line}/")]
        verdicts = Received(events)
        if len(verdicts.distinct) >= at_least or time.monotonic() > until:
            return verdicts
        time.sleep(0.2)


def wait_until(condition: Any, timeout_s: float, what: str) -> None:
    """Wait for a condition; fails with `what` when it does not come true."""
    until = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > until:
            raise AssertionError(f"{what}: not within {timeout_s} s")
        time.sleep(0.05)


@contextmanager
def stopped(*pids: int) -> Iterator[None]:
    """Hold processes as a hung machine would, then let them go on."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def children(pid: int) -> list[int]:
    """The processes that a process started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found
