"""Thresholds against the real Redis: who may do what, two people, hostile records, restored backups, TLS."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import structlog
import yaml
from exported import PRODUCT, tiny
from line_process import LineProcess, received
from redis_server import RedisServer, make_certificates

from pipeline import cli, limits
from pipeline.cli_thresholds import threshold_doubts
from pipeline.errors import CheckError, ConfigError, DependencyError
from pipeline.health import Health
from pipeline.limits import Change
from pipeline.manifest import Manifest, read_manifest
from pipeline.metrics import Metrics
from pipeline.model_repository import ModelRepository
from pipeline.servers import Redis as RedisSettings
from pipeline.threshold_store import CHANNEL, KEY, POLICY_KEY, Policy, ThresholdStore
from pipeline.thresholds import ThresholdCache
from pipeline.types import Model, ThresholdSource

MODELS = Path(__file__).resolve().parents[2] / "models_repo"
USERS = {"line": "line", "anna": "engineer", "ben": "engineer", "shared": "engineer", "quinn": "quality"}


@pytest.fixture(autouse=True)
def _logs_as_before():
    before = structlog.get_config()
    structlog.configure(processors=[structlog.testing.LogCapture()])
    yield
    structlog.configure(**before)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    return make_certificates(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory, certificates):
    with RedisServer(tmp_path_factory.mktemp("redis"), certificates=certificates, users=USERS) as server:
        yield server


@pytest.fixture
def server(shared_server):
    """The server, empty."""
    with shared_server.admin() as admin:
        admin.flushall()
        admin.acl_log_reset()
    return shared_server


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    return read_manifest(MODELS, "cable-set")


@pytest.fixture
def store_of(server):
    """Open the store as one of the users; closed after the test."""
    stores = []

    def make(user, **more):
        store = ThresholdStore(RedisSettings.model_validate_json(json.dumps(server.settings(user, **more))))
        stores.append(store)
        return store

    yield make
    for store in stores:
        store.client.close()


@pytest.fixture
def watching(server, manifest, tmp_path):
    """Run the line's cache as the user `line`; gives it with its metrics."""

    @contextmanager
    def run(**more):
        values = server.settings("line", snapshot=str(tmp_path / "snapshot.json"), **more)
        settings = RedisSettings.model_validate_json(json.dumps(values))
        metrics = Metrics()
        cache = ThresholdCache(
            ThresholdStore(settings), {manifest.product: manifest}, settings, metrics=metrics, health=Health()
        )
        with closing(cache):
            cache.start()
            cache.metrics = metrics
            yield cache

    return run


def until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def unused(cache, product):
    """The reasons for which the record is not used, as the metrics say."""
    (family,) = (each for each in cache.metrics.registry.collect() if each.name == "inspection_threshold_unused")
    return {each.labels["reason"] for each in family.samples if each.labels["product"] == product and each.value == 1}


def change(manifest, ng, review=None, **more):
    return Change(manifest.product, ng, ng if review is None else review, manifest.model_sha256, **more)


def test_a_line_may_read_and_nothing_else(server, store_of, manifest, watching):
    """With the documented rights the line follows changes; it can write nothing, and is told which right it lacks."""
    with watching() as cache:
        (written,) = store_of("anna").write([change(manifest, 7.5, 5.0, reason="overkill")], author="Anna")
        until(lambda: cache.get(manifest.product).ng == 7.5)
        assert (cache.get(manifest.product).version, written.version) == (1, 1)
    assert server.admin().acl_log() == []  # nothing that line or engineer did was refused
    with pytest.raises(DependencyError, match="user 'line' lacks a right"):
        store_of("line").write([change(manifest, 1.0)], author="the line")
    record = store_of("line").get(manifest.product)
    assert {key: record[key] for key in ("updated_by", "updated_as", "reason")} == {
        "updated_by": "Anna",
        "updated_as": "anna",
        "reason": "overkill",
    }


def test_an_engineer_cannot_change_the_rule(store_of):
    """The two-person rule is changed by `quality` alone."""
    with pytest.raises(DependencyError, match="user 'anna' lacks a right"):
        store_of("anna").set_policy(Policy(approvals=1), author="Anna")
    store_of("quinn").set_policy(Policy(approvals=2, expiry_s=3600), author="Quinn", reason="audit")
    assert store_of("anna").policy() == Policy(approvals=2, expiry_s=3600)


