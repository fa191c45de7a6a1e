"""The frozen teacher: ResNet18 cut after layer 3, with torchvision's parameter names.

Weights come from a safetensors file, never a pickle and never the network; without a file they are drawn from a seed.
What a model was fitted on is named by architecture and a hash of the weights. Used by `rd`, trained by `pretrain`.
"""

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from training.errors import DataError
from training.modules.resnet import Features, ResidualBlock, initialise

ARCH = "resnet18"
CHANNELS = (64, 128, 256)
# ImageNet mean and deviation in units of a byte: torchvision's weights expect them, our own are trained with them.
PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)


class Teacher(nn.Module):
    """Picture (B, H, W, 3) uint8 RGB to f1 (B, 64, H/4, W/4), f2 (B, 128, H/8, W/8), f3 (B, 256, H/16, W/16)."""

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(ResidualBlock(64, 64, 1), ResidualBlock(64, 64, 1))
        self.layer2 = nn.Sequential(ResidualBlock(64, 128, 2), ResidualBlock(128, 128, 1))
        self.layer3 = nn.Sequential(ResidualBlock(128, 256, 2), ResidualBlock(256, 256, 1))
        self.register_buffer("pixel_mean", torch.tensor(PIXEL_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(PIXEL_STD).view(1, 3, 1, 1), persistent=False)
        initialise(self)

    def forward(self, image: Tensor) -> Features:
        """Normalises the bytes, then layers 1 to 3."""
        x = (image.permute(0, 3, 1, 2).float() - self.pixel_mean) / self.pixel_std
        x = self.maxpool(torch.relu(self.bn1(self.conv1(x))))
        f1 = self.layer1(x)
        f2 = self.layer2(f1)
        return f1, f2, self.layer3(f2)


def random_teacher(seed: int) -> Teacher:
    """A teacher with weights drawn from `seed`, for tests and as the baseline that pre-training must beat."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Teacher().eval()


def load_teacher(path: Path) -> Teacher:
    """Loads layers 1 to 3 from a safetensors file of a ResNet18; later layers in the file are ignored.

    Raises DataError where the file is another format (a pickle is refused unread), lacks a tensor or has another shape.
    """
    try:
        tensors = load_file(path)
    except FileNotFoundError as error:
        raise DataError(f"weights '{path}': no such file") from error
    except (SafetensorError, OSError) as error:
        raise DataError(f"weights '{path}': not safetensors ({error}); convert it, pickles are refused") from error
    teacher = Teacher()
    wanted = teacher.state_dict()
    for name, tensor in wanted.items():
        if name.endswith("num_batches_tracked"):
            continue
        if name not in tensors or tensors[name].shape != tensor.shape:
            found = tuple(tensors[name].shape) if name in tensors else "nothing"
            raise DataError(f"weights '{path}': tensor '{name}' must be {tuple(tensor.shape)}, found {found}")
        if not torch.isfinite(tensors[name]).all():
            raise DataError(f"weights '{path}': tensor '{name}' holds values that are not finite")
        wanted[name] = tensors[name].float()
    teacher.load_state_dict(wanted)
    return teacher.eval()


def weights_sha256(module: nn.Module) -> str:
    """Hash over names, shapes and float32 values of the weights: the same for every file format and storage type."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if not name.endswith("num_batches_tracked"):
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().float().contiguous().numpy().tobytes())
    return digest.hexdigest()
