"""The child process that runs GStreamer graphs for `deepstream.py`, which starts it by its path and alone speaks to it.

It runs in the Python that has the bindings (Debian's for `gi`, the DeepStream image's for `pyservicemaker`), not the
line's: it imports the standard library, and the bindings for the graph it is asked for; DeepStream's is in the file
`graph_hardware.py`, which it runs by its path. It never retries or judges.

Orders come over a socket, one JSON object a packet: `{"start": ...}` once, `{"open": id, "url", "user", "password",
"graph"}` with the writing end of a pipe for that camera, `{"close": id}`. Into the pipe go messages: four bytes of
length (big endian), a JSON header, and `bytes` bytes of body. A header is a picture (`width height stride`), the
`fault` of one frame, or the last one: `lost` with `text`, or `ended`. Where the graph has a network it is the `frame`
(its number, with `width height`) that goes into it, and later on the `scores` of that `frame` as it comes out, with
`shape` and the map in the body. All have `captured_s`, the time of this on the monotonic clock that both processes
share, and pictures `before`: what preceded one in its access unit, as hex, which may name its part.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import sys
import threading
import time
from collections import OrderedDict, deque
from pathlib import Path
from typing import Any

MOST_BEFORE_BYTES = 4096
MOST_PICTURES = 4
"""Pictures of one camera that wait for the line; one more turns the oldest into a fault, never into silence."""
MOST_MESSAGES = 1000
_MOST_UNDECODED = 64

Header = dict[str, Any]


class Outlet:
    """One camera's way to the line: a bounded queue, and the thread that writes it into the camera's pipe."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._waiting: deque[tuple[Header, bytes]] = deque()
        self._pictures = 0
        self._changed = threading.Condition()
        self._closed = False
        threading.Thread(target=self._write_all, daemon=True).start()

    def put(self, header: Header, body: bytes = b"") -> None:
        """Queue a message; never blocks."""
        with self._changed:
            if self._closed:
                return
            if body and self._pictures >= MOST_PICTURES:
                self._give_up_oldest()
            self._pictures += bool(body)
            self._waiting.append((header, body))
            if len(self._waiting) > MOST_MESSAGES:
                self._waiting.append(({"lost": "queue_full", "text": "the line does not read this camera"}, b""))
                self._closed = True
            self._changed.notify()

    def close(self, last: Header) -> None:
        """Let what waits go out, then `last`, then close the pipe."""
        with self._changed:
            if not self._closed:
                self._waiting.append((last, b""))
            self._closed = True
            self._changed.notify()

    def _give_up_oldest(self) -> None:
        for index, (header, body) in enumerate(self._waiting):
            if body:
                kept: Header = {key: header[key] for key in ("captured_s", "before", "frame") if key in header}
                self._waiting[index] = ({**kept, "fault": "given up: the line reads too slowly"}, b"")
                self._pictures -= 1
                return

    def _write_all(self) -> None:
        try:
            while (message := self._next()) is not None:
                header, body = message
                text = json.dumps({**header, "bytes": len(body)}).encode()
                _write(self._descriptor, len(text).to_bytes(4, "big") + text)
                _write(self._descriptor, body)
        except OSError:  # the line has closed its end
            with self._changed:
                self._closed = True
                self._waiting.clear()
        finally:
            os.close(self._descriptor)

    def _next(self) -> tuple[Header, bytes] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if not self._waiting:
                return None
            header, body = self._waiting.popleft()
            self._pictures -= bool(body)
            return header, body


class SoftwareGraph:
    """A pipeline of its own for each camera, decoded on the CPU."""

    def __init__(self) -> None:
        import gi

        gi.require_version("Gst", "1.0")
        from gi.repository import Gst

        Gst.init(None)
        self._gst = Gst
        self._cameras: dict[str, SoftwareCamera] = {}

    def open(self, order: Header, outlet: Outlet) -> None:
        """Begin to read a camera into its outlet."""
        camera = SoftwareCamera(self._gst, order, outlet)
        self._cameras[order["open"]] = camera
        camera.start()

    def close(self, camera_id: str) -> None:
        """End it; its outlet closes a moment later."""
        if (camera := self._cameras.pop(camera_id, None)) is not None:
            camera.stopping.set()


