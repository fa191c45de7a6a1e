"""Fitting: it learns, it stops, it repeats, and it never looks at the test split."""

import dataclasses

import numpy as np
import pytest
import torch

from training.config import FitConfig
from training.detector import measure
from training.errors import TrainingError
from training.fit import fit, train_network, validation_loss
from training.teacher import random_teacher

PICTURES = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)


@pytest.fixture
def config():
    return FitConfig(width=8, image_size=64, batch_size=4, max_steps=8, validate_every=3, seed=3)


def test_loss_falls_on_normals(config):
    """Eight steps on eight pictures bring the loss well below the untrained network's."""
    seen: list[float] = []
    network = train_network(PICTURES, PICTURES, random_teacher(0), config, lambda now: seen.append(now.loss))
    assert len(seen) == 8
    assert validation_loss(network, PICTURES, 4) < 0.8 * seen[0]


def test_plateau_ends_the_run(config):
    """With a learning rate that cannot move anything, patience runs out long before the steps do."""
    slow = config.model_copy(update={"learning_rate": 1e-12, "patience": 2, "validate_every": 1, "max_steps": 500})
    steps: list[int] = []
    train_network(PICTURES, PICTURES, random_teacher(0), slow, lambda now: steps.append(now.step))
    assert steps[-1] < 20


def test_time_budget_ends_the_run(config):
    """A budget of a hundredth of a second allows one step."""
    short = config.model_copy(update={"max_minutes": 1 / 6000, "max_steps": 500})
    shares: list[float] = []
    train_network(PICTURES, PICTURES, random_teacher(0), short, lambda now: shares.append(now.share))
    assert shares == [1.0]


def test_same_seed_same_weights(config):
    """Two runs of the same steps end in the same scores, bit for bit."""
    runs = [train_network(PICTURES, PICTURES, random_teacher(0), config, lambda _: None) for _ in range(2)]
    first, second = (measure(network, PICTURES) for network in runs)
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_broken_teacher_is_reported(config):
    """A loss that is not finite ends the run with the step and a remedy."""
    teacher = random_teacher(0)
    with torch.no_grad():
        teacher.conv1.weight.fill_(torch.nan)
    with pytest.raises(TrainingError, match="step 1: the loss is nan"):
        train_network(PICTURES, PICTURES, teacher, config, lambda _: None)


def test_fit_needs_no_test_split(folder, detector):
    """Without a test split the result is the same: nothing of it is used."""
    config = FitConfig(width=8, image_size=64, batch_size=4, max_steps=4, validate_every=2, seed=3)
    again = fit(dataclasses.replace(folder, test={}), "tiny-part", random_teacher(0), config, lambda _: None)
    assert again.description.calibration == detector.description.calibration
    assert again.description.metrics is None
