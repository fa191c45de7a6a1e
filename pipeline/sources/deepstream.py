"""RTSP cameras through a GStreamer graph: DeepStream's on a GPU (`deepstream`), or its twin in software (`gstreamer`).

One adapter, two graphs. The graph is a description, made here without I/O; a child process runs it (`graph_child.py`),
in the Python that has the bindings, and hands each camera's frames over through a pipe of the camera's own. A camera
that is lost closes its pipe and no other; a child that hangs is killed, and its cameras are opened anew by ingest. The
software graph is what tests run; the hardware graph is type-checked against a stub and has not been run. A graph that
gives scores instead of pictures is described by `pipeline.deepstream`.
"""

from __future__ import annotations

import functools
import json
import os
import select
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from fcntl import fcntl
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
from pydantic import SecretStr

from pipeline.cameras import RtspCamera, read_secret
from pipeline.errors import FrameError, SourceError
from pipeline.region import MAX_PIXELS
from pipeline.sources.sei import part_id_in
from pipeline.types import Picture

PYTHON = Path("/usr/bin/python3")
"""The distribution's Python: on Debian it has GStreamer's bindings, in the DeepStream image pyservicemaker."""
MOST_CAMERAS = 64
"""Cameras in one DeepStream pipeline: a bound of the decoder's memory, not of the graph."""
MUX = """[property]
algorithm-type=1
adaptive-batching=1
max-fps-control=0
overall-max-fps-n=120
overall-max-fps-d=1
overall-min-fps-n=100
overall-min-fps-d=1
max-same-source-frames=1
"""
"""Settings of the new nvstreammux. The minimum rate is its deadline: a batch leaves 10 ms after its first frame, full
or not. `batched-push-timeout` means nothing to it, and `batch-size` comes from the bin."""
CHILD = Path(__file__).with_name("graph_child.py")
_GIVE_BACK_S = 2.0
_PIPE_BYTES = 1 << 20
_F_SETPIPE_SZ = 1031
_HINTS = {
    "auth_failed": "check `user` and `password_file`",
    "not_found": "check the path in the camera's address",
    "unreachable": "check the address, the port, and that the camera is on",
    "timeout": "check the network and the camera's power",
    "codec_unsupported": "set the camera to H.264",
    "capture_died": "is GStreamer (or DeepStream) installed for /usr/bin/python3?",
}

Node = dict[str, Any]
"""An element of a graph: `type`, `name`, `properties`."""


def software_graph() -> str:
    """Describe the software twin; the child sets the address, which belongs in no text.

    Its decoder does not say when it conceals rubbish inside a frame, as FFmpeg does for `stream.py`; frames that it
    cannot decode at all, and those built upon them, are faults.
    """
    return (
        "rtspsrc name=camera protocols=tcp latency=0 ! rtph264depay ! h264parse"
        " ! video/x-h264,stream-format=byte-stream,alignment=au ! avdec_h264 name=decoder max-threads=1"
        " ! videoconvert ! video/x-raw,format=RGB ! appsink name=pictures sync=false max-buffers=4 drop=false"
    )


def multi_source(port: int, most_cameras: int) -> Node:
    """Describe the element that decodes and batches all cameras, and takes them at run time on a loopback port.

    It starts without cameras: a file in its list at start floods it with messages, and a password in a list would lie
    in a file. `drop-pipeline-eos` keeps the graph alive when the last camera has gone; its port is a string (0: none).
    """
    properties = {
        "ip-address": "127.0.0.1",
        "port": str(port),
        "max-batch-size": most_cameras,
        "live-source": True,
        "drop-pipeline-eos": True,
        "attach-sys-ts": False,
        "select-rtp-protocol": 4,  # TCP: a frame is whole or it is not there
        "latency": 100,
        "rtsp-reconnect-interval": 5,
        "rtsp-reconnect-attempts": -1,
        "disable-audio": True,
    }
    return {"type": "nvmultiurisrcbin", "name": "cameras", "properties": properties}


def hardware_graph(port: int, most_cameras: int = MOST_CAMERAS) -> list[Node]:
    """Describe the graph that gives RGB pictures in GPU memory; the child copies each to the host.

    All cameras of one graph have one picture size: the converter after the mux has one for the whole batch.
    """
    return [
        multi_source(port, most_cameras),
        {"type": "nvvideoconvert", "name": "converter", "properties": {"compute-hw": 1}},
        {"type": "capsfilter", "name": "rgb", "properties": {"caps": "video/x-raw(memory:NVMM), format=RGB"}},
        {"type": "appsink", "name": "pictures", "properties": {"emit-signals": True, "sync": False, "async": False}},
    ]


