"""A product small enough to fit in seconds: pictures of 64 x 64, an embedding of 8 channels, four steps."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from training.config import FitConfig
from training.data import LocoFolder, open_loco
from training.detector import Detector
from training.fit import fit
from training.teacher import random_teacher

SPLITS = {"train/good": 6, "validation/good": 4, "test/good": 3, "test/logical_anomalies": 2}
TINY = FitConfig(width=8, image_size=64, batch_size=4, max_steps=4, validate_every=2, seed=3)


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
def folder(loco: Path) -> LocoFolder:
    return open_loco(loco, need_test=True)


@pytest.fixture(scope="session")
def detector(folder: LocoFolder) -> Detector:
    """A fitted detector; tests must not change it."""
    return fit(folder, "tiny-part", random_teacher(0), TINY, ignore)
