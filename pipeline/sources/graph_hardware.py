"""DeepStream's graph in the child process: `graph_child.py` runs this file by its path, in the image's own Python.

It imports the standard library, pyservicemaker and, for what lies in the GPU's memory, CuPy. Messages are those that
`graph_child.py` describes. Type-checked against a stub and tested with stand-ins: it has not been run.
"""

from __future__ import annotations

import http.client
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import quote

if TYPE_CHECKING:
    from collections.abc import Callable

    from pyservicemaker._pydeepstream import BatchMetadata, Buffer, FrameMetadata

_REST_TIMEOUT_S = 5.0

Header = dict[str, Any]


class Outlet(Protocol):
    """One camera's way to the line, which `graph_child.py` makes."""

    def put(self, header: Header, body: bytes = b"") -> None:
        """Queue a message; never blocks."""

    def close(self, last: Header) -> None:
        """Let what waits go out, then `last`, then close."""


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
        self._readers: dict[str, Any]
        if "config" in start:
            self._pipeline = Pipeline("cameras", start["config"])
            self._readers = {"arrivals": self._probe(size_of), "infer": self._probe(scores_of)}
            for name, reader in self._readers.items():
                self._pipeline.attach(name, Probe(name, reader))
        else:
            self._pipeline = Pipeline("cameras")
            self._build(start["nodes"], start["mux"])
            self._readers = {"pictures": self._retriever()}
            self._pipeline.attach("pictures", Receiver("pictures", self._readers["pictures"]), tips="new-sample")
        self._pipeline.prepare(self._on_message)
        self._pipeline.activate()

    def _build(self, nodes: list[Header], mux: str) -> None:
        settings = os.memfd_create("mux")  # the mux wants a file's name; this one goes with the process
        os.write(settings, mux.encode())
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

    def wait(self) -> None:
        """Wait for the pipeline's end, which is a fault: one failed request to Triton ends it."""
        self._pipeline.wait()

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

    def _probe(self, tell: Callable[[FrameMetadata], tuple[Header, bytes]]) -> Any:  # noqa: ANN401
        from pyservicemaker import BatchMetadataOperator

        graph = self

        class Told(BatchMetadataOperator):
            def handle_metadata(self, batch_meta: BatchMetadata) -> None:
                for frame in batch_meta.frame_items:
                    header, body = tell(frame)
                    graph.deliver(frame.source_id, {"frame": frame.frame_number, **header}, body)

        return Told()

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


def size_of(frame: FrameMetadata) -> tuple[Header, bytes]:
    """Tell of a frame that goes into the network."""
    return {"width": frame.source_width, "height": frame.source_height}, b""


def scores_of(frame: FrameMetadata) -> tuple[Header, bytes]:
    """Tell what the network said of a frame; no scores where its request failed: then it passes without tensors."""
    told: tuple[Header, bytes] = {"scores": {}}, b""
    for item in frame.tensor_items:
        told = scores_message({name: to_host(layer) for name, layer in item.as_tensor_output().get_layers().items()})
    return told


def scores_message(layers: dict[str, Any]) -> tuple[Header, bytes]:
    """Pack the ensemble's outputs of one frame: every one-number tensor as a score, the map as float32 in the body."""
    scores = {name: float(values.reshape(-1)[0]) for name, values in layers.items() if values.size == 1}
    maps = [(name, values) for name, values in layers.items() if values.size > 1]
    if len(maps) != 1:
        return {"scores": scores}, b""
    name, values = maps[0]
    shape = [size for size in values.shape if size > 1]
    return {"scores": scores, "map": name, "shape": shape}, values.astype("<f4").tobytes()


def _address(order: Header) -> str:
    who = f"{quote(order['user'], safe='')}:{quote(order['password'], safe='')}@" if order["user"] else ""
    return str(order["url"]).replace("://", "://" + who, 1)
