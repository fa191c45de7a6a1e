"""The deployable form and the bundle it is stored in."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from training.detector import deployable, load_bundle, measure, save_bundle
from training.errors import DataError
from training.modules.fusing import fuse_batch_norms
from training.rd import ReverseDistillation
from training.teacher import random_teacher

PICTURES = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def worn() -> ReverseDistillation:
    """A network whose norms have seen data, so that folding them in changes every weight."""
    torch.manual_seed(0)
    network = ReverseDistillation(random_teacher(0), 8, 64).train()
    for norm in (m for m in network.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, 0, 0.1)
    network.loss(torch.from_numpy(PICTURES))
    return network.eval()


def test_folding_norms_changes_no_score(worn):
    """Before rounding, folded and unfolded networks agree to float32 rounding."""
    plain = measure(worn, PICTURES)
    folded = copy.deepcopy(worn)
    fuse_batch_norms(folded)
    for a, b in zip(plain, measure(folded, PICTURES), strict=True):
        assert np.abs(a - b).max() < 1e-4
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())


def test_deployable_weights_are_fp16_values(worn):
    """Every weight survives a trip through FP16, and rounding moves the map score by less than a hundredth."""
    served = deployable(worn)
    assert all(torch.equal(p, p.half().float()) for p in served.parameters())
    assert np.abs(measure(served, PICTURES)[1] - measure(worn, PICTURES)[1]).max() < 1e-2


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


def test_scores_do_not_depend_on_the_batch(detector):
    """One by one or all at once: a picture's score is its own."""
    together = detector.score(PICTURES)
    alone = [detector.score(PICTURES[i : i + 1]).score[0] for i in range(3)]
    assert together.score == pytest.approx(alone, abs=1e-4)


def test_bundle_round_trip(detector, tmp_path):
    """A bundle scores bit for bit as the detector it was made of."""
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
