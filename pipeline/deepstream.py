"""The all-GPU alternative, for lines of many RTSP cameras on one GPU: decode, scale and ask Triton inside DeepStream.

One graph a product, made from the line file and the manifest, so that one that stops takes no other with it. A camera
with `inference: graph` is opened here in place of `sources`: its reader gets each frame when it goes into the network,
without the picture, and what Triton said when it comes out, so that all that follows is that of any other frame. Asks
and judges nothing itself. Nothing here has met a GPU: files are parsed by tests, what runs in the graph's process is
type-checked. Called by `readers`, and by the command that writes the graphs down.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from pipeline.cameras import Camera, RtspCamera, graph_cameras
from pipeline.config import LineConfig
from pipeline.errors import ConfigError, DependencyError, SourceError
from pipeline.manifest import Manifest, Manifests, read_manifest, with_models_region
from pipeline.networks import Networks, admitted, refusals
from pipeline.sources import Source, open_source
from pipeline.sources.deepstream import (
    MUX,
    PYTHON,
    GraphFrameError,
    GraphHost,
    GraphPipe,
    Node,
    free_port,
    multi_source,
    scores_start,
    wall_clock,
)
from pipeline.tensors import INPUT, OUTPUTS
from pipeline.types import Cause, Model, Scored, Scores, Seen

FIRST_PORT = 9000
"""REST port of the first product's graph as it is written down, on loopback; each further product takes the next one. A
line that runs takes any free ones."""
_AREA_FILTER = 3
"""NvBufSurfTransformInter_Algo2, super-sampling on a GPU: the nearest to the area filter of training, and not the same.
Thresholds are to be calibrated on pictures that came this way."""
_FLOAT_BYTES = 4
_PROBE = """
import ctypes
if error := ctypes.CDLL("libcuda.so.1").cuInit(0):
    raise SystemExit(f"the GPU's driver does not start (CUDA error {error})")
import cupy, pyservicemaker
"""
"""What the child process of a graph needs, in its own Python; the first that is missing is the last line it says."""
_PROBE_TIMEOUT_S = 60.0


def tried(cameras: Iterable[Camera]) -> list[str]:
    """Try whether this machine can run DeepStream, and say so; nothing where no camera asks for it.

    Blocks while its packages are loaded, a minute at most. Raises DependencyError.
    """
    wanting = [camera.id for camera in cameras if isinstance(camera, RtspCamera) and camera.decoder == "deepstream"]
    if not wanting:
        return []
    command = [str(PYTHON), "-I", "-c", _PROBE]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PROBE_TIMEOUT_S, check=False)
        why = "" if done.returncode == 0 else (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    except (OSError, subprocess.TimeoutExpired) as error:
        why = str(error)
    if why:
        raise DependencyError(
            f"DeepStream cannot be used on this machine, and camera {wanting[0]!r} asks for it: {why}",
            hint="run the worker in the image of deploy/deepstream, where the GPU and its driver are; or set "
            "`decoder: ffmpeg` (and no `inference: graph`)",
        )
    return ["DeepStream (pyservicemaker), CuPy and the GPU's driver"]


def doubts(products: Iterable[str]) -> Iterator[str]:
    """Say of each product that graphs score what its limits have to come from."""
    for product in products:
        yield (
            f"product {product!r} is scored by a graph, which scales pictures otherwise than training does: take its "
            f"limits from scores that came this way (`logicrd thresholds suggest {product} --reviewed`)"
        )


class Graphs:
    """The graphs of one line; each is a process that lives while one of its product's cameras is open.

    Safe from every thread. `manifests` says which version of a product a graph asks for when it starts.
    """

    def __init__(self, config: LineConfig, manifests: Manifests) -> None:
        self._config = config
        self._manifests = manifests
        self._lock = threading.Lock()
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._running: dict[str, _Graph] = {}

    def open(self, camera: Camera, networks: Networks = ()) -> Source:
        """Make the source of any camera, as `sources.open_source` does; one of a graph that scores is made here."""
        if not isinstance(camera, RtspCamera) or camera.inference != "graph":
            return open_source(camera, networks)
        camera = admitted(camera, networks)
        assert isinstance(camera, RtspCamera)  # noqa: S101 (its address alone may differ)
        try:
            with self._lock:
                graph = self._graph(self._manifests[camera.product])
        except OSError as error:
            raise SourceError(f"the graph's files cannot be written: {error}", reason="capture_died") from None
        return ScoredSource(camera, graph, self._manifests)

    def close(self) -> None:
        """Remove the graphs' files, once no camera is open any more."""
        with self._lock:
            if self._folder is not None:
                self._folder.cleanup()
            self._folder = None
            self._running.clear()

    def _graph(self, manifest: Manifest) -> _Graph:
        """Give the product's graph; another version has another one."""
        graph = self._running.get(manifest.product)
        if graph is None or graph.manifest.model_sha256 != manifest.model_sha256:
            if self._folder is None:
                self._folder = tempfile.TemporaryDirectory(prefix="logicrd-graphs-")
            folder = Path(self._folder.name) / f"{manifest.product}.v{manifest.version}"
            graph = _Graph(manifest, GraphHost(partial(self._start, manifest, folder)))
            self._running[manifest.product] = graph
        return graph

    def _start(self, manifest: Manifest, folder: Path) -> dict[str, Any]:
        port = free_port()
        _save(folder, files_of(self._config, manifest, folder, port))
        return scores_start(folder / "pipeline.yaml", port)


