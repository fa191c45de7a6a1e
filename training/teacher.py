"""The frozen teacher: a backbone whose levels at strides 4, 8 and 16 the student has to rebuild.

ResNet18 cut after layer 3 is our own code, with torchvision's parameter names; any other backbone comes from timm.
Weights load without executing code: safetensors, or torch's own files read as tensors alone. What a model was fitted on
is named by architecture and a hash of the weights. Used by the methods, trained by `pretrain`.
"""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.error import URLError

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import FeatureInfo
from torch import Tensor, nn
from torchvision.models import get_model_weights  # type: ignore[import-untyped]

from training.errors import ConfigError, DataError
from training.modules.resnet import Features, ResidualBlock, initialise

ARCH = "resnet18"
# Pre-trained on drawn pictures; weights/README.md says how.
SHIPPED = Path(__file__).parent / "weights" / "teacher.safetensors"
CHANNELS = (64, 128, 256)
STRIDES = (4, 8, 16)
# ImageNet mean and deviation in units of a byte: torchvision's weights expect them, our own are trained with them.
PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)
State = Mapping[str, Tensor]


class Pixels(nn.Module):
    """Pictures (B, H, W, 3) uint8 RGB to (B, 3, H, W) float32 with ImageNet's mean 0 and deviation 1."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(PIXEL_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(PIXEL_STD).view(1, 3, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """Bytes to numbers; range about -2.1 to 2.7."""
        return (image.permute(0, 3, 1, 2).float() - self.mean) / self.std


class Teacher(nn.Module):
    """Picture (B, H, W, 3) uint8 RGB to f1 (B, 64, H/4, W/4), f2 (B, 128, H/8, W/8), f3 (B, 256, H/16, W/16)."""

    arch = ARCH
    channels = CHANNELS

    def __init__(self) -> None:
        super().__init__()
        self.pixels = Pixels()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(ResidualBlock(64, 64, 1), ResidualBlock(64, 64, 1))
        self.layer2 = nn.Sequential(ResidualBlock(64, 128, 2), ResidualBlock(128, 128, 1))
        self.layer3 = nn.Sequential(ResidualBlock(128, 256, 2), ResidualBlock(256, 256, 1))
        initialise(self)

    def forward(self, image: Tensor) -> Features:
        """Normalises the bytes, then layers 1 to 3."""
        x = self.maxpool(torch.relu(self.bn1(self.conv1(self.pixels(image)))))
        f1 = self.layer1(x)
        f2 = self.layer2(f1)
        return f1, f2, self.layer3(f2)


class TimmTeacher(nn.Module):
    """Any timm backbone with `features_only` levels at strides 4, 8 and 16; same tensors in and out as `Teacher`."""

    channels: tuple[int, int, int]

    def __init__(self, arch: str) -> None:
        super().__init__()
        self.arch = arch
        self.pixels = Pixels()
        levels = _levels(arch)
        self.body = _features(arch, levels)
        c1, c2, c3 = _info(self.body).channels()
        self.channels = (c1, c2, c3)

    def forward(self, image: Tensor) -> Features:
        """The three levels, shallow first."""
        f1, f2, f3 = self.body(self.pixels(image))
        return f1, f2, f3


AnyTeacher = Teacher | TimmTeacher


def empty_teacher(arch: str) -> AnyTeacher:
    """The network of that name with untrained weights; raises ConfigError for a backbone that cannot serve."""
    return (Teacher() if arch == ARCH else TimmTeacher(arch)).eval()


def random_teacher(seed: int, arch: str = ARCH) -> AnyTeacher:
    """A teacher with weights drawn from `seed`, for tests and as the baseline that pre-training must beat."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return empty_teacher(arch)


def load_teacher(path: Path, arch: str = ARCH, sha256: str | None = None) -> AnyTeacher:
    """Loads a safetensors file in torchvision's or timm's names; layers beyond level 3 in the file are ignored.

    Raises DataError where the file is another format (a pickle is refused unread), lacks a tensor, has another shape or
    values that are not finite, or where the hash of the weights is not `sha256` (its first digits are enough).
    """
    try:
        tensors = load_file(path)
    except FileNotFoundError as error:
        raise DataError(f"weights '{path}': no such file") from error
    except (SafetensorError, OSError) as error:
        raise DataError(f"weights '{path}': not safetensors ({error}); convert it, pickles are refused") from error
    return _checked(_filled(empty_teacher(arch), tensors, str(path)), sha256, str(path))


