"""Every number the line counts, declared once: for Prometheus, the live table and the closing summary.

Stages are handed one `Metrics` and report to it from their own threads; nothing here decides anything. No part id, no
frame id and no error text ever becomes a label.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter as Tally
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from pipeline.types import CameraState, Cause, Judgement

_LATENCY_BUCKETS_S = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0)
_WINDOW = 2048  # latencies kept per camera for the table's quantiles: about ten minutes at 3 frames/s


@dataclass(slots=True)
class CameraFigures:
    """What one camera did since the start."""

    product: str
    station: str
    state: CameraState = CameraState.CONNECTING
    reason: str = ""
    frames: int = 0
    queued: int = 0
    judgements: Tally[Judgement] = field(default_factory=Tally)
    causes: Tally[str] = field(default_factory=Tally)
    latencies_s: deque[float] = field(default_factory=lambda: deque(maxlen=_WINDOW))


@dataclass(frozen=True, slots=True)
class CameraSnapshot:
    """A camera's figures at one moment; `p50_ms` and `p99_ms` are from capture to verdict, None before the first."""

    camera_id: str
    product: str
    station: str
    state: CameraState
    reason: str
    frames: int
    queued: int
    judgements: dict[str, int]
    causes: dict[str, int]
    p50_ms: float | None
    p99_ms: float | None


@dataclass(frozen=True, slots=True)
class LineSnapshot:
    """The line's figures at one moment: of the cameras that it reads, and the sums of all that it has read.

    `acknowledged` counts part verdicts that Kafka has confirmed."""

    cameras: tuple[CameraSnapshot, ...]
    triggered: int
    judged: int
    acknowledged: int
    undelivered: int
    p50_ms: float | None
    p99_ms: float | None


