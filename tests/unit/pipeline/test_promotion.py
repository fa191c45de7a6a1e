"""A promotion that fails, or is killed, at any step: one whole version is served, and the command can be repeated.

The servers are a stand-in here, because no real one fails at a step of one's choice; with real ones: tests/integration.
"""

from __future__ import annotations

import itertools
import json
from contextlib import contextmanager

import pytest
from exported import PRODUCT, shipped, tiny, write_manifest

from pipeline import promotion
from pipeline.errors import CheckError
from pipeline.model_repository import ModelRepository
from pipeline.promotion import promote, rollback, stop_trial, try_beside
from pipeline.releases import config_text, steps_of, versions_of
from pipeline.rollouts import read_candidate


class Killed(BaseException):
    """The end of the process."""


class Servers:
    """Replicas that do what they are told until the call `fails_at`."""

    def __init__(self, fails_at=-1, error=CheckError):
        self.calls = []
        self._fails_at = fails_at
        self._error = error

    def _call(self, *words):
        self.calls.append(words)
        if len(self.calls) - 1 == self._fails_at:
            raise self._error("no memory")

    def load(self, model):
        self._call("load", model)

    def unload(self, model):
        self._call("unload", model)

    def try_out(self, *_):
        self._call("try")
        return {"one": 1.0}

    def prove(self, *_):
        self._call("prove")

    def put_back(self, models, gone):
        self.calls += [("unload", model) for model in gone] + [("load", model) for model in models]
        return []


@pytest.fixture
def repository(tmp_path):
    """A repository that serves version 3, and a store that has version 4."""
    tiny(tmp_path / "models", 3)
    made = ModelRepository(tmp_path / "models", tmp_path / "store")
    with made.locked():
        made.push(tiny(tmp_path / "export", 4))
    return made


def run(repository, servers, version=4, **options):
    with repository.locked():
        return promote(repository, servers, PRODUCT, version, by="anna", reason="better", **options)


def loadable(repository, model):
    """The versions of a model that a server started now would load; each has its folder."""
    folders = [int(path.name) for path in (repository.models / model).iterdir() if path.name.isdecimal()]
    versions = versions_of(repository.config(model)) or [max(folders)]
    assert set(versions) <= set(folders)
    return versions


def served(repository):
    """The version that a server started now would serve, checked for being one whole version; and the manifest's."""
    for name in (*repository.addressed(PRODUCT), PRODUCT):
        (version,) = loadable(repository, name)
        assert name in (PRODUCT, f"{PRODUCT}.v{version}")
        for step in repository.config(name).ensemble_scheduling.step:
            versions = loadable(repository, step.model_name)
            chosen = max(versions) if step.model_version == -1 else step.model_version
            assert chosen in versions
            assert chosen == (1 if step.model_name.startswith("teacher.") else version)
    return version, repository.promoted(PRODUCT).version


def test_a_version_is_tried_first_and_switched_last(repository):
    """Nothing is loaded before the trial; then the steps in their order, then the ensemble, and the proof."""
    servers = Servers()
    run(repository, servers)
    steps = steps_of(repository.config(PRODUCT))
    loads = [("load", model) for model in (*steps, f"{PRODUCT}.v3", f"{PRODUCT}.v4", PRODUCT)]
    assert servers.calls == [("try",), ("load", PRODUCT), *loads, ("prove",)]
    assert served(repository) == (4, 4)
    assert repository.addressed(PRODUCT) == [f"{PRODUCT}.v3", f"{PRODUCT}.v4"]
    (event,) = repository.history(PRODUCT)
    assert (event.action, event.version, event.previous, event.by, event.reason) == ("promote", 4, 3, "anna", "better")


def test_a_version_goes_and_comes_back(repository):
    """A rollback serves the version before, which was never pushed; a second one says that there is none."""
    run(repository, Servers())
    with repository.locked():
        assert rollback(repository, Servers(), PRODUCT, by="ben", reason="worse").version == 3
    assert served(repository) == (3, 3)
    assert [event.action for event in repository.history(PRODUCT)] == ["promote", "rollback"]
    with repository.locked(), pytest.raises(CheckError, match="no version was promoted before"):
        rollback(repository, Servers(), PRODUCT, by="ben", reason="worse")


