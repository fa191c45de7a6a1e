"""Formula-driven pre-training: counts tell the truth, a few steps run, the file is a teacher."""

import numpy as np
import pytest
import torch

from training.config import PretrainConfig
from training.pretrain import (
    COLOURS,
    KINDS,
    TARGETS,
    Counter,
    PretrainProgress,
    draw_ground,
    draw_picture,
    pretrain,
    shape_mask,
)
from training.teacher import load_teacher, random_teacher


def test_counts_agree_between_kinds_and_colours():
    """Every shape has one kind and one colour; same seed, same picture."""
    for seed in range(20):
        picture, counts = draw_picture(64, np.random.default_rng(seed))
        again, _ = draw_picture(64, np.random.default_rng(seed))
        assert counts[: len(KINDS)].sum() == counts[len(KINDS) :].sum()
        assert picture.shape == (64, 64, 3)
        assert np.array_equal(picture, again)
    assert len(counts) == TARGETS == len(KINDS) + len(COLOURS)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_covers_something(kind):
    mask = shape_mask((40, 40), kind, (20.0, 20.0, 12.0), 0.3, np.random.default_rng(0))
    assert 30 < mask.sum() < 500
    assert mask[0].sum() == 0


def test_grounds_vary():
    """All families are float pictures of the right size."""
    generator = np.random.default_rng(0)
    grounds = [draw_ground(48, generator) for _ in range(30)]
    assert {g.shape for g in grounds} == {(48, 48, 3)}
    assert len({float(g.std()) for g in grounds}) == 30


def test_untrained_counts_start_small():
    """The shift of the heads keeps the first losses of the order of the counts."""
    counts = Counter(random_teacher(0))(torch.zeros(1, 96, 96, 3, dtype=torch.uint8))
    assert all(c.shape == (1, TARGETS) and c.max() < 30 for c in counts)


def test_a_few_steps_write_a_teacher(tmp_path):
    """Two steps, then the file loads as a teacher; no partial file stays."""
    config = PretrainConfig(picture_size=64, batch_size=4, minutes=5, max_steps=2)
    seen: list[PretrainProgress] = []
    pretrain(config, tmp_path / "t.safetensors", seen.append, workers=0)
    assert [p.step for p in seen] == [1, 2]
    assert seen[-1].share == 1
    load_teacher(tmp_path / "t.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["t.safetensors"]
    assert (tmp_path / "t.safetensors").stat().st_size < 6_000_000
