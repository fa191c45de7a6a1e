"""Two processes train as one: the norm over both against PyTorch's, and whole runs by torchrun over gloo."""

import runpy
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from training.modules.replicas import ReplicaNorm, norms_over_replicas, replicas

PROCESS = Path(__file__).with_name("replicas_process.py")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def alone() -> dict[str, object]:
    """The functions of the process, to be run in this one."""
    return runpy.run_path(str(PROCESS))


@pytest.fixture(scope="module")
def parts(loco, tmp_path_factory) -> list[dict[str, torch.Tensor]]:
    """What each of two processes found."""
    out = tmp_path_factory.mktemp("replicas")
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    command = [sys.executable, *launcher, PROCESS, loco, out]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=150)
    assert answer.returncode == 0, answer.stderr[-3000:]
    return [load_file(out / f"{rank}.safetensors") for rank in range(2)]


def test_norm_over_two_processes_is_batch_norm_of_the_whole(alone, parts):
    """Outputs, gradients of inputs and weights, running mean and variance: as BatchNorm2d of all six pictures."""
    whole = alone["normed"](nn.BatchNorm2d(3))
    for rank, part in enumerate(parts):
        for name in ("y", "gradient"):
            assert torch.allclose(part[f"norm.{name}"], whole[f"norm.{name}"][rank::2], rtol=1e-4, atol=1e-4)
        for name in ("mean", "var"):
            assert torch.allclose(part[f"norm.{name}"], whole[f"norm.{name}"], rtol=1e-5, atol=1e-5)
        assert part["mean"].tolist() == [0.5, 3.0]
    assert torch.allclose(sum(part["norm.weight"] for part in parts), whole["norm.weight"], rtol=1e-4)


def test_two_processes_train_reverse_distillation_as_one(alone, parts):
    """Four steps in float64: the same weights and running statistics in both, and those of a single process."""
    whole = alone["reverse_distillation"]()
    assert any(name.endswith("running_var") for name in whole)
    for name, value in whole.items():
        assert torch.equal(parts[0][name], parts[1][name]), name
        assert torch.allclose(parts[0][name], value, rtol=1e-6, atol=1e-8), name


def test_two_processes_fit_logicrd_to_a_close_loss(alone, parts, loco, tmp_path):
    """Dropout is drawn by each process alone, so that the course is the same but not the digits; both end alike."""
    whole = alone["logicrd"](loco, tmp_path)
    assert float(parts[0]["logicrd.loss"]) == pytest.approx(float(whole["logicrd.loss"]), rel=0.1)
    assert torch.equal(parts[0]["logicrd.map_score"], parts[1]["logicrd.map_score"])
    assert torch.isfinite(parts[0]["logicrd.map_score"]).all()


def test_alone_it_is_batch_norm(alone):
    """Without other processes: PyTorch's own, in training and scoring."""
    ours, theirs = ReplicaNorm(3), nn.BatchNorm2d(3)
    assert replicas() == 1
    found = [alone["normed"](norm) for norm in (ours, theirs)]
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(ours.eval()(x), theirs.eval()(x))


def test_norms_are_replaced_with_their_very_tensors():
    """Parameters stay the same objects: an optimiser that holds them goes on moving them."""
    module = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()))
    module(torch.randn(2, 3, 4, 4))
    before, state = list(module.parameters()), {name: value.clone() for name, value in module.state_dict().items()}
    norms_over_replicas(module)
    assert isinstance(module[1][0], ReplicaNorm)
    assert all(a is b for a, b in zip(before, module.parameters(), strict=True))
    assert state.keys() == module.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