def test_what_was_served_two_promotions_ago_is_let_go(repository, tmp_path):
    """Its own ensemble is unloaded before the steps that it names are."""
    run(repository, Servers())
    with repository.locked():
        repository.push(tiny(tmp_path / "newer", 5))
    servers = Servers()
    run(repository, servers, 5)
    assert served(repository) == (5, 5)
    assert repository.addressed(PRODUCT) == [f"{PRODUCT}.v4", f"{PRODUCT}.v5"]
    steps = steps_of(repository.config(PRODUCT))
    gone = servers.calls.index(("unload", f"{PRODUCT}.v3"))
    assert gone < min(servers.calls.index(("load", step)) for step in steps)


@pytest.mark.parametrize("fails_at", range(11))
def test_a_failure_at_any_call_leaves_the_old_version(repository, fails_at):
    """Whichever call fails, files and servers are back at version 3, nothing is recorded, and a second try succeeds."""
    servers = Servers(fails_at)
    with pytest.raises(CheckError, match="no memory"):
        run(repository, servers)
    assert served(repository) == (3, 3)
    assert repository.history(PRODUCT) == []
    assert not (repository.models / f"{PRODUCT}.map/4").exists()
    if fails_at > 1:
        assert servers.calls[-1] == ("load", PRODUCT)
    run(repository, Servers())
    assert served(repository) == (4, 4)


def test_a_failed_trial_touches_no_file(repository):
    """A version that fails its trial leaves the model repository as it was, byte by byte."""
    before = {path: path.read_bytes() for path in repository.models.rglob("*") if path.is_file()}
    with pytest.raises(CheckError):
        run(repository, Servers(0))
    assert {path: path.read_bytes() for path in repository.models.rglob("*") if path.is_file()} == before


@contextmanager
def killed_at(repository, monkeypatch, kill_at):
    """A command that is killed before the write of that number, and puts nothing back."""
    write, writes = repository.write, itertools.count()

    def killed(model, name, content):
        if next(writes) == kill_at:
            raise Killed
        return write(model, name, content)

    monkeypatch.setattr(promotion, "_undo", lambda *_: ([], []))
    with monkeypatch.context() as patch:
        patch.setattr(repository, "write", killed)
        with pytest.raises(Killed):
            yield


@pytest.mark.parametrize("kill_at", range(14))
def test_a_kill_at_any_write_leaves_one_whole_version(repository, monkeypatch, kill_at):
    """After a kill before any write, a server that starts serves one version whole; the command again completes it."""
    with killed_at(repository, monkeypatch, kill_at):
        run(repository, Servers())
    version, manifest = served(repository)
    assert version == (4 if kill_at == 13 else 3)
    assert manifest == 3
    run(repository, Servers())
    assert served(repository) == (4, 4)


def test_a_tuned_configuration_is_kept(repository):
    """What operators tuned on the served version holds for the next one."""
    config = repository.config(f"{PRODUCT}.map")
    config.instance_group[0].count = 2
    repository.write(f"{PRODUCT}.map", "config.pbtxt", config_text(config).encode())
    run(repository, Servers())
    assert repository.config(f"{PRODUCT}.map").instance_group[0].count == 2
    assert versions_of(repository.config(f"{PRODUCT}.map")) == [3, 4]


def test_other_tensors_take_an_interruption(repository):
    """Versions whose steps take other tensors cannot be side by side: refused; with leave the ensemble goes first."""
    config = repository.config(f"{PRODUCT}.map")
    config.input[0].dims[0] += 1
    repository.write(f"{PRODUCT}.map", "config.pbtxt", config_text(config).encode())
    with pytest.raises(CheckError, match="other tensors"):
        run(repository, Servers())
    servers = Servers()
    run(repository, servers, interrupt=True)
    assert ("unload", PRODUCT) in servers.calls
    assert versions_of(repository.config(f"{PRODUCT}.map")) == [4]
    assert repository.addressed(PRODUCT) == [f"{PRODUCT}.v4"]
    assert served(repository) == (4, 4)


