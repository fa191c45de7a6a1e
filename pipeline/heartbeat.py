"""The worker's own word that it is well: an event every few seconds on the status topic, the last one kept by its key.

One thread looks at the stages' figures and tells them; a heartbeat that is not out of memory yet, on disk or in Kafka,
is not followed by another, so it fills no queue. Decides nothing. Owned by `app`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime

import structlog

from pipeline.events import Encoder, Event
from pipeline.health import Health
from pipeline.manifest import Manifest
from pipeline.metrics import Metrics
from pipeline.rollouts import Rollout
from pipeline.thresholds import ThresholdCache
from pipeline.wire import (
    CANDIDATE_FIGURES,
    HeartbeatData,
    WorkerCameraData,
    WorkerCandidateData,
    WorkerModelData,
    WorkerStageData,
)

_STAGE = "heartbeat"
_TURN_S = 1.0

log = structlog.get_logger(__name__)


class Heartbeat:
    """Tells of one worker every `interval_s`, between `start` and `close`; `put` must not block."""

    def __init__(
        self,
        interval_s: float,
        manifests: Mapping[str, Manifest],
        thresholds: ThresholdCache,
        *,
        epoch: Callable[[], int | None],
        refused: Callable[[str], str],
        candidate: Callable[[str], tuple[Rollout, str] | None],
        encoder: Encoder,
        put: Callable[[Event], None],
        metrics: Metrics,
        health: Health,
    ) -> None:
        self._interval_s = interval_s
        self._manifests = manifests
        self._thresholds = thresholds
        self._epoch = epoch
        self._refused = refused
        self._candidate = candidate
        self._encoder = encoder
        self._put = put
        self._metrics = metrics
        self._health = health
        self._confirmed = threading.Event()
        self._confirmed.set()
        self._began_s = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=_STAGE, daemon=True)

    def start(self) -> None:
        """Begin to tell, at once."""
        self._began_s = time.monotonic()
        self._health.beat(_STAGE)
        self._thread.start()

    def close(self) -> None:
        """Tell of the end, and end; what `put` leads to must still be there."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(2.0)
            self._tell("stopping")

    def _run(self) -> None:
        due_s = time.monotonic()
        while not self._stop.is_set():
            self._health.beat(_STAGE)
            if time.monotonic() >= due_s and self._confirmed.is_set():
                due_s = time.monotonic() + self._interval_s
                try:
                    self._tell("running")
                except Exception:  # the thread's top frame: the next one may be told
                    log.exception("heartbeat not told")
            self._stop.wait(min(_TURN_S, self._interval_s))
        self._health.retire(_STAGE)

    def _tell(self, state: str) -> None:
        self._confirmed.clear()
        event = self._encoder.heartbeat(self._look(state), datetime.now(UTC))
        self._put(replace(event, done=self._confirmed.set))

    def _look(self, state: str) -> HeartbeatData:
        """Gather what the stages say of themselves at this moment."""
        figures = self._metrics.snapshot()
        limits = {product: self._thresholds.get(product) for product in self._manifests}
        return HeartbeatData(
            worker=self._encoder.place.worker,
            host=self._encoder.place.host,
            line=self._encoder.place.line,
            state="stopping" if state == "stopping" else "running",
            interval_s=self._interval_s,
            uptime_s=round(time.monotonic() - self._began_s, 1),
            stages=[WorkerStageData(name=name, age_s=round(age_s, 2)) for name, age_s in self._health.ages_s().items()],
            stalled=self._health.stalled(),
            not_ready=self._health.missing(),
            cameras=[
                WorkerCameraData(
                    camera_id=camera.camera_id, station=camera.station, state=camera.state.value, reason=camera.reason
                )
                for camera in figures.cameras
            ],
            parts_open=sum(station.open for station in figures.stations),
            parts_undelivered=figures.undelivered,
            unacknowledged=int(self._metrics.registry.get_sample_value("inspection_events_unacknowledged") or 0),
            models=[
                WorkerModelData(
                    product_id=product,
                    version=str(manifest.version),
                    sha256=manifest.model_sha256,
                    threshold_version=None if (limit := limits[product]) is None else limit.version,
                    threshold_source=None if limit is None else limit.source.value,
                    refused=self._refused(product),
                    candidate=self._tried(product),
                )
                for product, manifest in self._manifests.items()
            ],
            epoch=self._epoch(),
        )

    def _tried(self, product: str) -> WorkerCandidateData | None:
        if (found := self._candidate(product)) is None:
            return None
        rollout, fault = found
        name, labels = "inspection_candidate_views_total", {"product": product, "version": str(rollout.version)}
        views = {
            outcome: int(self._metrics.registry.get_sample_value(name, {**labels, "outcome": outcome}) or 0)
            for outcome in CANDIDATE_FIGURES
        }
        return WorkerCandidateData(
            version=str(rollout.version),
            sha256=rollout.model_sha256,
            mode=rollout.mode,
            percent=rollout.percent,
            refused=fault,
            **views,
        )