@dataclass(frozen=True, slots=True)
class _Graph:
    manifest: Manifest
    host: GraphHost


class ScoredSource(GraphPipe):
    """One camera of a graph that scores; see `Source` for the contract."""

    def __init__(self, camera: RtspCamera, graph: _Graph, manifests: Mapping[str, Manifest]) -> None:
        super().__init__(camera, graph.host)
        self._manifest = graph.manifest
        self._manifests = manifests

    def read(self) -> Seen | Scored | None:
        """Wait for the next frame that goes into the network, or comes out of it; None at the camera's own end.

        Raises SourceError when it is lost, or when another version of the product is in force: a graph has one.
        """
        current = self._manifests[self._manifest.product]
        if current.model_sha256 != self._manifest.model_sha256:
            text = f"the graph of version {self._manifest.version} ends: version {current.version} is in force"
            raise SourceError(text, reason="new_version")
        try:
            message = self.next()
        except GraphFrameError as error:  # its map found no room on its way here
            return Scored(-1 if error.number is None else error.number, error.captured_s, cause=Cause.QUEUE_FULL)
        if message is None:
            return None
        header, body = message
        if "scores" in header:
            return scored(header, body, self._manifest)
        captured_s = header["captured_s"]
        return Seen(header["frame"], (header["width"], header["height"]), wall_clock(captured_s), captured_s)


def scored(header: Mapping[str, Any], body: bytes | bytearray, manifest: Manifest) -> Scored:
    """Read what came out of the network for a frame, as the client reads an answer: any other tensors than the
    manifest's are a `model_mismatch`."""
    number, received_s, scores = header["frame"], header["captured_s"], header["scores"]
    if not scores:
        return Scored(number, received_s, cause=Cause.TRITON_UNAVAILABLE)
    shape = tuple(header.get("shape", ()))
    expected = header.get("map") == OUTPUTS[3] and shape == manifest.map_shape and set(scores) == set(OUTPUTS[:3])
    if not expected or len(body) != _FLOAT_BYTES * int(np.prod(shape)):
        return Scored(number, received_s, cause=Cause.MODEL_MISMATCH)
    return Scored(
        number,
        received_s,
        scores=Scores(*(float(scores[name]) for name in OUTPUTS[:3])),
        anomaly_map=np.frombuffer(body, "<f4").reshape(shape).astype(np.float32),
        model=Model(manifest.product, str(manifest.version), manifest.model_sha256),
    )


def render(config: LineConfig, manifests: Mapping[str, Manifest], root: Path) -> dict[Path, str]:
    """Give the files of the line's graphs, as paths below the folder that DeepStream will find at `root`.

    Raises ConfigError when no camera is of a graph, for one that lies outside of the line's networks, and for a product
    that sees a region.
    """
    files: dict[Path, str] = {}
    for index, product in enumerate(config.graph_products):
        cameras = _cameras(config, product)
        for camera in cameras:
            with_models_region(camera, manifests[product])  # raises for a product that sees a region
        if said := refusals(cameras, config.camera_networks):
            raise ConfigError(said[0])
        folder = Path(product)
        made = files_of(config, manifests[product], root / folder, FIRST_PORT + index)
        made[Path("cameras.json")] = json.dumps([_listed(camera) for camera in cameras], indent=1) + "\n"
        files |= {folder / name: text for name, text in made.items()}
    if not files:
        hint = "set `decoder: deepstream` and `inference: graph` on the cameras of a product"
        raise ConfigError("no camera of this line file is scored by a graph", hint=hint)
    return files


