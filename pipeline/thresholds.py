"""Thresholds per product as the line has them: read from memory by the judge, kept fresh from Redis.

The line takes a snapshot at start, hears of changes by pub/sub, reads everything again every `refresh_s`, and keeps its
own last known good copy in memory and on disk; the frame path never waits for Redis. What Redis holds is not trusted: a
threshold that is not finite, out of order, set for another model or older than the one in force is not used, and log
and metrics say so. Versions of a product each have their own limits: no score meets those of another network. Never
writes to Redis. Called by `app` and the judge.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import redis
import structlog

from pipeline.errors import ConfigError, DependencyError
from pipeline.health import Health
from pipeline.limits import LINE_FIELDS, Reading, is_older, parse, read
from pipeline.manifest import Manifest
from pipeline.metrics import Metrics
from pipeline.servers import Redis as RedisSettings
from pipeline.threshold_store import CHANNEL, ThresholdStore
from pipeline.types import Model, Threshold, ThresholdSource

_LEARN_S = 5.0
_STAGE = "thresholds"
_MOST_ANNOUNCEMENTS = 1000  # taken at once before a read; the rest leads to the next one

_Version = tuple[str, str]
"""A product and the hash of one of its networks."""

log = structlog.get_logger(__name__)


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
        # Versions that are judged with beside the one in force.
        self._beside: dict[_Version, Manifest] = {}
        self._current: dict[_Version, Threshold] = {}
        self._known: dict[_Version, Threshold] = {}
        self._faults: dict[str, str] = {}
        self._saved: dict[str, dict[str, str]] = {}
        self._read_s = 0.0
        self._read_for: Mapping[str, Manifest] = {}
        self._fresh = True
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=_STAGE, daemon=True)

    def get(self, product: str, model: Model | None = None) -> Threshold | None:
        """Give the limits for the scores of a network, or for those of the version in force; never blocks."""
        if model is not None:
            return self._current.get((product, model.sha256))
        manifest = self._manifests.get(product)
        return None if manifest is None else self._current.get(_version(manifest))

    def start(self) -> None:
        """Take the snapshot and begin to follow changes.

        Raises DependencyError when Redis is down and no last known good copy lies on disk. A product of which the copy
        holds none, or another version's, has no limits until Redis answers.
        """
        self._manifests = dict(self._manifests)  # from here on `take` changes it, and nobody else
        stored = _load(self._settings.snapshot, self._manifests)
        self._known = {version: threshold for version, threshold in stored.items() if threshold.version > 0}
        try:
            self._read()
        except DependencyError as error:
            if not stored:
                raise
            self._current, self._fresh = stored, False
            self._health.ready("thresholds", state=True)
            log.warning("Redis is down: last known good thresholds from disk", error=str(error), hint=error.hint)
            for product in sorted(self._manifests.keys() - {product for product, _ in stored}):
                log.error("no threshold of it on disk: its parts are UNINSPECTED until Redis answers", product=product)
        self._health.beat(_STAGE)
        self._thread.start()

    def learn(self, manifest: Manifest) -> bool:
        """Follow the limits of one more version; says whether they are known, after at most `_LEARN_S`."""
        version = _version(manifest)
        self._beside = {**self._beside, version: manifest}
        until = time.monotonic() + _LEARN_S
        while version not in self._current and time.monotonic() < until:
            self._stop.wait(0.05)
        return version in self._current

    def take(self, manifest: Manifest) -> None:
        """Let this version, whose limits are known, be the one in force of its product."""
        self._manifests = {**self._manifests, manifest.product: manifest}

    def keep(self, product: str, *versions: Manifest) -> None:
        """Follow no versions of a product but these, and the one in force."""
        kept = {_version(version): version for version in versions}
        self._beside = {version: each for version, each in self._beside.items() if version[0] != product} | kept

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
        """Subscribe, then read: a change between the two is announced and not missed.

        The client subscribes anew by itself when its connection breaks; what was announced meanwhile is lost, so that a
        subscription counts as an announcement too.
        """
        with self._store.client.pubsub() as changes:  # type: ignore[no-untyped-call]
            changes.subscribe(CHANNEL)
            self._read()
            while not self._stop.is_set():
                self._beat()
                announced = 0
                while announced < _MOST_ANNOUNCEMENTS and changes.get_message(timeout=0.0 if announced else 0.25):
                    announced += 1
                is_due = time.monotonic() - self._read_s >= self._settings.refresh_s
                is_other = self._manifests is not self._read_for or self._followed().keys() != self._current.keys()
                if announced or is_due or is_other:
                    self._read()

    def _beat(self) -> None:
        self._health.beat(_STAGE)
        self._metrics.threshold_age.set(time.monotonic() - self._read_s)

    def _followed(self) -> dict[_Version, Manifest]:
        return self._beside | {_version(manifest): manifest for manifest in self._manifests.values()}

    def _read(self) -> None:
        self._read_for = self._manifests
        current = {
            version: self._judge(manifest, self._ask(manifest)) for version, manifest in self._followed().items()
        }
        self._read_s = time.monotonic()
        if not self._fresh:
            self._fresh = True
            log.info("Redis answers again")
        self._health.ready("thresholds", state=True)
        if current != self._current:
            for version, threshold in current.items():
                if threshold != self._current.get(version):
                    log.info("threshold", product=version[0], model=version[1][:12], **_shown(threshold))
            self._current = current
        self._save_snapshot()

    def _ask(self, manifest: Manifest) -> Reading:
        """Ask Redis for the limits of a version: those that were set for its network, also before it was promoted."""
        try:
            return read(self._store.of_model(manifest.product, manifest.model_sha256, LINE_FIELDS), manifest)
        except ConfigError as error:
            return Reading(None, "invalid", str(error))

    def _judge(self, manifest: Manifest, reading: Reading) -> Threshold:
        """Turn what Redis holds into the limits in force.

        What cannot be used, or is older than what was in force, gives way to the last good limits of this model.
        """
        version, found = _version(manifest), reading.threshold
        known = self._known.get(version)
        fault: str = reading.fault
        why = reading.why
        if found is not None and known is not None and is_older(found, known):
            fault, why = "older_version", f"Redis has version {found.version} again, set before the one in force"
        elif found is not None:
            self._known[version] = found
        elif known is not None and (fault == "absent" or (fault == "other_model" and reading.version < known.version)):
            fault, why = "older_version", "Redis has lost it"
        if self._manifests.get(manifest.product) is manifest:  # the record is meant for the version in force
            self._tell(manifest, "" if fault == "absent" else fault, why)
        if found is not None and not fault:
            return found
        if known is None or fault == "other_model":
            return manifest.suggestion
        return known if known.source is ThresholdSource.FILE else replace(known, source=ThresholdSource.CACHE)

    def _tell(self, manifest: Manifest, fault: str, why: str) -> None:
        """Make it seen that a record of Redis is not used: once in the log, as long as it lasts in the metrics."""
        product = manifest.product
        if fault == self._faults.get(product, ""):
            return
        self._metrics.threshold_unused(product, before=self._faults.get(product, ""), now=fault)
        self._faults[product] = fault
        if not fault:
            log.info("threshold in Redis is used again", product=product)
            return
        known = self._known.get(_version(manifest))
        log.error(
            "threshold in Redis is not used",
            product=product,
            reason=fault,
            why=why,
            in_force="the model's suggestion"
            if known is None or fault == "other_model"
            else f"version {known.version}",
            hint="`logicrd thresholds set` or `import` puts a new version in force",
        )

    def _lose(self, error: str) -> None:
        if self._fresh:
            self._fresh = False
            self._current = {
                version: replace(threshold, source=ThresholdSource.CACHE)
                if threshold.source is ThresholdSource.REDIS
                else threshold
                for version, threshold in self._current.items()
            }
            log.warning("Redis is lost: last known good thresholds hold", error=error)

    def _save_snapshot(self) -> None:
        path = self._settings.snapshot
        if path is None:
            return
        limits = {product: self.get(product) for product in self._manifests}
        stored = {product: _stored(threshold) for product, threshold in limits.items() if threshold is not None}
        if stored == self._saved:
            return
        fresh = path.with_suffix(".new")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            fresh.write_text(json.dumps(stored, indent=1), encoding="utf-8")
            fresh.replace(path)
            self._saved = stored
        except OSError as error:
            log.error("threshold snapshot not written", path=str(path), error=str(error))


def _version(manifest: Manifest) -> _Version:
    return manifest.product, manifest.model_sha256


def _load(path: Path | None, manifests: Mapping[str, Manifest]) -> dict[_Version, Threshold]:
    """Read the last known good limits; empty when the file is damaged or is not there."""
    if path is None or not path.is_file():
        return {}
    loaded: dict[_Version, Threshold] = {}
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        for product in manifests.keys() & stored.keys():
            threshold, manifest = replace(parse(stored[product]), source=ThresholdSource.FILE), manifests[product]
            if threshold.model_sha256 == manifest.model_sha256:  # else nobody knows what was set for this one
                loaded[_version(manifest)] = threshold if threshold.version > 0 else manifest.suggestion
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, ConfigError) as error:
        log.error("threshold snapshot refused", path=str(path), error=str(error))
        return {}
    return loaded


def _stored(threshold: Threshold) -> dict[str, str]:
    return {
        "ng": repr(threshold.ng),
        "review": repr(threshold.review),
        "version": str(threshold.version),
        "model_sha256": threshold.model_sha256,
        "updated_at": "" if threshold.set_at is None else threshold.set_at.isoformat(),
    }


def _shown(threshold: Threshold) -> dict[str, object]:
    return {
        "ng": round(threshold.ng, 4),
        "review": round(threshold.review, 4),
        "version": threshold.version,
        "source": threshold.source.value,
    }
