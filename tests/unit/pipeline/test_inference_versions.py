"""The Triton client among versions and replicas: what is learned, promoted, tried, and served by some alone."""

from types import SimpleNamespace

import numpy as np
import pytest
import structlog
from triton_answers import Answer, answer, batch_of, metadata
from tritonclient.utils import InferenceServerException

from pipeline.balance import Fault, Finding
from pipeline.health import Health
from pipeline.inference import InferenceClient
from pipeline.metrics import Metrics
from pipeline.rollouts import Rollout
from pipeline.servers import Triton as TritonSettings
from pipeline.types import Cause


class Replica:
    """A replica that serves these ensembles, each as its version 1 or as the one given by name."""

    def __init__(self, *products, **versions):
        self._versions = dict.fromkeys(products, "1") | versions

    def is_server_ready(self, **options):
        return bool(options)

    def get_model_metadata(self, product, **options):
        assert options["as_json"]
        if product not in self._versions:
            raise InferenceServerException(f"Request for unknown model: '{product}' is not found")
        return metadata() | {"versions": [self._versions[product]]}

    def infer(self, *arguments, **options):
        pass

    def async_infer(self, ensemble, inputs, callback, **options):
        del inputs, options
        if ensemble not in self._versions:
            callback(None, InferenceServerException(f"Request for unknown model: '{ensemble}' is not found"))
        else:
            callback(Answer(**answer(1)._tensors, version=self._versions[ensemble]), None)


def test_a_product_is_learned_once_every_replica_in_use_serves_it(client, make_manifest, monkeypatch):
    """One that lacks it is named; once taken, every replica has to serve it, and answers are read by its manifest."""
    lid = make_manifest(product="lid")
    assert client.check(lid) == "no replica of Triton is in use"
    replicas = [
        (SimpleNamespace(address="10.0.0.1:1"), Replica("tray", "lid")),
        (SimpleNamespace(address="10.0.0.2:1"), Replica("tray")),
    ]
    monkeypatch.setattr(client._pool, "in_use", lambda: replicas)
    assert client.check(lid).startswith("Triton at 10.0.0.2:1: does not serve product 'lid'")
    assert client._probe(Replica("tray"))[0] is Finding.GOOD
    replicas.pop()
    assert client.check(lid) == ""
    client.take(lid)
    assert client._probe(Replica("tray"))[0] is Finding.FAILED
    assert client._probe(Replica("tray", "lid"))[0] is Finding.GOOD


def test_a_promotion_costs_no_part(client, make_frame, make_manifest, monkeypatch):
    """When the product's name serves another version, the version before is asked for by its own name, at once; the
    new one is answered once it is taken, and nothing in between is without scores."""
    server = Replica(**{"tray": "2", "tray.v1": "1"})
    replica = SimpleNamespace(address="10.0.0.1:1")
    monkeypatch.setattr(client._pool, "take", lambda *_: (replica, server))
    faults = []

    def give_back(_, frames, fault, words, *, first_try):
        del frames, words, first_try
        faults.append(fault)
        return False

    monkeypatch.setattr(client._pool, "give_back", give_back)
    monkeypatch.setattr(client._pool, "in_use", lambda: [(replica, server)])
    done = []
    client.submit(batch_of(make_frame, 1), done.extend)
    assert client._probe(server)[0] is Finding.GOOD
    client.submit(batch_of(make_frame, 1), done.extend)
    second = make_manifest(version=2, model_sha256="cd" * 32)
    assert client.check(second) == ""
    client.take(second)
    client.submit(batch_of(make_frame, 1), done.extend)
    assert [(each.cause, each.model.version) for each in done] == [(None, "1"), (None, "1"), (None, "2")]
    assert set(faults) == {None}


class Trial:
    """A client whose product has a version on trial, on one replica that serves both; `ask` sends parts."""

    def __init__(self, client, make_frame, manifest, monkeypatch, **changes):
        self.client = client
        self.server = Replica(**{"tray": "1", "tray.v2": "2"})
        self.asked = []
        replica = SimpleNamespace(address="10.0.0.1:1")
        monkeypatch.setattr(client._pool, "take", lambda *_: (replica, self))
        monkeypatch.setattr(client._pool, "give_back", lambda *_, **__: False)
        words = {"mode": "canary", "percent": 50, "version": 2, "at": "now", "by": "anna"} | changes
        self.rollout = Rollout(model_sha256=manifest.model_sha256, **words)
        client.offer(manifest, self.rollout)
        self._make_frame = make_frame
        self.nan = self.late = False

    def async_infer(self, ensemble, inputs, callback, **options):
        count, is_canary = inputs[0].shape()[0], ensemble == "tray.v2"
        assert (options["client_timeout"] <= 1.0) is is_canary
        if is_canary and self.late:
            self.asked.append((ensemble, count))
            callback(None, InferenceServerException("Deadline Exceeded", status="StatusCode.DEADLINE_EXCEEDED"))
            return
        self.asked.append((ensemble, count))
        score = np.full((count, 1), np.nan, np.float32) if self.nan and is_canary else None
        changes = {} if score is None else {"score": score}
        if ensemble in self.server._versions:
            callback(answer(count, version=self.server._versions[ensemble], **changes), None)
        else:
            callback(None, InferenceServerException(f"Request for unknown model: '{ensemble}' is not found"))

    def ask(self, count=20):
        done = []
        self.client.submit(batch_of(self._make_frame, count), done.extend)
        return done

    def counted(self, outcome):
        labels = {"product": "tray", "version": "2", "outcome": outcome}
        return self.client._metrics.registry.get_sample_value("inspection_candidate_views_total", labels) or 0


@pytest.fixture
def trial(client, make_frame, make_manifest, monkeypatch):
    manifest = make_manifest(version=2, model_sha256="cd" * 32)
    return lambda **changes: Trial(client, make_frame, manifest, monkeypatch, **changes)


