"""The RTSP side of the simulated cameras: plays access units made by `simulate.py`, paced in real time, over TCP.

Runs in the distribution's own Python, which has GStreamer's bindings, and imports nothing else. Reads its frames from
the inherited file descriptor given as the only argument. Each frame leaves with an SEI message that carries its part
id. Ends when every camera has played to its end, on SIGTERM or SIGINT, or when the process that started it is gone.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gi

gi.require_version("Gst", "1.0")
gi.require_version("GstRtsp", "1.0")
gi.require_version("GstRtspServer", "1.0")
from gi.repository import GLib, Gst, GstRtsp, GstRtspServer  # noqa: E402  versions come first

# The line looks for the same UUID.
PART_ID = uuid.uuid5(uuid.NAMESPACE_URL, "urn:logicrd:part-id")
PIPELINE = (
    "( appsrc name=frames format=time is-live=false caps=video/x-h264,stream-format=byte-stream,alignment=au"
    " ! h264parse ! rtph264pay name=pay0 pt=96 config-interval=-1 )"
)
# How long a client has to read what was sent before the last frame's end closes its connection.
DRAIN_S = 2.0


def part_id_message(part_id: str) -> bytes:
    """The NAL unit of an unregistered SEI message (H.264 D.1.7): UUID, then the part id in UTF-8."""
    payload = PART_ID.bytes + part_id.encode()
    size = b"\xff" * (len(payload) // 255) + bytes([len(payload) % 255])
    return b"\0\0\0\1" + b"\x06" + _escape(b"\x05" + size + payload + b"\x80")


def _escape(raw: bytes) -> bytes:
    """Insert emulation prevention bytes (H.264 7.4.1): no start code may appear inside a NAL unit."""
    out, zeros = bytearray(), 0
    for byte in raw:
        if zeros >= 2 and byte <= 3:
            out.append(3)
            zeros = 0
        out.append(byte)
        zeros = zeros + 1 if byte == 0 else 0
    return bytes(out)


@dataclass(slots=True)
class Camera:
    """One camera's frames and how far it has played. Number n is the n-th frame since the start, over all laps."""

    name: str
    frames: list[tuple[str, bytes, int, bool]]
    rate: tuple[int, int]
    loop: bool
    limit: int | None
    stall_after: int | None
    sent: list[str] = field(default_factory=list)
    connections: int = 0
    next_number: int = 0

    def last_number(self) -> int | None:
        """One past the last frame; None when it plays for ever."""
        if self.loop:
            return self.limit
        return len(self.frames) if self.limit is None else min(self.limit, len(self.frames))

    def is_over(self) -> bool:
        """Whether everything has been sent."""
        last = self.last_number()
        return last is not None and self.next_number >= last

    def resume_at(self) -> int:
        """The number that a new client starts with: the next keyframe, the first frame at first."""
        number = self.next_number
        while not self.frames[number % len(self.frames)][3]:
            number += 1
        return number

    def part_id(self, number: int) -> str:
        """Part ids are unique: those of lap 2 end in ~2."""
        lap, position = divmod(number, len(self.frames))
        part_id = self.frames[position][0]
        return part_id if lap == 0 else f"{part_id}~{lap + 1}"

    def unit(self, number: int) -> bytes:
        """The access unit with its part id before the first slice."""
        _, unit, slice_offset, _ = self.frames[number % len(self.frames)]
        return unit[:slice_offset] + part_id_message(self.part_id(number)) + unit[slice_offset:]


class Playback:
    """One client's stream of a camera. GStreamer calls it from the stream's own thread."""

    def __init__(self, camera: Camera, media: GstRtspServer.RTSPMedia) -> None:
        camera.connections += 1
        self._camera = camera
        self._start = self._number = camera.resume_at()
        self._leaving: int | None = None
        self._waits_since_s = 0.0
        self._is_playing = False
        media.connect("new-state", self._on_state)
        media.connect("unprepared", lambda _: self.settle())
        element = media.get_element()
        element.get_by_name_recurse_up("frames").connect("need-data", self._on_need_data)
        pad = element.get_by_name_recurse_up("pay0").get_static_pad("src")
        pad.add_probe(Gst.PadProbeType.BUFFER | Gst.PadProbeType.BUFFER_LIST, self._on_packets)
        pad.add_probe(Gst.PadProbeType.EVENT_DOWNSTREAM, self._on_event)

    def _on_need_data(self, source: Any, size: int) -> None:  # noqa: ANN401  bindings have no types
        del size
        camera, number = self._camera, self._number
        if camera.stall_after is not None and number >= camera.stall_after:
            return
        last = camera.last_number()
        if last is not None and number >= last:
            source.emit("end-of-stream")
            return
        buffer = Gst.Buffer.new_wrapped(camera.unit(number))
        numerator, denominator = camera.rate
        buffer.duration = Gst.SECOND * denominator // numerator
        buffer.pts = buffer.dts = (number - self._start) * Gst.SECOND * denominator // numerator
        self._number += 1
        source.emit("push-buffer", buffer)

    def _on_packets(self, pad: Any, info: Any) -> Gst.PadProbeReturn:  # noqa: ANN401
        """The sender waits below this pad until a packet is due: a frame has left when the next one comes by."""
        del pad
        in_list = info.type & Gst.PadProbeType.BUFFER_LIST
        pts = (info.get_buffer_list().get(0) if in_list else info.get_buffer()).pts
        numerator, denominator = self._camera.rate
        number = self._start + round(pts * numerator / (Gst.SECOND * denominator))
        if number != self._leaving:
            self._note_sent()
            self._leaving = number
            self._waits_since_s = time.monotonic()
        return Gst.PadProbeReturn.OK

    def _on_event(self, pad: Any, info: Any) -> Gst.PadProbeReturn:  # noqa: ANN401
        del pad
        if info.get_event().type == Gst.EventType.EOS:
            self._note_sent()
            self._leaving = None
        return Gst.PadProbeReturn.OK

    def _on_state(self, media: Any, state: int) -> None:  # noqa: ANN401
        del media
        if state == int(Gst.State.PLAYING) and not self._is_playing:
            self._is_playing = True
            self._waits_since_s = time.monotonic()

    def settle(self) -> None:
        """At the end of this stream: count the frame that waited below the pad, if its time had come."""
        numerator, denominator = self._camera.rate
        if self._is_playing and time.monotonic() - self._waits_since_s > denominator / numerator:
            self._note_sent()
        self._leaving = None

    def _note_sent(self) -> None:
        if self._leaving is not None:
            self._camera.sent.append(self._camera.part_id(self._leaving))
            self._camera.next_number = self._leaving + 1


