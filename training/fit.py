"""Trains reverse distillation on the normals of one product, fits the distance branch, calibrates: makes a bundle.

Uses train/good for weights and statistics and validation/good for the stopping rule and calibration; the test split is
scored once at the end, for the report alone. Called by `cli`.
"""

import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.calibrate import NormalScores, calibrate
from training.config import FitConfig
from training.data import LocoFolder, data_sha256, load_at_model_size
from training.detector import Description, Detector, deployable, measure
from training.errors import TrainingError
from training.mahalanobis import distance, fit_statistics
from training.rd import ReverseDistillation
from training.teacher import ARCH, Teacher, weights_sha256

# A validation loss counts as better when it falls by this share.
MIN_PROGRESS = 0.005


@dataclass(frozen=True, slots=True)
class Progress:
    """Told after every step: `share` of the budget used (0 to 1), losses so far, images a second."""

    step: int
    share: float
    loss: float
    validation_loss: float
    images_per_s: float


def fit(
    data: LocoFolder, product: str, teacher: Teacher, config: FitConfig, report: Callable[[Progress], None]
) -> Detector:
    """Returns the fitted detector, not yet evaluated; deterministic for a given seed, machine and number of steps."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    train = load_at_model_size(data.train, config.image_size)
    validation = load_at_model_size(data.validation, config.image_size)
    network = train_network(train, validation, teacher, config, report)
    served = deployable(network)
    _, _, descriptors = measure(served, train)
    statistics = fit_statistics(descriptors)
    maps, map_score, descriptors = measure(served, validation)
    normals = NormalScores(map_score, distance(statistics, descriptors), maps)
    description = Description(
        product=product,
        width=config.width,
        image_size=config.image_size,
        teacher_arch=ARCH,
        teacher_sha256=weights_sha256(teacher),
        data_sha256=data_sha256((*data.train, *data.validation), data.root),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        git_revision=git_revision(),
        calibration=calibrate(normals, config.calibration),
    )
    return Detector(served, statistics, description)


def train_network(
    train: NDArray[np.uint8],
    validation: NDArray[np.uint8],
    teacher: Teacher,
    config: FitConfig,
    report: Callable[[Progress], None],
) -> ReverseDistillation:
    """Fits bottleneck and student until steps, minutes or patience run out; returns the last weights.

    `train` and `validation` are (n, size, size, 3) uint8 normals.
    """
    torch.manual_seed(config.seed)
    network = ReverseDistillation(teacher, config.width, config.image_size).train()
    network.to(memory_format=torch.channels_last)
    trained = [*network.bottleneck.parameters(), *network.student.parameters()]
    optimiser = torch.optim.Adam(trained, lr=config.learning_rate, betas=(0.5, 0.999))
    plateau = _Plateau(config.patience)
    started = time.monotonic()
    for step, batch in enumerate(_batches(train, config), start=1):
        loss = network.loss(batch)
        if not torch.isfinite(loss):
            raise TrainingError(f"step {step}: the loss is {loss.item()}; lower learning_rate or check the teacher")
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        if step % config.validate_every == 0:
            plateau.see(validation_loss(network, validation, config.batch_size))
        spent = time.monotonic() - started
        share = max(step / config.max_steps, spent / (60 * config.max_minutes))
        done = share >= 1 or plateau.reached
        rate = step * config.batch_size / spent
        report(Progress(step, 1.0 if done else share, loss.item(), plateau.best, rate))
        if done:
            break
    return network.eval()


def validation_loss(network: ReverseDistillation, images: NDArray[np.uint8], batch_size: int) -> float:
    """Mean distillation loss of normals that the network was not fitted on, in evaluation mode."""
    network.eval()
    with torch.inference_mode():
        losses = [
            network.loss(torch.from_numpy(images[start : start + batch_size])).item() * len(images[start:][:batch_size])
            for start in range(0, len(images), batch_size)
        ]
    network.train()
    return sum(losses) / len(images)


class _Plateau:
    """Counts looks at the validation loss that brought no progress."""

    def __init__(self, patience: int) -> None:
        self.best = float("inf")
        self._left = self._patience = patience

    def see(self, loss: float) -> None:
        improved = loss < self.best * (1 - MIN_PROGRESS)
        self._left = self._patience if improved else self._left - 1
        self.best = min(self.best, loss)

    @property
    def reached(self) -> bool:
        return self._left <= 0


def _batches(images: NDArray[np.uint8], config: FitConfig) -> Iterator[Tensor]:
    """Endless batches, reshuffled every epoch; the rest of an epoch too small for a batch is left out of it."""
    generator = np.random.default_rng(config.seed)
    size = min(config.batch_size, len(images))
    while True:
        order = generator.permutation(len(images))
        for start in range(0, len(images) - size + 1, size):
            yield torch.from_numpy(images[order[start : start + size]])


def git_revision() -> str:
    """The commit that this code runs from, or 'unknown' outside a work tree."""
    try:
        answer = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return answer.stdout.strip()
