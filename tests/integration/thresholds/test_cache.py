"""The line's copy of the real Redis: hostile records, restored backups, a Redis that goes, limits of versions."""

from __future__ import annotations

import json
import os
import signal
import time
from contextlib import closing

import pytest
from integration.thresholds.watched import USERS, change, spoil, until, unused
from redis_server import RedisServer

from pipeline.errors import ConfigError
from pipeline.health import Health
from pipeline.metrics import Metrics
from pipeline.servers import Redis as RedisSettings
from pipeline.threshold_store import CHANNEL, KEY, ThresholdStore
from pipeline.thresholds import ThresholdCache
from pipeline.types import Model, ThresholdSource

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


def test_limits_of_a_version_wait_for_its_promotion(server, store_of, watching, manifest, tmp_path):
    """Set while it is pushed or on trial, they hold for its scores alone; promoted, they are in force at once, and
    after a restart without Redis; after a rollback those of the version before. Nothing is called unused meanwhile, and
    no right is lacking."""
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
        until(lambda: json.loads((tmp_path / "snapshot.json").read_text())[product]["ng"] == "8.5")
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