class Server:
    """All cameras behind one port."""

    def __init__(self, index: dict[str, Any], cameras: list[Camera]) -> None:
        self._index = index
        self._cameras = cameras
        self._loop = GLib.MainLoop()
        self._parent = os.getppid()
        self._server = GstRtspServer.RTSPServer.new()
        self._clients: set[Any] = set()
        self._playbacks: list[Playback] = []

    def run(self) -> None:
        """Listen, print the addresses, play until the end, write the report."""
        host = self._index["host"]
        self._server.set_address(host)
        self._server.set_service(str(self._index["port"]))
        self._server.connect("client-connected", self._on_client)
        if self._index["user"] is not None:
            self._server.set_auth(self._authentication())
        for camera in self._cameras:
            self._server.get_mount_points().add_factory(f"/{camera.name}", self._factory(camera))
        if self._server.attach(None) == 0:
            raise OSError(f"port {self._index['port']} on {host} is in use; choose another with --port")
        for number in (signal.SIGTERM, signal.SIGINT):
            GLib.unix_signal_add(GLib.PRIORITY_HIGH, number, self._loop.quit)
        GLib.timeout_add(200, self._on_tick)
        port = self._server.get_bound_port()
        addresses = {camera.name: f"rtsp://{host}:{port}/{camera.name}" for camera in self._cameras}
        print(json.dumps({"cameras": addresses, "pid": os.getpid()}), flush=True)
        self._loop.run()
        self._write_report()

    def _factory(self, camera: Camera) -> GstRtspServer.RTSPMediaFactory:
        factory = GstRtspServer.RTSPMediaFactory.new()
        factory.set_launch(PIPELINE)
        factory.set_protocols(GstRtsp.RTSPLowerTrans.TCP)
        factory.connect("media-configure", lambda _, media: self._playbacks.append(Playback(camera, media)))
        if self._index["user"] is not None:
            permissions = GstRtspServer.RTSPPermissions.new()
            for permission in ("media.factory.access", "media.factory.construct"):
                permissions.add_permission_for_role("viewer", permission, True)
            factory.set_permissions(permissions)
        return factory

    def _authentication(self) -> GstRtspServer.RTSPAuth:
        token = GstRtspServer.RTSPToken.new()
        token.set_string("media.factory.role", "viewer")
        auth = GstRtspServer.RTSPAuth.new()
        auth.add_basic(GstRtspServer.RTSPAuth.make_basic(self._index["user"], self._index["password"]), token)
        return auth

    def _on_client(self, server: Any, client: Any) -> None:  # noqa: ANN401
        """Never drop packets for a slow reader: what the report calls sent must have been sent."""
        del server
        client.set_property("drop-backlog", False)
        self._clients.add(client)
        client.connect("closed", self._clients.discard)

    def _on_tick(self) -> bool:
        if os.getppid() != self._parent:
            self._loop.quit()
        elif all(camera.is_over() for camera in self._cameras):
            GLib.timeout_add(0 if not self._clients else int(DRAIN_S * 1000), self._loop.quit)
            return False
        return True

    def _write_report(self) -> None:
        if self._index["report"] is None:
            return
        for playback in self._playbacks:
            playback.settle()
        report = {camera.name: {"sent": camera.sent, "connections": camera.connections} for camera in self._cameras}
        path = Path(self._index["report"])
        beside = path.with_name(path.name + ".new")
        beside.write_text(json.dumps({"cameras": report}) + "\n")
        beside.replace(path)


def read_cameras(descriptor: int) -> tuple[dict[str, Any], list[Camera]]:
    """The index and every camera's frames out of the memory file."""
    cameras = []
    with os.fdopen(descriptor, "rb") as memory:
        index: dict[str, Any] = json.loads(memory.read(int.from_bytes(memory.read(8), "big")))
        shared = {key: index[key] for key in ("loop", "limit", "stall_after")}
        for name, units in index["cameras"].items():
            frames = [(part_id, memory.read(size), offset, keyframe) for part_id, size, offset, keyframe in units]
            cameras.append(Camera(name, frames, tuple(index["rate"]), **shared))
    return index, cameras


def main(descriptor: str) -> int:
    """0 at the end; 3 when it cannot listen."""
    Gst.init(None)
    index, cameras = read_cameras(int(descriptor))
    try:
        Server(index, cameras).run()
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
