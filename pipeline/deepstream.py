"""The all-GPU alternative, for lines of many RTSP cameras on one GPU: decode, scale and ask Triton inside DeepStream.

`render` writes what such a line needs from its line file and manifests: one graph a product, so that one that stops
takes no other with it. `read_inference` takes the scores and maps that the graph's probe hands over (in
`sources/graph_child.py`) and gives what Triton's own client would give, so that `verdict.decide` judges both. Nothing
here has met a GPU: files are parsed by tests, the probe is type-checked. Called by the command line.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from pipeline.cameras import RtspCamera
from pipeline.config import LineConfig
from pipeline.errors import ConfigError
from pipeline.manifest import Manifest, read_manifest
from pipeline.networks import refusals
from pipeline.sources.deepstream import MUX, GraphFrameError, GraphPipe, Node, multi_source
from pipeline.tensors import INPUT, OUTPUTS
from pipeline.types import Cause, Frame, Inference, Model, Scores

FIRST_PORT = 9000
"""REST port of the first product's graph, on loopback; each further product takes the next one."""
_AREA_FILTER = 3
"""NvBufSurfTransformInter_Algo2, super-sampling on a GPU: the nearest to the area filter of training, and not the same.
Thresholds are to be calibrated on pictures that came this way."""
_FLOAT_BYTES = 4


def write(config: LineConfig, out: Path, root: Path) -> list[Path]:
    """Write the files of `render` to a folder; gives their paths. Raises ConfigError."""
    paths = []
    manifests = {product: read_manifest(config.triton.models_repo, product) for product in config.products}
    for name, text in render(config, manifests, root).items():
        path = out / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--out {path}: {error.strerror}", hint="name a folder that can be written") from None
        paths.append(path)
    return paths


def render(config: LineConfig, manifests: Mapping[str, Manifest], root: Path) -> dict[Path, str]:
    """Give the files of the line's graphs, as paths below the folder that DeepStream will find at `root`.

    Raises ConfigError for a camera that DeepStream does not read, by its name.
    """
    files: dict[Path, str] = {}
    for index, product in enumerate(config.products):
        cameras = _rtsp_cameras(config, product)
        folder = Path(product)
        nodes = graph(config, root / folder, port=FIRST_PORT + index, most_cameras=len(cameras))
        files[folder / "pipeline.yaml"] = pipeline_yaml(nodes)
        files[folder / "nvinferserver.pbtxt"] = inference_text(config, manifests[product])
        files[folder / "mux.txt"] = MUX
        files[folder / "cameras.json"] = json.dumps([_listed(camera) for camera in cameras], indent=1) + "\n"
    return files


def graph(config: LineConfig, folder: Path, *, port: int, most_cameras: int) -> list[Node]:
    """Describe a product's graph: cameras, the ensemble on Triton, and a sink for frames that have been judged."""
    cameras = multi_source(port, most_cameras)
    cameras["properties"]["config-file-path"] = str(folder / "mux.txt")
    settings = {"config-file-path": str(folder / "nvinferserver.pbtxt"), "batch-size": config.batching.max_size}
    # A sink that waits for its first buffer (`async`) keeps a graph without cameras from ever playing.
    return [
        cameras,
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
      grpc {{ url: "{config.triton.address}" enable_cuda_buffer_sharing: false }}
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


def read_inference(pipe: GraphPipe, frame_at: Callable[[float], Frame], manifest: Manifest) -> Inference | None:
    """Wait for a camera's next scores; None at its end. Raises SourceError when it is lost.

    `frame_at(captured_s)` makes the frame, which has no picture here. What the graph could not judge has a cause.
    """
    try:
        message = pipe.next()
    except GraphFrameError as error:
        return Inference(frame_at(error.captured_s), cause=Cause.TRITON_UNAVAILABLE)
    if message is None:
        return None
    header, body = message
    frame = frame_at(header["captured_s"])
    scores = header.get("scores", {})
    shape = tuple(header.get("shape", ()))
    expected = header.get("map") == OUTPUTS[3] and shape == manifest.map_shape and set(scores) == set(OUTPUTS[:3])
    if not expected or len(body) != _FLOAT_BYTES * int(np.prod(shape)):
        return Inference(frame, cause=Cause.MODEL_MISMATCH)
    return Inference(
        frame,
        scores=Scores(*(float(scores[name]) for name in OUTPUTS[:3])),
        anomaly_map=np.frombuffer(body, "<f4").reshape(shape).astype(np.float32),
        model=Model(manifest.product, str(manifest.version), manifest.model_sha256),
    )


def _rtsp_cameras(config: LineConfig, product: str) -> list[RtspCamera]:
    cameras = []
    for camera in config.cameras:
        if camera.product != product:
            continue
        if not isinstance(camera, RtspCamera):
            raise ConfigError(
                f"camera {camera.id!r} is of type {camera.type}: DeepStream reads RTSP cameras here",
                hint="leave it to `logicrd run`, in a line file of its own",
            )
        if said := refusals([camera], config.camera_networks):
            raise ConfigError(said[0])
        cameras.append(camera)
    return cameras


def _listed(camera: RtspCamera) -> dict[str, Any]:
    """Give what is needed to add a camera at run time; its password stays in its file."""
    secret = None if camera.password_file is None else str(camera.password_file)
    return {"id": camera.id, "url": camera.url, "user": camera.user, "password_file": secret}
