"""The model repository as Triton and the line read it: what is shipped, checked file by file."""

import ast
import hashlib
import json
import re
import sys
from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import TYPE_FP32, TYPE_UINT8, ModelConfig

from pipeline.manifest import read_manifest
from pipeline.tensors import signature_faults

MODELS = Path(__file__).resolve().parents[2] / "models_repo"
CONFIGS = sorted(MODELS.glob("*/config.pbtxt"))
MANIFESTS = sorted(MODELS.glob("*/manifest.json"))
PROGRAMS = sorted(MODELS.glob("*/[0-9]*/model.py"))
MAX_BYTES = 40_000_000
BRANCHES = ("bottleneck", "student", "map", "mahalanobis")


def name_of(path):
    return path.relative_to(MODELS).parts[0]


def config_of(path):
    return text_format.Parse(path.read_text(), ModelConfig())


def tensors_of(tensors):
    return {tensor.name: (tensor.data_type, list(tensor.dims)) for tensor in tensors}


def test_two_products_are_shipped():
    """The demo needs no training: at least two products lie in the repository, each with its ensemble."""
    assert len(MANIFESTS) >= 2
    assert all((path.parent / "config.pbtxt").is_file() for path in MANIFESTS)


def test_the_repository_is_small():
    """All weights together stay within 40 MB, so that a clone is quick."""
    assert sum(path.stat().st_size for path in MODELS.rglob("*") if path.is_file()) <= MAX_BYTES


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_a_config_is_what_triton_reads(path):
    """Each config.pbtxt is a ModelConfig of its folder's name, written as the library writes it, and round-trips."""
    config = config_of(path)
    assert config.name == path.parent.name
    assert config.max_batch_size == 8
    written = text_format.MessageToString(config)
    assert text_format.Parse(written, ModelConfig()) == config
    assert [line for line in path.read_text().splitlines() if not line.startswith("#")] == written.splitlines()


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_no_limit_is_in_a_config(path):
    """Thresholds live in Redis and in the manifest: no config knows one."""
    assert not re.search(r"threshold|review|\bng\b|limit", path.read_text(), re.IGNORECASE)
    assert not config_of(path).parameters.keys() & {"ng", "review", "threshold"}


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_a_model_lies_as_its_backend_expects(path):
    """A numeric version folder holds the file of the backend; an ensemble has the folder only."""
    config = config_of(path)
    expected = {"onnxruntime": {"model.onnx"}, "python": {"model.py", "statistics.npz"}, "": set()}[config.backend]
    assert config.backend or config.platform == "ensemble"
    versions = [folder for folder in path.parent.iterdir() if folder.is_dir()]
    assert versions
    for folder in versions:
        assert folder.name.isdecimal()
        found = {file.name for file in folder.iterdir() if file.name not in {".gitkeep", "__pycache__"}}
        assert found == expected


@pytest.mark.parametrize("path", MANIFESTS, ids=name_of)
def test_an_ensemble_has_the_tensors_of_the_contract(path):
    """The ensemble takes `image` and gives three scores and the map, and the line accepts its signature."""
    manifest = read_manifest(MODELS, name_of(path))
    config = config_of(path.parent / "config.pbtxt")
    size = [manifest.input.height, manifest.input.width, 3]
    assert max(manifest.map_shape) <= 64
    assert tensors_of(config.input) == {"image": (TYPE_UINT8, size)}
    scores = dict.fromkeys(("score", "map_score", "mahalanobis"), (TYPE_FP32, [1]))
    assert tensors_of(config.output) == scores | {"anomaly_map": (TYPE_FP32, list(manifest.map_shape))}
    assert signature_faults(metadata_of(config, manifest.version), manifest) == []


def metadata_of(config, version):
    """Give the metadata that Triton would show of a configuration."""
    kinds = {TYPE_FP32: "FP32", TYPE_UINT8: "UINT8"}

    def shown(tensors):
        return [
            {"name": tensor.name, "datatype": kinds[tensor.data_type], "shape": ["-1", *map(str, tensor.dims)]}
            for tensor in tensors
        ]

    return {"versions": [str(version)], "inputs": shown(config.input), "outputs": shown(config.output)}