class Metrics:
    """Counts of one line; safe from every thread."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._lock = threading.Lock()
        self._cameras: dict[str, CameraFigures] = {}
        self._retired: set[str] = set()
        self._judged = self._acknowledged = self._undelivered = 0
        registry = self.registry
        self._frames = Counter("inspection_frames", "Frames read", ["camera"], registry=registry)
        self._verdicts = Counter(
            "inspection_parts", "Part verdicts given", ["station", "verdict", "cause"], registry=registry
        )
        self._latency = Histogram(
            "inspection_verdict_latency_seconds", "Capture to verdict", buckets=_LATENCY_BUCKETS_S, registry=registry
        )
        self._queued = Gauge("inspection_queue_frames", "Frames waiting", ["camera"], registry=registry)
        self._up = Gauge("inspection_camera_up", "1 while frames arrive", ["camera"], registry=registry)
        self._late = Counter("inspection_late_results", "Answers after their part's verdict", registry=registry)
        self._stage = Histogram(
            "inspection_stage_seconds", "Time in a stage", ["stage"], buckets=_LATENCY_BUCKETS_S, registry=registry
        )
        self._events = Counter("inspection_events", "Events by fate", ["fate"], registry=registry)
        self._refused = Gauge(
            "inspection_cameras_refused", "Cameras of the pool that are not read", ["reason"], registry=registry
        )
        self.epoch = Gauge("inspection_pool_epoch", "Generation of the pool's group", registry=registry)
        self.unacknowledged = Gauge(
            "inspection_events_unacknowledged", "Events Kafka has not confirmed yet", registry=registry
        )
        self.threshold_age = Gauge(
            "inspection_threshold_age_seconds", "Since the last good read of Redis", registry=registry
        )

    def camera(self, camera_id: str, *, product: str, station: str) -> None:
        """Announce a camera, so that it is shown before its first frame; one that comes again goes on counting."""
        with self._lock:
            figures = self._cameras.setdefault(camera_id, CameraFigures(product, station))
            figures.product, figures.station = product, station
            figures.state, figures.reason = CameraState.CONNECTING, ""
            self._retired.discard(camera_id)
        self._frames.labels(camera_id)
        self._up.labels(camera_id).set(0)

    def retire(self, camera_id: str) -> None:
        """Show a camera no longer. Its parts stay in the line's sums, and those under way are still counted."""
        with self._lock:
            self._retired.add(camera_id)
        for gauge in (self._up, self._queued):
            with contextlib.suppress(KeyError):
                gauge.remove(camera_id)

    def refused(self, reasons: Mapping[str, int]) -> None:
        """Note how many cameras of the pool this worker does not read, by the code of the reason."""
        self._refused.clear()
        for reason, count in reasons.items():
            self._refused.labels(reason).set(count)

    def camera_state(self, camera_id: str, state: CameraState, reason: str = "") -> None:
        """Note what a camera's reader is doing."""
        with self._lock:
            figures = self._cameras[camera_id]
            figures.state, figures.reason = state, reason
            if camera_id in self._retired:
                return
        self._up.labels(camera_id).set(state is CameraState.STREAMING)

    def frame(self, camera_id: str) -> None:
        """Count a frame that was read, usable or not: a part triggered."""
        with self._lock:
            self._cameras[camera_id].frames += 1
        self._frames.labels(camera_id).inc()

    def queued(self, camera_id: str, frames: int) -> None:
        """Note how many frames of a camera wait for inference."""
        self._cameras[camera_id].queued = frames
        if camera_id in self._retired:  # what a removed camera left in its queue
            return
        self._queued.labels(camera_id).set(frames)

    def stage(self, stage: str, seconds: float) -> None:
        """Note the time that a frame spent in a stage."""
        self._stage.labels(stage).observe(seconds)

    def verdict(self, camera_id: str, judgement: Judgement, cause: Cause | None, latency_s: float) -> None:
        """Count a part's verdict."""
        with self._lock:
            figures = self._cameras[camera_id]
            figures.judgements[judgement] += 1
            if cause is not None:
                figures.causes[cause.value] += 1
            figures.latencies_s.append(latency_s)
            self._judged += 1
        self._verdicts.labels(figures.station, judgement.value, cause.value if cause else "").inc()
        self._latency.observe(latency_s)

    def late(self) -> None:
        """Count an answer that came after its part's verdict had gone out."""
        self._late.inc()

    def acknowledged(self, *, is_part: bool) -> None:
        """Count an event that Kafka has confirmed."""
        if is_part:
            with self._lock:
                self._acknowledged += 1
        self._events.labels("acknowledged").inc()

    def undelivered(self, count: int, *, parts: int) -> None:
        """Count events that will not reach Kafka: the line's only way to lose a verdict, and never a silent one."""
        with self._lock:
            self._undelivered += parts
        self._events.labels("undelivered").inc(count)

    def snapshot(self) -> LineSnapshot:
        """Give the figures of this moment."""
        with self._lock:
            cameras = tuple(
                _camera_snapshot(name, figures) for name, figures in self._cameras.items() if name not in self._retired
            )
            triggered = sum(figures.frames for figures in self._cameras.values())
            latencies = [value for figures in self._cameras.values() for value in figures.latencies_s]
            counts = self._judged, self._acknowledged, self._undelivered
        p50, p99 = _quantiles_ms(latencies)
        return LineSnapshot(cameras, triggered, *counts, p50, p99)


def _camera_snapshot(name: str, figures: CameraFigures) -> CameraSnapshot:
    p50, p99 = _quantiles_ms(figures.latencies_s)
    return CameraSnapshot(
        camera_id=name,
        product=figures.product,
        station=figures.station,
        state=figures.state,
        reason=figures.reason,
        frames=figures.frames,
        queued=figures.queued,
        judgements={judgement.value: figures.judgements[judgement] for judgement in Judgement},
        causes=dict(figures.causes),
        p50_ms=p50,
        p99_ms=p99,
    )


def _quantiles_ms(latencies_s: deque[float] | list[float]) -> tuple[float | None, float | None]:
    if not latencies_s:
        return None, None
    p50, p99 = np.quantile(np.fromiter(latencies_s, float), (0.5, 0.99)) * 1e3
    return round(float(p50), 1), round(float(p99), 1)
