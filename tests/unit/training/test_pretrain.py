"""Formula-driven pre-training: targets tell the truth, a few steps run and resume exactly, the file is a teacher."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch.utils.data import default_collate

from training import pretrain as module
from training.config import PretrainConfig
from training.drawing import COLOURS, KINDS, SURFACES, Shape, draw
from training.errors import DataError, TrainingError
from training.pretrain import (
    APPEARANCE,
    PAIRS,
    SINGLES,
    DrawnPictures,
    Pretext,
    PretrainProgress,
    Targets,
    Weights,
    appearance,
    checkpoint_path,
    count,
    pretext_loss,
    pretrain,
    targets_of,
)
from training.teacher import Teacher, load_teacher, weights_sha256

TINY = PretrainConfig(picture_size=64, batch_size=2, minutes=1000, max_steps=4, threads=1, workers=0)


class KilledError(Exception):
    """Stands for a kill between two steps."""


def fresh_teacher(seed: int) -> Teacher:
    """A teacher with weights of a seed."""
    torch.manual_seed(seed)
    return Teacher().eval()


def ignore(_: PretrainProgress) -> None:
    """A report that nobody reads."""


def test_a_lone_shape_counts_once_in_every_group() -> None:
    for kind in range(len(KINDS)):
        counts = count([Shape(kind, 3, 20.0, 20.0, 9.0, 0.0)])
        assert counts[kind] == counts[len(KINDS) + 3] == 1
        assert counts[len(KINDS) + len(COLOURS) :][:4].tolist() == [0, 0, 1, 0]
        assert counts[SINGLES + kind * len(COLOURS) + 3] == 1
        assert counts.sum() == 4


def test_counts_agree_between_groups() -> None:
    """Every shape has one kind, one colour, one size and one pair."""
    for seed in range(20):
        drawing = draw(64, np.random.default_rng(seed))
        groups = np.split(count(drawing.shapes), np.cumsum([len(KINDS), len(COLOURS), 4]))
        assert [g.sum() for g in groups] == [len(drawing.shapes)] * 4


def test_targets_are_the_truth_at_each_position() -> None:
    """Labels of a position are those of the pixel it looks at; damage is 0 where none is near and at most 1."""
    drawing = draw(64, np.random.default_rng(5))
    targets = targets_of(drawing)
    assert [tuple(t.shape) for t in (*targets.surface, *targets.colour)] == [(8, 8), (4, 4), (16, 16), (8, 8)]
    assert targets.surface[0][3, 5] == drawing.surface[24, 40]
    assert targets.colour[0][3, 5] == drawing.colour[12, 20]
    damaged = draw(64, np.random.default_rng(2))._replace(damage=np.zeros((64, 64), np.float32))
    damaged.damage[24, 40] = 1
    fine, coarse = targets_of(damaged).damage
    assert fine[6, 10] == pytest.approx(4 / 16)
    assert coarse[3, 5] == pytest.approx(4 / 64)
    assert (fine > 0).sum() == (coarse > 0).sum() == 1


def test_appearance_tells_colour_and_direction() -> None:
    """Upright stripes answer in the channels of dx and of 'straight', never in those of dy."""
    stripes = np.zeros((16, 16, 3), dtype=np.uint8)
    stripes[:, ::4] = stripes[:, 1::4] = 255
    looks = appearance(stripes)
    means = looks.mean(axis=(0, 1))
    assert looks.shape == (16, 16, APPEARANCE)
    assert means[:3] == pytest.approx(0, abs=1e-2)
    assert means[3] > 0.5
    assert means[7] > 0.5
    assert means[5] == means[6] == means[8] == 0


def test_any_picture_of_the_stream_can_be_had_alone() -> None:
    one, targets = DrawnPictures(64, 7)[41]
    again, _ = DrawnPictures(64, 7)[41]
    other, _ = DrawnPictures(64, 8)[41]
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert isinstance(targets, Targets)


def test_untrained_answers_are_small_and_shaped_as_the_targets() -> None:
    """The shift of the heads keeps the first counts of the order of the truth; every task has an answer."""
    pictures, targets = default_collate([DrawnPictures(64, 0)[i] for i in range(2)])
    answers = Pretext(fresh_teacher(0))(pictures)
    assert all(counts.max() < 30 and counts.min() >= 0 for counts in answers["counts"])
    assert [a.shape[1] for a in answers["counts"]] == [SINGLES, SINGLES + PAIRS]
    assert {a.shape[1] for a in answers["surface"]} == {SURFACES}
    for task in ("surface", "colour", "damage", "appearance"):
        for answer, truth in zip(answers[task], getattr(targets, task), strict=True):
            assert answer.shape[-2:] == truth.shape[-2:]


@pytest.mark.parametrize("task", Weights._fields)
def test_every_task_teaches_the_backbone(task: str) -> None:
    """With the weight of one task alone, the loss is positive and reaches the first convolution."""
    network = Pretext(fresh_teacher(0))
    pictures, targets = default_collate([DrawnPictures(64, 0)[i] for i in range(3)])
    alone = Weights(*(float(field == task) for field in Weights._fields))
    loss = pretext_loss(network(pictures), Targets(*targets), alone)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() > 0
    assert network.teacher.conv1.weight.grad is not None
    assert network.teacher.conv1.weight.grad.abs().sum() > 0


def test_a_few_steps_write_a_teacher(tmp_path: Path) -> None:
    """The steps are told one by one; the file loads as a teacher of at most 6 MB and nothing else stays."""
    seen: list[PretrainProgress] = []
    out = tmp_path / "t.safetensors"
    pretrain(TINY.model_copy(update={"max_steps": 2}), out, seen.append)
    assert [p.step for p in seen] == [1, 2]
    assert seen[-1].share == 1
    load_teacher(out)
    assert [p.name for p in tmp_path.iterdir()] == ["t.safetensors"]
    assert out.stat().st_size <= 6_000_000
    with safe_open(out, framework="pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}  # noqa: SIM118


def test_a_run_can_begin_with_a_teacher(tmp_path: Path) -> None:
    """The first step of a run that starts from a file begins with its weights, not with random ones."""
    start = tmp_path / "start.safetensors"
    module.save_teacher(fresh_teacher(5), start)
    network = module.Run(TINY, start).network
    assert network.teacher.training
    assert weights_sha256(network.teacher) == weights_sha256(load_teacher(start))
    assert weights_sha256(module.Run(TINY).network.teacher) != weights_sha256(load_teacher(start))
    with pytest.raises(DataError, match=r"none\.safetensors"):
        pretrain(TINY, tmp_path / "out.safetensors", ignore, start=tmp_path / "none.safetensors")


def killed_run(out: Path, config: PretrainConfig, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs with a checkpoint after every step until step `at` is told, then dies."""
    monkeypatch.setattr(module, "CHECKPOINT_EVERY_S", -1.0)

    def report(now: PretrainProgress) -> None:
        if now.step == at:
            raise KilledError

    with pytest.raises(KilledError):
        pretrain(config, out, report)


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed at step 3 of 4, resumed from the checkpoint of step 2: the same weights, bit for bit."""
    whole, parts = tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"
    pretrain(TINY, whole, ignore)
    killed_run(parts, TINY, 3, monkeypatch)
    load_teacher(parts)
    steps: list[int] = []
    pretrain(TINY, parts, lambda now: steps.append(now.step), resume=True)
    assert steps == [3, 4]
    assert weights_sha256(load_teacher(parts)) == weights_sha256(load_teacher(whole))
    assert not checkpoint_path(parts).exists()


def test_a_checkpoint_is_safetensors_and_names_its_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "t.safetensors"
    killed_run(out, TINY, 2, monkeypatch)
    with safe_open(checkpoint_path(out), framework="pt") as file:
        progress = json.loads(file.metadata()["pretrain"])
    assert progress["step"] == 1
    assert PretrainConfig.model_validate_json(progress["config"]) == TINY


def test_resume_refuses_what_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing there, a pickle, a file of other tensors, other settings: each a DataError that names the file."""
    out = tmp_path / "t.safetensors"
    path = checkpoint_path(out)
    with pytest.raises(DataError, match="no such file"):
        pretrain(TINY, out, ignore, resume=True)
    torch.save({"step": 1}, path)
    with pytest.raises(DataError, match="cannot be read"):
        pretrain(TINY, out, ignore, resume=True)
    module.save_teacher(fresh_teacher(0), path)
    with pytest.raises(DataError, match="cannot be read"):
        pretrain(TINY, out, ignore, resume=True)
    killed_run(out, TINY, 2, monkeypatch)
    with pytest.raises(DataError, match="other settings"):
        pretrain(TINY.model_copy(update={"seed": 8}), out, ignore, resume=True)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN is an error before any file is written."""
    monkeypatch.setattr(module, "pretext_loss", lambda *_: torch.tensor(float("nan"), requires_grad=True))
    with pytest.raises(TrainingError, match="loss is nan"):
        pretrain(TINY, tmp_path / "t.safetensors", ignore)
    assert list(tmp_path.iterdir()) == []


def test_bf16_trains_too(tmp_path: Path) -> None:
    """Autocast keeps the loss finite and the weights in float32."""
    losses: list[float] = []
    config = TINY.model_copy(update={"precision": "bf16", "max_steps": 2})
    pretrain(config, tmp_path / "t.safetensors", lambda now: losses.append(now.loss))
    assert np.isfinite(losses).all()
    load_teacher(tmp_path / "t.safetensors")