def test_a_replica_that_cannot_be_put_back_is_named(repository, monkeypatch):
    """The message says what went wrong first, and which replica to restart."""
    servers = Servers(fails_at=4)
    monkeypatch.setattr(servers, "put_back", lambda *_: ["Triton at one does not answer"])
    with pytest.raises(CheckError, match=r"no memory; put back on disk, but not everywhere.*Triton at one") as caught:
        run(repository, servers)
    assert caught.value.hint == "restart those replicas"


def test_a_new_product_that_fails_leaves_nothing(tmp_path):
    """The first version of a product is gone from disk and servers when it cannot be served."""
    (tmp_path / "models").mkdir()
    repository = ModelRepository(tmp_path / "models", tmp_path / "store")
    with repository.locked():
        repository.push(tiny(tmp_path / "export", 1))
    servers = Servers(fails_at=4)
    with pytest.raises(CheckError):
        run(repository, servers, 1)
    assert list(repository.models.iterdir()) == []
    assert ("unload", PRODUCT) in servers.calls
    run(repository, Servers(), 1)
    assert served(repository) == (1, 1)


def test_a_folder_that_cannot_be_placed_takes_the_others_back(repository):
    """Files of a stranger under one model's number: what was placed before them is gone again."""
    path = repository.models / f"{PRODUCT}.map/4"
    path.mkdir()
    (path / "model.onnx").write_bytes(b"mine")
    with pytest.raises(CheckError, match="holds other files"):
        run(repository, Servers())
    assert served(repository) == (3, 3)
    assert not (repository.models / f"{PRODUCT}.bottleneck/4").exists()
    assert (path / "model.onnx").read_bytes() == b"mine"


def try_version(repository, servers, version=4, mode="canary", percent=10.0):
    with repository.locked():
        try_beside(repository, servers, PRODUCT, version, mode=mode, percent=percent, by="anna", reason="try")


def on_trial(repository):
    """What a worker would try, checked for being served whole; None for nothing."""
    rollout = repository.rollout(PRODUCT)
    if rollout is None:
        return None
    assert read_candidate(repository.models, PRODUCT, rollout).version == rollout.version
    assert f"{PRODUCT}.v{rollout.version}" in repository.addressed(PRODUCT)
    return rollout.version, rollout.mode, rollout.percent


def test_a_version_on_trial_is_loaded_beside_the_one_in_force(repository):
    """It is tried as a promoted one is, and gets an ensemble of its own; the product's stays what it was."""
    servers = Servers()
    try_version(repository, servers)
    steps = steps_of(repository.config(PRODUCT))
    loads = [("load", model) for model in (*steps, f"{PRODUCT}.v3", f"{PRODUCT}.v4")]
    assert servers.calls == [("try",), ("load", PRODUCT), *loads, ("prove",)]
    assert served(repository) == (3, 3)
    assert on_trial(repository) == (4, "canary", 10.0)
    try_version(repository, Servers(), percent=50.0)
    assert on_trial(repository) == (4, "canary", 50.0)
    run(repository, Servers())
    assert served(repository) == (4, 4)
    assert on_trial(repository) is None
    assert not (repository.models / PRODUCT / "candidate.json").exists()
    assert [event.action for event in repository.history(PRODUCT)] == ["canary", "canary", "promote"]