def test_two_people_put_limits_in_force(server, store_of, manifest):
    """Under the rule a change waits; the proposer cannot approve it under any spelling, a second person can, once."""
    anna, ben, product = store_of("anna"), store_of("ben"), manifest.product
    store_of("quinn").set_policy(Policy(approvals=2, expiry_s=600), author="Quinn")
    (waiting,) = anna.write([change(manifest, 7.5, reason="overkill")], author="Anna B")
    assert waiting.version is None
    assert anna.get(product) == {}
    assert 0 < server.admin().ttl(f"{KEY}{product}:proposal") <= 600
    for name in ("Anna B", " anna  b "):
        with pytest.raises(CheckError, match="the same person"):
            ben.approve(product, waiting.proposal, author=name, model_sha256=manifest.model_sha256)
    with pytest.raises(CheckError, match="no proposal"):
        ben.approve(product, "00000000", author="Ben", model_sha256=manifest.model_sha256)
    with pytest.raises(CheckError, match="another model"):
        ben.approve(product, waiting.proposal, author="Ben", model_sha256="0" * 64)
    assert ben.approve(product, waiting.proposal, author="Ben", model_sha256=manifest.model_sha256) == 1
    record = anna.get(product)
    assert (record["ng"], record["updated_by"], record["approved_by"], record["approved_as"]) == (
        "7.5",
        "Anna B",
        "Ben",
        "ben",
    )
    with pytest.raises(CheckError, match="no proposal"):
        ben.approve(product, waiting.proposal, author="Ben", model_sha256=manifest.model_sha256)
    assert [entry["action"] for entry in anna.history(product, 10)] == ["set", "proposed"]


def test_two_people_may_have_to_be_two_users_of_redis(store_of, manifest):
    """With `people: users` another name is not enough: the password has to be another person's too."""
    store_of("quinn").set_policy(Policy(approvals=2, people="users"), author="Quinn")
    (waiting,) = store_of("shared").write([change(manifest, 7.5)], author="Anna")
    approval = {"author": "Ben", "model_sha256": manifest.model_sha256}
    with pytest.raises(CheckError, match="the user shared of Redis"):
        store_of("shared").approve(manifest.product, waiting.proposal, **approval)
    assert store_of("ben").approve(manifest.product, waiting.proposal, **approval) == 1


def test_a_proposal_is_void_after_its_time_and_when_the_limits_have_changed(server, store_of, manifest):
    """What was proposed on other limits, or too long ago, cannot be approved; a withdrawn proposal is gone."""
    anna, ben, product = store_of("anna"), store_of("ben"), manifest.product
    approval = {"author": "Ben", "model_sha256": manifest.model_sha256}
    store_of("quinn").set_policy(Policy(approvals=2), author="Quinn")
    (waiting,) = anna.write([change(manifest, 7.5)], author="Anna")
    server.admin().hset(KEY + product, "version", 9)
    with pytest.raises(CheckError, match="made for version 0, and 9 is in force"):
        ben.approve(product, waiting.proposal, **approval)
    (waiting,) = anna.write([change(manifest, 7.6)], author="Anna")
    server.admin().pexpire(f"{KEY}{product}:proposal", 1)
    time.sleep(0.05)
    with pytest.raises(CheckError, match="no proposal"):
        ben.approve(product, waiting.proposal, **approval)
    (waiting,) = anna.write([change(manifest, 7.7)], author="Anna")
    assert anna.proposal(product)["expires_at"]
    ben.withdraw(product, waiting.proposal, author="Ben", model_sha256=manifest.model_sha256, reason="too high")
    assert anna.proposal(product) == {}
    assert [entry["action"] for entry in anna.history(product, 2)] == ["withdrawn", "proposed"]


@pytest.mark.parametrize("rule", [{"approvals": "none"}, {"people": "x"}, {"approvals": "1.0"}, "text"])
def test_a_rule_that_makes_no_sense_demands_two_people(server, store_of, manifest, rule):
    """A policy written by hand never lets one person through by accident."""
    if isinstance(rule, str):
        server.admin().set(POLICY_KEY, rule)
    else:
        server.admin().hset(POLICY_KEY, mapping=rule)
    assert store_of("anna").policy().approvals == 2
    (written,) = store_of("anna").write([change(manifest, 7.5)], author="Anna")
    assert (written.version, written.proposal is not None) == (None, True)


def test_several_changes_are_written_at_once_or_not_at_all(store_of, manifest):
    """One product that somebody changed meanwhile keeps all of them from being written."""
    anna = store_of("anna")
    other = replace(change(manifest, 3.0), product="other")
    anna.write([change(manifest, 7.5)], author="Anna")
    with pytest.raises(CheckError, match="at version 1, not 0"):
        anna.write([replace(other, expected="0"), change(manifest, 8.0, expected="0")], author="Ben")
    assert anna.get("other") == {}
    written = anna.write([other, change(manifest, 8.0, expected="1")], author="Ben")
    assert [each.version for each in written] == [1, 2]


