"""A product small enough to fit in seconds: pictures of 64 x 64, an embedding of 8 channels, four steps."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from training.config import FitConfig
from training.data import DataFolder, open_data
from training.detector import Detector
from training.fit import fit
from training.modules.resnet import Features
from training.normals import features_of
from training.teacher import Teacher, random_teacher

SPLITS = {"train/good": 6, "validation/good": 4, "test/good": 3, "test/logical_anomalies": 2}
TINY = FitConfig(width=8, image_size=64, batch_size=4, max_steps=4, validate_every=2, seed=3)


# One thread: results do not hang on the machine's cores, and small tensors are no faster on two.
torch.set_num_threads(1)


@dataclass(frozen=True)
class Recorded:
    """Levels of some pictures as a FeatureSource, all in memory."""

    levels: Features

    def __len__(self) -> int:
        return len(self.levels[0])

    def features(self, batch_size: int) -> Iterator[Features]:
        """In order, in batches."""
        for start in range(0, len(self), batch_size):
            f1, f2, f3 = (level[start : start + batch_size] for level in self.levels)
            yield f1, f2, f3

    def take(self, indices: Sequence[int]) -> Features:
        """Some of them."""
        f1, f2, f3 = (level[list(indices)] for level in self.levels)
        return f1, f2, f3


def ignore(_: object) -> None:
    """A progress report that nobody reads."""


@pytest.fixture(scope="session")
def loco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LOCO folder of coloured noise."""
    root = tmp_path_factory.mktemp("data") / "tiny-part"
    generator = np.random.default_rng(0)
    for split, count in {**SPLITS, "test/structural_anomalies": 2}.items():
        (root / split).mkdir(parents=True)
        for index in range(count):
            noise = generator.integers(0, 256, size=(9, 12, 3), dtype=np.uint8)
            picture = cv2.resize(noise, (96, 72), interpolation=cv2.INTER_CUBIC)
            assert cv2.imwrite(str(root / split / f"{index:03d}.png"), picture)
    return root


@pytest.fixture(scope="session")
def folder(loco: Path) -> DataFolder:
    return open_data(loco, need_test=True)


@pytest.fixture(scope="session")
def detector(folder: DataFolder) -> Detector:
    """A fitted detector; tests must not change it."""
    return fit(folder, "tiny-part", random_teacher(0), TINY, ignore)


@pytest.fixture(scope="session")
def rivals(folder: DataFolder, detector: Detector) -> dict[str, Detector]:
    """A fitted detector of each method; tests must not change them."""
    rd, dskd = (TINY.model_copy(update={"method": method}) for method in ("rd", "dskd"))
    return {
        "logicrd": detector,
        "rd": fit(folder, "tiny-part", random_teacher(0), rd, ignore),
        "dskd": fit(folder, "tiny-part", random_teacher(0), dskd, ignore),
    }


@pytest.fixture(scope="session")
def teacher() -> Teacher:
    """An untrained teacher; tests must not change it."""
    found = random_teacher(0).requires_grad_(False)
    assert isinstance(found, Teacher)
    return found


@pytest.fixture(scope="session")
def normal_pictures() -> NDArray[np.uint8]:
    """24 pictures that share a ground and differ in a spot's place and in a little noise."""
    generator = np.random.default_rng(5)
    ground = cv2.resize(generator.integers(60, 200, (8, 8, 3), dtype=np.uint8), (64, 64))
    pictures = []
    for _ in range(24):
        picture = cv2.circle(ground.copy(), tuple(int(v) for v in generator.integers(12, 52, 2)), 7, (220, 40, 40), -1)
        noise = generator.normal(0, 4, picture.shape)
        pictures.append(np.clip(picture + noise, 0, 255).astype(np.uint8))
    return np.stack(pictures)


@pytest.fixture(scope="session")
def normals(teacher: Teacher, normal_pictures: NDArray[np.uint8]) -> Recorded:
    """The teacher's levels of `normal_pictures`."""
    return Recorded(features_of(teacher, torch.from_numpy(normal_pictures)))