@pytest.mark.parametrize("mode", ["canary", "shadow"])
def test_a_trial_ends_as_if_it_had_not_been(repository, mode):
    """Its ensemble goes before the steps are told; what is served is what was, and a rollback does not return to it."""
    try_version(repository, Servers(), mode=mode)
    servers = Servers()
    with repository.locked():
        assert stop_trial(repository, servers, PRODUCT, by="ben", reason="bad").version == 4
    assert servers.calls[0] == ("unload", f"{PRODUCT}.v4")
    assert ("load", f"{PRODUCT}.map") in servers.calls
    assert (served(repository), on_trial(repository)) == ((3, 3), None)
    assert repository.addressed(PRODUCT) == [f"{PRODUCT}.v3"]
    assert versions_of(repository.config(f"{PRODUCT}.map")) == [3]
    with repository.locked(), pytest.raises(CheckError, match="no version was promoted before"):
        rollback(repository, Servers(), PRODUCT, by="ben", reason="worse")
    with repository.locked(), pytest.raises(CheckError, match=r"no version of .* is on trial"):
        stop_trial(repository, Servers(), PRODUCT, by="ben", reason="")


def test_a_rollback_takes_back_a_canary_but_not_a_shadow(repository, tmp_path):
    """A canary gives verdicts: it is what is taken back. A shadow gives none: the version in force is, and it ends."""
    run(repository, Servers())
    with repository.locked():
        repository.push(tiny(tmp_path / "newer", 5))
    for mode, version in (("canary", 4), ("shadow", 3)):
        try_version(repository, Servers(), 5, mode=mode)
        with repository.locked():
            assert rollback(repository, Servers(), PRODUCT, by="ben", reason="worse").version == version
        assert (served(repository), on_trial(repository)) == ((version, version), None)


def test_one_trial_at_a_time(repository, tmp_path):
    """While a version is on trial no other is tried or promoted; and none is tried against itself."""
    try_version(repository, Servers())
    with repository.locked():
        repository.push(tiny(tmp_path / "newer", 5))
    with pytest.raises(CheckError, match=r"version 4 is on trial \(canary\)"):
        try_version(repository, Servers(), 5)
    with pytest.raises(CheckError, match="version 4 is on trial"):
        run(repository, Servers(), 5)
    run(repository, Servers())
    with pytest.raises(CheckError, match="nothing to be tried beside"):
        try_version(repository, Servers())


@pytest.mark.parametrize("fault", ["pictures", "tensors"])
def test_what_cannot_run_beside_is_not_tried(repository, tmp_path, fault):
    """Another size of the picture, and other tensors between the steps, are named; nothing is changed."""
    if fault == "tensors":
        config = repository.config(f"{PRODUCT}.map")
        config.input[0].dims[0] += 1
        repository.write(f"{PRODUCT}.map", "config.pbtxt", config_text(config).encode())
    else:
        folder = tiny(tmp_path / "other", 5)
        manifest = json.loads((folder / "manifest.json").read_text())
        write_manifest(folder.parent, manifest | {"input": shipped()["input"] | {"height": 128}})
        with repository.locked():
            repository.push(folder)
    before = {path: path.read_bytes() for path in repository.models.rglob("*") if path.is_file()}
    with pytest.raises(CheckError, match="tensors" if fault == "tensors" else "other input"):
        try_version(repository, Servers(), 4 if fault == "tensors" else 5)
    assert {path: path.read_bytes() for path in repository.models.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("fails_at", range(10))
def test_a_trial_that_fails_to_begin_leaves_nothing(repository, fails_at):
    """Whichever call fails, files and servers are as before, no worker is told, and a second try succeeds."""
    with pytest.raises(CheckError, match="no memory"):
        try_version(repository, Servers(fails_at))
    assert (served(repository), on_trial(repository)) == ((3, 3), None)
    assert repository.addressed(PRODUCT) == []
    assert repository.history(PRODUCT) == []
    try_version(repository, Servers())
    assert on_trial(repository) == (4, "canary", 10.0)


@pytest.mark.parametrize("kill_at", range(14))
def test_a_trial_that_is_killed_is_whole_or_not_there(repository, monkeypatch, kill_at):
    """After a kill before any write, a server that starts serves the version in force; the command completes it."""
    with killed_at(repository, monkeypatch, kill_at):
        try_version(repository, Servers())
    assert (served(repository), on_trial(repository)) == ((3, 3), None)
    try_version(repository, Servers())
    assert on_trial(repository) == (4, "canary", 10.0)
