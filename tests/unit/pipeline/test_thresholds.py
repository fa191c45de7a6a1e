"""Thresholds: what is refused, and what holds while Redis is away."""

import json
from contextlib import closing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ConfigError, DependencyError
from pipeline.health import Health
from pipeline.limits import Change, check_limits, parse
from pipeline.metrics import Metrics
from pipeline.servers import Redis as RedisSettings
from pipeline.threshold_store import ThresholdStore
from pipeline.thresholds import ThresholdCache
from pipeline.types import ThresholdSource

REFUSING = "redis://127.0.0.1:9/0"
OTHER_SHA = "cd" * 32


def fields_of(ng="3.5", review="2.5", version="7", sha="ab" * 32):
    return {"ng": ng, "review": review, "version": version, "model_sha256": sha}


@pytest.mark.parametrize(("ng", "review"), [("nan", "1"), ("1", "nan"), ("inf", "1"), ("1", "-inf"), ("1", "1.1")])
def test_limits_that_make_no_sense_are_refused(ng, review):
    """Limits that are not finite, or out of order, are refused when set and when read, before Redis is asked."""
    with pytest.raises(ConfigError):
        check_limits(float(ng), float(review))
    with pytest.raises(ConfigError):
        parse(fields_of(ng, review))
    store = ThresholdStore(RedisSettings(url=REFUSING))
    with closing(store.client), pytest.raises(ConfigError):
        store.write([Change("tray", float(ng), float(review), "ab" * 32)], author="eve")


def test_zero_and_equal_limits_are_limits():
    """Zero, negative and equal limits are good ones."""
    for ng, review in ((0.0, 0.0), (-1.0, -2.0), (3.0, 3.0)):
        check_limits(ng, review)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"ng": "3"},
        fields_of(ng="high"),
        fields_of(version="-1"),
        fields_of(version="1.5"),
        fields_of(version=""),
        fields_of(version="9" * 5000),
    ],
)
def test_what_is_no_threshold_is_refused(fields):
    """A hash that somebody else wrote is a ConfigError, whatever it holds."""
    with pytest.raises(ConfigError):
        parse(fields)


@given(st.dictionaries(st.sampled_from(list(fields_of())), st.text(max_size=8) | st.floats().map(repr)))
def test_nothing_that_parses_lets_everything_through(fields):
    """Over all hashes: what parses has finite limits in order and a version from 0, the rest is refused."""
    try:
        threshold = parse(fields)
    except ConfigError:
        return
    check_limits(threshold.ng, threshold.review)
    assert threshold.version >= 0


class StoreThatHolds(ThresholdStore):
    """A store that gives what it was made with; its real client knocks at a port that refuses."""

    def __init__(self, fields):
        super().__init__(RedisSettings(url=REFUSING))
        self._fields = fields

    def get(self, product, fields=()):
        del product, fields
        return self._fields


@pytest.fixture
def cache_of(make_manifest, tmp_path):
    """Start a cache on a store, and close it after the test; the snapshot lies in `snapshot.json`."""
    caches = []

    def make(store=None, products=("tray",)):
        settings = RedisSettings(url=REFUSING, snapshot=tmp_path / "snapshot.json")
        manifests = {product: make_manifest(product=product) for product in products}
        cache = ThresholdCache(
            store or ThresholdStore(settings), manifests, settings, metrics=Metrics(), health=Health()
        )
        caches.append(cache)
        cache.start()
        return cache

    yield make
    for cache in caches:
        cache.close()


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (fields_of(), (3.5, 2.5, 7)),
        ({}, (3.0, 2.0, 0)),
        (fields_of(sha=OTHER_SHA), (3.0, 2.0, 0)),
        (fields_of(sha=""), (3.0, 2.0, 0)),
        (fields_of(ng="nan"), (3.0, 2.0, 0)),
        (fields_of(review="9"), (3.0, 2.0, 0)),
        (fields_of(version="-1"), (3.0, 2.0, 0)),
    ],
)
def test_only_a_sound_threshold_of_this_model_is_used(cache_of, fields, expected):
    """What Redis holds is used if it is sound and set for this model; otherwise the manifest's suggestion holds."""
    threshold = cache_of(StoreThatHolds(fields)).get("tray")
    assert (threshold.ng, threshold.review, threshold.version) == expected
    if expected[2] == 0:
        assert threshold.source is ThresholdSource.MANIFEST


def test_the_last_good_limits_survive_a_restart_without_redis(cache_of):
    """With Redis down at start, the limits last known hold, and say that they come from the file."""
    cache_of(StoreThatHolds(fields_of())).close()
    threshold = cache_of().get("tray")
    assert (threshold.ng, threshold.version, threshold.source) == (3.5, 7, ThresholdSource.FILE)


def test_a_product_that_the_disk_does_not_know_stops_no_other(cache_of):
    """Redis down at start, a product newer than the snapshot: it has no limits, the other keeps its own."""
    cache_of(StoreThatHolds(fields_of())).close()
    cache = cache_of(products=("tray", "lid"))
    assert (cache.get("lid"), cache.get("tray").version) == (None, 7)


def test_redis_down_without_a_snapshot_stops_the_start(cache_of):
    """With Redis down and nothing on disk the line does not start; the message names the server."""
    with pytest.raises(DependencyError, match=REFUSING):
        cache_of()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"tray": 5}', json.dumps({"tray": fields_of(ng="nan")})])
def test_a_broken_snapshot_is_not_used(cache_of, tmp_path, text):
    """A snapshot that is damaged, foreign or senseless is no last known good: the start stops."""
    (tmp_path / "snapshot.json").write_text(text)
    with pytest.raises(DependencyError):
        cache_of()


def test_a_snapshot_of_another_model_says_nothing_of_this_one(cache_of, tmp_path):
    """Promoted while the worker was down, its limits set beforehand, and Redis away: neither the limits on disk nor the
    manifest's suggestion are those in force, so there are none."""
    (tmp_path / "snapshot.json").write_text(json.dumps({"tray": fields_of(sha=OTHER_SHA), "lid": fields_of()}))
    cache = cache_of(products=("tray", "lid"))
    assert (cache.get("tray"), cache.get("lid").version) == (None, 7)


def test_a_product_of_another_line_has_no_limits(cache_of):
    """Asked for a product it does not watch, the cache says None: the part is then UNINSPECTED."""
    assert cache_of(StoreThatHolds({})).get("cable-set") is None


def test_limits_of_a_new_product_are_not_known_while_redis_is_away(cache_of, make_manifest, monkeypatch):
    """Its limits have to be read first: without Redis the product is not ready, and the others keep theirs."""
    monkeypatch.setattr("pipeline.thresholds._LEARN_S", 0.1)
    cache = cache_of(StoreThatHolds(fields_of()))
    assert not cache.learn(make_manifest(product="lid"))
    assert (cache.get("lid"), cache.get("tray").version) == (None, 7)
