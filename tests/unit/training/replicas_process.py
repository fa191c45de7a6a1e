"""What one of several processes does in test_replicas.py; the test does the same alone and compares.

Started by torch.distributed.run as `replicas_process.py DATA OUT`.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from training.config import FitConfig
from training.data import open_data
from training.fit import Places, _rank, fit, process_group, train_network
from training.methods import build
from training.modules.replicas import ReplicaNorm, mean_over_replicas, replicas
from training.modules.resnet import Features
from training.normals import Normals
from training.teacher import random_teacher

CONFIG = FitConfig(width=8, image_size=64, batch_size=4, max_steps=4, validate_every=2, seed=3, threads=1)
PICTURES = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)


class Doubled(Normals):
    """Levels as float64, so that two ways of adding up the same sums agree to many digits."""

    def take(self, indices: np.ndarray) -> Features:
        """As float64."""
        f1, f2, f3 = (level.double() for level in super().take(indices))
        return f1, f2, f3


def normed(norm: nn.BatchNorm2d) -> dict[str, Tensor]:
    """This process's share of a batch through a norm whose weights are not 1 and 0, forward and back."""
    norm.weight.data = torch.tensor([0.5, 1.0, 2.0])
    norm.bias.data = torch.tensor([0.1, 0.0, -0.3])
    whole = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 3 + 2
    x = whole[_rank() :: replicas()].clone().requires_grad_()
    y = norm.train()(x)
    (y.square() * torch.arange(1, 5)).sum().backward()
    gradients = {"gradient": x.grad, "weight": norm.weight.grad}
    found = {"y": y.detach(), "mean": norm.running_mean, "var": norm.running_var}
    return {f"norm.{name}": value for name, value in (found | gradients).items() if value is not None}


def reverse_distillation() -> dict[str, Tensor]:
    """Weights and running statistics after four steps of RD in float64."""
    pictures = Doubled(PICTURES, [], random_teacher(0))
    torch.manual_seed(0)
    config = CONFIG.model_copy(update={"method": "rd"})
    network = build(config, random_teacher(0)).double()
    train_network(network, pictures, pictures, config, lambda _: None)
    return {f"rd.{name}": value for name, value in network.state_dict().items() if not name.startswith("teacher.")}


def logicrd(data: Path, cache: Path) -> dict[str, Tensor]:
    """Validation losses and scores of a whole fit of LogicRD, cache included."""
    losses: list[float] = []
    found = fit(
        open_data(data), "p", random_teacher(0), CONFIG, lambda now: losses.append(now.validation_loss), Places(cache)
    )
    map_score = torch.from_numpy(found.score(PICTURES).map_score)
    return {"logicrd.loss": torch.tensor(losses[-1]), "logicrd.map_score": map_score}


def main(data: Path, out: Path) -> None:
    """Everything, into a file for each process."""
    torch.set_num_threads(1)
    with process_group():
        found = normed(ReplicaNorm(3)) | reverse_distillation() | logicrd(data, out / "cache")
        found["mean"] = mean_over_replicas(torch.tensor([float(_rank()), 3.0]))
        save_file({name: value.contiguous() for name, value in found.items()}, out / f"{_rank()}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