def write(config: LineConfig, out: Path, root: Path) -> list[Path]:
    """Write the files of `render` to a folder, which is made if need be; gives their paths. Raises ConfigError."""
    repository, signer = config.triton.models_repo, config.triton.signer_file
    manifests = {product: read_manifest(repository, product, signer) for product in config.graph_products}
    files = render(config, manifests, root)
    try:
        return _save(out, files)
    except OSError as error:
        raise ConfigError(
            f"--out {error.filename}: {error.strerror}", hint="name a folder that can be written"
        ) from None


def _save(folder: Path, files: Mapping[Path, str]) -> list[Path]:
    paths = [folder / name for name in files]
    for path, text in zip(paths, files.values(), strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return paths


def files_of(config: LineConfig, manifest: Manifest, folder: Path, port: int) -> dict[Path, str]:
    """Give the files of a product's graph, which DeepStream will find in `folder`."""
    nodes = graph(config, folder, port=port, most_cameras=len(_cameras(config, manifest.product)))
    return {
        Path("pipeline.yaml"): pipeline_yaml(nodes),
        Path("nvinferserver.pbtxt"): inference_text(config, manifest),
        Path("mux.txt"): MUX,
    }


def graph(config: LineConfig, folder: Path, *, port: int, most_cameras: int) -> list[Node]:
    """Describe a product's graph: cameras, the ensemble on Triton, and a sink for frames that have been judged.

    The element before the network does nothing: a probe at its output sees the frames that go in.
    """
    cameras = multi_source(port, most_cameras)
    cameras["properties"]["config-file-path"] = str(folder / "mux.txt")
    settings = {"config-file-path": str(folder / "nvinferserver.pbtxt"), "batch-size": config.batching.max_size}
    # A sink that waits for its first buffer (`async`) keeps a graph without cameras from ever playing.
    return [
        cameras,
        {"type": "identity", "name": "arrivals", "properties": {"silent": True}},
        {"type": "nvinferserver", "name": "infer", "properties": settings},
        {"type": "fakesink", "name": "end", "properties": {"sync": False, "async": False}},
    ]


def pipeline_yaml(nodes: list[Node]) -> str:
    """Write a graph as pyservicemaker reads it: nodes, and edges from each to the next."""
    names = [node["name"] for node in nodes]
    document = {"deepstream": {"nodes": nodes, "edges": dict(itertools.pairwise(names))}}
    return "# Written by `logicrd deepstream render`. Run with USE_NEW_NVSTREAMMUX=yes.\n" + yaml.safe_dump(
        document, sort_keys=False
    )


def inference_text(config: LineConfig, manifest: Manifest) -> str:
    """Write nvinferserver's settings (protobuf text, nvdsinferserver_plugin.proto of DeepStream 9.1) for a product.

    The picture goes to the ensemble as UINT8 RGB in NHWC, not scaled and not shifted: mean and deviation lie in the
    teacher's graph. The version is the manifest's, for its thresholds belong to that one. The address is one channel to
    one server, in clear, without a deadline: that is all that nvinferserver's client offers.
    """
    outputs = "\n".join(f'    outputs {{ name: "{name}" }}' for name in OUTPUTS)
    return f"""# Written by `logicrd deepstream render`.
infer_config {{
  unique_id: 1
  gpu_ids: [0]
  max_batch_size: {config.batching.max_size}
  backend {{
    inputs {{ name: "{INPUT}" data_type: TENSOR_DT_UINT8 }}
{outputs}
    triton {{
      model_name: "{manifest.product}"
      version: {manifest.version}
      grpc {{ url: "{config.triton.addresses[0]}" enable_cuda_buffer_sharing: false }}
    }}
    output_mem_type: MEMORY_TYPE_CPU
  }}
  preprocess {{
    network_format: IMAGE_FORMAT_RGB
    tensor_order: TENSOR_ORDER_NHWC
    tensor_name: "{INPUT}"
    maintain_aspect_ratio: 0
    frame_scaling_hw: FRAME_SCALING_HW_GPU
    frame_scaling_filter: {_AREA_FILTER}
    normalize {{ scale_factor: 1.0 }}
  }}
  postprocess {{ other {{}} }}
}}
input_control {{
  process_mode: PROCESS_MODE_FULL_FRAME
  operate_on_gie_id: -1
  interval: 0
}}
output_control {{ output_tensor_meta: true }}
"""


def _cameras(config: LineConfig, product: str) -> list[RtspCamera]:
    return [camera for camera in graph_cameras(config.cameras) if camera.product == product]


def _listed(camera: RtspCamera) -> dict[str, Any]:
    """Give what is needed to add a camera at run time; its password stays in its file."""
    secret = None if camera.password_file is None else str(camera.password_file)
    return {"id": camera.id, "url": camera.url, "user": camera.user, "password_file": secret}
