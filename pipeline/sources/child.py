"""A camera read in a process of its own, watched: a read that hangs is killed, and the reader goes on.

Camera libraries block in calls that no timeout reaches. Here they do it in a child process, which hands its pictures
over through shared memory; the reader waits a bounded time for each, then kills the child and calls the camera lost.
Opening it anew is `ingest`'s. Used by `rtsp`, `usb` and `genicam`; the other end is `capture` or `genicam_child`.
"""

from __future__ import annotations

import atexit
import json
import mmap
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Literal

import numpy as np

from pipeline.errors import FrameError, SourceError
from pipeline.sources.link import MAX_MESSAGE, SLOT_BYTES
from pipeline.types import IDLE, Idle, Image, Picture

GRACE_S = 3.0
"""How much longer than its own timeout a child may be silent before it counts as hung and is killed."""
IDLE_S = 0.5
"""Longest wait of one `read`: it then gives IDLE, so that its caller can be told to stop."""
_STOP_S = 1.0
_START_S = 30.0


class ForkServer:
    """The worker's one process from which cameras are forked; started when first needed, again when it is gone."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._requests: socket.socket | None = None

    def fork(self, kind: str, link: socket.socket, memory: int) -> int:
        """Start a child with its ends of link and memory; gives its pidfd. Raises OSError."""
        with self._lock:
            try:
                requests = self._requests or self._start()
                socket.send_fds(requests, [kind.encode()], [link.fileno(), memory])
                answer, descriptors, _, _ = socket.recv_fds(requests, 16, 1)
                if not answer:
                    raise ConnectionResetError("the camera processes' server has ended")
                return descriptors[0]
            except OSError:
                self._end()
                raise

    def close(self) -> None:
        """End it, and every child that is left."""
        with self._lock:
            self._end()

    def _start(self) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "pipeline.sources.forkserver", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is the worker's, which drains first
            )
        ours.settimeout(_START_S)
        self._requests = ours
        return ours

    def _end(self) -> None:
        if self._requests is not None:
            self._requests.close()
            self._requests = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


FORK_SERVER = ForkServer()
atexit.register(FORK_SERVER.close)


class ChildSource:
    """One camera behind a child process; see `Source` for the contract.

    `settings` goes to the child as JSON. `to_rgb(raw, pixel_format)` makes the picture of what the child handed over;
    without it the pixels are RGB. A picture's `image` is the slot itself: it holds until the next `read`.
    """

    def __init__(
        self,
        kind: Literal["rtsp", "usb", "genicam"],
        settings: dict[str, Any],
        *,
        shown: str,
        timeouts_s: tuple[float, float],
        to_rgb: Callable[[Image, str], Image] | None = None,
    ) -> None:
        self._kind = kind
        self._settings = {"type": kind, **settings}
        self._shown = shown
        self._timeouts_s = timeouts_s
        self._to_rgb = to_rgb
        self._link: socket.socket | None = None
        self._memory = self._pidfd = -1
        self._maps: dict[int, mmap.mmap] = {}
        self._slot: int | None = None
        self._silent_s = 0.0

    def __enter__(self) -> ChildSource:
        self._silent_s = 0.0
        try:
            self._start()
            while (message := self._receive(self._timeouts_s[0])) is None:
                pass
            if message["kind"] != "opened":
                raise _lost(message)
        except OSError as error:
            self._stop(_STOP_S)
            text = f"{self._shown}: no process could be started for this camera: {error}"
            raise SourceError(text, reason="internal") from None
        except SourceError:
            self._stop(_STOP_S)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop(_STOP_S)

    def read(self) -> Picture | Idle | None:
        """Give the next picture, IDLE when none came for a moment, None when the stream has ended."""
        self._give_back()
        message = self._receive(self._timeouts_s[1])
        if message is None or message["kind"] == "alive":
            return IDLE
        if message["kind"] == "picture":
            return self._picture(message)
        if message["kind"] == "damaged":
            part_id, origin = message["part"]
            raise FrameError(
                f"{self._shown}: {message['text']}",
                part_id=part_id,
                part_id_source=origin,
                trigger_count=message.get("count"),
                reason=message.get("reason", "frame_corrupt"),
            )
        if message["kind"] == "end":
            return None
        raise _lost(message)

    def _start(self) -> None:
        self._memory = os.memfd_create("logicrd-pictures")
        self._link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._pidfd = FORK_SERVER.fork(self._kind, theirs, self._memory)
        self._link.send(json.dumps(self._settings).encode())

    def _stop(self, grace_s: float) -> None:
        """Ask the child to end, and kill it when it does not within `grace_s`."""
        if self._pidfd >= 0:
            if grace_s > 0:
                self._signal(signal.SIGTERM)
            if grace_s <= 0 or not _is_ready(self._pidfd, grace_s):
                self._signal(signal.SIGKILL)
            os.close(self._pidfd)
        if self._memory >= 0:
            os.close(self._memory)
        if self._link is not None:
            self._link.close()
        self._pidfd = self._memory = -1
        self._link, self._slot = None, None
        self._maps.clear()

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, number)

    def _receive(self, timeout_s: float) -> dict[str, Any] | None:
        """Wait a moment for the child's next message. Raises SourceError once it was silent for too long, or ended."""
        if self._link is None:
            raise SourceError(f"{self._shown} is not open", reason="lost")
        if not _is_ready(self._link.fileno(), IDLE_S):
            self._silent_s += IDLE_S
            if self._silent_s < timeout_s + GRACE_S:
                return None
            self._stop(0.0)
            text = f"{self._shown}: its process gave no sign of life for {self._silent_s:.1f} s and was killed"
            raise SourceError(text, reason="timeout")
        self._silent_s = 0.0
        try:
            data = self._link.recv(MAX_MESSAGE)
        except ConnectionResetError:  # told once, when the child ended before it read all; its last words are there yet
            data = self._link.recv(MAX_MESSAGE)
        if not data:
            raise SourceError(f"{self._shown}: its process has ended", reason="lost", hint="it is started anew")
        message: dict[str, Any] = json.loads(data)
        return message

    def _picture(self, message: dict[str, Any]) -> Picture:
        self._slot = slot = message["slot"]
        shape = message["shape"]
        size = int(np.prod(shape))
        if slot not in self._maps or len(self._maps[slot]) < size:
            self._maps[slot] = mmap.mmap(self._memory, size, prot=mmap.PROT_READ, offset=slot * SLOT_BYTES)
        image: Image = np.frombuffer(self._maps[slot], np.uint8, size).reshape(shape)
        if self._to_rgb is not None:
            image = self._to_rgb(image, message["format"])
        part_id, origin = message["part"]
        return Picture(
            image,
            datetime.fromtimestamp(message["at"], UTC),
            message["s"],
            part_id,
            origin,
            trigger_count=message.get("count"),
            device_timestamp_ns=message.get("device_ns"),
        )

    def _give_back(self) -> None:
        if self._slot is None or self._link is None:
            return
        slot, self._slot = self._slot, None
        with suppress(OSError):  # a child that has ended: what it said before is still to be read
            self._link.send(bytes([slot]))


def _lost(message: dict[str, Any]) -> SourceError:
    """Read a child's last message."""
    hint, final = message.get("hint", ""), message.get("final", False)
    return SourceError(message["text"], reason=message["reason"], hint=hint, final=final)


def _is_ready(descriptor: int, timeout_s: float) -> bool:
    """Wait until there is something to read, or for a pidfd until its process has ended."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(timeout_s * 1e3))