def pictures_start(port: int) -> dict[str, Any]:
    """Start DeepStream with the graph that gives pictures."""
    return {"nodes": hardware_graph(port), "mux": MUX, "port": port}


def scores_start(config_file: Path, port: int) -> dict[str, Any]:
    """Start DeepStream with a rendered graph, which gives scores and maps."""
    return {"config": str(config_file), "port": port}


class GraphHost:
    """The child process of one graph, shared by its cameras; it lives while one is open. Safe from every thread."""

    def __init__(self, start: Callable[[], dict[str, Any]] = dict) -> None:
        """Take what says of which parts the graph is made, asked before each start of the child for a port that is free
        then: nothing for software, `pictures_start` or `scores_start` for DeepStream. It may raise OSError."""
        self._start_order = start
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._open: dict[str, int] = {}
        # When any camera of the graph last gave a message; a graph that has stopped as a whole does not say so.
        self._heard_s = 0.0

    @property
    def pid(self) -> int | None:
        """The child's process id while it lives."""
        return self._process.pid if self._process is not None else None

    def open(self, camera_id: str, order: dict[str, Any]) -> int:
        """Begin to read a camera; gives the end of its pipe, which the caller closes by `close`. Raises SourceError."""
        reader, writer = os.pipe()
        fcntl(reader, _F_SETPIPE_SZ, _PIPE_BYTES)
        os.set_blocking(reader, False)
        try:
            with self._lock:
                control = self._running()
                socket.send_fds(control, [json.dumps({"open": camera_id, **order}).encode()], [writer])
                self._open[camera_id] = reader
        except OSError as error:
            os.close(reader)
            with self._lock:
                self._end()
            raise SourceError(
                f"the capture process does not start: {error}", reason="capture_died", hint=_HINTS["capture_died"]
            ) from None
        finally:
            os.close(writer)
        return reader

    def heard(self) -> None:
        """Note that a camera gave a message."""
        self._heard_s = time.monotonic()

    def close(self, camera_id: str, reader: int, silent_s: float | None = None) -> None:
        """Give a camera back, after `silent_s` of waiting in vain for it. Never raises.

        A child that does not let go of it in time hangs, and one of which no camera was heard for that long has
        stopped: either is replaced.
        """
        with self._lock:
            self._tell({"close": camera_id})
        given_back = _drain(reader, time.monotonic() + _GIVE_BACK_S)
        with self._lock:
            self._open.pop(camera_id, None)
            os.close(reader)
            if not given_back or not self._open or self._stopped(silent_s):
                self._end()

    def _stopped(self, silent_s: float | None) -> bool:
        """Say whether no camera was heard for so long, and none has anything that waits to be read."""
        if silent_s is None or time.monotonic() - self._heard_s < silent_s:
            return False
        return not _readable(self._open.values(), 0.0)

    def _running(self) -> socket.socket:
        if self._process is not None and self._process.poll() is not None:
            self._end()
        if self._control is None:
            self._start()
        assert self._control is not None  # noqa: S101 (set by _start)
        return self._control

    def _start(self) -> None:
        order = self._start_order()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            # The old mux is DeepStream's default; GStreamer alone does not look at the variable.
            command = ["env", "USE_NEW_NVSTREAMMUX=yes", str(PYTHON), "-I", str(CHILD), str(theirs.fileno())]
            self._process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # DeepStream prints addresses there, with their passwords
            )
        self._control = ours
        self._heard_s = time.monotonic()
        ours.settimeout(_GIVE_BACK_S)
        self._tell({"start": order})

    def _tell(self, order: dict[str, Any]) -> None:
        if self._control is not None:
            try:
                self._control.send(json.dumps(order).encode())
            except OSError:  # the child is gone: its pipes say so
                return

    def _end(self) -> None:
        """Let the child go, or kill it; the pipes of cameras that are still open end with it."""
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._process is not None:
            try:
                self._process.wait(_GIVE_BACK_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None


class GraphFrameError(FrameError):
    """A frame that the graph could not use, or gave up; with the time of this (monotonic), and where the graph scores
    with its number there."""

    def __init__(self, text: str, part_id: str | None, captured_s: float, number: int | None) -> None:
        super().__init__(text, part_id=part_id, part_id_source=None if part_id is None else "sei")
        self.captured_s = captured_s
        self.number = number


class GraphPipe:
    """One camera's messages out of a graph: a header and its body at a time. Used by one thread."""

    def __init__(self, camera: RtspCamera, host: GraphHost) -> None:
        self._camera = camera
        self._host = host
        self._reader: int | None = None
        self._began = False
        self._silent_s: float | None = None

    def __enter__(self) -> Self:
        secret = read_secret(self._camera.password_file) if self._camera.password_file else SecretStr("")
        order = {"url": self._camera.url, "user": self._camera.user, "password": secret.get_secret_value()}
        self._reader = self._host.open(self._camera.id, {**order, "graph": software_graph()})
        self._began, self._silent_s = False, None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._reader is not None:
            self._host.close(self._camera.id, self._reader, self._silent_s)
            self._reader = None

    def next(self) -> tuple[dict[str, Any], bytearray] | None:
        """Wait for a message; None at the camera's own end. Raises FrameError for a fault, SourceError for a loss."""
        limit_s = self._camera.read_timeout_s + (0.0 if self._began else self._camera.connect_timeout_s)
        until_s = time.monotonic() + limit_s
        try:
            size = int.from_bytes(self._take(4, until_s), "big")
            header: dict[str, Any] = json.loads(self._take(size, until_s))
            body = self._take(header["bytes"], until_s)
        except TimeoutError:
            self._silent_s = limit_s
            raise self._lost("timeout", "nothing arrives") from None
        self._began = True
        self._host.heard()
        if "ended" in header:
            return None
        if "lost" in header:
            raise self._lost(header["lost"], header["text"])
        if "fault" in header:
            part_id = part_id_in(bytes.fromhex(header["before"]))
            text = f"{self._camera.url}: {header['fault']}"
            raise GraphFrameError(text, part_id, header["captured_s"], header.get("frame"))
        return header, body

    def _take(self, count: int, until_s: float) -> bytearray:
        assert self._reader is not None  # noqa: S101 (set by __enter__)
        data = bytearray(count)
        view = memoryview(data)
        while view:
            if not _readable([self._reader], until_s - time.monotonic()):
                raise TimeoutError
            got = os.readv(self._reader, [view])
            if not got:
                raise self._lost("capture_died", "the capture process ended")
            view = view[got:]
        return data

    def _lost(self, reason: str, text: str) -> SourceError:
        return SourceError(f"{self._camera.url}: {text}: {reason}", reason=reason, hint=_HINTS.get(reason, ""))


class GraphSource(GraphPipe):
    """One camera of a graph as ingest reads it; see `Source` for the contract."""

    def read(self) -> Picture | None:
        """Give the next picture; None at the end. It is stamped when its data arrived, before decoding, in software,
        and when it came out of the graph with DeepStream, which also gives no part id."""
        message = self.next()
        if message is None:
            return None
        header, body = message
        width, height, stride = header["width"], header["height"], header["stride"]
        if width * height > MAX_PIXELS:
            raise SourceError(f"pictures over {MAX_PIXELS} pixels", reason="too_large", final=True)
        image = np.frombuffer(body, np.uint8).reshape(height, stride)[:, : width * 3].reshape(height, width, 3)
        part_id = part_id_in(bytes.fromhex(header["before"]))
        origin = None if part_id is None else "sei"
        return Picture(image, wall_clock(header["captured_s"]), header["captured_s"], part_id, origin)


def wall_clock(captured_s: float) -> datetime:
    """Give the time in UTC of a moment of the monotonic clock that has just been."""
    return datetime.now(UTC) - timedelta(seconds=time.monotonic() - captured_s)


def open_graph(camera: RtspCamera, kind: Literal["gstreamer", "deepstream"]) -> GraphSource:
    """Make the source of a camera in the worker's graph of a kind; nothing is opened yet."""
    size = None if kind == "gstreamer" or camera.picture_size is None else tuple(camera.picture_size)
    return GraphSource(camera, _host(kind, size))


@functools.cache
def _host(kind: str, size: tuple[int, ...] | None) -> GraphHost:
    """Give the worker's one process for a graph: a GPU's context is too dear for one a camera."""
    del size
    return GraphHost() if kind == "gstreamer" else GraphHost(lambda: pictures_start(free_port()))


def free_port() -> int:
    """Find a port of this machine that nobody listens on, for a graph's REST server."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _drain(reader: int, until_s: float) -> bool:
    """Read a pipe to its end; False when that does not come in time."""
    while _readable([reader], until_s - time.monotonic()):
        if not os.read(reader, _PIPE_BYTES):
            return True
    return False


def _readable(readers: Iterable[int], wait_s: float) -> bool:
    """Wait until one of some pipes has data or has ended; unlike `select`, without a limit on their numbers."""
    poll = select.poll()
    for reader in readers:
        poll.register(reader, select.POLLIN)
    return bool(poll.poll(max(0.0, wait_s) * 1e3))
