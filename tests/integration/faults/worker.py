"""The worker under fault: `logicrd run` as a process that is killed, held and started again, as an orchestrator would.

Its log goes on over its lives, and so do the numbers of the parts that it finds in a folder: each life has a folder of
its own, because what a killed worker has read it does not read again.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import yaml
from integration.faults.servers import children, send
from line_process import wait_until
from processes import ChildProcess

PARTS_A_LIFE = 10_000
_PICTURES_A_LIFE = 4_000
_START_TIMEOUT_S = 240.0
_END_TIMEOUT_S = 120.0


class Worker:
    """One worker over all its lives, from the main thread."""

    def __init__(
        self, folder: Path, document: dict[str, Any], *, pictures: list[Path], clock: Path | None = None
    ) -> None:
        """`document` is the line file; a camera without a `path` gets a folder of numbered pictures for each life.

        `clock` is `moved_clock.c` compiled: the worker runs under a clock that `set_clock` moves.
        """
        self._folder = folder
        self._document = document
        self._pictures = pictures
        self._clock = clock
        self._offset = folder / "clock"
        self._log = folder / "worker.log"
        self._process: ChildProcess | None = None
        self._begins: list[int] = []
        self.lives = 0
        self.ended_with: list[int] = []
        """Exit codes of the lives that ended by themselves."""
        self.opened: dict[int, int] = {}
        """How many parts a life had opened when it was killed, by its number."""

    def start(self) -> None:
        """Begin a life; it is at work when `is_at_work` says so."""
        self.lives += 1
        self._begins.append(self._log.stat().st_size if self._log.exists() else 0)
        command = [sys.executable, "-m", "pipeline.cli", "run", "-c", str(self._write()), "--no-until-end", "--json"]
        with self._log.open("ab") as log:
            self._process = ChildProcess(command, self._environment(), log)

    @property
    def is_down(self) -> bool:
        """Whether it was ended on purpose and not started again."""
        return self._process is None

    def tend(self) -> None:
        """Start it again when it has ended by itself, as an orchestrator does with a worker that finds no server."""
        if self._process is not None and (code := self._process.exit_code()) is not None:
            self.ended_with.append(code)
            self._process.end(0.0)
            self.start()

    def wait(self) -> None:
        """Wait until it is at work."""

        def at_work() -> bool:
            self.tend()
            return self.is_at_work

        wait_until(at_work, _START_TIMEOUT_S, f"a worker at work ({self._log})")

    @property
    def is_at_work(self) -> bool:
        """Whether this life has opened its cameras."""
        return '"line started"' in self._said()

    def _said(self) -> str:
        """What this life has said so far."""
        with self._log.open("rb") as log:
            log.seek(self._begins[-1])
            return log.read().decode(errors="replace")

    def _parts_opened(self) -> int:
        """How many parts this life has opened, as it tells Prometheus; 0 when it does not answer."""
        found = re.search(r'"address": "(http://[0-9.:]+/metrics)"', self._said())
        if found is None:
            return 0
        try:
            with urlopen(found[1], timeout=2) as page:  # noqa: S310 (an address of this test's own worker)
                samples = [line.split() for line in page.read().decode().splitlines()]
        except OSError:
            return 0
        return int(sum(float(each[1]) for each in samples if each[0].startswith("inspection_parts_triggered_total")))

    def kill(self) -> None:
        """SIGKILL."""
        assert self._process is not None
        self.opened[self.lives] = self._parts_opened()
        os.kill(self._process.pid, signal.SIGKILL)
        self._process.end(time.monotonic() + 5)
        self._process = None

    def ask_to_stop(self) -> None:
        """SIGTERM; goes on at once."""
        assert self._process is not None
        self._process.ask_to_stop()

    def drain(self) -> int:
        """SIGTERM, and wait for its end; gives its exit code."""
        assert self._process is not None
        self._process.ask_to_stop()
        wait_until(lambda: self._exit_code is not None, _END_TIMEOUT_S, f"a drained worker ({self._log})")
        code = self._exit_code
        self._process.end(0.0)
        self._process = None
        assert code is not None
        return code

    def end(self) -> None:
        """Leave nothing behind, whatever happened."""
        if self._process is not None:
            self._process.end(0.0)
            self._process = None

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Hold it and its helpers as a hung machine would."""
        assert self._process is not None
        pids = [self._process.pid, *children(self._process.pid)]
        send(signal.SIGSTOP, *pids)
        try:
            yield
        finally:
            send(signal.SIGCONT, *pids)

    def set_clock(self, offset_s: int) -> None:
        """Move its clock this far from the machine's, at once."""
        assert self._clock is not None, "the worker's clock cannot be moved"
        beside = self._offset.with_suffix(".new")
        beside.write_text(f"{offset_s}\n")
        beside.replace(self._offset)

    def words(self) -> list[tuple[int, str, str, str]]:
        """Life, station, part and verdict of each part that it said it had judged, in order; it speaks of no OK."""
        words = []
        ends = [*self._begins[1:], None]
        text = self._log.read_bytes()
        for life, (begin, end) in enumerate(zip(self._begins, ends, strict=True), 1):
            for line in text[begin:end].decode(errors="replace").splitlines():
                if line.startswith("{") and line.endswith("}") and '"event": "part"' in line:
                    said = json.loads(line)
                    words.append((life, said["station"], said["part"], said["verdict"]))
        return words

    @property
    def _exit_code(self) -> int | None:
        return None if self._process is None else self._process.exit_code()

    def _environment(self) -> dict[str, str]:
        if self._clock is None:
            return {}
        return {"LD_PRELOAD": str(self._clock), "MOVED_CLOCK": str(self._offset)}

    def _write(self) -> Path:
        """Write the line file of this life."""
        cameras = [
            camera if "path" in camera else {**camera, "path": str(self._numbered())}
            for camera in self._document["cameras"]
        ]
        path = self._folder / "line.yaml"
        path.write_text(yaml.safe_dump({**self._document, "cameras": cameras}))
        return path

    def _numbered(self) -> Path:
        """Make this life's folder: `part-<number>.png`, which go round the pictures."""
        folder = self._folder / f"life-{self.lives}"
        if not folder.exists():
            folder.mkdir()
            for index in range(_PICTURES_A_LIFE):
                number = self.lives * PARTS_A_LIFE + index
                (folder / f"part-{number:08}.png").symlink_to(self._pictures[number % len(self._pictures)])
        return folder
