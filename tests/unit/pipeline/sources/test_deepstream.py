"""The parts of the graph adapter that need no GStreamer, and DeepStream's side against stand-ins for its package.

No machine of this project has DeepStream: what stands in for `pyservicemaker` here proves that frames, scores and
camera ids take the right way through our code, not that DeepStream behaves so.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pipeline.cameras import RtspCamera
from pipeline.deepstream import ScoredSource, _Graph
from pipeline.errors import SourceError
from pipeline.manifest import Manifest
from pipeline.sources.deepstream import GraphPipe, pictures_start, scores_start
from pipeline.sources.graph_child import MOST_PICTURES, Outlet, before_picture
from pipeline.sources.graph_hardware import HardwareGraph, to_host
from pipeline.sources.sei import PART_ID_UUID, part_id_in
from pipeline.types import Cause

SLICE = b"\0\0\0\1\x65" + bytes(range(1, 60))
PARAMETERS = b"\0\0\0\1\x67\x42\0\x1e" + b"\0\0\0\1\x68\xce\x3c\x80"
UUID = PART_ID_UUID.bytes


def sei(*messages: bytes) -> bytes:
    """Give unregistered SEI messages as one NAL unit, with emulation prevention."""
    body = b"\x06"
    for message in messages:
        body += b"\x05" + b"\xff" * (len(message) // 255) + bytes([len(message) % 255]) + message
    escaped, zeros = bytearray(), 0
    for byte in body + b"\x80":
        if zeros >= 2 and byte <= 3:
            escaped.append(3)
            zeros = 0
        escaped.append(byte)
        zeros = zeros + 1 if byte == 0 else 0
    return b"\0\0\0\1" + bytes(escaped)


@pytest.mark.parametrize(
    ("unit", "part_id"),
    [
        (PARAMETERS + sei(UUID + "Gehäuse-7".encode()) + SLICE, "Gehäuse-7"),
        (sei(UUID + b"p-1\0") + SLICE, "p-1"),
        (sei(UUID + b"\0\0\1x") + SLICE, None),
        (sei(UUID + b"a\0\0\0\0b") + SLICE, None),
        (sei(UUID) + SLICE, None),
        (sei(UUID + b"two\nlines") + SLICE, None),
        (sei(UUID + b"x" * 128) + SLICE, "x" * 128),
        (sei(UUID + b"x" * 129) + SLICE, None),
        (sei(UUID + b"p\xff\xfe") + SLICE, None),
        (sei(bytes(16) + b"somebody else's") + SLICE, None),
        (sei(bytes(300)) + sei(bytes(16), UUID + b"p-2") + SLICE, "p-2"),
        (SLICE + sei(UUID + b"of the next picture"), None),
        (b"\0\0\0\1\x06\x05\xff", None),
        (SLICE, None),
        (b"", None),
    ],
)
def test_the_part_id_is_that_of_the_stream_reader(unit: bytes, part_id: str | None) -> None:
    """Messages are found by their UUID and refused by the same rules as in `stream.py`; those after a slice are not."""
    assert part_id_in(bytes.fromhex(before_picture(unit))) == part_id


class HostTensor:
    """A tensor in the host's memory, which claims to be CUDA's as DeepStream 9.1 does."""

    device_type = "CPU"

    def __init__(self, values: Any) -> None:
        self._values = np.ascontiguousarray(values)

    def __dlpack__(self, stream: int | None = None) -> Any:
        del stream
        return self._values.__dlpack__()

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0


def test_a_host_tensor_is_copied_whatever_device_it_claims() -> None:
    """The bindings name CUDA for every tensor; `device_type` says where it is."""
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert np.array_equal(to_host(HostTensor(values)), values)


class DynamicSource:
    def __init__(self, added: bool, source_id: int, sensor_id: str) -> None:
        self.source_added, self.source_id, self.sensor_id = added, source_id, sensor_id


class FakePipeline:
    """Keeps what is asked of it."""

    last: FakePipeline

    def __init__(self, name: str, config_file: str | None = None) -> None:
        del name
        self.config, self.nodes, self.attached = config_file, [], {}
        FakePipeline.last = self

    def add(self, kind: str, name: str, properties: dict[str, Any]) -> None:
        self.nodes.append((kind, name, properties))

    def link(self, *names: str) -> None:
        self.linked = names

    def attach(self, target: str, what: Any, tips: str = "") -> None:
        self.attached[target] = (what, tips)

    def prepare(self, on_message: Callable[[Any], None]) -> None:
        self.tell = on_message

    def activate(self) -> None:
        self.active = True


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for pyservicemaker."""
    fake = types.ModuleType("pyservicemaker")
    fake.Pipeline, fake.DynamicSourceMessage = FakePipeline, DynamicSource
    fake.BufferRetriever = fake.BatchMetadataOperator = object
    fake.Receiver = fake.Probe = lambda _, handler: handler
    monkeypatch.setitem(sys.modules, "pyservicemaker", fake)


