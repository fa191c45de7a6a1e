"""Global semantics: the fields are made of a small code alone, so that no local defect can be copied through it."""

import numpy as np
import pytest
import torch

from training.modules.gse import GlobalSemantics

CHANNELS, FIELDS = (6, 8, 12), (5, 7, 16)


def levels(batch: int, size: int, seed: int = 0, channels: tuple[int, int, int] = CHANNELS) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sides = (size // 4, size // 8, size // 16)
    return [torch.randn(batch, c, s, s, generator=generator) for c, s in zip(channels, sides, strict=True)]


def small(tokens: int = 3, code: int = 2, size: int = 64) -> GlobalSemantics:
    """A network of 6 numbers between features and fields."""
    torch.manual_seed(0)
    return GlobalSemantics(CHANNELS, FIELDS, size, dim=16, tokens=tokens, code=code, heads=2).eval()


@pytest.mark.parametrize("size", [64, 128, 256])
def test_shapes(size):
    """Fields at strides 32, 16 and 8 with the channels asked for, and a code that does not grow with the picture."""
    torch.manual_seed(0)
    g4, g3, g2, code = GlobalSemantics(CHANNELS, FIELDS, size).eval()(*levels(2, size))
    assert g4.shape == (2, 16, size // 32, size // 32)
    assert g3.shape == (2, 7, size // 16, size // 16)
    assert g2.shape == (2, 5, size // 8, size // 8)
    assert code.shape == (2, 16 * 32)


def test_same_code_same_fields():
    """Whatever the features are: the fields are a function of the code alone."""
    network = small()
    held = network(*levels(1, 64))
    kept = network.squeeze[1].register_forward_hook(lambda *_: held[3].view(1, 2, 3))
    others = network(*levels(1, 64, seed=1))
    kept.remove()
    assert all(torch.equal(a, b) for a, b in zip(held, others, strict=True))
    assert not torch.equal(held[1], network(*levels(1, 64, seed=1))[1])


@pytest.mark.parametrize("level", [0, 1, 2])
def test_no_more_ways_through_than_the_code_has_numbers(level):
    """The Jacobian of all fields by all features of a level has rank 6 = tokens * code: a defect cannot be copied."""
    network = small().double()
    features = [f.double() for f in levels(1, 64)]

    def fields(values: torch.Tensor) -> torch.Tensor:
        given = [values if index == level else f for index, f in enumerate(features)]
        return torch.cat([field.flatten() for field in network(*given)[:3]])

    jacobian = torch.autograd.functional.jacobian(fields, features[level])
    singular = np.linalg.svd(jacobian.reshape(len(jacobian), -1).numpy(), compute_uv=False)
    assert singular[5] > 1e-6 * singular[0]
    assert singular[6] < 1e-10 * singular[0]


def test_pictures_of_a_batch_do_not_meet():
    network = small()
    batch = levels(3, 64)
    alone = network(*(f[1:2] for f in batch))
    assert all(torch.allclose(a[1:2], b, atol=1e-5) for a, b in zip(network(*batch), alone, strict=True))


def test_places_matter():
    """The same features elsewhere give another code: relations in space are seen, unlike by a global average."""
    network = small()
    batch = levels(1, 64)
    mirrored = [f.flip(3) for f in batch]
    assert (network(*batch)[3] - network(*mirrored)[3]).abs().max() > 1e-3


def test_dropout_is_for_training_alone():
    network = GlobalSemantics(CHANNELS, FIELDS, 64, dropout=0.5)
    batch = levels(1, 64)
    assert not torch.equal(network.train()(*batch)[3], network(*batch)[3])
    assert torch.equal(network.eval()(*batch)[3], network(*batch)[3])
