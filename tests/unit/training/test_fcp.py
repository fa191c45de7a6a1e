"""The compensation pathway: shape, and its dropout of whole pictures."""

import torch

from training.logicrd import PATHWAY_DROPOUT, Skip
from training.modules.fcp import Compensation


def test_compensation_keeps_shape_and_shuts_by_picture():
    """A picture whose pathway is shut gets nothing at all; the others what they would get anyway."""
    pathway = Compensation(6, 5).eval()
    passed = torch.randn(3, 6, 4, 4, generator=torch.Generator().manual_seed(0))
    kept = torch.tensor([1.0, 0.0, 1.0]).view(3, 1, 1, 1)
    whole, some = pathway(passed), pathway(passed, kept)
    assert whole.shape == (3, 5, 4, 4)
    assert torch.equal(some[[0, 2]], whole[[0, 2]])
    assert some[1].abs().max() == 0


def test_pathway_is_dropped_for_some_pictures_in_training_only():
    """About a tenth of the pictures of a training batch, none when scoring."""
    torch.manual_seed(0)
    skip = Skip(6, 5, gated=False)
    level = torch.randn(400, 6, 2, 2)
    shut = (skip.train()(level, level).abs().amax(dim=(1, 2, 3)) == 0).float().mean()
    assert abs(float(shut) - PATHWAY_DROPOUT) < 0.05
    assert (skip.eval()(level, level).abs().amax(dim=(1, 2, 3)) > 0).all()


def test_gate_stands_before_the_pathway():
    """With a shut gate the pathway sees nothing, whatever the level holds."""
    skip = Skip(6, 5, gated=True).eval()
    skip.gate.set_subspace(torch.eye(6))
    skip.gate.set_limits((0.1, 0.3), (0.2, 0.6))
    level = torch.randn(2, 6, 4, 4, generator=torch.Generator().manual_seed(0))
    nothing = skip.compensation(torch.zeros_like(level))
    assert torch.allclose(skip(level, -level), nothing)
    assert not torch.allclose(skip(level, level), nothing)
