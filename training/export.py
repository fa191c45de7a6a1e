"""Bundle to served models: writes the steps, the ensemble and the manifest of a product, and reads them back.

Nothing enters the repository before ONNX Runtime and torch agree on the fused score, and a failed export leaves it
as it was. Older versions of a product stay. Called by `cli`.
"""

import hashlib
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor

from training.config import check_product_name
from training.data import PREPROCESSING
from training.detector import ARRAYS, Description, Detector, empty_deployable, statistics_arrays, statistics_of
from training.errors import CheckFailedError, DataError
from training.graphs import fill_parameters, joined, parameters_of, stage_graph
from training.mahalanobis import distance
from training.methods import Network
from training.metrics import ImageMetrics
from training.region import REGION_STEP
from training.repository import (
    InputEntry,
    Manifest,
    MetricsEntry,
    Serving,
    TeacherEntry,
    config_text,
    ensemble_config,
    is_weights,
    mahalanobis_config,
    model_sha256,
    move_in,
    next_version,
    sha256_of,
    stage_config,
)
from training.stages import STAGES, run_stages

TOLERANCE = 1e-3
PARITY_BATCHES = (1, 8)
BACKEND = Path(__file__).parent / "templates" / "mahalanobis_model.py"
_FUSION = ("map_mean", "map_std", "mahalanobis_mean", "mahalanobis_std", "weight")
Graphs = dict[str, onnx.ModelProto]


def export(detector: Detector, repository: Path, serving: Serving) -> Manifest:
    """Adds the detector to `repository` as a new version; raises CheckFailedError (parity) with nothing changed."""
    check_product_name(detector.description.product)
    graphs = build_graphs(detector)
    check_parity(detector, joined(graphs, detector.network.wiring))
    repository.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=f".{repository.name}-", dir=repository.parent))
    try:
        manifest = _lay_out(staged, repository, detector, graphs, serving)
        move_in(staged, repository)
    finally:
        shutil.rmtree(staged)
    return manifest


def load_exported(repository: Path, product: str) -> Detector:
    """Rebuilds the torch detector from the exported graphs and statistics; checks weight files against the manifest."""
    manifest = read_manifest(repository, product)
    for name, digest in manifest.files.items():
        path = repository / name
        if is_weights(name) and (not path.is_file() or sha256_of(path) != digest):
            raise DataError(f"model '{product}': file '{path}' is missing or changed; export the product again")
    graphs = {stage: onnx.load(repository / name) for stage, name in _graph_files(manifest).items()}
    network = empty_deployable(manifest.network, manifest.teacher.arch)
    for stage, graph in graphs.items():
        fill_parameters(network.get_submodule(stage), graph, _graph_files(manifest)[stage])
    with np.load(repository / _statistics_file(manifest), allow_pickle=False) as arrays:
        statistics = statistics_of({name: arrays[name] for name in ARRAYS})
    return Detector(network, statistics, _description(manifest))


def fused_graph(repository: Path, product: str) -> onnx.ModelProto:
    """The exported stages of a product as one ONNX graph: image to map_score, descriptor, anomaly_map."""
    manifest = read_manifest(repository, product)
    graphs = {stage: onnx.load(repository / name) for stage, name in _graph_files(manifest).items()}
    return joined(graphs, empty_deployable(manifest.network, manifest.teacher.arch).wiring)


def read_manifest(repository: Path, product: str) -> Manifest:
    """Raises DataError where the product is not in the repository or its manifest is of another schema."""
    path = repository / product / "manifest.json"
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except OSError as error:
        known = ", ".join(sorted(p.parent.name for p in repository.glob("*/manifest.json"))) or "none"
        raise DataError(f"model '{product}': not in '{repository}'; it has: {known}") from error
    except ValidationError as error:
        raise DataError(f"model '{product}': '{path}' is not a manifest of this version: {error}") from error


def build_graphs(detector: Detector) -> Graphs:
    """The four ONNX stages of a detector."""
    return stage_graphs(detector.network, detector.description.image_size)


def stage_graphs(network: Network, size: int) -> Graphs:
    """The four ONNX stages of a deployable network for pictures of `size` x `size`."""
    tensors = _example(network, size)
    return {
        stage: stage_graph(network.get_submodule(stage), names, [tensors[name] for name in names[0]])
        for stage, names in network.wiring.items()
    }


def _example(network: Network, size: int) -> dict[str, Tensor]:
    """Every tensor between the stages, of a batch of two black pictures."""
    with torch.inference_mode():
        image = torch.zeros(2, size, size, 3, dtype=torch.uint8)
        return run_stages(network, network.wiring, {"image": image})


def check_parity(detector: Detector, whole: onnx.ModelProto) -> float:
    """Largest difference of the fused score, torch to ONNX Runtime, on noise pictures at batches 1 and 8.

    Raises CheckFailedError above 1e-3.
    """
    session = ort.InferenceSession(whole.SerializeToString(), providers=["CPUExecutionProvider"])
    generator = np.random.default_rng(0)
    size = detector.description.image_size
    worst = 0.0
    for batch in PARITY_BATCHES:
        images = _parity_images(generator, batch, size)
        map_score, descriptor = session.run(["map_score", "descriptor"], {"image": images})
        mahalanobis = distance(detector.statistics, descriptor)
        ours = detector.description.calibration.fusion.score(map_score[:, 0].astype(np.float64), mahalanobis)
        difference = np.abs(ours - detector.score(images).score)
        worst = max(worst, float(np.where(np.isnan(difference), np.inf, difference).max()))
    if worst > TOLERANCE:
        raise CheckFailedError(f"export: ONNX Runtime and torch differ by {worst:.2g} on the score (limit {TOLERANCE})")
    return worst


