"""Thresholds per product: written to Redis with an author, read from memory by the line.

The line takes a snapshot at start, hears of changes by pub/sub, reads everything again every `refresh_s`, and keeps its
own last known good copy in memory and on disk; the frame path never waits for Redis. What Redis holds is not trusted:
a threshold that is not finite, out of order or set for another model is not used.
"""

from __future__ import annotations

import contextlib
import json
import math
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, cast

import redis
import structlog
from redis.backoff import NoBackoff
from redis.retry import Retry

from pipeline.cameras import read_secret
from pipeline.errors import CheckError, ConfigError, DependencyError
from pipeline.health import Health
from pipeline.manifest import Manifest
from pipeline.metrics import Metrics
from pipeline.servers import Redis as RedisSettings
from pipeline.types import Threshold, ThresholdSource

KEY = "logicrd:threshold:"
CHANNEL = "logicrd:thresholds"
HISTORY_LENGTH = 1000
_TIMEOUT_S = 0.5
_STAGE = "thresholds"

# Compare-and-set on the version: two engineers who change the same product never overwrite each other unseen.
_SET = """
local version = tonumber(redis.call('HGET', KEYS[1], 'version') or '0')
if ARGV[1] ~= '' and tonumber(ARGV[1]) ~= version then return -version - 1 end
local fields = {'ng', ARGV[2], 'review', ARGV[3], 'version', version + 1, 'model_sha256', ARGV[4],
                'updated_at', ARGV[5], 'updated_by', ARGV[6], 'reason', ARGV[7]}
redis.call('HSET', KEYS[1], unpack(fields))
redis.call('XADD', KEYS[1] .. ':history', 'MAXLEN', '~', ARGV[8], '*', unpack(fields))
redis.call('PUBLISH', ARGV[9], ARGV[10])
return version + 1
"""

log = structlog.get_logger(__name__)


class ThresholdStore:
    """Reads and writes of the thresholds in Redis; used by the commands and, for reading, by the cache."""

    def __init__(self, settings: RedisSettings) -> None:
        password = read_secret(settings.password_file).get_secret_value() if settings.password_file else None
        self.url = settings.url
        self.client: redis.Redis = redis.Redis.from_url(
            settings.url,
            password=password,
            decode_responses=True,
            socket_timeout=_TIMEOUT_S,
            socket_connect_timeout=_TIMEOUT_S,
            retry=Retry(NoBackoff(), 1),
            client_name="logicrd",
        )

    def get(self, product: str) -> dict[str, str]:
        """Give a product's hash as it stands; empty when there is none. Raises DependencyError."""
        with self._reachable():
            return cast("dict[str, str]", self.client.hgetall(KEY + product))

    def history(self, product: str, count: int) -> list[dict[str, str]]:
        """Give the last changes of a product, newest first. Raises DependencyError."""
        with self._reachable():
            entries = cast(
                "list[tuple[str, dict[str, str]]]", self.client.xrevrange(f"{KEY}{product}:history", count=count)
            )
        return [fields for _, fields in entries]

    def set(
        self,
        manifest: Manifest,
        *,
        ng: float,
        review: float,
        author: str,
        reason: str,
        expected_version: int | None = None,
    ) -> int:
        """Set a product's limits; gives the new version.

        Raises ConfigError for limits that make no sense, CheckError when somebody changed them meanwhile,
        DependencyError when Redis cannot be reached.
        """
        check_limits(ng, review)
        arguments = [
            "" if expected_version is None else expected_version,
            repr(ng),
            repr(review),
            manifest.model_sha256,
            datetime.now(UTC).isoformat(timespec="milliseconds"),
            author,
            reason,
            HISTORY_LENGTH,
            CHANNEL,
            manifest.product,
        ]
        with self._reachable():
            version = int(cast("Any", self.client.eval(_SET, 1, KEY + manifest.product, *arguments)))
        if version < 0:
            raise CheckError(
                f"threshold of {manifest.product!r} is at version {-version - 1}, not {expected_version}",
                hint="look at `logicrd thresholds history`, then set it again",
            )
        return version

    @contextlib.contextmanager
    def _reachable(self) -> Any:  # noqa: ANN401 (a generator, as the decorator wants it)
        try:
            yield
        except redis.RedisError as error:
            raise DependencyError(
                f"Redis at {self.url}: {error}", hint="start it, or correct redis.url in the line file"
            ) from None


