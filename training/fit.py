"""Trains a method on the normals of one product, fits the distance branch, calibrates: makes a detector.

Uses train/good for weights and statistics and validation/good for the stopping rule and calibration; never opens the
test split. Under torchrun every process takes its share of each batch. Called by `cli` and `compare`.
"""

import hashlib
import json
import math
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from training.calibrate import NormalScores, calibrate
from training.checkpoint import Counters, load_checkpoint, save_checkpoint
from training.config import FitConfig
from training.data import DataFolder, data_sha256
from training.detector import Description, Detector, as_served, deployable, measure
from training.errors import ConfigError, TrainingError
from training.mahalanobis import distance, fit_statistics
from training.methods import Network, build
from training.modules.replicas import norms_over_replicas, replicas
from training.modules.resnet import Features
from training.normals import Normals, open_normals
from training.teacher import AnyTeacher, weights_sha256

# A validation loss counts as better when it falls by this share.
MIN_PROGRESS = 0.005
WARM_UP_STEPS = 20
MAX_GRADIENT = 1.0
ADAM_BETAS = (0.5, 0.999)


@dataclass(frozen=True, slots=True)
class Progress:
    """Told after every step: `share` of the budget used (0 to 1), losses so far, images a second."""

    step: int
    share: float
    loss: float
    validation_loss: float
    images_per_s: float


Report = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class Places:
    """Where a run keeps its files: `cache` for pictures and features, `checkpoint` for its state (None: nowhere)."""

    cache: Path
    checkpoint: Path | None = None


def fit(
    data: DataFolder, product: str, teacher: AnyTeacher, config: FitConfig, report: Report, places: Places | None = None
) -> Detector:
    """Returns the fitted detector, not yet evaluated; deterministic for a given seed, machine and number of steps."""
    if places is None:
        with tempfile.TemporaryDirectory(prefix="logicrd-fit-") as folder:
            return fit(data, product, teacher, config, report, Places(Path(folder)))
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teacher = teacher.to(device)
    train, validation = (_open(data, files, teacher, config, places) for files in (data.train, data.validation))
    hashes = (data_sha256((*data.train, *data.validation), data.root, data.region), weights_sha256(teacher))
    torch.manual_seed(config.seed)
    if config.batch_size % replicas():
        raise ConfigError(f"batch_size {config.batch_size}: does not divide among {replicas()} processes")
    network = build(config, teacher).to(device)
    # Before hours of training: a backbone that cannot be folded could not be served.
    deployable(network)
    network.prepare(train)
    identity = hashlib.sha256(json.dumps([config.model_dump(mode="json"), *hashes]).encode()).hexdigest()
    train_network(network, train, validation, config, report, places.checkpoint, identity)
    network.settle(validation)
    served = deployable(network.cpu())
    statistics = as_served(fit_statistics(measure(served, train.images)[2], config.seed))
    maps, map_score, descriptors = measure(served, validation.images)
    normals = NormalScores(map_score, distance(statistics, descriptors), maps)
    limits = config.calibration.model_copy(update={} if config.mahalanobis else {"mahalanobis_weight": 0.0})
    description = Description(
        product=product,
        network=config.network(),
        teacher_arch=teacher.arch,
        teacher_sha256=hashes[1],
        data_sha256=hashes[0],
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        git_revision=git_revision(),
        calibration=calibrate(normals, limits),
        region=data.region,
    )
    return Detector(served, statistics, description)


def _open(data: DataFolder, files: tuple[Path, ...], teacher: AnyTeacher, config: FitConfig, places: Places) -> Normals:
    def opened() -> Normals:
        cached = config.cache_features
        return open_normals(files, config.image_size, teacher, places.cache, cache_features=cached, region=data.region)

    if replicas() > 1:
        # One process fills the cache, the others find it.
        if _is_first():
            opened()
        dist.barrier()
    return opened()


