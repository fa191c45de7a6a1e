"""The process from which the cameras' processes are forked: it holds what they share, loaded once, and nothing else.

Run by `child` as `python -m pipeline.sources.forkserver <descriptor>`. A request is one message with two descriptors
(the child's socket and its memory file); the answer carries a pidfd. Secrets come to a child over its own socket, so
neither this process nor any command line or environment ever holds one. It ends with the worker, and the children end
with it, even a stopped one.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path

import av.logging

from pipeline.sources import capture
from pipeline.sources.link import Link

SYSTEM_PYTHON = "/usr/bin/python3"
"""The distribution's own Python, to which its GObject bindings belong."""
GENICAM_CHILD = Path(__file__).with_name("genicam_child.py")

_PR_SET_PDEATHSIG = 1
_REAP_EVERY_S = 1.0


def main(descriptor: int) -> None:
    """Fork a child a request until the worker is gone."""
    requests = socket.socket(fileno=descriptor)
    requests.settimeout(_REAP_EVERY_S)
    av.logging.set_level(av.logging.PANIC)  # FFmpeg's own words could hold an address with its password
    libc = ctypes.CDLL(None)
    gc.collect()
    gc.freeze()  # a collection in a child would touch, and so copy, every object that the children share
    while True:
        _reap()
        try:
            kind, descriptors, _, _ = socket.recv_fds(requests, 64, 2)
        except TimeoutError:
            continue
        if not kind:
            return
        link, memory = descriptors
        parent = os.getpid()
        if (pid := os.fork()) == 0:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            requests.close()
            _become(kind.decode(), link, memory, parent)
        pidfd = os.pidfd_open(pid)
        socket.send_fds(requests, [b"ok"], [pidfd])
        for used in (link, memory, pidfd):
            os.close(used)


def _become(kind: str, link: int, memory: int, parent: int) -> None:
    """Be the camera's process to its end."""
    code = 1
    try:
        if os.getppid() != parent:
            return
        if kind == "genicam":
            _become_genicam(link, memory)
        capture.run(Link(socket.socket(fileno=link), memory))
        code = 0
    except SystemExit:
        code = 0
    finally:
        os._exit(code)


def _become_genicam(link: int, memory: int) -> None:
    for kept in (link, memory):
        os.set_inheritable(kept, True)
    try:
        os.execv(SYSTEM_PYTHON, [SYSTEM_PYTHON, "-I", str(GENICAM_CHILD), str(link), str(memory)])  # noqa: S606 (no shell is meant)
    except OSError:
        text, hint = f"{SYSTEM_PYTHON} cannot be run", "apt-get install python3-gi gir1.2-aravis-0.8"
        lost = {"kind": "lost", "text": text, "reason": "driver_missing", "hint": hint, "final": True}
        Link(socket.socket(fileno=link), memory).say(lost)
        os._exit(1)


def _reap() -> None:
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


if __name__ == "__main__":
    main(int(sys.argv[1]))
