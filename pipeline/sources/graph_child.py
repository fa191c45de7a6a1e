"""The child process that runs GStreamer graphs for `deepstream.py`, which starts it by its path and alone speaks to it.

It runs in the Python that has the bindings (Debian's for `gi`, the DeepStream image's for `pyservicemaker`), not the
line's: it imports the standard library, and the bindings for the graph it is asked for. It never retries or judges.

Orders come over a socket, one JSON object a packet: `{"start": ...}` once, `{"open": id, "url", "user", "password",
"graph"}` with the writing end of a pipe for that camera, `{"close": id}`. Into the pipe go messages: four bytes of
length (big endian), a JSON header, and `bytes` bytes of body. A header is a picture (`width height stride`), the
`fault` of one frame, `scores` with `shape` and the map in the body, or the last one: `lost` with `text`, or `ended`.
Frames have `captured_s`, on the monotonic clock that both processes share, and `before`: what preceded the picture in
its access unit, as hex, which may name its part.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import sys
import threading
import time
from collections import OrderedDict, deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

if TYPE_CHECKING:
    from pyservicemaker._pydeepstream import BatchMetadata, Buffer

MOST_BEFORE_BYTES = 4096
MOST_PICTURES = 4
"""Pictures of one camera that wait for the line; one more turns the oldest into a fault, never into silence."""
MOST_MESSAGES = 1000
_MOST_UNDECODED = 64
_REST_TIMEOUT_S = 5.0

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
                kept: Header = {key: header[key] for key in ("captured_s", "before")}
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
        pipeline.get_by_name("decoder").get_static_pad("sink").add_probe(self._gst.PadProbeType.BUFFER, self._note)

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


class HardwareGraph:
    """One DeepStream pipeline for all cameras, which come and go through its REST server on loopback.

    Built from `nodes` it gives pictures; read from a `config` file that has a network, scores and maps. Not run here:
    it needs DeepStream and a GPU.
    """

    def __init__(self, start: Header) -> None:
        from pyservicemaker import Pipeline, Probe, Receiver

        self._port = int(start["port"])
        self._outlets: dict[str, Outlet] = {}
        self._cameras: dict[int, str] = {}
        self._calls = ThreadPoolExecutor(1)  # REST calls, in order: a slow one must not hold up other cameras' orders
        # Kept, because the pipeline does not: the bindings hold on to the probe, not to the object behind it.
        self._reader: Any
        if "config" in start:
            self._reader, self._pipeline = self._operator(), Pipeline("cameras", start["config"])
            self._pipeline.attach("infer", Probe("scores", self._reader))
        else:
            self._reader, self._pipeline = self._retriever(), Pipeline("cameras")
            self._build(start["nodes"], start["mux"])
            self._pipeline.attach("pictures", Receiver("pictures", self._reader), tips="new-sample")
        self._pipeline.prepare(self._on_message)
        self._pipeline.activate()

    def _build(self, nodes: list[Header], mux: str) -> None:
        settings = os.memfd_create("mux")  # the mux wants a file's name; this one goes with the process
        _write(settings, mux.encode())
        for node in nodes:
            own = {"config-file-path": f"/proc/self/fd/{settings}"} if node["type"] == "nvmultiurisrcbin" else {}
            self._pipeline.add(node["type"], node["name"], {**node["properties"], **own})
        self._pipeline.link(*(node["name"] for node in nodes))

    def open(self, order: Header, outlet: Outlet) -> None:
        """Add the camera; DeepStream connects on its own, and one that never sends is the line's to notice."""
        self._outlets[order["open"]] = outlet
        self._calls.submit(self._add, order, outlet)

    def close(self, camera_id: str) -> None:
        """Close its outlet, and let the camera be removed."""
        if (outlet := self._outlets.pop(camera_id, None)) is not None:
            outlet.close({"ended": True})
            self._calls.submit(self._rest, "remove", camera_id, "")

    def deliver(self, source_id: int, header: Header, body: bytes) -> None:
        """Give a message to the camera that a source id stands for at this moment."""
        outlet = self._outlets.get(self._cameras.get(source_id, ""))
        if outlet is not None:
            outlet.put({**header, "captured_s": time.monotonic(), "before": ""}, body)

    def _add(self, order: Header, outlet: Outlet) -> None:
        if not self._rest("add", order["open"], _address(order)):
            outlet.close({"lost": "refused", "text": "DeepStream does not take the camera"})

    def _on_message(self, message: object) -> None:
        """Follow which source id is which camera; an id may be another camera's after a removal."""
        from pyservicemaker import DynamicSourceMessage

        if not isinstance(message, DynamicSourceMessage):
            return
        if message.source_added:
            self._cameras[message.source_id] = message.sensor_id
        else:
            self._cameras.pop(message.source_id, None)

    def _retriever(self) -> Any:  # noqa: ANN401 (its class exists only where the package does)
        from pyservicemaker import BufferRetriever

        graph = self

        class Pictures(BufferRetriever):
            def consume(self, buffer: Buffer) -> int:
                for frame in buffer.batch_meta.frame_items:
                    picture = to_host(buffer.extract(frame.batch_id))  # (height, width, 3), uint8, RGB
                    height, width = picture.shape[:2]
                    header = {"width": width, "height": height, "stride": width * 3}
                    graph.deliver(frame.source_id, header, picture.tobytes())
                return 1

        return Pictures()

    def _operator(self) -> Any:  # noqa: ANN401
        from pyservicemaker import BatchMetadataOperator

        graph = self

        class Scores(BatchMetadataOperator):
            def handle_metadata(self, batch_meta: BatchMetadata) -> None:
                for frame in batch_meta.frame_items:
                    header: Header = {"fault": "Triton gave no scores"}
                    body = b""
                    for item in frame.tensor_items:
                        layers = {name: to_host(layer) for name, layer in item.as_tensor_output().get_layers().items()}
                        header, body = scores_message(layers)
                    graph.deliver(frame.source_id, header, body)

        return Scores()

    def _rest(self, what: str, camera_id: str, url: str) -> bool:
        value = {"camera_id": camera_id, "camera_name": camera_id, "camera_url": url, "change": f"camera_{what}"}
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=_REST_TIMEOUT_S)
        try:
            body = json.dumps({"key": "sensor", "value": value})
            connection.request("POST", f"/api/v1/stream/{what}", body, {"Content-Type": "application/json"})
            return connection.getresponse().status == http.client.OK
        except OSError:
            return False
        finally:
            connection.close()


