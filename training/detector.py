"""A fitted model as it is served: fused and FP16-rounded networks, distance statistics and calibration in one value.

Everything that scores in torch (calibration, evaluation, parity checks) scores through `Detector`. Reads and writes
bundles: a folder of weights.safetensors and bundle.json. Built by `fit` and `export`.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from training.calibrate import Calibration
from training.config import NetworkConfig
from training.errors import DataError
from training.mahalanobis import Statistics, distance
from training.methods import Network, build
from training.metrics import ImageMetrics
from training.modules.fusing import fuse_batch_norms
from training.region import RegionOfInterest
from training.stages import run_stages
from training.teacher import empty_teacher

WEIGHTS, DESCRIPTION = "weights.safetensors", "bundle.json"
ARRAYS = ("means", "scale", "directions", "weights", "outer")
_PREFIX = "mahalanobis."


class Description(BaseModel):
    """What bundle.json says: where the model came from and what its scores mean."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int = 2
    product: str
    network: NetworkConfig
    teacher_arch: str
    teacher_sha256: str
    data_sha256: str
    created: str
    git_revision: str
    calibration: Calibration
    metrics: ImageMetrics | None = None
    region: RegionOfInterest | None = None

    @property
    def method(self) -> str:
        """rd, dskd or logicrd."""
        return self.network.method

    @property
    def image_size(self) -> int:
        """Height and width of the picture that the network takes."""
        return self.network.image_size


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

    network: Network
    statistics: Statistics
    description: Description

    def score(self, images: NDArray[np.uint8], batch_size: int = 8) -> Scores:
        """(n, H, W, 3) uint8 RGB at model size to the scores that the served ensemble gives."""
        maps, map_score, descriptors = measure(self.network, images, batch_size)
        mahalanobis = distance(self.statistics, descriptors)
        score = self.description.calibration.fusion.score(map_score, mahalanobis)
        return Scores(score, map_score, mahalanobis, maps)


def measure(
    network: Network, images: NDArray[np.uint8], batch_size: int = 8
) -> tuple[NDArray[np.float32], NDArray[np.float64], NDArray[np.float64]]:
    """Runs the network: (n, H, W, 3) uint8 to maps (n, h, w), map scores (n,) and descriptors (n, D)."""
    network.eval()
    parts: list[tuple[NDArray[np.float32], ...]] = []
    with torch.inference_mode():
        for start in range(0, len(images), batch_size):
            # Copied: memory-mapped pictures are read-only, which torch does not know.
            image = torch.from_numpy(np.array(images[start : start + batch_size]))
            known = run_stages(network, network.wiring, {"image": image})
            parts.append(tuple(known[name].numpy() for name in ("anomaly_map", "map_score", "descriptor")))
    maps, map_score, descriptors = (np.concatenate(column) for column in zip(*parts, strict=True))
    return maps, map_score[:, 0].astype(np.float64), descriptors.astype(np.float64)


def deployable(network: Network) -> Network:
    """A copy with batch norms folded in and every weight rounded to FP16, computing in FP32: what will be served."""
    served = copy.deepcopy(network).eval()
    fuse_batch_norms(served)
    for name, parameter in served.named_parameters():
        # One layout in memory, whatever the training used: a stored network scores bit for bit as the fitted one.
        rounded = parameter.data.half().float().clone(memory_format=torch.contiguous_format)
        if not torch.isfinite(rounded).all():
            raise DataError(f"weights: '{name}' does not fit FP16 (largest {parameter.data.abs().max():.3g})")
        parameter.data = rounded
    return served.requires_grad_(False)


def empty_deployable(config: NetworkConfig, teacher_arch: str) -> Network:
    """A network of the deployable form, weights to be filled in."""
    return deployable(build(config, empty_teacher(teacher_arch)))


def statistics_arrays(statistics: Statistics) -> dict[str, NDArray[np.float64]]:
    """The statistics as named float64 arrays, as bundles and the server keep them."""
    return {name: np.asarray(getattr(statistics, name), dtype=np.float64) for name in ARRAYS}


def as_served(statistics: Statistics) -> Statistics:
    """The statistics at the precision of the server's file, FP32, so that scores are calibrated on what is served."""
    return statistics_of({name: array.astype(np.float32) for name, array in statistics_arrays(statistics).items()})


def statistics_of(arrays: Mapping[str, NDArray[np.floating]]) -> Statistics:
    """The reverse of `statistics_arrays`."""
    means, scale, directions, weights, outer = (np.asarray(arrays[name], dtype=np.float64) for name in ARRAYS)
    return Statistics(means, scale, directions, weights, float(outer))


def save_bundle(folder: Path, detector: Detector) -> None:
    """Writes the bundle, bundle.json last: a folder without it is no bundle."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DESCRIPTION).unlink(missing_ok=True)
    tensors = {name: tensor.half().contiguous() for name, tensor in detector.network.state_dict().items()}
    arrays = statistics_arrays(detector.statistics)
    tensors |= {_PREFIX + name: torch.from_numpy(array) for name, array in arrays.items()}
    # Not save_file: it makes files that only their owner can read.
    (folder / WEIGHTS).write_bytes(save(tensors))
    (folder / DESCRIPTION).write_text(detector.description.model_dump_json(indent=1) + "\n", encoding="utf-8")


def load_bundle(folder: Path) -> Detector:
    """Raises DataError that names the file where the bundle is incomplete or does not fit its description."""
    try:
        description = Description.model_validate_json((folder / DESCRIPTION).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValidationError, SafetensorError) as error:
        raise DataError(f"bundle '{folder}': cannot be used: {error}; fit it again") from error
    network = empty_deployable(description.network, description.teacher_arch)
    try:
        statistics = statistics_of({name: tensors.pop(_PREFIX + name).numpy() for name in ARRAYS})
        network.load_state_dict(tensors)
    except (RuntimeError, KeyError) as error:
        raise DataError(f"bundle '{folder}': weights do not fit its description; fit it again") from error
    return Detector(network, statistics, description)