@pytest.fixture
def rest() -> Iterator[SimpleNamespace]:
    """The REST server of nvmultiurisrcbin, as far as it is spoken to."""
    calls: queue.Queue[tuple[str, Any]] = queue.Queue()
    state = SimpleNamespace(calls=calls, status=200)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            calls.put((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
            self.send_response(state.status)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        state.port = server.server_port
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield state
        server.shutdown()


class PipeOnly:
    """A host whose child is the test: gives one end of a pipe."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.reader, False)

    def open(self, camera_id: str, order: Any) -> int:
        del camera_id, order
        return self.reader

    def heard(self) -> None:
        pass

    def close(self, camera_id: str, reader: int, silent_s: float | None) -> None:
        del camera_id, silent_s
        os.close(reader)


CAMERA = RtspCamera(id="c1", type="rtsp", url="rtsp://10.0.0.7/s", product="tray", read_timeout_s=1.0)
ORDER = {"open": "c1", "url": "rtsp://10.0.0.7/s", "user": "eve", "password": "p@ss"}


@pytest.mark.usefixtures("package")
def test_deepstream_pictures_reach_the_camera_they_are_of(rest: SimpleNamespace) -> None:
    """Batch entries go by source id to the camera that holds it at this moment, and to none after its removal."""
    graph = HardwareGraph(pictures_start(rest.port))
    pipeline = FakePipeline.last
    assert pipeline.linked == ("cameras", "converter", "rgb", "pictures")
    host = PipeOnly()
    with GraphPipe(CAMERA, host) as pipe:
        graph.open(ORDER, Outlet(host.writer))
        path, body = rest.calls.get(timeout=5)
        assert (path, body["value"]["change"]) == ("/api/v1/stream/add", "camera_add")
        assert body["value"]["camera_url"] == "rtsp://eve:p%40ss@10.0.0.7/s"
        retriever, tips = pipeline.attached["pictures"]
        assert tips == "new-sample"
        picture = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
        frames = [SimpleNamespace(source_id=4, batch_id=0), SimpleNamespace(source_id=7, batch_id=1)]
        buffer = SimpleNamespace(
            batch_meta=SimpleNamespace(frame_items=iter(frames)), extract=lambda at: HostTensor(picture + 100 * at)
        )
        pipeline.tell(DynamicSource(True, 4, "another"))
        pipeline.tell(DynamicSource(True, 7, "c1"))
        assert retriever.consume(buffer) == 1
        header, body = pipe.next()
        assert (header["width"], header["height"], header["stride"]) == (3, 2, 9)
        assert bytes(body) == (picture + 100).tobytes()
        pipeline.tell(DynamicSource(False, 7, "c1"))
        graph.deliver(7, {"width": 1, "height": 1, "stride": 3}, b"abc")
        graph.close("c1")
        assert pipe.next() is None
        assert rest.calls.get(timeout=5)[1]["value"]["change"] == "camera_remove"


@pytest.mark.usefixtures("package")
def test_a_camera_that_deepstream_refuses_is_lost_with_a_reason(rest: SimpleNamespace) -> None:
    """A refusal of its REST server comes back as the camera's loss, and other cameras are not touched."""
    rest.status = 400
    host = PipeOnly()
    with GraphPipe(CAMERA, host) as pipe:
        HardwareGraph(pictures_start(rest.port)).open(ORDER, Outlet(host.writer))
        with pytest.raises(SourceError) as caught:
            pipe.next()
    assert caught.value.reason == "refused"


class Graph:
    """A graph that scores, as its process holds it, and the source that reads its only camera."""

    def __init__(self, port: int, config: Any, manifest: Manifest) -> None:
        self._graph = HardwareGraph(scores_start(config, port))
        self.pipeline = FakePipeline.last
        self.host = PipeOnly()
        self.manifests = {manifest.product: manifest}
        self.source = ScoredSource(CAMERA, _Graph(manifest, self.host), self.manifests)

    def __enter__(self) -> Graph:
        self.source.__enter__()
        self._graph.open(ORDER, Outlet(self.host.writer))
        self.pipeline.tell(DynamicSource(True, 0, "c1"))
        return self

    def __exit__(self, *_: object) -> None:
        self._graph.close("c1")
        self.source.__exit__(None, None, None)

    def go_in(self, number: int, size: tuple[int, int] = (640, 480)) -> None:
        self._probe("arrivals", frame_number=number, source_width=size[0], source_height=size[1])

    def come_out(self, number: int, layers: dict[str, Any] | None) -> None:
        tensors = {name: HostTensor(value) for name, value in (layers or {}).items()}
        output = SimpleNamespace(get_layers=lambda: tensors)
        items = [] if layers is None else [SimpleNamespace(as_tensor_output=lambda: output)]
        self._probe("infer", frame_number=number, tensor_items=iter(items))

    def _probe(self, where: str, **fields: Any) -> None:
        probe, _ = self.pipeline.attached[where]
        probe.handle_metadata(SimpleNamespace(frame_items=iter([SimpleNamespace(source_id=0, **fields)])))


@pytest.fixture
def graph(
    package: None,  # noqa: ARG001 (it must be there)
    rest: SimpleNamespace,
    make_manifest: Callable[..., Manifest],
    tmp_path: Any,
) -> Iterator[Graph]:
    """A running graph of product `tray`."""
    with Graph(rest.port, tmp_path / "pipeline.yaml", make_manifest()) as running:
        assert running.pipeline.config == str(tmp_path / "pipeline.yaml")
        yield running


def layers(manifest: Manifest, **changes: Any) -> dict[str, Any]:
    """Give the ensemble's outputs of one frame, as nvinferserver does: without the batch."""
    anomaly_map = np.linspace(0, 9, int(np.prod(manifest.map_shape)), dtype=np.float32).reshape(manifest.map_shape)
    numbers = {"score": 3.5, "map_score": 2.0, "mahalanobis": 11.0}
    return {name: np.float32([value]) for name, value in numbers.items()} | {"anomaly_map": anomaly_map} | changes


def test_a_frame_is_seen_when_it_goes_in_and_scored_when_it_comes_out(
    graph: Graph, make_manifest: Callable[..., Manifest]
) -> None:
    """The two probes name a frame by its number; each tells its own time, scores and map are the tensors' numbers."""
    manifest, before_s = make_manifest(), time.monotonic()
    graph.go_in(7, (1920, 1080))
    graph.come_out(7, layers(manifest, score=np.float32([float("nan")])))
    seen, scored = graph.source.read(), graph.source.read()
    assert (seen.number, seen.size) == (7, (1920, 1080))
    assert before_s <= seen.captured_s <= scored.received_s <= time.monotonic()
    assert (scored.number, scored.cause) == (7, None)
    assert np.isnan(scored.scores.fused)
    assert (scored.scores.map, scored.scores.mahalanobis) == (2.0, 11.0)
    assert np.array_equal(scored.anomaly_map, layers(manifest)["anomaly_map"])
    assert (scored.model.version, scored.model.sha256) == (str(manifest.version), manifest.model_sha256)


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"anomaly_map": np.zeros((3, 5), np.float32)}, Cause.MODEL_MISMATCH),
        ({"other": np.float32([1.0])}, Cause.MODEL_MISMATCH),
        (None, Cause.TRITON_UNAVAILABLE),
    ],
)
def test_what_the_network_did_not_judge_has_a_cause(
    graph: Graph, make_manifest: Callable[..., Manifest], changes: Any, cause: Cause
) -> None:
    """Other tensors than the manifest's, or none at all, are an answer with a cause and without scores."""
    graph.come_out(1, None if changes is None else layers(make_manifest(), **changes))
    scored = graph.source.read()
    assert (scored.number, scored.cause, scored.scores) == (1, cause, None)


def test_answers_that_find_no_room_are_told_by_their_numbers(
    graph: Graph, make_manifest: Callable[..., Manifest]
) -> None:
    """A line that reads too slowly gets a cause for each map that had to give way, and the others' scores."""
    count = MOST_PICTURES + 300  # what the pipe itself takes, and more
    for number in range(count):
        graph.come_out(number, layers(make_manifest()))
    answers = [graph.source.read() for _ in range(count)]
    assert [answer.number for answer in answers] == list(range(count))
    assert {answer.cause for answer in answers} == {None, Cause.QUEUE_FULL}


def test_another_version_in_force_ends_the_graph(graph: Graph, make_manifest: Callable[..., Manifest]) -> None:
    """A graph asks for one version: its cameras are lost with a reason, and opened anew by a graph of the new one."""
    graph.manifests["tray"] = make_manifest(version=2, model_sha256="cd" * 32)
    with pytest.raises(SourceError) as caught:
        graph.source.read()
    assert (caught.value.reason, caught.value.final) == ("new_version", False)
