"""Products and versions that come while the line runs: when they are the line's, and what is said of the others."""

import json
from types import SimpleNamespace

import pytest
import structlog
from signers import make_keys

from pipeline.manifest import Manifests, read_manifest
from pipeline.metrics import Metrics
from pipeline.newcomers import Newcomers
from pipeline.servers import Triton
from pipeline.signatures import sign
from pipeline.types import Model

NEXT = {"version": 2, "model_sha256": "cd" * 32}


class Servers:
    """Triton and Redis, as far as a new version asks them; `did` is what was asked, in order."""

    def __init__(self):
        self.fault = ""
        self.is_known = True
        self.did = []

    def check(self, manifest):
        self.did.append(("check", manifest.product, manifest.version))
        return self.fault

    def learn(self, manifest):
        self.did.append(("learn", manifest.product, manifest.version))
        return self.is_known

    def take(self, manifest):
        self.did.append(("take", manifest.product, manifest.version))

    def keep(self, product, *versions):
        pass

    def offer(self, manifest, rollout):
        self.did.append(("offer", manifest.product, rollout.percent))

    def withdraw(self, product):
        self.did.append(("withdraw", product, None))

    def candidate_fault(self, product):
        return f"{product} failed" if self.fault else ""

    def asked(self, what):
        return [product for word, product, _ in self.did if word == what]


@pytest.fixture
def servers():
    return Servers()


@pytest.fixture
def graphs():
    """Products that are scored by a graph."""
    return []


@pytest.fixture
def signer():
    """The file of public keys of the line: none."""


@pytest.fixture
def line(models_repo, servers, graphs, signer):
    """A line of a pool that knows `tray` of a repository with `cable-set` besides."""
    manifests = Manifests({"tray": read_manifest(models_repo, "tray")})
    metrics = Metrics()
    settings = Triton(models_repo=models_repo, signer_file=signer)
    about = {"new_products": True, "graph_products": graphs, "metrics": metrics}
    newcomers = Newcomers(settings, manifests, servers, servers, **about)
    return SimpleNamespace(manifests=manifests, look=newcomers.look, newcomers=newcomers, metrics=metrics)


@pytest.fixture
def promote(models_repo, manifest_document):
    """Write the manifest of another version of `tray`; keywords replace its top keys."""

    def write(**keys):
        path = models_repo / "tray/manifest.json"
        path.write_text(json.dumps(manifest_document("tray", **(NEXT | keys))))

    return write


def test_a_product_is_the_lines_once_it_is_served_and_its_limits_are_known(line, servers):
    """Neither before the model nor before the threshold is there; a known version is never asked for."""
    servers.fault = "Triton at x: does not serve it"
    line.look()
    servers.fault, servers.is_known = "", False
    line.look()
    assert list(line.manifests) == ["tray"]
    servers.is_known = True
    line.look()
    assert list(line.manifests) == ["tray", "cable-set"]
    line.look()
    assert servers.asked("check") == ["cable-set"] * 3


def test_what_is_wrong_with_a_product_is_said_once(line, servers, models_repo):
    """The same fault is one line of the log; another fault, and that of a product that came anew, are others."""
    path = models_repo / "cable-set" / "manifest.json"
    good = path.read_bytes()
    with structlog.testing.capture_logs() as said:
        servers.fault = "not served"
        line.look()
        line.look()
        path.write_text("{")
        line.look()
        path.unlink()
        line.look()
        path.write_bytes(good)
        line.look()
    faults = [each["error"].removeprefix("version 1: ").partition(":")[0] for each in said]
    assert faults == ["not served", f"manifest {path}", "not served"]
    assert {each["product"] for each in said} == {"cable-set"}
    assert "cable-set" not in line.manifests


def test_without_a_pool_no_product_is_added(models_repo, servers):
    """The cameras of a line file are fixed: a product that none of them shows is left alone."""
    manifests = Manifests({"tray": read_manifest(models_repo, "tray")})
    settings = Triton(models_repo=models_repo)
    about = {"new_products": False, "graph_products": [], "metrics": Metrics()}
    Newcomers(settings, manifests, servers, servers, **about).look()
    assert (list(manifests), servers.did) == (["tray"], [])


def test_a_promoted_version_takes_over_once_it_is_good(line, servers, promote):
    """It is checked, its limits are known, then batches go to it; answers of the one before still find its manifest."""
    before = line.manifests["tray"]
    promote()
    line.look()
    assert [word for word, product, _ in servers.did if product == "tray"] == ["check", "learn", "take", "take"]
    assert line.manifests["tray"].version == 2
    assert line.manifests.of("tray", Model("tray", "1", before.model_sha256)) == before
    assert line.manifests.of("tray", Model("tray", "3", "ef" * 32)) is None


@pytest.mark.parametrize("fault", ["served", "limits", "pictures", "manifest"])
def test_a_version_that_fails_gets_no_traffic(line, servers, promote, models_repo, fault):
    """Whatever is wrong, the version before goes on, with one line of the log, the metric and the heartbeat's word;
    once it is put right the version is taken, and all three are silent again."""
    del servers.did[:]
    servers.fault = "a black picture failed" if fault == "served" else ""
    servers.is_known = fault != "limits"
    promote(**({"map_shape": [32]} if fault == "manifest" else {}))
    if fault == "pictures":
        promote(input={"height": 128, "width": 128, "dtype": "uint8", "layout": "HWC", "colour": "RGB"})
    (models_repo / "cable-set/manifest.json").unlink()
    with structlog.testing.capture_logs() as said:
        line.look()
        line.look()
    assert (len(said), said[0]["judged_by"]) == (1, "version 1")
    assert line.manifests["tray"].version == 1
    assert servers.asked("take") == []
    assert line.newcomers.fault("tray") != ""
    refused = "inspection_version_refused"
    assert line.metrics.registry.get_sample_value(refused, {"product": "tray"}) == 1
    servers.fault, servers.is_known = "", True
    promote()
    line.look()
    assert line.manifests["tray"].version == 2
    assert line.newcomers.fault("tray") == ""
    assert line.metrics.registry.get_sample_value(refused, {"product": "tray"}) == 0


