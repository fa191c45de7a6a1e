"""A version in the shadow: what is compared, what is given up, and that no verdict waits for it."""

from types import SimpleNamespace

import numpy as np
import pytest
from line_process import wait_until

from pipeline.health import Health
from pipeline.manifest import Manifests
from pipeline.metrics import Metrics
from pipeline.rollouts import Rollout
from pipeline.shadow import Shadow
from pipeline.types import Cause, Inference, Model, Scores

ROLLOUT = Rollout(mode="shadow", version=2, model_sha256="cd" * 32, percent=100, at="now", by="anna")


class Server:
    """What the client says of the candidate: `scores` of the next batches, or that no replica is idle."""

    def __init__(self):
        self.rollout = ROLLOUT
        self.is_idle = True
        self.scores = []
        self.batches = []

    def shadow(self, product):
        return self.rollout if product == "tray" else None

    def submit_beside(self, batch, done):
        if not self.is_idle:
            return False
        self.batches.append(batch)
        model = Model("tray", "2", ROLLOUT.model_sha256)
        answers = []
        for frame, score in zip(batch.frames, self.scores, strict=True):
            cause = Cause.TRITON_UNAVAILABLE if score is None else None
            scores = None if score is None else Scores(score, 1.0, 1.0)
            answers.append(Inference(frame, scores=scores, model=model, cause=cause))
        done(answers)
        return True


@pytest.fixture
def line(make_manifest):
    """A shadow of a product whose limits are 2 and 3; `offer` gives it answers, `counts` what was counted."""
    stable, candidate = make_manifest(), make_manifest(version=2, model_sha256=ROLLOUT.model_sha256)
    manifests = Manifests({"tray": stable})
    manifests.keep("tray", candidate)
    metrics, server = Metrics(), Server()
    limits = SimpleNamespace(get=lambda product, model: manifests.of(product, model).suggestion)
    shadow = Shadow(manifests, server, limits, metrics=metrics, health=Health())

    def counts():
        name = "inspection_candidate_views_total"
        labels = [{"product": "tray", "version": "2", "outcome": outcome} for outcome in OUTCOMES]
        return [int(metrics.registry.get_sample_value(name, each) or 0) for each in labels]

    yield SimpleNamespace(shadow=shadow, server=server, counts=counts)
    shadow.close()


OUTCOMES = ("agreed", "disagreed", "failed", "dropped")


@pytest.fixture
def answers(make_frame):
    """Answers of the version in force, a frame for each score."""
    model = Model("tray", "1", "ab" * 32)

    def make(*scores):
        return [
            Inference(make_frame(number=number), scores=Scores(score, 1.0, 1.0), model=model)
            for number, score in enumerate(scores)
        ]

    return make


def test_agreement_is_the_same_verdict(line, answers):
    """OK, REVIEW and NG are compared, not scores; what the candidate cannot judge counts as failed."""
    line.server.scores = [0.5, 2.5, 0.5, 9.0, None, np.nan]
    line.shadow.start()
    line.shadow.offer(answers(1.0, 1.0, 9.0, 4.0, 1.0, 1.0))
    wait_until(lambda: sum(line.counts()) == 6, 60, "counts")
    assert line.counts() == [2, 2, 2, 0]


def test_a_part_that_is_not_of_the_share_is_not_asked_for(line, answers):
    """Only the parts that the trial takes, and only those with scores, go to the candidate."""
    line.server.rollout = ROLLOUT.model_copy(update={"percent": 50})
    given = answers(*[1.0] * 40)
    chosen = [each for each in given if line.server.rollout.takes(each.frame.part_id)]
    line.server.scores = [1.0] * len(chosen)
    line.shadow.start()
    line.shadow.offer([Inference(given[0].frame, cause=Cause.DEADLINE)])
    line.shadow.offer(given)
    wait_until(lambda: sum(line.counts()) == len(chosen), 60, "counts")
    assert [frame.part_id for frame in line.server.batches[0].frames] == [each.frame.part_id for each in chosen]
    assert 0 < len(chosen) < 40


def test_who_is_behind_gives_up(line, answers):
    """With the queue full, and with no replica idle, views are dropped and counted; `offer` never waits."""
    for _ in range(10):  # nobody takes: eight wait, two find no room
        line.shadow.offer(answers(1.0, 1.0))
    assert line.counts() == [0, 0, 0, 4]
    line.server.is_idle = False
    line.shadow.start()
    wait_until(lambda: line.counts()[3] > 4, 60, "a batch to be given up")
    line.server.rollout = None  # the trial ends: what waits is of no use, and no fault
    line.shadow.offer(answers(1.0))
    assert line.server.batches == []
