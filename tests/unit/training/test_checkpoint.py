"""Kill and resume: the run goes on as if it had never stopped, and a file that does not fit it is refused."""

import json
import pickle
from contextlib import suppress

import pytest
import torch
from safetensors.torch import load_file, save_file

from training.checkpoint import FILE, Counters, load_checkpoint, save_checkpoint
from training.config import FitConfig
from training.errors import DataError
from training.fit import Places, fit, train_network
from training.methods import build
from training.normals import Normals
from training.teacher import random_teacher

CONFIG = FitConfig(
    method="rd", width=8, image_size=64, batch_size=4, max_steps=6, validate_every=2, checkpoint_every=2, seed=3
)


class KilledError(Exception):
    """Stands for the kill."""


@pytest.fixture(scope="module")
def pictures(teacher, normal_pictures):
    return Normals(normal_pictures[:8], [], teacher)


def run(pictures, config, folder=None, stop_after=None):
    """Weights after a run, which dies during step `stop_after` if that is given."""
    torch.manual_seed(0)
    network = build(config, pictures._teacher)
    network.prepare(pictures)
    losses: dict[int, tuple[float, float]] = {}

    def report(now) -> None:
        losses[now.step] = (now.loss, now.validation_loss)
        if now.step == stop_after:
            raise KilledError

    with suppress(KilledError):
        train_network(network, pictures, pictures, config, report, folder, "run")
    return network.state_dict(), losses


@pytest.mark.parametrize(("method", "stop_after"), [("rd", 5), ("logicrd", 3)])
def test_resumed_run_equals_an_uninterrupted_one(pictures, tmp_path, method, stop_after):
    """Bit for bit, in weights, running statistics and every loss told, wherever the kill falls."""
    config = CONFIG.model_copy(update={"method": method})
    whole, losses = run(pictures, config)
    run(pictures, config, tmp_path, stop_after)
    torch.manual_seed(99)
    resumed, told = run(pictures, config, tmp_path)
    assert sorted(told) == list(range(stop_after // 2 * 2 + 1, 7))
    assert all(losses[step] == told[step] for step in told)
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_plateau_remembers(pictures, tmp_path):
    """Looks without progress before the kill count after it."""
    config = CONFIG.model_copy(
        update={"learning_rate": 1e-12, "validate_every": 1, "patience": 4, "max_steps": 100, "checkpoint_every": 1}
    )
    _, whole = run(pictures, config)
    run(pictures, config, tmp_path, stop_after=len(whole) - 2)
    _, resumed = run(pictures, config, tmp_path)
    assert max(resumed) == max(whole)


def test_finished_run_is_not_trained_again(pictures, tmp_path):
    first, _ = run(pictures, CONFIG, tmp_path)
    again, told = run(pictures, CONFIG, tmp_path)
    assert told == {}
    assert all(torch.equal(value, again[name]) for name, value in first.items())


def test_fit_refuses_a_checkpoint_of_other_settings_data_or_teacher(folder, tmp_path):
    """Before a step is trained, with the file and the remedy."""
    places = Places(tmp_path / "cache", tmp_path / "state")
    config = CONFIG.model_copy(update={"max_steps": 2})
    fit(folder, "p", random_teacher(0), config, lambda _: None, places)
    others = [
        (folder, random_teacher(0), config.model_copy(update={"seed": 4})),
        (folder, random_teacher(1), config),
        (type(folder)(folder.root, folder.layout, folder.train[1:], folder.validation, {}), random_teacher(0), config),
    ]
    for data, teacher, settings in others:
        with pytest.raises(DataError, match=r"checkpoint\.safetensors.*other settings, data or teacher.*remove it"):
            fit(data, "p", teacher, settings, lambda _: pytest.fail("trained"), places)


@pytest.fixture
def saved(pictures, tmp_path):
    """A checkpoint, with the network and optimiser to fill."""
    network = build(CONFIG, pictures._teacher)
    optimiser = torch.optim.Adam(network.parameters_by_rate()["full"])
    network.loss(pictures.take([0, 1])).backward()
    optimiser.step()
    save_checkpoint(tmp_path, network, optimiser, Counters("run", 4, 1.5, float("inf"), 2))
    return network, optimiser


def test_teacher_is_not_kept(saved, tmp_path):
    assert not any("teacher" in name for name in load_file(tmp_path / FILE))
    assert load_checkpoint(tmp_path, *saved, "run") == Counters("run", 4, 1.5, float("inf"), 2)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-40]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(pickle.dumps({"step": 4})),
        lambda path: save_file({"network.a": torch.ones(1)}, path),
        lambda path: save_file({"network.a": torch.ones(1)}, path, {"state": "{"}),
        lambda path: save_file({"network.a": torch.ones(1)}, path, {"state": json.dumps({"step": 1})}),
        lambda path: trimmed(path),
    ],
    ids=["cut", "empty", "pickle", "no-state", "no-json", "half-state", "other-tensors"],
)
def test_damaged_checkpoint_is_refused_by_name(saved, tmp_path, damage):
    """Cut, empty, a pickle, of another shape: one line with the remedy, and nothing is executed."""
    damage(tmp_path / FILE)
    with pytest.raises(DataError, match=r"checkpoint\.safetensors.*remove it"):
        load_checkpoint(tmp_path, *saved, "run")


def trimmed(path) -> None:
    """Rewrites the checkpoint with one weight of another shape."""
    fields = {"identity": "run", "step": 4, "spent_s": 1.0, "best_loss": 1.0, "looks_left": 1}
    tensors = load_file(path)
    name = next(name for name in tensors if name.startswith("network.") and tensors[name].ndim == 4)
    save_file({**tensors, name: torch.ones(1)}, path, {"state": json.dumps(fields)})


def test_missing_weights_are_refused(saved, tmp_path):
    """A checkpoint that lacks a weight is not filled up with the untrained one in silence."""
    fields = {"identity": "run", "step": 4, "spent_s": 1.0, "best_loss": 1.0, "looks_left": 1}
    tensors = load_file(tmp_path / FILE)
    tensors.pop(next(name for name in tensors if name.startswith("network.student")))
    save_file(tensors, tmp_path / FILE, {"state": json.dumps(fields)})
    with pytest.raises(DataError, match=r"checkpoint\.safetensors"):
        load_checkpoint(tmp_path, *saved, "run")


def test_kill_while_writing_leaves_the_last_checkpoint(saved, tmp_path, monkeypatch):
    """A new one comes in by one rename."""
    before = (tmp_path / FILE).read_bytes()

    def half(path, data) -> None:
        with path.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.write_bytes", half)
        with pytest.raises(KilledError):
            save_checkpoint(tmp_path, *saved, Counters("run", 6, 2.0, 1.0, 2))
    assert (tmp_path / FILE).read_bytes() == before
    assert load_checkpoint(tmp_path, *saved, "run") is not None
