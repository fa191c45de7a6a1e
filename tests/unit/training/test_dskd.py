"""The two students: what each of them sees, the affinity distance, and that both learn."""

import pytest
import torch

from training.dskd import CONDENSED_CHANNELS, Condensing, DualStudent, affinity_distance, affinity_distances
from training.stages import Method, run_stages

LEVELS = ("f1", "f2", "f3")


@pytest.fixture
def network(teacher) -> DualStudent:
    torch.manual_seed(0)
    return DualStudent(teacher, 8, 64).eval()


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_shapes_and_wiring(network, normals):
    """Both students rebuild all levels; the map has the size of level 1; the descriptor is the teacher's alone."""
    assert isinstance(network, Method)
    with torch.inference_mode():
        known = run_stages(network, network.wiring, dict(zip(LEVELS, normals.take(range(2)), strict=True)))
    for index, level in enumerate(LEVELS, start=1):
        assert known[f"d{index}"].shape == known[f"e{index}"].shape == known[level].shape
    assert known["embedding"].shape == known["context"].shape == (2, 8, 2, 2)
    assert known["descriptor"].shape == (2, 896)
    assert known["anomaly_map"].shape == (2, 16, 16)
    assert known["map_score"].shape == (2, 1)


def test_affinity_of_equal_features_is_zero():
    level = noise(2, 6, 4, 4)
    assert affinity_distance(level, level).shape == (2, 1, 4, 4)
    assert affinity_distance(level, level).abs().max() < 1e-5


def test_affinity_knows_relations_not_directions():
    """Turning all features by one rotation, or scaling each position, changes no relation; moving a position does."""
    level = noise(2, 6, 4, 4)
    rotation, _ = torch.linalg.qr(noise(6, 6, seed=1))
    turned = torch.einsum("cd,bdhw->bchw", rotation, level) * (noise(2, 1, 4, 4, seed=2).abs() + 0.1)
    assert affinity_distance(level, turned).abs().max() < 1e-4
    moved = level.clone()
    moved[0, :, 0, 0] = -moved[0, :, 3, 3]
    changed = affinity_distance(level, moved)
    assert changed[0, 0, 0, 0] > 0.5
    assert changed[1].abs().max() < 1e-5
    assert changed.max() <= 2


def test_affinities_of_all_levels_lie_on_level_3():
    levels = [noise(2, c, s, s) for c, s in ((4, 16), (6, 8), (8, 4))]
    assert [d.shape for d in affinity_distances(levels, levels)] == [(2, 1, 4, 4)] * 3


def test_affinity_of_constant_features_is_finite():
    """A picture of one colour has no relations: the distance is 1, and so is finite, with its gradient."""
    flat = torch.ones(1, 6, 4, 4, requires_grad=True)
    distance = affinity_distance(flat, noise(1, 6, 4, 4))
    distance.sum().backward()
    assert torch.isfinite(distance).all()
    assert torch.isfinite(flat.grad).all()


def test_context_is_condensed():
    """What the few channels of the condensed context cannot see does not reach it, and what passes has no place."""
    torch.manual_seed(0)
    condense = Condensing(48, 4).double().eval()
    embedding = noise(2, 48, 4, 4).double()
    reduce = condense.reduce.weight.flatten(1)
    blind = torch.linalg.svd(reduce, full_matrices=True).Vh[CONDENSED_CHANNELS:]
    unseen = torch.einsum("rc,brhw->bchw", blind, noise(2, len(blind), 4, 4, seed=1).double())
    assert torch.allclose(condense(embedding + 5 * unseen), condense(embedding), atol=1e-8)
    seen = torch.einsum("rc,brhw->bchw", reduce, noise(2, CONDENSED_CHANNELS, 4, 4, seed=1).double())
    assert not torch.allclose(condense(embedding + 5 * seen), condense(embedding), atol=1e-2)


def test_context_passes_one_vector():
    """The condensed context is `width` numbers a picture: its Jacobian by the embedding has no higher rank."""
    torch.manual_seed(0)
    condense = Condensing(8, 4).double().eval()
    embedding = noise(1, 8, 4, 4).double()
    jacobian = torch.autograd.functional.jacobian(condense, embedding).reshape(128, 128)
    assert torch.linalg.matrix_rank(jacobian) <= 8


def test_global_student_sees_the_context_alone(network, normals):
    """Another local embedding changes no level of the global student, and another context none of the local one."""
    with torch.inference_mode():
        detail, context, _ = network.bottleneck(*normals.take(range(2)))
        before = network.student(detail, context)
        by_detail, by_context = network.student(detail + 1, context), network.student(detail, context + 1)
    assert [not torch.equal(a, b) for a, b in zip(before, by_detail, strict=True)] == [True] * 3 + [False] * 3
    assert [not torch.equal(a, b) for a, b in zip(before, by_context, strict=True)] == [False] * 3 + [True] * 3


def test_loss_falls_and_reaches_every_weight(network, normals):
    weights = network.parameters_by_rate()["full"]
    optimiser = torch.optim.Adam(weights, lr=2e-3)
    losses = []
    for _ in range(3):
        optimiser.zero_grad()
        loss = network.train().loss(normals.take(range(8)))
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    assert all(weight.grad is not None for weight in weights)


def test_settle_norms_all_six_maps(network, normals):
    """Mean 0 and deviation 1 each on the normals given."""
    network.settle(normals)
    maps = network._distances(normals.levels)
    normed = network.map.normed
    values = (normed.smoothing(maps) - normed.offset[:, None, None]) * normed.gain[:, None, None]
    assert len(maps) == 6
    assert values.mean(dim=(0, 2, 3)).abs().max() < 1e-3
    assert (values.std(dim=(0, 2, 3), correction=0) - 1).abs().max() < 1e-2