class SoftwareCamera(threading.Thread):
    """One camera's graph, from its opening to its end."""

    def __init__(self, gst: Any, order: Header, outlet: Outlet) -> None:  # noqa: ANN401 (the bindings have no types)
        super().__init__(daemon=True)
        self.stopping = threading.Event()
        self._gst = gst
        self._order = order
        self._outlet = outlet
        # What went into the decoder and has not come out of it, by time stamp: arrival, `before`, key frame or not.
        self._undecoded: OrderedDict[int, tuple[float, str, bool]] = OrderedDict()
        self._lock = threading.Lock()
        # As in stream.py: frames after a damaged one are built upon it, and the decoder does not say so.
        self._damaged = False
        self._encodings: set[str] = set()

    def run(self) -> None:
        """Play until the end, the loss, or the order to stop."""
        last: Header = {"ended": True}
        pipeline = None
        try:
            pipeline = self._gst.parse_launch(self._order["graph"])
            self._configure(pipeline)
            pipeline.set_state(self._gst.State.PLAYING)
            last = self._play(pipeline)
        except Exception as error:  # noqa: BLE001 (top frame)
            last = {"lost": "internal", "text": f"{type(error).__name__}: {error}"}
        finally:
            if pipeline is not None:
                pipeline.set_state(self._gst.State.NULL)
            self._give_up_before(None)
            self._outlet.close(last)

    def _configure(self, pipeline: Any) -> None:  # noqa: ANN401
        camera = pipeline.get_by_name("camera")
        camera.set_property("location", self._order["url"])
        if self._order["user"]:
            camera.set_property("user-id", self._order["user"])
            camera.set_property("user-pw", self._order["password"])
        if camera.get_factory().get_name() == "rtspsrc":
            camera.connect("select-stream", self._offered)
        pipeline.get_by_name("decoder").get_static_pad("sink").add_probe(self._gst.PadProbeType.BUFFER, self._note)

    def _offered(self, _: Any, number: int, caps: Any) -> bool:  # noqa: ANN401
        """Remember in which codecs the camera offers pictures: that none of them is known comes as a general error."""
        del number
        stream = caps.get_structure(0)
        if stream.get_string("media") == "video":
            self._encodings.add(stream.get_string("encoding-name"))
        return True

    def _note(self, _: Any, info: Any) -> Any:  # noqa: ANN401
        """Remember an access unit before it is decoded, with its arrival and what may name its part."""
        buffer = info.get_buffer()
        before = before_picture(buffer.extract_dup(0, buffer.get_size()))
        with self._lock:
            is_key = not buffer.has_flags(self._gst.BufferFlags.DELTA_UNIT)
            self._undecoded[buffer.pts] = (time.monotonic(), before, is_key)
        if len(self._undecoded) > _MOST_UNDECODED:
            self._give_up_before(buffer.pts)
        return self._gst.PadProbeReturn.OK

    def _play(self, pipeline: Any) -> Header:  # noqa: ANN401
        gst, sink, bus = self._gst, pipeline.get_by_name("pictures"), pipeline.get_bus()
        while not self.stopping.is_set():
            sample = sink.emit("try-pull-sample", gst.SECOND // 10)
            if sample is not None:
                self._hand_over(sample)
                continue
            if (message := bus.pop_filtered(gst.MessageType.ERROR)) is not None:
                error, _ = message.parse_error()
                if self._encodings and "H264" not in self._encodings:
                    return {"lost": "codec_unsupported", "text": f"it sends {', '.join(sorted(self._encodings))}"}
                return {"lost": reason_of(error.domain, error.code), "text": error.message}
            if sink.get_property("eos"):
                break
        return {"ended": True}

    def _hand_over(self, sample: Any) -> None:  # noqa: ANN401
        buffer, caps = sample.get_buffer(), sample.get_caps().get_structure(0)
        with self._lock:
            captured_s, before, key_frame = self._undecoded.pop(buffer.pts, (time.monotonic(), "", False))
        self._give_up_before(buffer.pts)
        self._damaged = (self._damaged and not key_frame) or buffer.has_flags(self._gst.BufferFlags.CORRUPTED)
        if self._damaged:
            self._outlet.put({"fault": "built upon a bad frame", "captured_s": captured_s, "before": before})
            return
        width, height = caps.get_value("width"), caps.get_value("height")
        body = buffer.extract_dup(0, buffer.get_size())
        form = {"width": width, "height": height, "stride": len(body) // height}
        self._outlet.put({**form, "captured_s": captured_s, "before": before}, body)

    def _give_up_before(self, pts: int | None) -> None:
        """Report what went into the decoder before `pts` and never came out; None means all."""
        with self._lock:
            lost = [stamp for stamp in self._undecoded if pts is None or stamp < pts]
            arrivals = [self._undecoded.pop(stamp) for stamp in lost]
        for captured_s, before, _ in arrivals:
            self._damaged = True
            self._outlet.put({"fault": "a frame cannot be decoded", "captured_s": captured_s, "before": before})


def before_picture(unit: bytes) -> str:
    """Give what an H.264 access unit with start codes holds before its first slice, SEI messages among it, as hex."""
    start = unit.find(b"\0\0\1")
    while start >= 0 and start + 3 < len(unit) and not 1 <= unit[start + 3] & 0x1F <= 5:
        start = unit.find(b"\0\0\1", start + 3)
    return unit[: max(start, 0)][:MOST_BEFORE_BYTES].hex()


def reason_of(domain: str, code: int) -> str:
    """Map GStreamer's error to the line's reason code (gst/gsterror.h)."""
    resource = {3: "not_found", 5: "unreachable", 7: "unreachable", 15: "auth_failed"}
    stream = dict.fromkeys((3, 4, 5, 6), "codec_unsupported")
    return {"gst-resource-error-quark": resource, "gst-stream-error-quark": stream}.get(domain, {}).get(code, "lost")


def _write(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def main(descriptor: int) -> None:
    """Serve orders until the line closes the socket or is gone; in between, all work is in threads."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the line, which drains and then closes the socket
    graph: Any = None
    with socket.socket(fileno=descriptor) as control:
        while (received := socket.recv_fds(control, 1 << 20, 1))[0]:
            packet, descriptors = received[:2]
            order = json.loads(packet)
            if "start" in order:
                graph = _hardware_graph(order["start"]) if order["start"] else SoftwareGraph()
            elif graph is not None and "open" in order:
                graph.open(order, Outlet(descriptors[0]))
            elif graph is not None:
                graph.close(order["close"])


def _hardware_graph(start: Header) -> Any:  # noqa: ANN401
    """Make DeepStream's graph. The process ends with it: the line opens its cameras anew, in another one."""
    graph = runpy.run_path(str(Path(__file__).with_name("graph_hardware.py")))["HardwareGraph"](start)

    def end() -> None:
        graph.wait()
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()
    return graph


if __name__ == "__main__":
    main(int(sys.argv[1]))
    os._exit(0)  # a graph that cannot be stopped must not keep the process
