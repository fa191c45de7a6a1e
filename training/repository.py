"""The Triton model repository of a product: its config.pbtxt files, its manifest, and how a new version gets in.

Configs are ModelConfig protobufs written as text, so that no key can be misspelt. A version is laid out whole in a
folder beside the repository and moved in by renames; if one fails, the others are undone. Called by `export`.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from google.protobuf import text_format
from pydantic import BaseModel, ConfigDict
from tritonclient.grpc import model_config_pb2 as pb

from training.calibrate import Calibration
from training.config import NetworkConfig
from training.errors import ConfigError
from training.metrics import AurocIntervals, ImageAuroc, TestImages
from training.region import RegionOfInterest
from training.stages import Wiring

CPU_BATCH, GPU_BATCH = 8, 32
# Requests that an ensemble may hold before Triton refuses more: the line stops earlier, this guards the server. No
# step's queue is bounded, in number or time: with any such bound Triton's batcher sleeps on for half a second where a
# request comes just before the instance is ready again; that befell 1 request in 500 at every step. A call whose caller
# gave up still costs the step that it waits for, and no later one.
MAX_QUEUE = 64
# How long a step waits for company. On a GPU half a millisecond fills batches; on CPU the line's own batches come full.
GPU_QUEUE_DELAY_US = 500
ENSEMBLE_OUTPUTS = ("score", "map_score", "mahalanobis", "anomaly_map")
# ModelEnsembling.max_inflight_requests: a server that does not know the field refuses the config, so it is written only
# for servers at least as new as the schema this project pins.
INFLIGHT_SINCE = (2, 73)
Shapes = dict[str, tuple[int, ...]]


class Target(StrEnum):
    """Where the repository will be served."""

    CPU = "cpu"
    GPU = "gpu"


class TeacherEntry(BaseModel):
    """Which teacher the product is served with; `model` is its name in the repository."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    arch: str
    model: str
    sha256: str


class InputEntry(BaseModel):
    """The picture the ensemble takes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    height: int
    width: int
    dtype: str = "uint8"
    layout: str = "HWC"
    colour: str = "RGB"


class MetricsEntry(BaseModel):
    """The image-level test report, of the fused score; kinds that the test split lacks are null, as are intervals
    that an older bundle does not have."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    image_auroc: ImageAuroc
    test_images: TestImages
    intervals: AurocIntervals | None = None


class Manifest(BaseModel):
    """manifest.json beside an ensemble: what the line must know of the product, and proof of which files it means."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int = 1
    product: str
    method: str
    network: NetworkConfig
    version: int
    created: str
    input: InputEntry
    preprocessing: str
    region: RegionOfInterest | None = None
    teacher: TeacherEntry
    data_sha256: str
    git_revision: str
    map_shape: tuple[int, int]
    metrics: MetricsEntry | None
    calibration: Calibration
    model_sha256: str
    files: dict[str, str]


@dataclass(frozen=True, slots=True)
class Serving:
    """How configs are rendered."""

    target: Target = Target.CPU
    server_version: tuple[int, int] = (2, 51)

    @property
    def max_batch(self) -> int:
        """Largest batch of every model."""
        return CPU_BATCH if self.target is Target.CPU else GPU_BATCH


def parse_server_version(text: str) -> tuple[int, int]:
    """'2.51' or '2.51.0' to (2, 51); raises ConfigError."""
    parts = text.split(".")
    if len(parts) not in (2, 3) or not all(part.isdecimal() for part in parts):
        raise ConfigError(f"server version '{text}': write it as Triton prints it, e.g. 2.51.0")
    return int(parts[0]), int(parts[1])


def stage_config(
    name: str, tensors: tuple[tuple[str, ...], tuple[str, ...]], shapes: Shapes, serving: Serving
) -> pb.ModelConfig:
    """Config of an ONNX step; `tensors` are the names of its inputs and outputs, `shapes` theirs without batch."""
    config = _step_config(name, "onnxruntime", *tensors, shapes, serving)
    if serving.target is Target.GPU:
        config.instance_group.add(kind=pb.ModelInstanceGroup.KIND_GPU, count=1)
        accelerator = config.optimization.execution_accelerators.gpu_execution_accelerator.add(name="tensorrt")
        accelerator.parameters.update({"precision_mode": "FP16", "trt_engine_cache_enable": "true"})
        for batch in (1, serving.max_batch):
            _add_warm_up(config, batch)
    else:
        config.instance_group.add(kind=pb.ModelInstanceGroup.KIND_CPU, count=1)
    return config


def mahalanobis_config(name: str, shapes: Shapes, serving: Serving) -> pb.ModelConfig:
    """Config of the distance step, on CPU wherever the rest runs."""
    inputs, outputs = ("descriptor", "map_score"), ("mahalanobis", "score")
    config = _step_config(name, "python", inputs, outputs, shapes, serving)
    config.instance_group.add(kind=pb.ModelInstanceGroup.KIND_CPU, count=1)
    return config


def ensemble_config(product: str, teacher: str, wiring: Wiring, shapes: Shapes, serving: Serving) -> pb.ModelConfig:
    """Config that joins the five steps; tensors keep one name from the step that makes them to those that take them."""
    config = pb.ModelConfig(name=product, platform="ensemble", max_batch_size=serving.max_batch)
    _add_tensors(config, ("image",), ENSEMBLE_OUTPUTS, shapes)
    steps = [(teacher, *wiring["teacher"])]
    steps += [(f"{product}.{stage}", *wiring[stage]) for stage in ("bottleneck", "student", "map")]
    steps.append((f"{product}.mahalanobis", ("descriptor", "map_score"), ("mahalanobis", "score")))
    for model, inputs, outputs in steps:
        step = config.ensemble_scheduling.step.add(model_name=model, model_version=-1)
        step.input_map.update({name: name for name in inputs})
        step.output_map.update({name: name for name in outputs})
    if serving.server_version >= INFLIGHT_SINCE:
        config.ensemble_scheduling.max_inflight_requests = MAX_QUEUE
    return config


def config_text(config: pb.ModelConfig) -> str:
    """The protobuf as config.pbtxt, with a line that says where it comes from."""
    return "# Written by `logicrd-train export`.\n" + str(text_format.MessageToString(config))


def next_version(repository: Path, models: list[str]) -> int:
    """One above the highest version folder of any of the models."""
    found = [int(p.name) for m in models for p in (repository / m).glob("[0-9]*") if p.name.isdecimal()]
    return max(found, default=0) + 1


def sha256_of(path: Path) -> str:
    """Hash of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def is_weights(path: str) -> bool:
    """Whether a file of a model decides its scores; configs do not, operators may tune them."""
    return path.endswith((".onnx", ".npz", ".py"))


