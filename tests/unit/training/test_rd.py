"""Reverse distillation: shapes, the official loss, the map and its smoothing."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from training.modules.bottleneck import Bottleneck
from training.modules.decoder import Decoder
from training.rd import AnomalyMap, ReverseDistillation, cosine_distance, distillation_loss, smoothing_matrix
from training.teacher import CHANNELS, random_teacher


def levels(batch: int, side: int = 16, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    f1, f2, f3 = (torch.rand(batch, c, side >> i, side >> i, generator=generator) for i, c in enumerate(CHANNELS))
    return f1, f2, f3


@pytest.mark.parametrize("width", [8, 256])
def test_shapes_from_end_to_end(width):
    """Embedding and rebuilt levels have the sizes of the served tensors, at any width."""
    f = levels(2, side=64)
    embedding, descriptor = Bottleneck(CHANNELS, width)(*f)
    assert embedding.shape == (2, width, 8, 8)
    assert descriptor.shape == (2, 384)
    assert [d.shape for d in Decoder(CHANNELS, width)(embedding)] == [t.shape for t in f]


def test_parameters_at_the_published_width():
    """Hand-counted from the official shapes: 11.7 M less two unused layers, and 3.7 M."""
    count = [sum(p.numel() for p in m.parameters()) for m in (Bottleneck(CHANNELS, 512), Decoder(CHANNELS, 512))]
    assert count[0] == pytest.approx(11.7e6, rel=0.01)
    assert count[1] == pytest.approx(3.7e6, rel=0.01)


def test_loss_is_the_flattened_cosine():
    """Recomputed level by level in numpy, as the official code does it."""
    f, d = levels(3), levels(3, seed=1)
    total = 0.0
    for a, b in zip(f, d, strict=True):
        x, y = a.reshape(3, -1).numpy(), b.reshape(3, -1).numpy()
        total += (1 - (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)).mean()
    assert distillation_loss(f, d).item() == pytest.approx(total, abs=1e-5)


def test_loss_of_equal_features_is_zero():
    assert distillation_loss(levels(2), levels(2)).item() == pytest.approx(0, abs=1e-5)


def test_cosine_distance_bounds():
    """0 for equal directions, 2 for opposite ones, 1 where a vector is zero: no division by zero."""
    a = torch.tensor([1.0, 2.0]).view(1, 2, 1, 1)
    for other, expected in ((3 * a, 0.0), (-a, 2.0), (0 * a, 1.0)):
        assert cosine_distance(a, other).item() == pytest.approx(expected, abs=1e-6)


def test_smoothing_is_scipys_gaussian():
    """Sigma 1, four sigmas each side, mirrored at the border without repeating the edge."""
    x = np.random.default_rng(0).random((64, 64)).astype(np.float32)
    s = smoothing_matrix(64).numpy()
    assert np.abs(s @ x @ s.T - gaussian_filter(x, 1.0, mode="mirror", truncate=4.0)).max() < 1e-6


def test_map_score_is_the_maximum_and_place_is_kept():
    """A foreign vector at one place of level 1 peaks there, and the score is that peak."""
    f, d = levels(1), levels(1)
    d[0][0, :, 5, 9] *= -1
    anomaly_map, score = AnomalyMap(16)(*f, *d)
    assert np.unravel_index(int(anomaly_map.argmax()), (16, 16)) == (5, 9)
    assert score.item() == anomaly_map.max().item()


def test_training_mode_leaves_the_teacher_alone():
    """Its norms keep their statistics and no gradient reaches it."""
    network = ReverseDistillation(random_teacher(0), 8, 64).train()
    before = network.teacher.bn1.running_mean.clone()
    network.loss(torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)).backward()
    assert torch.equal(before, network.teacher.bn1.running_mean)
    assert all(p.grad is None for p in network.teacher.parameters())
    assert all(p.grad is not None for p in network.student.parameters())