class ThresholdCache:
    """The line's own copy: `get` is a dictionary look-up, everything else happens on one thread of its own."""

    def __init__(
        self,
        store: ThresholdStore,
        manifests: Mapping[str, Manifest],
        settings: RedisSettings,
        *,
        metrics: Metrics,
        health: Health,
    ) -> None:
        self._store = store
        self._manifests = manifests
        self._settings = settings
        self._metrics = metrics
        self._health = health
        self._current: dict[str, Threshold] = {}
        self._read_s = 0.0
        self._fresh = True
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=_STAGE, daemon=True)

    def get(self, product: str) -> Threshold | None:
        """Give the limits in force; never blocks."""
        return self._current.get(product)

    def start(self) -> None:
        """Take the snapshot and begin to follow changes.

        Raises DependencyError when Redis is down and no last known good copy lies on disk.
        """
        try:
            self._read()
        except DependencyError as error:
            if not self._load_snapshot():
                raise
            self._fresh = False
            log.warning("Redis is down: last known good thresholds from disk", error=str(error))
        self._health.beat(_STAGE)
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(3.0)
        self._store.client.close()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._follow()
            except redis.RedisError as error:
                self._lose(str(error))
            except DependencyError as error:
                self._lose(str(error))
            except Exception:  # the thread's top frame: thresholds stay as they are, and the fault is seen
                log.exception("following thresholds failed")
            self._beat()
            self._stop.wait(1.0)
        self._health.retire(_STAGE)

    def _follow(self) -> None:
        """Subscribe, then read: a change between the two is announced and not missed."""
        with self._store.client.pubsub(ignore_subscribe_messages=True) as changes:  # type: ignore[no-untyped-call]
            changes.subscribe(CHANNEL)
            self._read()
            while not self._stop.is_set():
                self._beat()
                message = changes.get_message(timeout=0.25)
                if message is not None or time.monotonic() - self._read_s >= self._settings.refresh_s:
                    self._read()

    def _beat(self) -> None:
        self._health.beat(_STAGE)
        self._metrics.threshold_age.set(time.monotonic() - self._read_s)

    def _read(self) -> None:
        current = {product: self._judge(product, self._store.get(product)) for product in self._manifests}
        self._read_s = time.monotonic()
        if not self._fresh:
            self._fresh = True
            log.info("Redis answers again")
        self._health.ready("thresholds", state=True)
        if current != self._current:
            for product, threshold in current.items():
                if threshold != self._current.get(product):
                    log.info("threshold", product=product, **_shown(threshold))
            self._current = current
            self._save_snapshot()

    def _judge(self, product: str, fields: Mapping[str, str]) -> Threshold:
        """Turn what Redis holds into limits; what cannot be used gives way to the last good ones of this model."""
        manifest = self._manifests[product]
        if not fields:
            return manifest.suggestion
        try:
            threshold = parse(fields)
        except ConfigError as error:
            log.error("threshold in Redis refused", product=product, error=str(error), hint=error.hint)
            return self._current.get(product, manifest.suggestion)
        if threshold.model_sha256 != manifest.model_sha256:
            log.warning(
                "threshold in Redis is for another model: the manifest's suggestion holds",
                product=product,
                version=threshold.version,
            )
            return manifest.suggestion
        return threshold

    def _lose(self, error: str) -> None:
        if self._fresh:
            self._fresh = False
            self._current = {
                product: replace(threshold, source=ThresholdSource.CACHE)
                if threshold.source is ThresholdSource.REDIS
                else threshold
                for product, threshold in self._current.items()
            }
            log.warning("Redis is lost: last known good thresholds hold", error=error)

    def _load_snapshot(self) -> bool:
        path = self._settings.snapshot
        if path is None or not path.is_file():
            return False
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            for product, manifest in self._manifests.items():
                threshold = replace(parse(stored[product]), source=ThresholdSource.FILE)
                same = threshold.model_sha256 == manifest.model_sha256
                self._current[product] = threshold if same and threshold.version > 0 else manifest.suggestion
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
            log.error("threshold snapshot refused", path=str(path), error=str(error))
            return False
        self._health.ready("thresholds", state=True)
        return True

    def _save_snapshot(self) -> None:
        path = self._settings.snapshot
        if path is None:
            return
        stored = {product: _stored(threshold) for product, threshold in self._current.items()}
        fresh = path.with_suffix(".new")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            fresh.write_text(json.dumps(stored, indent=1), encoding="utf-8")
            fresh.replace(path)
        except OSError as error:
            log.error("threshold snapshot not written", path=str(path), error=str(error))


def check_limits(ng: float, review: float) -> None:
    """Refuse limits that would let everything or nothing through. Raises ConfigError."""
    if not (math.isfinite(ng) and math.isfinite(review)):
        raise ConfigError(f"limits must be finite numbers, not ng={ng} review={review}")
    if review > ng:
        raise ConfigError(f"review={review} lies above ng={ng}", hint="review marks doubt below NG: lower it")


def parse(fields: Mapping[str, str]) -> Threshold:
    """Read a threshold hash. Raises ConfigError for anything that is not one; nothing in it is trusted."""
    try:
        ng, review, version = float(fields["ng"]), float(fields["review"]), int(fields["version"])
    except (KeyError, ValueError, TypeError) as error:
        raise ConfigError(f"not a threshold: {error}", hint="set it with `logicrd thresholds set`") from None
    check_limits(ng, review)
    if version < 0:
        raise ConfigError(f"version {version} is negative", hint="set it with `logicrd thresholds set`")
    return Threshold(ng, review, version, ThresholdSource.REDIS, str(fields.get("model_sha256", "")))


def _stored(threshold: Threshold) -> dict[str, str]:
    return {
        "ng": repr(threshold.ng),
        "review": repr(threshold.review),
        "version": str(threshold.version),
        "model_sha256": threshold.model_sha256,
    }


def _shown(threshold: Threshold) -> dict[str, object]:
    return {
        "ng": round(threshold.ng, 4),
        "review": round(threshold.review, 4),
        "version": threshold.version,
        "source": threshold.source.value,
    }