def _parity_images(generator: np.random.Generator, batch: int, size: int) -> NDArray[np.uint8]:
    """Blocky noise: every channel and several scales are excited, and no data folder is needed."""
    cells = generator.integers(0, 256, (batch, 16, 16, 3), dtype=np.uint8)
    images = cells.repeat(size // 16, axis=1).repeat(size // 16, axis=2)
    noise = generator.integers(0, 32, images.shape, dtype=np.uint8)
    return np.asarray((images >> 1) + noise, dtype=np.uint8)


def _lay_out(staged: Path, repository: Path, detector: Detector, graphs: Graphs, serving: Serving) -> Manifest:
    about = detector.description
    product, teacher = about.product, f"teacher.{about.teacher_arch}-{about.teacher_sha256[:8]}"
    wiring = detector.network.wiring
    shapes = {name: tuple(value.shape[1:]) for name, value in _example(detector.network, about.image_size).items()}
    shapes |= {"mahalanobis": (1,), "score": (1,)}
    steps = {stage: teacher if stage == "teacher" else f"{product}.{stage}" for stage in STAGES}
    own = [product, f"{product}.mahalanobis", *(name for stage, name in steps.items() if stage != "teacher")]
    version = next_version(repository, own)
    weights: list[Path] = []
    for stage, name in steps.items():
        path = Path(name, "1" if stage == "teacher" else str(version), "model.onnx")
        weights.append(_write(staged / path, _shared_or_new(repository / path, graphs[stage])))
        _write(staged / name / "config.pbtxt", config_text(stage_config(name, wiring[stage], shapes, serving)).encode())
    weights += _lay_out_distance(staged / own[1], detector, version)
    _write(staged / own[1] / "config.pbtxt", config_text(mahalanobis_config(own[1], shapes, serving)).encode())
    _write(
        staged / product / "config.pbtxt",
        config_text(ensemble_config(product, teacher, wiring, shapes, serving)).encode(),
    )
    # Git keeps no empty folder, and Triton wants the ensemble's version folder to exist.
    _write(staged / product / str(version) / ".gitkeep", b"")
    files = {
        path.relative_to(staged).as_posix(): sha256_of(path) for path in [*weights, *staged.glob("*/config.pbtxt")]
    }
    manifest = _manifest(about, version, teacher, files)
    _write(staged / product / "manifest.json", (manifest.model_dump_json(indent=1) + "\n").encode())
    return manifest


def _shared_or_new(existing: Path, graph: onnx.ModelProto) -> bytes:
    """The bytes to store: a teacher that is there already stays as it is, if its weights are these."""
    if not existing.is_file():
        return bytes(graph.SerializeToString())
    held, wanted = parameters_of(onnx.load(existing)), parameters_of(graph)
    if held.keys() != wanted.keys() or any(not torch.equal(held[name], wanted[name]) for name in held):
        raise DataError(f"export: '{existing}' holds other weights than its name says; remove that model first")
    return existing.read_bytes()


def _lay_out_distance(folder: Path, detector: Detector, version: int) -> list[Path]:
    fusion = detector.description.calibration.fusion
    # FP32 on disk halves the largest part of a product after its networks; sums still run in float64.
    arrays: dict[str, NDArray[Any]] = {
        name: array.astype(np.float32) for name, array in statistics_arrays(detector.statistics).items()
    }
    arrays["fusion"] = np.array([getattr(fusion, name) for name in _FUSION], dtype=np.float64)
    digest = hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays.values())).digest()
    code = _write(folder / str(version) / "model.py", BACKEND.read_bytes())
    path = folder / str(version) / "statistics.npz"
    arrays["sha256"] = np.frombuffer(digest, dtype=np.uint8)
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]  # numpy's stub takes the names for its own options
    return [code, path]


def _manifest(about: Description, version: int, teacher: str, files: dict[str, str]) -> Manifest:
    metrics = about.metrics
    return Manifest(
        product=about.product,
        method=about.method,
        network=about.network,
        version=version,
        created=about.created,
        input=InputEntry(height=about.image_size, width=about.image_size),
        # A line that knows no regions must refuse the model, not show it whole pictures.
        preprocessing=PREPROCESSING if about.region is None else f"{REGION_STEP}+{PREPROCESSING}",
        region=about.region,
        teacher=TeacherEntry(arch=about.teacher_arch, model=teacher, sha256=about.teacher_sha256),
        data_sha256=about.data_sha256,
        git_revision=about.git_revision,
        map_shape=(about.image_size // 4, about.image_size // 4),
        metrics=None if metrics is None else MetricsEntry(**dict(metrics)),
        calibration=about.calibration,
        model_sha256=model_sha256(files),
        files=dict(sorted(files.items())),
    )


def _description(manifest: Manifest) -> Description:
    return Description(
        product=manifest.product,
        network=manifest.network,
        teacher_arch=manifest.teacher.arch,
        teacher_sha256=manifest.teacher.sha256,
        data_sha256=manifest.data_sha256,
        created=manifest.created,
        git_revision=manifest.git_revision,
        calibration=manifest.calibration,
        metrics=None if manifest.metrics is None else ImageMetrics(**dict(manifest.metrics)),
        region=manifest.region,
    )


def _graph_files(manifest: Manifest) -> dict[str, str]:
    names = {stage: f"{manifest.product}.{stage}/{manifest.version}/model.onnx" for stage in STAGES}
    return names | {"teacher": f"{manifest.teacher.model}/1/model.onnx"}


def _statistics_file(manifest: Manifest) -> str:
    return f"{manifest.product}.mahalanobis/{manifest.version}/statistics.npz"


def _write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path
