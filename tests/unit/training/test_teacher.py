"""The teacher: torchvision's names and shapes, weights from safetensors alone."""

import pickle

import pytest
import torch
from safetensors.torch import save_file

from training.errors import DataError
from training.pretrain import save_teacher
from training.teacher import load_teacher, random_teacher, weights_sha256


def test_feature_shapes():
    """The levels have the sizes that the served tensors promise."""
    levels = random_teacher(0)(torch.zeros(2, 256, 256, 3, dtype=torch.uint8))
    assert [tuple(f.shape) for f in levels] == [(2, 64, 64, 64), (2, 128, 32, 32), (2, 256, 16, 16)]


def test_weight_count_is_resnet18_to_layer3():
    """ResNet18 has 11 689 512 weights; layer 4 (8 393 728) and the classifier (513 000) are not ours."""
    assert sum(p.numel() for p in random_teacher(0).parameters()) == 11_689_512 - 8_393_728 - 513_000


def test_same_seed_same_weights():
    """A seed names a teacher, and drawing it leaves torch's own generator alone."""
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert weights_sha256(random_teacher(5)) == weights_sha256(random_teacher(5)) != weights_sha256(random_teacher(6))
    assert torch.equal(before, torch.get_rng_state())


def test_weights_survive_a_file(tmp_path):
    """FP16 storage is the only loss; loading twice gives the same hash; later layers are ignored."""
    save_teacher(random_teacher(2), tmp_path / "t.safetensors")
    first = load_teacher(tmp_path / "t.safetensors")
    save_file({**first.state_dict(), "layer4.0.conv1.weight": torch.ones(3)}, tmp_path / "u.safetensors")
    assert weights_sha256(load_teacher(tmp_path / "u.safetensors")) == weights_sha256(first)


def test_pickle_is_refused_unread(tmp_path):
    """A pickle that would run code on loading is named and not loaded."""
    path = tmp_path / "t.pth"
    path.write_bytes(pickle.dumps({"conv1.weight": [1.0]}))
    with pytest.raises(DataError, match=r"t\.pth.*not safetensors"):
        load_teacher(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("layer2.0.conv1.weight"), "layer2.0.conv1.weight.*found nothing"),
        (lambda t: t.update({"conv1.weight": torch.ones(2)}), r"conv1\.weight.*found \(2,\)"),
        (lambda t: t["bn1.weight"].fill_(torch.nan), r"bn1\.weight.*not finite"),
    ],
)
def test_unfit_weights_are_named(tmp_path, change, message):
    tensors = dict(random_teacher(0).state_dict())
    change(tensors)
    save_file(tensors, tmp_path / "t.safetensors")
    with pytest.raises(DataError, match=message):
        load_teacher(tmp_path / "t.safetensors")


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(DataError, match=r"none\.safetensors.*no such file"):
        load_teacher(tmp_path / "none.safetensors")
