"""Stands in for DeepStream, which is nowhere here: a `pyservicemaker` of our own under the line's real graph process.

Run by its path in place of `graph_child.py`, which it then runs. It takes the graph's files as DeepStream is meant to,
plays each camera's folder of PNG files (`rtsp://127.0.0.1/<folder>`) over and over, scales them as training does, and
asks the Triton that `nvinferserver.pbtxt` names. As there, a request that fails lets its frame pass without tensors and
ends the pipeline. It proves that our code takes what comes, not that DeepStream behaves so.
"""

from __future__ import annotations

import json
import re
import runpy
import sys
import threading
import time
import types
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import cv2
import numpy as np
import yaml
from tritonclient.grpc import InferenceServerClient, InferInput
from tritonclient.utils import InferenceServerException

CHILD = Path(__file__).parents[1] / "pipeline/sources/graph_child.py"
RATE = 5.0


class Tensor:
    """A tensor in the host's memory."""

    device_type = "CPU"

    def __init__(self, values: Any) -> None:
        self._values = np.array(values, copy=True)

    def __dlpack__(self, stream: int | None = None) -> Any:
        del stream
        return self._values.__dlpack__()

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0


class Network:
    """The ensemble, asked as nvinferserver's settings say."""

    def __init__(self, settings: str) -> None:
        said = dict(re.findall(r"(model_name|version|url): \"?([^\"\s]+)\"?", settings))
        self._model, self._version = said["model_name"], said["version"]
        self._outputs = re.findall(r'outputs \{ name: "(\w+)" \}', settings)
        self._client = InferenceServerClient(said["url"])

    def tensors(self, image: Any) -> dict[str, Tensor]:
        """Ask for one RGB picture; nothing when that fails."""
        try:
            shape = self._client.get_model_metadata(self._model, self._version, as_json=True)["inputs"][0]["shape"]
            height, width = (int(size) for size in shape[1:3])
            scaled = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)[None]
            picture = InferInput("image", list(scaled.shape), "UINT8")
            picture.set_data_from_numpy(scaled)
            answer = self._client.infer(self._model, [picture], self._version)
        except InferenceServerException:
            return {}
        return {name: Tensor(answer.as_numpy(name)[0]) for name in self._outputs}


class DynamicSource:
    """The message that a camera has come or gone."""

    def __init__(self, added: bool, source_id: int, sensor_id: str) -> None:
        self.source_added, self.source_id, self.sensor_id = added, source_id, sensor_id


class Pipeline:
    """A graph that was read from its file."""

    def __init__(self, name: str, config_file: str) -> None:
        del name
        graph = yaml.safe_load(Path(config_file).read_text())["deepstream"]
        nodes = {node["name"]: node["properties"] for node in graph["nodes"]}
        self._network = Network(Path(nodes["infer"]["config-file-path"]).read_text())
        self._port = int(nodes["cameras"]["port"])
        self._probes: dict[str, Any] = {}
        self._playing: dict[str, threading.Event] = {}
        self._count = 0
        self._ended = threading.Event()

    def attach(self, target: str, handler: Any) -> None:
        self._probes[target] = handler

    def prepare(self, on_message: Callable[[Any], None]) -> None:
        self._tell = on_message

    def activate(self) -> None:
        pipeline = self

        class Rest(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                value = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["value"]
                pipeline.change(value)
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", self._port), Rest)
        threading.Thread(target=server.serve_forever, daemon=True).start()

    def wait(self) -> None:
        self._ended.wait()

    def change(self, value: dict[str, str]) -> None:
        """Add or remove a camera."""
        name = value["camera_id"]
        if value["change"] == "camera_remove":
            self._playing.pop(name).set()
            return
        gone, source_id = threading.Event(), self._count
        self._playing[name], self._count = gone, self._count + 1
        folder = Path(urlsplit(value["camera_url"]).path)
        threading.Thread(target=self._play, args=(name, source_id, folder, gone), daemon=True).start()

    def _play(self, name: str, source_id: int, folder: Path, gone: threading.Event) -> None:
        self._tell(DynamicSource(True, source_id, name))
        pictures, number, due_s = sorted(folder.glob("*.png")), 0, time.monotonic()
        while pictures and not gone.wait(max(0.0, due_s - time.monotonic())):
            image = cv2.imread(str(pictures[number % len(pictures)]))[..., ::-1]
            size = {"source_height": image.shape[0], "source_width": image.shape[1]}
            frame = {"source_id": source_id, "frame_number": number}
            self._pass("arrivals", SimpleNamespace(**frame, **size))
            tensors = self._network.tensors(image)
            output = SimpleNamespace(as_tensor_output=lambda found=tensors: SimpleNamespace(get_layers=lambda: found))
            self._pass("infer", SimpleNamespace(**frame, tensor_items=iter([output] if tensors else [])))
            if not tensors:
                self._ended.set()
                return
            number, due_s = number + 1, max(due_s + 1 / RATE, time.monotonic())
        self._tell(DynamicSource(False, source_id, name))

    def _pass(self, where: str, frame: Any) -> None:
        self._probes[where].handle_metadata(SimpleNamespace(frame_items=iter([frame])))


def main() -> None:
    """Put the package in its place, and be the graph's process."""
    package: Any = types.ModuleType("pyservicemaker")
    package.Pipeline, package.DynamicSourceMessage = Pipeline, DynamicSource
    package.BatchMetadataOperator = object
    package.Probe = package.Receiver = lambda _, handler: handler
    sys.modules["pyservicemaker"] = package
    runpy.run_path(str(CHILD), run_name="__main__")


if __name__ == "__main__":
    main()
