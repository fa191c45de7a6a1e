"""The deployable form and the bundle it is stored in."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from training.config import NetworkConfig
from training.detector import deployable, load_bundle, measure, save_bundle
from training.errors import DataError
from training.methods import build
from training.modules.fusing import fuse_batch_norms
from training.normals import Normals, features_of
from training.rd import ReverseDistillation
from training.teacher import random_teacher

PICTURES = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)


@pytest.fixture(scope="module", params=["rd", "dskd", "logicrd", "mobilenetv3_small_100"])
def worn(request):
    """A network whose norms have seen data, so that folding them changes every weight; one on a backbone of timm's."""
    torch.manual_seed(0)
    arch = request.param if "net" in request.param else "resnet18"
    method = "logicrd" if "net" in request.param else request.param
    teacher = random_teacher(0, arch)
    network = build(NetworkConfig(method=method, width=8, image_size=64), teacher).train()
    for norm in (m for m in network.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, 0, 0.1)
    images = torch.from_numpy(PICTURES)
    teacher(images)
    pictures = Normals(PICTURES, [], teacher.eval())
    network.prepare(pictures)
    network.loss(features_of(teacher, images))
    network.eval().settle(pictures)
    return network


def test_folding_norms_changes_no_score(worn):
    """Before rounding, folded and unfolded networks are the same function: in float64 nearly to the last digit."""
    folded = copy.deepcopy(worn).double()
    plain = measure(folded, PICTURES)
    fuse_batch_norms(folded)
    for a, b in zip(plain, measure(folded, PICTURES), strict=True):
        assert np.abs(a - b).max() < 1e-7 * max(1.0, np.abs(a).max())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())


def test_deployable_weights_are_fp16_values(worn):
    """Every weight survives a trip through FP16, and rounding hardly moves the map score."""
    served = deployable(worn)
    assert all(torch.equal(p, p.half().float()) for p in served.parameters())
    plain = measure(worn, PICTURES)[1]
    assert np.abs(measure(served, PICTURES)[1] - plain).max() < 1e-2 * max(1.0, np.abs(plain).max())


def test_deployable_leaves_the_original(worn):
    before = {name: tensor.clone() for name, tensor in worn.state_dict().items()}
    deployable(worn)
    assert all(torch.equal(tensor, before[name]) for name, tensor in worn.state_dict().items())


def test_weights_beyond_fp16_are_refused_by_name():
    network = ReverseDistillation(random_teacher(0), 8, 64)
    with torch.no_grad():
        network.student.stage1[1].conv2.weight[0, 0, 0, 0] = 1e6
    with pytest.raises(DataError, match=r"student\.stage1\.1\.conv2\.weight.*FP16"):
        deployable(network)


@pytest.mark.parametrize("method", ["rd", "dskd", "logicrd"])
def test_scores_do_not_depend_on_the_batch(rivals, method):
    """One by one or all at once: a picture's score is its own."""
    detector = rivals[method]
    together = detector.score(PICTURES)
    alone = [detector.score(PICTURES[i : i + 1]).score[0] for i in range(3)]
    assert together.score == pytest.approx(alone, abs=1e-4)


@pytest.mark.parametrize("method", ["rd", "dskd", "logicrd"])
def test_bundle_round_trip(rivals, method, tmp_path):
    """A bundle scores bit for bit as the detector it was made of."""
    detector = rivals[method]
    save_bundle(tmp_path / "b", detector)
    again = load_bundle(tmp_path / "b")
    assert np.array_equal(again.score(PICTURES).score, detector.score(PICTURES).score)
    assert again.description == detector.description


@pytest.mark.parametrize("name", ["weights.safetensors", "bundle.json"])
def test_incomplete_bundle_is_refused(detector, tmp_path, name):
    save_bundle(tmp_path / "b", detector)
    (tmp_path / "b" / name).unlink()
    with pytest.raises(DataError, match=r"bundle.*fit it again"):
        load_bundle(tmp_path / "b")


def test_damaged_weights_are_refused(detector, tmp_path):
    save_bundle(tmp_path / "b", detector)
    path = tmp_path / "b" / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataError, match="bundle"):
        load_bundle(tmp_path / "b")
