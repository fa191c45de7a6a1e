"""The teacher: torchvision's names and shapes, weights from safetensors alone."""

import pickle

import pytest
import torch
from safetensors.torch import save_file

from training.errors import ConfigError, DataError
from training.pretrain import save_teacher
from training.teacher import empty_teacher, load_teacher, named_teacher, random_teacher, weights_sha256


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


@pytest.mark.parametrize(
    ("arch", "channels"), [("mobilenetv3_small_100", (16, 24, 48)), ("efficientnet_b0", (24, 40, 112))]
)
def test_timm_backbones_give_levels_at_strides_4_8_16(arch, channels):
    """Same tensors as our own teacher's, with the backbone's widths."""
    teacher = random_teacher(0, arch)
    levels = teacher(torch.zeros(1, 64, 64, 3, dtype=torch.uint8))
    assert teacher.channels == channels
    assert [tuple(f.shape) for f in levels] == [
        (1, c, 64 // s, 64 // s) for c, s in zip(channels, (4, 8, 16), strict=True)
    ]


@pytest.mark.parametrize("prefix", ["body.", ""])
def test_timm_weights_load_with_and_without_our_prefix(tmp_path, prefix):
    """Published files know nothing of the wrapper around the backbone."""
    teacher = random_teacher(1, "mobilenetv3_small_100")
    tensors = {prefix + name.removeprefix("body."): tensor for name, tensor in teacher.state_dict().items()}
    save_file(tensors, tmp_path / "m.safetensors")
    again = load_teacher(tmp_path / "m.safetensors", "mobilenetv3_small_100")
    assert weights_sha256(again) == weights_sha256(teacher)


def test_another_hash_is_refused(tmp_path):
    """The first digits of the right hash are enough; another's are refused with both."""
    save_teacher(random_teacher(2), tmp_path / "t.safetensors")
    found = weights_sha256(load_teacher(tmp_path / "t.safetensors"))
    load_teacher(tmp_path / "t.safetensors", sha256=found[:8].upper())
    with pytest.raises(DataError, match=rf"t\.safetensors.*{found}.*expected deadbeef"):
        load_teacher(tmp_path / "t.safetensors", sha256="deadbeef")


@pytest.mark.parametrize("arch", ["no_such_net", "vit_tiny_patch16_224"])
def test_unfit_backbones_are_refused_by_name(arch):
    """Unknown ones, and those without levels at strides 4, 8 and 16."""
    with pytest.raises(ConfigError, match=arch):
        empty_teacher(arch)


@pytest.mark.parametrize(
    "name", ["resnet18", "torchvision/", "other/resnet18", "torchvision/resnet19", "timm/resnet19"]
)
def test_unknown_published_names_are_refused(name):
    """Without a look at the network."""
    with pytest.raises(ConfigError, match=name):
        named_teacher(name)