def to_host(tensor: Any) -> Any:  # noqa: ANN401 (a pyservicemaker.Tensor in, a NumPy array out)
    """Copy a tensor to the host's memory as a NumPy array."""
    if tensor.device_type == "CPU":
        import numpy as np

        return np.from_dlpack(tensor).copy()
    import cupy

    return cupy.asnumpy(cupy.from_dlpack(tensor))


def scores_message(layers: dict[str, Any]) -> tuple[Header, bytes]:
    """Pack the ensemble's outputs of one frame: every one-number tensor as a score, the map as float32 in the body."""
    scores = {name: float(values.reshape(-1)[0]) for name, values in layers.items() if values.size == 1}
    maps = [(name, values) for name, values in layers.items() if values.size > 1]
    if len(maps) != 1:
        return {"scores": scores}, b""
    name, values = maps[0]
    shape = [size for size in values.shape if size > 1]
    return {"scores": scores, "map": name, "shape": shape}, values.astype("<f4").tobytes()


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


def _address(order: Header) -> str:
    who = f"{quote(order['user'], safe='')}:{quote(order['password'], safe='')}@" if order["user"] else ""
    return str(order["url"]).replace("://", "://" + who, 1)


def _write(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def main(descriptor: int) -> None:
    """Serve orders until the line closes the socket or is gone; in between, all work is in threads."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the line, which drains and then closes the socket
    graph: SoftwareGraph | HardwareGraph | None = None
    with socket.socket(fileno=descriptor) as control:
        while (received := socket.recv_fds(control, 1 << 20, 1))[0]:
            packet, descriptors = received[:2]
            order = json.loads(packet)
            if "start" in order:
                graph = HardwareGraph(order["start"]) if order["start"] else SoftwareGraph()
            elif graph is not None and "open" in order:
                graph.open(order, Outlet(descriptors[0]))
            elif graph is not None:
                graph.close(order["close"])


if __name__ == "__main__":
    main(int(sys.argv[1]))
    os._exit(0)  # a graph that cannot be stopped must not keep the process
