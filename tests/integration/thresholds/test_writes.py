"""Writes to the real Redis: who may do what, two people, all or nothing."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
from integration.thresholds.watched import change, until

from pipeline.errors import CheckError, ConfigError, DependencyError
from pipeline.threshold_store import KEY, POLICY_KEY, Policy


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


def test_a_history_of_another_type_stops_the_write_before_it_begins(server, store_of, manifest):
    """No record without its history: what cannot be noted is not put in force."""
    server.admin().set(f"{KEY}{manifest.product}:history", "x")
    with pytest.raises(ConfigError, match="is no history"):
        store_of("anna").write([change(manifest, 7.5)], author="Anna")
    assert store_of("anna").get(manifest.product) == {}
