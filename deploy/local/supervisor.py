"""Starts components together, watches them, restarts what dies, stops everything; writes where and how they are.

One thread, one loop, no opinion about what a component serves: each brings its command, its files and a `check`. The
state file is for readers only; the supervisor's lock on `<state dir>/lock` is what says that a stack is running.
Run by `stack.py`, in the foreground or detached.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import signal
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Literal, Protocol

from processes import ChildProcess, StackError, describe_exit, last_lines

log = logging.getLogger("supervisor")

WATCH_PERIOD_S = 1.0
STARTING_PERIOD_S = 0.1
STOP_TIMEOUT_S = 12.0
RESTART_BUDGET = 5
RESTART_WINDOW_S = 60.0
# One failed answer may be a client's own accident; two in a row are the server's.
FAULTS_BEFORE_RESTART = 2

State = Literal["starting", "ready", "failed", "stopped"]


class Component(Protocol):
    """What the supervisor needs to know of a server."""

    name: str
    start_timeout_s: float
    # Regular expression for the lines of its log that tell why it ended.
    cause_pattern: str

    def endpoints(self) -> dict[str, str]:
        """Addresses by name, for the state file."""

    def require(self) -> None:
        """Raise StackError when something it needs is not on this machine."""

    def prepare(self) -> None:
        """Write its files; called before every start, the first and each restart."""

    def command(self) -> list[str]:
        """Program and arguments."""

    def environment(self) -> dict[str, str]:
        """The whole environment of the process."""

    def check(self) -> str | None:
        """Quick question: '' answered well, other text the fault, None nothing new (starting, busy, not due)."""

    def clean(self) -> None:
        """Remove what a killed process leaves outside the state folder."""


class Interrupted(Exception):  # noqa: N818  a request, not an error
    """A stop was asked for while components were starting."""


@dataclass(slots=True)
class Watched:
    """One component and the life of its process."""

    component: Component
    log_path: Path
    state: State = "stopped"
    process: ChildProcess | None = None
    restarts: int = 0
    deadline: float = 0.0
    faults: int = 0
    recent: deque[float] = field(default_factory=deque)

    def start(self) -> None:
        """Prepare and start the process; it is then `starting` until its check answers."""
        self.component.prepare()
        with self.log_path.open("ab") as output:
            self.process = ChildProcess(self.component.command(), self.component.environment(), output)
        self.state, self.faults = "starting", 0
        self.deadline = time.monotonic() + self.component.start_timeout_s

    def trouble(self) -> str | None:
        """Why it must be restarted, or None. Moves `starting` to `ready` when the check answers."""
        code = self.process.exit_code() if self.process is not None else None
        if code is not None:
            return describe_exit(code)
        answer = self.component.check()
        if self.state == "starting":
            return self._trouble_while_starting(answer)
        if answer is not None:
            self.faults = self.faults + 1 if answer else 0
        return answer if self.faults >= FAULTS_BEFORE_RESTART else None

    def _trouble_while_starting(self, answer: str | None) -> str | None:
        if answer == "":
            self.state = "ready"
        elif answer is not None:
            return answer
        elif time.monotonic() > self.deadline:
            return f"did not answer within {self.component.start_timeout_s:.0f} s"
        return None

    def may_restart(self) -> bool:
        """Whether the budget of restarts allows one more now; counts it."""
        now = time.monotonic()
        while self.recent and now - self.recent[0] > RESTART_WINDOW_S:
            self.recent.popleft()
        self.recent.append(now)
        return len(self.recent) <= RESTART_BUDGET

    def end(self, state: State, timeout_s: float) -> None:
        """End the process and its group, gently for at most `timeout_s`."""
        if self.process is not None:
            self.process.ask_to_stop()
            self.process.end(time.monotonic() + timeout_s)
        self.process, self.state = None, state
        self.component.clean()

    def explain(self, trouble: str) -> str:
        """The trouble, the lines of the log that look like its cause, and the log's end."""
        lines = last_lines(self.log_path, 200)
        causes = [line for line in lines if re.search(self.component.cause_pattern, line)][-5:]
        parts = [f"{self.component.name}: {trouble}"]
        if causes:
            parts += ["likely cause:", *(f"  {line}" for line in causes)]
        return "\n".join([*parts, f"last lines of {self.log_path}:", *(f"  {line}" for line in lines[-15:])])


