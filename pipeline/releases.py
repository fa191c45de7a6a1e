"""What a version of a product is, and what may become of it: the decisions behind `logicrd models`, without any I/O.

A version is the tree that `logicrd-train export` writes: an ensemble, the models of its steps under the same number, a
teacher that products share, and a manifest with the hash of every file. Versions stay apart by number: a promoted
ensemble names the number of each step, so that no answer mixes two of them. An ensemble has one configuration for all
its versions, and with it one set of steps: two versions of a product that are served at once are two ensembles, the
product's own and one that is named after its version. Called by `model_repository` and `promotion`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, TypeAlias

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from google.protobuf.message import DecodeError
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from tritonclient.grpc import model_config_pb2

from pipeline.errors import CheckError, first_fault
from pipeline.manifest import Manifest, Sha256, ensemble_of

ModelConfig: TypeAlias = Any  # a protobuf message of tritonclient, which has no types

MANIFEST = "manifest.json"
CONFIG = "config.pbtxt"
TEACHER_VERSION = 1
_FILE = re.compile(r"(?P<model>[a-z][a-z0-9._-]*)/((?P<version>[1-9][0-9]*)/)?(?P<name>[A-Za-z0-9_][A-Za-z0-9_.-]*)")
_PRODUCT = re.compile(r"[a-z][a-z0-9-]{0,39}")
_BACKENDS = frozenset({"onnxruntime", "python"})


class Teacher(BaseModel):
    """The teacher that a version is served with."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    model: Annotated[str, Field(pattern=r"^teacher\.[a-z0-9_]+-[0-9a-f]{8}$")]
    sha256: Sha256


class Release(Manifest):
    """A manifest with what only its administration needs."""

    created: str = ""
    teacher: Teacher
    files: dict[str, Sha256]


Action = Literal["promote", "rollback", "canary", "shadow", "stop"]


class Event(BaseModel):
    """One line of a product's history."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    at: str
    action: Action
    version: int
    previous: int | None = None
    by: str
    reason: str = ""
    model_sha256: str = ""


def parse_release(data: bytes, name: str) -> Release:
    """Read a manifest's bytes; `name` is for the error. Raises CheckError."""
    try:
        return Release.model_validate_json(data)
    except ValidationError as error:
        raise CheckError(f"{name}: {first_fault(error)}", hint="export the product again") from None


def parse_history(text: str, name: str) -> list[Event]:
    """Read a history, one event a line; `name` is for the error. Raises CheckError."""
    try:
        return [Event.model_validate_json(line) for line in text.splitlines()]
    except ValidationError as error:
        raise CheckError(f"{name}: {first_fault(error)}", hint="correct that line") from None


def parse_config(text: str, name: str) -> ModelConfig:
    """Read a config.pbtxt; `name` is for the error. Raises CheckError."""
    try:
        return text_format.Parse(text, model_config_pb2.ModelConfig())
    except text_format.ParseError as error:
        raise CheckError(f"{name}: not a configuration of Triton: {error}") from None


def config_text(config: ModelConfig) -> str:
    """Write a config.pbtxt."""
    return "# Versions are kept by `logicrd models`.\n" + str(text_format.MessageToString(config))


def name_faults(release: Release) -> list[str]:
    """Say what is wrong with the names in a manifest: each file lies in a folder of this version, and nowhere else."""
    product = release.product
    if not _PRODUCT.fullmatch(product):
        return [f"{product!r} is not a product's name"]
    faults = []
    for path in release.files:
        match = _FILE.fullmatch(path)
        if match is None or not _belongs(release, match["model"], match["version"], match["name"]):
            faults.append(f"file {path!r} is not one of version {release.version} of {product!r}")
    if release.teacher.model[-8:] != release.teacher.sha256[:8]:
        faults.append(f"teacher {release.teacher.model} is not named after its weights {release.teacher.sha256[:8]}")
    if release.model_sha256 != identity_of(release.files):
        faults.append("`model_sha256` is not the hash of the weight files")
    return faults


