"""Fitting: it learns, it stops, it repeats, and it never looks at the test split."""

import dataclasses
from itertools import pairwise

import numpy as np
import pytest
import torch

from training.config import FitConfig
from training.detector import measure
from training.errors import TrainingError
from training.fit import batch_indices, fit, train_network, validation_loss
from training.methods import build
from training.normals import Normals
from training.teacher import random_teacher

PICTURES = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)


CONFIG = FitConfig(width=8, image_size=64, batch_size=4, max_steps=8, validate_every=3, seed=3)


@pytest.fixture(params=["rd", "dskd", "logicrd"])
def config(request):
    return CONFIG.model_copy(update={"method": request.param})


@pytest.fixture(scope="module")
def pictures(teacher):
    """Eight pictures without a cache: their levels come from the teacher each time."""
    return Normals(PICTURES, [], teacher)


def trained(pictures, config, report=lambda _: None):
    """A network after the run that `config` asks for."""
    torch.manual_seed(0)
    network = build(config, pictures._teacher)
    network.prepare(pictures)
    train_network(network, pictures, pictures, config, report)
    return network


def test_loss_falls_on_normals(config, pictures):
    """Eight steps on eight pictures bring the loss well below the untrained network's, with every method."""
    seen: list[float] = []
    quick = config.model_copy(update={"schedule": "constant"})
    network = trained(pictures, quick, lambda now: seen.append(now.loss))
    assert len(seen) == 8
    assert validation_loss(network, pictures, 4) < 0.9 * seen[0]


def test_same_seed_same_weights(config, pictures):
    """Two runs of the same steps end in the same scores, bit for bit."""
    short = config.model_copy(update={"max_steps": 3})
    first, second = (measure(trained(pictures, short), PICTURES) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_plateau_ends_the_run(pictures):
    """With a learning rate that cannot move anything, patience runs out long before the steps do."""
    still = {"method": "rd", "learning_rate": 1e-12, "patience": 2, "validate_every": 1, "max_steps": 500}
    steps: list[int] = []
    trained(pictures, CONFIG.model_copy(update=still), lambda now: steps.append(now.step))
    assert steps[-1] < 40


def test_time_budget_ends_the_run(pictures):
    """A budget of a hundredth of a second allows one step."""
    short = CONFIG.model_copy(update={"max_minutes": 1 / 6000, "max_steps": 500})
    shares: list[float] = []
    trained(pictures, short, lambda now: shares.append(now.share))
    assert len(shares) == 1


def test_cosine_rates_rise_then_fall_to_nothing(pictures):
    """Warm-up from the first step, and a last step that hardly moves a weight."""
    changes = {"method": "rd", "schedule": "cosine", "max_steps": 30, "batch_size": 2, "validate_every": 100}
    config = CONFIG.model_copy(update=changes)
    weights: list[torch.Tensor] = []
    network = build(config, pictures._teacher)

    def note(_: object) -> None:
        weights.append(network.student.stage1[1].conv2.weight.detach().clone())

    train_network(network, pictures, pictures, config, note)
    moves = [float((b - a).abs().mean()) for a, b in pairwise(weights)]
    assert moves[-1] < 0.1 * max(moves)
    assert max(moves) > 0


def test_attention_learns_at_its_own_rate(pictures):
    """LogicRD's semantics are the slow group, all other trained weights the full one, and none is in both."""
    network = build(CONFIG, pictures._teacher)
    groups = network.parameters_by_rate()
    assert groups.keys() == {"full", "attention"}
    held = [id(p) for group in groups.values() for p in group]
    assert len(held) == len(set(held))
    assert set(held) == {id(p) for p in network.parameters() if p.requires_grad}
    assert {id(p) for p in groups["attention"]} == {id(p) for p in network.bottleneck.gse.parameters()}


def test_every_epoch_shows_every_picture_once():
    """Batches of an epoch do not overlap, epochs differ, and a step's batch depends on seed and step alone."""
    config = CONFIG.model_copy(update={"batch_size": 3})
    epochs = [np.concatenate([batch_indices(10, config, 3 * e + s) for s in range(3)]) for e in range(2)]
    assert all(len(set(epoch.tolist())) == 9 for epoch in epochs)
    assert not np.array_equal(epochs[0], epochs[1])
    assert np.array_equal(batch_indices(10, config, 4), epochs[1][3:6])
    assert sorted(batch_indices(2, config, 7).tolist()) == [0, 1]


def test_broken_teacher_is_reported():
    """A loss that is not finite ends the run with the step and a remedy."""
    teacher = random_teacher(0)
    with torch.no_grad():
        teacher.conv1.weight.fill_(torch.nan)
    config = CONFIG.model_copy(update={"method": "rd"})
    with pytest.raises(TrainingError, match="step 1: the loss is nan"):
        trained(Normals(PICTURES, [], teacher), config)


def test_fit_needs_no_test_split(folder, detector):
    """Without a test split the result is the same: nothing of it is used."""
    config = CONFIG.model_copy(update={"max_steps": 4, "validate_every": 2})
    again = fit(dataclasses.replace(folder, test={}), "tiny-part", random_teacher(0), config, lambda _: None)
    assert again.description.calibration == detector.description.calibration
    assert again.description.metrics is None


def test_feature_cache_changes_the_run_by_rounding_alone(folder):
    """Features kept as FP16 or computed anew: the same losses but for the last digits."""
    runs: list[list[float]] = []
    for cached in (True, False):
        config = CONFIG.model_copy(update={"max_steps": 3, "cache_features": cached})
        losses: list[float] = []
        fit(folder, "tiny-part", random_teacher(0), config, lambda now, seen=losses: seen.append(now.loss))
        runs.append(losses)
    assert runs[0] == pytest.approx(runs[1], abs=5e-3)
    assert runs[0] != runs[1]


def test_without_the_distance_branch_the_score_is_the_maps(folder):
    """mahalanobis: false sets the weight to nothing; the distance is still there to be read."""
    config = CONFIG.model_copy(update={"method": "rd", "max_steps": 1, "mahalanobis": False})
    found = fit(folder, "tiny-part", random_teacher(0), config, lambda _: None)
    fusion = found.description.calibration.fusion
    assert fusion.weight == 0
    scores = found.score(PICTURES)
    assert scores.score == pytest.approx((scores.map_score - fusion.map_mean) / fusion.map_std)
    assert np.isfinite(scores.mahalanobis).all()
