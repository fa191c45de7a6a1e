"""A fitted model as it is served: fused and FP16-rounded networks, distance statistics and calibration in one value.

Everything that scores in torch (calibration, evaluation, parity checks) scores through `Detector`. Reads and writes
bundles: a folder of weights.safetensors and bundle.json. Built by `fit` and `export`.
"""

import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from training.calibrate import Calibration
from training.errors import DataError
from training.mahalanobis import Statistics, distance
from training.metrics import ImageMetrics
from training.modules.fusing import fuse_batch_norms
from training.rd import ReverseDistillation
from training.teacher import Teacher

WEIGHTS, DESCRIPTION = "weights.safetensors", "bundle.json"
_MEAN, _WHITENING = "mahalanobis.mean", "mahalanobis.whitening"


class Description(BaseModel):
    """What bundle.json says: where the model came from and what its scores mean."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int = 1
    product: str
    method: str = "rd"
    width: int
    image_size: int
    teacher_arch: str
    teacher_sha256: str
    data_sha256: str
    created: str
    git_revision: str
    calibration: Calibration
    metrics: ImageMetrics | None = None


@dataclass(frozen=True, slots=True)
class Scores:
    """Of n pictures: score, map_score and mahalanobis (n,) float64; anomaly_map (n, h, w) float32."""

    score: NDArray[np.float64]
    map_score: NDArray[np.float64]
    mahalanobis: NDArray[np.float64]
    anomaly_map: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Detector:
    """`network` must come from `deployable`."""

    network: ReverseDistillation
    statistics: Statistics
    description: Description

    def score(self, images: NDArray[np.uint8], batch_size: int = 8) -> Scores:
        """(n, H, W, 3) uint8 RGB at model size to the scores that the served ensemble gives."""
        maps, map_score, descriptors = measure(self.network, images, batch_size)
        mahalanobis = distance(self.statistics, descriptors)
        score = self.description.calibration.fusion.score(map_score, mahalanobis)
        return Scores(score, map_score, mahalanobis, maps)


def measure(
    network: ReverseDistillation, images: NDArray[np.uint8], batch_size: int = 8
) -> tuple[NDArray[np.float32], NDArray[np.float64], NDArray[np.float64]]:
    """Runs the network: (n, H, W, 3) uint8 to maps (n, h, w), map scores (n,) and descriptors (n, D)."""
    network.eval()
    parts: list[tuple[NDArray[np.float32], ...]] = []
    with torch.inference_mode():
        for start in range(0, len(images), batch_size):
            outputs = network(torch.from_numpy(images[start : start + batch_size]))
            parts.append(tuple(output.numpy() for output in outputs))
    maps, map_score, descriptors = (np.concatenate(column) for column in zip(*parts, strict=True))
    return maps, map_score[:, 0].astype(np.float64), descriptors.astype(np.float64)


def deployable(network: ReverseDistillation) -> ReverseDistillation:
    """A copy with batch norms folded in and every weight rounded to FP16, computing in FP32: what will be served."""
    served = copy.deepcopy(network).eval()
    fuse_batch_norms(served)
    for name, parameter in served.named_parameters():
        rounded = parameter.data.half().float()
        if not torch.isfinite(rounded).all():
            raise DataError(f"weights: '{name}' does not fit FP16 (largest {parameter.data.abs().max():.3g})")
        parameter.data = rounded
    return served.requires_grad_(False)


def empty_deployable(width: int, image_size: int) -> ReverseDistillation:
    """A network of the deployable form, weights to be filled in."""
    return deployable(ReverseDistillation(Teacher(), width, image_size))


def save_bundle(folder: Path, detector: Detector) -> None:
    """Writes the bundle, bundle.json last: a folder without it is no bundle."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DESCRIPTION).unlink(missing_ok=True)
    tensors = {name: tensor.half().contiguous() for name, tensor in detector.network.state_dict().items()}
    tensors[_MEAN] = torch.from_numpy(detector.statistics.mean)
    tensors[_WHITENING] = torch.from_numpy(detector.statistics.whitening)
    save_file(tensors, folder / WEIGHTS)
    (folder / DESCRIPTION).write_text(detector.description.model_dump_json(indent=1) + "\n", encoding="utf-8")


def load_bundle(folder: Path) -> Detector:
    """Raises DataError that names the file where the bundle is incomplete or does not fit its description."""
    try:
        description = Description.model_validate_json((folder / DESCRIPTION).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValidationError, SafetensorError) as error:
        raise DataError(f"bundle '{folder}': cannot be used: {error}; fit it again") from error
    network = empty_deployable(description.width, description.image_size)
    statistics = Statistics(tensors.pop(_MEAN).numpy(), tensors.pop(_WHITENING).numpy())
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        raise DataError(f"bundle '{folder}': weights do not fit a network of width {description.width}") from error
    return Detector(network, statistics, description)