class _Loss(nn.Module):
    """A network whose forward pass is its loss: what DistributedDataParallel wraps."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, f1: Tensor, f2: Tensor, f3: Tensor) -> Tensor:
        return self.network.loss((f1, f2, f3))


def train_network(
    network: Network,
    train: Normals,
    validation: Normals,
    config: FitConfig,
    report: Report,
    checkpoint: Path | None = None,
    identity: str = "",
) -> None:
    """Fits the trained stages in place until steps, minutes or patience run out; goes on from a checkpoint if any."""
    network.to(memory_format=torch.channels_last)
    optimiser = _optimiser(network, config)
    if replicas() > 1:
        norms_over_replicas(network.bottleneck)
        norms_over_replicas(network.student)
    found = None if checkpoint is None else load_checkpoint(checkpoint, network, optimiser, identity)
    step, before_s = (0, 0.0) if found is None else (found.step, found.spent_s)
    plateau = _Plateau(config.patience) if found is None else _Plateau(config.patience, found)
    loss_of: nn.Module = _Loss(network)
    loss_of = DistributedDataParallel(loss_of) if replicas() > 1 else loss_of
    started = time.monotonic()
    while True:
        spent_s = before_s + time.monotonic() - started
        share = max(step / config.max_steps, spent_s / (60 * config.max_minutes))
        if _agreed(share >= 1 or plateau.reached):
            break
        loss = _train_step(network, loss_of, optimiser, train, config, step, share)
        step += 1
        if step % config.validate_every == 0:
            plateau.see(validation_loss(network, validation, config.batch_size))
        rate = (step - (found.step if found else 0)) * config.batch_size / (time.monotonic() - started)
        report(Progress(step, min(1.0, max(share, step / config.max_steps)), loss, plateau.best, rate))
        if checkpoint is not None and step % config.checkpoint_every == 0 and _is_first():
            counters = Counters(identity, step, spent_s, plateau.best, plateau.left)
            save_checkpoint(checkpoint, network, optimiser, counters)
    network.eval()


def _train_step(
    network: Network,
    loss_of: nn.Module,
    optimiser: torch.optim.Optimizer,
    train: Normals,
    config: FitConfig,
    step: int,
    share: float,
) -> float:
    _set_rates(optimiser, config, step, share)
    # Random draws depend on seed and step alone, so that a resumed run repeats an uninterrupted one.
    torch.manual_seed(config.seed * 1_000_003 + step * replicas() + _rank())
    network.train()
    network.teacher.eval()
    features = train.take(batch_indices(len(train), config, step)[_rank() :: replicas()])
    with _autocast(config.precision, features):
        loss = loss_of(*(level.contiguous(memory_format=torch.channels_last) for level in features))
    value = float(loss.detach())
    if not math.isfinite(value):
        raise TrainingError(f"step {step + 1}: the loss is {value}; lower learning_rate or check the teacher")
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    for group in optimiser.param_groups:
        if group["name"] == "attention":
            nn.utils.clip_grad_norm_(group["params"], MAX_GRADIENT)
    optimiser.step()
    return value


def batch_indices(pictures: int, config: FitConfig, step: int) -> np.ndarray[tuple[int], np.dtype[np.intp]]:
    """Which pictures step `step` (from 0) sees: reshuffled every epoch, a rest too small for a batch left out of it."""
    size = min(config.batch_size, pictures)
    epoch, place = divmod(step, pictures // size)
    order = np.random.default_rng((config.seed, epoch)).permutation(pictures)
    return order[place * size : (place + 1) * size]


def validation_loss(network: Network, normals: Normals, batch_size: int) -> float:
    """Mean loss of normals that the network was not fitted on, in evaluation mode."""
    network.eval()
    total = 0.0
    with torch.inference_mode():
        for features in normals.features(batch_size):
            total += float(network.loss(features)) * len(features[0])
    return total / len(normals)


class _Plateau:
    """Counts looks at the validation loss that brought no progress."""

    def __init__(self, patience: int, found: Counters | None = None) -> None:
        self._patience = patience
        self.best = float("inf") if found is None else found.best_loss
        self.left = patience if found is None else found.looks_left

    def see(self, loss: float) -> None:
        improved = loss < self.best * (1 - MIN_PROGRESS)
        self.left = self._patience if improved else self.left - 1
        self.best = min(self.best, loss)

    @property
    def reached(self) -> bool:
        return self.left <= 0


def _optimiser(network: Network, config: FitConfig) -> torch.optim.Adam:
    rates = {"full": config.learning_rate, "attention": config.attention_learning_rate}
    groups = [
        {"name": name, "params": parameters, "lr": rates[name], "peak": rates[name]}
        for name, parameters in network.parameters_by_rate().items()
        if parameters
    ]
    return torch.optim.Adam(groups, betas=ADAM_BETAS)


def _set_rates(optimiser: torch.optim.Optimizer, config: FitConfig, step: int, share: float) -> None:
    factor = 1.0
    if config.schedule == "cosine":
        factor = min(1.0, (step + 1) / WARM_UP_STEPS) * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))
    for group in optimiser.param_groups:
        group["lr"] = group["peak"] * factor


def _autocast(precision: str, features: Features) -> torch.autocast:
    device = features[0].device.type
    wanted = precision == "bf16" or (precision == "auto" and device == "cuda")
    return torch.autocast(device, torch.bfloat16, enabled=wanted)


@contextmanager
def process_group() -> Iterator[bool]:
    """Joins the processes that torchrun started, if any; yields whether this one is to report and write."""
    if not dist.is_torchelastic_launched():
        yield True
        return
    # Losses and flags travel on the CPU, gradients where the network is.
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield _is_first()
    finally:
        dist.destroy_process_group()


def _rank() -> int:
    return dist.get_rank() if replicas() > 1 else 0


def _is_first() -> bool:
    return _rank() == 0


def _agreed(stop: bool) -> bool:
    """Clocks differ between processes; all follow the first."""
    if replicas() == 1:
        return stop
    flag = torch.tensor([float(stop)])
    dist.broadcast(flag, 0)
    return bool(flag.item())


def git_revision() -> str:
    """The commit that this code runs from, or 'unknown' outside a work tree."""
    try:
        answer = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return answer.stdout.strip()