def model_sha256(files: dict[str, str]) -> str:
    """Hash of the canonical JSON of {path: sha256} of the weight files alone: the identity of a model."""
    weights = {path: digest for path, digest in files.items() if is_weights(path)}
    canonical = json.dumps(weights, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def move_in(staged: Path, repository: Path) -> None:
    """Moves every model of `staged` into `repository`: version folders, then configs, then manifests.

    A version folder that is already there (the shared teacher's) stays. If a move fails, all are undone.
    """
    repository.mkdir(parents=True, exist_ok=True)
    undo: list[Callable[[], object]] = []
    aside = staged / ".replaced"
    aside.mkdir()
    try:
        for path in _moves(staged):
            _move(path, repository / path.relative_to(staged), aside, undo)
    except BaseException:
        for step in reversed(undo):
            step()
        raise


def _moves(staged: Path) -> list[Path]:
    folders = sorted(p for p in staged.glob("*/[0-9]*") if p.is_dir())
    configs = sorted(staged.glob("*/config.pbtxt"))
    return [*folders, *configs, *sorted(staged.glob("*/manifest.json"))]


def _move(source: Path, destination: Path, aside: Path, undo: list[Callable[[], object]]) -> None:
    if not destination.parent.exists():
        destination.parent.mkdir()
        undo.append(lambda: shutil.rmtree(destination.parent))
    if destination.is_dir():
        return
    if destination.exists():
        kept = aside / f"{len(undo)}"
        shutil.copy2(destination, kept)
        source.replace(destination)
        undo.append(lambda: kept.replace(destination))
    else:
        source.replace(destination)
        undo.append(lambda: shutil.rmtree(destination) if destination.is_dir() else destination.unlink())


def _step_config(
    name: str, backend: str, inputs: tuple[str, ...], outputs: tuple[str, ...], shapes: Shapes, serving: Serving
) -> pb.ModelConfig:
    config = pb.ModelConfig(name=name, backend=backend, max_batch_size=serving.max_batch)
    _add_tensors(config, inputs, outputs, shapes)
    batching = config.dynamic_batching
    batching.max_queue_delay_microseconds = GPU_QUEUE_DELAY_US if serving.target is Target.GPU else 0
    return config


def _add_tensors(config: pb.ModelConfig, inputs: tuple[str, ...], outputs: tuple[str, ...], shapes: Shapes) -> None:
    for name in inputs:
        kind = pb.TYPE_UINT8 if name == "image" else pb.TYPE_FP32
        config.input.add(name=name, data_type=kind, dims=shapes[name])
    for name in outputs:
        config.output.add(name=name, data_type=pb.TYPE_FP32, dims=shapes[name])


def _add_warm_up(config: pb.ModelConfig, batch: int) -> None:
    warm_up = config.model_warmup.add(name=f"batch-{batch}", batch_size=batch, count=1)
    for tensor in config.input:
        warm_up.inputs[tensor.name].data_type = tensor.data_type
        warm_up.inputs[tensor.name].dims.extend(tensor.dims)
        warm_up.inputs[tensor.name].zero_data = True