HOSTILE = {
    "nan": {"ng": "nan"},
    "infinite": {"ng": "inf", "review": "1"},
    "text": {"ng": "high"},
    "crossed": {"review": "9e9"},
    "negative": {"version": "-3"},
    "huge-version": {"version": str(2**70)},
    "float-version": {"version": "3.0"},
    "empty": {"ng": ""},
    "bytes": {"ng": b"\xff\xfe\x00"},
    "ten-megabytes": {"ng": "9" * 10_000_000},
    "no-ng": {"ng": None},
    "no-version": {"version": None},
    "no-model": {"model_sha256": None},
}


def spoil(server, key, fields):
    """Write by hand, as redis-cli does; None takes a field away."""
    with server.admin() as admin:
        for name, value in fields.items():
            admin.hset(key, name, value) if value is not None else admin.hdel(key, name)
        admin.publish(CHANNEL, b"\xff" * 100)


@pytest.mark.parametrize("fields", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_record_never_moves_a_running_line(server, store_of, manifest, watching, fields):
    """A record spoilt by hand: the last good limits hold, metrics say why, and a `set` by the command heals it."""
    product, anna = manifest.product, store_of("anna")
    anna.write([change(manifest, 7.5, 5.0)], author="Anna")
    with watching(refresh_s=600) as cache:
        assert cache.get(product).source is ThresholdSource.REDIS
        spoil(server, KEY + product, fields)
        until(lambda: unused(cache, product))
        held = cache.get(product)
        if fields.keys() == {"model_sha256"}:
            assert (held.source, unused(cache, product)) == (ThresholdSource.MANIFEST, {"other_model"})
        else:
            assert (held.ng, held.review, held.version, held.source) == (7.5, 5.0, 1, ThresholdSource.CACHE)
        (written,) = anna.write([change(manifest, 8.5)], author="Anna")
        assert written.version == 2
        until(lambda: cache.get(product).version == 2)
        assert cache.get(product).source is ThresholdSource.REDIS
        assert unused(cache, product) == set()


def test_fields_that_nobody_asked_for_do_no_harm(server, store_of, manifest, watching):
    """Ten megabytes in a field that the line does not read are never fetched, and the limits beside them hold."""
    product = manifest.product
    store_of("anna").write([change(manifest, 7.5)], author="Anna")
    with watching(refresh_s=600) as cache:
        spoil(server, KEY + product, {"reason": "x" * 10_000_000, "more": "y" * 10_000_000, "ng": "7.75"})
        until(lambda: cache.get(product).ng == 7.75)
    with pytest.raises(ConfigError, match="`reason` has 10000000 bytes"):
        store_of("anna").get(product)


def test_a_row_of_nines_ends_no_product(server, store_of, manifest, watching):
    """After the highest version that can be counted on from, limits still come into force."""
    product, anna = manifest.product, store_of("anna")
    anna.write([change(manifest, 7.5)], author="Anna")
    with watching(refresh_s=600) as cache:
        spoil(server, KEY + product, {"version": "9" * 14})
        for ng in (8.5, 9.5):
            anna.write([change(manifest, ng)], author="Anna")
            until(lambda ng=ng: cache.get(product).ng == ng)


@pytest.mark.parametrize("kind", ["string", "list", "set"])
def test_a_key_of_another_type_is_healed(server, store_of, manifest, watching, kind):
    """A key that is no hash costs that product its record and nobody the line; `set` replaces it."""
    product, anna = manifest.product, store_of("anna")
    anna.write([change(manifest, 7.5)], author="Anna")
    with watching(refresh_s=600) as cache, server.admin() as admin:
        admin.delete(KEY + product)
        {"string": admin.set, "list": admin.rpush, "set": admin.sadd}[kind](KEY + product, "x")
        admin.publish(CHANNEL, product)
        until(lambda: unused(cache, product) == {"invalid"})
        assert cache.get(product).ng == 7.5
        with pytest.raises(ConfigError, match="of another type"):
            anna.get(product)
        assert anna.write([change(manifest, 8.5)], author="Anna")[0].version == 2
        until(lambda: cache.get(product).ng == 8.5)


def test_a_history_of_another_type_stops_the_write_before_it_begins(server, store_of, manifest):
    """No record without its history: what cannot be noted is not put in force."""
    server.admin().set(f"{KEY}{manifest.product}:history", "x")
    with pytest.raises(ConfigError, match="is no history"):
        store_of("anna").write([change(manifest, 7.5)], author="Anna")
    assert store_of("anna").get(manifest.product) == {}


@pytest.mark.parametrize("how", ["older", "lost"])
def test_a_restored_backup_does_not_bring_old_limits_back(server, store_of, manifest, watching, how):
    """Redis with older limits, or none: those in force hold, also over a restart, until somebody sets limits again."""
    product, anna = manifest.product, store_of("anna")
    anna.write([change(manifest, 7.5)], author="Anna")
    with server.admin() as admin:
        backup = admin.hgetall(KEY + product)
        time.sleep(0.01)
        anna.write([change(manifest, 8.5)], author="Anna")
        with watching(refresh_s=600) as cache:
            admin.delete(KEY + product, f"{KEY}{product}:history")
            if how == "older":
                admin.hset(KEY + product, mapping=backup)
            admin.publish(CHANNEL, product)
            until(lambda: unused(cache, product) == {"older_version"})
            held = cache.get(product)
            assert (held.ng, held.version, held.source) == (8.5, 2, ThresholdSource.CACHE)
    with watching(refresh_s=600) as cache:
        held = cache.get(product)
        assert (held.ng, held.version, held.source) == (8.5, 2, ThresholdSource.FILE)
        anna.write([change(manifest, 9.5)], author="Anna")
        until(lambda: cache.get(product).ng == 9.5)
        assert cache.get(product).version == (2 if how == "older" else 1)
        assert unused(cache, product) == set()


def test_a_change_during_a_broken_subscription_is_not_missed(server, store_of, manifest, watching):
    """The connection breaks, limits change, and the line has them long before its next regular read."""
    product = manifest.product
    store_of("anna").write([change(manifest, 7.5)], author="Anna")
    with watching(refresh_s=600) as cache, server.admin() as admin:
        until(lambda: admin.pubsub_numsub(CHANNEL)[0][1] == 1)
        for number in range(3):
            ng = 8.5 + number
            with admin.pipeline(transaction=True) as steps:  # nobody hears of it
                steps.hset(KEY + product, mapping={"ng": repr(ng), "version": 10 + number})
                steps.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
                steps.execute()
            until(lambda ng=ng: cache.get(product).ng == ng)
        until(lambda: cache.get(product).source is ThresholdSource.REDIS)


def test_a_restarted_redis_is_followed_again(tmp_path, manifest):
    """Redis goes and comes back, with other limits: last known good meanwhile, then the new ones."""
    with RedisServer(tmp_path / "redis", ("appendonly yes",), users=USERS) as server:
        anna = ThresholdStore(RedisSettings.model_validate_json(json.dumps(server.settings("anna"))))
        settings = RedisSettings.model_validate_json(json.dumps(server.settings("line", refresh_s=600)))
        cache = ThresholdCache(
            ThresholdStore(settings), {manifest.product: manifest}, settings, metrics=Metrics(), health=Health()
        )
        with closing(anna.client), closing(cache):
            anna.write([change(manifest, 7.5)], author="Anna")
            cache.start()
            server.stop()
            until(lambda: cache.get(manifest.product).source is ThresholdSource.CACHE)
            assert cache.get(manifest.product).ng == 7.5
            server.start()
            anna.write([change(manifest, 8.5)], author="Anna")
            until(lambda: cache.get(manifest.product).ng == 8.5)


def test_a_redis_that_hangs_is_missed_within_seconds(server, store_of, manifest, watching):
    """It takes connections and says nothing: the last good limits hold, and a start takes them from disk."""
    product = manifest.product
    store_of("anna").write([change(manifest, 7.5)], author="Anna")
    with watching(refresh_s=0.2) as cache:
        os.kill(server.process.pid, signal.SIGSTOP)
        try:
            until(lambda: cache.get(product).source is ThresholdSource.CACHE)
            with watching() as another:
                assert (another.get(product).ng, another.get(product).source) == (7.5, ThresholdSource.FILE)
        finally:
            os.kill(server.process.pid, signal.SIGCONT)
        until(lambda: cache.get(product).source is ThresholdSource.REDIS)


def test_an_older_versions_record_and_snapshot_are_read(server, store_of, manifest, watching, tmp_path):
    """Records, history and snapshots without the newer fields count as they did."""
    product = manifest.product
    fields = {"ng": "7.5", "review": "5.0", "version": "4", "model_sha256": manifest.model_sha256}
    told = {"updated_at": "2026-11-20T10:00:00.000+00:00", "updated_by": "Anna", "reason": "old"}
    with server.admin() as admin:
        admin.hset(KEY + product, mapping=fields | told)
        admin.xadd(f"{KEY}{product}:history", fields | told)
    (tmp_path / "snapshot.json").write_text(json.dumps({product: fields | {"version": "9", "ng": "99.0"}}))
    with watching() as cache:
        assert (cache.get(product).ng, cache.get(product).version) == (7.5, 4)
    assert store_of("anna").write([change(manifest, 8.5)], author="Anna")[0].version == 5
    assert [entry["version"] for entry in store_of("anna").history(product, 5)] == ["5", "4"]


def tls(server, certificates, **more):
    url = f"rediss://127.0.0.1:{server.tls_port}/0"
    return server.settings("anna", url=url, ca_file=str(certificates.ca_crt)) | more


def asked(values):
    store = ThresholdStore(RedisSettings.model_validate_json(json.dumps(values)))
    with closing(store.client):
        return store.get("cable-set")


def test_thresholds_travel_over_tls(server, certificates, store_of, manifest):
    """With password, user and TLS a change is written and read."""
    values = {key: value for key, value in tls(server, certificates).items() if key != "user"}
    store_of("anna", **values).write([change(manifest, 7.5)], author="Anna")
    assert asked(tls(server, certificates))["ng"] == "7.5"


@pytest.mark.parametrize(
    ("spoilt", "told", "hint"),
    [
        ({"password_file": "wrong"}, "user 'anna' or its password is refused", "password_file"),
        ({"user": "", "password_file": None}, "it wants a password", "password_file"),
        ({"ca_file": "other"}, "its certificate is not trusted", "redis.ca_file"),
        ({"ca_file": None}, "its certificate is not trusted", "redis.ca_file"),
        ({"url": "redis"}, "it hangs up on plain text", "rediss://"),
        ({"url": "rediss"}, "it does not answer in TLS", "redis://"),
    ],
    ids=["password", "no-password", "other-authority", "system-authority", "plain-to-tls", "tls-to-plain"],
)
def test_a_refusal_is_told_in_words(server, certificates, tmp_path, spoilt, told, hint):
    """Each way to be turned away has its own message and remedy, and no message holds the password."""
    (tmp_path / "wrong").write_text("not-the-password")
    places = {
        "wrong": str(tmp_path / "wrong"),
        "other": str(certificates.other_crt),
        "redis": f"redis://127.0.0.1:{server.tls_port}/0",
        "rediss": f"rediss://127.0.0.1:{server.port}/0",
    }
    values = tls(server, certificates) | {key: places.get(value, value) for key, value in spoilt.items()}
    if spoilt.get("url") == "redis":
        del values["ca_file"]
    with pytest.raises(DependencyError, match=told) as caught:
        asked(values)
    assert hint in caught.value.hint
    assert "not-the-password" not in f"{caught.value} {caught.value.hint}"
    assert "password-of-anna" not in f"{caught.value} {caught.value.hint}"


def test_a_certificate_for_another_name_is_refused(server, certificates):
    """The server's name has to stand in its certificate."""
    values = tls(server, certificates, url=f"rediss://localhost:{server.tls_port}/0")
    with pytest.raises(DependencyError, match="its certificate is for another name"):
        asked(values)


def test_a_server_may_ask_for_a_client_certificate(tmp_path, certificates):
    """Without one, with a foreign one or with a wrong key the refusal says what is missing; with its own it works."""
    lines = ("tls-auth-clients yes",)
    with RedisServer(tmp_path / "redis", lines, certificates=certificates, users=USERS) as server:
        own = {"certificate_file": str(certificates.client_crt), "key_file": str(certificates.client_key)}
        other = {"certificate_file": str(certificates.other_crt), "key_file": str(certificates.other_key)}
        assert asked(tls(server, certificates, **own)) == {}
        for pair in ({}, other):
            with pytest.raises(DependencyError, match="it refuses this client's TLS") as caught:
                asked(tls(server, certificates, **pair))
            assert "redis.certificate_file" in caught.value.hint
        with pytest.raises(DependencyError, match="files of certificate, key or authority cannot be used"):
            asked(tls(server, certificates, **own | {"key_file": str(certificates.other_key)}))


def test_limits_travel_in_a_file(server, store_of, manifest):
    """An export imported on what it came from changes nothing; what a backup lost comes back above its own version."""
    product, anna = manifest.product, store_of("anna")
    anna.write([change(manifest, 7.5, 5.0, reason="ünïcode: yes")], author="Anna")
    anna.write([change(manifest, 8.5, 5.0)], author="Anna")
    document = yaml.safe_load(yaml.safe_dump(limits.to_document({product: anna.get(product)})))
    manifests = {product: manifest}
    assert limits.plan(document, "file", {product: anna.get(product)}, manifests) == []
    server.admin().delete(KEY + product, f"{KEY}{product}:history")
    (lost,) = limits.plan(document, "file", {product: anna.get(product)}, manifests)
    assert anna.write([lost], author="Anna", action="import")[0].version == 3
    assert anna.get(product)["ng"] == "8.5"


@pytest.fixture
def logicrd(monkeypatch, capsys):
    """Run the command, in this process, as a shell would; gives exit code, stdout and stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["logicrd", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        captured = capsys.readouterr()
        return caught.value.code, captured.out, captured.err

    return run


@pytest.fixture
def answered(logicrd):
    """Run the command, which has to succeed; gives its JSON."""

    def run(*arguments):
        code, out, err = logicrd(*arguments, "--json")
        assert code == 0, err
        return json.loads(out)

    return run


@pytest.fixture
def line_of(server, line_file):
    """Write the line file of an engineer, on this file's Redis."""

    def write(user, stack=None, product="cable-set", **settings):
        made = line_file(stack, redis=server.settings(user), **settings)
        return made.camera(type="folder", path=".", product=product).write().rename(made.folder / f"{user}.yaml")

    return write


def test_the_commands_tell_the_story_of_a_limit(server, line_of, logicrd, answered, tmp_path):
    """Set, rolled back, exported, lost, imported: each step has an author and a version, and none is given twice."""
    path = line_of("anna")
    told = ("-c", path, "--author", "Anna", "--reason")
    answered("thresholds", "set", "cable-set", "--ng", "7.5", "--review", "5", *told, "first")
    answered("thresholds", "set", "cable-set", "--ng", "8.5", *told, "second")
    row = answered("thresholds", "rollback", "cable-set", *told, "overkill was better")["after"]
    assert (row["ng"], row["review"], row["version"]) == ("7.5", "5.0", "3")
    assert row["reason"] == "rollback to version 1: overkill was better"
    assert logicrd("thresholds", "export", "-c", path, "--out", tmp_path / "limits.yaml")[0] == 0
    again = ("thresholds", "import", tmp_path / "limits.yaml", "-c", path, "--author", "Ben")
    assert answered(*again)["changes"] == []
    server.admin().flushall()
    assert len(answered(*again, "--dry-run")["changes"]) == 1
    assert answered("thresholds", "get", "cable-set", "-c", path)["source"] == "manifest"
    assert answered(*again)["changes"][0]["version"] == "4"
    answered("thresholds", "set", "cable-set", "--ng", "9", *told, "third")
    code, _, err = logicrd(*again)
    assert (code, "version 3, Redis has version 5" in err) == (5, True)
    history = answered("thresholds", "history", "cable-set", "-c", path)
    assert [(each["version"], each["action"], each["updated_by"]) for each in history] == [
        ("5", "set", "Anna"),
        ("4", "import", "Ben"),
    ]


def test_the_commands_keep_the_two_person_rule(line_of, logicrd, answered):
    """`set` says that it only proposes and how to approve; the proposer is refused with exit 5, a second person not."""
    anna, ben, quinn = (line_of(user) for user in ("anna", "ben", "quinn"))
    code, _, err = logicrd("thresholds", "policy", "--one-person", "-c", anna)
    assert (code, "lacks a right" in err) == (4, True)
    rule = answered("thresholds", "policy", "--two-person", "--people", "users", "--expiry-h", "2", "-c", quinn)
    assert rule == {"approvals": 2, "expiry_s": 7200, "people": "users"}
    _, out, _ = logicrd("thresholds", "set", "cable-set", "--ng", "7.5", "--author", "Anna", "-c", anna)
    (waiting,) = answered("thresholds", "proposals", "-c", ben)
    assert f"logicrd thresholds approve cable-set {waiting['id']}" in out
    approve = ("thresholds", "approve", "cable-set", waiting["id"], "--author")
    assert logicrd(*approve, "Ben", "-c", anna)[0] == 5
    assert logicrd(*approve, "Anna", "-c", ben)[0] == 5
    row = answered(*approve, "Ben", "-c", ben)
    assert (row["ng"], row["updated_by"], row["approved_by"], row["version"]) == ("7.5", "Anna", "Ben", "1")
    assert answered("thresholds", "proposals", "-c", ben) == []


def test_a_record_that_is_not_used_is_shown_as_such(server, line_of, store_of, manifest, answered):
    """`get`, `list` and `check` say what a line would take, and why it is not what Redis holds."""
    path = line_of("anna")
    answered("thresholds", "set", "cable-set", "--ng", "7.5", "-c", path)
    spoil(server, f"{KEY}cable-set", {"ng": "nan"})
    (row,) = answered("thresholds", "list", "-c", path)
    assert (row["source"], row["version"]) == ("manifest", 0)
    assert "ng='nan'" in row["reason"]
    (doubt,) = threshold_doubts(store_of("line"), [manifest])
    assert "threshold of cable-set: not a threshold: ng='nan'" in doubt
    answered("thresholds", "rollback", "cable-set", "--to", "1", "-c", path)
    assert threshold_doubts(store_of("line"), [manifest]) == []
    assert answered("thresholds", "get", "cable-set", "-c", path)["ng"] == "7.5"


@pytest.mark.stack
def test_a_preview_and_a_suggestion_know_the_parts_of_the_past(stack, line_file, answered, tmp_path):
    """Of parts that a real line judged: `--dry-run` names exactly those that flip, `suggest` takes their scores."""
    made = line_file(stack)
    rng = np.random.default_rng(3)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(16):
        grain = rng.integers(0, 255, (4 + number, 16, 3), dtype=np.uint8)
        cv2.imwrite(str(pictures / f"part-{number:02}.png"), cv2.resize(grain, (256, 256)))
    path = made.camera(type="folder", path=str(pictures), product="cable-set").write()
    with LineProcess(path) as line:
        line.wait()
    events = received(stack.endpoints["kafka"], made.name, at_least=16).events
    scores = {event["data"]["partId"]: event["data"]["views"][0]["scores"]["fused"] for event in events}
    ordered = sorted(scores.values())
    middle = (ordered[9] + ordered[10]) / 2
    found = answered("thresholds", "set", "cable-set", "--ng", middle, "--dry-run", "-c", path)
    own = read_manifest(MODELS, "cable-set").calibration.thresholds

    def said(score, ng, review):
        return "NG" if score >= ng else "REVIEW" if score >= review else "OK"

    flips = {part: (said(score, own.ng, own.review), said(score, middle, middle)) for part, score in scores.items()}
    expected = {part: pair for part, pair in flips.items() if pair[0] != pair[1]}
    assert {flip["part_id"]: (flip["before"], flip["after"]) for flip in found["flips"]} == expected
    assert (found["parts"], found["flipped"], found["incomparable"]) == (16, len(expected), 0)
    assert expected
    assert answered("thresholds", "get", "cable-set", "-c", path)["source"] == "manifest"
    truth = [f"{part},{'good' if score < middle else 'bad'}" for part, score in scores.items()]
    (tmp_path / "truth.csv").write_text("\n".join(["partId,truth", *truth, "unknown-part,good"]))
    told = answered("thresholds", "suggest", "cable-set", "--reviewed", tmp_path / "truth.csv", "-c", path)
    assert (told["parts"], told["without_score"]) == (16, 1)
    assert ordered[9] < told["ng"] <= ordered[10]
    assert told["forecast"]["misses"]["count"] == 0


def test_each_version_has_limits_of_its_own(store_of, watching, manifest, tmp_path):
    """What was set for a network never meets the scores of another one: not before, while nor after a promotion; of
    what is no longer judged with nothing is kept, and a rollback finds the old limits again."""
    product = manifest.product
    following = manifest.model_copy(update={"version": manifest.version + 1, "model_sha256": "cd" * 32})
    old, new = (Model(product, str(each.version), each.model_sha256) for each in (manifest, following))
    store_of("anna").write([change(manifest, 7.5)], author="Anna")
    with watching(refresh_s=1) as cache:
        assert cache.get(product, new) is None
        assert cache.learn(following)
        assert (cache.get(product, old).ng, cache.get(product).ng) == (7.5, 7.5)
        assert cache.get(product, new) == following.suggestion
        cache.take(following)
        cache.keep(product, manifest)
        assert cache.get(product, old).ng == 7.5
        assert cache.get(product) == cache.get(product, new) == following.suggestion
        until(lambda: json.loads((tmp_path / "snapshot.json").read_text())[product]["version"] == "0")
        cache.keep(product)
        until(lambda: cache.get(product, old) is None)
        store_of("anna").write([change(following, 8.5)], author="Anna")
        until(lambda: cache.get(product).ng == 8.5)
        assert cache.learn(manifest)
        cache.take(manifest)
        assert (cache.get(product).ng, cache.get(product).source) == (7.5, ThresholdSource.REDIS)


def test_limits_of_a_version_wait_for_its_promotion(server, store_of, watching, manifest):
    """Set while it is pushed or on trial, they hold for its scores alone; promoted, they are in force at once, after a
    rollback those of the version before. Nothing is called unused meanwhile, and no right is lacking."""
    product, anna = manifest.product, store_of("anna")
    following = manifest.model_copy(update={"version": manifest.version + 1, "model_sha256": "cd" * 32})
    old, new = (Model(product, str(each.version), each.model_sha256) for each in (manifest, following))
    anna.write([change(manifest, 7.5)], author="Anna")
    anna.write([change(following, 8.0, beside=True)], author="Anna")
    with watching(refresh_s=600) as cache:
        assert cache.learn(following)
        assert (cache.get(product, old).ng, cache.get(product, new).ng) == (7.5, 8.0)
        (written,) = anna.write([change(following, 8.5, beside=True, expected="2")], author="Anna")
        until(lambda: cache.get(product, new).ng == 8.5)
        assert (cache.get(product).ng, cache.get(product).version, written.version) == (7.5, 1, 3)
        cache.take(following)
        cache.keep(product, manifest)
        assert (cache.get(product).ng, cache.get(product).source) == (8.5, ThresholdSource.REDIS)
        anna.write([change(following, 9.5)], author="Anna")
        until(lambda: cache.get(product).ng == 9.5)
        assert (cache.get(product, old).ng, cache.get(product, old).version) == (7.5, 1)
        cache.take(manifest)
        until(lambda: cache.get(product).ng == 7.5)
        assert unused(cache, product) == set()
    assert [entry["version"] for entry in anna.history(product, 9)] == ["4", "3", "2", "1"]
    assert server.admin().acl_log() == []


def test_a_lost_record_of_a_promoted_version_is_missed(server, store_of, watching, manifest):
    """A backup from before its limits were set: those in force hold, as they do for a record of the product."""
    product, anna = manifest.product, store_of("anna")
    before = manifest.model_copy(update={"version": manifest.version - 1, "model_sha256": "cd" * 32})
    anna.write([change(before, 7.5)], author="Anna")
    anna.write([change(manifest, 8.5, beside=True)], author="Anna")
    with watching(refresh_s=600) as cache:
        assert cache.get(product).ng == 8.5
        server.admin().delete(f"{KEY}{product}:{manifest.model_sha256}")
        server.admin().publish(CHANNEL, product)
        until(lambda: unused(cache, product) == {"older_version"})
        assert (cache.get(product).ng, cache.get(product).source) == (8.5, ThresholdSource.CACHE)


def test_two_people_put_limits_of_a_version_on_trial_in_force(store_of, manifest):
    """A proposal for a version that is not served can be approved before its promotion and after it."""
    anna, ben, product = store_of("anna"), store_of("ben"), manifest.product
    following = manifest.model_copy(update={"model_sha256": "cd" * 32})
    sha = following.model_sha256
    store_of("quinn").set_policy(Policy(approvals=2), author="Quinn")
    for version, beside in ((1, True), (2, False)):
        (waiting,) = anna.write([change(following, 8.5, beside=True)], author="Anna")
        assert anna.proposal(product) == {}
        assert anna.proposal(product, sha)["id"] == waiting.proposal
        with pytest.raises(CheckError, match="no proposal"):
            ben.approve(product, waiting.proposal, author="Ben", model_sha256=manifest.model_sha256)
        given = ben.approve(product, waiting.proposal, author="Ben", model_sha256=sha, beside=beside)
        assert (given, anna.proposal(product, sha)) == (version, {})
        assert anna.of_model(product, sha)["version"] == str(version)
    assert anna.get(product)["version"] == "2"


def test_the_commands_set_limits_of_a_version_that_is_not_served(line_of, logicrd, answered, tmp_path):
    """By the version's number, pushed or on trial; shown beside the served one's, and in force with its promotion."""
    tiny(tmp_path / "models", 3)
    repository = ModelRepository(tmp_path / "models", tmp_path / "models.versions")
    with repository.locked():
        repository.adopt(PRODUCT)
        repository.push(tiny(tmp_path / "export", 4))
    path = line_of("anna", triton={"models_repo": str(tmp_path / "models")}, product=PRODUCT)
    told = ("thresholds", "set", PRODUCT, "-c", path, "--ng")
    answered(*told, "7.5")
    row = answered(*told, "8.5", "--model-version", "4")["after"]
    assert (row["model_version"], row["ng"], row["version"]) == (4, "8.5", "2")
    shown = {row["model_version"]: row["ng"] for row in answered("thresholds", "list", "-c", path)}
    assert shown == {3: "7.5", 4: "8.5"}
    code, _, err = logicrd(*told, "9", "--model-version", "9")
    assert (code, "no version 9" in err) == (3, True)
    (repository.models / PRODUCT / "manifest.json").write_bytes(
        (repository.tree(PRODUCT, 4) / "manifest.json").read_bytes()
    )
    get = ("thresholds", "get", PRODUCT, "-c", path)
    assert (answered(*get)["ng"], answered(*get, "--model-version", "3")["ng"]) == ("8.5", "7.5")
    answered("thresholds", "set", PRODUCT, "-c", path, "--ng", "9", "--version", "2")
    back = answered("thresholds", "rollback", PRODUCT, "-c", path)["after"]
    assert (back["ng"], back["version"], answered(*get, "--model-version", "3")["ng"]) == ("8.5", "4", "7.5")