class Supervisor:
    """Owner of a running stack. Use from the main thread: children die with the thread that started them."""

    def __init__(self, components: Sequence[Component], state_dir: Path) -> None:
        logs = state_dir / "logs"
        self._state_dir = state_dir
        self._watched = [Watched(component, logs / f"{component.name}.log") for component in components]
        self._stop_asked = False

    def start(self) -> None:
        """Start all and return when all answer. Raises StackError naming the first that fails, or Interrupted; nothing
        is left running then."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._ask_to_stop)
        try:
            for watched in self._watched:
                watched.log_path.parent.mkdir(parents=True, exist_ok=True)
                watched.log_path.write_bytes(b"")
                watched.start()
                self._write_state()
            while any(watched.state == "starting" for watched in self._watched):
                self._step_while_starting()
        except BaseException:
            self.stop()
            raise
        self._write_state()

    def watch(self) -> None:
        """Keep everything running until SIGTERM, SIGINT or SIGHUP; then stop it."""
        try:
            while not self._stop_asked:
                for watched in self._watched:
                    if watched.state in ("starting", "ready"):
                        self._look_after(watched)
                self._write_state()
                self._sleep(WATCH_PERIOD_S)
        finally:
            self.stop()

    def stop(self) -> None:
        """End every process, all at once, and remove the state file."""
        deadline = time.monotonic() + STOP_TIMEOUT_S
        for watched in self._watched:
            if watched.process is not None:
                watched.process.ask_to_stop()
        for watched in self._watched:
            watched.end("stopped", max(0.0, deadline - time.monotonic()))
        (self._state_dir / "state.json").unlink(missing_ok=True)

    def state(self) -> dict[str, object]:
        """The document of the state file."""
        endpoints: dict[str, str] = {}
        components = {}
        for watched in self._watched:
            endpoints |= watched.component.endpoints()
            components[watched.component.name] = {
                "pid": watched.process.pid if watched.process is not None else None,
                "state": watched.state,
                "restarts": watched.restarts,
                "log": str(watched.log_path),
            }
        return {"supervisor_pid": os.getpid(), "endpoints": endpoints, "components": components}

    def _step_while_starting(self) -> None:
        for watched in self._watched:
            trouble = watched.trouble()
            if trouble is not None:
                raise StackError(watched.explain(trouble), 4)
        if self._stop_asked:
            raise Interrupted
        time.sleep(STARTING_PERIOD_S)

    def _look_after(self, watched: Watched) -> None:
        """Restart a component in trouble, within its budget; past it, leave it `failed` and the others running."""
        trouble = watched.trouble()
        if trouble is None:
            return
        log.warning("%s", watched.explain(trouble))
        watched.end("stopped", 2.0)
        if not watched.may_restart():
            watched.state = "failed"
            log.error(
                "%s: restarted %d times in %.0f s; it stays stopped",
                watched.component.name,
                RESTART_BUDGET,
                RESTART_WINDOW_S,
            )
            return
        watched.restarts += 1
        try:
            watched.start()
        except (OSError, StackError) as error:
            watched.state = "failed"
            log.error("%s: cannot be started again: %s", watched.component.name, error)

    def _sleep(self, seconds: float) -> None:
        """Sleep, but not through a request to stop: a signal does not end Python's own sleep."""
        deadline = time.monotonic() + seconds
        while not self._stop_asked and time.monotonic() < deadline:
            time.sleep(0.1)

    def _write_state(self) -> None:
        path = self._state_dir / "state.json"
        text = json.dumps(self.state(), indent=2) + "\n"
        if path.exists() and path.read_text() == text:
            return
        beside = path.with_suffix(".new")
        beside.write_text(text)
        beside.replace(path)

    def _ask_to_stop(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self._stop_asked = True


def become_supervisor_of(state_dir: Path) -> bool:
    """Take the state folder's lock for the rest of this process's life; False when another supervisor has it. The
    kernel frees it at any kind of death, and not before: whoever sees it free knows that the process is gone."""
    state_dir.mkdir(parents=True, exist_ok=True)
    return _try_lock(os.open(state_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644))


def is_running(state_dir: Path) -> bool:
    """Whether a supervisor holds the state folder now."""
    if not (state_dir / "lock").exists():
        return False
    with (state_dir / "lock").open() as lock:
        return not _try_lock(lock.fileno())


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