@pytest.mark.parametrize("path", MANIFESTS, ids=name_of)
def test_the_steps_of_an_ensemble_fit_each_other(path):
    """Teacher, bottleneck, student, map and distance: each step's tensors exist, and each is fed what was made."""
    product = name_of(path)
    document = json.loads(path.read_text())
    config = config_of(path.parent / "config.pbtxt")
    steps = config.ensemble_scheduling.step
    names = [document["teacher"]["model"], *(f"{product}.{branch}" for branch in BRANCHES)]
    assert [step.model_name for step in steps] == names
    made = {tensor.name: (tensor.data_type, list(tensor.dims)) for tensor in config.input}
    for step in steps:
        model = config_of(MODELS / step.model_name / "config.pbtxt")
        assert {inner: made[outer] for inner, outer in step.input_map.items()} == tensors_of(model.input)
        outputs = tensors_of(model.output)
        assert set(step.output_map) == set(outputs)
        made |= {outer: outputs[inner] for inner, outer in step.output_map.items()}
    assert tensors_of(config.output).items() <= made.items()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.parent.name)
def test_no_step_bounds_its_queue(path):
    """A bound in number or time, whatever its size, lets Triton's batcher sleep on for half a second now and then."""
    batching = config_of(path).dynamic_batching
    assert not batching.HasField("default_queue_policy")
    assert not batching.priority_queue_policy


@pytest.mark.parametrize("path", MANIFESTS, ids=name_of)
def test_the_manifest_names_every_file_by_its_hash(path):
    """Each file that the product is served from is in the manifest with its sha256, and the model's hash follows."""
    document = json.loads(path.read_text())
    product = name_of(path)
    folders = [product, document["teacher"]["model"], *(f"{product}.{branch}" for branch in BRANCHES)]
    served = {
        file.relative_to(MODELS).as_posix()
        for folder in folders
        for file in (MODELS / folder).rglob("*")
        if file.is_file() and file != path and file.name != ".gitkeep" and "__pycache__" not in file.parts
    }
    assert set(document["files"]) == served
    wrong = [
        name
        for name, sha in document["files"].items()
        if hashlib.sha256((MODELS / name).read_bytes()).hexdigest() != sha
    ]
    assert wrong == []
    weights = {name: sha for name, sha in document["files"].items() if name.endswith((".onnx", ".npz", "model.py"))}
    canonical = json.dumps(weights, sort_keys=True, separators=(",", ":"))
    assert document["model_sha256"] == hashlib.sha256(canonical.encode()).hexdigest()


@pytest.mark.parametrize("path", MANIFESTS, ids=name_of)
def test_the_teacher_is_named_by_its_weights(path):
    """The shared teacher's name carries its architecture and the first eight digits of its weights' hash."""
    teacher = json.loads(path.read_text())["teacher"]
    assert teacher["model"] == f"teacher.{teacher['arch']}-{teacher['sha256'][:8]}"
    assert (MODELS / teacher["model"] / "config.pbtxt").is_file()


@pytest.mark.parametrize("path", MANIFESTS, ids=name_of)
def test_the_calibration_can_judge(path):
    """Limits and the heat map's scale are finite, in order, and inside what the validation normals said."""
    calibration = read_manifest(MODELS, name_of(path)).calibration
    assert calibration.thresholds.review <= calibration.thresholds.ng
    assert calibration.heatmap.low <= calibration.heatmap.limit < calibration.heatmap.high


@pytest.mark.parametrize("path", PROGRAMS, ids=name_of)
def test_a_python_model_imports_numpy_only(path):
    """What runs inside Triton imports numpy, the server's module and the standard library, and unpickles nothing."""
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or ".").split(".")[0])
    assert imported - set(sys.stdlib_module_names) <= {"numpy", "triton_python_backend_utils"}
    assert not imported & {"pickle", "subprocess", "socket", "marshal"}
    assert "allow_pickle=True" not in path.read_text()
