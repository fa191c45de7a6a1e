"""The gate: what lies outside the normal subspace cannot pass, and the gates open for normals and shut for the rest."""

import pytest
import torch

from training.modules.nii import MOMENTUM, Inhibition

CHANNELS, RANK = 12, 5


@pytest.fixture
def gate() -> Inhibition:
    """A gate fitted on features of a five-dimensional subspace; limits 0.1 to 0.3 and 0.2 to 0.6."""
    found = Inhibition(CHANNELS, RANK).eval()
    vectors = subspace() @ torch.randn(RANK, 500, generator=torch.Generator().manual_seed(1))
    found.set_subspace(vectors @ vectors.t() / 500)
    found.set_limits((0.1, 0.3), (0.2, 0.6))
    return found


def subspace() -> torch.Tensor:
    """(12, 5) orthonormal columns."""
    basis, _ = torch.linalg.qr(torch.randn(CHANNELS, CHANNELS, generator=torch.Generator().manual_seed(0)))
    return basis[:, :RANK]


def inside(batch: int = 2, seed: int = 2) -> torch.Tensor:
    """(B, 12, 3, 3) features within the subspace."""
    codes = torch.randn(batch, RANK, 3, 3, generator=torch.Generator().manual_seed(seed))
    return torch.einsum("cr,brhw->bchw", subspace(), codes)


def outside(batch: int = 2) -> torch.Tensor:
    """(B, 12, 3, 3) features orthogonal to the subspace."""
    noise = torch.randn(batch, CHANNELS, 3, 3, generator=torch.Generator().manual_seed(3))
    return noise - torch.einsum("cr,dr,bdhw->bchw", subspace(), subspace(), noise)


def test_directions_are_orthonormal(gate):
    directions = gate.directions.flatten(1)
    assert torch.allclose(directions @ directions.t(), torch.eye(RANK), atol=1e-5)


def test_what_lies_outside_is_removed_exactly(gate):
    """A normal feature with a foreign part added is projected as the normal feature alone; a foreign one to nothing."""
    normal, foreign = inside(), outside()
    projected, residual, _ = gate.measure(normal + 3 * foreign, normal)
    assert torch.allclose(projected, normal, atol=1e-4)
    assert gate.measure(foreign, normal)[0].abs().max() < 1e-5
    assert gate.measure(foreign, normal)[1].min() > 1 - 1e-5
    assert gate.measure(normal, normal)[1].abs().max() < 1e-5
    assert ((residual > 0) & (residual < 1)).all()


def test_open_for_the_median_normal_and_shut_beyond_the_limits(gate):
    """0.98 at both medians; 0 from the limit of the agreement on, half at that of the residual and less beyond."""

    def opening(residual: float, agreement: float) -> float:
        return float(gate.opening(torch.tensor(residual), torch.tensor(agreement)))

    assert opening(0.1, 0.2) == pytest.approx(0.98, abs=1e-3)
    assert opening(0.0, 0.0) > 0.98
    assert opening(0.3, 0.2) == pytest.approx(0.5)
    assert opening(0.5, 0.2) == pytest.approx(0.02, abs=1e-3)
    assert opening(1.0, 0.2) < 1e-5
    assert opening(0.0, 0.4) == pytest.approx(0.5, abs=0.01)
    assert opening(0.0, 0.6) == 0
    assert opening(0.0, 2.0) == 0


def test_a_normal_patch_in_the_wrong_place_does_not_pass(gate):
    """The logical anomaly: the feature is normal, but the student expects another; where they agree it flows."""
    seen, expected = inside(seed=4), inside(seed=4).clone()
    expected[:, :, 1, 1] *= -1
    passed = gate(seen, expected)
    assert passed[:, :, 1, 1].abs().max() == 0
    assert torch.allclose(passed[:, :, 0, 0], seen[:, :, 0, 0], rtol=0.03, atol=1e-4)


def test_no_gradient_runs_through_the_gates(gate):
    """What the student expects opens or shuts, and does not learn to open: no gradient of its own."""
    expected = inside(seed=5).requires_grad_()
    seen = inside(seed=5)
    weight = torch.ones(CHANNELS, requires_grad=True)
    (gate(seen, expected * weight[None, :, None, None]).sum() + 0 * weight.sum()).backward()
    assert expected.grad is None or expected.grad.abs().max() == 0
    assert weight.grad.abs().max() == 0
    assert not any(p.requires_grad for p in gate.parameters())


def test_limits_run_along_in_training_only(gate):
    """Each batch pulls them a twentieth of the way to its own median and 99 % quantile; scoring leaves them alone."""
    seen, expected = inside(8) + 0.3 * outside(8), inside(8)
    gate.eval()(seen, expected)
    assert gate.residual.tolist() == pytest.approx([0.1, 0.3])
    _, residual, agreement = gate.measure(seen, expected)
    gate.train()(seen, expected)
    for running, start, values in ((gate.residual, (0.1, 0.3), residual), (gate.agreement, (0.2, 0.6), agreement)):
        ordered = values.flatten().sort().values
        batch = (float(ordered[len(ordered) // 2]), float(ordered[int(0.99 * (len(ordered) - 1))]))
        moved = [old + MOMENTUM * (new - old) for old, new in zip(start, batch, strict=True)]
        assert running.tolist() == pytest.approx(moved, abs=1e-6)


def test_limits_that_meet_do_not_divide_by_zero(gate):
    """Normals all alike give one limit; the gate is then sharp, and finite."""
    gate.set_limits((0.1, 0.1), (0.2, 0.2))
    assert torch.isfinite(gate(inside(), inside())).all()


def test_zero_features_stay_zero(gate):
    nothing = torch.zeros(1, CHANNELS, 3, 3)
    assert gate(nothing, nothing).abs().max() == 0