def identity_of(files: Mapping[str, str]) -> str:
    """Give the hash over the weight files' hashes, as `logicrd-train export` makes it; configs do not count."""
    weights = {path: digest for path, digest in files.items() if path.endswith((".onnx", ".npz", ".py"))}
    return hashlib.sha256(json.dumps(weights, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def config_faults(release: Release, configs: Mapping[str, ModelConfig]) -> list[str]:
    """Say what is wrong with a version's configurations: whether they join its models, and no others."""
    faults = []
    ensemble = configs.get(release.product)
    if ensemble is None or not steps_of(ensemble):
        return [f"{release.product}/{CONFIG} joins no steps"]
    if set(steps_of(ensemble)) != configs.keys() - {release.product}:
        faults.append(f"{release.product}/{CONFIG} joins {', '.join(steps_of(ensemble))}; files are of other models")
    for model, config in configs.items():
        if config.name != model:
            faults.append(f"{model}/{CONFIG} is of a model {config.name!r}")
        if model != release.product and config.backend not in _BACKENDS:
            faults.append(f"{model}/{CONFIG} asks for the backend {config.backend!r}")
        if _names_files(config):
            faults.append(f"{model}/{CONFIG} names files that the manifest does not hold")
        version = release.version if model != release.teacher.model else TEACHER_VERSION
        if model != release.product and not any(path.startswith(f"{model}/{version}/") for path in release.files):
            faults.append(f"{model} has no files of version {version}")
    return faults


def steps_of(ensemble: ModelConfig) -> list[str]:
    """List the models of an ensemble's steps, in the order in which they run."""
    return [step.model_name for step in ensemble.ensemble_scheduling.step]


def versions_of(config: ModelConfig) -> list[int]:
    """List the versions that a configuration names; empty where it leaves the choice to the server."""
    return list(config.version_policy.specific.versions)


def pinned(config: ModelConfig, release: Release, versions: Sequence[int]) -> ModelConfig:
    """Copy a configuration so that it serves these versions alone; an ensemble's steps are those of `release`."""
    copy = model_config_pb2.ModelConfig()
    copy.CopyFrom(config)
    copy.version_policy.specific.versions[:] = list(versions)
    for step in copy.ensemble_scheduling.step:
        own = step.model_name != release.teacher.model
        step.model_version = release.version if own else TEACHER_VERSION
    return copy


def addressed(config: ModelConfig, release: Manifest) -> ModelConfig:
    """Copy the ensemble's configuration of a version, pinned or as it is served, under the version's own name."""
    copy = model_config_pb2.ModelConfig()
    copy.CopyFrom(config)
    copy.name = ensemble_of(release.product, release.version)
    copy.version_policy.specific.versions[:] = [release.version]
    return copy


def is_ensemble(config: ModelConfig) -> bool:
    """Whether a configuration joins other models and has no files of its own."""
    return bool(config.ensemble_scheduling.step)


def is_addressed(config: ModelConfig, release: Manifest) -> bool:
    """Whether it is that of an ensemble of a single version."""
    return is_ensemble(config) and config.name != release.product


def compatible(config: ModelConfig, other: ModelConfig) -> bool:
    """Whether two configurations of a model differ in nothing but tuning: versions of both can be served at once."""
    return bool(_skeleton(config) == _skeleton(other))


def before(history: Sequence[Event]) -> int | None:
    """Give the version that a rollback goes to: the one that was promoted before; a rollback takes back a promotion."""
    stack: list[int] = []
    for event in history:
        if event.action == "rollback" and len(stack) > 1:
            stack.pop()
        elif event.action == "promote":
            if not stack and event.previous is not None:
                stack.append(event.previous)
            if stack[-1:] != [event.version]:
                stack.append(event.version)
    return stack[-2] if len(stack) > 1 else None


def prunable(
    there: Sequence[int], promoted: int, served: Sequence[int], history: Sequence[Event], keep: int
) -> list[int]:
    """List the versions to remove: older than the promoted one, not loaded, and none of the `keep` promoted last."""
    events = [event for event in reversed(history) if event.action in ("promote", "rollback")]
    earlier = [event.version for event in events] + [event.previous for event in events]
    last = list(dict.fromkeys(version for version in earlier if version is not None and version != promoted))
    kept = {promoted, *served, *last[:keep]}
    return sorted(version for version in there if version < promoted and version not in kept)


def outside_files(graph: bytes) -> list[str]:
    """List the paths of the files in which an ONNX graph keeps tensors. Raises CheckError when it is no ONNX graph."""
    model = ONNX_MODEL()
    try:
        model.ParseFromString(graph)
    except DecodeError:
        raise CheckError("not an ONNX graph") from None
    if not model.graph:
        raise CheckError("not an ONNX graph")
    return [path for tensor in _tensors(model) for path in _locations(tensor)]


def path_fault(location: str, folder: str, files: Mapping[str, str]) -> str:
    """Say what is wrong with the path of such a file, seen from the graph's folder; '' for a file of the version."""
    path = PurePosixPath(location)
    if path.is_absolute() or ".." in path.parts or "\\" in location:
        return f"keeps tensors in {location!r}, outside its folder"
    return "" if f"{folder}/{path}" in files else f"keeps tensors in {location!r}, which the manifest does not list"


def _belongs(release: Release, model: str, version: str | None, name: str) -> bool:
    own = model == release.product or re.fullmatch(re.escape(release.product) + r"\.[a-z0-9_]+", model) is not None
    if version is None:
        return name == CONFIG and (own or model == release.teacher.model)
    if model == release.teacher.model:
        return int(version) == TEACHER_VERSION
    return own and int(version) == release.version


def _names_files(config: ModelConfig) -> bool:
    """Whether a configuration lets the server read or run files of its own choice."""
    environment = "EXECUTION_ENV_PATH" in config.parameters  # of the Python backend
    libraries = config.model_operations.op_library_filename
    return bool(config.default_model_filename or config.cc_model_filenames or libraries or environment)


def _skeleton(config: ModelConfig) -> ModelConfig:
    """What clients and neighbours see of a model."""
    copy = model_config_pb2.ModelConfig(
        name=config.name,
        platform=config.platform,
        backend=config.backend,
        max_batch_size=config.max_batch_size,
        input=config.input,
        output=config.output,
        ensemble_scheduling=config.ensemble_scheduling,
    )
    for step in copy.ensemble_scheduling.step:
        step.model_version = -1
    return copy


# The part of ONNX's schema (onnx.proto3, Apache-2.0, field numbers never change) that leads to tensors.
_SCHEMA: dict[str, dict[str, tuple[int, str]]] = {
    "Model": {"graph": (7, "Graph"), "training_info": (20, "Training"), "functions": (25, "Function")},
    "Training": {"initialization": (1, "Graph"), "algorithm": (2, "Graph")},
    "Function": {"node": (7, "Node"), "attribute": (11, "Attribute")},
    "Graph": {"node": (1, "Node"), "initializer": (5, "Tensor"), "sparse_initializer": (15, "Sparse")},
    "Node": {"attribute": (5, "Attribute")},
    "Attribute": {
        "t": (5, "Tensor"),
        "g": (6, "Graph"),
        "tensors": (10, "Tensor"),
        "graphs": (11, "Graph"),
        "sparse_tensor": (22, "Sparse"),
        "sparse_tensors": (23, "Sparse"),
    },
    "Sparse": {"values": (1, "Tensor"), "indices": (2, "Tensor")},
    "Tensor": {"external_data": (13, "Entry")},
    "Entry": {"key": (1, ""), "value": (2, "")},
}


def _onnx_model() -> Any:  # noqa: ANN401 (a class that protobuf makes)
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="onnx-tensors.proto", package="onnx_tensors", syntax="proto2")
    for message, fields in _SCHEMA.items():
        described = file.message_type.add(name=message)
        for name, (number, kind) in fields.items():
            entry = described.field.add(name=name, number=number, label=field.LABEL_REPEATED)
            entry.type = field.TYPE_MESSAGE if kind else field.TYPE_BYTES
            if kind:
                entry.type_name = f".onnx_tensors.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("onnx_tensors.Model"))


ONNX_MODEL = _onnx_model()
"""ONNX's `ModelProto`, as far as it leads to tensors; every field is repeated, values are bytes."""


def _tensors(message: Any) -> Iterator[Any]:  # noqa: ANN401 (a protobuf message)
    if message.DESCRIPTOR.name == "Tensor":
        yield message
        return
    for _, values in message.ListFields():
        for value in values:
            yield from _tensors(value)


def _locations(tensor: Any) -> list[str]:  # noqa: ANN401 (a protobuf message)
    pairs = [((entry.key or [b""])[-1], (entry.value or [b""])[-1]) for entry in tensor.external_data]
    return [value.decode(errors="replace") for key, value in pairs if key == b"location"]
