"""Reverse distillation: shapes, the official loss, the map and its smoothing."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from training.modules.bottleneck import Bottleneck
from training.modules.decoder import Decoder
from training.modules.distances import cosine_distance, distillation_loss
from training.modules.maps import NormedMap, SummedMap, smoothing_matrix
from training.rd import ReverseDistillation
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
    assert descriptor.shape == (2, 896)
    assert [d.shape for d in Decoder(CHANNELS, width)(embedding)] == [t.shape for t in f]


def test_parameters_at_the_published_width():
    """Counted by hand from the layers of the official code: 12.24 M less 0.53 M of two unused layers, and 3.65 M."""
    count = [sum(p.numel() for p in m.parameters()) for m in (Bottleneck(CHANNELS, 512), Decoder(CHANNELS, 512))]
    halvings = 9 * (64 * 128 + 128 * 256 + 128 * 256) + 2 * (128 + 256 + 256)
    first = 9 * (768 * 512 + 512 * 512) + 768 * 512 + 3 * 2 * 512
    second = 9 * 2 * 512 * 512 + 2 * 2 * 512
    assert count[0] == halvings + first + second
    stages = [
        2 * 4 * c_in * c_out + 9 * c_out * c_out + 3 * 2 * c_out + 2 * 9 * c_out * c_out + 2 * 2 * c_out
        for c_in, c_out in ((512, 256), (256, 128), (128, 64))
    ]
    assert count[1] == sum(stages)
    assert (round(count[0] / 1e6, 1), round(count[1] / 1e6, 1)) == (11.7, 3.7)


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
    anomaly_map, score = SummedMap(16)(*f, *d)
    assert np.unravel_index(int(anomaly_map.argmax()), (16, 16)) == (5, 9)
    assert score.item() == anomaly_map.max().item()


def test_normed_maps_have_mean_0_and_deviation_1_on_normals():
    """After `settle` each map has; so the sum of three has mean 0, and no map of large values drowns the others."""
    generator = torch.Generator().manual_seed(0)
    sizes, loudness = (16, 8, 4), (0.01, 1.0, 30.0)
    batches = [
        [a * torch.rand(n, 1, s, s, generator=generator) for s, a in zip(sizes, loudness, strict=True)] for n in (8, 5)
    ]
    normed = NormedMap(16, maps=3)
    normed.settle(batches)
    whole = [torch.cat(parts) for parts in zip(*batches, strict=True)]
    maps = (normed.smoothing(whole) - normed.offset[:, None, None]) * normed.gain[:, None, None]
    assert maps.mean(dim=(0, 2, 3)).abs().max() < 1e-4
    assert (maps.std(dim=(0, 2, 3)) - 1).abs().max() < 1e-3
    assert normed(whole)[0] == pytest.approx(maps.sum(dim=1), abs=1e-4)


def test_normed_score_is_the_mean_of_the_highest_hundredth():
    """Of 64 x 64 positions the 41 highest; nothing is clamped."""
    generator = torch.Generator().manual_seed(1)
    maps, score = NormedMap(64, maps=2)([-torch.rand(2, 1, 64, 64, generator=generator) for _ in range(2)])
    highest = np.sort(maps.reshape(2, -1).numpy(), axis=1)[:, -41:]
    assert score[:, 0].numpy() == pytest.approx(highest.mean(axis=1), abs=1e-5)
    assert score.max() < 0


def test_training_leaves_the_teacher_alone():
    """It is frozen, and its levels are all that the loss sees of it."""
    network = ReverseDistillation(random_teacher(0), 8, 64).train()
    network.loss(levels(2)).backward()
    assert not any(p.requires_grad for p in network.teacher.parameters())
    assert all(p.grad is None for p in network.teacher.parameters())
    assert all(p.grad is not None for p in network.student.parameters())