def test_a_canary_judges_its_share_of_the_parts(trial):
    """Each part goes where the hash of its id says, and its answer names the version that gave it."""
    canary = trial()
    done = canary.ask()
    assert len(done) == 20
    for each in done:
        assert each.model.version == ("2" if canary.rollout.takes(each.frame.part_id) else "1")
    assert {each.model.version for each in done} == {"1", "2"}
    assert canary.counted("judged") == sum(each.model.version == "2" for each in done)
    canary.client.withdraw("tray")
    assert {each.model.version for each in canary.ask()} == {"1"}


@pytest.mark.parametrize("fault", ["gone", "nan", "other", "late"])
def test_what_a_canary_cannot_judge_the_version_in_force_does(trial, fault):
    """No part is lost to a canary that is not there, gives no finite score, is another version or slow: it has half of
    the time. After three batches in a row it is asked no more, with one line of the log and a reason."""
    canary = trial()
    if fault == "gone":
        del canary.server._versions["tray.v2"]
    elif fault == "other":
        canary.server._versions["tray.v2"] = "3"
    canary.nan, canary.late = fault == "nan", fault == "late"
    with structlog.testing.capture_logs() as said:
        done = [each for _ in range(5) for each in canary.ask()]
    assert len(done) == 100
    assert {(each.cause, each.model.version) for each in done} == {(None, "1")}
    assert sum(ensemble == "tray.v2" for ensemble, _ in canary.asked) == 3
    assert [line["event"] for line in said if line["log_level"] == "error"] == ["version on trial given up"]
    assert canary.client.candidate_fault("tray").startswith("failed 3 batches in a row")
    assert canary.counted("failed") > 0
    canary.client.offer(canary.client._candidates["tray"].manifest, canary.rollout)  # begun anew
    assert canary.client.candidate_fault("tray") == ""


def test_a_shadow_is_asked_by_an_idle_replica_alone(trial, monkeypatch, make_frame):
    """It gets no part's verdict, and waits until a replica has nothing else to do."""
    shadow = trial(mode="shadow")
    assert {each.model.version for each in shadow.ask()} == {"1"}
    assert shadow.client.shadow("tray") == shadow.rollout
    done = []
    assert not shadow.client.submit_beside(batch_of(make_frame, 2), done.extend)
    monkeypatch.setattr(shadow.client._pool, "is_idle", lambda: True)
    assert shadow.client.submit_beside(batch_of(make_frame, 2), done.extend)
    assert [each.model.version for each in done] == ["2", "2"]
    shadow.client.withdraw("tray")
    assert not shadow.client.submit_beside(batch_of(make_frame, 2), done.extend)


def test_a_version_that_is_served_nowhere_is_a_mismatch(client, make_frame, monkeypatch):
    """Neither under the product's name nor under its own: the part is UNINSPECTED, and the replica under suspicion."""
    server = Replica(tray="2")
    monkeypatch.setattr(client._pool, "take", lambda *_: (SimpleNamespace(address="10.0.0.1:1"), server))
    faults = []
    monkeypatch.setattr(client._pool, "give_back", lambda _, __, fault, *___, **____: faults.append(fault))
    done = []
    client.submit(batch_of(make_frame, 1), done.extend)
    client.submit(batch_of(make_frame, 1), done.extend)
    assert [each.cause for each in done] == [Cause.MODEL_MISMATCH] * 2
    assert faults == [Fault.SICK] * 2
    assert client._probe(server)[0] is Finding.REFUSED


def test_a_product_that_another_replica_serves_may_not_be_lacking(make_manifest, monkeypatch):
    """Of the optional products one that nobody serves is left out; one that somebody serves is asked of all."""
    manifests = {name: make_manifest(product=name) for name in ("must", "some", "none")}
    settings = TritonSettings(address="127.0.0.1:9", startup_timeout_s=0.01)
    client = InferenceClient(settings, manifests, metrics=Metrics(), health=Health())

    def start():
        assert client._probe(Replica("some"))[0] is Finding.FAILED
        assert client._probe(Replica("must", "some"))[0] is Finding.GOOD

    monkeypatch.setattr(client._pool, "start", start)
    again = []
    monkeypatch.setattr(client._pool, "probe_again", lambda: again.append(True))
    assert client.start(optional=["some", "none"]) == ["none"]
    assert again == [True]
    assert client._probe(Replica("must"))[0] is Finding.FAILED
    assert client._probe(Replica("must", "some"))[0] is Finding.GOOD
    client.close()


def test_each_replica_has_its_own_name_for_a_version(client, make_frame, monkeypatch):
    """One that was promoted and one that was not, or that serves a stranger: each is asked for what it has, and a batch
    that meets the stranger goes to the other one."""
    replicas = {
        "promoted": Replica(**{"tray": "2", "tray.v1": "1"}),
        "plain": Replica("tray"),
        "stranger": Replica(tray="7"),
    }
    turns = iter(["promoted", "plain", "stranger", "plain", "promoted"])
    taken = []

    def take(_, avoid=None):
        name = next(turns)
        taken.append((name, None if avoid is None else avoid.address))
        return SimpleNamespace(address=name), replicas[name]

    monkeypatch.setattr(client._pool, "take", take)
    monkeypatch.setattr(
        client._pool, "give_back", lambda _, __, fault, *___, first_try: fault is Fault.SICK and first_try
    )
    done = []
    for _ in range(4):
        client.submit(batch_of(make_frame, 1), done.extend)
    assert [each.cause for each in done] == [None] * 4
    assert taken == [
        ("promoted", None),
        ("plain", None),
        ("stranger", None),
        ("plain", "stranger"),
        ("promoted", None),
    ]