def named_teacher(name: str, sha256: str | None = None) -> AnyTeacher:
    """Fetches published weights: 'torchvision/resnet18', 'timm/wide_resnet50_2.tv_in1k'; needs the network once.

    torchvision checks the file against the hash in its name. Raises ConfigError for an unknown name, DataError where
    the weights cannot be had or are not those of `sha256`.
    """
    source, _, model = name.partition("/")
    fetch: Callable[[str], tuple[str, State]] | None = {"torchvision": _torchvision, "timm": _timm}.get(source)
    if fetch is None or not model:
        raise ConfigError(f"teacher '{name}': write torchvision/<model>, timm/<model>, or give a file")
    try:
        arch, tensors = fetch(model)
    except (URLError, OSError) as error:
        raise DataError(f"teacher '{name}': weights cannot be fetched ({error}); give a file instead") from error
    return _checked(_filled(empty_teacher(arch), tensors, name), sha256, name)


def weights_sha256(module: nn.Module) -> str:
    """Hash over names, shapes and float32 values of the weights: the same for every file format and storage type."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if not name.endswith("num_batches_tracked"):
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _levels(arch: str) -> tuple[int, ...]:
    try:
        strides = _info(_features(arch, None)).reduction()
    except (RuntimeError, ValueError, AttributeError, TypeError) as error:
        raise ConfigError(f"teacher '{arch}': timm offers no features of it ({error})") from error
    if not set(STRIDES) <= set(strides):
        raise ConfigError(f"teacher '{arch}': has levels at strides {strides}, needed are {STRIDES}")
    return tuple(strides.index(stride) for stride in STRIDES)


def _features(arch: str, levels: tuple[int, ...] | None) -> nn.Module:
    return timm.create_model(arch, features_only=True, out_indices=levels, pretrained=False)


def _info(body: nn.Module) -> FeatureInfo:
    info = body.feature_info
    if not isinstance(info, FeatureInfo):
        raise TypeError(f"timm's {type(body).__name__} does not describe its features")
    return info


def _torchvision(model: str) -> tuple[str, State]:
    try:
        weights = get_model_weights(model)["IMAGENET1K_V1"]
    except (ValueError, KeyError) as error:
        raise ConfigError(f"teacher 'torchvision/{model}': no ImageNet V1 weights of that name") from error
    return model, weights.get_state_dict(progress=False, check_hash=True, weights_only=True)


def _timm(model: str) -> tuple[str, State]:
    if not timm.is_model(model):
        raise ConfigError(f"teacher 'timm/{model}': no such model in timm {timm.__version__}")
    return model.partition(".")[0], timm.create_model(model, pretrained=True).state_dict()


def _filled(teacher: AnyTeacher, tensors: State, where: str) -> AnyTeacher:
    wanted = teacher.state_dict()
    for name, tensor in wanted.items():
        if name.endswith("num_batches_tracked"):
            continue
        # Published files know nothing of the wrapper around timm's backbone.
        found = tensors.get(name, tensors.get(name.removeprefix("body.")))
        if found is None or found.shape != tensor.shape:
            shape = "nothing" if found is None else tuple(found.shape)
            raise DataError(f"weights '{where}': tensor '{name}' must be {tuple(tensor.shape)}, found {shape}")
        if not torch.isfinite(found).all():
            raise DataError(f"weights '{where}': tensor '{name}' holds values that are not finite")
        wanted[name] = found.float()
    teacher.load_state_dict(wanted)
    return teacher.eval()


def _checked(teacher: AnyTeacher, sha256: str | None, where: str) -> AnyTeacher:
    found = weights_sha256(teacher)
    if sha256 is not None and not found.startswith(sha256.lower()):
        raise DataError(f"weights '{where}': hash is {found}, expected {sha256}; is it another training run's file?")
    return teacher
