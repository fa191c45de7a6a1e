"""Child processes that cannot outlive their owner, and the ports they listen on.

Every child runs in a session and process group of its own and dies with the process that started it, even when that one
is killed with SIGKILL. It knows nothing of what the children serve. Used by the supervisor and the simulated cameras.
Start children from the main thread only: Linux ties the death signal to the thread that forked.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import IO

LOOPBACK = "127.0.0.1"


class StackError(Exception):
    """What is wrong with which component, and what to do; `exit_code` as documented for the commands (3 or 4)."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class ChildProcess:
    """One child and its group, writing to one log file."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: IO[bytes]) -> None:
        """Start it with what this process has in its environment and `environment` on top. `setpriv` sets the death
        signal and becomes the command, so the pid is the command's own."""
        self._process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *command],
            env={**os.environ, **environment},  # noqa: TID251  handed on, not read
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.pid = self._process.pid

    def exit_code(self) -> int | None:
        """None while it runs; negative is the signal that ended it."""
        return self._process.poll()

    def ask_to_stop(self) -> None:
        """SIGTERM to the child itself, which then ends its own helpers in order."""
        if self._process.poll() is None:
            self._process.terminate()

    def end(self, deadline: float) -> None:
        """Wait until `deadline` (monotonic seconds), then SIGKILL what is left of the whole group."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=max(0.0, deadline - time.monotonic()))
        kill_group(self.pid)
        self._process.wait(timeout=5)


def kill_group(group: int) -> None:
    """SIGKILL every process of the group; none left is fine."""
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def describe_exit(code: int) -> str:
    """`exited with 3` or `was ended by SIGKILL`."""
    return f"exited with {code}" if code >= 0 else f"was ended by {signal.Signals(-code).name}"


def last_lines(path: Path, count: int = 15) -> list[str]:
    """The end of a log, at most `count` lines of at most 300 characters, padding cut; [] when there is none."""
    if not path.exists():
        return []
    with path.open("rb") as log:
        log.seek(max(0, path.stat().st_size - 64_000))
        lines = log.read().decode(errors="replace").splitlines()
    return [re.sub(r" {4,}|-{8,}", "  ", line)[:300] for line in lines[-count:]]


def is_free(port: int) -> bool:
    """Whether a server could listen on this loopback port now."""
    with closing(socket.socket()) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
            probe.listen(1)
        except OSError:
            return False
    return True


def answers(port: int) -> bool:
    """Whether something accepts connections on this loopback port now."""
    with closing(socket.socket()) as probe:
        probe.settimeout(0.5)
        return probe.connect_ex((LOOPBACK, port)) == 0


def free_ports(count: int) -> list[int]:
    """That many different ports nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for probe in sockets:
            probe.bind((LOOPBACK, 0))
        return [int(probe.getsockname()[1]) for probe in sockets]
    finally:
        for probe in sockets:
            probe.close()