@pytest.fixture
def try_version(models_repo, manifest_document):
    """Put version 2 of `tray` on trial; keywords replace keys of the trial, `manifest` those of its manifest."""

    def write(manifest=(), **keys):
        (models_repo / "tray/candidate.json").write_text(
            json.dumps(manifest_document("tray", **(NEXT | dict(manifest))))
        )
        words = {"mode": "canary", "percent": 10, **NEXT, "at": "now", "by": "anna"} | keys
        (models_repo / "tray/rollout.json").write_text(json.dumps(words))

    return write


@pytest.fixture
def trial(line, servers, models_repo):
    """The line of `tray` alone; gives what a look does with the trial."""
    (models_repo / "cable-set/manifest.json").unlink()

    def look():
        del servers.did[:]
        line.look()
        return servers.did

    return look


def test_a_version_on_trial_is_checked_once_and_then_offered(trial, line, try_version, models_repo):
    """Checked as a promoted one; another share begins it anew; taken away it is withdrawn, and its late answers still
    find its manifest."""
    try_version()
    assert trial() == [("withdraw", "tray", None), ("check", "tray", 2), ("learn", "tray", 2), ("offer", "tray", 10)]
    assert line.newcomers.candidate("tray")[1] == ""
    assert trial() == []
    try_version(percent=50)
    assert trial()[-1] == ("offer", "tray", 50)
    (models_repo / "tray/rollout.json").unlink()
    assert trial() == [("withdraw", "tray", None)]
    assert line.newcomers.candidate("tray") is None
    assert line.manifests["tray"].version == 1
    assert line.manifests.of("tray", Model("tray", "2", NEXT["model_sha256"])).version == 2


@pytest.mark.parametrize("fault", ["warm-up", "limits", "pictures", "manifest"])
def test_a_version_that_is_unfit_is_not_tried(trial, line, servers, try_version, fault):
    """The version in force judges all parts, one line of the log and the heartbeat say why; put right, it is tried."""
    servers.fault = "a black picture failed" if fault == "warm-up" else ""
    servers.is_known = fault != "limits"
    try_version({"map_shape": [32]} if fault == "manifest" else {})
    if fault == "pictures":
        try_version({"input": {"height": 128, "width": 128, "dtype": "uint8", "layout": "HWC", "colour": "RGB"}})
    with structlog.testing.capture_logs() as said:
        assert "offer" not in {word for word, *_ in trial()}
        trial()
    assert [each["event"] for each in said] == ["version on trial not tried"]
    assert line.newcomers.candidate("tray")[1] != ""
    servers.fault, servers.is_known = "", True
    try_version()
    assert trial()[-1] == ("offer", "tray", 10)
    assert line.newcomers.candidate("tray")[1] == ""


def test_nothing_is_tried_on_a_product_that_a_graph_scores(trial, line, try_version, graphs):
    """A graph asks for one version: the heartbeat and one line of the log say why no part is tried."""
    graphs.append("tray")
    try_version()
    with structlog.testing.capture_logs() as said:
        assert "offer" not in {word for word, *_ in trial()}
    assert [each["event"] for each in said] == ["version on trial not tried"]
    assert "`inference: graph`" in line.newcomers.candidate("tray")[1]


def test_a_canary_that_is_promoted_is_no_trial_any_more(trial, line, try_version, promote):
    """Whichever file is seen first: the version is in force, and nothing is beside it."""
    try_version()
    trial()
    promote()
    assert [word for word, *_ in trial()] == ["check", "learn", "take", "take", "withdraw"]
    assert line.newcomers.candidate("tray") is None
    assert line.manifests["tray"].version == 2
    assert trial() == []


class TestSigned:
    """A line whose file names a signer."""

    @pytest.fixture
    def keys(self, tmp_path):
        return make_keys(tmp_path, "mine")

    @pytest.fixture
    def signer(self, keys):
        return keys[1]

    @pytest.fixture
    def tray(self, models_repo):
        return models_repo / "tray"

    def test_a_promoted_version_without_its_signature_gets_no_traffic(self, line, servers, promote, keys, tray):
        """Triton is not even asked; log, metric and heartbeat say why. Signed, it is taken; the one in force, which the
        start has checked, is left alone."""
        (tray.parent / "cable-set/manifest.json").unlink()
        line.look()
        assert line.newcomers.fault("tray") == ""
        promote()
        with structlog.testing.capture_logs() as said:
            line.look()
            line.look()
        assert [each["event"] for each in said] == ["new version not judged with"]
        assert (servers.did, line.manifests["tray"].version) == ([], 1)
        assert "not signed" in line.newcomers.fault("tray")
        assert line.metrics.registry.get_sample_value("inspection_version_refused", {"product": "tray"}) == 1
        sign(tray / "manifest.json", keys[0])
        line.look()
        assert (line.manifests["tray"].version, line.newcomers.fault("tray")) == (2, "")

    def test_a_version_without_its_signature_is_not_tried(self, trial, line, try_version, keys, tray):
        """Neither as canary nor as shadow; signed, it is."""
        try_version()
        assert trial() == [("withdraw", "tray", None)] * 2
        assert "not signed" in line.newcomers.candidate("tray")[1]
        sign(tray / "candidate.json", keys[0])
        assert trial()[-1] == ("offer", "tray", 10)
