"""A product is ready when it has given scores, and not before."""

import pytest

from pipeline.errors import DependencyError
from pipeline.health import Health
from pipeline.types import Cause, Inference, Scores
from pipeline.warmup import warm_up


class Server:
    """A client whose server is ready long before its models are: it answers each product the n-th time it is asked."""

    def __init__(self, health, *, answers_at):
        self._health, self._answers_at = health, answers_at
        self.asked, self.not_ready = [], []

    def submit(self, batch, done):
        self.asked.append(batch.product)
        self.not_ready.append(self._health.missing())
        (frame,) = batch.frames
        good = self.asked.count(batch.product) >= self._answers_at
        done([Inference(frame, Scores(0.0, 0.0, 0.0)) if good else Inference(frame, cause=Cause.TRITON_UNAVAILABLE)])


def test_a_product_is_ready_after_its_first_scores(make_manifest):
    """Each product gets a picture of its size, is asked again, and counts as not ready meanwhile."""
    health = Health()
    server = Server(health, answers_at=2)
    manifests = {name: make_manifest(name) for name in ("tray", "lid")}
    warm_up(server, manifests, health, timeout_s=30.0)
    assert server.asked == ["tray", "tray", "lid", "lid"]
    assert server.not_ready == [["product lid", "product tray"]] * 2 + [["product lid"]] * 2
    assert health.missing() == []


def test_a_product_that_gives_no_scores_stops_the_start(make_manifest):
    """The message names the product and the cause; a server that calls itself ready is not believed."""
    health = Health()
    with pytest.raises(DependencyError, match=r"'tray'.*triton_unavailable"):
        warm_up(Server(health, answers_at=99), {"tray": make_manifest()}, health, timeout_s=0.2)
    assert health.missing() == ["product tray"]
